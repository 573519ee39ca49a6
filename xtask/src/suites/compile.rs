//! Building test binaries once and finding them: cargo's JSON messages name each one and its package.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use crate::progress;
use crate::workspace::Workspace;

/// A built test binary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Binary {
    /// The package it belongs to.
    pub(crate) package: String,
    /// The target's name.
    pub(crate) name: String,
    /// `lib`, `bin` or `test`.
    pub(crate) kind: String,
    /// The package's folder, where its tests run.
    pub(crate) folder: PathBuf,
    /// The program.
    pub(crate) program: PathBuf,
    /// The target's root source file.
    pub(crate) source: PathBuf,
}

/// Builds the test binaries of `targets` (cargo's target flags) for the whole workspace and returns them.
///
/// Always with `--workspace`, so that features, and with them everything compiled, are the same for each rung.
///
/// # Errors
/// Something does not compile; cargo has then printed what.
pub(crate) fn tests(workspace: &Workspace, targets: &[String]) -> Result<Vec<Binary>> {
    let mut command = workspace.cargo("test");
    command.args(["--workspace", "--no-run", "--message-format=json-render-diagnostics"]).args(targets);
    let messages = progress::build(&mut command, "building the tests")?;
    Ok(messages.lines().filter_map(|line| binary(&serde_json::from_str(line).ok()?)).collect())
}

fn binary(message: &Value) -> Option<Binary> {
    let text = |v: &Value| v.as_str().map(str::to_owned);
    if message.get("reason")?.as_str()? != "compiler-artifact" || !message.get("profile")?.get("test")?.as_bool()? {
        return None;
    }
    let target = message.get("target")?;
    let folder = Path::new(message.get("manifest_path")?.as_str()?).parent()?.to_path_buf();
    Some(Binary {
        package: package_name(message.get("package_id")?.as_str()?)?,
        name: text(target.get("name")?)?,
        kind: text(target.get("kind")?.get(0)?)?,
        folder,
        program: text(message.get("executable")?)?.into(),
        source: text(target.get("src_path")?)?.into(),
    })
}

/// The name in a package id: `path+file:///w/tests#terway-tests@0.1.0`, or `path+file:///w/xtask#0.1.0` when the folder
/// has the package's name.
fn package_name(id: &str) -> Option<String> {
    let (url, fragment) = id.split_once('#')?;
    match fragment.split_once('@') {
        Some((name, _)) => Some(name.to_owned()),
        None => url.rsplit('/').next().map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_both_forms_of_package_ids() {
        assert_eq!(package_name("path+file:///w/tests#terway-tests@0.1.0").as_deref(), Some("terway-tests"));
        assert_eq!(package_name("path+file:///w/xtask#0.1.0").as_deref(), Some("xtask"));
        assert_eq!(package_name("nonsense"), None);
    }

    #[test]
    fn only_test_executables_are_taken() {
        let message = |test: bool| {
            serde_json::json!({
                "reason": "compiler-artifact", "package_id": "path+file:///w/tests#terway-tests@0.1.0",
                "manifest_path": "/w/tests/Cargo.toml", "executable": "/w/target/debug/deps/cni-1",
                "profile": {"test": test},
                "target": {"name": "cni", "kind": ["test"], "src_path": "/w/tests/tests/cni.rs"},
            })
        };
        let found = binary(&message(true)).unwrap();
        assert_eq!((found.package.as_str(), found.name.as_str(), found.kind.as_str()), ("terway-tests", "cni", "test"));
        assert_eq!(found.folder, Path::new("/w/tests"));
        assert_eq!(binary(&message(false)), None);
    }
}
