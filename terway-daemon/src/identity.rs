//! Who this node is: asked of the cloud once, kept on disk, so that a restart needs no cloud.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use terway_core::cloud::{CloudError, InstanceLimits, NodeIdentity};
use tracing::{info, warn};

use crate::atomic_file;

/// What does not change while the instance lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Instance, type, region, zone, primary MAC.
    pub identity: NodeIdentity,
    /// What the instance type carries.
    pub limits: InstanceLimits,
    /// Makes this node's idempotency tokens unlike any other's, and unlike those of an earlier state folder.
    pub token_seed: String,
}

/// Reads the kept identity; a file that is missing or from another world counts as none.
#[must_use]
pub fn kept(path: &Path) -> Option<Node> {
    let bytes = std::fs::read(path).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(node) => Some(node),
        Err(error) => {
            warn!(path = %path.display(), %error, "the kept identity cannot be read; asking the cloud again");
            None
        }
    }
}

/// Keeps an identity for the next start.
///
/// # Errors
/// What the file system says.
pub fn keep(path: &Path, node: &Node) -> std::io::Result<()> {
    atomic_file::write_if_changed(path, &serde_json::to_vec_pretty(node)?).map(|_| ())
}

/// A seed for tokens: the instance and 64 random bits.
///
/// # Errors
/// When the kernel gives no randomness.
pub fn token_seed(identity: &NodeIdentity) -> std::io::Result<String> {
    let mut random = [0u8; 8];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut random)?;
    Ok(format!("{}-{}", identity.instance, hex::encode(random)))
}

/// Repeats a question until the cloud answers it, with pauses up to half a minute; says each time why it waits.
pub async fn retry_forever<T, F>(what: &str, mut ask: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, CloudError>>,
{
    let mut pause = Duration::from_millis(500);
    loop {
        match ask().await {
            Ok(answer) => {
                info!(what, "answered");
                return answer;
            }
            Err(error) => {
                warn!(what, %error, ?pause, "no answer yet; asking again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(30));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use terway_core::ident::{InstanceId, Mac};

    use super::*;

    #[test]
    fn an_identity_survives_and_garbage_does_not() {
        let identity = NodeIdentity {
            instance: InstanceId::new("i-1"),
            instance_type: "ecs.g7.large".into(),
            region: "r".into(),
            zone: "r-a".into(),
            primary_mac: Mac([0, 22, 62, 0, 0, 1]),
        };
        let limits = InstanceLimits { adapters: 3, v4_per_adapter: 10, v6_per_adapter: 10 };
        let node = Node { token_seed: token_seed(&identity).unwrap(), identity, limits };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.json");
        assert_eq!(kept(&path), None);
        keep(&path, &node).unwrap();
        assert_eq!(kept(&path), Some(node.clone()));
        assert_ne!(token_seed(&node.identity).unwrap(), node.token_seed);
        std::fs::write(&path, b"{").unwrap();
        assert_eq!(kept(&path), None);
    }
}
