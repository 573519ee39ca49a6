//! Keys in files: a mounted Secret with a key pair, and the token file of managed clusters.

use std::io::ErrorKind;
use std::path::Path;
use std::time::SystemTime;

use serde::Deserialize;
use terway_core::cloud::{CloudError, ErrorClass};

use super::{Credentials, REREAD};
use crate::cloud::rpc::failure;
use crate::cloud::{Result, Secret};

/// A token file has some kilobytes.
const LONGEST: usize = 1 << 20;

/// `access-key-id` and `access-key-secret` in a folder; `None` unless both are there.
pub(super) async fn key_pair(folder: &Path) -> Result<Option<Credentials>> {
    let (id, secret) = (folder.join("access-key-id"), folder.join("access-key-secret"));
    let (Some(id_text), Some(secret_text)) = (read(&id).await?, read(&secret).await?) else { return Ok(None) };
    let trimmed = |text: &str| Some(Secret::new(text.trim())).filter(|secret| !secret.expose().is_empty());
    match (trimmed(&id_text), trimmed(&secret_text)) {
        (Some(id), Some(secret)) => {
            Ok(Some(Credentials { id, secret, token: None, expires: None, reread: Some(REREAD) }))
        }
        (None, _) => Err(unusable(&id, "is empty")),
        (_, None) => Err(unusable(&secret, "is empty")),
    }
}

/// A file of temporary keys (`credential_path`): JSON with `access_key_id`, `access_key_secret`, `security_token` and `expiration`.
///
/// Managed clusters encrypt theirs with a key that only the addon's image has (`{"ciphertext": …, "keyring": …}`): that form is
/// recognised and refused.
pub(super) async fn token(path: &Path, now: SystemTime) -> Result<Option<Credentials>> {
    #[derive(Deserialize)]
    struct File {
        #[serde(alias = "access.key.id", alias = "AccessKeyId")]
        access_key_id: Option<Secret>,
        #[serde(alias = "access.key.secret", alias = "AccessKeySecret")]
        access_key_secret: Option<Secret>,
        #[serde(alias = "security.token", alias = "SecurityToken")]
        security_token: Option<Secret>,
        #[serde(alias = "Expiration")]
        expiration: Option<String>,
        keyring: Option<serde::de::IgnoredAny>,
        ciphertext: Option<serde::de::IgnoredAny>,
    }
    let Some(text) = read(path).await? else { return Ok(None) };
    // The text holds keys: only the place of the mistake is told.
    let file: File = serde_json::from_str(&text).map_err(|error| {
        unusable(path, &format!("is no such JSON: line {}, column {}", error.line(), error.column()))
    })?;
    if file.keyring.is_some() || file.ciphertext.is_some() {
        return Err(unusable(
            path,
            "is encrypted, which is not supported: give the instance a RAM role and remove credential_path",
        ));
    }
    let File {
        access_key_id: Some(id),
        access_key_secret: Some(secret),
        security_token: Some(token),
        expiration: Some(expiration),
        ..
    } = file
    else {
        return Err(unusable(path, "lacks access_key_id, access_key_secret, security_token or expiration"));
    };
    let expires = humantime::parse_rfc3339(&expiration)
        .map_err(|error| unusable(path, &format!("has an expiration that is no RFC 3339 time: {error}")))?;
    if expires <= now {
        let message = format!("{}: expired at {expiration} and was not replaced", path.display());
        return Err(failure(CloudError::CREDENTIALS, ErrorClass::InvalidState, message));
    }
    Ok(Some(Credentials { id, secret, token: Some(token), expires: Some(expires), reread: Some(REREAD) }))
}

async fn read(path: &Path) -> Result<Option<String>> {
    match tokio::fs::read_to_string(path).await {
        Ok(text) if text.len() > LONGEST => Err(unusable(path, "is too long")),
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        // Says that it is no UTF-8, not what it is instead.
        Err(error) => Err(unusable(path, &format!("cannot be read: {error}"))),
    }
}

fn unusable(path: &Path, what: &str) -> CloudError {
    failure(CloudError::CREDENTIALS, ErrorClass::Invalid, format!("{} {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    async fn of(text: &str) -> Result<Option<Credentials>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        token(file.path(), NOW).await
    }

    #[tokio::test]
    async fn token_files_are_read_or_refused_for_what_is_wrong_with_them() {
        let good = r#"{"access_key_id":"STS.a","access_key_secret":"hush","security_token":"tok","expiration":"1970-01-01T01:00:00Z"}"#;
        let found = of(good).await.unwrap().unwrap();
        assert_eq!((found.id.expose(), found.secret.expose()), ("STS.a", "hush"));
        assert_eq!(found.expires, Some(NOW + Duration::from_secs(3600)));
        assert!(token(Path::new("/none/such"), NOW).await.unwrap().is_none());
        for (from, to, class, word) in [
            ("01:00:00Z", "00:00:00Z", ErrorClass::InvalidState, "expired"),
            ("01:00:00Z", "noon", ErrorClass::Invalid, "expiration"),
            ("\"hush\"", "31337", ErrorClass::Invalid, "line 1"),
            ("security_token", "x", ErrorClass::Invalid, "lacks"),
            ("\"STS.a\"", "\"AAAA\",\"keyring\":\"k\"", ErrorClass::Invalid, "encrypted"),
            ("{", "", ErrorClass::Invalid, "JSON"),
        ] {
            let error = of(&good.replacen(from, to, 1)).await.unwrap_err();
            assert_eq!(error.class, class, "{error}");
            assert!(error.message.contains(word), "{error}");
            assert!(!error.message.contains("hush") && !error.message.contains("31337"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_key_pair_is_both_files_or_none() {
        let folder = tempfile::tempdir().unwrap();
        assert!(key_pair(&folder.path().join("none")).await.unwrap().is_none());
        std::fs::write(folder.path().join("access-key-id"), "LTAI\n").unwrap();
        assert!(key_pair(folder.path()).await.unwrap().is_none());
        std::fs::write(folder.path().join("access-key-secret"), "\n").unwrap();
        assert!(key_pair(folder.path()).await.unwrap_err().message.contains("access-key-secret is empty"));
        std::fs::write(folder.path().join("access-key-secret"), "hush\n").unwrap();
        let found = key_pair(folder.path()).await.unwrap().unwrap();
        assert_eq!((found.id.expose(), found.secret.expose()), ("LTAI", "hush"));
    }
}
