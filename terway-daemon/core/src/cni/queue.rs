//! DELs that came while the daemon was away: one small file each, which the daemon carries out later.
//!
//! A DEL that fails blocks the deletion of its pod (containerd keeps the sandbox and calls again, for ever), so the plugin
//! queues it and succeeds. Plugin and daemon use no lock; the order of steps makes sure that no file is forgotten:
//!
//! * Plugin, DEL: connect fails → write the file (temporary name, fsync, rename, fsync of the folder) → connect once more; if
//!   that succeeds, `DelPod` and remove the file.
//! * Daemon, start: listen on the socket → read the folder, carry out and remove every file → accept calls. From then on
//!   it looks into the folder now and then, for DELs that it answered too late.
//!
//!   If the daemon read the folder before the file was there, it was listening before the plugin's second connect: one of the
//!   two sees the other.
//! * Plugin, ADD: a file of the same key (a runtime that makes ids from netns paths, such as cnitool, uses a key again) is
//!   carried out first, by `DelPod`, and removed; else a later start of the daemon would take the new attachment for the old.
//!
//! All steps may be repeated: `DelPod` of an unknown attachment succeeds.

use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use crate::ident::AttachmentKey;

/// Suffix of a finished file; the daemon leaves others (a write that was cut off) alone and removes them when they are old.
pub const SUFFIX: &str = ".del.json";

/// A DEL to carry out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedDel {
    /// What to take away.
    #[serde(flatten)]
    pub attachment: AttachmentKey,
    /// The netns path that the runtime gave; often empty, often gone.
    #[serde(default)]
    pub netns: String,
}

impl QueuedDel {
    /// The content of its file.
    #[must_use]
    pub fn encode(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// Reads a file's content.
    ///
    /// # Errors
    /// When it is not what `encode` writes; such a file is of no use to anyone.
    pub fn decode(content: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(content)
    }
}

/// The name of the file of a key: the same key has one file, however often it is queued.
///
/// Hashed, because the parts may be longer together than a file name can be.
#[must_use]
pub fn file_name(key: &AttachmentKey) -> String {
    let mut hash = Sha1::new();
    for part in [&key.network, &key.container_id, &key.ifname] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let mut name = String::with_capacity(40 + SUFFIX.len());
    for byte in hash.finalize() {
        for digit in [byte >> 4, byte & 15] {
            name.push(char::from_digit(u32::from(digit), 16).unwrap_or_default());
        }
    }
    name + SUFFIX
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(network: &str, container_id: &str, ifname: &str) -> AttachmentKey {
        AttachmentKey { network: network.into(), container_id: container_id.into(), ifname: ifname.into() }
    }

    #[test]
    fn queue_file_name_per_attachment() {
        let name = file_name(&key("terway", "c1", "eth0"));
        assert_eq!(name.len(), 40 + SUFFIX.len());
        assert!(name[..40].bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_eq!(name, file_name(&key("terway", "c1", "eth0")));
        assert_ne!(name, file_name(&key("terwayc", "1", "eth0")));
        assert_eq!(file_name(&key(&"n".repeat(300), "c", "e")).len(), name.len());
    }

    #[test]
    fn queued_del_round_trip() {
        let del = QueuedDel { attachment: key("terway", "c1", "eth0"), netns: "/run/netns/a".into() };
        assert_eq!(QueuedDel::decode(del.encode().as_bytes()).unwrap(), del);
        let old = br#"{"network":"terway","container_id":"c1","ifname":"eth0","from_the_future":1}"#;
        assert_eq!(QueuedDel::decode(old).unwrap(), QueuedDel { netns: String::new(), ..del });
        assert!(QueuedDel::decode(b"{\"network\":\"terw").is_err());
    }
}
