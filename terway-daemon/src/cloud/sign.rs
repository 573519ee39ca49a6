//! The signature ACS3-HMAC-SHA256 ("Request syntax and signature method V3", Alibaba Cloud SDK documentation).

use std::fmt::Write as _;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use super::Secret;

const ALGORITHM: &str = "ACS3-HMAC-SHA256";

/// What is signed of a request.
pub(super) struct Signable<'a> {
    /// `GET`, `POST`, …
    pub(super) method: &'a str,
    /// The path, `/` for RPC-style actions.
    pub(super) path: &'a str,
    /// The query exactly as it goes out, from [`canonical_query`].
    pub(super) query: &'a str,
    /// The headers to sign, names in lower case, ordered by name: `host`, `content-type` and all `x-acs-*`.
    pub(super) headers: &'a [(&'a str, &'a str)],
    /// `x-acs-content-sha256`: the hash of the body.
    pub(super) payload_hash: &'a str,
}

/// The value of the `Authorization` header.
pub(super) fn authorization(request: &Signable<'_>, key_id: &str, key: &Secret) -> String {
    debug_assert!(request.headers.is_sorted_by(|a, b| a.0 < b.0), "the signature covers the headers in order");
    let names: Vec<&str> = request.headers.iter().map(|(name, _)| *name).collect();
    let names = names.join(";");
    let mut canonical = format!("{}\n{}\n{}\n", request.method, request.path, request.query);
    for (name, value) in request.headers {
        canonical.extend([name, ":", value.trim(), "\n"]);
    }
    canonical.extend(["\n", &names, "\n", request.payload_hash]);
    let to_sign = format!("{ALGORITHM}\n{}", sha256_hex(canonical.as_bytes()));
    let signature = hmac_hex(key.expose().as_bytes(), to_sign.as_bytes());
    format!("{ALGORITHM} Credential={key_id},SignedHeaders={names},Signature={signature}")
}

/// Parameters as a query: ordered by name, percent-encoded by RFC 3986 (unreserved characters only stay as they are).
pub(super) fn canonical_query(parameters: &[(String, String)]) -> String {
    let mut sorted: Vec<&(String, String)> = parameters.iter().collect();
    sorted.sort();
    let mut query = String::new();
    for (name, value) in sorted {
        if !query.is_empty() {
            query.push('&');
        }
        percent_encode(&mut query, name);
        query.push('=');
        percent_encode(&mut query, value);
    }
    query
}

/// The lower-case hexadecimal SHA-256.
pub(super) fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn hmac_hex(key: &[u8], message: &[u8]) -> String {
    // A key of any length is accepted; the error type exists for other MACs.
    Hmac::<Sha256>::new_from_slice(key)
        .map(|mac| hex::encode(mac.chain_update(message).finalize().into_bytes()))
        .unwrap_or_default()
}

fn percent_encode(out: &mut String, text: &str) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _infallible = write!(out, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example with fixed parameters of the documentation page named above.
    #[test]
    fn published_example() {
        let query = canonical_query(&[
            ("RegionId".into(), "cn-shanghai".into()),
            ("ImageId".into(), "win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd".into()),
        ]);
        assert_eq!(query, "ImageId=win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd&RegionId=cn-shanghai");
        let payload_hash = sha256_hex(b"");
        assert_eq!(payload_hash, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        let request = Signable {
            method: "POST",
            path: "/",
            query: &query,
            headers: &[
                ("host", "ecs.cn-shanghai.aliyuncs.com"),
                ("x-acs-action", "RunInstances"),
                ("x-acs-content-sha256", &payload_hash),
                ("x-acs-date", "2023-10-26T10:22:32Z"),
                ("x-acs-signature-nonce", "3156853299f313e23d1673dc12e1703d"),
                ("x-acs-version", "2014-05-26"),
            ],
            payload_hash: &payload_hash,
        };
        assert_eq!(
            authorization(&request, "YourAccessKeyId", &Secret::new("YourAccessKeySecret")),
            "ACS3-HMAC-SHA256 Credential=YourAccessKeyId,\
             SignedHeaders=host;x-acs-action;x-acs-content-sha256;x-acs-date;x-acs-signature-nonce;x-acs-version,\
             Signature=06563a9e1b43f5dfe96b81484da74bceab24a1d853912eee15083a6f0f3283c0"
        );
    }

    #[test]
    fn encodes_all_but_unreserved() {
        let pairs = [("Tag.1.Key".to_owned(), "a b*~/+é=&".to_owned()), ("B".to_owned(), String::new())];
        assert_eq!(canonical_query(&pairs), "B=&Tag.1.Key=a%20b%2A~%2F%2B%C3%A9%3D%26");
    }
}
