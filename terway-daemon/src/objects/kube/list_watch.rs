//! List and watch of one resource: a list, then its changes from the list's resource version on, for as long as the daemon runs.
//!
//! ```text
//!            list ok                      server ends it, connection lost
//! LISTING ───────────────► WATCHING ◄──────────────────────────────┐
//!    ▲ │ failed: pause        │ │                                    │
//!    └─┘                      │ └── pause if it failed ──────────────┘
//!    ▲    410, or resource    │
//!    └──── versions reset ────┘
//! ```
//!
//! What a watch has sent stays in force whatever happens; only a complete list deletes. After a failure the *watch* is tried again, not the list,
//! because lists are what overloads an API server.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::{Buf as _, BytesMut};
use http::StatusCode;
use http_body_util::BodyExt as _;
use terway_core::objects::{Kind, ObjectName};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, info};

use super::client::{ApiClient, ApiError, chain, forward};
use super::decode::{self, BodyReader, Decode, Item, WatchEvent};
use crate::supervise;

/// Items of a list that are handed on together.
const BATCH: usize = 256;
/// The longest line of a watch in bytes. etcd's limit for an object is 1.5 MiB; JSON may take more than what is stored.
const LINE: usize = 16 << 20;
/// Objects per page of a list that is read from etcd (client-go's default).
const PAGE: u32 = 500;
/// Failed watches in a row at the same resource version after which everything is listed again.
const FUTILE: u32 = 5;

/// Pauses and limits, scaled down in tests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pacing {
    /// The first pause after a failure. Doubled with each failure, with jitter.
    pub(super) first_pause: Duration,
    /// The longest pause after a failure.
    pub(super) longest_pause: Duration,
    /// The pause after which a forbidden resource, or one that the server does not have, is asked for again.
    pub(super) ask_again: Duration,
    /// The time that the server is asked to end a watch after; drawn between this and twice this.
    pub(super) watch_limit: Duration,
}

impl Pacing {
    /// The pauses of a node, divided by `scale`.
    pub(super) fn scaled(scale: u32) -> Self {
        let by = scale.max(1);
        Self {
            first_pause: Duration::from_millis(800) / by,
            longest_pause: Duration::from_secs(30) / by,
            ask_again: Duration::from_secs(60) / by,
            watch_limit: Duration::from_secs(300),
        }
    }

    /// The pauses after failures in a row.
    fn pauses(self) -> impl Iterator<Item = Duration> {
        let Self { first_pause, longest_pause, .. } = self;
        let pauses = ExponentialBuilder::default().with_min_delay(first_pause).with_max_delay(longest_pause);
        pauses.with_factor(2.0).with_jitter().without_max_times().build()
    }
}

/// A resource of the API as it is listed and watched.
#[derive(Clone, Debug)]
pub(super) struct Resource<D = Kind> {
    /// The kind of its objects.
    pub(super) kind: D,
    /// Its paths, the preferred version first; a server that answers 404 is asked for the next one.
    pub(super) paths: Vec<String>,
    /// A field selector, percent-encoded; empty selects all.
    pub(super) fields: String,
    /// Whether a server without the resource is a server without such objects.
    pub(super) is_optional: bool,
}

/// What list and watch have found.
#[derive(Debug)]
pub(super) enum Event<I = Item> {
    /// A complete list begins.
    ListBegin,
    /// An object of the list, or one that was created or updated.
    Item(I),
    /// An object was deleted.
    Delete(ObjectName),
    /// The list is complete.
    ListEnd,
    /// The resource cannot be read at the moment, and why; or it can.
    Readable(Result<(), Failure>),
    /// The view is as new as this moment: a bookmark, an event, or the end of a list.
    Confirmed,
}

/// Why a resource cannot be read at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// The server forbids it: the role lacks a rule.
    pub(super) is_forbidden: bool,
    /// The reason, without a full stop.
    pub(super) reason: String,
}

/// Where events go: with the number of the stream.
pub(super) type Events<I> = mpsc::Sender<(usize, Vec<Event<I>>)>;

/// One list and watch.
pub(super) struct ListWatch<D: Decode = Kind> {
    pub(super) stream: usize,
    pub(super) api: Arc<ApiClient>,
    pub(super) resource: Resource<D>,
    pub(super) pacing: Pacing,
    /// Lists take turns.
    pub(super) turn: Arc<Semaphore>,
    pub(super) events: Events<D::Item>,
}

/// The end of one list or watch.
enum End {
    /// A list is complete at this resource version.
    Listed(String),
    /// The server has ended the watch in good order.
    Ended,
    /// The resource version is too old, or versions have been reset: a new list, from etcd if `consistent`.
    Expired {
        consistent: bool,
    },
    /// The server does not have the resource.
    Missing,
    Failed(ApiError),
}

/// Nobody receives the events any more.
struct Closed;

impl<D: Decode> ListWatch<D> {
    /// Runs until the receiver of the events is gone.
    pub(super) async fn run(mut self) {
        let _closed = self.follow().await;
    }

    async fn follow(&mut self) -> Result<(), Closed> {
        let mut version: Option<String> = None;
        let mut relist = Relist::FromCache;
        let mut pauses = self.pacing.pauses();
        let (mut failed_watches, mut path) = (0, 0);
        // The connection was lost: the server may come back with another etcd.
        let mut is_version_doubtful = false;
        loop {
            let begun = Instant::now();
            let url = self.resource.paths[path].clone();
            let end = match &mut version {
                None => self.list(&url, &relist).await?,
                Some(version) if is_version_doubtful => match self.is_reset(&url, version).await {
                    Ok(true) => End::Expired { consistent: true },
                    Ok(false) => {
                        is_version_doubtful = false;
                        continue;
                    }
                    Err(error) => End::Failed(error),
                },
                Some(version) => self.watch(&url, version).await?,
            };
            // A watch that has lived for a while has worked.
            if begun.elapsed() > self.pacing.longest_pause {
                (pauses, failed_watches) = (self.pacing.pauses(), 0);
            }
            match end {
                End::Listed(listed) => {
                    (pauses, failed_watches, is_version_doubtful) = (self.pacing.pauses(), 0, false);
                    version = Some(listed);
                }
                End::Ended => sleep(self.pacing.first_pause / 8).await,
                End::Expired { consistent } => {
                    info!(kind = %self.resource.kind, consistent, "the resource version of the watch has expired; listing again");
                    relist = match version.take() {
                        Some(version) if !consistent => Relist::NotOlderThan(version),
                        _ => Relist::FromEtcd { limit: Some(PAGE) },
                    };
                }
                End::Missing if path + 1 < self.resource.paths.len() => path += 1,
                End::Missing => {
                    path = 0;
                    if self.resource.is_optional {
                        self.send(vec![Event::ListBegin, Event::ListEnd, Event::Readable(Ok(())), Event::Confirmed])
                            .await?;
                    } else {
                        let reason = format!("the API server does not serve {}", self.resource.paths.join(" or "));
                        self.send(vec![Event::Readable(Err(Failure { is_forbidden: false, reason }))]).await?;
                    }
                    sleep(jittered(self.pacing.ask_again)).await;
                }
                End::Failed(error) => {
                    debug!(kind = %self.resource.kind, %error, "list or watch failed");
                    let verb = if version.is_none() { "list" } else { "watch" };
                    is_version_doubtful |= matches!(error, ApiError::Connection(_));
                    let pause = self.pause_after(&error, &mut pauses);
                    match (&version, &relist, error.status()) {
                        // A list that is not older than a version which this server does not know yet, or not any more.
                        (None, Relist::NotOlderThan(_), Some(StatusCode::GONE | StatusCode::GATEWAY_TIMEOUT)) => {
                            relist = Relist::FromEtcd { limit: Some(PAGE) };
                        }
                        // The continue token has expired.
                        (None, _, Some(StatusCode::GONE)) => relist = Relist::FromEtcd { limit: None },
                        (Some(_), ..) => {
                            failed_watches += 1;
                            if failed_watches >= FUTILE {
                                (version, failed_watches, relist) = (None, 0, Relist::FromEtcd { limit: Some(PAGE) });
                            }
                        }
                        _ => {}
                    }
                    let is_forbidden = error.status() == Some(StatusCode::FORBIDDEN);
                    let failure = Failure { is_forbidden, reason: format!("failed to {verb}: {error}") };
                    self.send(vec![Event::Readable(Err(failure))]).await?;
                    sleep(pause).await;
                }
            }
        }
    }

    fn pause_after(&self, error: &ApiError, pauses: &mut impl Iterator<Item = Duration>) -> Duration {
        let pause = pauses.next().unwrap_or(self.pacing.longest_pause);
        match error {
            ApiError::Status { retry_after: Some(asked), .. } => pause.max((*asked).min(Duration::from_secs(300))),
            ApiError::Status { status: StatusCode::FORBIDDEN, .. } => jittered(self.pacing.ask_again / 2),
            _ => pause,
        }
    }

    async fn send(&self, events: Vec<Event<D::Item>>) -> Result<(), Closed> {
        self.events.send((self.stream, events)).await.map_err(|_closed| Closed)
    }

    async fn list(&self, path: &str, relist: &Relist) -> Result<End, Closed> {
        // Never closed.
        let _turn = self.turn.acquire().await;
        self.send(vec![Event::ListBegin]).await?;
        let mut continue_token = String::new();
        loop {
            let query = relist.query(&self.resource.fields, &continue_token);
            let body = match self.api.get(&format!("{path}?{query}"), true).await {
                Ok(reply) => reply.into_body(),
                Err(error) if error.status() == Some(StatusCode::NOT_FOUND) => return Ok(End::Missing),
                Err(error) => return Ok(End::Failed(error)),
            };
            let (sender, chunks) = mpsc::channel(4);
            let forwarded = forward(body, sender);
            let read = {
                let (kind, stream, events) = (self.resource.kind, self.stream, self.events.clone());
                supervise::blocking(move || read_list(kind, BodyReader::new(chunks), stream, &events))
            };
            let (read, ()) = tokio::join!(read, forwarded);
            let meta = match read {
                Ok(meta) => meta,
                Err(error) => return Ok(End::Failed(ApiError::Reply(format!("the list cannot be used: {error}")))),
            };
            if meta.continue_token.is_empty() {
                if meta.resource_version.is_empty() {
                    return Ok(End::Failed(ApiError::Reply("the list has no resource version".to_owned())));
                }
                self.send(vec![Event::ListEnd, Event::Readable(Ok(())), Event::Confirmed]).await?;
                return Ok(End::Listed(meta.resource_version));
            }
            continue_token = meta.continue_token;
        }
    }

    /// Watches from `version` on, which follows what was seen.
    async fn watch(&self, path: &str, version: &mut String) -> Result<End, Closed> {
        let limit = self.pacing.watch_limit.mul_f64(1.0 + fastrand::f64());
        let mut query =
            format!("watch=1&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={}", limit.as_secs());
        if !self.resource.fields.is_empty() {
            query = format!("{query}&fieldSelector={}", self.resource.fields);
        }
        let mut body = match self.api.get(&format!("{path}?{query}"), false).await {
            Ok(reply) => reply.into_body(),
            Err(error) => return Ok(self.refused(error)),
        };
        self.send(vec![Event::Readable(Ok(()))]).await?;
        // The server ends the watch; if it does not, the client does.
        let deadline = Instant::now() + limit + Duration::from_secs(15);
        let mut buffer = BytesMut::new();
        loop {
            let frame = match timeout_at(deadline, body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => return Ok(End::Failed(ApiError::Connection(chain(&error)))),
                // What is left of a line that was cut off comes again.
                Ok(None) | Err(_) => return Ok(End::Ended),
            };
            let Ok(data) = frame.into_data() else { continue };
            buffer.extend_from_slice(&data);
            let mut events = Vec::new();
            let end = self.lines(&mut buffer, version, &mut events);
            if !events.is_empty() {
                events.push(Event::Confirmed);
                self.send(events).await?;
            }
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    /// Whether the server's resource versions are lower than one that was seen: etcd was restored, and a watch from that version would be silent.
    async fn is_reset(&self, path: &str, version: &str) -> Result<bool, ApiError> {
        let query = Relist::FromEtcd { limit: Some(1) }.query(&self.resource.fields, "");
        let body = self.api.get(&format!("{path}?{query}"), true).await?.into_body();
        let (sender, chunks) = mpsc::channel(4);
        let read = supervise::blocking(move || decode::list(BodyReader::new(chunks), &mut |_| Ok(())));
        let (meta, ()) = tokio::join!(read, forward(body, sender));
        let meta = meta.map_err(|error| ApiError::Reply(format!("the list cannot be used: {error}")))?;
        Ok(is_older(&meta.resource_version, version))
    }

    fn refused(&self, error: ApiError) -> End {
        match error.status() {
            Some(StatusCode::GONE) => End::Expired { consistent: false },
            Some(StatusCode::NOT_FOUND) => End::Expired { consistent: true },
            _ => End::Failed(error),
        }
    }

    /// Takes the complete lines out of the buffer; a result ends the watch.
    fn lines(&self, buffer: &mut BytesMut, version: &mut String, events: &mut Vec<Event<D::Item>>) -> Option<End> {
        while let Some(at) = buffer.iter().position(|byte| *byte == b'\n') {
            let line = buffer.split_to(at);
            buffer.advance(1);
            if line.trim_ascii().is_empty() {
                continue;
            }
            let event = match WatchEvent::read(self.resource.kind, &line) {
                Ok(event) => event,
                Err(reason) => return Some(End::Failed(ApiError::Reply(reason))),
            };
            let (event, seen) = match event {
                WatchEvent::Upsert(item, seen) => (Event::Item(item), seen),
                WatchEvent::Delete(key, seen) => (Event::Delete(key), seen),
                WatchEvent::Bookmark(seen) => (Event::Confirmed, seen),
                WatchEvent::Error { code: 410, .. } => return Some(End::Expired { consistent: false }),
                WatchEvent::Error { code, message } => {
                    let reason = format!("the server ended the watch: {message} (status {code})");
                    return Some(End::Failed(ApiError::Reply(reason)));
                }
            };
            if is_older(&seen, version) {
                return Some(End::Expired { consistent: true });
            }
            if !seen.is_empty() {
                *version = seen;
            }
            events.push(event);
        }
        (buffer.len() > LINE).then(|| End::Failed(ApiError::Reply("a line of the watch has no end".to_owned())))
    }
}

/// How everything is listed.
enum Relist {
    /// Whatever the server has in its watch cache: cheap, and the first list of a daemon that knows nothing.
    FromCache,
    /// From the watch cache, but not older than what was seen.
    NotOlderThan(String),
    /// A consistent read, in pages of this many objects unless a page's token has expired.
    FromEtcd { limit: Option<u32> },
}

impl Relist {
    fn query(&self, fields: &str, continue_token: &str) -> String {
        let mut query = match self {
            Self::FromCache => "resourceVersion=0".to_owned(),
            Self::NotOlderThan(version) => format!("resourceVersion={version}"),
            Self::FromEtcd { limit: Some(limit) } => format!("limit={limit}"),
            Self::FromEtcd { limit: None } => String::new(),
        };
        let mut add = |name: &str, value: &str| {
            if !value.is_empty() {
                query.push_str(if query.is_empty() { "" } else { "&" });
                query.push_str(&format!("{name}={value}"));
            }
        };
        add("fieldSelector", fields);
        let token: String = form_urlencoded::byte_serialize(continue_token.as_bytes()).collect();
        add("continue", &token);
        query
    }
}

/// Reads a list and hands its items on in batches. Runs on a thread that may block.
fn read_list<D: Decode>(
    kind: D,
    from: BodyReader,
    stream: usize,
    events: &Events<D::Item>,
) -> serde_json::Result<decode::ListMeta> {
    let mut batch = Vec::with_capacity(BATCH);
    let meta = decode::list(from, &mut |text| {
        batch.push(Event::Item(kind.item(text)?));
        if batch.len() < BATCH {
            return Ok(());
        }
        let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH));
        events.blocking_send((stream, full)).map_err(|_closed| "nobody waits for the list".to_owned())
    })?;
    if !batch.is_empty() {
        // The next send of the caller notices that nobody listens.
        let _closed = events.blocking_send((stream, batch));
    }
    Ok(meta)
}

/// Whether a resource version is lower than another one: they only grow, unless etcd was restored from a backup. What is no number is not compared
/// (KEP-5504: versions of one resource are comparable).
fn is_older(version: &str, than: &str) -> bool {
    matches!((version.parse::<u64>(), than.parse::<u64>()), (Ok(version), Ok(than)) if version < than)
}

/// Between three and five quarters of a pause, so that the nodes of a cluster do not ask in step.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.75 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resource_versions_are_compared_as_numbers_only() {
        assert!(is_older("9", "10"));
        assert!(!is_older("10", "9") && !is_older("10", "10"));
        assert!(!is_older("", "10") && !is_older("x", "10") && !is_older("9", "x"));
    }

    #[test]
    fn query_of_a_list_says_how_fresh_it_must_be() {
        let fields = "spec.nodeName%3Dn1";
        assert_eq!(Relist::FromCache.query(fields, ""), "resourceVersion=0&fieldSelector=spec.nodeName%3Dn1");
        assert_eq!(Relist::NotOlderThan("7".into()).query("", ""), "resourceVersion=7");
        assert_eq!(Relist::FromEtcd { limit: Some(PAGE) }.query("", "a=b"), "limit=500&continue=a%3Db");
        assert_eq!(Relist::FromEtcd { limit: None }.query(fields, ""), "fieldSelector=spec.nodeName%3Dn1");
    }
}
