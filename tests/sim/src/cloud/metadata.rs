//! The metadata service, 100.100.100.200 to its instance ("Instance metadata", ECS user guide).

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, Method, StatusCode};
use serde_json::json;
use terway_core::ident::Mac;

use super::Inner;
use super::describe::rfc3339;
use super::vpc::Vpc;

const TTL_HEADER: &str = "x-aliyun-ecs-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aliyun-ecs-metadata-token";

/// Tokens and role keys given out.
#[derive(Default)]
pub(super) struct Sessions {
    /// Token → whose it is and its end.
    tokens: BTreeMap<String, (String, SystemTime)>,
    /// Node → its present role keys.
    roles: BTreeMap<String, RoleKeys>,
    made: u64,
}

#[derive(Clone)]
struct RoleKeys {
    id: String,
    secret: String,
    token: String,
    until: SystemTime,
}

impl Sessions {
    /// Makes every token invalid, as a restart of the service does.
    pub(super) fn forget_tokens(&mut self) {
        self.tokens.clear();
    }

    /// The next request for role keys gets new ones.
    pub(super) fn forget_roles(&mut self) {
        self.roles.clear();
    }
}

pub(super) type Reply = (StatusCode, String);

fn refuse(status: StatusCode) -> Reply {
    (status, format!("<h1>{status}</h1>"))
}

/// Answers the instance that is `node`; `path` begins with `/latest/`.
pub(super) fn answer(inner: &Inner, node: &str, method: &Method, path: &str, headers: &HeaderMap) -> Reply {
    let now = inner.now();
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let mut sessions = inner.sessions.lock();
    if path == "/latest/api/token" {
        if method != Method::PUT {
            return refuse(StatusCode::METHOD_NOT_ALLOWED);
        }
        let ttl = header(TTL_HEADER).and_then(|ttl| ttl.parse::<u64>().ok()).filter(|ttl| (1..=21600).contains(ttl));
        let Some(ttl) = ttl else { return refuse(StatusCode::BAD_REQUEST) };
        sessions.made += 1;
        let token = format!("metadata-token-{:x}-{}", inner.seed, sessions.made);
        sessions.tokens.insert(token.clone(), (node.to_owned(), now + Duration::from_secs(ttl)));
        return (StatusCode::OK, token);
    }
    match header(TOKEN_HEADER) {
        None if inner.state.lock().config.require_metadata_token => return refuse(StatusCode::FORBIDDEN),
        None => {}
        Some(token) => match sessions.tokens.get(token) {
            Some((owner, until)) if owner == node && *until > now => {}
            _ => return refuse(StatusCode::UNAUTHORIZED),
        },
    }
    if method != Method::GET {
        return refuse(StatusCode::METHOD_NOT_ALLOWED);
    }
    let Some(item) = path.strip_prefix("/latest/meta-data/") else { return refuse(StatusCode::NOT_FOUND) };
    let found = match item.strip_prefix("ram/security-credentials/") {
        Some(role) => role_keys(inner, &mut sessions, node, role, now),
        None => item_of(&inner.state.lock(), node, item),
    };
    found.map_or_else(|| refuse(StatusCode::NOT_FOUND), |text| (StatusCode::OK, text))
}

fn role_keys(inner: &Inner, sessions: &mut Sessions, node: &str, asked: &str, now: SystemTime) -> Option<String> {
    let (role, lifetime) = {
        let vpc = inner.state.lock();
        let instance = vpc.config.instances.iter().find(|instance| instance.node == node)?;
        (instance.role.clone()?, Duration::from_millis(vpc.config.role_keys_ms))
    };
    if asked.is_empty() {
        return Some(role);
    }
    if asked != role {
        return None;
    }
    let present = sessions.roles.get(node).filter(|keys| keys.until > now + lifetime / 2).cloned();
    let keys = present.unwrap_or_else(|| {
        sessions.made += 1;
        let serial = format!("{:x}-{}", inner.seed, sessions.made);
        let keys = RoleKeys {
            id: format!("STS.sim-{serial}"),
            secret: format!("sts-secret-{serial}"),
            token: format!("sts-token-{serial}"),
            until: now + lifetime,
        };
        inner.keys.lock().insert_temporary(&keys.id, &keys.secret, &keys.token, keys.until);
        sessions.roles.insert(node.to_owned(), keys.clone());
        keys
    });
    let reply = json!({
        "Code": "Success",
        "AccessKeyId": keys.id,
        "AccessKeySecret": keys.secret,
        "SecurityToken": keys.token,
        "Expiration": humantime::format_rfc3339_millis(keys.until).to_string(),
        "LastUpdated": rfc3339(now),
    });
    Some(reply.to_string())
}

fn item_of(vpc: &Vpc, node: &str, item: &str) -> Option<String> {
    let instance = vpc.config.instances.iter().find(|instance| instance.node == node)?;
    let primary = vpc.primary_of(node)?;
    if let Some(tree) = item.strip_prefix("network/interfaces/macs") {
        return macs(vpc, node, tree.trim_start_matches('/'));
    }
    Some(match item {
        "instance-id" => instance.id.clone(),
        "instance/instance-type" => instance.instance_type.clone(),
        "region-id" => vpc.config.region.clone(),
        "zone-id" => vpc.vswitch(&instance.vswitch)?.zone.clone(),
        "mac" => primary.mac.to_string(),
        "hostname" => node.to_owned(),
        "private-ipv4" => primary.v4.first()?.to_string(),
        "vpc-id" => vpc.config.vpc.clone(),
        "vpc-cidr-block" => vpc.config.vpc_cidr.to_string(),
        "vswitch-id" => instance.vswitch.clone(),
        "vswitch-cidr-block" => vpc.vswitch(&instance.vswitch)?.cidr_v4.to_string(),
        _ => return None,
    })
}

/// The tree below `network/interfaces/macs/`: the NICs that have arrived.
fn macs(vpc: &Vpc, node: &str, path: &str) -> Option<String> {
    let seen = vpc.seen(vpc.config.metadata_lag_ms);
    let mut present = seen.values().filter(|eni| eni.plugged && eni.node.as_deref() == Some(node));
    if path.is_empty() {
        return Some(present.map(|eni| format!("{}/\n", eni.mac)).collect());
    }
    let (mac, leaf) = path.split_once('/')?;
    let mac: Mac = mac.parse().ok()?;
    let eni = present.find(|eni| eni.mac == mac)?;
    let vswitch = vpc.vswitch(&eni.vswitch)?;
    // The real service writes the one list with quotes and the other without.
    let quoted: Vec<String> = eni.v4.iter().map(|address| format!("\"{address}\"")).collect();
    let bare: Vec<String> = eni.v6.iter().map(ToString::to_string).collect();
    Some(match leaf {
        "network-interface-id" => eni.id.to_string(),
        "primary-ip-address" => eni.v4.first()?.to_string(),
        "private-ipv4s" => format!("[{}]", quoted.join(",")),
        "ipv6s" if !bare.is_empty() => format!("[{}]", bare.join(",")),
        "ipv4-prefixes" if !eni.v4_prefixes.is_empty() => lines(&eni.v4_prefixes),
        "ipv6-prefixes" if !eni.v6_prefixes.is_empty() => lines(&eni.v6_prefixes),
        "netmask" => vswitch.cidr_v4.mask().to_string(),
        "gateway" => vswitch.gateway_v4().to_string(),
        "ipv6-gateway" => vswitch.gateway_v6()?.to_string(),
        "vswitch-id" => eni.vswitch.clone(),
        "vswitch-cidr-block" => vswitch.cidr_v4.to_string(),
        "vswitch-ipv6-cidr-block" => vswitch.cidr_v6?.to_string(),
        "vpc-id" => vpc.config.vpc.clone(),
        "vpc-cidr-block" => vpc.config.vpc_cidr.to_string(),
        _ => return None,
    })
}

fn lines<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
