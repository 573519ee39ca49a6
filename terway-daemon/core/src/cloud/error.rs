//! Failed calls: what a cloud's code means for the caller, and what the user is told about it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::errors::{self, Code, Error};
use crate::ident::VSwitchId;

/// What a failed call means for the caller. The code alone decides, never the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Too many calls: the same call will pass later.
    Throttled,
    /// The vSwitch has no address left.
    VSwitchExhausted,
    /// A quota of the ENI, the instance or the account is full.
    Quota,
    /// The thing is not there (any more).
    NotFound,
    /// The thing is in a state that does not allow the call now.
    InvalidState,
    /// The credentials do not allow the call.
    Forbidden,
    /// The request itself is wrong; repeating it cannot help.
    Invalid,
    /// The cloud failed or did not answer: the outcome is unknown, and only the same `ClientToken` may be tried again.
    Unknown,
}

/// A failed OpenAPI or metadata call. Holds no secret: neither signatures nor keys get in here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudError {
    /// The action, such as `AssignPrivateIpAddresses`; [`CloudError::METADATA`] or [`CloudError::CREDENTIALS`] where it is none.
    pub action: String,
    /// What it means.
    pub class: ErrorClass,
    /// The cloud's own code, such as `InvalidVSwitchId.IpNotEnough`; empty when there was no answer. Of the metadata service it is
    /// the HTTP status.
    pub code: String,
    /// The cloud's own words.
    pub message: String,
    /// The cloud's request id, for its support; empty when there was no answer.
    pub request_id: String,
}

/// Codes in full: class, catalogue entry, and the name of the quota that is full.
///
/// Sources: ECS 2014-05-26 and VPC 2016-04-28 API references, "Error codes" of each action and "Common error codes"; the help pages on
/// Terway; the LingJun (EFLO) codes 1011, 1013 and 1017 are bare numbers.
const EXACT: &[(&str, ErrorClass, Code, &str)] = &[
    ("InvalidVSwitchId.IpNotEnough", ErrorClass::VSwitchExhausted, errors::VSWITCH_EXHAUSTED, ""),
    ("QuotaExceeded.PrivateIpAddress", ErrorClass::Quota, errors::ENI_ADDRESSES_FULL, "IPv4 addresses of an ENI"),
    ("InvalidOperation.Ipv4CountExceeded", ErrorClass::Quota, errors::ENI_ADDRESSES_FULL, "IPv4 addresses of an ENI"),
    ("InvalidOperation.Ipv6CountExceeded", ErrorClass::Quota, errors::ENI_ADDRESSES_FULL, "IPv6 addresses of an ENI"),
    ("EniPerInstanceLimitExceeded", ErrorClass::Quota, errors::ENI_SLOTS_FULL, "ENIs of the instance type"),
    ("MaxEniCountExceeded", ErrorClass::Quota, errors::ACCOUNT_ENI_QUOTA, "ENIs of the account in the region"),
    (
        "SecurityGroupInstanceLimitExceed",
        ErrorClass::Quota,
        errors::SECURITY_GROUP_FULL,
        "addresses in a security group",
    ),
    (
        "InvalidOperation.EniCountExceeded",
        ErrorClass::Quota,
        errors::SECURITY_GROUP_FULL,
        "ENIs in an advanced security group",
    ),
    ("1011", ErrorClass::Quota, errors::CLOUD_QUOTA, "LingJun ENIs or addresses"),
    ("InvalidEniId.NotFound", ErrorClass::NotFound, errors::ENI_UNKNOWN, ""),
    ("1013", ErrorClass::NotFound, errors::ENI_UNKNOWN, ""),
    ("InvalidEcsId.NotFound", ErrorClass::NotFound, errors::INSTANCE_UNKNOWN, ""),
    ("InvalidInstanceId.NotFound", ErrorClass::NotFound, errors::INSTANCE_UNKNOWN, ""),
    ("InvalidIp.IpUnassigned", ErrorClass::NotFound, errors::ADDRESS_UNKNOWN, ""),
    ("InvalidAllocationId.NotFound", ErrorClass::NotFound, errors::ADDRESS_UNKNOWN, ""),
    ("InvalidOperation.InvalidEniState", ErrorClass::InvalidState, errors::ENI_STATE, ""),
    ("Operation.Conflict", ErrorClass::InvalidState, errors::ENI_STATE, ""),
    ("1017", ErrorClass::InvalidState, errors::ENI_STATE, ""),
    ("InvalidOperation.InvalidEcsState", ErrorClass::InvalidState, errors::INSTANCE_STATE, ""),
    ("IncorrectInstanceStatus", ErrorClass::InvalidState, errors::INSTANCE_STATE, ""),
    ("ORDER.ARREARAGE", ErrorClass::Forbidden, errors::ACCOUNT_ARREARS, ""),
    ("PAY.INSUFFICIENT_BALANCE", ErrorClass::Forbidden, errors::ACCOUNT_ARREARS, ""),
    ("InvalidAccountStatus.NotEnoughBalance", ErrorClass::Forbidden, errors::ACCOUNT_ARREARS, ""),
    ("SignatureDoesNotMatch", ErrorClass::Forbidden, errors::CREDENTIALS_INVALID, ""),
    ("Abs.InvalidAccount.NotFound", ErrorClass::Forbidden, errors::CREDENTIALS_INVALID, ""),
    ("InvalidUserType.NotSupported", ErrorClass::Forbidden, errors::CLOUD_FORBIDDEN, ""),
    ("NoPermission", ErrorClass::Forbidden, errors::CLOUD_FORBIDDEN, ""),
    ("InvalidVSwitchId.NotFound", ErrorClass::Invalid, errors::VSWITCH_UNKNOWN, ""),
    ("InvalidVSwitch.IPv6NotTurnOn", ErrorClass::Invalid, errors::VSWITCH_NO_IPV6, ""),
    ("InvalidVSwitch.Ipv6NotTurnOn", ErrorClass::Invalid, errors::VSWITCH_NO_IPV6, ""),
    ("InvalidOperation.AvailabilityZoneMismatch", ErrorClass::Invalid, errors::VSWITCH_ELSEWHERE, ""),
    ("InvalidOperation.VpcMismatch", ErrorClass::Invalid, errors::SECURITY_GROUP_INVALID, ""),
    ("InvalidOperation.MultiGroupType", ErrorClass::Invalid, errors::SECURITY_GROUP_INVALID, ""),
    ("InvalidInstanceType.NotSupported", ErrorClass::Invalid, errors::INSTANCE_TYPE, ""),
    ("InvalidOperation.InstanceTypeNotSupport", ErrorClass::Invalid, errors::INSTANCE_TYPE, ""),
    // A token that the cloud has given up: repeating it fails for ever, and it had no effect.
    ("IdempotentFailed", ErrorClass::Invalid, errors::CLOUD_TOKEN_REFUSED, ""),
    ("IdempotentParameterMismatch", ErrorClass::Invalid, errors::CLOUD_TOKEN_REFUSED, ""),
    // Another call with the token, or with the nonce, got there first: its effect is to come or has come.
    ("IdempotentProcessing", ErrorClass::Unknown, errors::CLOUD_INTERNAL, ""),
    ("LastTokenProcessing", ErrorClass::Unknown, errors::CLOUD_INTERNAL, ""),
    ("SignatureNonceUsed", ErrorClass::Unknown, errors::CLOUD_INTERNAL, ""),
    ("InternalError", ErrorClass::Unknown, errors::CLOUD_INTERNAL, ""),
    ("ServiceUnavailable", ErrorClass::Unknown, errors::CLOUD_INTERNAL, ""),
];

/// Beginnings of codes, for what [`EXACT`] does not name.
const BEGINNINGS: &[(&str, ErrorClass, Code, &str)] = &[
    ("Throttling", ErrorClass::Throttled, errors::CLOUD_THROTTLED, ""),
    ("Forbidden", ErrorClass::Forbidden, errors::CLOUD_FORBIDDEN, ""),
    ("InvalidAccessKeyId", ErrorClass::Forbidden, errors::CREDENTIALS_INVALID, ""),
    ("InvalidSecurityToken", ErrorClass::Forbidden, errors::CREDENTIALS_EXPIRED, ""),
    ("InvalidTimeStamp", ErrorClass::Forbidden, errors::CLOCK_SKEW, ""),
    ("QuotaExceed", ErrorClass::Quota, errors::CLOUD_QUOTA, ""),
    ("InvalidSecurityGroupId", ErrorClass::Invalid, errors::SECURITY_GROUP_INVALID, ""),
];

fn meaning(code: &str) -> Option<&'static (&'static str, ErrorClass, Code, &'static str)> {
    EXACT
        .iter()
        .find(|(known, ..)| *known == code)
        .or_else(|| BEGINNINGS.iter().find(|(beginning, ..)| code.starts_with(beginning)))
}

impl CloudError {
    /// [`CloudError::action`] of the metadata service.
    pub const METADATA: &str = "metadata";
    /// [`CloudError::action`] when there is nothing to sign with.
    pub const CREDENTIALS: &str = "credentials";
    /// How [`CloudError::message`] begins when an answer came but cannot be read.
    pub const MALFORMED: &str = "malformed reply";

    /// The class of an OpenAPI error code.
    #[must_use]
    pub fn classify(code: &str) -> ErrorClass {
        match meaning(code) {
            Some((_, class, ..)) => *class,
            None if code.is_empty() => ErrorClass::Unknown,
            None => ErrorClass::Invalid,
        }
    }

    /// What the user is told.
    #[must_use]
    pub fn explain(&self) -> Error {
        Error::new(self.catalogued(), self.detail(None))
    }

    /// What the user is told about a call that concerned this vSwitch.
    #[must_use]
    pub fn explain_at(&self, vswitch: &VSwitchId) -> Error {
        Error::new(self.catalogued(), self.detail(Some(vswitch)))
    }

    fn catalogued(&self) -> Code {
        match (self.action.as_str(), self.class) {
            (Self::METADATA, _) => return errors::METADATA_UNREACHABLE,
            (Self::CREDENTIALS, ErrorClass::NotFound) => return errors::CREDENTIALS_MISSING,
            (Self::CREDENTIALS, ErrorClass::InvalidState) => return errors::CREDENTIALS_EXPIRED,
            (Self::CREDENTIALS, _) => return errors::CREDENTIALS_INVALID,
            _ => {}
        }
        // The HTTP status can overrule the code's class; then the entry of the code would mislead.
        if let Some((_, class, code, _)) = meaning(&self.code)
            && *class == self.class
        {
            return *code;
        }
        match self.class {
            ErrorClass::Throttled => errors::CLOUD_THROTTLED,
            ErrorClass::VSwitchExhausted => errors::VSWITCH_EXHAUSTED,
            ErrorClass::Quota => errors::CLOUD_QUOTA,
            ErrorClass::Forbidden => errors::CLOUD_FORBIDDEN,
            ErrorClass::Invalid => errors::CLOUD_REFUSED,
            // Without a code it is this daemon's own finding: an ENI that is not there, or does not get where it should.
            ErrorClass::NotFound => errors::ENI_UNKNOWN,
            ErrorClass::InvalidState => errors::ENI_STATE,
            ErrorClass::Unknown
                if self.code.is_empty() && self.request_id.is_empty() && !self.message.starts_with(Self::MALFORMED) =>
            {
                errors::CLOUD_UNREACHABLE
            }
            ErrorClass::Unknown => errors::CLOUD_INTERNAL,
        }
    }

    fn detail(&self, vswitch: Option<&VSwitchId>) -> String {
        let mut detail = String::new();
        // The cloud's words name the vSwitch mostly, not always.
        if let Some(vswitch) = vswitch.filter(|vswitch| !self.message.contains(vswitch.as_str())) {
            detail.extend(["vSwitch ", vswitch.as_str(), ": "]);
        }
        if let Some((.., quota)) = meaning(&self.code).filter(|(.., quota)| !quota.is_empty()) {
            detail.extend(["quota \"", quota, "\": "]);
        }
        detail + &self.without_request_id()
    }

    /// The id of the request is only for logs: in an error of an ADD it would keep kubelet from merging its events.
    fn without_request_id(&self) -> String {
        if self.code.is_empty() {
            format!("{}: {}", self.action, self.message)
        } else {
            format!("{}: {}: {}", self.action, self.code, self.message)
        }
    }
}

impl fmt::Display for CloudError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.without_request_id())?;
        if self.request_id.is_empty() { Ok(()) } else { write!(f, " (request {})", self.request_id) }
    }
}

impl std::error::Error for CloudError {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn error(action: &str, class: ErrorClass, code: &str, message: &str) -> CloudError {
        CloudError {
            action: action.into(),
            class,
            code: code.into(),
            message: message.into(),
            request_id: if code.is_empty() { String::new() } else { "R-1".into() },
        }
    }

    #[test]
    fn cloud_error_text_has_no_request_id() {
        let first =
            error("CreateNetworkInterface", ErrorClass::VSwitchExhausted, "InvalidVSwitchId.IpNotEnough", "no address");
        let second = CloudError { request_id: "R-2".into(), ..first.clone() };
        assert_eq!(first.explain(), second.explain());
        assert!(!first.explain().detail.contains("R-1"), "{}", first.explain().detail);
        assert!(first.to_string().ends_with("(request R-1)"), "the log keeps it: {first}");
    }

    /// Every code that the reference project acts on and every one that the help pages name.
    #[test]
    fn cloud_error_classes() {
        for (code, class, entry) in [
            ("Throttling", ErrorClass::Throttled, "TW0204"),
            ("Throttling.User", ErrorClass::Throttled, "TW0204"),
            ("InternalError", ErrorClass::Unknown, "TW0225"),
            ("Operation.Conflict", ErrorClass::InvalidState, "TW0231"),
            ("Forbidden.RAM", ErrorClass::Forbidden, "TW0205"),
            ("Forbidden.SubUser", ErrorClass::Forbidden, "TW0205"),
            ("InvalidVSwitchId.IpNotEnough", ErrorClass::VSwitchExhausted, "TW0202"),
            ("QuotaExceeded.PrivateIpAddress", ErrorClass::Quota, "TW0210"),
            ("QuotaExceeded.Something", ErrorClass::Quota, "TW0203"),
            ("EniPerInstanceLimitExceeded", ErrorClass::Quota, "TW0209"),
            ("MaxEniCountExceeded", ErrorClass::Quota, "TW0211"),
            ("SecurityGroupInstanceLimitExceed", ErrorClass::Quota, "TW0212"),
            ("InvalidIp.IpUnassigned", ErrorClass::NotFound, "TW0235"),
            ("InvalidEniId.NotFound", ErrorClass::NotFound, "TW0232"),
            ("InvalidEcsId.NotFound", ErrorClass::NotFound, "TW0229"),
            ("InvalidOperation.Ipv4CountExceeded", ErrorClass::Quota, "TW0210"),
            ("InvalidOperation.Ipv6CountExceeded", ErrorClass::Quota, "TW0210"),
            ("InvalidOperation.InvalidEniState", ErrorClass::InvalidState, "TW0231"),
            ("InvalidAllocationId.NotFound", ErrorClass::NotFound, "TW0235"),
            ("IdempotentFailed", ErrorClass::Invalid, "TW0227"),
            ("1013", ErrorClass::NotFound, "TW0232"),
            ("1011", ErrorClass::Quota, "TW0203"),
            ("1017", ErrorClass::InvalidState, "TW0231"),
            ("ORDER.ARREARAGE", ErrorClass::Forbidden, "TW0237"),
            ("PAY.INSUFFICIENT_BALANCE", ErrorClass::Forbidden, "TW0237"),
            ("InvalidSecurityToken.Expired", ErrorClass::Forbidden, "TW0220"),
            ("InvalidTimeStamp.Expired", ErrorClass::Forbidden, "TW0222"),
            ("SignatureDoesNotMatch", ErrorClass::Forbidden, "TW0219"),
            ("InvalidAccessKeyId.NotFound", ErrorClass::Forbidden, "TW0219"),
            ("InvalidSecurityGroupId.NotFound", ErrorClass::Invalid, "TW0213"),
            ("LastTokenProcessing", ErrorClass::Unknown, "TW0225"),
            ("SomethingNew", ErrorClass::Invalid, "TW0226"),
        ] {
            assert_eq!(CloudError::classify(code), class, "{code}");
            let told = error("X", class, code, "words").explain();
            assert_eq!(told.code.id, entry, "{code}");
            assert!(told.detail.contains(code) && !told.detail.contains("R-1"), "{}", told.detail);
        }
        assert_eq!(CloudError::classify(""), ErrorClass::Unknown);
    }

    #[test]
    fn cloud_error_without_code() {
        for (action, class, message, entry) in [
            ("AssignPrivateIpAddresses", ErrorClass::Unknown, "connection refused", "TW0224"),
            ("AssignPrivateIpAddresses", ErrorClass::Unknown, "malformed reply: x", "TW0225"),
            (CloudError::METADATA, ErrorClass::Unknown, "connection refused", "TW0223"),
            (CloudError::CREDENTIALS, ErrorClass::NotFound, "no role", "TW0221"),
            (CloudError::CREDENTIALS, ErrorClass::InvalidState, "expired", "TW0220"),
            (CloudError::CREDENTIALS, ErrorClass::Invalid, "encrypted", "TW0219"),
            ("DescribeNetworkInterfaces", ErrorClass::InvalidState, "eni-1 is Attaching", "TW0231"),
        ] {
            assert_eq!(error(action, class, "", message).explain().code.id, entry, "{action} {message}");
        }
        // HTTP 429 with a code of another class.
        assert_eq!(error("X", ErrorClass::Throttled, "SomethingNew", "w").explain().code.id, "TW0204");
    }

    #[test]
    fn cloud_error_names_vswitch_and_quota() {
        let vswitch = VSwitchId::from("vsw-1");
        let code = "InvalidVSwitchId.IpNotEnough";
        let silent = error("X", ErrorClass::VSwitchExhausted, code, "not enough").explain_at(&vswitch);
        assert_eq!(silent.detail, "vSwitch vsw-1: X: InvalidVSwitchId.IpNotEnough: not enough");
        let telling = error("X", ErrorClass::VSwitchExhausted, code, "\"vsw-1\" has not enough").explain_at(&vswitch);
        assert_eq!(telling.detail.matches("vsw-1").count(), 1);
        let quota = error("X", ErrorClass::Quota, "MaxEniCountExceeded", "w").explain();
        assert!(quota.detail.starts_with("quota \"ENIs of the account in the region\": X"), "{}", quota.detail);
    }

    #[test]
    fn cloud_error_codes_are_unique() {
        let codes: BTreeSet<&str> = EXACT.iter().map(|(code, ..)| *code).collect();
        assert_eq!(codes.len(), EXACT.len());
        for (n, (one, ..)) in BEGINNINGS.iter().enumerate() {
            assert!(!BEGINNINGS.iter().take(n).any(|(earlier, ..)| one.starts_with(earlier)), "{one}");
        }
    }
}
