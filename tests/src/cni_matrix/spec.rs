//! The specification as a table: what has to come of each verb in each situation.

use std::time::Duration;

use super::{Claims, HANGS, VERSIONS};

/// What the runtime asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    pub(super) const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    /// "CHECK" came with 0.4.0, "GC" and "STATUS" with 1.1.0.
    pub(super) fn exists_in(self, version: &str) -> bool {
        match self {
            Self::Add | Self::Del | Self::Version => true,
            Self::Check => !version.starts_with("0.3."),
            Self::Gc | Self::Status => version == "1.1.0",
        }
    }

    pub(super) const fn has_container(self) -> bool {
        matches!(self, Self::Add | Self::Del | Self::Check)
    }

    /// "CNI operations": the required environment parameters of each verb.
    pub(super) const fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME"],
            Self::Gc | Self::Status | Self::Version => &[],
        }
    }
}

/// What is special about a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Situation {
    Good,
    MissingEnv(&'static str),
    BadContainerId,
    BadIfname,
    NoCommand,
    UnknownCommand,
    BadJson,
    NoStdin,
    UnknownVersion,
    BadName,
    UnknownField,
    AbsentNetns,
    FalseNetns,
    OwnNetns,
    EmptyNetns,
    NoPrevResult,
    UnknownContainer,
    NoList,
    Stale,
    Repeated,
    Concurrent,
    Namesake,
    DaemonDown,
    DaemonSlow,
}

impl Situation {
    pub(super) const ALL: [Self; 26] = [
        Self::Good,
        Self::MissingEnv("CNI_CONTAINERID"),
        Self::MissingEnv("CNI_NETNS"),
        Self::MissingEnv("CNI_IFNAME"),
        Self::BadContainerId,
        Self::BadIfname,
        Self::NoCommand,
        Self::UnknownCommand,
        Self::BadJson,
        Self::NoStdin,
        Self::UnknownVersion,
        Self::BadName,
        Self::UnknownField,
        Self::AbsentNetns,
        Self::FalseNetns,
        Self::OwnNetns,
        Self::EmptyNetns,
        Self::NoPrevResult,
        Self::UnknownContainer,
        Self::NoList,
        Self::Stale,
        Self::Repeated,
        Self::Concurrent,
        Self::Namesake,
        Self::DaemonDown,
        Self::DaemonSlow,
    ];

    pub(super) fn name(self) -> String {
        match self {
            Self::MissingEnv(variable) => format!("without-{variable}"),
            other => {
                let mut name = String::new();
                for letter in format!("{other:?}").chars() {
                    if letter.is_uppercase() && !name.is_empty() {
                        name.push('-');
                    }
                    name.push(letter.to_ascii_lowercase());
                }
                name
            }
        }
    }
}

/// What a call has to end in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Exit 0 and nothing on stdout.
    Silence,
    /// Exit 0 and a result of the version.
    Result,
    /// Exit 0 and the versions.
    Versions,
    /// Exit 0, nothing on stdout, a text on stderr.
    About,
    /// An error with one of the codes; none listed: any.
    Error(&'static [u32]),
}

/// What is expected of a cell: one of the endings.
#[derive(Clone, Debug)]
pub(super) struct Expectation {
    pub(super) endings: Vec<Ending>,
    /// A word that the error's `msg` must hold.
    pub(super) naming: Option<&'static str>,
    pub(super) within: Duration,
}

const CODE_1: &[u32] = &[1];
const CODE_4: &[u32] = &[4];
const CODE_6: &[u32] = &[6];
const CODE_7: &[u32] = &[7];
const CODE_8: &[u32] = &[8];
const ANY: &[u32] = &[];

/// The specification as a function; `None` where the combination means nothing.
pub(super) fn expectation(
    verb: Verb,
    version: &str,
    situation: Situation,
    spoken: bool,
    daemon: bool,
    claims: &Claims,
) -> Option<Expectation> {
    let good = match verb {
        Verb::Add => Ending::Result,
        Verb::Version => Ending::Versions,
        // "Success": DEL, CHECK, GC and STATUS write nothing.
        Verb::Del | Verb::Check | Verb::Gc | Verb::Status => Ending::Silence,
    };
    let expect = |endings: &[Ending]| Some(Expectation { endings: endings.to_vec(), naming: None, within: HANGS });
    let container = verb.has_container();
    // A version that the plugin does not speak, or a verb that the version does not have: "Error", code 1. What makes the call
    // unreadable before that has its own code, so only the cells that can be read are of interest.
    if verb != Verb::Version && !(spoken && verb.exists_in(version)) {
        return match situation {
            // A plugin of the time before the verb calls the command unknown (code 4).
            Situation::Good if spoken => expect(&[Ending::Error(&[1, 4])]),
            Situation::Good if !verb.exists_in(VERSIONS[3]) => expect(&[Ending::Error(&[1, 4])]),
            Situation::Good => expect(&[Ending::Error(CODE_1)]),
            _ => None,
        };
    }
    match situation {
        Situation::Good | Situation::Repeated | Situation::Concurrent if verb != Verb::Add => expect(&[good]),
        Situation::Good | Situation::Concurrent => expect(&[good]),
        // "ADD": if the interface exists, the plugin must return an error. A plugin may know its own attachment again.
        Situation::Repeated if claims.add_is_idempotent => expect(&[Ending::Result]),
        Situation::Repeated => expect(&[Ending::Error(ANY)]),
        // "Parameters": state is kept by network, container id and interface name, and by nothing else.
        Situation::Namesake if verb == Verb::Add => expect(&[good]),
        // "Error", code 4: the message must contain the names of the invalid variables.
        Situation::MissingEnv(variable) if verb.required().contains(&variable) => {
            Some(Expectation { naming: Some(variable), ..expect(&[Ending::Error(CODE_4)])? })
        }
        // "DEL": CNI_NETNS is optional. The other verbs have no container.
        Situation::MissingEnv(_) => expect(&[good]),
        Situation::BadContainerId if container => {
            Some(Expectation { naming: Some("containerid"), ..expect(&[Ending::Error(CODE_4)])? })
        }
        Situation::BadIfname if container => expect(&[Ending::Error(CODE_4)]),
        // pkg/skel of libcni: no CNI_COMMAND is a human, who gets the "about" text.
        Situation::NoCommand if verb == Verb::Version => expect(&[Ending::About]),
        Situation::UnknownCommand if verb == Verb::Version => {
            Some(Expectation { naming: Some("CNI_COMMAND"), ..expect(&[Ending::Error(CODE_4)])? })
        }
        // "VERSION" has a cniVersion on stdin, which pkg/skel does not read.
        Situation::BadJson | Situation::NoStdin if verb == Verb::Version => expect(&[good, Ending::Error(CODE_6)]),
        Situation::BadJson => expect(&[Ending::Error(CODE_6)]),
        Situation::NoStdin => expect(&[Ending::Error(&[5, 6])]),
        // Asking for the versions is how a runtime learns that its own is unknown.
        Situation::UnknownVersion if verb == Verb::Version => expect(&[good]),
        Situation::UnknownVersion => expect(&[Ending::Error(CODE_1)]),
        // "Network configuration objects": the name's form; "Error", code 7.
        Situation::BadName if container => expect(&[Ending::Error(CODE_7)]),
        // A plugin may, but need not, refuse unknown keys (code 2, naming the key).
        Situation::UnknownField if claims.ignores_unknown_fields => expect(&[good]),
        Situation::UnknownField => expect(&[good, Ending::Error(&[2, 7])]),
        // "DEL": a missing netns is no reason to fail.
        Situation::AbsentNetns | Situation::FalseNetns | Situation::EmptyNetns if verb == Verb::Del => expect(&[good]),
        Situation::AbsentNetns | Situation::FalseNetns | Situation::OwnNetns
            if matches!(verb, Verb::Add | Verb::Check) =>
        {
            expect(&[Ending::Error(if claims.netns_code == Some(8) { CODE_8 } else { ANY })])
        }
        // "CHECK": prevResult is mandatory; "DEL": a plugin cleans up what it can without.
        Situation::NoPrevResult if verb == Verb::Check => expect(&[Ending::Error(ANY)]),
        Situation::NoPrevResult if verb == Verb::Del => expect(&[good]),
        Situation::UnknownContainer if verb == Verb::Del => expect(&[good]),
        Situation::UnknownContainer if verb == Verb::Check => expect(&[Ending::Error(ANY)]),
        // "GC": the list is required; taking its absence for an empty one would cut off every container.
        Situation::NoList if verb == Verb::Gc => expect(&[Ending::Error(CODE_7)]),
        // "GC": what is not in the list goes, what is in it stays; looked at afterwards.
        Situation::Stale if verb == Verb::Gc => expect(&[good]),
        Situation::DaemonDown | Situation::DaemonSlow if daemon => {
            let expected = match verb {
                Verb::Version => expect(&[good]),
                Verb::Del if claims.del_without_daemon => expect(&[good]),
                // "STATUS", code 50: the plugin is not available.
                Verb::Status => expect(&[Ending::Error(&[50])]),
                // "Error", code 11: a condition that passes.
                Verb::Add | Verb::Del | Verb::Check | Verb::Gc => expect(&[Ending::Error(&[11])]),
            };
            // Runtimes ask for STATUS every few seconds and wait.
            let within = if verb == Verb::Status { Duration::from_secs(2) } else { claims.patience };
            Some(Expectation { within, ..expected? })
        }
        _ => None,
    }
}
