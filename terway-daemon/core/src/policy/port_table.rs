//! Port tables: an ordered list of rules becomes one verdict for each protocol and port, as prefixes of which the longest counts.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::ids::Verdict;
use super::rule::Stage;
use crate::objects::Action;

/// One prefix of a port table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortTableEntry {
    /// The IP protocol number; none = all of them.
    pub protocol: Option<u8>,
    /// The first port.
    pub port: u16,
    /// Leading bits of the port that must agree, 0 to 16; 0 without a protocol.
    pub bits: u8,
    /// What holds there.
    pub verdict: Verdict,
}

impl PortTableEntry {
    /// Whether it covers a packet. ICMP and other protocols without ports ask with port 0.
    #[must_use]
    pub fn covers(&self, protocol: u8, port: u16) -> bool {
        // A shift by 16, for no bits, would overflow a u16.
        self.protocol.is_none_or(|own| own == protocol && u32::from(port ^ self.port) >> (16 - self.bits) == 0)
    }

    /// Bits of protocol and port that must agree: the longest prefix counts.
    #[must_use]
    pub const fn prefix_len(&self) -> u8 {
        if self.protocol.is_none() { 0 } else { 8 + self.bits }
    }
}

/// A rule that matches the peer, as far as ports and order go.
#[derive(Clone, Debug)]
pub(super) struct MatchedPorts<'a> {
    pub(super) stage: Stage,
    pub(super) action: Action,
    /// Protocol, first and last port; none = all traffic.
    pub(super) ports: Option<&'a [(u8, u16, u16)]>,
    /// Of `Accept` and `Deny`.
    pub(super) verdict: Verdict,
}

/// The verdict for a packet that these rules hit, in their order.
fn decide<'a>(hits: impl Iterator<Item = &'a MatchedPorts<'a>>, otherwise: Verdict) -> Verdict {
    let mut passed = None;
    for rule in hits {
        match rule.action {
            _ if passed == Some(rule.stage) => {}
            Action::Pass => passed = Some(rule.stage),
            Action::Accept | Action::Deny => return rule.verdict,
        }
    }
    otherwise
}

/// Flattens rules in their order; `otherwise` holds where none decides. The first entry is always the one for all protocols.
pub(super) fn flatten(rules: &[MatchedPorts<'_>], otherwise: Verdict) -> Vec<PortTableEntry> {
    let every_port: BTreeMap<usize, u32> =
        rules.iter().enumerate().filter(|(_, rule)| rule.ports.is_none()).map(|(n, _)| (n, 1)).collect();
    let decide = |hits: &BTreeMap<usize, u32>| decide(hits.keys().filter_map(|n| rules.get(*n)), otherwise);
    let rest = decide(&every_port);
    let mut entries = vec![PortTableEntry { protocol: None, port: 0, bits: 0, verdict: rest }];
    // Where a rule begins to hit, and where it ends.
    let mut edges: Vec<(u8, u32, usize, bool)> = Vec::new();
    for (n, rule) in rules.iter().enumerate() {
        // A range that ends before it begins has no port in it, and must not begin where it ends.
        for (protocol, first, last) in rule.ports.into_iter().flatten().filter(|(_, first, last)| first <= last) {
            edges.push((*protocol, u32::from(*first), n, true));
            edges.push((*protocol, u32::from(*last) + 1, n, false));
        }
    }
    edges.sort_unstable();
    for own in edges.chunk_by(|a, b| a.0 == b.0) {
        let protocol = own[0].0;
        // From one edge to the next. Ranges of one rule may overlap, so hits are counted.
        let mut hits = every_port.clone();
        let mut segments: Vec<(u32, u32, Verdict)> = Vec::new();
        let mut segment = |start: u32, end: u32, verdict: Verdict| match segments.last_mut() {
            _ if start == end => {}
            Some(last) if last.2 == verdict => last.1 = end,
            _ => segments.push((start, end, verdict)),
        };
        let mut start = 0;
        for there in own.chunk_by(|a, b| a.1 == b.1) {
            segment(start, there[0].1, decide(&hits));
            start = there[0].1;
            for (.., n, begins) in there {
                match hits.entry(*n) {
                    Entry::Vacant(new) => drop(new.insert(1)),
                    Entry::Occupied(mut of) if *begins => *of.get_mut() += 1,
                    Entry::Occupied(of) if *of.get() == 1 => drop(of.remove()),
                    Entry::Occupied(mut of) => *of.get_mut() -= 1,
                }
            }
        }
        segment(start, 1 << 16, decide(&hits));
        // What fills most of the ports is said once, the exceptions in prefixes below it.
        let base = match segments.iter().find(|s| s.2 == rest) {
            Some(_) => rest,
            None => segments.iter().max_by_key(|s| s.1 - s.0).map_or(rest, |s| s.2),
        };
        if base != rest {
            entries.push(PortTableEntry { protocol: Some(protocol), port: 0, bits: 0, verdict: base });
        }
        for (start, end, verdict) in segments.into_iter().filter(|s| s.2 != base) {
            prefixes(start, end, |port, bits| {
                entries.push(PortTableEntry { protocol: Some(protocol), port, bits, verdict });
            });
        }
    }
    entries
}

/// Splits `start..end` (at most `0..65536`) into aligned prefixes.
fn prefixes(mut start: u32, end: u32, mut each: impl FnMut(u16, u8)) {
    while start < end {
        let aligned = if start == 0 { 16 } else { start.trailing_zeros() };
        let fits = (end - start).ilog2();
        let size = aligned.min(fits);
        each(start as u16, (16 - size) as u8);
        start += 1 << size;
    }
}

#[cfg(test)]
mod tests {
    use super::super::ids::RuleId;
    use super::*;

    fn probe(table: &[PortTableEntry], protocol: u8, port: u16) -> Verdict {
        table.iter().filter(|e| e.covers(protocol, port)).max_by_key(|e| e.prefix_len()).unwrap().verdict
    }

    #[test]
    fn port_ranges_become_prefixes() {
        let (yes, no) = (Verdict::allow(RuleId(20)), Verdict::deny(RuleId(21)));
        let edges = [0u16, 1, 2, 79, 80, 81, 1023, 1024, 32767, 32768, 65533, 65534, 65535];
        for (n, first) in edges.iter().enumerate() {
            for last in &edges[n..] {
                let ranges = [(6u8, *first, *last)];
                let rule =
                    MatchedPorts { stage: Stage::Network, action: Action::Accept, ports: Some(&ranges), verdict: yes };
                let table = flatten(&[rule], no);
                assert!(table.len() <= 32, "{first}-{last}: {}", table.len());
                for port in 0..=u16::MAX {
                    let expected = if (*first..=*last).contains(&port) { yes } else { no };
                    // All near the edges, some elsewhere.
                    if port.abs_diff(*first) < 3 || port.abs_diff(*last) < 3 || port % 997 == 0 {
                        assert_eq!(probe(&table, 6, port), expected, "{first}-{last} at {port}");
                    }
                }
                assert_eq!(probe(&table, 17, *first), no);
                assert_eq!(probe(&table, 1, 0), no);
            }
        }
    }

    #[test]
    fn overlapping_and_empty_port_ranges() {
        let (yes, no) = (Verdict::allow(RuleId(20)), Verdict::deny(RuleId(21)));
        let ports = [(6u8, 80, 90), (6, 90, 90), (6, 91, 95), (6, 200, 100), (17, 65_535, 65_535)];
        let rule =
            MatchedPorts { stage: Stage::Network, action: Action::Accept, ports: Some(&ports[..]), verdict: yes };
        let table = flatten(&[rule], no);
        for (protocol, port, expected) in [
            (6, 79, no),
            (6, 80, yes),
            (6, 90, yes),
            (6, 91, yes),
            (6, 95, yes),
            (6, 96, no),
            (6, 101, no),
            (6, 150, no),
            (6, 200, no),
            (6, 65_535, no),
            (17, 65_534, no),
            (17, 65_535, yes),
            (17, 0, no),
        ] {
            assert_eq!(probe(&table, protocol, port), expected, "{protocol} {port}");
        }
    }

    #[test]
    fn pass_verdict_and_first_match() {
        let (a, b, end) = (Verdict::allow(RuleId(20)), Verdict::deny(RuleId(21)), Verdict::deny(RuleId(22)));
        let web = [(6, 80, 80)];
        let rule = |stage, action, ports, verdict| MatchedPorts { stage, action, ports, verdict };
        let rules = [
            rule(Stage::Admin, Action::Pass, Some(&web[..]), end),
            rule(Stage::Admin, Action::Deny, None, b),
            rule(Stage::Network, Action::Accept, None, a),
        ];
        let table = flatten(&rules, end);
        assert_eq!((probe(&table, 6, 80), probe(&table, 6, 81), probe(&table, 1, 0)), (a, b, b));
    }
}
