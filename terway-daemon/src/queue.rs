//! Queue of DELs that the plugin wrote while the daemon was away (the protocol is in `terway_core::cni::queue`).

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use terway_core::cni::QueuedDel;
use terway_core::cni::queue::SUFFIX;
use tracing::{info, warn};

/// Age after which an incomplete file is removed; the plugin's time limit is shorter.
const ABANDONED: Duration = Duration::from_secs(600);

/// The finished DELs in `dir`, in no order, with the files that hold them.
///
/// Files that cannot be read as a DEL are moved out of the way, so that they neither block the folder nor get lost.
///
/// # Errors
/// When the folder cannot be listed; a missing one is empty.
pub fn read(dir: &Path) -> std::io::Result<Vec<(PathBuf, QueuedDel)>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if !path.to_string_lossy().ends_with(SUFFIX) {
            remove_abandoned(&path);
            continue;
        }
        let Ok(content) = std::fs::read(&path) else { continue };
        match QueuedDel::decode(&content) {
            Ok(del) => found.push((path, del)),
            Err(error) => {
                let aside = path.with_extension("bad");
                warn!(path = %aside.display(), %error, "failed to decode a queued DEL; the file was renamed");
                let _ = std::fs::rename(&path, aside);
            }
        }
    }
    Ok(found)
}

fn remove_abandoned(path: &Path) {
    let modified = path.metadata().and_then(|m| m.modified()).unwrap_or_else(|_| SystemTime::now());
    if path.extension().is_some_and(|e| e != "bad") && modified.elapsed().is_ok_and(|age| age > ABANDONED) {
        info!(path = %path.display(), "removed an incomplete file from the queue of DELs");
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use terway_core::cni::queue::file_name;
    use terway_core::ident::AttachmentKey;

    use super::*;

    #[test]
    fn reads_what_is_whole_and_puts_aside_what_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(&dir.path().join("missing")).unwrap().is_empty());
        let attachment = AttachmentKey { network: "n".into(), container_id: "c".into(), ifname: "eth0".into() };
        let del = QueuedDel { attachment: attachment.clone(), netns: String::new() };
        std::fs::write(dir.path().join(file_name(&attachment)), del.encode()).unwrap();
        std::fs::write(dir.path().join(format!("x{SUFFIX}")), b"{").unwrap();
        std::fs::write(dir.path().join("y.tmp"), b"{").unwrap();
        let found = read(dir.path()).unwrap();
        assert_eq!(found.iter().map(|(_, d)| d.clone()).collect::<Vec<_>>(), [del]);
        assert_eq!(read(dir.path()).unwrap().len(), 1);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}
