//! The environment of a call: which verb, of which container, with which pod behind it.
//!
//! Rules: specification 1.1.0, "Parameters" and "CNI operations"; the forms of identifiers are those libcni checks
//! (pkg/utils/utils.go).

use std::ffi::OsString;
use std::fmt;

use crate::errors::{CNI_ENV, Error};
use crate::ident::PodRef;

/// Longest interface name in bytes: IFNAMSIZ of the kernel less its terminating zero (include/uapi/linux/if.h).
const IFNAME_MAX: usize = 15;

/// What the runtime asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Give a container a network.
    Add,
    /// Take it away.
    Del,
    /// Compare it with what was set up.
    Check,
    /// Take away all but the listed.
    Gc,
    /// Say whether an ADD could be served.
    Status,
    /// Say which versions are spoken.
    Version,
}

impl Verb {
    /// Every verb.
    pub const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    /// As it stands in `CNI_COMMAND`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A checked call. The plugin delegates to no other, so `CNI_PATH` is not looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// ADD.
    Add(Target),
    /// DEL. The netns may be empty: containerd and kubelet repeat a DEL without it.
    Del(Target),
    /// CHECK.
    Check(Target),
    /// GC.
    Gc,
    /// STATUS.
    Status,
    /// VERSION.
    Version,
}

/// The container that ADD, DEL and CHECK speak of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`, a path; empty only for DEL.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// The pod of `CNI_ARGS`; empty for a runtime without Kubernetes.
    pub pod: PodRef,
}

impl Request {
    /// The verb of the call.
    #[must_use]
    pub const fn verb(&self) -> Verb {
        match self {
            Self::Add(_) => Verb::Add,
            Self::Del(_) => Verb::Del,
            Self::Check(_) => Verb::Check,
            Self::Gc => Verb::Gc,
            Self::Status => Verb::Status,
            Self::Version => Verb::Version,
        }
    }

    /// Reads the call out of its environment. `None` when `CNI_COMMAND` is unset or empty: a human called.
    ///
    /// # Errors
    /// `TW0002` (CNI code 4) naming every variable that is missing or malformed.
    pub fn parse(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Option<Self>, Error> {
        let mut vars = Vars { lookup, problems: Vec::new() };
        let Some(command) = vars.text("CNI_COMMAND") else {
            return if vars.problems.is_empty() { Ok(None) } else { Err(vars.into_error()) };
        };
        let Some(verb) = Verb::ALL.into_iter().find(|verb| verb.as_str() == command) else {
            return Err(Error::new(
                CNI_ENV,
                format!("CNI_COMMAND is {command:?}, which is no verb of the specification."),
            ));
        };
        let request = match verb {
            Verb::Add => Self::Add(vars.target(verb)),
            Verb::Del => Self::Del(vars.target(verb)),
            Verb::Check => Self::Check(vars.target(verb)),
            Verb::Gc => Self::Gc,
            Verb::Status => Self::Status,
            Verb::Version => Self::Version,
        };
        if vars.problems.is_empty() { Ok(Some(request)) } else { Err(vars.into_error()) }
    }
}

/// The environment, and all that is wrong with it: a person who calls by hand wants the whole list at once.
struct Vars<F> {
    lookup: F,
    problems: Vec<String>,
}

impl<F: Fn(&str) -> Option<OsString>> Vars<F> {
    /// A variable that is set and not empty; runtimes set what they do not know to the empty string.
    fn text(&mut self, name: &str) -> Option<String> {
        match (self.lookup)(name)?.into_string() {
            Ok(text) => Some(text).filter(|text| !text.is_empty()),
            Err(raw) => {
                self.problems.push(format!("{name} is not UTF-8: {raw:?}"));
                None
            }
        }
    }

    fn required(&mut self, name: &str, fault: impl Fn(&str) -> Option<&'static str>) -> String {
        let before = self.problems.len();
        match self.text(name) {
            Some(text) => {
                if let Some(fault) = fault(&text) {
                    self.problems.push(format!("{name} {text:?} {fault}"));
                }
                text
            }
            None => {
                if self.problems.len() == before {
                    self.problems.push(format!("{name} is not set"));
                }
                String::new()
            }
        }
    }

    fn target(&mut self, verb: Verb) -> Target {
        let container_id = self.required("CNI_CONTAINERID", |id| {
            (!is_identifier(id)).then_some("is not of the form [A-Za-z0-9][A-Za-z0-9_.-]*")
        });
        let ifname = self.required("CNI_IFNAME", ifname_fault);
        // "Del" takes anything, "args" included: what cannot be read names nothing that is needed to take a network away.
        if verb == Verb::Del {
            let netns = (self.lookup)("CNI_NETNS").and_then(|path| path.into_string().ok()).unwrap_or_default();
            let args = (self.lookup)("CNI_ARGS").and_then(|args| args.into_string().ok()).unwrap_or_default();
            return Target { container_id, netns, ifname, pod: pod(&args).unwrap_or_default() };
        }
        let netns = self.required("CNI_NETNS", |path| (!path.starts_with('/')).then_some("is not an absolute path"));
        let args = self.text("CNI_ARGS").unwrap_or_default();
        let pod = pod(&args).unwrap_or_else(|problem| {
            self.problems.push(problem);
            PodRef::default()
        });
        Target { container_id, netns, ifname, pod }
    }

    fn into_error(self) -> Error {
        Error::new(CNI_ENV, format!("{}.", self.problems.join("; ")))
    }
}

/// Whether `text` has the form of a container id or a network name: a letter or digit, then letters, digits, `_`, `.`, `-`.
#[must_use]
pub fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// What keeps `name` from being an interface's: the specification's rules, which are those of the kernel's `dev_valid_name`
/// (net/core/dev.c), whose `isspace` takes 0xa0 for a blank in any encoding (lib/ctype.c).
fn ifname_fault(name: &str) -> Option<&'static str> {
    if name.len() > IFNAME_MAX {
        Some("is longer than 15 bytes")
    } else if matches!(name, "." | "..") {
        Some("is a folder's name")
    } else if name.bytes().any(|byte| matches!(byte, b'/' | b':')) {
        Some("holds a slash or a colon")
    } else if name.chars().any(char::is_whitespace) || name.bytes().any(|byte| byte == 0xa0) {
        Some("holds a blank")
    } else {
        None
    }
}

/// The pod of `CNI_ARGS`, whose pairs come in any order: containerd writes them in the order of a Go map.
///
/// As in the reference plugins (pkg/types/args.go), a key unknown here is an error unless `IgnoreUnknown` is set.
fn pod(args: &str) -> Result<PodRef, String> {
    let mut pod = PodRef::default();
    let mut ignore_unknown = false;
    let mut unknown = None;
    for pair in args.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(format!("CNI_ARGS holds {pair:?}, which is not KEY=VALUE"));
        };
        match key {
            "IgnoreUnknown" => ignore_unknown = matches!(value.to_ascii_lowercase().as_str(), "1" | "true"),
            "K8S_POD_NAMESPACE" => value.clone_into(&mut pod.namespace),
            "K8S_POD_NAME" => value.clone_into(&mut pod.name),
            "K8S_POD_UID" => value.clone_into(&mut pod.uid),
            // The sandbox id again, and an address request that this network does not grant.
            "K8S_POD_INFRA_CONTAINER_ID" | "IP" => {}
            _ => unknown = unknown.or(Some(key)),
        }
    }
    match unknown {
        Some(key) if !ignore_unknown => Err(format!("CNI_ARGS holds the unknown key {key:?} without IgnoreUnknown=1")),
        _ => Ok(pod),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::ffi::OsStringExt as _;

    use proptest::prelude::*;

    use super::*;

    const ADD: [(&str, &str); 5] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "f08c8dd0f4b2"),
        ("CNI_NETNS", "/var/run/netns/cni-1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", "K8S_POD_UID=u-1;IgnoreUnknown=1;X=y;K8S_POD_NAME=web-0;K8S_POD_NAMESPACE=a"),
    ];

    fn parse(changes: &[(&str, &str)]) -> Result<Option<Request>, Error> {
        let mut vars: BTreeMap<&str, &str> = ADD.into();
        vars.extend(changes.iter().copied());
        Request::parse(|name| vars.get(name).map(OsString::from))
    }

    fn problem(changes: &[(&str, &str)]) -> String {
        let error = parse(changes).unwrap_err();
        assert_eq!(error.code.cni, 4);
        error.detail
    }

    #[test]
    fn environment_of_containerd() {
        let Request::Add(target) = parse(&[]).unwrap().unwrap() else { panic!("not an ADD") };
        assert_eq!(target.container_id, "f08c8dd0f4b2");
        assert_eq!((target.netns.as_str(), target.ifname.as_str()), ("/var/run/netns/cni-1", "eth0"));
        assert_eq!(target.pod, PodRef { namespace: "a".into(), name: "web-0".into(), uid: "u-1".into() });
    }

    #[test]
    fn missing_cni_command() {
        assert_eq!(parse(&[("CNI_COMMAND", "")]), Ok(None));
        assert_eq!(Request::parse(|_| None), Ok(None));
    }

    #[test]
    fn missing_cni_variables_are_named() {
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
            assert_eq!(problem(&[(name, "")]), format!("{name} is not set."));
        }
        let all = problem(&[("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", "")]);
        assert_eq!(all.matches("is not set").count(), 3, "{all}");
        assert!(problem(&[("CNI_COMMAND", "add")]).starts_with("CNI_COMMAND is \"add\""));
    }

    #[test]
    fn container_id_and_ifname_syntax() {
        for id in ["-a", ".a", "_a", "a b", "a/b", "ä", "a:b"] {
            assert!(problem(&[("CNI_CONTAINERID", id)]).contains("CNI_CONTAINERID"), "{id}");
        }
        for id in ["a", "k8s.io-ctrcni1", "0_.-"] {
            assert!(parse(&[("CNI_CONTAINERID", id)]).is_ok(), "{id}");
        }
        for name in [".", "..", "a/b", "a:b", "a b", "a\tb", "sixteen-letters!", "b\u{e0}"] {
            assert!(problem(&[("CNI_IFNAME", name)]).contains("CNI_IFNAME"), "{name}");
        }
        assert!(parse(&[("CNI_IFNAME", "fifteen-letters")]).is_ok());
    }

    #[test]
    fn del_environment() {
        let bare = [("CNI_COMMAND", "DEL"), ("CNI_NETNS", ""), ("CNI_ARGS", "nonsense;;Z")];
        let Request::Del(target) = parse(&bare).unwrap().unwrap() else { panic!("not a DEL") };
        assert_eq!((target.netns.as_str(), target.pod), ("", PodRef::default()));
        for name in ["CNI_CONTAINERID", "CNI_IFNAME"] {
            assert!(parse(&[("CNI_COMMAND", "DEL"), (name, "")]).is_err());
        }
    }

    #[test]
    fn status_and_gc_environment() {
        for (verb, request) in [("GC", Request::Gc), ("STATUS", Request::Status), ("VERSION", Request::Version)] {
            let empty = [("CNI_COMMAND", verb), ("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", "")];
            assert_eq!(parse(&empty).unwrap().unwrap(), request);
            assert_eq!(request.verb().as_str(), verb);
        }
    }

    #[test]
    fn cni_args_ignore_unknown() {
        assert!(problem(&[("CNI_ARGS", "FOO=1")]).contains("\"FOO\""));
        assert!(problem(&[("CNI_ARGS", "FOO=1;IgnoreUnknown=0")]).contains("\"FOO\""));
        assert!(problem(&[("CNI_ARGS", "FOO")]).contains("KEY=VALUE"));
        for fine in ["FOO=1;IgnoreUnknown=true", "IgnoreUnknown=1;FOO==;", ";;", "IP=10.0.0.1", "K8S_POD_NAME="] {
            assert!(parse(&[("CNI_ARGS", fine)]).is_ok(), "{fine}");
        }
    }

    #[test]
    fn non_utf8_environment() {
        let vars = |name: &str| match name {
            "CNI_IFNAME" => Some(OsString::from_vec(vec![b'e', 0xff])),
            _ => ADD.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value)),
        };
        let error = Request::parse(vars).unwrap_err();
        assert!(
            error.detail.contains("CNI_IFNAME is not UTF-8") && !error.detail.contains("not set"),
            "{}",
            error.detail
        );
    }

    proptest! {
        #[test]
        fn any_environment_does_not_panic(
            verb in prop_oneof![Just("ADD"), Just("DEL"), Just("CHECK"), Just("GC"), Just("STATUS"), Just("VERSION"), Just("x")],
            values in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..40)), 5),
        ) {
            let names = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"];
            let vars = |name: &str| match name {
                "CNI_COMMAND" => Some(OsString::from(verb)),
                _ => names.iter().position(|n| *n == name).and_then(|i| values[i].clone()).map(OsString::from_vec),
            };
            match Request::parse(vars) {
                Ok(Some(Request::Add(t) | Request::Check(t))) => prop_assert!(is_identifier(&t.container_id) && !t.netns.is_empty()),
                Ok(Some(Request::Del(t))) => prop_assert!(is_identifier(&t.container_id) && !t.ifname.is_empty()),
                Ok(_) => {}
                Err(error) => prop_assert!(error.code.cni == 4 && error.detail.contains("CNI_")),
            }
        }
    }
}
