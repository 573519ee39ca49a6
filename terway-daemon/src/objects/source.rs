//! The interface between a source of Kubernetes objects (a folder, an API server) and the [feed](super::feed).

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use async_trait::async_trait;
use terway_core::objects::{Change, Kind, Object, ObjectKey};
use tokio::sync::mpsc;

use super::kube::api_client;
use super::{ApiClient, Credentials, DirSource, KubeSource};

/// An update of the object store. Updates are applied in the order in which a source sends them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// A complete list of one kind: stored objects of the kind that are not in it are deleted. Makes the kind synced.
    Replace(Kind, Vec<Object>),
    /// A complete list of one kind begins. Its objects follow as upserts, in one or more batches, so that a large list is never in memory
    /// twice. Other changes of the kind may come in between.
    ListBegin(Kind),
    /// The list has ended: stored objects of the kind without an upsert or [`Update::Keep`] since [`Update::ListBegin`] are deleted. Makes the kind
    /// synced.
    ListEnd(Kind),
    /// The list names an object that cannot be decoded: its last good version stays in the store.
    Keep(ObjectKey),
    /// One object was created, updated or deleted. Allowed before the kind is synced.
    Change(Change),
}

/// Where a [`Problem`] is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// The whole source, such as an API server that cannot be reached.
    Source,
    /// All objects of one kind, such as a list that is forbidden.
    Kind(Kind),
    /// One object that cannot be decoded. Its last good version stays in the store.
    Object(ObjectKey),
    /// One document of a file. Objects that it held before stay in the store.
    Document {
        /// The file.
        file: PathBuf,
        /// The line, counted from 1.
        line: usize,
    },
}

/// What a source cannot read at the moment, and why. What it has sent before stays in force.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// What cannot be read.
    pub scope: Scope,
    /// The reason, without a full stop.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.scope {
            Scope::Source => f.write_str(&self.reason),
            Scope::Kind(kind) => write!(f, "{kind}: {}", self.reason),
            Scope::Object(key) => write!(f, "{key}: {}", self.reason),
            Scope::Document { file, line } => write!(f, "{}:{line}: {}", file.display(), self.reason),
        }
    }
}

/// Updates that subscribers see together: a subscriber never acts on a part of a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The updates, in order.
    pub updates: Vec<Update>,
    /// All problems of the source, if they have changed.
    pub problems: Option<Vec<Problem>>,
}

impl Batch {
    /// Whether the batch says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.updates.is_empty() && self.problems.is_none()
    }
}

/// Why a source ended. The feed starts it again.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The folder cannot be watched or listed.
    #[error("cannot watch {}: {source}", path.display())]
    Watch {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The feed panicked while applying a batch.
    #[error("a batch of object changes was lost")]
    BatchLost,
    /// The source's task panicked.
    #[error("the object source panicked: {0}")]
    Panicked(String),
}

/// A source of objects: one run from the first list to the end.
///
/// A run sends a complete list of every kind ([`Update::Replace`] or [`Update::ListBegin`] to [`Update::ListEnd`]), in any order and as soon as
/// it has it, then changes. It reports what it can recover from by itself as [`Problem`]s and goes on; what it has sent stays in the store meanwhile.
/// A kind that the cluster does not serve is an empty list; a kind that must not be read is a problem, and never a list.
#[async_trait]
pub trait ObjectSource: Send {
    /// Runs until the receiver is gone.
    ///
    /// # Errors
    /// What it cannot recover from by itself.
    async fn run(self: Box<Self>, batches: mpsc::Sender<Batch>) -> Result<(), SourceError>;
}

/// The source of a node without object source: every kind is empty, so what an earlier daemon wrote for objects is removed.
#[derive(Debug)]
pub struct EmptySource;

#[async_trait]
impl ObjectSource for EmptySource {
    async fn run(self: Box<Self>, batches: mpsc::Sender<Batch>) -> Result<(), SourceError> {
        let updates = Kind::ALL.into_iter().map(|kind| Update::Replace(kind, Vec::new())).collect();
        if batches.send(Batch { updates, problems: None }).await.is_ok() {
            batches.closed().await;
        }
        Ok(())
    }
}

/// The value of `--objects`: which source is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `dir:PATH`: the manifests of a folder.
    Dir(PathBuf),
    /// `kube`, `kube:PATH`: the API server, with the container's service account or with a kubeconfig.
    Kube(Credentials),
}

/// What a source needs to know of its node.
#[derive(Clone, Debug)]
pub struct NodeContext {
    /// The name of the node, as kubelet registers it.
    pub node: String,
    /// Addresses of API servers that the operator names.
    pub api_servers: Vec<SocketAddr>,
    /// The file that keeps the addresses of API servers over restarts.
    pub api_servers_file: PathBuf,
    /// Pauses after failures are divided by this.
    pub time_scale: u32,
}

impl Origin {
    /// Opens the source.
    ///
    /// # Errors
    /// When the source cannot be reached now; opening may be tried again.
    pub fn open(
        &self,
        context: &NodeContext,
        api: Option<&Arc<ApiClient>>,
    ) -> Result<Box<dyn ObjectSource>, SourceError> {
        match self {
            Self::Dir(path) => Ok(Box::new(DirSource::new(path)?)),
            Self::Kube(credentials) => {
                let api = api.map_or_else(|| api_client(credentials.clone(), context), Arc::clone);
                Ok(Box::new(KubeSource::new(api, context.node.clone(), context.time_scale)))
            }
        }
    }

    /// Makes the client of the API server; none if the objects come from elsewhere.
    #[must_use]
    pub fn api_client(&self, context: &NodeContext) -> Option<Arc<ApiClient>> {
        match self {
            Self::Dir(_) => None,
            Self::Kube(credentials) => Some(api_client(credentials.clone(), context)),
        }
    }
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("dir", path)) if !path.is_empty() => Ok(Self::Dir(path.into())),
            Some(("kube", path)) if !path.is_empty() => Ok(Self::Kube(Credentials::Kubeconfig(path.into()))),
            None if text == "kube" => Ok(Self::Kube(Credentials::InCluster)),
            _ => Err("is none of kube, kube:KUBECONFIG and dir:PATH".to_owned()),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dir(path) => write!(f, "dir:{}", path.display()),
            Self::Kube(Credentials::InCluster) => f.write_str("kube"),
            Self::Kube(Credentials::Kubeconfig(path)) => write!(f, "kube:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_objects_option_names_source_and_path() {
        let origin: Origin = "dir:/etc/objects".parse().unwrap();
        assert_eq!(origin, Origin::Dir("/etc/objects".into()));
        assert_eq!(origin.to_string(), "dir:/etc/objects");
        for (text, credentials) in
            [("kube", Credentials::InCluster), ("kube:/k.conf", Credentials::Kubeconfig("/k.conf".into()))]
        {
            let origin: Origin = text.parse().unwrap();
            assert_eq!((&origin, origin.to_string().as_str()), (&Origin::Kube(credentials), text));
        }
        for bad in ["/etc/objects", "dir:", "kube:", "kubes", ""] {
            assert!(bad.parse::<Origin>().is_err(), "{bad}");
        }
    }
}
