//! The metadata service: what an instance can ask about itself, without a key.
//!
//! Access is by token (the hardened mode); an instance whose service knows no tokens is asked without.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use ipnetwork::{Ipv4Network, Ipv6Network};
use reqwest::Url;
use serde::Deserialize;
use terway_core::cidr::{Cidr, Strict};
use terway_core::cloud::{CloudError, ErrorClass, NodeIdentity, Subnet};
use terway_core::ident::{EniId, InstanceId, Mac, VSwitchId};
use tokio::sync::Mutex;
use tracing::debug;

use super::Secret;
use super::config::Retry;
use super::credentials::Credentials;
use super::{CallObserver, ObservedCall, Result};

/// "Instance metadata", ECS user guide: 1 to 21600 seconds.
const TOKEN_TTL: &str = "21600";
const TOKEN_TTL_HEADER: &str = "x-aliyun-ecs-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aliyun-ecs-metadata-token";

/// An attached ENI as the metadata service shows it; it shows those only whose NIC has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Id of the ENI.
    pub id: EniId,
    /// The MAC it was asked by.
    pub mac: Mac,
    /// Its vSwitch.
    pub vswitch: VSwitchId,
    /// Its primary address.
    pub primary_v4: Ipv4Addr,
    /// Its IPv4 addresses, the primary one included.
    pub v4: Vec<Ipv4Addr>,
    /// Its IPv6 addresses.
    pub v6: Vec<Ipv6Addr>,
    /// Its IPv4 prefixes.
    pub v4_prefixes: Vec<Ipv4Network>,
    /// Its IPv6 prefixes.
    pub v6_prefixes: Vec<Ipv6Network>,
}

/// A client of the metadata service.
pub struct Metadata {
    http: reqwest::Client,
    base: Url,
    retry: Retry,
    observer: Option<CallObserver>,
    token: Mutex<Token>,
}

#[derive(Clone)]
enum Token {
    Missing,
    /// The attempt to get one failed, at this time.
    Failed(Instant, CloudError),
    /// The service answered that it knows no tokens.
    Unsupported,
    Held(Arc<Secret>),
}

impl Metadata {
    /// A client of the service at `base`, normally [`METADATA`](super::METADATA).
    ///
    /// # Errors
    /// When the HTTP client cannot be built.
    pub fn new(base: Url, timeout: Duration, retry: Retry, observer: Option<CallObserver>) -> Result<Self> {
        // The service is link-local: a proxy cannot reach it, and must not see its tokens.
        super::tls::ready();
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| failure(ErrorClass::Unknown, "", &format!("no HTTP client: {error}")))?;
        Ok(Self { http, base, retry, observer, token: Mutex::new(Token::Missing) })
    }

    /// Who this node is.
    ///
    /// # Errors
    /// When the service does not answer, or not sensibly.
    pub async fn node_identity(&self) -> Result<NodeIdentity> {
        let (instance, instance_type, region, zone, mac) = tokio::try_join!(
            self.text("instance-id"),
            self.text("instance/instance-type"),
            self.text("region-id"),
            self.text("zone-id"),
            self.parsed::<Mac>("mac"),
        )?;
        Ok(NodeIdentity { instance: InstanceId::new(instance), instance_type, region, zone, primary_mac: mac })
    }

    /// The MACs of all NICs that have arrived, the primary one included.
    ///
    /// # Errors
    /// When the service does not answer, or not sensibly.
    pub async fn macs(&self) -> Result<Vec<Mac>> {
        let path = "network/interfaces/macs/";
        let listing = self.text(path).await?;
        listing.lines().map(|line| parse(path, line.trim().trim_end_matches('/'))).collect()
    }

    /// The ENI with this MAC.
    ///
    /// # Errors
    /// `NotFound` when no such NIC has arrived; otherwise when the service does not answer, or not sensibly.
    pub async fn nic(&self, mac: Mac) -> Result<Nic> {
        let path = |leaf: &str| format!("network/interfaces/macs/{mac}/{leaf}");
        let (id, vswitch, primary, v4, v6) = (
            path("network-interface-id"),
            path("vswitch-id"),
            path("primary-ip-address"),
            path("private-ipv4s"),
            path("ipv6s"),
        );
        let (prefixes4, prefixes6) = (path("ipv4-prefixes"), path("ipv6-prefixes"));
        let (id, vswitch, primary_v4, v4s, v6s, v4_prefixes, v6_prefixes) = tokio::try_join!(
            self.text(&id),
            self.text(&vswitch),
            self.parsed(&primary),
            self.text(&v4),
            self.optional(&v6),
            self.optional(&prefixes4),
            self.optional(&prefixes6)
        )?;
        Ok(Nic {
            id: EniId::new(id),
            mac,
            vswitch: VSwitchId::new(vswitch),
            primary_v4,
            v4: list(&v4, &v4s)?,
            v6: list(&v6, &v6s.unwrap_or_default())?,
            v4_prefixes: blocks(&prefixes4, &v4_prefixes.unwrap_or_default())?,
            v6_prefixes: blocks(&prefixes6, &v6_prefixes.unwrap_or_default())?,
        })
    }

    /// The subnet of the ENI with this MAC.
    ///
    /// # Errors
    /// As [`Metadata::nic`].
    pub async fn subnet(&self, mac: Mac) -> Result<Subnet> {
        let path = |leaf: &str| format!("network/interfaces/macs/{mac}/{leaf}");
        let (block4, gateway4, block6, gateway6) =
            (path("vswitch-cidr-block"), path("gateway"), path("vswitch-ipv6-cidr-block"), path("ipv6-gateway"));
        let (cidr_v4, gateway_v4, cidr_v6, gateway_v6) = tokio::try_join!(
            self.parsed::<Strict<_>>(&block4),
            self.parsed(&gateway4),
            self.optional(&block6),
            self.optional(&gateway6)
        )?;
        let cidr_v6 = cidr_v6.map(|text| parse::<Strict<_>>(&block6, &text)).transpose()?.map(|Strict(block)| block);
        let gateway_v6 = gateway_v6.map(|text| parse(&gateway6, &text)).transpose()?;
        Ok(Subnet { cidr_v4: cidr_v4.0, gateway_v4, cidr_v6, gateway_v6 })
    }

    /// The instance's RAM role.
    ///
    /// # Errors
    /// `NotFound` when the instance has none.
    pub(super) async fn role(&self) -> Result<String> {
        let listing = self.text("ram/security-credentials/").await?;
        listing
            .lines()
            .map(str::trim)
            .find(|line| !line.is_empty())
            .map(str::to_owned)
            .ok_or_else(|| failure(ErrorClass::NotFound, "", "the instance has no RAM role"))
    }

    /// The present keys of a role.
    pub(super) async fn role_credentials(&self, role: &str) -> Result<Credentials> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Reply {
            code: String,
            access_key_id: Option<Secret>,
            access_key_secret: Option<Secret>,
            security_token: Option<Secret>,
            expiration: Option<String>,
        }
        let path = format!("ram/security-credentials/{role}");
        let reply: Reply = serde_json::from_str(&self.text(&path).await?)
            // The text holds keys: only the place of the mistake is told.
            .map_err(|error| malformed(&path, &format!("line {}, column {}", error.line(), error.column())))?;
        match reply {
            Reply {
                code,
                access_key_id: Some(id),
                access_key_secret: Some(secret),
                security_token: Some(token),
                expiration: Some(expiration),
            } if code == "Success" => {
                let expires = humantime::parse_rfc3339(&expiration)
                    .map_err(|error| malformed(&path, &format!("Expiration `{expiration}`: {error}")))?;
                Ok(Credentials { id, secret, token: Some(token), expires: Some(expires), reread: None })
            }
            Reply { code, .. } => Err(malformed(&path, &format!("code `{code}`, or a key is missing"))),
        }
    }

    async fn parsed<T: FromStr<Err: std::fmt::Display>>(&self, path: &str) -> Result<T> {
        parse(path, self.text(path).await?.trim())
    }

    /// `None` when the service does not know the path, or knows no value.
    async fn optional(&self, path: &str) -> Result<Option<String>> {
        match self.text(path).await {
            Ok(text) if text.is_empty() => Ok(None),
            Ok(text) => Ok(Some(text)),
            Err(error) if error.class == ErrorClass::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn text(&self, path: &str) -> Result<String> {
        let began = Instant::now();
        let mut pauses = self.retry.pauses();
        let mut renewed = false;
        loop {
            let error = match self.token().await {
                Ok(token) => match self.get(path, &token).await {
                    Ok(text) => return Ok(text.trim_end_matches('\n').to_owned()),
                    Err(error) if error.code == "401" && !renewed => {
                        renewed = true;
                        self.forget(&token).await;
                        continue;
                    }
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if !matches!(error.class, ErrorClass::Throttled | ErrorClass::Unknown) {
                return Err(error);
            }
            match pauses.next() {
                Some(pause) if began.elapsed() + pause < self.retry.within => tokio::time::sleep(pause).await,
                _ => return Err(error),
            }
        }
    }

    /// The lock is held while asking, so that many callers make one token, and share one failure.
    async fn token(&self) -> Result<Token> {
        let asked = Instant::now();
        let mut held = self.token.lock().await;
        if let Token::Failed(ended, error) = &*held
            && *ended >= asked
        {
            return Err(error.clone());
        }
        if matches!(*held, Token::Missing | Token::Failed(..)) {
            let url = self.url("latest/api/token")?;
            let request = self.http.put(url).header(TOKEN_TTL_HEADER, TOKEN_TTL);
            *held = match self.exchange("api/token", request).await {
                Ok(token) => Token::Held(Arc::new(Secret::new(token.trim()))),
                Err(error) if matches!(error.code.as_str(), "404" | "405") => Token::Unsupported,
                Err(error) => {
                    *held = Token::Failed(Instant::now(), error.clone());
                    return Err(error);
                }
            };
        }
        Ok(held.clone())
    }

    async fn forget(&self, used: &Token) {
        let mut held = self.token.lock().await;
        // Another caller may have replaced it already.
        let same = match (&*held, used) {
            (Token::Held(now), Token::Held(then)) => Arc::ptr_eq(now, then),
            (Token::Unsupported, Token::Unsupported) => true,
            _ => false,
        };
        if same {
            *held = Token::Missing;
        }
    }

    async fn get(&self, path: &str, token: &Token) -> Result<String> {
        let mut request = self.http.get(self.url(&format!("latest/meta-data/{path}"))?);
        if let Token::Held(token) = token {
            request = request.header(TOKEN_HEADER, token.expose());
        }
        self.exchange(path, request).await
    }

    fn url(&self, path: &str) -> Result<Url> {
        self.base.join(path).map_err(|error| failure(ErrorClass::Invalid, "", &format!("{path}: {error}")))
    }

    async fn exchange(&self, path: &str, request: reqwest::RequestBuilder) -> Result<String> {
        let began = Instant::now();
        let result = Self::receive(path, request).await;
        let duration = began.elapsed();
        if let Some(observer) = &self.observer {
            observer(&ObservedCall { api: CloudError::METADATA, error: result.as_ref().err(), duration });
        }
        debug!(path, ?duration, error = result.as_ref().err().map(tracing::field::display), "metadata");
        result
    }

    async fn receive(path: &str, request: reqwest::RequestBuilder) -> Result<String> {
        let lost =
            |error: reqwest::Error| failure(ErrorClass::Unknown, "", &format!("{path}: {}", without_address(error)));
        let reply = request.send().await.map_err(lost)?;
        let status = reply.status();
        let text = reply.text().await.map_err(lost)?;
        let class = match status {
            _ if status.is_success() => return Ok(text),
            StatusCode::NOT_FOUND => ErrorClass::NotFound,
            StatusCode::TOO_MANY_REQUESTS => ErrorClass::Throttled,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ErrorClass::Forbidden,
            _ if status.is_server_error() => ErrorClass::Unknown,
            _ => ErrorClass::Invalid,
        };
        Err(failure(class, status.as_str(), path))
    }
}

/// An HTTP error with its causes, and without the address: a query may hold what logs should not.
pub(super) fn without_address(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// `["10.0.0.1","10.0.0.2"]`; quotes and brackets are missing in some lists, and an empty list may be an empty text.
fn list<T: FromStr<Err: std::fmt::Display>>(path: &str, text: &str) -> Result<Vec<T>> {
    text.trim()
        .trim_start_matches('[')
        .trim_end_matches(']')
        .split([',', '\n'])
        .map(|item| item.trim().trim_matches('"'))
        .filter(|item| !item.is_empty())
        .map(|item| parse(path, item))
        .collect()
}

/// A list of CIDR blocks.
fn blocks<T: Cidr>(path: &str, text: &str) -> Result<Vec<T>> {
    list::<Strict<T>>(path, text).map(|list| list.into_iter().map(|Strict(block)| block).collect())
}

fn parse<T: FromStr<Err: std::fmt::Display>>(path: &str, text: &str) -> Result<T> {
    text.parse().map_err(|error: T::Err| malformed(path, &format!("`{text}`: {error}")))
}

fn malformed(path: &str, what: &str) -> CloudError {
    failure(ErrorClass::Unknown, "", &format!("{}: {path}: {what}", CloudError::MALFORMED))
}

fn failure(class: ErrorClass, code: &str, message: &str) -> CloudError {
    CloudError {
        action: CloudError::METADATA.to_owned(),
        class,
        code: code.to_owned(),
        message: message.to_owned(),
        request_id: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_come_with_and_without_quotes() {
        let v4: Vec<Ipv4Addr> = list("p", "[\"10.0.0.1\", \"10.0.0.2\"]").unwrap();
        assert_eq!(v4, [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)]);
        let v6: Vec<Ipv6Addr> = list("p", "[fd00::1,fd00::2]").unwrap();
        assert_eq!(v6.len(), 2);
        assert_eq!(list::<Ipv4Addr>("p", "[]").unwrap(), [] as [Ipv4Addr; 0]);
        assert_eq!(list::<Ipv4Addr>("p", "[nonsense]").unwrap_err().class, ErrorClass::Unknown);
    }
}
