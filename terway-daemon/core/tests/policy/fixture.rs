//! One node with its pods, driven by the JSON that the API server would send.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use terway_core::ident::{Addresses, PodRef};
use terway_core::objects::{Kind, Object, ObjectName, Objects};
use terway_core::policy::{Compiler, Event, Maps, Op, Packet};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SCTP: u8 = 132;
pub(crate) const ICMP: u8 = 1;

pub(crate) struct Node {
    objects: Objects,
    pub(crate) compiler: Compiler,
    pub(crate) maps: Maps,
    slots: BTreeMap<IpAddr, u32>,
    /// Operations that fail.
    pub(crate) fails: fn(&Op) -> bool,
}

pub(crate) fn name(full: &str) -> ObjectName {
    let (namespace, name) = full.split_once('/').unwrap();
    ObjectName::new(namespace, name)
}

/// The addresses of a pod, by the number in its name: `x/a1` has 10.0.0.1 and fd00::1.
pub(crate) fn ip(full: &str) -> IpAddr {
    full.parse().unwrap_or_else(|_| {
        let digits: String = full.chars().filter(char::is_ascii_digit).collect();
        format!("10.0.0.{digits}").parse().unwrap()
    })
}

fn six(full: &str) -> IpAddr {
    let digits: String = full.chars().filter(char::is_ascii_digit).collect();
    format!("fd00::{digits}").parse().unwrap()
}

fn apply(maps: &mut Maps, fails: fn(&Op) -> bool, op: &Op) -> Result<(), String> {
    if fails(op) {
        return Err("no room".to_owned());
    }
    maps.apply(op);
    Ok(())
}

impl Node {
    pub(crate) fn new() -> Self {
        let (compiler, ops) = Compiler::new();
        let mut node = Self {
            objects: Objects::default(),
            compiler,
            maps: Maps::default(),
            slots: BTreeMap::new(),
            fails: |_| false,
        };
        ops.iter().for_each(|op| node.maps.apply(op));
        node.step(Event::NodeAddresses(vec!["10.0.0.100".parse().unwrap()]));
        node
    }

    pub(crate) fn step(&mut self, event: Event) -> Vec<Op> {
        let ops = self.compiler.step(event);
        self.execute(ops.clone());
        ops
    }

    fn execute(&mut self, ops: Vec<Op>) {
        let (maps, fails) = (&mut self.maps, self.fails);
        self.compiler.execute(ops, &mut |op| apply(maps, fails, op)).unwrap();
    }

    /// Writes again what failed.
    pub(crate) fn retry(&mut self) {
        let (maps, fails) = (&mut self.maps, self.fails);
        self.compiler.retry(&mut |op| apply(maps, fails, op)).unwrap();
    }

    pub(crate) fn object(&mut self, kind: Kind, document: &Value) -> Vec<Op> {
        let object = Object::read(kind, document).unwrap();
        let applied = self.objects.apply(terway_core::objects::Change::Upsert(Box::new(object)));
        applied.and_then(Event::from_applied).map_or_else(Vec::new, |event| self.step(event))
    }

    pub(crate) fn delete(&mut self, kind: Kind, full: &str) -> Vec<Op> {
        let key = terway_core::objects::ObjectKey { kind, name: name(full) };
        let applied = self.objects.apply(terway_core::objects::Change::Delete(key));
        applied.and_then(Event::from_applied).map_or_else(Vec::new, |event| self.step(event))
    }

    pub(crate) fn namespace(&mut self, name: &str, labels: Value) -> Vec<Op> {
        self.object(Kind::Namespace, &json!({"metadata": {"name": name, "labels": labels}}))
    }

    /// The object of a pod with both addresses.
    pub(crate) fn pod(&mut self, full: &str, labels: Value) -> Vec<Op> {
        self.pod_with(full, labels, json!({}), json!({"phase": "Running"}))
    }

    pub(crate) fn pod_with(&mut self, full: &str, labels: Value, spec: Value, mut status: Value) -> Vec<Op> {
        if status.get("podIPs").is_none() {
            status["podIPs"] = json!([{"ip": ip(full)}, {"ip": six(full)}]);
        }
        let name = name(full);
        let meta = json!({"namespace": &*name.namespace, "name": &*name.name, "labels": labels, "uid": full});
        self.object(Kind::Pod, &json!({"metadata": meta, "spec": spec, "status": status}))
    }

    /// The pod's interface on this node; its slot is the number in its name.
    pub(crate) fn attach(&mut self, full: &str, uid: &str) -> Vec<Op> {
        let (IpAddr::V4(v4), IpAddr::V6(v6)) = (ip(full), six(full)) else { unreachable!("as made above") };
        let slot = u32::from(v4.octets()[3]);
        let pod = name(full);
        let pod = PodRef { namespace: pod.namespace.to_string(), name: pod.name.to_string(), uid: uid.to_owned() };
        let ops = self.step(Event::Attach { slot, pod, addresses: Addresses { v4: Some(v4), v6: Some(v6) } });
        self.slots.extend([(v4.into(), slot), (v6.into(), slot)]);
        ops
    }

    /// A pod of this node.
    pub(crate) fn local(&mut self, full: &str, labels: Value) {
        self.pod(full, labels);
        self.attach(full, full);
    }

    pub(crate) fn policy(&mut self, full: &str, spec: Value) -> Vec<Op> {
        let name = name(full);
        let meta = json!({"namespace": &*name.namespace, "name": &*name.name});
        self.object(Kind::NetworkPolicy, &json!({"metadata": meta, "spec": spec}))
    }

    pub(crate) fn cluster(&mut self, name: &str, spec: Value) -> Vec<Op> {
        self.object(Kind::ClusterNetworkPolicy, &json!({"metadata": {"name": name}, "spec": spec}))
    }

    pub(crate) fn passes(&self, source: IpAddr, destination: IpAddr, protocol: u8, port: u16) -> bool {
        let packet = Packet { source, destination, protocol, port };
        self.maps.passes(&packet, &|address| self.slots.get(&address).copied())
    }

    /// Whether TCP to a port passes; ends are pods by name, or addresses.
    pub(crate) fn tcp(&self, from: &str, to: &str, port: u16) -> bool {
        self.passes(ip(from), ip(to), TCP, port)
    }

    /// The same by IPv6.
    pub(crate) fn tcp6(&self, from: &str, to: &str, port: u16) -> bool {
        self.passes(six(from), six(to), TCP, port)
    }
}
