//! Keys of connection tracking.

use std::time::Duration;

use super::diff::Setting;
use super::keys::{self, Key};
use super::raw::Reader;
use super::units::show_period;
use crate::conntrack::{LEAST, Sizing, Timeouts};

/// Connection tracking as it is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conntrack {
    /// When entries may go (`bpf_ct_timeout_*`).
    pub timeouts: Timeouts,
    /// How large the tables are (`bpf_ct_max_v4`, `bpf_ct_max_v6`, `bpf_map_dynamic_size_ratio`).
    pub sizing: Sizing,
    /// Time between two passes; none adapts it (`conntrack_gc_interval`).
    pub gc_interval: Option<Duration>,
    /// The longest time that it is adapted to (`conntrack_gc_max_interval`).
    pub gc_max_interval: Duration,
}

impl Conntrack {
    pub(super) fn read(reader: &mut Reader) -> Self {
        let mut period = |key: &Key| reader.period(key).unwrap_or_default();
        let timeouts = Timeouts {
            tcp: period(keys::BPF_CT_TIMEOUT_TCP),
            tcp_syn: period(keys::BPF_CT_TIMEOUT_TCP_SYN),
            tcp_fin: period(keys::BPF_CT_TIMEOUT_TCP_FIN),
            udp: period(keys::BPF_CT_TIMEOUT_UDP),
            udp_single: period(keys::BPF_CT_TIMEOUT_UDP_SINGLE),
            icmp: period(keys::BPF_CT_TIMEOUT_ICMP),
            any: period(keys::BPF_CT_TIMEOUT_ANY),
        };
        let gc_interval = Some(period(keys::CONNTRACK_GC_INTERVAL)).filter(|interval| !interval.is_zero());
        let gc_max_interval = period(keys::CONNTRACK_GC_MAX_INTERVAL);
        if let Some(given) = gc_interval.filter(|given| *given < Duration::from_secs(1)) {
            let reason = "must be 0s, which adapts it, or 1s at least";
            reader.refuse(keys::CONNTRACK_GC_INTERVAL, &show_period(given).into(), reason);
        }
        let mut entries = |key: &Key| {
            let given = reader.count(key);
            if (1..LEAST).contains(&given) {
                reader.refuse(
                    key,
                    &given.into(),
                    format!("must be 0, which leaves it to the memory, or {LEAST} at least"),
                );
            }
            Some(given).filter(|given| *given > 0)
        };
        let (v4, v6) = (entries(keys::BPF_CT_MAX_V4), entries(keys::BPF_CT_MAX_V6));
        let sizing = Sizing { v4, v6, ratio: reader.ratio(keys::BPF_MAP_DYNAMIC_SIZE_RATIO) };
        Self { timeouts, sizing, gc_interval, gc_max_interval }
    }

    pub(super) fn settings(&self) -> Vec<(&'static Key, Setting)> {
        let Self { timeouts, sizing, gc_interval, gc_max_interval } = self;
        let Timeouts { tcp, tcp_syn, tcp_fin, udp, udp_single, icmp, any } = *timeouts;
        let Sizing { v4, v6, ratio } = *sizing;
        vec![
            (keys::BPF_CT_TIMEOUT_TCP, show_period(tcp).into()),
            (keys::BPF_CT_TIMEOUT_TCP_SYN, show_period(tcp_syn).into()),
            (keys::BPF_CT_TIMEOUT_TCP_FIN, show_period(tcp_fin).into()),
            (keys::BPF_CT_TIMEOUT_UDP, show_period(udp).into()),
            (keys::BPF_CT_TIMEOUT_UDP_SINGLE, show_period(udp_single).into()),
            (keys::BPF_CT_TIMEOUT_ICMP, show_period(icmp).into()),
            (keys::BPF_CT_TIMEOUT_ANY, show_period(any).into()),
            (keys::BPF_CT_MAX_V4, v4.into()),
            (keys::BPF_CT_MAX_V6, v6.into()),
            (keys::BPF_MAP_DYNAMIC_SIZE_RATIO, ratio.get().into()),
            (keys::CONNTRACK_GC_INTERVAL, gc_interval.map(show_period).into()),
            (keys::CONNTRACK_GC_MAX_INTERVAL, show_period(*gc_max_interval).into()),
        ]
    }

    /// These, with the sizes of `self`, which need a restart.
    pub(super) const fn effective(&self, new: &Self) -> Self {
        Self { sizing: self.sizing, ..*new }
    }
}
