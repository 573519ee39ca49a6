//! Names of annotations and labels.

/// Annotation of a Service: how a backend is chosen. One of `random`, `least-connections`, `maglev`.
pub const ALGORITHM: &str = "terway.alibabacloud.com/load-balancing";
/// Annotation of a pod: its share of new connections, 0 to 100, by default 1. 0 takes it out of new choices.
pub const WEIGHT: &str = "terway.alibabacloud.com/weight";
/// Annotation of a Service whose load balancer sends to the pods' own addresses, if its value is `eni`.
pub const BACKEND_TYPE: &str = "service.beta.kubernetes.io/backend-type";
/// Label that gives a Service, or a slice, to another service proxy.
pub const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label of a Service, or a slice, that a service proxy must leave alone.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
