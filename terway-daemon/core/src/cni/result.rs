//! The result of an ADD: one model, that of 1.1.0, read from and written as any version.
//!
//! Differences between versions (containernetworking/cni, tags spec-v0.3.0 to spec-v1.1.0, "Result"):
//!
//! | version | ips | interfaces | routes |
//! | --- | --- | --- | --- |
//! | 0.3.0, 0.3.1, 0.4.0 | `version` "4" or "6" is required | name, mac, sandbox | dst, gw |
//! | 1.0.0 | no `version` | the same | the same |
//! | 1.1.0 | | and mtu, socketPath, pciID | and mtu, advmss, priority, table, scope |
//!
//! 0.2.0 and older, read only, have `ip4` and `ip6` instead of lists.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value, json};

use super::json::Object;
use super::version::Version;
use crate::cidr;
use crate::errors::{CNI_CONFIG, Error};
use crate::ident::Mac;

/// The result of an ADD, or a `prevResult`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CniResult {
    /// Interfaces, in the order that `IpConfig::interface` counts.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub ips: Vec<IpConfig>,
    /// Routes inside the pod.
    pub routes: Vec<Route>,
    /// Name service; runtimes of Kubernetes ignore it.
    pub dns: Dns,
}

/// A network interface, on the node or in the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC address as text; empty where it has none.
    pub mac: String,
    /// In bytes; 0 when unknown. From 1.1.0 on.
    pub mtu: u32,
    /// Netns path of an interface in a pod; empty for one of the node.
    pub sandbox: String,
    /// Path of a vhost-user socket, of other plugins. From 1.1.0 on.
    pub socket_path: String,
    /// PCI address, of other plugins. From 1.1.0 on.
    pub pci_id: String,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpConfig {
    /// Address and prefix length.
    pub address: IpNetwork,
    /// Next hop of the subnet.
    pub gateway: Option<IpAddr>,
    /// Index into `interfaces`.
    pub interface: Option<u32>,
}

/// A route inside the pod. The attributes exist from 1.1.0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub dst: IpNetwork,
    /// Next hop; `None` is a link route, or the plugin's default.
    pub gw: Option<IpAddr>,
    /// Bytes.
    pub mtu: Option<u32>,
    /// Bytes of TCP payload.
    pub advmss: Option<u32>,
    /// Lower goes first.
    pub priority: Option<u32>,
    /// Routing table.
    pub table: Option<u32>,
    /// As RT_SCOPE_… of the kernel.
    pub scope: Option<u32>,
}

/// Name service for the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of servers, preferred first.
    pub nameservers: Vec<String>,
    /// Local domain; empty for none.
    pub domain: String,
    /// Search domains, preferred first.
    pub search: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
}

/// What a network plugin set up, to be put into a result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// The node's end; `None` where the pod holds the NIC itself.
    pub host: Option<Interface>,
    /// The pod's end, with its sandbox.
    pub pod: Interface,
    /// Addresses of the pod's end; `interface` is filled in by [`CniResult::attach`].
    pub ips: Vec<IpConfig>,
    /// Routes inside the pod.
    pub routes: Vec<Route>,
}

impl CniResult {
    /// Adds what was set up. Behind other plugins in a chain, theirs stays in front and keeps its indices (specification
    /// 1.1.0, "ADD": a plugin passes `prevResult` through, changed or not).
    #[must_use]
    pub fn attach(mut self, attached: Attached, dns: Option<Dns>) -> Self {
        self.interfaces.extend(attached.host);
        let index = u32::try_from(self.interfaces.len()).ok();
        self.interfaces.push(attached.pod);
        self.ips.extend(attached.ips.into_iter().map(|ip| IpConfig { interface: index, ..ip }));
        self.routes.extend(attached.routes);
        if let Some(dns) = dns {
            self.dns = dns;
        }
        self
    }

    /// Addresses of the interface `ifname` inside a sandbox. An address without index counts: some plugins (the reference
    /// project's CNI among them) leave it out when there is one interface.
    pub fn addresses_of<'a>(&'a self, ifname: &'a str) -> impl Iterator<Item = IpNetwork> + 'a {
        let ours = move |ip: &&IpConfig| match ip.interface {
            None => true,
            Some(index) => self
                .interfaces
                .get(index as usize)
                .is_some_and(|interface| interface.name == ifname && !interface.sandbox.is_empty()),
        };
        self.ips.iter().filter(ours).map(|ip| ip.address)
    }

    /// Reads a `prevResult` of any version, told apart by its shape: runtimes convert late or not at all.
    ///
    /// # Errors
    /// `TW0004` (CNI code 7) naming the key that is malformed, or an index that points at no interface.
    pub fn read(document: &Map<String, Value>) -> Result<Self, Error> {
        let root = Object::root(document);
        let mut result = Self { dns: dns(&root)?.unwrap_or_default(), ..Self::default() };
        for object in root.objects("interfaces")? {
            result.interfaces.push(Interface {
                name: text(&object, "name")?,
                mac: text(&object, "mac")?,
                mtu: object.unsigned32("mtu")?.unwrap_or(0),
                sandbox: text(&object, "sandbox")?,
                socket_path: text(&object, "socketPath")?,
                pci_id: text(&object, "pciID")?,
            });
        }
        for object in root.objects("ips")? {
            result.ips.push(IpConfig {
                address: required_net(&object, "address")?,
                gateway: object.parsed("gateway", AN_ADDRESS)?,
                interface: object.unsigned32("interface")?,
            });
        }
        for object in root.objects("routes")? {
            result.routes.push(route(&object)?);
        }
        // 0.1.0 and 0.2.0: one address of each family, with its routes.
        for key in ["ip4", "ip6"] {
            let Some(object) = root.object(key)? else { continue };
            result.ips.push(IpConfig {
                address: required_net(&object, "ip")?,
                gateway: object.parsed("gateway", AN_ADDRESS)?,
                interface: None,
            });
            for inner in object.objects("routes")? {
                result.routes.push(route(&inner)?);
            }
        }
        let known = result.interfaces.len();
        match result.ips.iter().find(|ip| ip.interface.is_some_and(|index| index as usize >= known)) {
            Some(ip) => Err(Error::new(
                CNI_CONFIG,
                format!("prevResult gives {} to an interface that it does not list.", ip.address),
            )),
            None => Ok(result),
        }
    }

    /// Writes the result as `version` has it; what that version does not know is left out.
    #[must_use]
    pub fn document(&self, version: Version) -> Value {
        let mut document = Map::new();
        document.insert("cniVersion".into(), version.as_str().into());
        if !self.interfaces.is_empty() {
            let list: Vec<Value> = self.interfaces.iter().map(|interface| interface.document(version)).collect();
            document.insert("interfaces".into(), list.into());
        }
        let list: Vec<Value> = self.ips.iter().map(|ip| ip.document(version)).collect();
        document.insert("ips".into(), list.into());
        if !self.routes.is_empty() {
            let list: Vec<Value> = self.routes.iter().map(|route| route.document(version)).collect();
            document.insert("routes".into(), list.into());
        }
        if self.dns != Dns::default() {
            document.insert("dns".into(), self.dns.document());
        }
        document.into()
    }
}

impl Interface {
    fn document(&self, version: Version) -> Value {
        let mut document = Map::new();
        document.insert("name".into(), self.name.clone().into());
        put(&mut document, "mac", &self.mac);
        put(&mut document, "sandbox", &self.sandbox);
        if version >= Version::V1_1_0 {
            if self.mtu > 0 {
                document.insert("mtu".into(), self.mtu.into());
            }
            put(&mut document, "socketPath", &self.socket_path);
            put(&mut document, "pciID", &self.pci_id);
        }
        document.into()
    }

    /// An interface of the pod or, with an empty sandbox, of the node.
    #[must_use]
    pub fn new(name: &str, mac: Option<Mac>, mtu: u32, sandbox: &str) -> Self {
        let mac = mac.map(|mac| mac.to_string()).unwrap_or_default();
        Self { name: name.to_owned(), mac, mtu, sandbox: sandbox.to_owned(), ..Self::default() }
    }
}

impl IpConfig {
    fn document(&self, version: Version) -> Value {
        let mut document = Map::new();
        document.insert("address".into(), self.address.to_string().into());
        if let Some(gateway) = self.gateway {
            document.insert("gateway".into(), gateway.to_string().into());
        }
        if let Some(interface) = self.interface {
            document.insert("interface".into(), interface.into());
        }
        if version < Version::V1_0_0 {
            let family = if matches!(self.address, IpNetwork::V4(_)) { "4" } else { "6" };
            document.insert("version".into(), family.into());
        }
        document.into()
    }
}

impl Route {
    /// A plain route.
    #[must_use]
    pub const fn new(dst: IpNetwork, gw: Option<IpAddr>) -> Self {
        Self { dst, gw, mtu: None, advmss: None, priority: None, table: None, scope: None }
    }

    fn document(&self, version: Version) -> Value {
        let mut document = Map::new();
        document.insert("dst".into(), self.dst.to_string().into());
        if let Some(gw) = self.gw {
            document.insert("gw".into(), gw.to_string().into());
        }
        if version >= Version::V1_1_0 {
            let attributes = [
                ("mtu", self.mtu),
                ("advmss", self.advmss),
                ("priority", self.priority),
                ("table", self.table),
                ("scope", self.scope),
            ];
            for (key, value) in attributes {
                if let Some(value) = value {
                    document.insert(key.into(), value.into());
                }
            }
        }
        document.into()
    }
}

impl Dns {
    fn document(&self) -> Value {
        let mut document = Map::new();
        for (key, list) in [("nameservers", &self.nameservers), ("search", &self.search), ("options", &self.options)] {
            if !list.is_empty() {
                document.insert(key.into(), json!(list));
            }
        }
        put(&mut document, "domain", &self.domain);
        document.into()
    }
}

/// The well-known `dns` dictionary of a result or a configuration; an empty one counts as absent.
pub(super) fn dns(parent: &Object<'_>) -> Result<Option<Dns>, Error> {
    let Some(object) = parent.object("dns")? else { return Ok(None) };
    let dns = Dns {
        nameservers: object.strings("nameservers")?,
        domain: text(&object, "domain")?,
        search: object.strings("search")?,
        options: object.strings("options")?,
    };
    Ok(Some(dns).filter(|dns| *dns != Dns::default()))
}

const AN_ADDRESS: &str = "an IP address";
const A_NET: &str = "an address with a prefix length";

fn put(document: &mut Map<String, Value>, key: &str, text: &str) {
    if !text.is_empty() {
        document.insert(key.into(), text.into());
    }
}

fn text(object: &Object<'_>, key: &str) -> Result<String, Error> {
    Ok(object.string(key)?.unwrap_or_default().to_owned())
}

fn required_net(object: &Object<'_>, key: &str) -> Result<IpNetwork, Error> {
    let text = object.string(key)?.filter(|text| !text.is_empty()).ok_or_else(|| object.wrong(key, A_NET))?;
    cidr::parse(text).map_err(|_no_cidr| object.wrong(key, A_NET))
}

fn route(object: &Object<'_>) -> Result<Route, Error> {
    Ok(Route {
        dst: required_net(object, "dst")?,
        gw: object.parsed("gw", AN_ADDRESS)?,
        mtu: object.unsigned32("mtu")?,
        advmss: object.unsigned32("advmss")?,
        priority: object.unsigned32("priority")?,
        table: object.unsigned32("table")?,
        scope: object.unsigned32("scope")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn default_route(via: IpAddr) -> Route {
        let everywhere = if via.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        Route::new(everywhere.parse().unwrap(), Some(via))
    }

    fn attached() -> Attached {
        let ip = |address: &str, gateway: &str| IpConfig {
            address: address.parse().unwrap(),
            gateway: Some(gateway.parse().unwrap()),
            interface: None,
        };
        let mac = |text: &str| Some(text.parse().unwrap());
        Attached {
            host: Some(Interface::new("cali0123456789a", mac("02:00:00:00:00:01"), 8500, "")),
            pod: Interface::new("eth0", mac("02:00:00:00:00:02"), 8500, "/var/run/netns/cni-1"),
            ips: vec![ip("10.0.0.5/32", "169.254.1.1"), ip("fd00::5/128", "fe80::1")],
            routes: vec![default_route("169.254.1.1".parse().unwrap()), default_route("fe80::1".parse().unwrap())],
        }
    }

    fn object(value: &Value) -> &Map<String, Value> {
        value.as_object().unwrap()
    }

    #[test]
    fn result_by_cni_version() {
        let dns = Dns { nameservers: vec!["10.96.0.10".into()], search: vec!["a.b".into()], ..Dns::default() };
        let result = CniResult::default().attach(attached(), Some(dns));
        let lines: Vec<String> =
            Version::ALL.into_iter().map(|version| format!("{:#}", result.document(version))).collect();
        insta::assert_snapshot!("v0_3_0", lines[0]);
        assert_eq!(lines[1], lines[0].replace("0.3.0", "0.3.1"));
        assert_eq!(lines[2], lines[0].replace("0.3.0", "0.4.0"));
        insta::assert_snapshot!("v1_0_0", lines[3]);
        insta::assert_snapshot!("v1_1_0", lines[4]);
    }

    #[test]
    fn result_round_trip_by_version() {
        let result = CniResult::default().attach(attached(), None);
        for version in Version::ALL {
            let mut expected = result.clone();
            if version < Version::V1_1_0 {
                expected.interfaces.iter_mut().for_each(|interface| interface.mtu = 0);
            }
            assert_eq!(CniResult::read(object(&result.document(version))), Ok(expected), "{version}");
        }
    }

    #[test]
    fn prev_result_is_kept() {
        let before = json!({
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "eth1", "sandbox": "/n", "socketPath": "/s", "pciID": "0000:00:06.0"}],
            "ips": [{"address": "192.0.2.7/24", "interface": 0}],
            "routes": [{"dst": "198.51.100.0/24", "mtu": 1400, "advmss": 1360, "priority": 5, "table": 100, "scope": 253}],
            "dns": {"domain": "example", "options": ["ndots:5"]},
        });
        let chained = CniResult::read(object(&before)).unwrap().attach(attached(), None);
        let document = chained.document(Version::V1_1_0);
        for key in ["interfaces", "ips", "routes"] {
            assert_eq!(document[key][0], before[key][0], "{key}");
        }
        assert_eq!(document["dns"], before["dns"]);
        assert_eq!(document["ips"][1]["interface"], 2);
        assert_eq!(chained.addresses_of("eth0").count(), 2);
        assert_eq!(chained.addresses_of("eth1").map(|net| net.to_string()).collect::<Vec<_>>(), ["192.0.2.7/24"]);
        let older = chained.document(Version::V1_0_0);
        assert_eq!(older["routes"][0], json!({"dst": "198.51.100.0/24"}));
        assert_eq!(older["interfaces"][0], json!({"name": "eth1", "sandbox": "/n"}));
    }

    #[test]
    fn result_of_0_2_0() {
        let old = json!({
            "cniVersion": "0.2.0",
            "ip4": {"ip": "10.0.0.5/24", "gateway": "10.0.0.1", "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}]},
            "ip6": {"ip": "fd00::5/64"},
            "dns": {},
        });
        let result = CniResult::read(object(&old)).unwrap();
        assert_eq!(result.ips.len(), 2);
        assert_eq!(result.ips[0].gateway, Some("10.0.0.1".parse().unwrap()));
        assert_eq!(result.routes, [default_route("10.0.0.1".parse().unwrap())]);
        assert_eq!(result.addresses_of("eth0").count(), 2);
    }

    #[test]
    fn malformed_prev_result() {
        let cases = [
            (json!({"ips": [{"address": "10.0.0.5"}]}), "ips[0].address"),
            (json!({"ips": [{"address": "10.0.0.5/32", "gateway": "x"}]}), "ips[0].gateway"),
            (json!({"ips": [{"address": "10.0.0.5/32", "interface": -1}]}), "ips[0].interface"),
            (
                json!({"ips": [{"address": "10.0.0.5/32", "interface": 1}], "interfaces": [{"name": "eth0"}]}),
                "10.0.0.5/32",
            ),
            (json!({"ips": {}}), "ips should be a list"),
            (json!({"interfaces": ["eth0"]}), "interfaces should be a list of objects"),
            (json!({"routes": [{}]}), "routes[0].dst"),
            (json!({"dns": {"search": [1]}}), "dns.search"),
        ];
        for (document, naming) in cases {
            let error = CniResult::read(object(&document)).unwrap_err();
            assert!(error.code.cni == 7 && error.detail.contains(naming), "{}", error.detail);
        }
    }
}
