//! What the store keeps: one record per thing that a crash must not forget.
//!
//! Idle addresses have no record of their own, the ENI's lists them: they hold no promise to anybody. Durations and moments are never stored, since the
//! clock that they belong to ends with the process.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::ids::ClientToken;
use super::lease::{Lease, Nic};
use crate::ident::{AttachmentKey, EniId, Family, Mac, PodRef, SecurityGroupId, VSwitchId};

/// The version of the encoding. A daemon refuses what a newer one wrote, rather than dropping what it does not know; it reads all older ones.
///
/// 2: prefixes, security groups and tags of ENIs. 3: `lease` and `quarantine`, which were `grant` and `hold`.
pub const VERSION: u32 = 3;

/// One write.
#[expect(clippy::large_enum_variant, reason = "nearly all changes are puts, so boxing would save nothing")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Insert, or replace the record with the same key.
    Put(Record),
    /// Remove; fine if there is none.
    Delete(RecordKey),
}

/// One thing to remember.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Record {
    /// An attachment from the moment an address is bound to it until nothing of it is left in the kernel.
    Attachment(AttachmentRecord),
    /// An ENI of the pool.
    Eni(EniRecord),
    /// An address that must not be handed out.
    Address(AddressRecord),
    /// A prefix that must not be handed out from.
    Prefix(PrefixRecord),
    /// An ENI that may have been asked for.
    Creation(CreationRecord),
    /// Addresses that may have been asked for.
    Assignment(AssignmentRecord),
    /// The number of the next token.
    Counter {
        /// Next number.
        next: u64,
    },
}

/// See [`Record::Attachment`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentRecord {
    /// The attachment.
    pub key: AttachmentKey,
    /// Whose it is.
    pub pod: PodRef,
    /// Path of its network namespace.
    pub netns: String,
    /// What the engine gave with the Add.
    #[serde(default)]
    pub options: String,
    /// Its addresses and their ENI.
    #[serde(alias = "grant")]
    pub lease: Lease,
    /// How far it is.
    pub phase: Phase,
}

/// How far an attachment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Being wired; an Add waits for it, or was cut off by a crash.
    SettingUp,
    /// Wired.
    Ready,
    /// Being removed; will never be used again.
    Releasing,
}

/// See [`Record::Eni`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniRecord {
    /// Its id.
    pub id: EniId,
    /// Its MAC.
    pub mac: Mac,
    /// Its vSwitch.
    pub vswitch: VSwitchId,
    /// The address that stays as long as the ENI.
    pub primary_v4: Ipv4Addr,
    /// Its security groups; `None` in a record of version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security_groups: Option<Vec<SecurityGroupId>>,
    /// Its tags; `None` in a record of version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<BTreeMap<String, String>>,
    /// All its single addresses as far as known when this was written.
    pub addresses: Vec<IpAddr>,
    /// All its prefixes, likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<IpNetwork>,
    /// Its NIC when it was last configured.
    pub nic: Option<Nic>,
    /// How far it is.
    pub stage: EniStage,
}

/// What is to become of an ENI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EniStage {
    /// Created, to be attached.
    Attaching,
    /// Attached, carries pods.
    InUse,
    /// Attached, takes no new pods, is detached after its last one.
    Draining,
    /// To be detached.
    Detaching,
    /// To be deleted.
    Deleting,
}

/// See [`Record::Address`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressRecord {
    /// Its ENI.
    pub eni: EniId,
    /// The address.
    pub address: IpAddr,
    /// Why it must not be handed out.
    #[serde(alias = "hold")]
    pub quarantine: Quarantine,
}

/// See [`Record::Prefix`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixRecord {
    /// Its ENI.
    pub eni: EniId,
    /// The prefix.
    pub prefix: IpNetwork,
    /// Why it must not be handed out from.
    #[serde(alias = "hold")]
    pub quarantine: Quarantine,
}

/// Why an address must not be handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quarantine {
    /// A pod had it a moment ago. After a restart the full time starts again.
    Cooling,
    /// It is being given back to the cloud, or was so lately that the cloud's lists may still show it.
    Releasing,
}

/// See [`Record::Creation`]. Repeating the call with the same token and the same parameters finds the ENI if it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreationRecord {
    /// `ClientToken`.
    pub token: ClientToken,
    /// In which vSwitch.
    pub vswitch: VSwitchId,
    /// With which security groups.
    pub security_groups: Vec<SecurityGroupId>,
    /// IPv4 addresses in all.
    pub v4: u32,
    /// IPv6 addresses.
    pub v6: u32,
    /// IPv4 prefixes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub v4_prefixes: u32,
    /// IPv6 prefixes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub v6_prefixes: u32,
    /// Resource group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_group: Option<String>,
    /// Tags.
    pub tags: BTreeMap<String, String>,
}

/// See [`Record::Assignment`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssignmentRecord {
    /// `ClientToken`.
    pub token: ClientToken,
    /// To which ENI.
    pub eni: EniId,
    /// Which family.
    pub family: Family,
    /// How many.
    pub count: u32,
    /// Whether they are prefixes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prefixes: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// The key of a record: one record per key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordKey {
    /// By attachment.
    Attachment(AttachmentKey),
    /// By ENI.
    Eni(EniId),
    /// By ENI and address.
    Address(EniId, IpAddr),
    /// By ENI and prefix.
    Prefix(EniId, IpNetwork),
    /// By token.
    Creation(ClientToken),
    /// By token.
    Assignment(ClientToken),
    /// There is one.
    Counter,
}

/// A stored record that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Written by a newer daemon.
    #[error("record version {found} is newer than version {VERSION}, the newest this daemon reads")]
    Version {
        /// The version it carries.
        found: u32,
    },
    /// Not a record.
    #[error("malformed record")]
    Malformed(#[from] serde_json::Error),
}

#[derive(Serialize)]
struct Written<'a> {
    v: u32,
    #[serde(flatten)]
    record: &'a Record,
}

#[derive(Deserialize)]
struct Versioned {
    v: u32,
}

impl Record {
    /// The key it is stored under.
    #[must_use]
    pub fn key(&self) -> RecordKey {
        match self {
            Self::Attachment(a) => RecordKey::Attachment(a.key.clone()),
            Self::Eni(e) => RecordKey::Eni(e.id.clone()),
            Self::Address(a) => RecordKey::Address(a.eni.clone(), a.address),
            Self::Prefix(p) => RecordKey::Prefix(p.eni.clone(), p.prefix),
            Self::Creation(c) => RecordKey::Creation(c.token.clone()),
            Self::Assignment(a) => RecordKey::Assignment(a.token.clone()),
            Self::Counter { .. } => RecordKey::Counter,
        }
    }

    /// As bytes: JSON with the version in `v`.
    ///
    /// # Errors
    /// When serde cannot write it, which would be a defect of the types above.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        Ok(serde_json::to_vec(&Written { v: VERSION, record: self })?)
    }

    /// From bytes that [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`RecordError::Version`] before anything else of the record is looked at; [`RecordError::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let Versioned { v } = serde_json::from_slice(bytes)?;
        if v > VERSION {
            return Err(RecordError::Version { found: v });
        }
        Ok(serde_json::from_slice(bytes)?)
    }
}

impl RecordKey {
    /// As text: the same key gives the same text, different keys different ones.
    ///
    /// # Errors
    /// When serde cannot write it, which would be a defect of the types above.
    pub fn encode(&self) -> Result<String, RecordError> {
        Ok(serde_json::to_string(self)?)
    }
}
