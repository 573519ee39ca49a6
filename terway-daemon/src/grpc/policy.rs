//! Policies, their counts and explanations as messages of the contract.

use terway_core::objects::ObjectName;
use terway_core::policy::{DirectionVerdict, Explanation, FlowEnd};
use terway_proto::v1;

use crate::policy::{Connection, PolicyEntry, PolicyList, PolicyStatus, PolicyVerdict, RuleCount, direction_label};

/// The status of policies.
pub(crate) fn status(status: &PolicyStatus) -> v1::PolicyStatus {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    v1::PolicyStatus {
        enforced: status.is_enforced,
        complete: status.is_synced,
        policies: number(status.stats.policies),
        pods: number(status.stats.pods),
        endpoints: number(status.stats.endpoints),
        identities: number(status.stats.identities),
        held: status.quarantined.iter().map(ToString::to_string).collect(),
    }
}

/// The reply of `ListPolicies`.
pub(crate) fn list(list: &PolicyList) -> v1::ListPoliciesResponse {
    let policies = list.policies.iter().map(policy).collect();
    v1::ListPoliciesResponse { policies, complete: list.is_synced, enforced: list.is_enforced }
}

fn policy(entry: &PolicyEntry) -> v1::Policy {
    v1::Policy {
        kind: entry.key.kind.to_string(),
        namespace: entry.key.name.namespace.to_string(),
        name: entry.key.name.name.to_string(),
        pods: entry.pods.iter().map(super::pod).collect(),
        allowed: entry.total.allowed.packets,
        denied: entry.total.denied.packets,
        denied_bytes: entry.total.denied.bytes,
        counts: entry.rules.iter().map(rule_count).collect(),
        problems: entry.problems.clone(),
    }
}

fn rule_count(rule: &RuleCount) -> v1::PolicyCount {
    v1::PolicyCount {
        direction: direction_label(rule.direction).to_owned(),
        reason: rule.rule.to_string(),
        allowed: rule.is_allowed,
        packets: rule.count.packets,
        bytes: rule.count.bytes,
    }
}

/// The verdict of policies in a flow event.
pub(crate) fn verdict(verdict: PolicyVerdict) -> v1::FlowDecision {
    let PolicyVerdict { is_allowed, rule, policies } = verdict;
    v1::FlowDecision { allowed: is_allowed, reason: rule, policies }
}

/// The connection that a request names.
///
/// # Errors
/// Which part of the request is not valid.
pub(crate) fn connection(request: &v1::ExplainPolicyRequest) -> Result<Connection, String> {
    Ok(Connection {
        from: flow_end(request.from.as_ref())?,
        to: flow_end(request.to.as_ref())?,
        protocol: u8::try_from(request.protocol).map_err(|error| format!("protocol {}: {error}", request.protocol))?,
        port: u16::try_from(request.port).map_err(|error| format!("port {}: {error}", request.port))?,
    })
}

fn flow_end(party: Option<&v1::PolicyParty>) -> Result<FlowEnd, String> {
    let v1::PolicyParty { namespace, name, address } = party.cloned().unwrap_or_default();
    if address.is_empty() {
        return Ok(FlowEnd::Pod(ObjectName::new(&namespace, &name)));
    }
    address.parse().map(FlowEnd::Address).map_err(|error| format!("{address}: {error}"))
}

/// The reply of `ExplainPolicy`.
pub(crate) fn explanations(explained: Result<Vec<Explanation>, String>) -> v1::ExplainPolicyResponse {
    match explained {
        Ok(families) => {
            v1::ExplainPolicyResponse { families: families.iter().map(explanation).collect(), problem: String::new() }
        }
        Err(problem) => v1::ExplainPolicyResponse { families: Vec::new(), problem },
    }
}

fn explanation(explanation: &Explanation) -> v1::PolicyExplanation {
    v1::PolicyExplanation {
        source: explanation.source.to_string(),
        destination: explanation.destination.to_string(),
        egress: explanation.egress.as_ref().map(direction_verdict),
        ingress: explanation.ingress.as_ref().map(direction_verdict),
        allowed: explanation.is_allowed(),
    }
}

fn direction_verdict(verdict: &DirectionVerdict) -> v1::PolicyJudgement {
    v1::PolicyJudgement {
        allowed: verdict.allowed,
        reason: verdict.rule.to_string(),
        policies: verdict.policies.iter().map(ToString::to_string).collect(),
        live: verdict.is_local,
    }
}
