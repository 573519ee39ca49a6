//! `cargo xtask codegen`: builds and runs the package `codegen`, which writes the files that are generated and committed.

use anyhow::Result;

use crate::process;
use crate::progress;
use crate::workspace::Workspace;

/// Writes the generated files; with `check`, writes nothing and fails if one of them is not what would be written.
///
/// # Errors
/// The generator does not build, or refuses: it has then printed why.
pub(crate) fn run(workspace: &Workspace, check: bool) -> Result<()> {
    progress::build(workspace.cargo("build").args(["--package", "codegen"]), "building the generator")?;
    let mut command = workspace.cargo("run");
    command.args(["--quiet", "--package", "codegen", "--"]).args(check.then_some("--check"));
    process::check(&mut command)
}
