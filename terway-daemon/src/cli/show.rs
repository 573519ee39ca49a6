//! `terway-cli show`: everything about one thing.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use serde_json::{Value, json};
use terway_proto::v1;

use super::daemon::{self, Failure};
use super::table::{Style, block, error_line, pod_name, pretty};
use super::{Cli, eni, mapping, print, verdict};

/// Subcommands of `show`.
#[derive(Clone, Debug, Subcommand)]
pub(super) enum What {
    /// Show a pod: addresses, ENI, interface, container, and whether all layers agree. Exit code 1 if they differ.
    Pod {
        /// Namespace and name of the pod.
        #[arg(value_name = "NS/NAME", value_parser = namespaced)]
        name: PodName,
    },
    /// Show an ENI: state, vSwitch, security groups, tags, and each address with its pod.
    Eni {
        /// Id of the ENI (eni-…).
        id: String,
    },
    /// Show a vSwitch: free addresses, and this node's ENIs and addresses in it.
    Vswitch {
        /// Id of the vSwitch (vsw-…).
        id: String,
    },
    /// Show an address: its pod and its ENI.
    Address {
        /// An IPv4 or IPv6 address.
        address: IpAddr,
    },
}

/// NAMESPACE/NAME.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodName {
    namespace: String,
    name: String,
}

fn namespaced(text: &str) -> Result<PodName, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(PodName { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => Err("give NAMESPACE/NAME".to_owned()),
    }
}

pub(super) async fn run(cli: &Cli, what: Option<&What>, style: Style) -> Result<ExitCode> {
    if let Some(What::Pod { name }) = what {
        let reply = daemon::mapping(cli, false).await?;
        let (text, fits) =
            pod(&reply, name, style).ok_or_else(|| unknown("pod", &format!("{}/{}", name.namespace, name.name)))?;
        print(&text);
        return Ok(verdict(fits));
    }
    let reply = daemon::pool(cli).await?;
    let text = match what {
        None => Some(overview(&reply, style)),
        Some(What::Eni { id }) => one_eni(&reply, id, style),
        Some(What::Vswitch { id }) => vswitch(&reply, id, style),
        Some(What::Address { address }) => one_address(&reply, *address, style),
        Some(What::Pod { .. }) => None,
    };
    let complete = super::complete(&reply);
    let text = text.ok_or_else(|| match what {
        Some(What::Eni { id }) => unknown("ENI", id),
        Some(What::Vswitch { id }) => unknown("vSwitch", id),
        Some(What::Address { address }) => unknown("address", &address.to_string()),
        _ => unknown("object", ""),
    })?;
    print(&text);
    Ok(verdict(complete))
}

fn unknown(kind: &str, name: &str) -> Failure {
    Failure::Refused(format!("the daemon of this node has no {kind} {name}"))
}

fn overview(reply: &v1::GetPoolResponse, style: Style) -> String {
    if style.is_json() {
        return pretty(&eni::pool_value(reply));
    }
    [eni::vswitches(&reply.vswitches, style), eni::enis(&reply.enis, style)].join("\n")
}

/// The pod, and whether its layers fit.
fn pod(reply: &v1::GetMappingResponse, name: &PodName, style: Style) -> Option<(String, bool)> {
    let is_it = |pod: Option<&v1::Pod>| pod.is_some_and(|pod| pod.namespace == name.namespace && pod.name == name.name);
    let rows: Vec<&v1::MappingRow> = reply.pods.iter().filter(|row| is_it(row.pod.as_ref())).collect();
    let findings: Vec<v1::Finding> = reply.findings.iter().filter(|f| is_it(f.pod.as_ref())).cloned().collect();
    if rows.is_empty() {
        return None;
    }
    let fits = !findings.iter().any(|finding| finding.mismatch);
    if style.is_json() {
        let value = json!({
            "attachments": rows.iter().map(|row| mapping::row_value(row)).collect::<Vec<_>>(),
            "findings": findings.iter().map(mapping::finding_value).collect::<Vec<_>>(),
        });
        return Some((pretty(&value), fits));
    }
    let mut parts: Vec<String> = rows.iter().map(|row| attachment(row)).collect();
    if !findings.is_empty() {
        parts.push(mapping::findings(&findings, style));
    }
    Some((parts.join("\n"), fits))
}

fn attachment(row: &v1::MappingRow) -> String {
    let key = row.attachment.clone().unwrap_or_default();
    let layers: Vec<String> =
        mapping::layers(row).map(|(name, verdict)| format!("{name} {}", mapping::mark(verdict))).collect();
    block(&[
        ("pod", pod_name(row.pod.as_ref())),
        ("uid", row.pod.clone().unwrap_or_default().uid),
        ("phase", row.phase.clone()),
        ("addresses", row.addresses.join(", ")),
        ("ENI", [row.eni.as_str(), &row.eni_ifname].join(" ").trim().to_owned()),
        ("interface", format!("{} -> {} in the pod", row.host_ifname, key.ifname)),
        ("container", key.container_id),
        ("network", key.network),
        ("layers", layers.join(", ")),
    ])
}

fn one_eni(reply: &v1::GetPoolResponse, id: &str, style: Style) -> Option<String> {
    let found = reply.enis.iter().find(|eni| eni.id == id)?;
    if style.is_json() {
        return Some(pretty(&eni::eni_value(found)));
    }
    let tags: Vec<String> = found.tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let error = found.error.clone().unwrap_or_default();
    let facts = block(&[
        ("ENI", found.id.clone()),
        ("role", found.role.clone()),
        ("vSwitch", found.vswitch.clone()),
        ("status", [found.status.as_str(), &found.state].join(" ").trim().to_owned()),
        ("MAC", found.mac.clone()),
        ("interface", found.ifname.clone()),
        ("security groups", found.security_groups.join(", ")),
        ("tags", tags.join(", ")),
        ("addresses", format!("{} of {} in use", eni::bound(found), found.addresses.len())),
        ("reason", found.reason.clone()),
        ("problem", error_line(&error)),
        ("remedy", error.remedy),
    ]);
    let rows = found.addresses.iter().map(|a| vec![a.address.clone(), a.state.clone(), pod_name(a.pod.as_ref())]);
    Some([facts, style.table(&["ADDRESS", "STATE", "POD"], rows)].join("\n"))
}

fn vswitch(reply: &v1::GetPoolResponse, id: &str, style: Style) -> Option<String> {
    let found = reply.vswitches.iter().find(|vswitch| vswitch.id == id)?;
    let inside: Vec<v1::Eni> = reply.enis.iter().filter(|eni| eni.vswitch == id).cloned().collect();
    if style.is_json() {
        let mut value = eni::vswitch_value(found);
        if let Value::Object(map) = &mut value {
            map.insert("eniIDs".to_owned(), inside.iter().map(|eni| eni.id.clone()).collect());
        }
        return Some(pretty(&value));
    }
    let blocked = found.blocked.clone().unwrap_or_default();
    let facts = block(&[
        ("vSwitch", found.id.clone()),
        ("zone", found.zone.clone()),
        ("CIDR", found.cidr.clone()),
        ("available", found.available.map(|n| n.to_string()).unwrap_or_default()),
        ("this node", format!("{} ENIs, {} of {} addresses in use", found.enis, found.bound, found.addresses)),
        ("blocked", error_line(&blocked)),
        ("remedy", blocked.remedy),
    ]);
    Some([facts, eni::enis(&inside, style)].join("\n"))
}

fn one_address(reply: &v1::GetPoolResponse, address: IpAddr, style: Style) -> Option<String> {
    let text = address.to_string();
    let (eni, found) =
        reply.enis.iter().find_map(|eni| Some((eni, eni.addresses.iter().find(|a| a.address == text)?)))?;
    if style.is_json() {
        let mut value = eni::address_value(found);
        if let Value::Object(map) = &mut value {
            map.insert("eni".to_owned(), eni.id.clone().into());
            map.insert("vswitch".to_owned(), eni.vswitch.clone().into());
        }
        return Some(pretty(&value));
    }
    Some(block(&[
        ("address", text),
        ("state", found.state.clone()),
        ("pod", pod_name(found.pod.as_ref())),
        ("ENI", [eni.id.as_str(), &eni.ifname].join(" ").trim().to_owned()),
        ("vSwitch", eni.vswitch.clone()),
    ]))
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn one_of_each() {
        let (pool, mapping) = (sample::pool(), sample::mapping());
        let name = namespaced("default/web-1").unwrap();
        for (file, text) in [
            ("show_pod", sample::all(|style| pod(&mapping, &name, style).unwrap().0)),
            ("show_eni", sample::all(|style| one_eni(&pool, "eni-b", style).unwrap())),
            ("show_vswitch", sample::all(|style| vswitch(&pool, "vsw-2", style).unwrap())),
            ("show_address", sample::all(|style| one_address(&pool, "10.0.2.11".parse().unwrap(), style).unwrap())),
            ("show", sample::all(|style| overview(&pool, style))),
        ] {
            insta::assert_snapshot!(file, text);
        }
    }

    #[test]
    fn what_is_unknown_is_not_shown() {
        let pool = sample::pool();
        let style = Style { output: super::super::Output::Table, headers: true };
        assert!(one_eni(&pool, "eni-x", style).is_none() && vswitch(&pool, "vsw-x", style).is_none());
        assert!(one_address(&pool, "192.0.2.1".parse().unwrap(), style).is_none());
        assert!(pod(&sample::mapping(), &namespaced("other/web-1").unwrap(), style).is_none());
        let fits = |name: &str| pod(&sample::mapping(), &namespaced(name).unwrap(), style).unwrap().1;
        assert!(fits("default/web-0") && !fits("default/web-1"));
    }
}
