//! The address space cut by every block and hole in use. A cell is what belongs to one block and to none of the blocks inside it, so the
//! cell of an address says which blocks hold it. Blocks nest or are disjoint; the longest one wins, as in the kernel's LPM trie.

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
    /// Policies that name it, once for each time; the two whole families have one for ever.
    users: u32,
}

/// What is known of a cell.
#[derive(Debug)]
pub(super) struct CidrRegion {
    /// The block it belongs to.
    pub(super) net: IpNetwork,
    /// The identity of its addresses that are nobody's.
    pub(super) world: Identity,
    /// Addresses in it that have an identity of their own.
    pub(super) members: usize,
    /// The identities of pods in it.
    pods: BTreeSet<Identity>,
}

#[derive(Debug)]
pub(super) struct CidrRegions {
    blocks: BTreeMap<IpNetwork, Block>,
    /// How many blocks have a prefix of each length, by family.
    lengths: [BTreeMap<u8, usize>; 2],
    cells: NumberMap<RegionId, CidrRegion>,
    /// CidrRegions with pods.
    populated: BTreeSet<RegionId>,
    counter: Counter,
}

/// The whole of a family.
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
    /// The two families, each one cell, with the identities of their addresses.
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

    /// A new cell without a block; its world identity is to be set.
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

    /// CidrRegions with pods, and the identities of these.
    pub(super) fn populated(&self) -> impl Iterator<Item = (RegionId, &CidrRegion, &BTreeSet<Identity>)> {
        self.populated.iter().map(|id| (*id, self.get(*id))).map(|(id, cell)| (id, cell, &cell.pods))
    }

    /// An identity of pods in a cell has come to be.
    pub(super) fn settle_in(&mut self, cell: RegionId, identity: Identity) {
        self.get_mut(cell).pods.insert(identity);
        self.populated.insert(cell);
    }

    /// An identity of pods in a cell is gone.
    pub(super) fn move_out(&mut self, cell: RegionId, identity: Identity) {
        let pods = &mut self.get_mut(cell).pods;
        pods.remove(&identity);
        if pods.is_empty() {
            self.populated.remove(&cell);
        }
    }

    /// The cells of a block, whether it is in use or not, and of all blocks in it.
    pub(super) fn within(&self, net: IpNetwork) -> impl Iterator<Item = &CidrRegion> {
        let last = IpNetwork::from(net.broadcast());
        let inner = self.blocks.range(net.truncated()..=last).map(|(_, block)| self.get(block.cell));
        inner.filter(move |cell| within(cell.net, net))
    }

    /// Blocks with the identity of their addresses that are nobody's.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (IpNetwork, Identity)> {
        self.blocks.iter().map(|(net, block)| (*net, self.get(block.cell).world))
    }

    /// The cell with most members: what holds there holds for most pods.
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

    /// The cell of an address.
    pub(super) fn of(&self, address: IpAddr) -> RegionId {
        self.cell_of_block(self.longest(host(address), false))
    }

    /// One user more; whether the block is new and must be [`CidrRegions::insert`]ed.
    pub(super) fn enlist(&mut self, net: IpNetwork) -> bool {
        match self.blocks.get_mut(&net) {
            Some(block) => {
                block.users += 1;
                false
            }
            None => true,
        }
    }

    /// One user less; whether that was the last.
    pub(super) fn release(&mut self, net: IpNetwork) -> bool {
        self.blocks.get_mut(&net).is_some_and(|block| {
            block.users = block.users.saturating_sub(1);
            block.users == 0
        })
    }

    /// Whether nobody uses the block.
    pub(super) fn unused(&self, net: IpNetwork) -> bool {
        self.blocks.get(&net).is_some_and(|block| block.users == 0)
    }

    /// A new block with one user.
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
