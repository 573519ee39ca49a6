//! Kubernetes events: the object, the stable reason, the message.

use std::sync::Arc;

/// The longest message of an event in bytes (`events.k8s.io/v1`, field `note`).
const MESSAGE: usize = 1024;

/// The object that an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EventTarget {
    /// A pod.
    Pod {
        /// Its namespace.
        namespace: Arc<str>,
        /// Its name.
        name: Arc<str>,
        /// Its UID; `kubectl describe` finds events by it.
        uid: Arc<str>,
    },
    /// The node of this daemon, by name.
    Node(Arc<str>),
    /// A ConfigMap.
    ConfigMap {
        /// Its namespace.
        namespace: Arc<str>,
        /// Its name.
        name: Arc<str>,
    },
}

impl EventTarget {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Pod { .. } => "Pod",
            Self::Node(_) => "Node",
            Self::ConfigMap { .. } => "ConfigMap",
        }
    }

    /// Its namespace; none of a node.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        match self {
            Self::Pod { namespace, .. } | Self::ConfigMap { namespace, .. } => Some(namespace),
            Self::Node(_) => None,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Pod { name, .. } | Self::Node(name) | Self::ConfigMap { name, .. } => name,
        }
    }

    /// Its UID. Of a node it is the name, as in the events of kubelet: `kubectl describe node` looks for that.
    #[must_use]
    pub fn uid(&self) -> &str {
        match self {
            Self::Pod { uid, .. } => uid,
            Self::Node(name) => name,
            Self::ConfigMap { .. } => "",
        }
    }
}

/// The type of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    /// Nothing is wrong.
    Normal,
    /// Something is.
    Warning,
}

impl EventType {
    /// As the API writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// The reason of an event: stable, so that people can search for it. The first four are the reference project's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A pod has got its addresses.
    AllocIpSucceed,
    /// A pod has got none, or (on the Node) the node has none left.
    AllocIpFailed,
    /// `eni-config` is refused or cannot be read; the last good one stays in force.
    ConfigError,
    /// The datapath of pods is another one than configured.
    VirtualModeChanged,
    /// A change of `eni-config` is in force.
    ConfigApplied,
    /// The node has addresses again.
    SufficientIp,
    /// The condition `NetworkUnavailable` keeps pods away from the node.
    NetworkUnavailable,
    /// kubelet takes more pods than the node can have addresses for.
    MaxPodsExceedCapacity,
    /// The start-up taint was removed from the node.
    TaintRemoved,
}

impl Reason {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AllocIpSucceed => "AllocIPSucceed",
            Self::AllocIpFailed => "AllocIPFailed",
            Self::ConfigError => "ConfigError",
            Self::VirtualModeChanged => "VirtualModeChanged",
            Self::ConfigApplied => "ConfigApplied",
            Self::SufficientIp => "SufficientIP",
            Self::NetworkUnavailable => "NetworkUnavailable",
            Self::MaxPodsExceedCapacity => "MaxPodsExceedCapacity",
            Self::TaintRemoved => "TaintRemoved",
        }
    }

    /// The type of events with this reason.
    #[must_use]
    pub const fn event_type(self) -> EventType {
        match self {
            Self::AllocIpSucceed | Self::ConfigApplied | Self::SufficientIp | Self::TaintRemoved => EventType::Normal,
            Self::AllocIpFailed
            | Self::ConfigError
            | Self::VirtualModeChanged
            | Self::NetworkUnavailable
            | Self::MaxPodsExceedCapacity => EventType::Warning,
        }
    }
}

/// Something that happened to an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Event {
    /// The object.
    pub target: EventTarget,
    /// The reason.
    pub reason: Reason,
    /// What happened, in words, without ids that are different each time: equal events are counted, not repeated.
    pub message: String,
}

impl Event {
    /// An event; a message that is too long for the API is cut off.
    #[must_use]
    pub fn new(target: EventTarget, reason: Reason, message: impl Into<String>) -> Self {
        Self { target, reason, message: shortened(message.into()) }
    }
}

/// A message within the limit of the API.
pub(super) fn shortened(mut message: String) -> String {
    if message.len() > MESSAGE {
        let mut end = MESSAGE - '…'.len_utf8();
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        message.push('…');
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_of_an_event_fits_into_the_api() {
        assert_eq!(shortened("a".repeat(1024)), "a".repeat(1024));
        for text in ["a".repeat(1025), "ä".repeat(600), "語".repeat(342)] {
            let short = shortened(text);
            assert!(short.len() <= 1024 && short.len() > 1016 && short.ends_with('…'), "{}", short.len());
        }
    }
}
