//! Errors of the pool that no cloud call returned.

use std::net::IpAddr;

use crate::errors::{self, Error};
use crate::ident::EniId;

/// The error of a request while the degradation switch forbids all cloud calls.
pub(super) fn degraded() -> Error {
    Error::new(errors::DEGRADED, "degradation is l0: no cloud call is made, so pods get only what is idle on the node.")
}

/// The error of an ADD that a DEL of the same attachment overtook.
pub(super) fn deleted_meanwhile() -> Error {
    Error::new(errors::BUSY, "A DEL of this attachment arrived before its ADD was finished.")
}

/// The error about a pod whose addresses, or whose whole ENI, the cloud does not list.
pub(super) fn address_loss(pod: &str, eni: &EniId, addresses: &[IpAddr], is_whole_eni: bool) -> Error {
    let list: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    let code = if is_whole_eni { errors::ENI_VANISHED } else { errors::ADDRESS_VANISHED };
    Error::new(code, format!("{pod} has {} of {eni}.", list.join(", ")))
}
