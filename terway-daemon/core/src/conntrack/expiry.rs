//! When an entry has outlived itself.

use std::time::Duration;

/// How long a connection may be silent before its entry goes. The defaults are those of Cilium 1.18 (pkg/defaults/defaults.go,
/// `CTMapEntries…`, `--bpf-ct-timeout-*`), those of UDP and ICMP of `nf_conntrack` where they are shorter
/// (Documentation/networking/nf_conntrack-sysctl.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, both directions seen.
    pub tcp: Duration,
    /// TCP, nobody has answered yet.
    pub tcp_syn: Duration,
    /// TCP, closed by both ends or reset.
    pub tcp_fin: Duration,
    /// UDP, both directions seen.
    pub udp: Duration,
    /// UDP, nobody has answered yet.
    pub udp_single: Duration,
    /// ICMP and ICMPv6.
    pub icmp: Duration,
    /// All other protocols.
    pub any: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp: Duration::from_secs(8000),
            tcp_syn: Duration::from_secs(60),
            tcp_fin: Duration::from_secs(10),
            udp: Duration::from_secs(60),
            udp_single: Duration::from_secs(30),
            icmp: Duration::from_secs(30),
            any: Duration::from_secs(60),
        }
    }
}

/// What was seen of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectionState {
    /// Whether there was a packet at all.
    pub any: bool,
    /// Time since the last one, or since the entry was made.
    pub idle: Duration,
    /// TCP: a FIN was among them.
    pub fin: bool,
    /// TCP: an RST was among them.
    pub rst: bool,
}

/// Both directions of a connection. Of a translated one they stand in two entries, which live and die by the same facts: a reply
/// must find its way back for as long as there are requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// IP protocol number.
    pub protocol: u8,
    /// The two directions, in any order.
    pub sides: [DirectionState; 2],
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// One direction was seen.
    Opening,
    /// Both were.
    Open,
    /// TCP: both ends have said that they are done, or one has reset it.
    Closed,
}

/// Whether what an entry was decided by still holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Validity {
    /// It does.
    Current,
    /// Something has changed: the next packet is decided anew, and asks the entry who began the connection.
    Rerouted,
    /// One of its ends is no more, or nobody will ask it any more.
    Dead,
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

impl Connection {
    /// How far it has come.
    #[must_use]
    pub fn phase(&self) -> Phase {
        let [one, other] = self.sides;
        if self.protocol == TCP && (one.rst || other.rst || one.fin && other.fin) {
            Phase::Closed
        } else if one.any && other.any {
            Phase::Open
        } else {
            Phase::Opening
        }
    }

    /// Time since the last packet of either direction.
    #[must_use]
    pub fn idle(&self) -> Duration {
        let [one, other] = self.sides;
        one.idle.min(other.idle)
    }
}

impl Timeouts {
    /// How long this connection may be silent.
    #[must_use]
    pub fn of(&self, connection: &Connection) -> Duration {
        match (connection.protocol, connection.phase()) {
            (TCP, Phase::Opening) => self.tcp_syn,
            (TCP, Phase::Open) => self.tcp,
            (TCP, Phase::Closed) => self.tcp_fin,
            (UDP, Phase::Opening) => self.udp_single,
            (UDP, _) => self.udp,
            (ICMP | ICMPV6, _) => self.icmp,
            _ => self.any,
        }
    }

    /// Whether it has been silent for longer.
    #[must_use]
    pub fn expired(&self, connection: &Connection) -> bool {
        connection.idle() > self.of(connection)
    }

    /// Whether its entry is to be deleted. One that has moved is of use for as long as its connection may live, unless the table is
    /// crowded.
    #[must_use]
    pub fn should_delete(&self, connection: &Connection, standing: Validity, crowded: bool) -> bool {
        match standing {
            Validity::Dead => true,
            Validity::Rerouted if crowded && connection.idle() > self.tcp_fin => true,
            Validity::Rerouted | Validity::Current => self.expired(connection),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seen() -> impl Strategy<Value = DirectionState> {
        // Around every limit of the defaults, and far beyond the largest.
        let around = prop::sample::select(vec![0_u64, 10, 30, 60, 8_000, 100_000]);
        (any::<bool>(), around, 0..3_u64, any::<bool>(), any::<bool>()).prop_map(|(any, at, off, fin, rst)| {
            DirectionState {
                any,
                idle: Duration::from_millis((at * 1000 + off).saturating_sub(1)),
                fin: fin && any,
                rst: rst && any,
            }
        })
    }

    /// The table of docs/conntrack.md, row by row, in seconds.
    fn documented(protocol: u8, [a, b]: [DirectionState; 2]) -> u64 {
        let rows: [(bool, u64); 9] = [
            (protocol == 6 && (a.rst || b.rst), 10),
            (protocol == 6 && a.fin && b.fin, 10),
            (protocol == 6 && a.any && b.any, 8000),
            (protocol == 6, 60),
            (protocol == 17 && a.any && b.any, 60),
            (protocol == 17, 30),
            (protocol == 1, 30),
            (protocol == 58, 30),
            (true, 60),
        ];
        rows.iter().find(|(holds, _)| *holds).map(|(_, seconds)| *seconds).unwrap()
    }

    proptest! {
        #[test]
        fn entries_expire_as_documented(
            protocol in prop::sample::select(vec![6_u8, 17, 1, 58, 132, 47]),
            a in seen(),
            b in seen(),
        ) {
            let connection = Connection { protocol, sides: [a, b] };
            let turned = Connection { protocol, sides: [b, a] };
            let limit = u128::from(documented(protocol, [a, b])) * 1000;
            let last = a.idle.as_millis().min(b.idle.as_millis());
            prop_assert_eq!(Timeouts::default().expired(&connection), last > limit);
            prop_assert_eq!(Timeouts::default().expired(&turned), last > limit, "which end began makes no difference");
        }

        /// The worse an entry stands and the more crowded its table is, the sooner it goes; and one that holds goes by its timeout alone.
        #[test]
        fn validity_shortens_timeout(a in seen(), b in seen(), protocol in prop::sample::select(vec![6_u8, 17]), crowded: bool) {
            let (timeouts, connection) = (Timeouts::default(), Connection { protocol, sides: [a, b] });
            let should_delete = |standing, crowded| timeouts.should_delete(&connection, standing, crowded);
            prop_assert_eq!(should_delete(Validity::Current, crowded), timeouts.expired(&connection));
            prop_assert!(should_delete(Validity::Dead, crowded));
            prop_assert!(!should_delete(Validity::Current, crowded) || should_delete(Validity::Rerouted, crowded));
            prop_assert!(!should_delete(Validity::Rerouted, false) || should_delete(Validity::Rerouted, true));
            // Whoever asks who began finds it for as long as anybody may ask.
            prop_assert!(timeouts.expired(&connection) || !should_delete(Validity::Rerouted, false));
        }

        /// What lives under some timeouts lives under longer ones.
        #[test]
        fn timeouts_are_monotonic(
            protocol in prop::sample::select(vec![6_u8, 17, 1, 132]),
            a in seen(),
            b in seen(),
            more in 1..100_u32,
        ) {
            let connection = Connection { protocol, sides: [a, b] };
            let short = Timeouts::default();
            let Timeouts { tcp, tcp_syn, tcp_fin, udp, udp_single, icmp, any } = short;
            let long = Timeouts {
                tcp: tcp * more, tcp_syn: tcp_syn * more, tcp_fin: tcp_fin * more, udp: udp * more,
                udp_single: udp_single * more, icmp: icmp * more, any: any * more,
            };
            prop_assert!(!long.expired(&connection) || short.expired(&connection));
        }
    }
}
