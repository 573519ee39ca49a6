//! Documents as the API server writes them, read into the types.

use super::*;

fn read(kind: Kind, json: &str) -> Object {
    Object::read(kind, &mut serde_json::Deserializer::from_str(json)).unwrap()
}

#[test]
fn service_with_all_fields() {
    let Object::Service(service) = read(
        Kind::Service,
        r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop","uid":"u1","resourceVersion":"7",
            "annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{}","service.beta.kubernetes.io/backend-type":"eni"}},
          "spec":{"type":"LoadBalancer","clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10","fd00::a"],"externalIPs":null,
            "ports":[{"name":"http","port":80,"targetPort":"http","nodePort":30080,"protocol":"TCP","appProtocol":null},{"name":"dns","port":53,"protocol":"UDP","targetPort":5353}],
            "selector":{"app":"web"},"sessionAffinity":"ClientIP","externalTrafficPolicy":"Local","internalTrafficPolicy":"Cluster",
            "loadBalancerSourceRanges":[" 10.0.0.1/8 "],"healthCheckNodePort":31000,"trafficDistribution":"PreferSomethingNew"},
          "status":{"loadBalancer":{"ingress":[{"ip":"47.1.2.3","ipMode":"Proxy"},{"hostname":"x.example"}]}}}"#,
    ) else {
        panic!("kind")
    };
    assert_eq!(service.meta.object, ObjectName::new("shop", "web"));
    assert_eq!(service.meta.annotations.iter().len(), 1, "only what is used is kept");
    assert_eq!(service.kind, ServiceType::LoadBalancer);
    assert_eq!(service.cluster_ips.len(), 2);
    assert_eq!(service.affinity_seconds, Some(10_800));
    assert_eq!(service.source_ranges, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(service.ports[1].protocol, Protocol::Udp);
    assert_eq!(service.ports[0].target_port, Some(IntOrString::Name("http".into())));
    assert_eq!(service.ingress[0].ip_mode, IpMode::Proxy);
    assert_eq!(service.ingress[1].ip, None);
    assert_eq!(service.distribution, Some(TrafficDistribution::Other));
    assert!(!service.headless && service.has_selector);
}

#[test]
fn service_defaults() {
    let Object::Service(bare) =
        read(Kind::Service, r#"{"metadata":{"name":"a"},"spec":{"clusterIP":"10.0.0.1","ports":[{"port":1}]}}"#)
    else {
        panic!("kind")
    };
    assert_eq!(&*bare.meta.object.namespace, "default");
    assert_eq!((bare.kind, bare.internal_policy, bare.external_policy), Default::default());
    assert_eq!((bare.affinity_seconds, &*bare.ports[0].name, bare.ports[0].protocol), (None, "", Protocol::Tcp));
    let Object::Service(headless) =
        read(Kind::Service, r#"{"metadata":{"name":"a"},"spec":{"clusterIP":"None","clusterIPs":["None"]}}"#)
    else {
        panic!("kind")
    };
    assert!(headless.headless && headless.cluster_ips.is_empty());
}

#[test]
fn endpoint_condition_defaults() {
    let Object::EndpointSlice(slice) = read(
        Kind::EndpointSlice,
        r#"{"metadata":{"name":"web-1","namespace":"shop","labels":{"kubernetes.io/service-name":"web"}},"addressType":"IPv4",
          "endpoints":[{"addresses":["10.1.0.1"],"conditions":{}},
            {"addresses":["10.1.0.2"],"conditions":{"ready":false},"nodeName":"n1","zone":"z1","hints":{"forZones":[{"name":"z1"}]}},
            {"addresses":["10.1.0.3"],"conditions":{"ready":false,"serving":true,"terminating":true},
             "deprecatedTopology":{"topology.kubernetes.io/zone":"z2"},"targetRef":{"kind":"Pod","namespace":"shop","name":"web-x"}}],
          "ports":[{"name":null,"port":8080,"protocol":"TCP"}]}"#,
    ) else {
        panic!("kind")
    };
    assert_eq!(slice.service().map(|name| &**name), Some("web"));
    let seen: Vec<_> = slice.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating)).collect();
    assert_eq!(seen, [(true, true, false), (false, false, false), (false, true, true)]);
    assert_eq!(slice.endpoints[1].hints.as_ref().map(|h| h.zones.len()), Some(1));
    assert_eq!(slice.endpoints[2].zone.as_deref(), Some("z2"));
    assert_eq!((&*slice.ports[0].name, slice.ports[0].port), ("", Some(8080)));
    let empty = read(
        Kind::EndpointSlice,
        r#"{"metadata":{"name":"e"},"addressType":"FQDN","endpoints":[{"addresses":["a.b"]}],"ports":null}"#,
    );
    assert!(matches!(empty, Object::EndpointSlice(s) if s.endpoints.is_empty() && s.ports.is_empty()));
}

#[test]
fn container_ports_of_sidecars_and_init_containers() {
    let Object::Pod(pod) = read(
        Kind::Pod,
        r#"{"metadata":{"name":"p","labels":{"app":"x"},"deletionTimestamp":"2026-01-01T00:00:00Z"},
          "spec":{"nodeName":"n1","containers":[{"name":"c","ports":[{"name":"web","containerPort":80,"hostPort":8080,"hostIP":"0.0.0.0"}]}],
            "initContainers":[{"name":"i","ports":[{"containerPort":1}]},{"name":"s","restartPolicy":"Always","ports":[{"containerPort":2,"protocol":"UDP"}]}]},
          "status":{"phase":"Running","podIP":"10.0.0.9","podIPs":[{"ip":"10.0.0.9"},{"ip":"fd00::9"}]}}"#,
    ) else {
        panic!("kind")
    };
    assert_eq!(pod.ports.iter().map(|p| (p.port, p.host_port)).collect::<Vec<_>>(), [(80, 8080), (2, 0)]);
    assert_eq!(pod.ips.len(), 2);
    assert!(pod.meta.deleting && pod.holds_addresses());
}

#[test]
fn policy_types_default() {
    let isolation = |spec: &str| {
        let Object::NetworkPolicy(p) =
            read(Kind::NetworkPolicy, &format!(r#"{{"metadata":{{"name":"p"}},"spec":{spec}}}"#))
        else {
            panic!("kind")
        };
        (p.isolates(Direction::Ingress), p.isolates(Direction::Egress))
    };
    assert_eq!(isolation(r#"{"podSelector":{}}"#), (true, false));
    assert_eq!(isolation(r#"{"podSelector":{},"egress":[{}]}"#), (true, true));
    assert_eq!(isolation(r#"{"podSelector":{},"policyTypes":["Egress"]}"#), (false, true));
}

#[test]
fn unknown_fields_of_cluster_network_policy() {
    let Object::ClusterNetworkPolicy(policy) = read(
        Kind::ClusterNetworkPolicy,
        r#"{"metadata":{"name":"p","namespace":"ignored"},"spec":{"tier":"Admin","priority":10,"subject":{"namespaces":{}},
          "ingress":[{"name":"r","action":"Deny","from":[{"newField":{}},{"pods":{"podSelector":{"matchLabels":{"a":"b"}}}}],
            "protocols":[{"tcp":{"destinationPort":{"number":80}}},{"udp":{"destinationPort":{"range":{"start":1,"end":9}}}},{"icmp":{}},{"destinationNamedPort":"web"},{"sctp":{}}]}],
          "egress":[{"action":"Pass","to":[{"networks":["10.0.0.0/8"]},{"nodes":{}},{"domainNames":["*.x.io"]}]}]}}"#,
    ) else {
        panic!("kind")
    };
    assert_eq!(&*policy.meta.object.namespace, "");
    assert_eq!(policy.ingress[0].peers[0], ClusterIngressPeer::Unknown);
    let any = |protocol, ports| ClusterProtocol::Port(ClusterPort { protocol, ports });
    assert_eq!(
        policy.ingress[0].protocols,
        [
            any(Protocol::Tcp, PortMatch::One(80)),
            any(Protocol::Udp, PortMatch::Range(1, 9)),
            ClusterProtocol::Unknown,
            ClusterProtocol::NamedPort("web".into()),
            any(Protocol::Sctp, PortMatch::Any),
        ]
    );
    assert!(matches!(policy.egress[0].peers[1], ClusterEgressPeer::Nodes(_)));
}

#[test]
fn label_selectors() {
    let labels: Labels = [("app", "web"), ("tier", "front")].into_iter().collect();
    let selector = |json: &str| serde_json::from_str::<LabelSelector>(json).unwrap();
    for (json, expected) in [
        ("{}", true),
        (r#"{"matchLabels":{"app":"web"}}"#, true),
        (r#"{"matchLabels":{"app":"db"}}"#, false),
        (r#"{"matchExpressions":[{"key":"app","operator":"In","values":["db","web"]}]}"#, true),
        (r#"{"matchExpressions":[{"key":"none","operator":"NotIn","values":["x"]}]}"#, true),
        (r#"{"matchExpressions":[{"key":"app","operator":"NotIn","values":["web"]}]}"#, false),
        (r#"{"matchExpressions":[{"key":"tier","operator":"Exists"},{"key":"x","operator":"DoesNotExist"}]}"#, true),
    ] {
        assert_eq!(selector(json).matches(&labels), expected, "{json}");
        selector(json).check().unwrap();
    }
    for bad in [
        r#"{"matchExpressions":[{"key":"a","operator":"In"}]}"#,
        r#"{"matchExpressions":[{"key":"a","operator":"Exists","values":["x"]}]}"#,
        r#"{"matchLabels":{"-a":"x"}}"#,
        r#"{"matchLabels":{"UPPER/a":"x"}}"#,
        r#"{"matchLabels":{"a":"x y"}}"#,
    ] {
        assert!(selector(bad).check().is_err(), "{bad}");
    }
}

#[test]
fn store_reports_changes_and_shares_labels() {
    let pod = |name: &str, ip: &str| {
        let json =
            format!(r#"{{"metadata":{{"name":"{name}","labels":{{"app":"web"}}}},"status":{{"podIP":"{ip}"}}}}"#);
        Box::new(read(Kind::Pod, &json))
    };
    let mut objects = Objects::default();
    assert!(matches!(
        objects.apply(Change::Upsert(pod("a", "10.0.0.1"))),
        Some(Applied::Pod(Delta { old: None, new: Some(_), .. }))
    ));
    assert_eq!(objects.apply(Change::Upsert(pod("a", "10.0.0.1"))), None, "no news is no change");
    assert!(matches!(
        objects.apply(Change::Upsert(pod("a", "10.0.0.2"))),
        Some(Applied::Pod(Delta { old: Some(_), .. }))
    ));
    objects.apply(Change::Upsert(pod("b", "10.0.0.3")));
    let mut pods = objects.pods().values();
    let (a, b) = (pods.next().unwrap(), pods.next().unwrap());
    assert!(std::ptr::eq(a.meta.labels.get("app").unwrap(), b.meta.labels.get("app").unwrap()));

    let applied = objects.replace(Kind::Pod, vec![*pod("b", "10.0.0.3"), *pod("c", "10.0.0.4")]);
    assert_eq!(applied.len(), 2, "c came, a went, b stayed as it was");
    assert_eq!(objects.pods().len(), 2);
    let key = ObjectKey { kind: Kind::Pod, name: ObjectName::new("default", "zzz") };
    assert_eq!(objects.apply(Change::Delete(key)), None);
}

#[test]
fn interner_drops_unused_labels() {
    let mut interner = Interner::default();
    for i in 0..10_000 {
        let labels: Labels = [("pod", i.to_string())].into_iter().collect();
        drop(interner.labels(&labels));
    }
    assert!(interner.len() < 4096, "{} strings and sets are still held", interner.len());
}

#[test]
fn endpoint_slice_v1beta1_names_node_and_zone_in_its_topology() {
    assert_eq!(Kind::find("discovery.k8s.io/v1beta1", "EndpointSlice"), Some(Kind::EndpointSlice));
    assert_eq!(Kind::find("discovery.k8s.io/v1beta1", "Pod"), None);
    let Object::EndpointSlice(slice) = read(
        Kind::EndpointSlice,
        r#"{"apiVersion":"discovery.k8s.io/v1beta1","kind":"EndpointSlice","metadata":{"name":"web-1","namespace":"shop"},"addressType":"IPv4",
          "endpoints":[{"addresses":["10.1.0.1"],"conditions":{"ready":true},
            "topology":{"kubernetes.io/hostname":"n1","topology.kubernetes.io/region":"r","topology.kubernetes.io/zone":"z"}}],
          "ports":[{"name":"","port":80,"protocol":"TCP"}]}"#,
    ) else {
        panic!("kind")
    };
    let endpoint = &slice.endpoints[0];
    assert_eq!((endpoint.node.as_deref(), endpoint.zone.as_deref(), endpoint.ready), (Some("n1"), Some("z"), true));
}
