//! One signed call of an RPC-style action: sent, repeated while that is safe, read strictly.
//!
//! Repeating is safe for every action used here: it reads, or carries a `ClientToken` that stays the same, or its caller
//! (`aliyun.rs`) takes "already so" for success.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use http::StatusCode;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderValue, USER_AGENT};
use parking_lot::Mutex;
use reqwest::Url;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use terway_core::cloud::{CloudError, ErrorClass};
use tracing::{Instrument as _, debug, debug_span, field, info, warn};

use super::config::{EcsConfig, Retry, SignatureMethod};
use super::credentials::{Credentials, Keyring};
use super::limits::Limits;
use super::metadata::without_address;
use super::sign::{Signable, authorization, canonical_query, rpc_signature, sha256_hex};
use super::{CallObserver, ObservedCall, Result};

/// A product with its API version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    Ecs,
    Vpc,
}

impl Service {
    const fn version(self) -> &'static str {
        match self {
            Self::Ecs => "2014-05-26",
            Self::Vpc => "2016-04-28",
        }
    }
}

pub(super) type Parameters = Vec<(String, String)>;

pub(super) struct Rpc {
    http: reqwest::Client,
    ecs: Url,
    vpc: Url,
    region: String,
    signature: SignatureMethod,
    keyring: Keyring,
    limits: Limits,
    retry: Retry,
    observer: Option<CallObserver>,
    /// Seconds to add to this machine's clock to get the cloud's, learnt when the cloud refuses a timestamp.
    skew: AtomicI64,
    /// Calls that are being repeated: how many of an action, and what the last of them met.
    delayed: Mutex<BTreeMap<&'static str, (usize, CloudError)>>,
}

/// One call's part of [`Rpc::delayed`]; it ends with the call, or when its caller gives up.
struct Delay<'a> {
    rpc: &'a Rpc,
    action: &'static str,
    counted: bool,
}

impl Delay<'_> {
    fn note(&mut self, error: CloudError) {
        let mut delayed = self.rpc.delayed.lock();
        let (calls, last) = delayed.entry(self.action).or_insert_with(|| (0, error.clone()));
        *calls += usize::from(!std::mem::replace(&mut self.counted, true));
        *last = error;
    }
}

impl Drop for Delay<'_> {
    fn drop(&mut self) {
        if self.counted {
            let mut delayed = self.rpc.delayed.lock();
            if let Some((calls, _)) = delayed.get_mut(self.action) {
                *calls -= 1;
            }
            delayed.retain(|_, (calls, _)| *calls > 0);
        }
    }
}

/// What came back instead of a result.
struct Failure {
    error: CloudError,
    /// The cloud's clock.
    date: Option<SystemTime>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ErrorReply {
    code: String,
    message: String,
    request_id: String,
}

impl Rpc {
    pub(super) fn new(config: &EcsConfig, keyring: Keyring) -> Result<Self> {
        super::tls::ready();
        let http = reqwest::Client::builder()
            .timeout(config.timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| failure("", ErrorClass::Unknown, format!("no HTTP client: {error}")))?;
        Ok(Self {
            http,
            ecs: config.ecs_endpoint.clone(),
            vpc: config.vpc_endpoint.clone(),
            region: config.region.clone(),
            signature: config.signature,
            keyring,
            limits: Limits::new(&config.rate_limits),
            retry: config.retry,
            observer: config.observer.clone(),
            skew: AtomicI64::new(0),
            delayed: Mutex::default(),
        })
    }

    /// What the calls met that are being repeated now, one for each action.
    pub(super) fn delayed(&self) -> Vec<CloudError> {
        let delayed = self.delayed.lock();
        delayed.values().map(|(_, error)| error.clone()).collect()
    }

    pub(super) const fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    pub(super) const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Calls an action and reads its reply as `R`.
    pub(super) async fn call<R: DeserializeOwned>(
        &self,
        service: Service,
        action: &'static str,
        mut parameters: Parameters,
    ) -> Result<R> {
        parameters.push(("RegionId".to_owned(), self.region.clone()));
        let began = Instant::now();
        let mut pauses = self.retry.pauses();
        let (mut rekeyed, mut reclocked) = (false, false);
        let mut delay = Delay { rpc: self, action, counted: false };
        loop {
            self.limits.turn(action).await;
            let credentials = self.keyring.current().await?;
            let Failure { error, date } = match self.exchange(service, action, &parameters, &credentials).await {
                Ok(reply) => {
                    self.limits.passed(action);
                    return Ok(reply);
                }
                Err(failure) => failure,
            };
            if error.class == ErrorClass::Throttled {
                self.limits.throttled(action);
            }
            let key_refused = ["InvalidSecurityToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"]
                .iter()
                .any(|code| error.code.starts_with(code));
            if key_refused && !rekeyed {
                rekeyed = true;
                if self.keyring.refused(&credentials) {
                    continue;
                }
            }
            if error.code.starts_with("InvalidTimeStamp")
                && !reclocked
                && let Some(date) = date
            {
                reclocked = true;
                self.learn_skew(date);
                continue;
            }
            if !repeatable(&error) {
                return Err(error);
            }
            match pauses.next() {
                Some(pause) if began.elapsed() + pause < self.retry.within => {
                    debug!(action, ?pause, %error, "cloud call will be repeated");
                    delay.note(error);
                    tokio::time::sleep(pause).await;
                }
                _ => return Err(error),
            }
        }
    }

    async fn exchange<R: DeserializeOwned>(
        &self,
        service: Service,
        action: &'static str,
        parameters: &[(String, String)],
        credentials: &Credentials,
    ) -> std::result::Result<R, Failure> {
        let span = debug_span!(
            "cloud_call",
            api = action,
            request_id = field::Empty,
            code = field::Empty,
            latency_ms = field::Empty
        );
        let began = Instant::now();
        let result = self.send(service, action, parameters, credentials).instrument(span.clone()).await;
        let duration = began.elapsed();
        let error = result.as_ref().err().map(|failure| &failure.error);
        span.record("latency_ms", duration.as_secs_f64() * 1000.0);
        match (&result, error) {
            (_, Some(error)) => span.record("request_id", &error.request_id).record("code", &error.code),
            (Ok((_, request)), None) => span.record("request_id", request),
            (Err(_), None) => &span,
        };
        let _within = span.enter();
        if let Some(observer) = &self.observer {
            observer(&ObservedCall { api: action, error, duration });
        }
        match (&result, error) {
            (_, Some(error)) => {
                info!(action, ?duration, class = ?error.class, code = error.code, request_id = error.request_id, reason = error.message, "cloud call failed");
            }
            (Ok((_, request)), None) => debug!(action, ?duration, request, "cloud call"),
            (Err(_), None) => {}
        }
        result.map(|(reply, _)| reply)
    }

    async fn send<R: DeserializeOwned>(
        &self,
        service: Service,
        action: &'static str,
        parameters: &[(String, String)],
        credentials: &Credentials,
    ) -> std::result::Result<(R, String), Failure> {
        let request = match self.signature {
            SignatureMethod::Acs3 => self.acs3(service, action, parameters, credentials),
            SignatureMethod::HmacSha1 => self.hmac_sha1(service, action, parameters, credentials),
        }?;
        let lost = |error| failure(action, ErrorClass::Unknown, without_address(error));
        let reply = request.send().await.map_err(lost)?;
        let status = reply.status();
        let date = reply
            .headers()
            .get(DATE)
            .and_then(|date| date.to_str().ok())
            .and_then(|date| httpdate::parse_http_date(date).ok());
        let body = reply.bytes().await.map_err(lost)?;
        // Both kinds of reply name the request; a reply that cannot be read may still do so.
        let told: ErrorReply = serde_json::from_slice(&body).unwrap_or_default();
        if status.is_success() {
            return match serde_json::from_slice(&body) {
                Ok(result) => Ok((result, told.request_id)),
                Err(error) => {
                    let mut error = failure(action, ErrorClass::Unknown, format!("{}: {error}", CloudError::MALFORMED));
                    error.request_id = told.request_id;
                    Err(error.into())
                }
            };
        }
        let class = match CloudError::classify(&told.code) {
            _ if status == StatusCode::TOO_MANY_REQUESTS => ErrorClass::Throttled,
            ErrorClass::Invalid if status.is_server_error() => ErrorClass::Unknown,
            // An answer without a code comes from something between the cloud and us.
            ErrorClass::Unknown if told.code.is_empty() && status.is_client_error() => ErrorClass::Invalid,
            class => class,
        };
        let message = if told.code.is_empty() { format!("HTTP status {status}") } else { told.message };
        let error =
            CloudError { action: action.to_owned(), class, code: told.code, message, request_id: told.request_id };
        Err(Failure { error, date })
    }

    fn url(&self, service: Service) -> Url {
        match service {
            Service::Ecs => self.ecs.clone(),
            Service::Vpc => self.vpc.clone(),
        }
    }

    /// Everything goes in the form: nobody logs it, as queries are logged.
    fn hmac_sha1(
        &self,
        service: Service,
        action: &'static str,
        parameters: &[(String, String)],
        credentials: &Credentials,
    ) -> Result<reqwest::RequestBuilder> {
        let date = humantime::format_rfc3339_seconds(self.cloud_time()).to_string();
        let nonce = nonce();
        let mut all = parameters.to_vec();
        let common = [
            ("Action", action),
            ("Version", service.version()),
            ("Format", "JSON"),
            ("AccessKeyId", credentials.id.expose()),
            ("SignatureMethod", "HMAC-SHA1"),
            ("SignatureVersion", "1.0"),
            ("SignatureNonce", &nonce),
            ("Timestamp", &date),
        ];
        let token = credentials.token.as_ref().map(|token| ("SecurityToken", token.expose()));
        all.extend(common.into_iter().chain(token).map(|(name, value)| (name.to_owned(), value.to_owned())));
        let query = canonical_query(&all);
        all.push(("Signature".to_owned(), rpc_signature("POST", &query, &credentials.secret)));
        Ok(self
            .http
            .post(self.url(service))
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(USER_AGENT, AGENT)
            .body(canonical_query(&all)))
    }

    fn acs3(
        &self,
        service: Service,
        action: &'static str,
        parameters: &[(String, String)],
        credentials: &Credentials,
    ) -> Result<reqwest::RequestBuilder> {
        let mut url = self.url(service);
        let query = canonical_query(parameters);
        let query = query.as_str();
        // As hyper writes it: the port only if it is not the scheme's own.
        let host = match (url.host_str(), url.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (host, _) => host.unwrap_or_default().to_owned(),
        };
        url.set_query(Some(query));
        let payload_hash = sha256_hex(b"");
        let date = humantime::format_rfc3339_seconds(self.cloud_time()).to_string();
        let nonce = nonce();
        let mut headers = vec![
            ("host", host.as_str()),
            ("x-acs-action", action),
            ("x-acs-content-sha256", &payload_hash),
            ("x-acs-date", &date),
        ];
        if let Some(token) = &credentials.token {
            headers.push(("x-acs-security-token", token.expose()));
        }
        headers.extend([("x-acs-signature-nonce", nonce.as_str()), ("x-acs-version", service.version())]);
        let signable = Signable { method: "POST", path: "/", query, headers: &headers, payload_hash: &payload_hash };
        let signature = authorization(&signable, credentials.id.expose(), &credentials.secret);
        let mut request = self
            .http
            .post(url)
            .header(AUTHORIZATION, sensitive(&signature)?)
            .header(CONTENT_LENGTH, 0)
            .header(USER_AGENT, AGENT);
        for (name, value) in headers {
            request = match name {
                "x-acs-security-token" => request.header(name, sensitive(value)?),
                _ => request.header(name, value),
            };
        }
        Ok(request)
    }

    fn cloud_time(&self) -> SystemTime {
        let skew = self.skew.load(Ordering::Relaxed);
        let by = Duration::from_secs(skew.unsigned_abs());
        let now = SystemTime::now();
        if skew < 0 { now.checked_sub(by) } else { now.checked_add(by) }.unwrap_or(now)
    }

    fn learn_skew(&self, theirs: SystemTime) {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        let skew = match theirs.duration_since(SystemTime::now()) {
            Ok(ahead) => seconds(ahead),
            Err(behind) => -seconds(behind.duration()),
        };
        if self.skew.swap(skew, Ordering::Relaxed) != skew {
            warn!(
                seconds = skew,
                "this machine's clock differs from the cloud's; requests are signed with the cloud's"
            );
        }
    }
}

const AGENT: &str = concat!("terwayd/", env!("CARGO_PKG_VERSION"));

/// Unique for the account within the timestamp's window.
fn nonce() -> String {
    format!("{:032x}", fastrand::u128(..))
}

/// A header value that HTTP libraries leave out of their own logs.
fn sensitive(value: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(value)
        .map_err(|_hidden| failure("", ErrorClass::Invalid, "a key or token holds a control character".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Whether the same request may pass a moment later.
fn repeatable(error: &CloudError) -> bool {
    matches!(error.class, ErrorClass::Throttled | ErrorClass::Unknown)
        // Another call works on the same ENI.
        || error.code == "Operation.Conflict"
}

/// An error that the cloud did not name.
pub(super) fn failure(action: &str, class: ErrorClass, message: String) -> CloudError {
    CloudError { action: action.to_owned(), class, code: String::new(), message, request_id: String::new() }
}

impl From<CloudError> for Failure {
    fn from(error: CloudError) -> Self {
        Self { error, date: None }
    }
}
