//! The configuration list that the daemon writes for the container runtime.

use serde_json::{Map, Value, json};

use super::{DEFAULT_QUEUE_DIR, DEFAULT_SOCKET};

/// Name of the file. A runtime takes the first of the folder by name; `10-aws`, `10-calico`, `10-flannel` and `05-cilium` sort before this
/// one, and the daemon reports them (`TW0110`). It ends as runtimes
/// want it; written under another suffix and renamed, it is never seen half.
pub const FILE_NAME: &str = "10-terway.conflist";

/// The list of network `name`, one plugin long.
///
/// It asks for no capabilities: a runtime that hands over port mappings or rates may expect that they take effect, and they do not yet.
///
/// `options` are further keys of the plugin's configuration, such as `mtu`; they must not be `type` or `capabilities`. Paths
/// that are the plugin's defaults are left out.
///
/// `cniVersion` 1.0.0 is what containerd 1.6 and 1.7 take (they load 1.1.0 and then fail every ADD); newer runtimes take the
/// highest of `cniVersions` that they know, and with 1.1.0 they call STATUS and GC.
#[must_use]
pub fn conflist(name: &str, daemon_socket: &str, queue_dir: &str, options: &Map<String, Value>) -> String {
    let mut plugin = options.clone();
    plugin.insert("type".into(), "terway".into());
    for (key, path, default) in
        [("daemon_socket", daemon_socket, DEFAULT_SOCKET), ("queue_dir", queue_dir, DEFAULT_QUEUE_DIR)]
    {
        if path != default {
            plugin.insert(key.into(), path.into());
        }
    }
    let list = json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
        "name": name,
        "plugins": [plugin],
    });
    format!("{list:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::NetConf;

    #[test]
    fn conflist_of_default_node() {
        insta::assert_snapshot!(conflist("terway", DEFAULT_SOCKET, DEFAULT_QUEUE_DIR, &Map::new()));
    }

    #[test]
    fn conflist_round_trip() {
        let options = json!({"mtu": 8500});
        let list: Value =
            serde_json::from_str(&conflist("terway", "/w/socket", "/w/del", options.as_object().unwrap())).unwrap();
        // A runtime puts name and version of the list into the plugin's configuration (specification 1.1.0, section 3).
        let mut plugin = list["plugins"][0].clone();
        plugin["name"] = list["name"].clone();
        for version in list["cniVersions"].as_array().unwrap() {
            plugin["cniVersion"] = version.clone();
            let conf = NetConf::decode(plugin.to_string().as_bytes()).unwrap();
            assert_eq!((conf.daemon_socket.as_str(), conf.queue_dir.as_str()), ("/w/socket", "/w/del"));
            assert_eq!(conf.options().unwrap().mtu, Some(8500));
        }
    }
}
