//! `cargo xtask tidy`: the rules that no compiler checks, each finding with what to do about it.

mod border;
mod catalogue;
mod source;
mod text;
mod walls;

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::codegen;
use crate::process;
use crate::workspace::Workspace;

/// What stands at the top: the parts of the product, and what every Rust project has.
const TOP: [&str; 25] = [
    ".cargo",
    ".ci",
    ".gitattributes",
    ".gitignore",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE.md",
    "LICENSES",
    "README.md",
    "SECURITY.md",
    "clippy.toml",
    "deny.toml",
    "docs",
    "fuzz",
    "manifests",
    "proto",
    "rustfmt.toml",
    "terway-cni",
    "terway-daemon",
    "terway-ebpf",
    "tests",
    "xtask",
];
/// Of these, what may be missing.
const OPTIONAL: [&str; 1] = [".gitattributes"];
/// Files of this size are data.
const LARGEST_TEXT: u64 = 2 << 20;

/// One broken rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    path: String,
    line: usize,
    rule: &'static str,
    advice: String,
}

impl Finding {
    fn new(path: &str, line: usize, rule: &'static str, advice: &str) -> Self {
        Self { path: path.to_owned(), line, rule, advice: advice.to_owned() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path, self.line, self.rule, self.advice)
    }
}

/// A text file of the tree.
#[derive(Clone, Debug)]
struct File {
    /// Below the root.
    path: String,
    text: String,
}

/// Prints every finding; true when there is none. With `bless_abi`, records the present ABI first.
///
/// # Errors
/// The tree cannot be read, or the ABI changed without its version.
pub(crate) fn run(workspace: &Workspace, bless_abi: bool) -> Result<bool> {
    let paths = paths(workspace)?;
    let files = files(&workspace.root, &paths);
    let record_path = workspace.root.join(border::RECORD);
    let mut record = fs::read_to_string(&record_path).ok();
    if bless_abi {
        match border::bless(&files, record.as_deref()) {
            Ok(fresh) => {
                fs::write(&record_path, &fresh)?;
                record = Some(fresh);
            }
            Err(reason) => bail!("{reason}"),
        }
    }

    let mut found = top(&paths);
    for file in files.iter().filter(|f| f.path != "Cargo.lock") {
        found.extend(text::any(&file.path, &file.text));
        if file.path.ends_with(".rs") {
            found.extend(text::rust(&file.path, &file.text));
        }
    }
    found.extend(catalogue::check(&files));
    found.extend(border::check(&files, record.as_deref()));
    found.extend(walls::check(workspace, &workspace.metadata()?)?);
    if let Err(error) = codegen::run(workspace, true) {
        found.push(Finding::new("docs/errors.md", 1, "generated", &format!("{error:#}")));
    }
    found.sort();
    found.dedup();
    for finding in &found {
        println!("{finding}");
    }
    println!("tidy: {} files, {} findings", paths.len(), found.len());
    Ok(found.is_empty())
}

/// The files that are, or are about to be, in the repository.
fn paths(workspace: &Workspace) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    workspace.prepare(&mut git);
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let mut paths = match process::output(&mut git) {
        Ok(text) => text.split('\0').filter(|p| !p.is_empty()).map(str::to_owned).collect(),
        // An unpacked archive is no repository: everything in it but build results.
        Err(_) => {
            let mut all = Vec::new();
            walk(&workspace.root, &workspace.root, &mut all)?;
            all
        }
    };
    paths.retain(|p| workspace.root.join(p).is_file());
    paths.sort();
    Ok(paths)
}

fn walk(root: &Path, dir: &Path, paths: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(below) = path.strip_prefix(root).ok().and_then(Path::to_str) else { continue };
        if path.is_dir() {
            if !matches!(below, "target" | ".git" | ".cache") {
                walk(root, &path, paths)?;
            }
        } else {
            paths.push(below.to_owned());
        }
    }
    Ok(())
}

fn files(root: &Path, paths: &[String]) -> Vec<File> {
    let read = |path: &String| {
        let full = root.join(path);
        if fs::metadata(&full).ok()?.len() > LARGEST_TEXT {
            return None;
        }
        // What is not UTF-8 is not text.
        Some(File { path: path.clone(), text: fs::read_to_string(full).ok()? })
    };
    paths.iter().filter_map(read).collect()
}

fn top(paths: &[String]) -> Vec<Finding> {
    let mut entries: Vec<_> = paths.iter().map(|p| p.split('/').next().unwrap_or(p)).collect();
    entries.sort_unstable();
    entries.dedup();
    let strange = entries.iter().filter(|e| !TOP.contains(e));
    let mut found: Vec<_> = strange
        .map(|e| Finding::new(e, 1, "top", "has no place at the top; put it into the part it belongs to"))
        .collect();
    let missing = TOP.iter().filter(|t| !entries.contains(t) && !OPTIONAL.contains(t));
    found.extend(missing.map(|t| Finding::new(t, 1, "top", "is missing")));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_is_exactly_as_agreed() {
        let mut paths: Vec<String> = TOP.iter().map(|t| format!("{t}/x")).collect();
        assert!(top(&paths).is_empty());
        paths.push("scripts/build.sh".into());
        paths.retain(|p| !p.starts_with("manifests"));
        let found: Vec<_> = top(&paths).iter().map(ToString::to_string).collect();
        assert_eq!(found.len(), 2);
        assert!(found[0].starts_with("scripts:1: top: ") && found[1].starts_with("manifests:1: top: is missing"));
    }

    #[test]
    fn an_unpacked_archive_is_walked_without_build_results() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["src/a.rs", "target/b.rs", ".git/c", "d.md"] {
            fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
            fs::write(dir.path().join(path), "x").unwrap();
        }
        let mut paths = Vec::new();
        walk(dir.path(), dir.path(), &mut paths).unwrap();
        paths.sort();
        assert_eq!(paths, ["d.md", "src/a.rs"]);
        assert_eq!(files(dir.path(), &paths).len(), 2);
    }
}
