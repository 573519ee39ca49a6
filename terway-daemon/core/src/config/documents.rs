//! The data of a ConfigMap: `eni_conf` and what stands beside it, and the node's own layer.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};

use super::check::check;
use super::keys::{CNI_CONF, CNI_CONFLIST, DISABLE_NETWORK_POLICY, ENI_CONF, IN_CLUSTER_LOADBALANCE, KEYS};
use super::merge::merge;
use super::raw::{Reader, object, shown, unknown};
use super::{Config, InvalidValue, KeyLocation, TakesEffect, Warning};
use crate::cni::NetConf;
use crate::cni::conf::VirtualType;

/// Text by key, as in the data of a ConfigMap.
pub type ConfigMapData = BTreeMap<String, String>;

/// Everything a configuration is made of.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ConfigDocuments {
    /// The cluster's `eni-config`.
    pub data: ConfigMapData,
    /// The node's own layer (label `terway-config`): its `eni_conf` is merged over the cluster's by RFC 7396; nothing else of it counts.
    pub overlay: Option<ConfigMapData>,
}

/// The texts hold secrets: only their names and sizes are shown.
impl fmt::Debug for ConfigDocuments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn sizes(data: &ConfigMapData) -> BTreeMap<&str, usize> {
            data.iter().map(|(name, text)| (name.as_str(), text.len())).collect()
        }
        let overlay = self.overlay.as_ref().map(sizes);
        f.debug_struct("ConfigDocuments").field("data", &sizes(&self.data)).field("overlay", &overlay).finish()
    }
}

/// What the ConfigMap says outside of `eni_conf`.
#[derive(Debug, Default)]
pub(super) struct ConfigMapExtras {
    pub(super) policy_enabled: bool,
    pub(super) in_cluster_loadbalance: bool,
    pub(super) mtu: Option<u32>,
    pub(super) host_stack_cidrs: Vec<ipnetwork::IpNetwork>,
}

impl ConfigDocuments {
    /// `eni_conf` alone.
    #[must_use]
    pub fn of(eni_conf: &str) -> Self {
        Self { data: ConfigMapData::from([(ENI_CONF.name.to_owned(), eni_conf.to_owned())]), overlay: None }
    }

    /// Merges, reads and checks.
    ///
    /// # Errors
    /// Every refused value at once, so that one edit can mend them all. No text of an error holds a secret.
    pub fn check(&self) -> Result<(Config, Vec<Warning>), Vec<InvalidValue>> {
        let (config, warnings) = self.check_with_warnings();
        config.map(|config| (config, warnings))
    }

    /// As [`Self::check`], with the warnings also of a configuration that is refused.
    pub fn check_with_warnings(&self) -> (Result<Config, Vec<InvalidValue>>, Vec<Warning>) {
        let merged = self.merged();
        let (layers, mut bad) = match merged {
            Ok(object) => (object, Vec::new()),
            Err(bad) => (Map::new(), bad),
        };
        let unread = !bad.is_empty();
        let mut reader = Reader::new(layers);
        let beside = self.beside(&mut reader);
        if unread {
            // What the document would have said is not known: only the keys beside it can be checked.
            bad.append(&mut reader.bad);
            return (Err(bad), reader.warnings);
        }
        let config = check(&mut reader, beside);
        if reader.bad.is_empty() {
            return (Ok(config), reader.warnings);
        }
        // Two files make one document: say which of them to mend.
        let own = self.overlay.as_ref().and_then(|data| object("", data.get(ENI_CONF.name)?).ok());
        for bad in reader.bad.iter_mut().filter(|bad| own.as_ref().is_some_and(|own| own.contains_key(&bad.key))) {
            bad.reason.push_str(" (set by the node's own configuration)");
        }
        (Err(reader.bad), reader.warnings)
    }

    /// `eni_conf` with the overlay's laid over it.
    fn merged(&self) -> Result<Map<String, Value>, Vec<InvalidValue>> {
        let missing = |of: &str| InvalidValue {
            key: ENI_CONF.name.into(),
            value: "absent".into(),
            reason: format!("is needed in {of}"),
        };
        let base = self.data.get(ENI_CONF.name).ok_or_else(|| missing("the configuration"));
        let base = base.and_then(|text| object(ENI_CONF.name, text));
        let overlay = self.overlay.as_ref().map(|data| {
            let text = data.get(ENI_CONF.name).ok_or_else(|| missing("the node's own configuration"))?;
            object("eni_conf of the node's own configuration", text)
        });
        match (base, overlay) {
            (Ok(base), None) => Ok(base),
            (Ok(base), Some(Ok(overlay))) => {
                let mut merged = Value::Object(base);
                merge(&mut merged, Value::Object(overlay));
                match merged {
                    Value::Object(merged) => Ok(merged),
                    _ => Ok(Map::new()),
                }
            }
            (base, overlay) => Err(base.err().into_iter().chain(overlay.and_then(Result::err)).collect()),
        }
    }

    fn beside(&self, reader: &mut Reader) -> ConfigMapExtras {
        let text = |name: &str| self.data.get(name).map(|text| text.trim());
        let mut beside = ConfigMapExtras {
            // The reference project's readings, odd as they are: running clusters rely on them.
            policy_enabled: matches!(text(DISABLE_NETWORK_POLICY.name), None | Some("" | "0" | "false")),
            in_cluster_loadbalance: matches!(text(IN_CLUSTER_LOADBALANCE.name), None | Some("true")),
            ..ConfigMapExtras::default()
        };
        for (key, off) in [(DISABLE_NETWORK_POLICY, "true"), (IN_CLUSTER_LOADBALANCE, "false")] {
            if text(key.name).is_some_and(|t| !matches!(t, "" | "0" | "1" | "true" | "false")) {
                reader.warn(key.name, format!("is neither true nor false and is read as {off}"));
            }
        }
        // The list goes before the single configuration.
        let found = [CNI_CONFLIST, CNI_CONF].into_iter().find_map(|key| Some((key, text(key.name)?)));
        if let Some((key, text)) = found {
            match plugin(key.name, text, reader) {
                Ok(Some(conf)) => read_cni(key.name, &conf, reader, &mut beside),
                Ok(None) => reader.warn(key.name, "has no plugin of type terway and is ignored"),
                Err(invalid) => reader.bad.push(invalid),
            }
        }
        for name in self.data.keys() {
            match KEYS.iter().find(|key| key.name == name) {
                Some(key) if key.location == KeyLocation::EniConf => {
                    reader.warn(name, "belongs into eni_conf, not beside it; it is ignored here");
                }
                Some(key) if key.effect == TakesEffect::Unsupported => {
                    reader.warn(name, "has no effect in this version");
                }
                Some(_) => {}
                None => reader.warn(name, unknown(name)),
            }
        }
        for name in self.overlay.iter().flat_map(ConfigMapData::keys).filter(|name| *name != ENI_CONF.name) {
            reader.warn(name, "is ignored in the node's own configuration: only its eni_conf counts");
        }
        beside
    }
}

/// Our plugin's part of a CNI configuration or list, with what a runtime would add.
fn plugin(key: &str, text: &str, reader: &mut Reader) -> Result<Option<Map<String, Value>>, InvalidValue> {
    let mut conf = object(key, text)?;
    let Some(plugins) = conf.remove("plugins") else { return Ok(Some(conf)) };
    let Value::Array(plugins) = plugins else {
        return Err(InvalidValue { key: key.into(), value: shown(&plugins), reason: "plugins must be a list".into() });
    };
    let (ours, others): (Vec<_>, Vec<_>) = plugins.into_iter().partition(|plugin| plugin["type"] == "terway");
    for other in others {
        // The reference project needed this one behind it for what the datapath does here by itself.
        if other["type"] != "cilium-cni" {
            reader.warn(
                key,
                format!("the plugin {} is not chained: the daemon writes its own list", shown(&other["type"])),
            );
        }
    }
    let Some(Value::Object(mut ours)) = ours.into_iter().next() else { return Ok(None) };
    for from_list in ["cniVersion", "name"] {
        if let Some(value) = conf.remove(from_list) {
            ours.insert(from_list.into(), value);
        }
    }
    Ok(Some(ours))
}

fn read_cni(key: &str, conf: &Map<String, Value>, reader: &mut Reader, beside: &mut ConfigMapExtras) {
    // Name and version matter to the runtime's copy, which is not this one.
    let mut conf = conf.clone();
    conf.insert("cniVersion".into(), json!("1.0.0"));
    conf.insert("name".into(), json!("terway"));
    match NetConf::decode(Value::Object(conf).to_string().as_bytes()).and_then(|conf| conf.options()) {
        Ok(options) => {
            if options.virtual_type != VirtualType::DatapathV2 {
                reader.warn(
                    key,
                    "eniip_virtual_type is ignored: pods are connected by veth and eBPF (datapathv2) in this version",
                );
            }
            beside.mtu = options.mtu;
            beside.host_stack_cidrs = options.host_stack_cidrs;
        }
        Err(error) => {
            reader.bad.push(InvalidValue { key: key.into(), value: "its content".into(), reason: error.detail });
        }
    }
}
