//! The ConfigMaps of the configuration, by list and watch: the cluster's, and the one that the node's label names.

use std::fmt;
use std::sync::Arc;

use futures_util::future::{AbortHandle, abortable};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use serde::Deserialize;
use serde_json::value::RawValue;
use terway_core::config::{ConfigMapData, ConfigMaps, ConfigView, NODE_LABEL, Watched};
use terway_core::objects::{Object, ObjectName};
use tokio::sync::{Semaphore, mpsc, watch};

use super::Stream;
use super::client::ApiClient;
use super::decode::{self, Decode, Item};
use super::list_watch::{Event, ListWatch, Pacing, Resource};

/// The number of the stream of the cluster's ConfigMap; those of the node's own count up from it.
const CLUSTER: usize = 0;
/// Events that wait.
const WAITING: usize = 16;

/// Follows the ConfigMaps of one node.
#[derive(Clone, Debug)]
pub struct ConfigMapWatch {
    /// The client.
    pub api: Arc<ApiClient>,
    /// The cluster's ConfigMap.
    pub cluster: ObjectName,
    /// The node whose label is read.
    pub node: String,
    /// Pauses after failures are divided by this.
    pub time_scale: u32,
}

/// A ConfigMap as listed or changed; the text says why it cannot be read.
type ConfigMapEvent = Event<Result<ConfigMapData, String>>;

#[derive(Clone, Copy, Debug)]
struct ConfigMapDecoder;

impl fmt::Display for ConfigMapDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConfigMap")
    }
}

impl Decode for ConfigMapDecoder {
    type Item = Result<ConfigMapData, String>;

    fn item(self, text: &RawValue) -> Result<Self::Item, String> {
        #[derive(Deserialize)]
        struct ConfigMap {
            #[serde(default)]
            data: Option<ConfigMapData>,
        }
        decode::name(text).ok_or("a ConfigMap without a name")?;
        let map: Result<ConfigMap, _> = serde_json::from_str(text.get());
        // Without the position: the text may hold an access key, the position does not help.
        Ok(map.map(|map| map.data.unwrap_or_default()).map_err(|_error| "its data is not a map of texts".to_owned()))
    }
}

impl ConfigMapWatch {
    /// Publishes what the API server has, whenever it changes; runs as long as the daemon.
    pub async fn run(self, views: watch::Sender<Option<ConfigView>>) {
        let (sender, mut events) = mpsc::channel(WAITING);
        let (node_sender, mut node_events) = mpsc::channel(WAITING);
        // Polled by this task: no stream outlives it.
        let mut streams = FuturesUnordered::new();
        let node = ListWatch {
            stream: 0,
            api: Arc::clone(&self.api),
            resource: Stream::OwnNode.resource(&self.node),
            pacing: Pacing::scaled(self.time_scale),
            turn: Arc::new(Semaphore::new(1)),
            events: node_sender,
        };
        let (node, _runs) = abortable(Box::pin(node.run()) as futures_util::future::BoxFuture<'static, ()>);
        streams.push(node);
        let start = |stream: usize, name: &ObjectName| {
            let stream = self.config_map(stream, name, sender.clone());
            abortable(Box::pin(stream.run()) as futures_util::future::BoxFuture<'static, ()>)
        };
        streams.push(start(CLUSTER, &self.cluster).0);
        let mut maps = ConfigMaps::new(self.cluster.clone());
        let mut own: (usize, Option<(ObjectName, AbortHandle)>) = (CLUSTER, None);
        loop {
            tokio::select! {
                Some((stream, received)) = events.recv() => match stream {
                    CLUSTER => apply(&mut maps.cluster, received),
                    stream if stream == own.0 => apply(&mut maps.own, received),
                    // Events of a ConfigMap that the label does not name any more.
                    _ => continue,
                },
                Some((_, received)) = node_events.recv() => {
                    apply_node(&mut maps.label, received);
                    let name = maps.own_name();
                    if own.1.as_ref().map(|(name, _)| name) != name.as_ref() {
                        if let Some((_, running)) = own.1.take() {
                            running.abort();
                        }
                        maps.own = Watched::default();
                        own.0 += 1;
                        own.1 = name.map(|name| {
                            let (stream, handle) = start(own.0, &name);
                            streams.push(stream);
                            (name, handle)
                        });
                    }
                }
                Some(_) = streams.next() => continue,
                () = views.closed() => return,
            }
            if let Some(view) = maps.view() {
                views.send_if_modified(|held| {
                    let is_new = held.as_ref() != Some(&view);
                    *held = Some(view);
                    is_new
                });
            }
        }
    }

    fn config_map(
        &self,
        stream: usize,
        name: &ObjectName,
        events: mpsc::Sender<(usize, Vec<ConfigMapEvent>)>,
    ) -> ListWatch<ConfigMapDecoder> {
        let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
        ListWatch {
            stream,
            api: Arc::clone(&self.api),
            resource: Resource {
                kind: ConfigMapDecoder,
                paths: vec![format!("/api/v1/namespaces/{}/configmaps", encoded(&name.namespace))],
                fields: format!("metadata.name%3D{}", encoded(&name.name)),
                is_optional: false,
            },
            pacing: Pacing::scaled(self.time_scale),
            turn: Arc::new(Semaphore::new(1)),
            events,
        }
    }
}

fn apply(map: &mut Watched<ConfigMapData>, events: Vec<ConfigMapEvent>) {
    for event in events {
        match event {
            Event::ListBegin => map.list_begin(),
            Event::Item(Ok(data)) => map.upsert(Some(data)),
            Event::Item(Err(reason)) => map.readable(Err(reason)),
            Event::Delete(_) => map.delete(),
            Event::ListEnd => map.list_end(),
            Event::Readable(readable) => map.readable(readable.map_err(|failure| failure.reason)),
            Event::Confirmed => {}
        }
    }
}

fn apply_node(label: &mut Watched<String>, events: Vec<Event>) {
    for event in events {
        match event {
            Event::ListBegin => label.list_begin(),
            Event::Item(Item::Object(object)) => {
                if let Object::Node(node) = *object {
                    label.upsert(node.meta.labels.get(NODE_LABEL).map(str::to_owned));
                }
            }
            Event::Item(Item::Invalid(_, reason)) => label.readable(Err(reason)),
            // A Node that is registered anew comes with its labels.
            Event::Delete(_) => {}
            Event::ListEnd => label.list_end(),
            Event::Readable(readable) => label.readable(readable.map_err(|failure| failure.reason)),
            Event::Confirmed => {}
        }
    }
}
