//! CIDR regions: the address space cut by every CIDR and exception in use. A region is what belongs to one CIDR and to none of the CIDRs inside it, so
//! the region of an address says which CIDRs contain it. CIDRs nest or are disjoint; the longest prefix wins, as in the kernel's LPM trie.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::id_map::NumberMap;
use super::ids::{Counter, Identity, RegionId};
use super::peer_match::{host, within};
use crate::cidr::{self, Cidr as _};
use crate::ident::Family;

#[derive(Debug)]
struct Block {
    cell: RegionId,
    /// Number of references by policies; the two whole families always have one.
    users: u32,
}

/// A CIDR region.
#[derive(Debug)]
pub(super) struct CidrRegion {
    /// The CIDR it belongs to.
    pub(super) net: IpNetwork,
    /// The identity of its addresses that belong to no pod and not to the node.
    pub(super) world: Identity,
    /// Addresses in it that have an identity of their own.
    pub(super) members: usize,
    /// The identities of pods in it.
    pods: BTreeSet<Identity>,
}

#[derive(Debug)]
pub(super) struct CidrRegions {
    blocks: BTreeMap<IpNetwork, Block>,
    /// Number of CIDRs with each prefix length, by family.
    lengths: [BTreeMap<u8, usize>; 2],
    cells: NumberMap<RegionId, CidrRegion>,
    /// Regions with pods.
    populated: BTreeSet<RegionId>,
    counter: Counter,
}

/// The CIDR of all addresses of a family.
pub(super) fn whole(family: Family) -> IpNetwork {
    match family {
        Family::V4 => IpNetwork::V4(cidr::ALL_V4),
        Family::V6 => IpNetwork::V6(cidr::ALL_V6),
    }
}

pub(super) const fn family(net: &IpNetwork) -> Family {
    match net {
        IpNetwork::V4(_) => Family::V4,
        IpNetwork::V6(_) => Family::V6,
    }
}

impl CidrRegions {
    /// One region for each family, with the identities of their addresses.
    pub(super) fn new(mut world: impl FnMut(Family, RegionId) -> Identity) -> Self {
        let mut cells = Self {
            blocks: BTreeMap::new(),
            lengths: Default::default(),
            cells: NumberMap::default(),
            populated: BTreeSet::new(),
            counter: Counter::new(0, u32::MAX),
        };
        for family in [Family::V4, Family::V6] {
            let cell = cells.fresh(whole(family));
            cells.get_mut(cell).world = world(family, cell);
            cells.insert(whole(family), cell);
        }
        cells
    }

    /// A new region without a CIDR; its world identity is to be set.
    pub(super) fn fresh(&mut self, net: IpNetwork) -> RegionId {
        let number = RegionId(self.counter.next(|n| self.cells.contains_key(&RegionId(n))));
        self.cells.insert(number, CidrRegion { net, world: Identity::NONE, members: 0, pods: BTreeSet::new() });
        number
    }

    #[expect(clippy::expect_used, reason = "cells are named by those who hold them; a dead one is a defect here")]
    pub(super) fn get(&self, cell: RegionId) -> &CidrRegion {
        self.cells.get(&cell).expect("the cell exists")
    }

    #[expect(clippy::expect_used, reason = "as for `get`")]
    pub(super) fn get_mut(&mut self, cell: RegionId) -> &mut CidrRegion {
        self.cells.get_mut(&cell).expect("the cell exists")
    }

    pub(super) fn drop_cell(&mut self, cell: RegionId) {
        self.cells.remove(&cell);
    }

    /// Regions with pods, and the identities of these.
    pub(super) fn populated(&self) -> impl Iterator<Item = (RegionId, &CidrRegion, &BTreeSet<Identity>)> {
        self.populated.iter().map(|id| (*id, self.get(*id))).map(|(id, cell)| (id, cell, &cell.pods))
    }

    /// Adds an identity of pods in a region.
    pub(super) fn settle_in(&mut self, cell: RegionId, identity: Identity) {
        self.get_mut(cell).pods.insert(identity);
        self.populated.insert(cell);
    }

    /// Removes an identity of pods in a region.
    pub(super) fn move_out(&mut self, cell: RegionId, identity: Identity) {
        let pods = &mut self.get_mut(cell).pods;
        pods.remove(&identity);
        if pods.is_empty() {
            self.populated.remove(&cell);
        }
    }

    /// The regions of a CIDR, whether it is in use or not, and of all CIDRs in it.
    pub(super) fn within(&self, net: IpNetwork) -> impl Iterator<Item = &CidrRegion> {
        let last = IpNetwork::from(net.broadcast());
        let inner = self.blocks.range(net.truncated()..=last).map(|(_, block)| self.get(block.cell));
        inner.filter(move |cell| within(cell.net, net))
    }

    /// CIDRs with the identity of their addresses that belong to no pod and not to the node.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (IpNetwork, Identity)> {
        self.blocks.iter().map(|(net, block)| (*net, self.get(block.cell).world))
    }

    /// The region with most pod addresses.
    pub(super) fn home(&self, of: Family) -> RegionId {
        let populated = self.populated().filter(|(_, cell, _)| family(&cell.net) == of);
        let most = populated.max_by_key(|(id, cell, _)| (cell.members, std::cmp::Reverse(*id)));
        most.map_or_else(|| self.cell_of_block(whole(of)), |(id, ..)| id)
    }

    /// The longest block that holds `net` and, if `strictly`, is not `net` itself.
    pub(super) fn longest(&self, net: IpNetwork, strictly: bool) -> IpNetwork {
        let family = family(&net);
        for (length, _) in self.lengths[family as usize].range(..=net.prefix()).rev() {
            if strictly && *length == net.prefix() {
                continue;
            }
            if let Ok(block) = IpNetwork::new(net.network(), *length)
                && let block = block.truncated()
                && self.blocks.contains_key(&block)
            {
                return block;
            }
        }
        whole(family)
    }

    #[expect(clippy::expect_used, reason = "`longest` returns blocks that are there; the whole families never go")]
    pub(super) fn cell_of_block(&self, net: IpNetwork) -> RegionId {
        self.blocks.get(&net).expect("the block exists").cell
    }

    pub(super) fn set_cell(&mut self, net: IpNetwork, cell: RegionId) {
        if let Some(block) = self.blocks.get_mut(&net) {
            block.cell = cell;
        }
        self.get_mut(cell).net = net;
    }

    /// The region of an address.
    pub(super) fn of(&self, address: IpAddr) -> RegionId {
        self.cell_of_block(self.longest(host(address), false))
    }

    /// Adds a reference; true if the CIDR is new and must be inserted with [`CidrRegions::insert`].
    pub(super) fn enlist(&mut self, net: IpNetwork) -> bool {
        match self.blocks.get_mut(&net) {
            Some(block) => {
                block.users += 1;
                false
            }
            None => true,
        }
    }

    /// Removes a reference; true if that was the last.
    pub(super) fn release(&mut self, net: IpNetwork) -> bool {
        self.blocks.get_mut(&net).is_some_and(|block| {
            block.users = block.users.saturating_sub(1);
            block.users == 0
        })
    }

    /// Whether the CIDR has no references.
    pub(super) fn unused(&self, net: IpNetwork) -> bool {
        self.blocks.get(&net).is_some_and(|block| block.users == 0)
    }

    /// Inserts a CIDR with one reference.
    pub(super) fn insert(&mut self, net: IpNetwork, cell: RegionId) {
        *self.lengths[family(&net) as usize].entry(net.prefix()).or_default() += 1;
        self.blocks.insert(net, Block { cell, users: 1 });
        self.get_mut(cell).net = net;
    }

    pub(super) fn remove(&mut self, net: IpNetwork) {
        if self.blocks.remove(&net).is_some() {
            let lengths = &mut self.lengths[family(&net) as usize];
            if let Some(count) = lengths.get_mut(&net.prefix()) {
                *count -= 1;
                if *count == 0 {
                    lengths.remove(&net.prefix());
                }
            }
        }
    }
}
