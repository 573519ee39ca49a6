//! The source port range of masqueraded connections (SNAT to the node).

use std::ops::RangeInclusive;

/// Node ports by default (kube-apiserver, `--service-node-port-range`): clients connect to them, so no connection starts from one.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;

/// The range where no other is free: above Linux's default range of ephemeral ports.
const LAST_RESORT: RangeInclusive<u16> = 61_000..=65_535;

/// The shortest range that is used.
const FEW: usize = 1024;

/// The longest range of ports that are neither the host's ephemeral ports (`net.ipv4.ip_local_port_range`), nor node ports, nor privileged; false if
/// there is none, and the range overlaps `local`.
#[must_use]
pub fn snat_port_range(local: &RangeInclusive<u16>) -> (RangeInclusive<u16>, bool) {
    let taken = [local, &NODE_PORTS];
    let free = |port: &u16| taken.iter().all(|range| !range.contains(port));
    let (mut longest, mut first) = (LAST_RESORT, None);
    let mut found = 0;
    for port in 1024..=u16::MAX {
        if !free(&port) {
            first = None;
            continue;
        }
        let range = *first.get_or_insert(port)..=port;
        if range.len() > found {
            found = range.len();
            longest = range;
        }
    }
    if found < FEW { (LAST_RESORT, false) } else { (longest, true) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn local_port_range_defaults() {
        assert_eq!(snat_port_range(&(32_768..=60_999)), (1024..=29_999, true));
        assert_eq!(snat_port_range(&(1024..=60_999)), (61_000..=65_535, true));
        assert_eq!(snat_port_range(&(10_000..=65_535)), (1024..=9_999, true));
        assert_eq!(snat_port_range(&(1024..=65_535)), (LAST_RESORT, false));
    }

    proptest! {
        #[test]
        fn snat_ports_are_exclusive(first in 1_u16..65_535, length in 0_u16..65_535) {
            let local = first..=first.saturating_add(length);
            let (ports, ours) = snat_port_range(&local);
            prop_assert!(ports.len() >= FEW && *ports.start() >= 1024);
            prop_assert!(!ours || ports.into_iter().all(|port| !local.contains(&port) && !NODE_PORTS.contains(&port)));
        }
    }
}
