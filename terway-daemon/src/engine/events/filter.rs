//! Which flow events somebody asks for.

use terway_core::errors::{self, Error};
use terway_proto::v1;

/// The word for what passed.
pub(super) const ALLOWED: &str = "allowed";
/// The word for what did not.
pub(super) const DROPPED: &str = "dropped";

/// All that is set must apply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    pod: Option<(String, String)>,
    verdict: Option<&'static str>,
    policy: Option<String>,
    port: Option<u32>,
}

impl Filter {
    /// Drops only.
    pub(crate) fn drops() -> Self {
        Self { verdict: Some(DROPPED), ..Self::default() }
    }

    /// Reads a request.
    ///
    /// # Errors
    /// A verdict or a port that there is not.
    pub(crate) fn of(request: &v1::WatchFlowsRequest) -> Result<Self, Error> {
        let bad = |what: String| Error::new(errors::CNI_CONFIG, what);
        let verdict = match request.verdict.as_str() {
            "" => None,
            ALLOWED => Some(ALLOWED),
            DROPPED => Some(DROPPED),
            other => return Err(bad(format!("{other} is no verdict"))),
        };
        if request.port > u32::from(u16::MAX) {
            return Err(bad(format!("{} is no port", request.port)));
        }
        Ok(Self {
            pod: request.pod.as_ref().map(|pod| (pod.namespace.clone(), pod.name.clone())),
            verdict,
            policy: (!request.policy.is_empty()).then(|| request.policy.clone()),
            port: (request.port != 0).then_some(request.port),
        })
    }

    /// Whether an event is meant.
    pub(crate) fn takes(&self, event: &v1::FlowEvent) -> bool {
        let ends = || [&event.source, &event.destination, &event.backend].into_iter().flatten();
        let pods = || ends().filter_map(|end| end.pod.as_ref()).chain(&event.pod);
        let decisions = || [&event.egress, &event.ingress].into_iter().flatten();
        self.verdict.is_none_or(|verdict| event.verdict == verdict)
            && self.port.is_none_or(|port| ends().any(|end| end.port == port))
            && self
                .pod
                .as_ref()
                .is_none_or(|(namespace, name)| pods().any(|pod| pod.namespace == *namespace && pod.name == *name))
            && self.policy.as_ref().is_none_or(|wanted| {
                decisions().flat_map(|decision| &decision.policies).any(|policy| is_called(policy, wanted))
            })
    }
}

/// Whether a policy, written as `KIND NAMESPACE/NAME`, is called so: with its namespace or without.
fn is_called(policy: &str, wanted: &str) -> bool {
    let full = policy.rsplit(' ').next().unwrap_or(policy);
    full == wanted || full.rsplit('/').next() == Some(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(port: u32, pod: Option<&str>) -> Option<v1::FlowEnd> {
        let pod = pod.map(|name| v1::Pod { namespace: "shop".into(), name: name.into(), uid: String::new() });
        Some(v1::FlowEnd { address: "10.0.0.1".into(), port, pod })
    }

    fn decision(policies: &[&str]) -> Option<v1::FlowDecision> {
        let policies = policies.iter().map(ToString::to_string).collect();
        Some(v1::FlowDecision { allowed: true, reason: String::new(), policies })
    }

    fn event() -> v1::FlowEvent {
        v1::FlowEvent {
            verdict: ALLOWED.into(),
            source: end(40_000, Some("web-0")),
            destination: end(80, None),
            backend: end(8080, Some("db-0")),
            egress: decision(&[]),
            ingress: decision(&["NetworkPolicy shop/db", "ClusterNetworkPolicy guard"]),
            ..v1::FlowEvent::default()
        }
    }

    fn asks(change: impl FnOnce(&mut v1::WatchFlowsRequest)) -> bool {
        let mut request = v1::WatchFlowsRequest::default();
        change(&mut request);
        Filter::of(&request).unwrap().takes(&event())
    }

    #[test]
    fn each_condition_decides_alone_and_all_must_apply() {
        assert!(asks(|_| {}));
        assert!(asks(|r| r.verdict = "allowed".into()));
        assert!(!asks(|r| r.verdict = "dropped".into()));
        for (port, taken) in [(40_000, true), (80, true), (8080, true), (443, false)] {
            assert_eq!(asks(|r| r.port = port), taken, "{port}");
        }
        let pod = |namespace: &str, name: &str| {
            Some(v1::Pod { namespace: namespace.into(), name: name.into(), uid: String::new() })
        };
        for (wanted, taken) in [
            (pod("shop", "web-0"), true),
            (pod("shop", "db-0"), true),
            (pod("x", "web-0"), false),
            (pod("shop", "web"), false),
        ] {
            assert_eq!(asks(|r| r.pod.clone_from(&wanted)), taken, "{wanted:?}");
        }
        for (policy, taken) in
            [("shop/db", true), ("db", true), ("guard", true), ("x/db", false), ("NetworkPolicy", false), ("d", false)]
        {
            assert_eq!(asks(|r| r.policy = policy.into()), taken, "{policy}");
        }
        assert!(asks(|r| (r.port, r.verdict, r.policy) = (80, "allowed".into(), "db".into())));
        assert!(!asks(|r| (r.port, r.verdict, r.policy) = (80, "dropped".into(), "db".into())));
    }

    #[test]
    fn a_drop_is_its_interfaces_pods_too() {
        let pod = Some(v1::Pod { namespace: "shop".into(), name: "liar".into(), uid: "1".into() });
        let spoofed = v1::FlowEvent { verdict: DROPPED.into(), pod: pod.clone(), ..v1::FlowEvent::default() };
        let request = v1::WatchFlowsRequest { pod, ..v1::WatchFlowsRequest::default() };
        assert!(Filter::of(&request).unwrap().takes(&spoofed));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for request in [
            v1::WatchFlowsRequest { verdict: "denied".into(), ..Default::default() },
            v1::WatchFlowsRequest { port: 65_536, ..Default::default() },
        ] {
            assert!(Filter::of(&request).is_err(), "{request:?}");
        }
    }
}
