//! tidy
pub(crate) fn run(_w: &crate::workspace::Workspace, _bless: bool) -> anyhow::Result<bool> {
    Ok(true)
}
