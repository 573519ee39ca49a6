//! A small cluster that can be changed at random, and a datapath that runs plans one operation at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use terway_core::objects::{
    AddressType, Applied, Change, Endpoint, EndpointPort, EndpointSlice, Object, ObjectKey, ObjectMeta, ObjectName,
    Objects, Pod, Protocol, Service, ServicePort,
};
use terway_core::service::{MapContents, NodeFacts, Op, Plan, Planner, Settings};

use crate::oracle::{self, Everything, Expected};

/// This node's name.
pub(crate) const ME: &str = "me";

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn facts() -> NodeFacts {
    NodeFacts { name: ME.into(), zone: Some("z1".into()) }
}

pub(crate) fn meta(name: &str) -> ObjectMeta {
    ObjectMeta { object: ObjectName::new("ns", name), ..ObjectMeta::default() }
}

pub(crate) fn service(name: &str, vip: &str, ports: &[(&str, u16, Protocol)]) -> Service {
    let port = |(name, port, protocol): &(&str, u16, Protocol)| ServicePort {
        name: (*name).into(),
        protocol: *protocol,
        port: *port,
        target_port: None,
        node_port: 0,
    };
    Service {
        meta: meta(name),
        cluster_ips: vec![ip(vip)],
        ports: ports.iter().map(port).collect(),
        ..Service::default()
    }
}

pub(crate) fn endpoint(address: &str, node: &str) -> Endpoint {
    Endpoint {
        address: Some(ip(address)),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(node.into()),
        zone: None,
        hints: None,
        target: None,
    }
}

pub(crate) fn slice(
    name: &str,
    service: &str,
    ports: &[(&str, u16, Protocol)],
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let v6 = endpoints.iter().any(|e| e.address.is_some_and(|a| a.is_ipv6()));
    let port = |(name, port, protocol): &(&str, u16, Protocol)| EndpointPort {
        name: (*name).into(),
        protocol: *protocol,
        port: Some(*port),
        app_protocol: None,
    };
    let mut meta = meta(name);
    meta.labels = [("kubernetes.io/service-name", service)].into_iter().collect();
    EndpointSlice {
        meta,
        address_type: if v6 { AddressType::IPv6 } else { AddressType::IPv4 },
        endpoints: endpoints.into(),
        ports: ports.iter().map(port).collect(),
    }
}

pub(crate) fn pod(name: &str, address: &str) -> Pod {
    Pod { meta: meta(name), node: Some(ME.into()), ips: Box::new([ip(address)]), ..Pod::default() }
}

/// Objects, planner and datapath together.
pub(crate) struct World {
    pub(crate) objects: Objects,
    pub(crate) facts: NodeFacts,
    pub(crate) settings: Settings,
    pub(crate) planner: Planner,
    pub(crate) kernel: MapContents,
    pub(crate) health: BTreeMap<u16, u32>,
    /// What plans said is wrong, taken together.
    pub(crate) problems: BTreeMap<ObjectKey, BTreeSet<String>>,
    /// What plans left for later.
    pub(crate) pending: Vec<Op>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(Settings { maglev_size: 251, ..Settings::default() })
    }

    pub(crate) fn with(settings: Settings) -> Self {
        let mut planner = Planner::new(facts(), settings.clone());
        assert!(planner.sync(&Objects::default()).is_empty());
        Self {
            objects: Objects::default(),
            facts: facts(),
            settings,
            planner,
            kernel: MapContents::default(),
            health: BTreeMap::new(),
            problems: BTreeMap::new(),
            pending: Vec::new(),
        }
    }

    /// Changes objects, plans, runs the plan and what was left for later, with all checks.
    pub(crate) fn change(&mut self, changes: impl IntoIterator<Item = Change>) -> Plan {
        let plan = self.begin(changes);
        self.settle();
        plan
    }

    /// As [`Self::change`], but what is for later stays for later.
    pub(crate) fn begin(&mut self, changes: impl IntoIterator<Item = Change>) -> Plan {
        let applied: Vec<Applied> = changes.into_iter().filter_map(|c| self.objects.apply(c)).collect();
        let plan = self.planner.update(&self.objects, &applied);
        self.run(&plan);
        plan
    }

    pub(crate) fn put(&mut self, object: impl Into<Thing>) -> Plan {
        self.change([Change::Upsert(Box::new(object.into().0))])
    }

    /// RangeAllocator a plan; after each operation every frontend leads to its old or its new backends, and nothing dangles.
    pub(crate) fn run(&mut self, plan: &Plan) {
        let before = oracle::seen(&self.kernel);
        let after = oracle::seen(&{
            let mut end = self.kernel.clone();
            plan.ops.iter().for_each(|op| end.apply(op));
            end
        });
        let kernel = &mut self.kernel;
        self.planner.execute(plan, &mut |batch| {
            for op in batch {
                kernel.apply(op);
                check_step(op, &before, &oracle::seen(kernel), &after);
            }
            Vec::new()
        });
        self.take_in(plan);
    }

    /// What a plan reports besides operations, and its operations for later.
    pub(crate) fn take_in(&mut self, plan: &Plan) {
        self.pending.extend(plan.retire.iter().cloned());
        for (object, messages) in &plan.object_errors {
            match messages.is_empty() {
                true => drop(self.problems.remove(object)),
                false => drop(self.problems.insert(object.clone(), messages.clone())),
            }
        }
        for (port, state) in &plan.health {
            match state {
                Some((_, count)) => drop(self.health.insert(*port, *count)),
                None => drop(self.health.remove(port)),
            }
        }
    }

    /// A second has passed: readers that started before the last operation are through, and what they could have followed may go.
    pub(crate) fn settle(&mut self) {
        let before = oracle::seen(&self.kernel);
        let pending = std::mem::take(&mut self.pending);
        let kernel = &mut self.kernel;
        self.planner.execute_retired(&pending, &mut |batch| {
            for op in batch {
                kernel.apply(op);
                let fits = matches!(op, Op::RemoveBackend(..) | Op::RemoveTable(_) | Op::ReleasePort(_));
                assert!(fits, "{op:?} is not for later");
                assert_eq!(oracle::seen(kernel), before, "{op:?} changed what clients get");
            }
            Vec::new()
        });
    }

    pub(crate) fn expected(&self) -> Everything {
        oracle::expected(&self.objects, &self.facts, &self.settings)
    }

    /// Clients get what the oracle says.
    pub(crate) fn check_frontends(&self) {
        let expected = self.expected();
        let mut seen = oracle::seen(&self.kernel);
        let mut wanted = expected.frontends;
        for e in seen.values_mut().chain(wanted.values_mut()) {
            if let Some(ranges) = &mut e.ranges {
                ranges.sort();
                ranges.dedup();
            }
        }
        assert_eq!(seen, wanted);
        assert_eq!(self.problems, expected.problems);
        assert_eq!(self.planner.object_errors(), expected.problems);
    }

    /// The maps say what the oracle says, and the planner knows what they hold. Nothing may be left for later.
    pub(crate) fn check(&self) {
        self.check_frontends();
        let expected = self.expected();
        let backends: BTreeMap<_, _> = self.kernel.backends.values().map(|b| (b.key, (b.state, b.local))).collect();
        assert_eq!(backends, expected.backends);
        assert_eq!(backends.len(), self.kernel.backends.len(), "a backend stands there twice");
        assert_eq!(self.health, expected.health);
        let health: BTreeMap<u16, u32> = self.planner.health().into_iter().map(|(port, (_, n))| (port, n)).collect();
        assert_eq!(health, expected.health);
        assert_eq!(self.kernel, self.planner.map_contents());
        let used: BTreeSet<_> = self
            .kernel
            .frontends
            .values()
            .flat_map(|f| [f.internal, f.external])
            .filter_map(|s| match s {
                terway_core::service::Selection::Table(id) => Some(id),
                _ => None,
            })
            .collect();
        assert!(used.len() == self.kernel.tables.len() || self.has_conflicts(), "tables leak");
    }

    /// Whether two ports claim the same frontend, so that what the loser holds is seen in no map.
    pub(crate) fn has_conflicts(&self) -> bool {
        let mut keys: Vec<_> =
            self.planner.views().flat_map(|v| v.frontends).filter(|k| k.protocol.is_some()).collect();
        let all = keys.len();
        keys.sort();
        keys.dedup();
        keys.len() < all
    }
}

pub(crate) fn check_step(
    op: &Op,
    before: &BTreeMap<FrontendKeyOf, Expected>,
    now: &BTreeMap<FrontendKeyOf, Expected>,
    after: &BTreeMap<FrontendKeyOf, Expected>,
) {
    let keys: BTreeSet<_> = before.keys().chain(now.keys()).chain(after.keys()).collect();
    for key in keys {
        let (old, current, new) = (before.get(key), now.get(key), after.get(key));
        let ok = similar(current, old) || similar(current, new);
        assert!(ok, "after {op:?}: {key} leads to {current:?}, which is neither {old:?} nor {new:?}");
    }
}

pub(crate) type FrontendKeyOf = terway_core::service::FrontendKey;

/// Equal up to source ranges, which change one by one.
pub(crate) fn similar(a: Option<&Expected>, b: Option<&Expected>) -> bool {
    let strip = |e: &Expected| Expected { ranges: e.ranges.as_ref().map(|_| Vec::new()), ..e.clone() };
    a.map(strip) == b.map(strip)
}

/// An object, made from any of the kinds.
pub(crate) struct Thing(Object);

macro_rules! things {
    ($($kind:ident),*) => { $(
        impl From<$kind> for Thing {
            fn from(it: $kind) -> Self {
                Self(Object::$kind(it))
            }
        }
    )* };
}
things!(Service, EndpointSlice, Pod);

impl From<terway_core::objects::Node> for Thing {
    fn from(it: terway_core::objects::Node) -> Self {
        Self(Object::Node(it))
    }
}

pub(crate) fn names(list: &[&str]) -> Box<[Arc<str>]> {
    list.iter().map(|n| Arc::from(*n)).collect()
}
