//! apt with lists, sources and caches of its own: packages of any Debian suite, signatures checked, and the machine's apt stays as it is. Which mirror:
//! the one that the machine's own sources name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct PrivateApt {
    work: PathBuf,
}

impl PrivateApt {
    /// Fetches the lists of a suite into the scratch folder `work`; `types` are those of sources.list(5), `deb` and `deb-src`.
    ///
    /// # Errors
    /// The machine names no mirror, or it cannot be reached.
    pub(crate) fn open(work: &Path, suite: &str, types: &[&str]) -> Result<Self> {
        let mirror = mirror(suite.ends_with("-security"))?;
        fs::create_dir_all(work.join("lists/partial"))?;
        fs::create_dir_all(work.join("cache/archives/partial"))?;
        fs::write(work.join("status"), "")?;
        let signed = mirror.keyring.map(|k| format!("[signed-by={k}] ")).unwrap_or_default();
        let source = |kind: &&str| format!("{kind} {signed}{} {suite} main\n", mirror.uri);
        fs::write(work.join("sources.list"), types.iter().map(source).collect::<String>())?;
        let this = Self { work: work.to_owned() };
        process::output_as(this.command("apt-get").arg("update"), "apt-get update")?;
        Ok(this)
    }

    /// A command of apt that runs in the scratch folder.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let option = |name: &str, below: &str| format!("{name}={}", self.work.join(below).display());
        command.current_dir(&self.work).env("LC_ALL", "C").arg("-q");
        for setting in [
            option("Dir::Etc::sourcelist", "sources.list"),
            "Dir::Etc::sourceparts=-".into(),
            option("Dir::State::lists", "lists"),
            option("Dir::State::status", "status"),
            option("Dir::Cache", "cache"),
            // The scratch folder belongs to the caller; apt's own user could not write there.
            "APT::Sandbox::User=root".into(),
            "APT::Architecture=amd64".into(),
            // The lists of a suite that gets no more updates expire one day; they are still signed.
            "Acquire::Check-Valid-Until=false".into(),
            "Acquire::Languages=none".into(),
            "Acquire::Retries=3".into(),
            // Otherwise a mirror out of reach is but a warning.
            "APT::Update::Error-Mode=any".into(),
        ] {
            command.args(["-o", &setting]);
        }
        command
    }
}

/// Where the machine's own apt gets Debian from.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    keyring: Option<String>,
}

fn mirror(security: bool) -> Result<Mirror> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut found = from_stanzas(&read("/etc/apt/sources.list.d/debian.sources"));
    found.extend(from_lines(&read("/etc/apt/sources.list")));
    found
        .into_iter()
        .find(|(is_security, _)| *is_security == security)
        .map(|(_, mirror)| mirror)
        .context("the machine's apt sources name no Debian mirror (debian.sources or sources.list)")
}

/// The deb822 form of sources.list(5).
fn from_stanzas(text: &str) -> Vec<(bool, Mirror)> {
    let stanza = |stanza: &str| {
        let field = |name: &str| {
            let values = stanza.lines().filter_map(|l| l.split_once(':'));
            values.filter(|(k, _)| k.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim().to_owned()).next()
        };
        let uri = field("URIs")?.split_whitespace().next()?.to_owned();
        let security = field("Suites")?.contains("-security");
        Some((security, Mirror { uri, keyring: field("Signed-By").filter(|k| k.starts_with('/')) }))
    };
    text.split("\n\n").filter_map(stanza).collect()
}

/// The one-line form of sources.list(5).
fn from_lines(text: &str) -> Vec<(bool, Mirror)> {
    let line = |line: &str| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(tail) => tail.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?.to_owned(), words.next()?);
        let keyring = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by=")).map(str::to_owned);
        Some((suite.contains("-security"), Mirror { uri, keyring }))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_of_both_source_formats() {
        let text = "# a comment: with colon\nTypes: deb\nURIs: http://m.test/debian\nSuites: bookworm bookworm-updates\n\
                    Signed-By: /k.gpg\n\nTypes: deb\nURIs: http://s.test/x\nSuites: bookworm-security\n";
        let main = Mirror { uri: "http://m.test/debian".into(), keyring: Some("/k.gpg".into()) };
        let security = Mirror { uri: "http://s.test/x".into(), keyring: None };
        assert_eq!(from_stanzas(text), [(false, main), (true, security)]);
        let text = "# deb http://no.test x main\ndeb http://m.test/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://s.test/x bookworm-security main\n";
        let main = Mirror { uri: "http://m.test/debian".into(), keyring: None };
        let security = Mirror { uri: "http://s.test/x".into(), keyring: Some("/k.gpg".into()) };
        assert_eq!(from_lines(text), [(false, main), (true, security)]);
    }
}
