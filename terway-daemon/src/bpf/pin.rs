//! Pinned maps: checks that type and sizes are those of this version. aya does not compare them, and the kernel does so only at program
//! load, after user space has read values of the wrong size.

use std::fs;
use std::io;
use std::path::Path;

use aya::maps::{MapInfo, MapType};
use terway_abi::{
    Affinity, AffinityKey, Backend, BackendRef, COUNTERS, Counter, EPOCH_SLOTS, Endpoint, EventBudget,
    FRONTEND_FILTER_BUCKETS, FlowKeyV4, FlowKeyV6, FlowV4, FlowV6, FragmentKeyV4, FragmentKeyV6, FragmentValue,
    Frontend, FrontendKeyV4, FrontendKeyV6, MAX_ENDPOINTS, MAX_UPLINKS, PeerKey, PolicyCounter, PolicyEndpoint,
    PortKey, SocketKey, SocketValue, SourceRangeV4, SourceRangeV6, Uplink, Versioned, names,
};

use super::Config;
use super::error::BpfError;

/// Suffix of the pin of a flow table whose size is not the configured one. Names on a bpffs have no dots.
pub(super) const OLD_SIZE: &str = "_before";

struct Layout {
    name: &'static str,
    kind: MapType,
    key: usize,
    value: usize,
    entries: Option<u32>,
    /// A map of another size is renamed and its entries are copied ([`super::flows`]).
    is_resizable: bool,
}

const fn layout<K, V>(name: &'static str, kind: MapType, entries: Option<u32>) -> Layout {
    Layout { name, kind, key: size_of::<K>(), value: size_of::<V>(), entries, is_resizable: false }
}

fn layouts(config: &Config) -> [Layout; 33] {
    [
        layout::<u32, Endpoint>(names::ENDPOINTS, MapType::Hash, Some(MAX_ENDPOINTS)),
        layout::<u32, Endpoint>(names::ENDPOINTS_V4, MapType::Hash, Some(MAX_ENDPOINTS)),
        layout::<[u32; 4], Endpoint>(names::ENDPOINTS_V6, MapType::Hash, Some(MAX_ENDPOINTS)),
        layout::<u32, u32>(names::EPOCHS, MapType::Array, Some(EPOCH_SLOTS)),
        layout::<[u32; 2], u32>(names::HOST_V4, MapType::LpmTrie, None),
        layout::<[u32; 5], u32>(names::HOST_V6, MapType::LpmTrie, None),
        Layout {
            is_resizable: true,
            ..layout::<FlowKeyV4, FlowV4>(names::FLOWS_V4, MapType::LruHash, Some(config.flows_v4))
        },
        Layout {
            is_resizable: true,
            ..layout::<FlowKeyV6, FlowV6>(names::FLOWS_V6, MapType::LruHash, Some(config.flows_v6))
        },
        layout::<FragmentKeyV4, FragmentValue>(names::FRAGMENTS_V4, MapType::LruHash, None),
        layout::<FragmentKeyV6, FragmentValue>(names::FRAGMENTS_V6, MapType::LruHash, None),
        layout::<FrontendKeyV4, Frontend>(names::FRONTENDS_V4, MapType::Hash, None),
        layout::<FrontendKeyV6, Frontend>(names::FRONTENDS_V6, MapType::Hash, None),
        layout::<u32, u32>(names::FRONTEND_FILTER, MapType::Array, Some(FRONTEND_FILTER_BUCKETS)),
        layout::<u32, BackendRef>(names::BACKEND_REFS, MapType::Array, None),
        layout::<u32, Backend>(names::BACKENDS, MapType::Array, None),
        layout::<u32, u64>(names::ACTIVE_CONNS, MapType::Array, None),
        layout::<AffinityKey, Affinity>(names::AFFINITY, MapType::LruHash, None),
        layout::<(u32, SourceRangeV4), u32>(names::SRC_RANGES_V4, MapType::LpmTrie, None),
        layout::<(u32, SourceRangeV6), u32>(names::SRC_RANGES_V6, MapType::LpmTrie, None),
        layout::<SocketKey, SocketValue>(names::SOCKET_NAT, MapType::LruHash, None),
        layout::<u32, u32>(names::POLICY_CONTROL, MapType::Array, Some(1)),
        layout::<u32, PolicyEndpoint>(names::POLICY_ENDPOINTS, MapType::Array, Some(2 * MAX_ENDPOINTS)),
        layout::<PeerKey, Versioned>(names::POLICY_PEERS, MapType::Hash, None),
        layout::<(u32, PortKey), u32>(names::POLICY_PORTS, MapType::LpmTrie, None),
        layout::<u32, PolicyCounter>(names::POLICY_COUNTERS, MapType::PerCpuHash, None),
        layout::<u32, Versioned>(names::IPCACHE_V4, MapType::Hash, None),
        layout::<[u32; 4], Versioned>(names::IPCACHE_V6, MapType::Hash, None),
        layout::<[u32; 2], Versioned>(names::IPCACHE_NET_V4, MapType::LpmTrie, None),
        layout::<[u32; 5], Versioned>(names::IPCACHE_NET_V6, MapType::LpmTrie, None),
        layout::<u32, Uplink>(names::UPLINKS, MapType::Hash, Some(MAX_UPLINKS)),
        layout::<u32, Counter>(names::COUNTERS, MapType::PerCpuArray, Some(COUNTERS)),
        layout::<u32, EventBudget>(names::EVENT_BUDGET, MapType::PerCpuArray, Some(1)),
        layout::<(), ()>(names::EVENTS, MapType::RingBuf, None),
    ]
}

/// Checks every map that is pinned in `pins`.
pub(super) fn check(pins: &Path, config: &Config) -> Result<(), BpfError> {
    for wanted in layouts(config) {
        let path = pins.join(wanted.name);
        if !path.exists() {
            continue;
        }
        let found = MapInfo::from_pin(&path).map_err(BpfError::map(wanted.name))?;
        let kind = found.map_type().map_err(BpfError::map(wanted.name))?;
        let (key, value, entries) = (found.key_size(), found.value_size(), found.max_entries());
        let same_shape = kind == wanted.kind && key as usize == wanted.key && value as usize == wanted.value;
        let same_size = wanted.entries.is_none_or(|wanted| wanted == entries);
        if same_shape && same_size {
            continue;
        }
        if same_shape && wanted.is_resizable {
            // Programs use the old table until they are attached anew.
            tracing::info!(map = wanted.name, from = entries, to = wanted.entries, "flow table gets another size");
            let old = pins.join(format!("{}{OLD_SIZE}", wanted.name));
            fs::rename(&path, &old).map_err(|source| BpfError::Pin { path: old, source })?;
            continue;
        }
        let describe = |kind: &MapType, key: usize, value: usize, entries: Option<u32>| {
            let entries = entries.map_or_else(|| "any number of".to_owned(), |n| n.to_string());
            format!("kind {kind:?}, {key}-byte keys, {value}-byte values and {entries} entries")
        };
        return Err(BpfError::Layout {
            path,
            found: describe(&kind, key as usize, value as usize, Some(entries)),
            wanted: describe(&wanted.kind, wanted.key, wanted.value, wanted.entries),
        });
    }
    Ok(())
}

/// Removes the map folders of other versions.
pub(super) fn remove_others(pins: &Path) -> Result<(), BpfError> {
    let failed = |source| BpfError::Pin { path: pins.to_owned(), source };
    let Some(root) = pins.parent() else { return Ok(()) };
    for entry in fs::read_dir(root).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let versioned = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix('v'));
        if versioned.is_some_and(|version| version.parse::<u32>().is_ok()) && path != pins {
            fs::remove_dir_all(&path).map_err(|source| BpfError::Pin { path, source })?;
        }
    }
    Ok(())
}

/// Removes a pin; one that is gone is no error.
pub(super) fn unlink(path: &Path) -> Result<(), BpfError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(BpfError::Pin { path: path.to_owned(), source }),
        _ => Ok(()),
    }
}
