//! Cache file of the subnets of this node's ENIs, for a start at which the metadata service does not answer.
//!
//! A subnet never changes while its ENI lives: what is kept is as good as what would be told. Without it, an outage of the metadata service
//! during a restart of the daemon would make every idle address of the node useless.

use std::collections::HashMap;
use std::path::PathBuf;

use parking_lot::Mutex;
use terway_core::cloud::Subnet;
use terway_core::ident::Mac;
use tracing::warn;

use crate::atomic_file;

/// The subnets and their file.
pub(super) struct Subnets {
    path: PathBuf,
    known: Mutex<HashMap<Mac, Subnet>>,
}

impl Subnets {
    /// Reads the file; without one, or with one that cannot be read, nothing is known.
    pub(super) fn load(path: PathBuf) -> Self {
        let kept = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Vec<(Mac, Subnet)>>(&text).ok());
        Self { path, known: Mutex::new(kept.unwrap_or_default().into_iter().collect()) }
    }

    pub(super) fn get(&self, mac: Mac) -> Option<Subnet> {
        self.known.lock().get(&mac).cloned()
    }

    /// Stores a subnet, if it is new or changed.
    pub(super) fn keep(&self, mac: Mac, subnet: &Subnet) {
        let mut known = self.known.lock();
        if known.insert(mac, subnet.clone()).as_ref() != Some(subnet) {
            self.write(&known);
        }
    }

    /// Removes the subnet of an ENI that is detached: the cloud may reuse its MAC.
    pub(super) fn forget(&self, mac: Mac) {
        let mut known = self.known.lock();
        if known.remove(&mac).is_some() {
            self.write(&known);
        }
    }

    /// Under the lock, so that an older state never replaces a newer one.
    fn write(&self, known: &HashMap<Mac, Subnet>) {
        let all: Vec<_> = known.iter().collect();
        let written =
            serde_json::to_vec(&all).map_err(Into::into).and_then(|text| atomic_file::write(&self.path, &text));
        if let Err(error) = written {
            warn!(path = %self.path.display(), %error, "failed to write the cache of ENI subnets");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_survive_and_garbage_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnets.json");
        let (a, b) = (Mac([0, 22, 62, 0, 0, 1]), Mac([0, 22, 62, 0, 0, 2]));
        let subnet = Subnet {
            cidr_v4: "10.0.0.0/24".parse().unwrap(),
            gateway_v4: "10.0.0.253".parse().unwrap(),
            cidr_v6: None,
            gateway_v6: None,
        };
        let subnets = Subnets::load(path.clone());
        assert_eq!(subnets.get(a), None);
        subnets.keep(a, &subnet);
        subnets.keep(b, &subnet);
        subnets.forget(b);
        let again = Subnets::load(path.clone());
        assert_eq!((again.get(a), again.get(b)), (Some(subnet), None));
        std::fs::write(&path, b"[").unwrap();
        assert_eq!(Subnets::load(path).get(a), None);
    }
}
