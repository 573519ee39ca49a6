//! Whom rules mean: each selector and each block once for the whole cluster, and of the selectors that sets of this node use, the
//! identities they select.
//!
//! What is kept is the difference to *nobody*, a pod without labels in no namespace: a selector of everything, or one by `NotIn`, that selects nobody as
//! well keeps those that it does not select. So a set is put together from lists that are there, at the cost of what it says, and a new
//! identity asks each selector once, however many sets use it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::id_map::NumberMap;
use super::ids::{Counter, Identity, PeerId, SetId};
use super::namespace_labels::labels_of;
use super::peer_match::{Match, Namespaces, Pods, holds, within};
use super::pod_class::Classes;
use crate::objects::{IpBlock, Labels};

#[derive(Debug)]
struct Peer {
    what: Arc<Match>,
    /// Rules that name it.
    rules: usize,
    /// Sets that use it.
    users: BTreeSet<SetId>,
    /// Selects nobody.
    inverted: bool,
    /// While it has users: identities of pods for which its answer is not the one for nobody, sorted.
    odd: Vec<Identity>,
}

/// A pod as selectors see it.
#[derive(Clone, Copy)]
pub(super) struct Who<'a> {
    pub(super) namespace: &'a Arc<str>,
    /// The namespace's labels.
    pub(super) space: &'a Labels,
    pub(super) labels: &'a Labels,
}

#[derive(Debug)]
pub(super) struct Peers {
    ids: HashMap<Arc<Match>, PeerId>,
    peers: NumberMap<PeerId, Peer>,
    counter: Counter,
    /// Those with users: selectors of one namespace, selectors of namespaces, blocks.
    own: HashMap<Arc<str>, BTreeSet<PeerId>>,
    selected: BTreeSet<PeerId>,
    blocks: BTreeSet<PeerId>,
    /// How many times a selector has been asked.
    pub(super) asked: u64,
}

fn selects(pods: &Pods, who: Who<'_>) -> bool {
    let there = match &pods.namespaces {
        Namespaces::Own(own) => own == who.namespace,
        Namespaces::Selected(selector) => selector.matches(who.space),
    };
    there && pods.pods.matches(who.labels)
}

fn selects_nobody(what: &Match) -> bool {
    let none = Labels::default();
    match what {
        Match::Pods(Pods { namespaces: Namespaces::Selected(namespaces), pods }) => {
            namespaces.matches(&none) && pods.matches(&none)
        }
        Match::Pods(_) | Match::Block(_) => false,
    }
}

impl Peers {
    pub(super) fn new() -> Self {
        Self {
            ids: HashMap::new(),
            peers: NumberMap::default(),
            counter: Counter::new(0, u32::MAX),
            own: HashMap::new(),
            selected: BTreeSet::new(),
            blocks: BTreeSet::new(),
            asked: 0,
        }
    }

    /// The number of a peer that one more rule names.
    pub(super) fn enlist(&mut self, what: Match) -> PeerId {
        if let Some(id) = self.ids.get(&what)
            && let Some(peer) = self.peers.get_mut(id)
        {
            peer.rules += 1;
            return *id;
        }
        let id = PeerId(self.counter.next(|n| self.peers.contains_key(&PeerId(n))));
        let what = Arc::new(what);
        let inverted = selects_nobody(&what);
        self.ids.insert(Arc::clone(&what), id);
        self.peers.insert(id, Peer { what, rules: 1, users: BTreeSet::new(), inverted, odd: Vec::new() });
        id
    }

    /// One rule less names it.
    pub(super) fn release(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.rules -= 1;
        }
        self.prune(id);
    }

    fn prune(&mut self, id: PeerId) {
        if self.peers.get(&id).is_some_and(|peer| peer.rules == 0 && peer.users.is_empty())
            && let Some(peer) = self.peers.remove(&id)
        {
            self.ids.remove(&peer.what);
        }
    }

    #[expect(clippy::expect_used, reason = "peers are named by those who hold them; a dead one is a defect here")]
    fn peer(&self, id: PeerId) -> &Peer {
        self.peers.get(&id).expect("the peer exists")
    }

    pub(super) fn get(&self, id: PeerId) -> &Match {
        &self.peer(id).what
    }

    /// Whether it selects nobody.
    pub(super) fn inverted(&self, id: PeerId) -> bool {
        self.peer(id).inverted
    }

    /// Of a peer in use: the identities of pods for which its answer is not the one for nobody, sorted.
    pub(super) fn odd(&self, id: PeerId) -> &[Identity] {
        &self.peer(id).odd
    }

    pub(super) fn users(&self, id: PeerId) -> &BTreeSet<SetId> {
        &self.peer(id).users
    }

    /// Whether its answer about a pod is not the one about nobody.
    pub(super) fn deviates(&self, id: PeerId, who: Who<'_>) -> bool {
        let peer = self.peer(id);
        matches!(&*peer.what, Match::Pods(pods) if selects(pods, who) != peer.inverted)
    }

    /// A set comes to use it.
    pub(super) fn employ(&mut self, id: PeerId, set: SetId, classes: &Classes, spaces: &HashMap<Arc<str>, Labels>) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let first = peer.users.is_empty();
        peer.users.insert(set);
        if !first {
            return;
        }
        let what = Arc::clone(&peer.what);
        let Match::Pods(pods) = &*what else {
            self.blocks.insert(id);
            return;
        };
        let inverted = peer.inverted;
        let mut odd = Vec::new();
        let mut ask = |namespace: &Arc<str>, there: bool| {
            // Who is not there is not selected, whatever the labels.
            if !there && !inverted {
                return;
            }
            for class in classes.members_of(namespace) {
                if (there && pods.pods.matches(&class.like.labels)) != inverted {
                    odd.extend(class.identities.iter().map(|(identity, _)| *identity));
                }
                self.asked += u64::from(there);
            }
        };
        match &pods.namespaces {
            Namespaces::Own(own) => {
                ask(own, true);
                self.own.entry(Arc::clone(own)).or_default().insert(id);
            }
            Namespaces::Selected(selector) => {
                for namespace in classes.namespaces() {
                    ask(namespace, selector.matches(&labels_of(spaces, namespace)));
                }
                self.asked += classes.namespaces().len() as u64;
                self.selected.insert(id);
            }
        }
        odd.sort_unstable();
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.odd = odd;
        }
    }

    /// A set uses it no more.
    pub(super) fn dismiss(&mut self, id: PeerId, set: SetId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.users.remove(&set);
        if !peer.users.is_empty() {
            return;
        }
        peer.odd = Vec::new();
        match &*peer.what {
            Match::Pods(Pods { namespaces: Namespaces::Own(own), .. }) => {
                if let Some(all) = self.own.get_mut(own) {
                    all.remove(&id);
                    if all.is_empty() {
                        self.own.remove(own);
                    }
                }
            }
            Match::Pods(_) => {
                self.selected.remove(&id);
            }
            Match::Block(_) => {
                self.blocks.remove(&id);
            }
        }
        self.prune(id);
    }

    /// Selectors in use that can select pods of a namespace.
    fn about(&self, namespace: &Arc<str>) -> impl Iterator<Item = PeerId> {
        self.own.get(namespace).into_iter().flatten().chain(&self.selected).copied()
    }

    /// Those whose answer about a pod is not the one about nobody, sorted.
    pub(super) fn deviating(&mut self, who: Who<'_>) -> Vec<PeerId> {
        let mut found = Vec::new();
        let mut asked = 0;
        for id in self.about(who.namespace) {
            asked += 1;
            if self.deviates(id, who) {
                found.push(id);
            }
        }
        self.asked += asked;
        found.sort_unstable();
        found
    }

    /// Takes in a new identity: as [`Peers::deviating`].
    pub(super) fn meet(&mut self, identity: Identity, who: Who<'_>) -> Vec<PeerId> {
        let found = self.deviating(who);
        for id in &found {
            self.turn(*id, identity);
        }
        found
    }

    /// Its answer about an identity is the opposite of what it was.
    pub(super) fn turn(&mut self, id: PeerId, identity: Identity) {
        if let Some(peer) = self.peers.get_mut(&id) {
            match peer.odd.binary_search(&identity) {
                Ok(at) => drop(peer.odd.remove(at)),
                Err(at) => peer.odd.insert(at, identity),
            }
        }
    }

    /// An identity of a pod is gone.
    pub(super) fn forget(&mut self, identity: Identity, namespace: &Arc<str>) {
        let about: Vec<PeerId> = self.about(namespace).collect();
        for id in about {
            if self.odd(id).binary_search(&identity).is_ok() {
                self.turn(id, identity);
            }
        }
    }

    /// Selectors in use whose answer about a namespace changes with its labels.
    pub(super) fn turned(&mut self, old: &Labels, new: &Labels) -> Vec<(PeerId, Arc<Match>)> {
        self.asked += 2 * self.selected.len() as u64;
        let other = |id: &PeerId| {
            let Match::Pods(Pods { namespaces: Namespaces::Selected(s), .. }) = self.get(*id) else { return false };
            s.matches(old) != s.matches(new)
        };
        self.selected.iter().copied().filter(other).map(|id| (id, Arc::clone(&self.peer(id).what))).collect()
    }

    /// Blocks in use that hold a cell, given its block, or, if it is not about `pods`, have it in one of their holes: the default for the rest of
    /// the world may be that of a block around everything.
    pub(super) fn around(&self, net: IpNetwork, pods: bool) -> impl Iterator<Item = PeerId> {
        let concerned = move |block: &IpBlock| if pods { holds(block, net) } else { within(net, block.cidr) };
        let all = self.blocks.iter().copied();
        all.filter(move |id| matches!(self.get(*id), Match::Block(block) if concerned(block)))
    }
}
