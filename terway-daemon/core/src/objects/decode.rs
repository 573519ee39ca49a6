//! How fields of the API are read where their plain type does not fit.

use std::fmt::Display;
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Deserializer, de::Error};

use crate::cidr::{self, Cidr as _};

/// `null` means the same as an absent field: Go writes it for an empty list (`endpoints: null`).
pub(super) fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn parse<T: FromStr<Err: Display>, E: Error>(what: &str, text: &str) -> Result<T, E> {
    text.trim().parse().map_err(|error| E::custom(format_args!("`{text}` is not {what}: {error}")))
}

/// A list of addresses.
pub(super) fn ips<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<IpAddr>, D::Error> {
    let list: Vec<String> = null_is_default(from)?;
    list.iter().map(|text| parse("an IP address", text)).collect()
}

/// One address; absent when empty.
pub(super) fn ip<'de, D: Deserializer<'de>>(from: D) -> Result<Option<IpAddr>, D::Error> {
    let text: String = null_is_default(from)?;
    if text.is_empty() { Ok(None) } else { parse("an IP address", &text).map(Some) }
}

fn block<E: Error>(text: &str) -> Result<IpNetwork, E> {
    let parsed = cidr::parse::<IpNetwork>(text.trim());
    parsed.map(|net| net.truncated()).map_err(|error| E::custom(format_args!("`{text}` is not a CIDR block: {error}")))
}

/// A block, with bits behind the prefix cut off as Kubernetes does.
pub(super) fn cidr<'de, D: Deserializer<'de>>(from: D) -> Result<IpNetwork, D::Error> {
    let text = String::deserialize(from)?;
    block(&text)
}

/// A list of blocks.
pub(super) fn cidrs<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<IpNetwork>, D::Error> {
    let list: Vec<String> = null_is_default(from)?;
    list.iter().map(|text| block(text)).collect()
}
