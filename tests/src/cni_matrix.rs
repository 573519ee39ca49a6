//! The CNI verb matrix: every verb × every version × every situation, against any plugin.
//!
//! There is no official conformance suite (containernetworking/cni, ROADMAP), so this file is one. With the two in the folder
//! beside it, it stands alone: it needs `std` and `serde_json`, knows nothing of terway, and calls the plugin as a runtime does, by exec. Whoever wants to
//! try another plugin implements [`Plugin`] and calls [`run`].
//!
//! What is expected of a cell follows from the specification 1.1.0 and is cited in `spec::expectation`; where the specification
//! leaves a choice, the plugin says in [`Claims`] what it promises. A plugin that is known to differ lists the cells as
//! [`Deviation`]s; one that no longer occurs is an error, so that the list stays true.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

mod outcome;
mod spec;

use outcome::{Call, Outcome, call};
use spec::{Ending, Expectation, Situation, Verb, expectation};

/// Every version that has interfaces in its result.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// How many containers a concurrent cell has.
const CROWD: usize = 8;

/// How many cells are tried at once: plugins wait for the kernel more than they work.
const WORKERS: usize = 4;

/// After this long a plugin hangs.
const HANGS: Duration = Duration::from_secs(30);

/// A plugin to be tried.
pub trait Plugin: Sync {
    /// The program to be run: the plugin, or a wrapper that enters the node's netns first. Environment and stdin are set by the matrix.
    fn command(&self) -> Command;

    /// The plugin's configuration without `cniVersion` and `name`.
    fn conf(&self) -> Value;

    /// The versions that the plugin speaks.
    fn versions(&self) -> &'static [&'static str];

    /// A new network namespace, empty but for `lo`.
    fn netns(&self) -> Netns;

    /// Where plugins find others (`CNI_PATH`).
    fn cni_path(&self) -> String {
        "/opt/cni/bin".to_owned()
    }

    /// The network namespace that the plugin runs in.
    fn own_netns(&self) -> PathBuf;

    /// The daemon behind the plugin, where there is one.
    fn daemon(&self) -> Option<&dyn Daemon> {
        None
    }

    /// What the plugin promises where the specification leaves a choice.
    fn claims(&self) -> Claims {
        Claims::default()
    }

    /// Where it is known to differ.
    fn deviations(&self) -> Vec<Deviation> {
        Vec::new()
    }
}

/// The daemon behind a plugin.
pub trait Daemon: Sync {
    /// Ends it, so that its socket does not answer.
    fn stop(&self);
    /// Starts it again and waits until it answers.
    fn start(&self);
    /// Makes it take longer than the plugin waits, or no longer.
    fn slow(&self, slow: bool);
    /// Whether it holds anything for the container.
    fn holds(&self, container_id: &str) -> bool;
}

/// A network namespace that goes away with its guard.
pub struct Netns {
    /// Its path.
    pub path: PathBuf,
    /// Dropped when the cell is done.
    pub guard: Box<dyn Any + Send>,
}

/// What a plugin promises where the specification leaves a choice.
#[derive(Clone, Debug)]
pub struct Claims {
    /// Unknown keys of the configuration are ignored; else they may be an error ("Network configuration objects").
    pub ignores_unknown_fields: bool,
    /// A second ADD of one attachment gives the same result; else it must be an error ("ADD": the interface exists).
    pub add_is_idempotent: bool,
    /// A DEL succeeds while the daemon is down or slow.
    pub del_without_daemon: bool,
    /// How long it takes at most until such a DEL is carried out, once the daemon is well again.
    pub release_within: Duration,
    /// Code for a CNI_NETNS that is none; libcni's own is 8.
    pub netns_code: Option<u32>,
    /// How long the plugin waits for its daemon at most.
    pub patience: Duration,
}

impl Default for Claims {
    fn default() -> Self {
        Self {
            ignores_unknown_fields: false,
            add_is_idempotent: false,
            del_without_daemon: false,
            release_within: Duration::from_secs(10),
            netns_code: None,
            patience: Duration::from_secs(10),
        }
    }
}

/// A known difference.
#[derive(Clone, Debug)]
pub struct Deviation {
    /// `VERB version situation`, where `*` stands for any word.
    pub cells: &'static str,
    /// What the problem says, in part.
    pub problem: &'static str,
    /// Why it is so.
    pub reason: &'static str,
    /// Whether it occurs in every run; one that is a race may not.
    pub always: bool,
}

/// Tries every cell.
#[must_use]
pub fn run(plugin: &dyn Plugin) -> Report {
    let claims = plugin.claims();
    let mut cells = Vec::new();
    for verb in Verb::ALL {
        for version in VERSIONS {
            for situation in Situation::ALL {
                let spoken = plugin.versions().contains(&version);
                let daemon = plugin.daemon().is_some();
                if let Some(expected) = expectation(verb, version, situation, spoken, daemon, &claims) {
                    cells.push(Cell { plugin, claims: &claims, verb, version, situation, expected });
                }
            }
        }
    }
    let mut rows = Vec::new();
    let groups = [Situation::DaemonDown, Situation::DaemonSlow];
    let (daemons, others): (Vec<_>, Vec<_>) = cells.into_iter().partition(|cell| groups.contains(&cell.situation));
    rows.extend(parallel(others, WORKERS, |cell| cell.stage().act().finish()));
    // What is done to the daemon is done to all, so these cells wait for one another before and after their calls.
    let (down, slow): (Vec<_>, Vec<_>) = daemons.into_iter().partition(|cell| cell.situation == Situation::DaemonDown);
    if let Some(daemon) = plugin.daemon() {
        let stages = parallel(down, WORKERS, Cell::stage);
        daemon.stop();
        let acted = parallel(stages, CROWD, Stage::act);
        daemon.start();
        rows.extend(parallel(acted, WORKERS, Stage::finish));
        let stages = parallel(slow, WORKERS, Cell::stage);
        daemon.slow(true);
        let acted = parallel(stages, CROWD, Stage::act);
        daemon.slow(false);
        rows.extend(parallel(acted, WORKERS, Stage::finish));
    }
    rows.sort_by(|one, other| one.name.cmp(&other.name));
    let deviations = plugin.deviations();
    let mut used = BTreeSet::new();
    for row in rows.iter_mut().filter(|row| !row.problems.is_empty()) {
        let excuses: Vec<Option<usize>> = row
            .problems
            .iter()
            .map(|problem| deviations.iter().position(|known| known.covers(&row.name, problem)))
            .collect();
        if excuses.iter().all(Option::is_some) {
            row.excuse = excuses.iter().flatten().next().map(|index| deviations[*index].reason);
            used.extend(excuses.into_iter().flatten());
        }
    }
    let stale = deviations
        .iter()
        .enumerate()
        .filter(|(index, known)| known.always && !used.contains(index))
        .map(|(_, known)| format!("{} ({})", known.cells, known.problem))
        .collect();
    Report { rows, stale }
}

impl Deviation {
    fn covers(&self, cell: &str, problem: &str) -> bool {
        let words = |text: &'static str| text.split(' ').collect::<Vec<_>>();
        let cell: Vec<&str> = cell.split(' ').collect();
        let pattern = words(self.cells);
        pattern.len() == cell.len()
            && pattern.iter().zip(&cell).all(|(want, have)| *want == "*" || want == have)
            && problem.contains(self.problem)
    }
}

/// One cell tried.
#[derive(Clone, Debug)]
pub struct Row {
    /// `VERB version situation`.
    pub name: String,
    /// What was wrong; empty when nothing was.
    pub problems: Vec<String>,
    /// Why that is known.
    pub excuse: Option<&'static str>,
}

/// All cells tried.
#[derive(Clone, Debug)]
pub struct Report {
    /// One for each cell.
    pub rows: Vec<Row>,
    /// Deviations that did not occur.
    pub stale: Vec<String>,
}

impl Report {
    /// Cells that failed without excuse.
    pub fn failures(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| !row.problems.is_empty() && row.excuse.is_none())
    }

    /// Panics with the list if a cell failed without excuse or a deviation did not occur.
    pub fn assert_clean(&self) {
        assert!(self.failures().next().is_none() && self.stale.is_empty(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = self.rows.iter().filter(|row| row.excuse.is_some()).count();
        writeln!(f, "{} cells, {} failed, {known} known deviations", self.rows.len(), self.failures().count())?;
        for row in self.rows.iter().filter(|row| !row.problems.is_empty()) {
            let mark = row.excuse.map_or_else(|| "FAIL".to_owned(), |reason| format!("known: {reason}"));
            writeln!(f, "  {}: {} [{mark}]", row.name, row.problems.join("; "))?;
        }
        for cells in &self.stale {
            writeln!(f, "  deviation did not occur: {cells}")?;
        }
        Ok(())
    }
}

/// `work` done on all items, `workers` at a time; results in any order.
fn parallel<T: Send, R: Send>(items: Vec<T>, workers: usize, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let items = Mutex::new(items);
    let next = || items.lock().ok()?.pop();
    let worker = || std::iter::from_fn(next).map(&work).collect::<Vec<R>>();
    thread::scope(|scope| {
        let running: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        running
            .into_iter()
            .flat_map(|handle| handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// One cell about to be tried.
struct Cell<'a> {
    plugin: &'a dyn Plugin,
    claims: &'a Claims,
    verb: Verb,
    version: &'static str,
    situation: Situation,
    expected: Expectation,
}

/// A container of a cell.
struct Container {
    id: String,
    netns: Netns,
    /// The result of its ADD.
    result: Option<Value>,
}

/// A cell whose stage is set.
struct Stage<'a> {
    cell: Cell<'a>,
    containers: Vec<Container>,
    outcomes: Vec<Outcome>,
    problems: Vec<String>,
}

impl Stage<'_> {
    /// Makes the calls, if the stage could be set.
    fn act(mut self) -> Self {
        let cell = &self.cell;
        if !self.problems.is_empty() {
            return self;
        }
        let mut calls: Vec<Call> = match &self.containers[..] {
            [] => vec![cell.call(cell.verb, &cell.container())],
            [keep, _stale] if cell.situation == Situation::Stale => vec![cell.call(cell.verb, keep)],
            all => all.iter().map(|container| cell.call(cell.verb, container)).collect(),
        };
        calls.iter_mut().for_each(|call| cell.alter(call));
        let count = calls.len();
        // The second sandbox of a pod is made when the first one is there.
        let workers = if cell.situation == Situation::Namesake { 1 } else { count };
        self.outcomes = parallel(calls.iter().collect(), workers, |each| call(cell.plugin, each));
        if cell.situation == Situation::Repeated {
            let first = self.outcomes.remove(0);
            let good = if cell.verb == Verb::Add { Ending::Result } else { cell.expected.endings[0] };
            if let Err(problem) = cell.judge(&first, &[good]) {
                self.problems.push(format!("first call: {problem}"));
            }
            let second = call(cell.plugin, &calls[0]);
            if cell.verb == Verb::Add && cell.claims.add_is_idempotent && second.stdout != first.stdout {
                let (one, other) = (first.stdout.trim(), second.stdout.trim());
                self.problems.push(format!("the second result differs: {one} and {other}"));
            }
            self.outcomes.push(second);
        }
        self
    }

    /// Judges, clears up, and looks whether all is gone.
    fn finish(mut self) -> Row {
        let cell = &self.cell;
        for outcome in &self.outcomes {
            if let Err(problem) = cell.judge(outcome, &cell.expected.endings) {
                self.problems.push(problem);
            }
        }
        if !self.outcomes.is_empty() {
            cell.look(&self.containers, &self.outcomes, &mut self.problems);
        }
        for container in &self.containers {
            let outcome = call(cell.plugin, &cell.call(Verb::Del, container));
            // Where the version is not spoken there is nothing to clear up.
            if cell.plugin.versions().contains(&cell.version)
                && let Err(problem) = outcome.judge(Ending::Silence, Some(cell.version))
            {
                self.problems.push(format!("clearing up: DEL {problem}"));
            }
            if cell.plugin.daemon().is_some_and(|daemon| daemon.holds(&container.id)) {
                self.problems.push("the daemon still holds the container after DEL".to_owned());
            }
        }
        let name = format!("{} {} {}", cell.verb.name(), cell.version, cell.situation.name());
        Row { name, problems: self.problems, excuse: None }
    }
}

impl<'a> Cell<'a> {
    /// Makes the containers and, where the verb needs them, their attachments.
    fn stage(self) -> Stage<'a> {
        let mut problems = Vec::new();
        let count = match self.situation {
            Situation::Concurrent => CROWD,
            Situation::Stale | Situation::Namesake => 2,
            _ => usize::from(self.verb.has_container()),
        };
        let mut containers: Vec<Container> = (0..count).map(|_| self.container()).collect();
        if self.needs_attachments() {
            for container in &mut containers {
                let outcome = call(self.plugin, &self.call(Verb::Add, container));
                container.result = serde_json::from_str(&outcome.stdout).ok().filter(|_| outcome.code == Some(0));
                if container.result.is_none() {
                    problems.push(format!("setting up: ADD ended with {outcome}"));
                }
            }
        }
        Stage { cell: self, containers, outcomes: Vec::new(), problems }
    }

    /// What must hold after the call, besides how it ended.
    fn look(&self, containers: &[Container], outcomes: &[Outcome], problems: &mut Vec<String>) {
        if let (Verb::Add, Situation::Concurrent) = (self.verb, self.situation) {
            let addresses: Vec<String> = outcomes.iter().flat_map(Outcome::addresses).collect();
            if addresses.iter().collect::<BTreeSet<_>>().len() != addresses.len() {
                problems.push(format!("containers share addresses: {addresses:?}"));
            }
        }
        let down = matches!(self.situation, Situation::DaemonDown | Situation::DaemonSlow);
        if let (Verb::Del, true, Some(daemon)) =
            (self.verb, down && self.claims.del_without_daemon, self.plugin.daemon())
        {
            // Slow or just started, the daemon comes to it by itself.
            let until = Instant::now() + self.claims.release_within;
            while containers.iter().any(|container| daemon.holds(&container.id)) {
                if Instant::now() > until {
                    problems.push("a DEL without the daemon was lost".to_owned());
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        if let (Situation::Stale, [keep, stale]) = (self.situation, containers) {
            for (container, kept) in [(keep, true), (stale, false)] {
                let outcome = call(self.plugin, &self.call(Verb::Check, container));
                if (outcome.code == Some(0)) != kept {
                    problems.push(format!(
                        "after GC, CHECK of {} ended with {outcome}",
                        if kept { "the kept" } else { "the stale" }
                    ));
                }
            }
        }
    }

    fn judge(&self, outcome: &Outcome, endings: &[Ending]) -> Result<(), String> {
        let verdicts: Vec<Result<(), String>> =
            endings.iter().map(|ending| outcome.judge(*ending, self.version_answered())).collect();
        if let Some(problem) = verdicts.iter().all(Result::is_err).then(|| verdicts[0].clone().err()).flatten() {
            return Err(problem);
        }
        if let Some(word) = self.expected.naming
            && !outcome.error()?["msg"].as_str().unwrap_or_default().to_lowercase().contains(&word.to_lowercase())
        {
            return Err(format!("msg does not name {word}: {}", outcome.stdout.trim()));
        }
        if outcome.took > self.expected.within {
            return Err(format!("took {:?}, more than {:?}", outcome.took, self.expected.within));
        }
        Ok(())
    }

    /// The version that the answer must bear; `None` where the plugin had none to go by.
    fn version_answered(&self) -> Option<&'static str> {
        let readable = !matches!(
            self.situation,
            Situation::BadJson | Situation::NoStdin | Situation::UnknownVersion | Situation::UnknownCommand
        );
        (readable && self.plugin.versions().contains(&self.version)).then_some(self.version)
    }

    fn needs_attachments(&self) -> bool {
        let spoken = self.plugin.versions().contains(&self.version) && self.verb.exists_in(self.version);
        spoken
            && matches!(self.verb, Verb::Del | Verb::Check | Verb::Gc)
            && !matches!(self.situation, Situation::UnknownContainer)
    }

    fn container(&self) -> Container {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        Container { id: format!("matrix-{}-{serial}", std::process::id()), netns: self.plugin.netns(), result: None }
    }

    /// A call in which nothing is wrong.
    fn call(&self, verb: Verb, container: &Container) -> Call {
        let mut conf = self.plugin.conf();
        conf["cniVersion"] = self.version.into();
        // A network for each cell, so that a GC takes nothing from the others.
        conf["name"] = format!("{}-{}-{}", self.verb.name(), self.version, self.situation.name()).into();
        // 0.3.x has prevResult for chained plugins only ("Network Configuration Lists"), later ones for CHECK and DEL.
        if let (Verb::Check | Verb::Del, Some(result)) = (verb, &container.result) {
            conf["prevResult"] = result.clone();
        }
        if verb == Verb::Gc {
            conf["cni.dev/valid-attachments"] = json!([{"containerID": container.id, "ifname": "eth0"}]);
        }
        // "VERSION" has nothing but the version on stdin; a verb that nobody knows has what all others have.
        if verb == Verb::Version && self.situation != Situation::UnknownCommand {
            conf = json!({ "cniVersion": self.version });
        }
        let mut env = BTreeMap::from([("CNI_COMMAND", verb.name().to_owned()), ("CNI_PATH", self.plugin.cni_path())]);
        if verb.has_container() {
            env.insert("CNI_CONTAINERID", container.id.clone());
            env.insert("CNI_NETNS", container.netns.path.display().to_string());
            env.insert("CNI_IFNAME", "eth0".to_owned());
            // Two sandboxes of one pod may overlap; their ids differ ("primary key", section 2 "Parameters").
            let pod = if self.situation == Situation::Namesake { self.version } else { &container.id };
            // As containerd does, in any order.
            env.insert(
                "CNI_ARGS",
                format!(
                    "K8S_POD_NAME={pod};IgnoreUnknown=1;K8S_POD_NAMESPACE=n;K8S_POD_INFRA_CONTAINER_ID={}",
                    container.id
                ),
            );
        }
        Call { env, stdin: conf.to_string().into_bytes() }
    }

    /// Makes the call what the situation says.
    fn alter(&self, call: &mut Call) {
        let mut conf: Map<String, Value> = serde_json::from_slice(&call.stdin).unwrap_or_default();
        match self.situation {
            Situation::MissingEnv(variable) => drop(call.env.remove(variable)),
            Situation::BadContainerId => drop(call.env.insert("CNI_CONTAINERID", "../etc".to_owned())),
            Situation::BadIfname => drop(call.env.insert("CNI_IFNAME", "eth/0".to_owned())),
            Situation::NoCommand => drop(call.env.remove("CNI_COMMAND")),
            Situation::UnknownCommand => drop(call.env.insert("CNI_COMMAND", "REBOOT".to_owned())),
            Situation::UnknownVersion => drop(conf.insert("cniVersion".to_owned(), "9.9.9".into())),
            Situation::BadName => drop(conf.insert("name".to_owned(), "a/b".into())),
            Situation::UnknownField => {
                drop(conf.insert("example.com/key".to_owned(), json!({"of": ["the", "future"]})));
            }
            Situation::AbsentNetns => drop(call.env.insert("CNI_NETNS", "/run/netns/there-is-none".to_owned())),
            Situation::FalseNetns => drop(call.env.insert("CNI_NETNS", "/dev/null".to_owned())),
            Situation::OwnNetns => drop(call.env.insert("CNI_NETNS", self.plugin.own_netns().display().to_string())),
            Situation::EmptyNetns => drop(call.env.insert("CNI_NETNS", String::new())),
            Situation::NoPrevResult => drop(conf.remove("prevResult")),
            Situation::NoList => drop(conf.remove("cni.dev/valid-attachments")),
            _ => {}
        }
        match self.situation {
            Situation::BadJson => call.stdin.truncate(call.stdin.len() / 2),
            Situation::NoStdin => call.stdin.clear(),
            _ => call.stdin = Value::Object(conf).to_string().into_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plugin that prints the same to everyone.
    struct Script(&'static str);

    impl Plugin for Script {
        fn command(&self) -> Command {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", self.0]);
            command
        }

        fn conf(&self) -> Value {
            json!({"type": "script"})
        }

        fn versions(&self) -> &'static [&'static str] {
            &VERSIONS
        }

        fn netns(&self) -> Netns {
            Netns { path: "/proc/self/ns/net".into(), guard: Box::new(()) }
        }

        fn own_netns(&self) -> PathBuf {
            "/proc/self/ns/net".into()
        }
    }

    fn failing(script: &'static str) -> BTreeSet<String> {
        run(&Script(script)).failures().map(|row| row.name.clone()).collect()
    }

    #[test]
    fn a_plugin_that_always_succeeds_silently_fails_where_it_must_not() {
        let failing = failing("true");
        for cell in
            ["ADD 1.0.0 good", "ADD 1.1.0 bad-json", "CHECK 0.3.1 good", "VERSION 0.4.0 good", "GC 1.1.0 no-list"]
        {
            assert!(failing.contains(cell), "{cell} passed");
        }
        assert!(!failing.contains("STATUS 1.1.0 good"));
    }

    #[test]
    fn a_plugin_that_chats_or_dies_fails_everywhere() {
        let all = run(&Script("true")).rows.len();
        assert_eq!(failing("echo hello").len(), all);
        assert_eq!(failing("kill -9 $$").len(), all);
    }

    #[test]
    fn an_error_without_code_or_version_is_none() {
        for error in
            [r#"{"msg":"x"}"#, r#"{"code":11,"msg":""}"#, r#"{"code":11,"msg":"x"}"#, r#"{"code":11,"msg":"x"} x"#]
        {
            let outcome =
                Outcome { code: Some(1), stdout: error.to_owned(), stderr: String::new(), took: Duration::ZERO };
            assert!(outcome.judge(Ending::Error(&[]), None).is_err(), "{error}");
        }
    }

    #[test]
    fn results_are_held_to_their_version() {
        let result = |version: &str, ip: Value, interface: Value| {
            outcome::result_form(&json!({"cniVersion": version, "interfaces": [interface], "ips": [ip]}), version)
        };
        let ip = json!({"address": "10.0.0.1/32", "interface": 0});
        let old = json!({"address": "10.0.0.1/32", "interface": 0, "version": "4"});
        let eth0 = json!({"name": "eth0", "sandbox": "/n"});
        let sized = json!({"name": "eth0", "sandbox": "/n", "mtu": 1500});
        assert_eq!(result("1.0.0", ip.clone(), eth0.clone()), Ok(()));
        assert_eq!(result("0.3.1", old.clone(), eth0.clone()), Ok(()));
        assert_eq!(result("1.1.0", ip.clone(), sized.clone()), Ok(()));
        assert!(result("1.0.0", old, eth0.clone()).is_err());
        assert!(result("0.4.0", ip.clone(), eth0).is_err());
        assert!(result("1.0.0", ip.clone(), sized).is_err());
        assert!(result("1.0.0", ip, json!({"name": "eth0"})).is_err());
    }
}
