//! What is written to pods of the node.

use crate::ident::Addresses;
use crate::objects::Pod;

/// The annotation with the addresses of a pod, as the reference project has it.
pub const POD_IPS: &str = "k8s.aliyun.com/pod-ips";

/// The value of [`POD_IPS`] if it is to be written: the addresses, IPv4 first, separated by commas.
///
/// None if the pod has it, or is another pod than the one that got the addresses: `uid` is the one that the runtime told.
#[must_use]
pub fn pod_ips(pod: &Pod, uid: &str, addresses: &Addresses) -> Option<String> {
    if pod.host_network || pod.meta.deleting || (!uid.is_empty() && *pod.meta.uid != *uid) {
        return None;
    }
    let desired = addresses.iter().map(|address| address.to_string()).collect::<Vec<_>>().join(",");
    (!desired.is_empty() && pod.meta.annotations.get(POD_IPS) != Some(&desired)).then_some(desired)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(json: &serde_json::Value) -> Pod {
        serde_json::from_str(&json.to_string()).unwrap()
    }

    #[test]
    fn pod_gets_its_addresses_once() {
        let addresses = Addresses { v4: Some([10, 0, 0, 1].into()), v6: "2001:db8::1".parse().ok() };
        let mut metadata = serde_json::json!({ "namespace": "shop", "name": "web", "uid": "u1" });
        let of = |metadata: &serde_json::Value| pod(&serde_json::json!({ "metadata": metadata }));
        assert_eq!(pod_ips(&of(&metadata), "u1", &addresses).as_deref(), Some("10.0.0.1,2001:db8::1"));
        assert_eq!(pod_ips(&of(&metadata), "", &addresses).as_deref(), Some("10.0.0.1,2001:db8::1"));
        assert_eq!(pod_ips(&of(&metadata), "u2", &addresses), None, "another pod of the same name");
        metadata["annotations"] = serde_json::json!({ "k8s.aliyun.com/pod-ips": "10.0.0.1,2001:db8::1" });
        assert_eq!(pod_ips(&of(&metadata), "u1", &addresses), None);
        let host = pod(&serde_json::json!({ "metadata": metadata, "spec": { "hostNetwork": true } }));
        assert_eq!(pod_ips(&host, "u1", &Addresses::default()), None);
    }
}
