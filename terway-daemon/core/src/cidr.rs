//! CIDR blocks: strict parsing, and the arithmetic that [`ipnetwork`] leaves to its users.
//!
//! `ipnetwork` also parses a bare address and a dotted netmask. Here a block from outside has a prefix length in decimal digits,
//! as RFC 4632 (section 3.1), RFC 4291 (section 2.3) and Kubernetes' validation have it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::{Deserialize as _, Deserializer, de::Error as _};

/// Why a text is not a CIDR block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// There is no `/`.
    #[error("the prefix length is missing")]
    NoPrefixLength,
    /// What stands before the `/` is no address of the family.
    #[error("the address is invalid")]
    Address,
    /// What stands behind the `/` is no number from 0 to 32 (IPv4) or 128 (IPv6).
    #[error("the prefix length is invalid")]
    PrefixLength,
}

/// A CIDR block type: both families, or one of them.
pub trait Cidr: Copy + Sized {
    /// The block's address type.
    type Address: std::str::FromStr;

    /// Makes a block of an address and a prefix length.
    ///
    /// # Errors
    /// [`CidrError::PrefixLength`].
    fn build(address: Self::Address, prefix_length: u8) -> Result<Self, CidrError>;

    /// The block with its host bits cleared.
    #[must_use]
    fn truncated(&self) -> Self;

    /// Whether the block is a single address (/32 or /128).
    fn is_host(&self) -> bool;

    /// Whether every address of `inner` is in the block; false between families.
    fn covers(&self, inner: &Self) -> bool;
}

macro_rules! cidr_of_family {
    ($network:ty, $address:ty, $bits:literal) => {
        impl Cidr for $network {
            type Address = $address;

            fn build(address: $address, prefix_length: u8) -> Result<Self, CidrError> {
                Self::new_checked(address, prefix_length).ok_or(CidrError::PrefixLength)
            }

            fn truncated(&self) -> Self {
                Self::new_checked(self.network(), self.prefix()).unwrap_or(*self)
            }

            fn is_host(&self) -> bool {
                self.prefix() == $bits
            }

            fn covers(&self, inner: &Self) -> bool {
                self.prefix() <= inner.prefix() && self.contains(inner.ip())
            }
        }
    };
}

cidr_of_family!(Ipv4Network, Ipv4Addr, 32);
cidr_of_family!(Ipv6Network, Ipv6Addr, 128);

impl Cidr for IpNetwork {
    type Address = IpAddr;

    fn build(address: IpAddr, prefix_length: u8) -> Result<Self, CidrError> {
        match address {
            IpAddr::V4(v4) => Ipv4Network::build(v4, prefix_length).map(Self::V4),
            IpAddr::V6(v6) => Ipv6Network::build(v6, prefix_length).map(Self::V6),
        }
    }

    fn truncated(&self) -> Self {
        match self {
            Self::V4(v4) => Self::V4(v4.truncated()),
            Self::V6(v6) => Self::V6(v6.truncated()),
        }
    }

    fn is_host(&self) -> bool {
        match self {
            Self::V4(v4) => v4.is_host(),
            Self::V6(v6) => v6.is_host(),
        }
    }

    fn covers(&self, inner: &Self) -> bool {
        match (self, inner) {
            (Self::V4(outer), Self::V4(inner)) => outer.covers(inner),
            (Self::V6(outer), Self::V6(inner)) => outer.covers(inner),
            _ => false,
        }
    }
}

/// Every IPv4 address: the destination of a default route.
pub const ALL_V4: Ipv4Network = v4(Ipv4Addr::UNSPECIFIED, 0);
/// Every IPv6 address: the destination of a default route.
pub const ALL_V6: Ipv6Network = v6(Ipv6Addr::UNSPECIFIED, 0);

/// The IPv4 block of an address and a prefix length that are known to be right, as in constants.
///
/// # Panics
/// The prefix length is over 32.
#[must_use]
pub const fn v4(address: Ipv4Addr, prefix_length: u8) -> Ipv4Network {
    Ipv4Network::new_checked(address, prefix_length).expect("a prefix length of IPv4")
}

/// The IPv6 block of an address and a prefix length that are known to be right, as in constants.
///
/// # Panics
/// The prefix length is over 128.
#[must_use]
pub const fn v6(address: Ipv6Addr, prefix_length: u8) -> Ipv6Network {
    Ipv6Network::new_checked(address, prefix_length).expect("a prefix length of IPv6")
}

/// A block whose [`FromStr`](std::str::FromStr) is [`parse`], for generic parsers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strict<T>(pub T);

impl<T: Cidr> std::str::FromStr for Strict<T> {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        parse(text).map(Self)
    }
}

/// Parses `address/prefix length`; host bits are kept.
///
/// # Errors
/// [`CidrError`]: a bare address, a netmask instead of a length, or a part that is invalid.
pub fn parse<T: Cidr>(text: &str) -> Result<T, CidrError> {
    let (address, length) = text.split_once('/').ok_or(CidrError::NoPrefixLength)?;
    let Ok(address) = address.parse() else { return Err(CidrError::Address) };
    // `u8::from_str` takes a sign.
    if !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(CidrError::PrefixLength);
    }
    let Ok(length) = length.parse() else { return Err(CidrError::PrefixLength) };
    T::build(address, length)
}

/// Deserializes a block strictly: `#[serde(deserialize_with = "cidr::deserialize")]`.
///
/// # Errors
/// The value is not a text, or [`parse`] refuses it.
pub fn deserialize<'de, D: Deserializer<'de>, T: Cidr>(from: D) -> Result<T, D::Error> {
    let text = String::deserialize(from)?;
    parse(&text).map_err(|error| D::Error::custom(format_args!("`{text}` is not a CIDR block: {error}")))
}

/// Deserializes a list of blocks strictly.
///
/// # Errors
/// As [`deserialize`], for the first block that is refused.
pub fn deserialize_list<'de, D: Deserializer<'de>, T: Cidr>(from: D) -> Result<Vec<T>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let block = |text: &String| {
        parse(text).map_err(|error| D::Error::custom(format_args!("`{text}` is not a CIDR block: {error}")))
    };
    texts.iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn strict_parsing_refuses_what_ipnetwork_takes() {
        for (text, error) in [
            ("10.0.0.1", CidrError::NoPrefixLength),
            ("fd00::1", CidrError::NoPrefixLength),
            ("", CidrError::NoPrefixLength),
            ("10.0.0.0/255.0.0.0", CidrError::PrefixLength),
            ("10.0.0.0/+8", CidrError::PrefixLength),
            ("10.0.0.0/33", CidrError::PrefixLength),
            ("10.0.0.0/", CidrError::PrefixLength),
            ("10.0.0.0/8/8", CidrError::PrefixLength),
            ("10.0.0.0/256", CidrError::PrefixLength),
            ("fd00::/129", CidrError::PrefixLength),
            ("10.0.0/8", CidrError::Address),
            (" 10.0.0.0/8", CidrError::Address),
            ("/8", CidrError::Address),
        ] {
            assert_eq!(parse::<IpNetwork>(text), Err(error), "{text}");
        }
        assert_eq!(parse::<Ipv4Network>("fd00::/64"), Err(CidrError::Address));
        assert_eq!(parse::<Ipv6Network>("10.0.0.0/8"), Err(CidrError::Address));
    }

    #[test]
    fn host_bits_are_kept_by_parsing_and_cut_by_truncated() {
        let net: IpNetwork = parse("10.1.2.3/8").unwrap();
        assert_eq!((net.to_string(), net.truncated().to_string()), ("10.1.2.3/8".into(), "10.0.0.0/8".into()));
        let net: IpNetwork = parse("fd00::1:2/64").unwrap();
        assert_eq!(net.truncated().to_string(), "fd00::/64");
    }

    proptest! {
        #[test]
        fn covers_is_a_comparison_of_leading_bits(a: u32, b: u32, shared in 0..=32u32, outer in 0..=32u8, inner in 0..=32u8) {
            // Addresses that share some leading bits, so that both answers come up.
            let mask = u32::MAX.checked_shl(32 - shared).unwrap_or(0);
            let b = (a & mask) | (b & !mask);
            let differs = (u64::from(a ^ b)) >> (32 - u32::from(outer));
            let [a, b] = [(a, outer), (b, inner)].map(|(bits, length)| Ipv4Network::new(bits.into(), length).unwrap());
            prop_assert_eq!(a.covers(&b), inner >= outer && differs == 0);
            prop_assert_eq!(IpNetwork::V4(a).covers(&IpNetwork::V4(b)), a.covers(&b));
        }

        #[test]
        fn text_of_a_block_parses_to_the_block(bits: u128, length in 0..=128u8) {
            let net = Ipv6Network::new(bits.into(), length).unwrap();
            prop_assert_eq!(parse::<IpNetwork>(&net.to_string()), Ok(IpNetwork::V6(net)));
        }
    }
}
