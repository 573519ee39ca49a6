//! Who calls: both signature methods, clocks, nonces, keys.
//!
//! "Request syntax and signature method V3" (ACS3-HMAC-SHA256) and "Signature method" of RPC APIs (HMAC-SHA1, version 1.0), Alibaba
//! Cloud SDK documentation. Written from those pages, not from the client under test.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use hmac::{Hmac, Mac};
use http::HeaderMap;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::reply::{Parameters, Refusal};

/// How far a caller's clock may be off.
const WINDOW: Duration = Duration::from_secs(15 * 60);

/// A request as it came in.
pub(super) struct Incoming<'a> {
    pub(super) method: &'a str,
    pub(super) path: &'a str,
    pub(super) query: &'a str,
    pub(super) headers: &'a HeaderMap,
    pub(super) body: &'a [u8],
}

/// A call by a caller who is known.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) action: String,
    pub(super) version: String,
    pub(super) parameters: Parameters,
}

struct Key {
    secret: String,
    /// The token that temporary keys come with, and their end.
    session: Option<(String, SystemTime)>,
}

/// All keys that the cloud knows and the nonces it has seen.
#[derive(Default)]
pub(super) struct Keys {
    keys: BTreeMap<String, Key>,
    nonces: HashMap<(String, String), SystemTime>,
}

/// What a request claims, whichever signature method it uses.
struct Claims {
    key: String,
    token: Option<String>,
    time: SystemTime,
    nonce: String,
}

impl Keys {
    pub(super) fn insert(&mut self, id: &str, secret: &str) {
        self.keys.insert(id.to_owned(), Key { secret: secret.to_owned(), session: None });
    }

    pub(super) fn insert_temporary(&mut self, id: &str, secret: &str, token: &str, until: SystemTime) {
        self.keys.insert(id.to_owned(), Key { secret: secret.to_owned(), session: Some((token.to_owned(), until)) });
    }

    pub(super) fn remove(&mut self, id: &str) {
        self.keys.remove(id);
    }

    /// Ends all temporary keys at once.
    pub(super) fn expire_temporary(&mut self, now: SystemTime) {
        for key in self.keys.values_mut() {
            if let Some((_, until)) = &mut key.session {
                *until = now;
            }
        }
    }

    /// Checks a request and takes it apart.
    pub(super) fn verify(&mut self, request: &Incoming<'_>, now: SystemTime) -> Result<Call, Refusal> {
        let mut pairs = decode(request.query);
        if header(request.headers, "content-type").is_some_and(|t| t.starts_with("application/x-www-form-urlencoded")) {
            pairs.extend(decode(&String::from_utf8_lossy(request.body)));
        }
        let parameters = Parameters::new(pairs.iter().cloned());
        match header(request.headers, "authorization") {
            Some(authorization) if authorization.starts_with("ACS3-HMAC-SHA256 ") => {
                self.acs3(request, authorization, now)?;
                let named =
                    |name| header(request.headers, name).map(str::to_owned).ok_or_else(|| Refusal::missing(name));
                Ok(Call { action: named("x-acs-action")?, version: named("x-acs-version")?, parameters })
            }
            _ => {
                self.rpc1(request, &pairs, &parameters, now)?;
                let named = |name| parameters.need(name).map(str::to_owned);
                Ok(Call { action: named("Action")?, version: named("Version")?, parameters })
            }
        }
    }

    fn acs3(&mut self, request: &Incoming<'_>, authorization: &str, now: SystemTime) -> Result<(), Refusal> {
        let incomplete =
            || Refusal::new(400, "IncompleteSignature", "The request signature does not conform to standards.");
        let fields: BTreeMap<&str, &str> = authorization
            .trim_start_matches("ACS3-HMAC-SHA256 ")
            .split(',')
            .filter_map(|field| field.trim().split_once('='))
            .collect();
        let field = |name: &str| fields.get(name).copied().ok_or_else(incomplete);
        let (key, signed, signature) = (field("Credential")?, field("SignedHeaders")?, field("Signature")?);
        let need = |name: &str| header(request.headers, name).ok_or_else(|| Refusal::missing(name));
        let names: Vec<&str> = signed.split(';').collect();
        let must =
            ["host", "x-acs-action", "x-acs-content-sha256", "x-acs-date", "x-acs-signature-nonce", "x-acs-version"];
        let sent = request.headers.keys().map(http::HeaderName::as_str).filter(|name| name.starts_with("x-acs-"));
        if must.into_iter().chain(sent).any(|name| !names.contains(&name)) || !names.is_sorted() {
            return Err(incomplete());
        }
        let claims = Claims {
            key: key.to_owned(),
            token: header(request.headers, "x-acs-security-token").map(str::to_owned),
            time: time(need("x-acs-date")?)?,
            nonce: need("x-acs-signature-nonce")?.to_owned(),
        };
        let hash = need("x-acs-content-sha256")?;
        if hash != hex::encode(Sha256::digest(request.body)) {
            return Err(signature_mismatch("x-acs-content-sha256 is not the hash of the body"));
        }
        let mut canonical = format!("{}\n{}\n{}\n", request.method, request.path, encode(&decode(request.query)));
        for name in &names {
            let _infallible = writeln!(canonical, "{name}:{}", need(name)?.trim());
        }
        let _infallible = write!(canonical, "\n{signed}\n{hash}");
        let to_sign = format!("ACS3-HMAC-SHA256\n{}", hex::encode(Sha256::digest(canonical)));
        self.admit(&claims, now, &to_sign, |secret| hex::encode(mac::<Hmac<Sha256>>(secret, &to_sign)) == signature)
    }

    fn rpc1(
        &mut self,
        request: &Incoming<'_>,
        pairs: &[(String, String)],
        parameters: &Parameters,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let claims = Claims {
            key: parameters.need("AccessKeyId")?.to_owned(),
            token: parameters.get("SecurityToken").map(str::to_owned),
            time: time(parameters.need("Timestamp")?)?,
            nonce: parameters.need("SignatureNonce")?.to_owned(),
        };
        let signature = parameters.need("Signature")?;
        for (name, value) in [("SignatureMethod", "HMAC-SHA1"), ("SignatureVersion", "1.0")] {
            if parameters.need(name)? != value {
                return Err(Refusal::invalid(name, "not supported"));
            }
        }
        let signed: Vec<(String, String)> = pairs.iter().filter(|(name, _)| name != "Signature").cloned().collect();
        let to_sign = format!("{}&%2F&{}", request.method, percent(&encode(&signed)));
        self.admit(&claims, now, &to_sign, |secret| {
            let digest = mac::<Hmac<Sha1>>(&format!("{secret}&"), &to_sign);
            base64::engine::general_purpose::STANDARD.encode(digest) == signature
        })
    }

    fn admit(
        &mut self,
        claims: &Claims,
        now: SystemTime,
        to_sign: &str,
        matches: impl Fn(&str) -> bool,
    ) -> Result<(), Refusal> {
        let unknown = || Refusal::new(404, "InvalidAccessKeyId.NotFound", "Specified access key is not found.");
        let key = self.keys.get(&claims.key).ok_or_else(unknown)?;
        let apart = now.duration_since(claims.time).unwrap_or_else(|ahead| ahead.duration());
        if apart > WINDOW {
            let message = "Specified time stamp or date value is expired.";
            return Err(Refusal::new(400, "InvalidTimeStamp.Expired", message));
        }
        match (&key.session, &claims.token) {
            (None, None) => {}
            (Some((token, until)), Some(shown)) if token == shown => {
                if *until <= now {
                    let message = "Specified SecurityToken is expired.";
                    return Err(Refusal::new(400, "InvalidSecurityToken.Expired", message));
                }
            }
            _ => {
                let message = "Specified SecurityToken mismatch with the AccessKey.";
                return Err(Refusal::new(400, "InvalidSecurityToken.MismatchWithAccessKey", message));
            }
        }
        if !matches(&key.secret) {
            return Err(signature_mismatch(&format!("server string to sign is: {to_sign}")));
        }
        self.nonces.retain(|_, seen| now.duration_since(*seen).is_ok_and(|age| age < 2 * WINDOW));
        if self.nonces.insert((claims.key.clone(), claims.nonce.clone()), now).is_some() {
            return Err(Refusal::new(400, "SignatureNonceUsed", "Specified signature nonce was used already."));
        }
        Ok(())
    }
}

fn signature_mismatch(what: &str) -> Refusal {
    let message = format!("Specified signature is not matched with our calculation. {what}");
    Refusal::new(400, "SignatureDoesNotMatch", message)
}

fn time(text: &str) -> Result<SystemTime, Refusal> {
    humantime::parse_rfc3339(text).map_err(|_parse| {
        Refusal::new(400, "InvalidTimeStamp.Format", "Specified time stamp or date value is not well formatted.")
    })
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn mac<M: Mac + hmac::digest::KeyInit>(key: &str, message: &str) -> Vec<u8> {
    <M as Mac>::new_from_slice(key.as_bytes())
        .map(|mac| mac.chain_update(message).finalize().into_bytes().to_vec())
        .unwrap_or_default()
}

fn decode(text: &str) -> Vec<(String, String)> {
    form_urlencoded::parse(text.as_bytes()).into_owned().collect()
}

fn encode(pairs: &[(String, String)]) -> String {
    let mut sorted: Vec<_> = pairs.iter().map(|(name, value)| (percent(name), percent(value))).collect();
    sorted.sort();
    sorted.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

fn percent(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            _ => {
                let _infallible = write!(out, "%{byte:02X}");
            }
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TESTED_AT: &str = "2016-02-23T12:46:24Z";
    /// The example request of the RPC signature page, key `testid` with secret `testsecret`.
    const EXAMPLE: &str = "Timestamp=2016-02-23T12%3A46%3A24Z&Format=XML&AccessKeyId=testid&Action=DescribeRegions&\
        SignatureMethod=HMAC-SHA1&SignatureNonce=3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf&Version=2014-05-26&SignatureVersion=1.0";

    fn verify(keys: &mut Keys, query: &str, at: &str) -> Result<Call, String> {
        let headers = HeaderMap::new();
        let request = Incoming { method: "GET", path: "/", query, headers: &headers, body: b"" };
        keys.verify(&request, humantime::parse_rfc3339(at).unwrap()).map_err(|refusal| refusal.code)
    }

    #[test]
    fn published_hmac_sha1_example_passes_once() {
        let mut keys = Keys::default();
        keys.insert("testid", "testsecret");
        let query = format!("{EXAMPLE}&Signature=OLeaidS1JvxuMvnyHOwuJ%2BuX5qY%3D");
        let call = verify(&mut keys, &query, TESTED_AT).unwrap();
        assert_eq!((call.action.as_str(), call.version.as_str()), ("DescribeRegions", "2014-05-26"));
        assert_eq!(verify(&mut keys, &query, TESTED_AT).unwrap_err(), "SignatureNonceUsed");
    }

    #[test]
    fn anything_else_is_refused_by_its_own_code() {
        let mut keys = Keys::default();
        keys.insert("testid", "other");
        let query = format!("{EXAMPLE}&Signature=OLeaidS1JvxuMvnyHOwuJ%2BuX5qY%3D");
        assert_eq!(verify(&mut keys, &query, TESTED_AT).unwrap_err(), "SignatureDoesNotMatch");
        assert_eq!(verify(&mut keys, &query, "2016-02-23T13:02:00Z").unwrap_err(), "InvalidTimeStamp.Expired");
        assert_eq!(verify(&mut keys, EXAMPLE, TESTED_AT).unwrap_err(), "MissingParameter");
        assert_eq!(verify(&mut Keys::default(), &query, TESTED_AT).unwrap_err(), "InvalidAccessKeyId.NotFound");
        assert_eq!(verify(&mut keys, "Action=X", TESTED_AT).unwrap_err(), "MissingParameter");
    }
}
