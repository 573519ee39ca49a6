//! The node's identity: asked of the metadata service once, kept on disk, so that a restart needs no cloud, and checked at every start
//! against the machine (`terway_core::machine`).

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use terway_core::cloud::{CloudError, InstanceLimits, NodeIdentity};
use terway_core::machine::Dmi;
use tracing::{info, warn};

use crate::atomic_file;

/// The kept identity of the node: what does not change while the instance lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Instance, type, region, zone, primary MAC.
    pub identity: NodeIdentity,
    /// What the instance type carries.
    pub limits: InstanceLimits,
    /// Makes this node's idempotency tokens unlike any other's, and unlike those of an earlier state folder.
    pub token_seed: String,
    /// DMI identifiers of the machine on which this was learned.
    #[serde(default)]
    pub dmi: Dmi,
}

/// Loads the kept identity; `None` if the file is missing or cannot be decoded.
#[must_use]
pub fn load(path: &Path) -> Option<Node> {
    let bytes = std::fs::read(path).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(node) => Some(node),
        Err(error) => {
            warn!(path = %path.display(), %error, "the kept identity cannot be read; asking the cloud again");
            None
        }
    }
}

/// Saves the identity for the next start.
///
/// # Errors
/// What the file system says.
pub fn save(path: &Path, node: &Node) -> std::io::Result<()> {
    atomic_file::write_if_changed(path, &serde_json::to_vec_pretty(node)?).map(|_| ())
}

/// Reads the DMI identifiers of the machine from `dir` (`/sys/class/dmi/id`). Many kernels let only root read them, and some firmware has none.
#[must_use]
pub fn read_dmi(dir: &Path) -> Dmi {
    let read = |name: &str| {
        let text = std::fs::read_to_string(dir.join(name)).ok()?.trim().to_owned();
        // What firmware writes when it has nothing to say.
        let is_empty =
            text.is_empty() || text.eq_ignore_ascii_case("none") || text.eq_ignore_ascii_case("not specified");
        (!is_empty).then_some(text)
    };
    Dmi { product_uuid: read("product_uuid"), product_serial: read("product_serial") }
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

/// Repeats a call until it succeeds, with a pause that doubles up to half a minute; logs each failure.
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
                warn!(what, %error, retry_in = ?pause, "failed to get an answer");
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
    fn dmi_identifiers_are_read_and_empty_ones_are_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_dmi(dir.path()), Dmi::default());
        std::fs::write(dir.path().join("product_uuid"), "4C4C-1\n").unwrap();
        std::fs::write(dir.path().join("product_serial"), "Not Specified\n").unwrap();
        assert_eq!(read_dmi(dir.path()), Dmi { product_uuid: Some("4C4C-1".into()), product_serial: None });
    }

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
        let dmi = Dmi { product_uuid: Some("u".into()), product_serial: None };
        let node = Node { token_seed: token_seed(&identity).unwrap(), identity, limits, dmi };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.json");
        assert_eq!(load(&path), None);
        save(&path, &node).unwrap();
        assert_eq!(load(&path), Some(node.clone()));
        assert_ne!(token_seed(&node.identity).unwrap(), node.token_seed);
        std::fs::write(&path, b"{").unwrap();
        assert_eq!(load(&path), None);
    }
}
