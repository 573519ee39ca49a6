//! Ports of fragmented packets: stored from the first fragment, looked up for the later ones.

use terway_abi::{Drop, FragmentKey, FragmentValue};

use super::counters::jiffies;
use super::maps::DatapathFamily;
use crate::parse::{Fragment, Packet};

/// Stores the ports of a first fragment, or sets the ports of a later one.
///
/// # Errors
/// [`Drop::UnknownFragment`]: the first fragment was not seen at this hook.
#[inline(always)]
pub(super) fn resolve_ports<F: DatapathFamily>(packet: &mut Packet<F>, (ifindex, hook): (u32, u8)) -> Result<(), Drop> {
    let key = FragmentKey {
        src: packet.src,
        dst: packet.dst,
        id: packet.fragment_id,
        ifindex,
        class: u32::from(packet.protocol) | u32::from(hook) << 8,
        spare: 0,
    };
    if packet.fragment == Fragment::First {
        let value = FragmentValue { ports: packet.ports, seen: jiffies() };
        // If the insertion fails, the later fragments are dropped with their own reason.
        let _result = F::fragments().insert(&key, &value, 0);
        return Ok(());
    }
    // SAFETY: copied at once; a value that is reused meanwhile gives other ports, and the flow of those ports decides.
    let value = unsafe { F::fragments().get(&key) }.ok_or(Drop::UnknownFragment)?;
    packet.ports = value.ports;
    Ok(())
}
