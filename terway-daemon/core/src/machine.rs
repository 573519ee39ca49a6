//! The machine that a kept node identity belongs to, and whether that is still the machine that the daemon runs on.
//!
//! The daemon keeps the identity so that a restart needs no metadata service. A cloned disk image, or a state folder that was copied,
//! carries the identity of another instance along: with it the daemon would detach and delete that instance's ENIs.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::cloud::NodeIdentity;
use crate::ident::Mac;

/// DMI identifiers of the machine (`/sys/class/dmi/id`); `None` where the firmware or the kernel does not tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dmi {
    /// `product_uuid`.
    #[serde(default)]
    pub product_uuid: Option<String>,
    /// `product_serial`.
    #[serde(default)]
    pub product_serial: Option<String>,
}

/// Result of checking a kept identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Validity {
    /// It is this machine's.
    Valid,
    /// Something of the machine contradicts it, with the reason; only the metadata service can decide.
    Suspect(String),
    /// The metadata service names another instance, with the reason.
    OtherInstance(String),
}

/// Checks the kept identity `kept` and DMI identifiers against the machine's MAC addresses and DMI identifiers, and against the metadata
/// service's answer, if there is one, which decides alone.
#[must_use]
pub fn check(
    kept: (&NodeIdentity, &Dmi),
    macs: &BTreeSet<Mac>,
    dmi: &Dmi,
    metadata: Option<&NodeIdentity>,
) -> Validity {
    let (identity, kept_dmi) = kept;
    if let Some(now) = metadata {
        return match now.instance == identity.instance {
            true => Validity::Valid,
            false => Validity::OtherInstance(format!(
                "the metadata service says {}, the kept identity is {}",
                now.instance, identity.instance
            )),
        };
    }
    if !macs.contains(&identity.primary_mac) {
        return Validity::Suspect(format!("no interface has the primary ENI's MAC address {}", identity.primary_mac));
    }
    let pairs = [
        ("product_uuid", &kept_dmi.product_uuid, &dmi.product_uuid),
        ("product_serial", &kept_dmi.product_serial, &dmi.product_serial),
    ];
    for (name, kept, now) in pairs {
        if let (Some(kept), Some(now)) = (kept, now)
            && kept != now
        {
            return Validity::Suspect(format!("the DMI {name} is {now}, kept is {kept}"));
        }
    }
    Validity::Valid
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ident::InstanceId;

    fn identity(instance: &str) -> NodeIdentity {
        NodeIdentity {
            instance: InstanceId::new(instance),
            instance_type: "ecs.g7.large".into(),
            region: "r".into(),
            zone: "r-a".into(),
            primary_mac: Mac([0, 22, 62, 0, 0, 1]),
        }
    }

    fn dmi(uuid: Option<&str>, serial: Option<&str>) -> Dmi {
        Dmi { product_uuid: uuid.map(str::to_owned), product_serial: serial.map(str::to_owned) }
    }

    fn is_suspect(kept: &Dmi, macs: &[Mac], now: &Dmi) -> bool {
        let macs = macs.iter().copied().collect();
        match check((&identity("i-1"), kept), &macs, now, None) {
            Validity::Valid => false,
            Validity::Suspect(_) => true,
            Validity::OtherInstance(reason) => panic!("{reason}"),
        }
    }

    #[test]
    fn identity_without_metadata_by_mac_and_dmi() {
        let mac = identity("i-1").primary_mac;
        let both = dmi(Some("u"), Some("s"));
        assert!(!is_suspect(&both, &[mac], &both));
        assert!(is_suspect(&both, &[], &both));
        assert!(is_suspect(&both, &[Mac([2; 6])], &both));
        assert!(is_suspect(&both, &[mac], &dmi(Some("v"), Some("s"))));
        assert!(is_suspect(&both, &[mac], &dmi(Some("u"), Some("t"))));
        // What cannot be read proves nothing.
        assert!(!is_suspect(&both, &[mac], &Dmi::default()));
        assert!(!is_suspect(&Dmi::default(), &[mac], &both));
    }

    #[test]
    fn identity_by_metadata_service() {
        let kept = (&identity("i-1"), &dmi(Some("u"), None));
        let now = dmi(Some("v"), None);
        assert_eq!(check(kept, &BTreeSet::new(), &now, Some(&identity("i-1"))), Validity::Valid);
        let macs = [identity("i-1").primary_mac].into();
        let Validity::OtherInstance(reason) = check(kept, &macs, kept.1, Some(&identity("i-2"))) else { panic!() };
        assert!(reason.contains("i-1") && reason.contains("i-2"), "{reason}");
    }
}
