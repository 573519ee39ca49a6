//! `terway-cli list`: the pods of the node.

use serde_json::{Value, json};
use terway_proto::v1;

use super::table::{Style, pod_name, pretty};

pub(super) fn render(pods: &[v1::PodState], style: Style) -> String {
    if style.is_json() {
        return pretty(&pods.iter().map(value).collect());
    }
    let head = ["POD", "ADDRESSES", "ENI", "INTERFACE", "PHASE", "+CONTAINER", "+IFNAME", "+UID"];
    let rows = pods.iter().map(|p| {
        let key = p.attachment.clone().unwrap_or_default();
        let uid = p.pod.clone().unwrap_or_default().uid;
        let (addresses, interface) = (p.addresses.join(","), p.host_ifname.clone());
        let name = pod_name(p.pod.as_ref());
        vec![name, addresses, p.eni.clone(), interface, p.phase.clone(), key.container_id, key.ifname, uid]
    });
    style.table(&head, rows)
}

fn value(p: &v1::PodState) -> Value {
    let (pod, key) = (p.pod.clone().unwrap_or_default(), p.attachment.clone().unwrap_or_default());
    json!({
        "namespace": pod.namespace, "name": pod.name, "uid": pod.uid,
        "network": key.network, "containerID": key.container_id, "ifname": key.ifname,
        "addresses": p.addresses, "eni": p.eni, "hostInterface": p.host_ifname, "phase": p.phase,
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample;

    #[test]
    fn pods_with_and_without_a_name() {
        insta::assert_snapshot!("list", sample::all(|style| super::render(&sample::pods(), style)));
    }
}
