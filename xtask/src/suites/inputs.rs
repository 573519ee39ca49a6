//! What the result of a guest depends on, as one hash: sources, manifests, compilers, programs and kernel. A guest that passed with the
//! same hash would pass again, so its result is kept and reported in place of another run.
//!
//! Names are relative to the workspace: the same sources in another folder have the same hash. Test binaries themselves are no input,
//! since an incremental build differs from a clean one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::SUITES;
use super::libtest::Tally;
use crate::process;
use crate::setup;
use crate::workspace::{Package, Workspace, which};

/// Raise it when results of before must not count any more for a reason that no input shows.
const FORMAT: &str = "1";

/// Files of the workspace that every package depends on.
const SHARED: [&str; 3] = ["Cargo.lock", "Cargo.toml", ".cargo/config.toml"];

/// Folders of a package that are compiled into nothing that a guest runs.
const LEFT_OUT: [&str; 5] = ["benches", "docs", "examples", "target", "tests"];

/// Inputs by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Inputs(BTreeMap<String, [u8; 32]>);

impl Inputs {
    /// The sources of the suites' package and of all that it depends on in the workspace, of `programs` (packages) and of `suites`
    /// (integration tests), and the compilers.
    ///
    /// # Errors
    /// A file cannot be read, or a compiler does not tell its version.
    pub(super) fn of_sources(
        workspace: &Workspace,
        packages: &[Package],
        programs: &[&str],
        suites: &[&str],
    ) -> Result<Self> {
        let mut inputs = Self::default();
        inputs.text("format", FORMAT);
        for file in SHARED.iter().filter(|file| workspace.root.join(file).is_file()) {
            inputs.file(&workspace.root, &workspace.root.join(file))?;
        }
        let folders: Vec<&Path> = packages.iter().filter_map(|package| package.manifest.parent()).collect();
        for package in closure(packages, programs.iter().copied().chain([SUITES])) {
            let folder = package.manifest.parent().context("a manifest has no folder")?;
            let left_out = |path: &Path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                // A package inside another one's folder is its own affair.
                folders.contains(&path) || name.starts_with('.') || LEFT_OUT.contains(&&*name)
            };
            inputs.folder(&workspace.root, folder, &left_out)?;
            for target in package.targets.iter().filter(|t| t.kind == "test" && suites.contains(&t.name.as_str())) {
                let own = target.source.ends_with("main.rs");
                let source = if own { target.source.parent().unwrap_or(folder) } else { &target.source };
                inputs.folder(&workspace.root, source, &|_| false)?;
            }
        }
        inputs.text("rustc", &process::output(workspace.rustc().arg("-vV"))?);
        let tools = [("bpf rustc", setup::bpf_compiler(), "-vV"), ("bpf-linker", "bpf-linker".into(), "--version")];
        for (name, program, argument) in tools {
            if let Some(path) = which(&program.to_string_lossy()) {
                inputs.text(name, &process::output(Command::new(path).arg(argument))?);
            }
        }
        Ok(inputs)
    }

    /// A text that a result depends on.
    pub(super) fn text(&mut self, name: &str, text: &str) {
        self.bytes(name, text.as_bytes());
    }

    /// The content of a file that a result depends on.
    pub(super) fn bytes(&mut self, name: &str, content: &[u8]) {
        self.0.insert(name.to_owned(), Sha256::digest(content).into());
    }

    /// A file, by its path below `root`, or by its whole path if it lies elsewhere.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn file(&mut self, root: &Path, path: &Path) -> Result<()> {
        let content = fs::read(path).with_context(|| path.display().to_string())?;
        self.bytes(&path.strip_prefix(root).unwrap_or(path).to_string_lossy(), &content);
        Ok(())
    }

    /// All files of a folder, or one file. Files of documentation (`*.md`) are no inputs.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub(super) fn folder(&mut self, root: &Path, path: &Path, left_out: &impl Fn(&Path) -> bool) -> Result<()> {
        if !path.is_dir() {
            return if path.extension().is_some_and(|e| e == "md") { Ok(()) } else { self.file(root, path) };
        }
        for entry in fs::read_dir(path).with_context(|| path.display().to_string())? {
            let path = entry?.path();
            if !left_out(&path) {
                self.folder(root, &path, left_out)?;
            }
        }
        Ok(())
    }

    /// The hash of all.
    pub(super) fn hash(&self) -> String {
        let mut hash = Sha256::new();
        for (name, content) in &self.0 {
            hash.update(name);
            hash.update([0]);
            hash.update(content);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Packages of these names and all that they depend on in the workspace; what only their own tests need is left out.
fn closure<'a>(packages: &'a [Package], names: impl Iterator<Item = &'a str>) -> Vec<&'a Package> {
    let mut wanted: Vec<&str> = names.collect();
    let mut found: Vec<&Package> = Vec::new();
    while let Some(name) = wanted.pop() {
        let Some(package) = packages.iter().find(|p| p.name == name) else { continue };
        if !found.iter().any(|known| known.name == name) {
            found.push(package);
            let used = package.dependencies.iter().filter(|d| d.kind.as_deref() != Some("dev") || name == SUITES);
            wanted.extend(used.map(|d| d.name.as_str()));
        }
    }
    found
}

/// Results of guests that passed, kept by the hash of their inputs.
#[derive(Clone, Debug)]
pub(super) struct Results(PathBuf);

impl Results {
    pub(super) fn open(workspace: &Workspace) -> Self {
        Self(workspace.cache.join("guests/results"))
    }

    fn path(&self, inputs: &Inputs) -> PathBuf {
        self.0.join(format!("{}.json", inputs.hash()))
    }

    /// What a run with these inputs gave, if one passed.
    pub(super) fn get(&self, inputs: &Inputs) -> Option<Tally> {
        let kept: Value = serde_json::from_slice(&fs::read(self.path(inputs)).ok()?).ok()?;
        let count = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        let reasons = kept["reasons"].as_object()?.iter().filter_map(|(reason, n)| Some((reason.clone(), count(n)?)));
        let tally = Tally {
            passed: count(&kept["passed"])?,
            skipped: count(&kept["skipped"])?,
            reasons: reasons.collect(),
            ..Tally::default()
        };
        (tally.passed > 0).then_some(tally)
    }

    /// Keeps the result of a run; only one without a failure and with tests that passed.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn put(&self, inputs: &Inputs, tally: &Tally) -> Result<()> {
        if tally.failed > 0 || tally.passed == 0 {
            return Ok(());
        }
        fs::create_dir_all(&self.0)?;
        let kept = json!({ "passed": tally.passed, "skipped": tally.skipped, "reasons": tally.reasons });
        let mut file = tempfile::NamedTempFile::new_in(&self.0)?;
        std::io::Write::write_all(&mut file, kept.to_string().as_bytes())?;
        file.persist(self.path(inputs))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::{Dependency, Target};

    /// A workspace of three packages: the suites, what they use, and what they do not.
    struct Sample {
        dir: tempfile::TempDir,
    }

    impl Sample {
        fn new() -> Self {
            let sample = Self { dir: tempfile::tempdir().unwrap() };
            for (path, text) in [
                ("Cargo.toml", "[workspace]"),
                ("Cargo.lock", "lock"),
                ("tests/Cargo.toml", "suites"),
                ("tests/src/lib.rs", "lib"),
                ("tests/tests/verifier.rs", "verifier"),
                ("tests/tests/net/main.rs", "net"),
                ("tests/tests/net/rig.rs", "rig"),
                ("tests/tests/netns.rs", "not for guests"),
                ("used/Cargo.toml", "used"),
                ("used/src/lib.rs", "used"),
                ("used/tests/own.rs", "its own test"),
                ("used/README.md", "documentation"),
                ("other/Cargo.toml", "other"),
                ("other/src/lib.rs", "other"),
            ] {
                sample.write(path, text);
            }
            sample
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn hash(&self) -> String {
            let root = self.dir.path().to_path_buf();
            let package = |name: &str, folder: &str, uses: &[&str]| Package {
                name: name.into(),
                manifest: root.join(folder).join("Cargo.toml"),
                targets: Vec::new(),
                dependencies: uses
                    .iter()
                    .map(|n| Dependency { name: (*n).into(), optional: false, kind: None, target: None })
                    .collect(),
            };
            let mut suites = package(SUITES, "tests", &["used", "serde"]);
            for (name, source) in [("verifier", "verifier.rs"), ("net", "net/main.rs"), ("netns", "netns.rs")] {
                let source = root.join("tests/tests").join(source);
                suites.targets.push(Target { name: name.into(), kind: "test".into(), source });
            }
            let packages = [suites, package("used", "used", &[]), package("other", "other", &[])];
            let workspace = Workspace { root: root.clone(), target: root.join("target"), cache: root.join("cache") };
            Inputs::of_sources(&workspace, &packages, &[], &["verifier", "net"]).unwrap().hash()
        }
    }

    #[test]
    fn the_same_sources_in_another_folder_have_the_same_hash() {
        assert_eq!(Sample::new().hash(), Sample::new().hash());
    }

    #[test]
    fn every_input_changes_the_hash_and_nothing_else_does() {
        let sample = Sample::new();
        let before = sample.hash();
        for path in
            ["tests/tests/netns.rs", "used/tests/own.rs", "used/README.md", "other/src/lib.rs", "target/debug/x"]
        {
            sample.write(path, "changed");
            assert_eq!(sample.hash(), before, "{path} is no input");
        }
        let mut seen = vec![before];
        for path in [
            "Cargo.toml",
            "Cargo.lock",
            "tests/Cargo.toml",
            "tests/src/lib.rs",
            "tests/src/new.rs",
            "tests/tests/verifier.rs",
            "tests/tests/net/rig.rs",
            "used/Cargo.toml",
            "used/src/lib.rs",
            "used/build.rs",
        ] {
            sample.write(path, "changed");
            let hash = sample.hash();
            assert!(!seen.contains(&hash), "{path} is an input");
            seen.push(hash);
        }
    }

    #[test]
    fn texts_and_names_are_inputs() {
        let with = |name: &str, text: &str| {
            let mut inputs = Inputs::default();
            inputs.text(name, text);
            inputs.hash()
        };
        assert_eq!(with("kernel", "5.10"), with("kernel", "5.10"));
        assert_ne!(with("kernel", "5.10"), with("kernel", "6.1"));
        assert_ne!(with("kernel", "5.10"), with("tool", "5.10"));
    }

    #[test]
    fn only_what_passed_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = Workspace { root: dir.path().into(), target: dir.path().into(), cache: dir.path().into() };
        let (results, mut inputs) = (Results::open(&workspace), Inputs::default());
        inputs.text("kernel", "5.10");
        assert_eq!(results.get(&inputs), None);
        results.put(&inputs, &Tally::fail("x")).unwrap();
        results.put(&inputs, &Tally::skip("x")).unwrap();
        assert_eq!(results.get(&inputs), None);
        let mut passed = Tally { passed: 3, ..Tally::default() };
        passed.add(Tally::skip("no netkit"));
        results.put(&inputs, &passed).unwrap();
        assert_eq!(results.get(&inputs), Some(passed));
        inputs.text("kernel", "6.1");
        assert_eq!(results.get(&inputs), None);
    }
}
