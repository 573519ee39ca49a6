//! Reading what Rust's test runner prints: counts, failures, and which tests skipped themselves.
//!
//! Suites run with `--show-output`: the runner then prints what a passing test wrote under that test's name, so a line
//! `SKIP: reason` is known to be that test's. Such a test counts as skipped, never as passed.

use std::collections::BTreeMap;

/// What a test prints when it cannot run here; the reason follows.
const SKIP: &str = "SKIP:";

/// Results added up.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
    /// Names of failed tests.
    pub(crate) failures: Vec<String>,
    /// Reasons of skipped tests, with how many gave each.
    pub(crate) reasons: BTreeMap<String, usize>,
    /// Names of tests with the seconds that they took.
    pub(crate) times: Vec<(String, f32)>,
}

impl Tally {
    /// A whole rung or suite that did not run.
    pub(crate) fn skip(reason: &str) -> Self {
        Self { skipped: 1, reasons: BTreeMap::from([(reason.to_owned(), 1)]), ..Self::default() }
    }

    /// A whole suite that failed before its tests could.
    pub(crate) fn fail(what: &str) -> Self {
        Self { failed: 1, failures: vec![what.to_owned()], ..Self::default() }
    }

    /// Adds the results of another.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
        self.times.extend(other.times);
        for (reason, count) in other.reasons {
            *self.reasons.entry(reason).or_default() += count;
        }
    }

    /// The tests that took longest, slowest first.
    pub(crate) fn slowest(&self, count: usize) -> Vec<&(String, f32)> {
        let mut times: Vec<_> = self.times.iter().collect();
        times.sort_by(|a, b| b.1.total_cmp(&a.1));
        times.truncate(count);
        times
    }

    /// The closing line that CI and people read.
    pub(crate) fn line(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    Tests,
    Successes,
    Failures,
}

/// Reads the output of one test binary (or of `cargo test --doc`), line by line.
pub(crate) struct Reader {
    tally: Tally,
    section: Section,
    /// The test whose captured output is being read.
    current: Option<String>,
    /// Tests seen to pass since the last summary: what counts when the binary dies before the next one.
    unconfirmed: usize,
    /// Tests since the last summary that skipped themselves; the runner counts them as passed.
    skips: usize,
    /// A `running N tests` whose summary has not come yet.
    open: bool,
    summaries: usize,
    /// Tests that have ended, and those that were announced.
    position: (usize, usize),
}

impl Reader {
    /// Before the first line.
    pub(crate) fn new() -> Self {
        let tally = Tally::default();
        Self {
            tally,
            section: Section::Tests,
            current: None,
            unconfirmed: 0,
            skips: 0,
            open: false,
            summaries: 0,
            position: (0, 0),
        }
    }

    /// Takes one line; says whether a person wants to see it.
    pub(crate) fn line(&mut self, line: &str) -> bool {
        if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
            self.open = true;
            let count = line.split(' ').nth(1).and_then(|count| count.parse().ok());
            self.position.1 += count.unwrap_or(0);
            self.section = Section::Tests;
            return false;
        }
        if let Some(rest) = line.strip_prefix("test result: ") {
            self.summary(rest);
            return false;
        }
        match line {
            "successes:" => (self.section, self.current) = (Section::Successes, None),
            "failures:" => (self.section, self.current) = (Section::Failures, None),
            _ => {}
        }
        if let Some(name) = line.strip_prefix("---- ").and_then(|l| l.strip_suffix(" stdout ----")) {
            self.current = Some(name.to_owned());
        }
        match self.section {
            Section::Successes => self.success(line),
            Section::Failures => {
                // Two blocks have this heading: first what failing tests wrote, then the list of their names.
                if let (None, Some(name)) = (&self.current, line.strip_prefix("    ")) {
                    self.tally.failures.push(name.to_owned());
                }
                true
            }
            Section::Tests => {
                if let Some((name, outcome, seconds)) = ended(line) {
                    self.unconfirmed += usize::from(outcome == "ok");
                    self.position.0 += 1;
                    self.tally.times.extend(seconds.map(|seconds| (name.to_owned(), seconds)));
                }
                !line.is_empty()
            }
        }
    }

    /// A line that a passing test wrote.
    fn success(&mut self, line: &str) -> bool {
        let Some(reason) = line.trim_start().strip_prefix(SKIP) else { return false };
        if self.current.take().is_some() {
            self.tally.skipped += 1;
            self.skips += 1;
            *self.tally.reasons.entry(reason.trim().to_owned()).or_default() += 1;
        }
        false
    }

    /// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s`.
    fn summary(&mut self, text: &str) {
        let count = |word: &str| {
            let part = text.split([';', '.']).map(str::trim).find_map(|p| p.strip_suffix(word));
            part.and_then(|n| n.trim().parse::<usize>().ok()).unwrap_or(0)
        };
        self.tally.passed += count(" passed").saturating_sub(self.skips);
        self.tally.failed += count(" failed");
        self.tally.skipped += count(" ignored");
        if count(" ignored") > 0 {
            *self.tally.reasons.entry("marked #[ignore]".into()).or_default() += count(" ignored");
        }
        (self.section, self.current, self.open) = (Section::Tests, None, false);
        (self.unconfirmed, self.skips) = (0, 0);
        self.summaries += 1;
    }

    /// How far it is, for a person.
    pub(crate) fn position(&self) -> String {
        format!("{} of {} tests", self.position.0, self.position.1)
    }

    /// After the last line: `trouble` says how the process ended if that was not by itself with code 0.
    pub(crate) fn finish(mut self, name: &str, trouble: Option<&str>) -> Tally {
        let names = self.tally.times.iter_mut().map(|(test, _)| test);
        for test in self.tally.failures.iter_mut().chain(names) {
            *test = format!("{name}: {test}");
        }
        if self.open {
            self.tally.passed += self.unconfirmed;
        }
        let silent = self.open || self.summaries == 0;
        if silent || (trouble.is_some() && self.tally.failed == 0) {
            self.tally.failed += 1;
            self.tally.failures.push(format!("{name}: {}", trouble.unwrap_or("ended without a summary")));
        }
        self.tally
    }
}

/// The options of Rust's test runner for what [`Reader`] reads: what passing tests wrote, and how long each took. The latter is an
/// unstable option, which the runner of a stable toolchain accepts with [`UNSTABLE`] in its environment.
pub(crate) const OPTIONS: [&str; 4] = ["--show-output", "-Z", "unstable-options", "--report-time"];

/// The variable that allows [`OPTIONS`], and its value.
pub(crate) const UNSTABLE: (&str, &str) = ("RUSTC_BOOTSTRAP", "1");

/// `test NAME ... ok <1.234s>`: name, outcome and seconds, which are told only with [`OPTIONS`].
fn ended(line: &str) -> Option<(&str, &str, Option<f32>)> {
    let (name, outcome) = line.strip_prefix("test ")?.split_once(" ... ")?;
    match outcome.split_once(" <") {
        Some((outcome, time)) => Some((name, outcome, time.strip_suffix("s>")?.parse().ok())),
        None => Some((name, outcome, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, trouble: Option<&str>) -> Tally {
        let mut reader = Reader::new();
        for line in text.lines() {
            reader.line(line);
        }
        reader.finish("suite", trouble)
    }

    const MIXED: &str = "
running 4 tests
test a ... ok
test b ... ok
test c ... FAILED
test d ... ignored, slow

successes:

---- a stdout ----
hello
SKIP: kernel has no netkit
SKIP: said twice

---- b stdout ----
SKIP is only a word here

successes:
    a
    b

failures:

---- c stdout ----
thread 'c' panicked at tests/x.rs:1:1:
SKIP: a failing test is not skipped

failures:
    c

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn skipped_tests_are_not_passed_ones() {
        let tally = read(MIXED, Some("exit status: 101"));
        assert_eq!((tally.passed, tally.failed, tally.skipped), (1, 1, 2));
        assert_eq!(tally.failures, ["suite: c"]);
        assert_eq!(tally.reasons.get("kernel has no netkit"), Some(&1));
        assert_eq!(tally.line(), "1 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn several_summaries_add_up() {
        let one = "running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1.50s\n";
        let tally = read(&format!("{one}{one}"), None);
        assert_eq!((tally.passed, tally.failed, tally.skipped), (2, 0, 0));
    }

    #[test]
    fn a_binary_that_dies_is_a_failure() {
        let tally = read("running 3 tests\ntest a ... ok\ntest b ... ", Some("signal: 11"));
        assert_eq!((tally.passed, tally.failed), (1, 1));
        assert_eq!(tally.failures, ["suite: signal: 11"]);
        assert_eq!(read("", None).failed, 1, "no summary at all");
        let leak = "running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0s\n";
        assert_eq!(read(leak, Some("exit status: 2")).failed, 1, "a bad exit after a good summary");
    }

    #[test]
    fn people_see_tests_and_failures_but_no_chatter_of_passing_tests() {
        let mut reader = Reader::new();
        let shown: Vec<_> = MIXED.lines().filter(|l| reader.line(l)).collect();
        assert!(shown.contains(&"test a ... ok") && shown.contains(&"---- c stdout ----"));
        assert!(!shown.contains(&"hello"));
    }

    #[test]
    fn times_of_tests_are_read_and_sorted() {
        let tally = read(
            "running 3 tests\ntest m::a ... ok <0.250s>\ntest b ... FAILED <12.500s>\ntest c ... ok\n\n\
             test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 13.00s\n",
            Some("exit status: 101"),
        );
        assert_eq!(tally.times, [("suite: m::a".into(), 0.25), ("suite: b".into(), 12.5)]);
        assert_eq!(tally.slowest(1), [&("suite: b".into(), 12.5)]);
        let died = read("running 2 tests\ntest a ... ok <0.001s>\n", Some("signal: 9"));
        assert_eq!((died.passed, died.failed), (1, 1));
    }

    #[test]
    fn tallies_add() {
        let mut sum = Tally::skip("no root");
        sum.add(Tally::skip("no root"));
        sum.add(Tally::fail("x"));
        assert_eq!(sum.line(), "0 passed, 1 failed, 2 skipped");
        assert_eq!(sum.reasons.get("no root"), Some(&2));
    }
}
