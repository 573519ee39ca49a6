//! `terway-cli policy`: what network policies say, from the daemon's compiled state.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use clap::Subcommand;
use serde_json::{Value, json};
use terway_proto::v1;

use super::table::{Style, pretty};

/// Subcommands of `policy`.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List all network policies, with how many pods of this node each selects.
    List,
    /// Show one network policy with the pods of this node that it selects. Exit code 1 if there is none of that name.
    Show {
        /// Namespace and name of the policy; a ClusterNetworkPolicy has only a name.
        #[arg(value_name = "[NS/]NAME")]
        name: String,
    },
    /// Explain why a connection is allowed or denied, at both ends. Exit code 1 if it is denied.
    Explain {
        /// Source of the connection: a pod or an address.
        #[arg(long, value_name = "NS/POD|ADDRESS", value_parser = party)]
        from: v1::PolicyParty,
        /// Destination: a pod or an address, optionally a port, and a protocol (default TCP).
        #[arg(long, value_name = "NS/POD|ADDRESS[:PORT][/PROTOCOL]", value_parser = target)]
        to: Target,
    },
}

/// Destination of a connection.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Target {
    pub(super) party: v1::PolicyParty,
    pub(super) protocol: u32,
    pub(super) port: u32,
}

fn party(text: &str) -> Result<v1::PolicyParty, String> {
    if text.parse::<IpAddr>().is_ok() {
        return Ok(v1::PolicyParty { address: text.to_owned(), ..Default::default() });
    }
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(v1::PolicyParty { namespace: namespace.to_owned(), name: name.to_owned(), ..Default::default() })
        }
        _ => Err("is neither NAMESPACE/POD nor an address".to_owned()),
    }
}

/// Protocols by name.
const PROTOCOLS: [(&str, u32); 5] = [("icmp", 1), ("tcp", 6), ("udp", 17), ("icmpv6", 58), ("sctp", 132)];

fn target(text: &str) -> Result<Target, String> {
    let named = |name: &str| PROTOCOLS.iter().find(|(known, _)| *known == name.to_lowercase()).map(|(_, n)| *n);
    let (rest, protocol) = match text.rsplit_once('/') {
        Some((rest, last)) if named(last).is_some() => (rest, named(last)),
        _ => (text, None),
    };
    let (party, port) = if let Ok(at) = rest.parse::<SocketAddr>() {
        (party(&at.ip().to_string())?, at.port())
    } else if rest.parse::<IpAddr>().is_ok() {
        (party(rest)?, 0)
    } else if let Some((name, port)) = rest.rsplit_once(':') {
        (party(name)?, port.parse().map_err(|error| format!("{port} is no port: {error}"))?)
    } else {
        (party(rest)?, 0)
    };
    // Without a port it is about what has none.
    let protocol = protocol.unwrap_or(if port == 0 { 1 } else { 6 });
    Ok(Target { party, protocol, port: port.into() })
}

/// The name as the request wants it.
pub(super) fn request(verb: &Verb) -> v1::ListPoliciesRequest {
    match verb {
        Verb::Show { name } => {
            let (namespace, name) = name.split_once('/').unwrap_or(("", name));
            v1::ListPoliciesRequest { namespace: namespace.to_owned(), name: name.to_owned() }
        }
        _ => v1::ListPoliciesRequest::default(),
    }
}

/// `policy list`: a line for each.
pub(super) fn list(reply: &v1::ListPoliciesResponse, style: Style) -> String {
    if style.is_json() {
        return json(reply);
    }
    let rows = reply.policies.iter().map(|p| {
        let numbers = [p.pods.len() as u64, p.allowed, p.denied].map(|number| number.to_string());
        let [selected, allowed, denied] = numbers;
        vec![p.kind.clone(), name(p), selected, allowed, denied, p.denied_bytes.to_string(), pods(p).join(",")]
    });
    style.table(&["KIND", "POLICY", "PODS", "ALLOWED", "DENIED", "+DENIED-BYTES", "+SELECTS"], rows) + &remarks(reply)
}

/// `policy show`: each with its pods.
pub(super) fn show(reply: &v1::ListPoliciesResponse, style: Style) -> String {
    if style.is_json() {
        return json(reply);
    }
    let mut out = String::new();
    for policy in &reply.policies {
        let _ = writeln!(out, "{} {}", policy.kind, name(policy));
        let _ = writeln!(out, "  selects {} pods of this node", policy.pods.len());
        for pod in pods(policy) {
            let _ = writeln!(out, "    {pod}");
        }
        let (connections, packets) = (policy.allowed, policy.denied);
        let _ = writeln!(out, "  let {connections} connections begin, had {packets} packets dropped");
        let rows = policy.counts.iter().map(|c| {
            let verdict = if c.allowed { "allowed" } else { "denied" };
            vec![c.direction.clone(), verdict.to_owned(), c.packets.to_string(), c.bytes.to_string(), c.reason.clone()]
        });
        if !policy.counts.is_empty() {
            let table = style.table(&["DIRECTION", "VERDICT", "COUNT", "BYTES", "BY"], rows);
            for line in table.lines() {
                let _ = writeln!(out, "    {line}");
            }
        }
    }
    out + &remarks(reply)
}

fn remarks(reply: &v1::ListPoliciesResponse) -> String {
    let mut out = String::new();
    if !reply.complete {
        out.push_str("not all is known yet: the source of objects has not told everything\n");
    } else if !reply.enforced {
        out.push_str("network policies are switched off (disable_network_policy)\n");
    }
    // Map entries that the kernel refused.
    for policy in &reply.policies {
        for problem in &policy.problems {
            let _ = writeln!(out, "not programmed: {} {}: {problem}", policy.kind, name(policy));
        }
    }
    out
}

fn name(policy: &v1::Policy) -> String {
    match policy.namespace.as_str() {
        "" => policy.name.clone(),
        namespace => format!("{namespace}/{}", policy.name),
    }
}

fn pods(policy: &v1::Policy) -> Vec<String> {
    policy.pods.iter().map(|pod| format!("{}/{}", pod.namespace, pod.name)).collect()
}

fn json(reply: &v1::ListPoliciesResponse) -> String {
    let policies: Vec<Value> = reply
        .policies
        .iter()
        .map(|p| {
            let counts = p.counts.iter().map(|c| {
                json!({
                    "direction": c.direction, "allowed": c.allowed, "packets": c.packets, "bytes": c.bytes,
                    "reason": c.reason,
                })
            });
            json!({
                "kind": p.kind, "namespace": p.namespace, "name": p.name, "pods": pods(p), "allowed": p.allowed,
                "denied": p.denied, "deniedBytes": p.denied_bytes, "counts": counts.collect::<Vec<_>>(),
                "problems": p.problems,
            })
        })
        .collect();
    pretty(&json!({"complete": reply.complete, "enforced": reply.enforced, "policies": policies}))
}

/// `policy explain`: both sides, for each address family.
pub(super) fn explain(reply: &v1::ExplainPolicyResponse, style: Style) -> String {
    if style.is_json() {
        let side = |side: Option<&v1::PolicyJudgement>| {
            side.map(|s| json!({"allowed": s.allowed, "reason": s.reason, "policies": s.policies, "live": s.live}))
        };
        let families: Vec<Value> = reply
            .families
            .iter()
            .map(|f| {
                json!({
                    "source": f.source, "destination": f.destination, "allowed": f.allowed,
                    "egress": side(f.egress.as_ref()), "ingress": side(f.ingress.as_ref()),
                })
            })
            .collect();
        return pretty(&json!({"families": families}));
    }
    let mut out = String::new();
    for family in &reply.families {
        let verdict = if family.allowed { "passes" } else { "is dropped" };
        let _ = writeln!(out, "{} -> {} {verdict}", family.source, family.destination);
        for (direction, side) in [("egress", &family.egress), ("ingress", &family.ingress)] {
            let Some(side) = side else {
                let _ = writeln!(out, "  {direction:<8} -        it is no pod");
                continue;
            };
            let verdict = if side.allowed { "allowed" } else { "denied" };
            let elsewhere = if side.live { "" } else { " (decided by the pod's own node)" };
            let _ = writeln!(out, "  {direction:<8} {verdict:<8} {}{elsewhere}", side.reason);
            for policy in &side.policies {
                let _ = writeln!(out, "    selected by {policy}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn policies_with_what_they_decided() {
        let text = sample::all(|style| list(&sample::policies(), style));
        insta::assert_snapshot!("policy_list", text);
        let text = sample::all(|style| show(&sample::policies(), style));
        insta::assert_snapshot!("policy_show", text);
    }

    #[test]
    fn ends_of_connections_are_understood() {
        let pod = |namespace: &str, name: &str| v1::PolicyParty {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            address: String::new(),
        };
        let at = |address: &str| v1::PolicyParty { address: address.to_owned(), ..Default::default() };
        for (text, wanted, protocol, port) in [
            ("shop/web:80", pod("shop", "web"), 6, 80),
            ("shop/web:53/udp", pod("shop", "web"), 17, 53),
            ("shop/web", pod("shop", "web"), 1, 0),
            ("shop/web:9/SCTP", pod("shop", "web"), 132, 9),
            ("10.0.0.1:443", at("10.0.0.1"), 6, 443),
            ("10.0.0.1", at("10.0.0.1"), 1, 0),
            ("[fd00::1]:443/udp", at("fd00::1"), 17, 443),
            ("fd00::1/icmpv6", at("fd00::1"), 58, 0),
        ] {
            assert_eq!(target(text), Ok(Target { party: wanted, protocol, port }), "{text}");
        }
        for text in ["web", "shop/", "shop/web:high", "a/b/c:80", "10.0.0:80"] {
            assert!(target(text).is_err(), "{text}");
        }
    }
}
