//! How to reach the cloud.

use std::collections::BTreeMap;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use reqwest::Url;

use super::CallObserver;
use super::Secret;

/// The address of the metadata service, the same in every region.
pub const METADATA: &str = "http://100.100.100.200";

/// Where the keys that sign come from.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CredentialSource {
    /// A fixed access key pair (`access_key`, `access_secret`).
    AccessKey {
        /// The public half.
        id: Secret,
        /// The secret half.
        secret: Secret,
    },
    /// The RAM role of the ECS instance, by the metadata service.
    RamRole {
        /// Its name; the instance's only role if empty.
        role: Option<String>,
    },
}

/// Which network the endpoints are reached by (`ALICLOUD_ENDPOINT_TYPE`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndpointNetwork {
    /// From inside a VPC, without a public address.
    #[default]
    Vpc,
    /// Through the Internet.
    Public,
}

/// How often and how fast a failed call is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Repetitions after the first attempt.
    pub times: usize,
    /// The first pause; it doubles each time, plus a random part of the same size.
    pub first: Duration,
    /// The longest pause before the random part is added.
    pub longest: Duration,
    /// No repetition begins later than this after the call began.
    pub within: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            times: 6,
            first: Duration::from_millis(200),
            longest: Duration::from_secs(5),
            within: Duration::from_secs(60),
        }
    }
}

impl Retry {
    pub(super) fn pauses(&self) -> ExponentialBackoff {
        ExponentialBuilder::default()
            .with_min_delay(self.first)
            .with_max_delay(self.longest)
            .with_max_times(self.times)
            .with_jitter()
            // backon's own seed is a constant without its `std` feature: all nodes would pause in step.
            .with_jitter_seed(fastrand::u64(..))
            .build()
    }
}

/// Everything [`Aliyun`](super::Aliyun) needs to know.
#[derive(Clone)]
pub struct EcsConfig {
    /// The region all calls concern, such as `cn-hangzhou`.
    pub region: String,
    /// The ECS endpoint; scheme `http` or `https`, no path.
    pub ecs_endpoint: Url,
    /// The VPC endpoint.
    pub vpc_endpoint: Url,
    /// The metadata service.
    pub metadata: Url,
    /// The keys.
    pub credentials: CredentialSource,
    /// Calls a minute by action, in place of the defaults (`rate_limit`); the empty name stands for every action not named.
    pub rate_limits: BTreeMap<String, u32>,
    /// The longest time for one exchange, connecting included.
    pub timeout: Duration,
    /// Repetition of failed calls.
    pub retry: Retry,
    /// The pause between two questions of [`Cloud::wait_eni`](super::Cloud::wait_eni); half of it is random.
    pub poll: Duration,
    /// Is told of every exchange.
    pub observer: Option<CallObserver>,
}

/// The endpoint or metadata address is no address.
#[derive(Debug, thiserror::Error)]
#[error("`{address}` is not an http or https address")]
pub struct BadEndpoint {
    address: String,
    source: Option<UrlError>,
}

/// reqwest re-exports the type but not the name of its error.
type UrlError = <Url as std::str::FromStr>::Err;

/// Parses an endpoint; `https` if it has no scheme.
///
/// # Errors
/// When it is not a host with an optional scheme and port.
pub fn endpoint(address: &str) -> Result<Url, BadEndpoint> {
    let bad = |source| BadEndpoint { address: address.to_owned(), source };
    let url = if address.contains("://") { address.parse() } else { format!("https://{address}").parse() };
    let url: Url = url.map_err(|error| bad(Some(error)))?;
    if matches!(url.scheme(), "http" | "https") && url.has_host() && url.path() == "/" && url.query().is_none() {
        Ok(url)
    } else {
        Err(bad(None))
    }
}

impl EcsConfig {
    /// The configuration of a region with its usual endpoints over HTTPS.
    ///
    /// # Errors
    /// When the region's name does not make a host name.
    pub fn for_region(
        region: &str,
        network: EndpointNetwork,
        credentials: CredentialSource,
    ) -> Result<Self, BadEndpoint> {
        // "Endpoints" pages of the ECS and VPC API references.
        let (ecs, vpc) = match network {
            EndpointNetwork::Vpc => {
                (format!("ecs-vpc.{region}.aliyuncs.com"), format!("vpc-vpc.{region}.aliyuncs.com"))
            }
            EndpointNetwork::Public => (format!("ecs.{region}.aliyuncs.com"), format!("vpc.{region}.aliyuncs.com")),
        };
        Ok(Self {
            region: region.to_owned(),
            ecs_endpoint: endpoint(&ecs)?,
            vpc_endpoint: endpoint(&vpc)?,
            metadata: endpoint(METADATA)?,
            credentials,
            rate_limits: BTreeMap::new(),
            timeout: Duration::from_secs(20),
            retry: Retry::default(),
            poll: Duration::from_secs(1),
            observer: None,
        })
    }
}

impl std::fmt::Debug for EcsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EcsConfig")
            .field("region", &self.region)
            .field("ecs_endpoint", &self.ecs_endpoint.as_str())
            .field("vpc_endpoint", &self.vpc_endpoint.as_str())
            .field("metadata", &self.metadata.as_str())
            .field("credentials", &self.credentials)
            .field("rate_limits", &self.rate_limits)
            .field("timeout", &self.timeout)
            .field("retry", &self.retry)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_have_a_scheme_and_no_path() {
        assert_eq!(endpoint("ecs.cn-hangzhou.aliyuncs.com").unwrap().as_str(), "https://ecs.cn-hangzhou.aliyuncs.com/");
        assert_eq!(endpoint("http://127.0.0.1:8080").unwrap().as_str(), "http://127.0.0.1:8080/");
        for bad in ["ftp://host", "https://host/path", "http://", "a b", "https://h/?q=1"] {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn pauses_grow_are_bounded_and_random() {
        let retry = Retry { times: 8, ..Retry::default() };
        let pauses: Vec<_> = retry.pauses().collect();
        assert_eq!(pauses.len(), 8);
        assert!(pauses.iter().all(|p| *p >= retry.first && *p <= retry.longest * 2), "{pauses:?}");
        assert_ne!(pauses, retry.pauses().collect::<Vec<_>>());
    }
}
