//! Policies as the contract writes them.

use terway_core::ident::PodRef;
use terway_core::objects::{Direction, ObjectKey, ObjectName};
use terway_core::policy::{Compiler, DirectionVerdict, Explanation, FlowEnd, MatchedRule, Stats};
use terway_proto::v1;

use super::ledger::{Counted, Ledger, Verdicts, word};

pub(super) fn status(stats: &Stats, held: &[ObjectName], enforced: bool, complete: bool) -> v1::PolicyStatus {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    v1::PolicyStatus {
        enforced,
        complete,
        policies: number(stats.policies),
        pods: number(stats.pods),
        endpoints: number(stats.endpoints),
        identities: number(stats.identities),
        held: held.iter().map(ToString::to_string).collect(),
    }
}

/// So many policies of a reason are told: events are kept by the thousand.
const TOLD: usize = 16;

/// The policies that a reason names, the first of them.
pub(super) fn policies(reason: &MatchedRule) -> Vec<String> {
    match reason {
        MatchedRule::Rule { policy, .. } => vec![policy.to_string()],
        MatchedRule::Isolated { policies, .. } => policies.iter().take(TOLD).map(ToString::to_string).collect(),
        _ => Vec::new(),
    }
}

pub(super) fn list(
    compiler: &Compiler,
    request: &v1::ListPoliciesRequest,
    pod: impl Fn(&u32) -> Option<PodRef>,
    enforced: bool,
    ledger: &Ledger,
) -> v1::ListPoliciesResponse {
    let (sums, counted) = (ledger.sums(), ledger.counted());
    let wanted = |part: &str, filter: &str| filter.is_empty() || part == filter;
    let all = compiler.policies().into_iter();
    let shown =
        all.filter(|(key, _)| wanted(&key.name.namespace, &request.namespace) && wanted(&key.name.name, &request.name));
    // Of one that is asked for by name. All reasons of all policies would be as many as there are pairs of policies.
    let counts = |key: &ObjectKey| match request.name.is_empty() {
        true => Vec::new(),
        false => counted.iter().filter(|counted| counted.concerns(key)).map(count).collect(),
    };
    let policies = shown.map(|(key, slots)| {
        let both = [Direction::Ingress, Direction::Egress];
        let sum = both.iter().filter_map(|direction| sums.get(&(key.clone(), *direction)));
        let sum = sum.fold(Verdicts::default(), |mut sum, part| {
            sum.add(*part);
            sum
        });
        v1::Policy {
            kind: key.kind.to_string(),
            namespace: key.name.namespace.to_string(),
            name: key.name.name.to_string(),
            pods: slots.iter().filter_map(&pod).map(|pod| crate::server::pod(&pod)).collect(),
            allowed: sum.allowed.packets,
            denied: sum.denied.packets,
            denied_bytes: sum.denied.bytes,
            counts: counts(&key),
        }
    });
    v1::ListPoliciesResponse { policies: policies.collect(), complete: true, enforced }
}

fn count(counted: &Counted) -> v1::PolicyCount {
    v1::PolicyCount {
        direction: word(counted.direction).to_owned(),
        reason: counted.reason.to_string(),
        allowed: counted.allows,
        packets: counted.tally.packets,
        bytes: counted.tally.bytes,
    }
}

fn party(party: Option<&v1::PolicyParty>) -> Result<FlowEnd, String> {
    let v1::PolicyParty { namespace, name, address } = party.cloned().unwrap_or_default();
    if address.is_empty() {
        return Ok(FlowEnd::Pod(ObjectName::new(&namespace, &name)));
    }
    address.parse().map(FlowEnd::Address).map_err(|error| format!("{address}: {error}"))
}

pub(super) fn explain(compiler: &Compiler, request: &v1::ExplainPolicyRequest) -> v1::ExplainPolicyResponse {
    let explained = || -> Result<Vec<Explanation>, String> {
        let (from, to) = (party(request.from.as_ref())?, party(request.to.as_ref())?);
        let protocol =
            u8::try_from(request.protocol).map_err(|error| format!("protocol {}: {error}", request.protocol))?;
        let port = u16::try_from(request.port).map_err(|error| format!("port {}: {error}", request.port))?;
        compiler.explain(&from, &to, protocol, port).map_err(|unexplained| unexplained.to_string())
    };
    match explained() {
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
        egress: explanation.egress.as_ref().map(judgement),
        ingress: explanation.ingress.as_ref().map(judgement),
        allowed: explanation.is_allowed(),
    }
}

fn judgement(judgement: &DirectionVerdict) -> v1::PolicyJudgement {
    v1::PolicyJudgement {
        allowed: judgement.allowed,
        reason: judgement.rule.to_string(),
        policies: judgement.policies.iter().map(ToString::to_string).collect(),
        live: judgement.is_local,
    }
}
