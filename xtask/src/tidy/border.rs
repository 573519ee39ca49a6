//! The border between kernel and user space: every name is used on both sides, every drop reason has a program that
//! gives it, and a changed ABI has a new version.

use sha2::{Digest, Sha256};

use super::source::{Source, before_tests, has_word};
use super::{File, Finding};

const ABI: &str = "terway-ebpf/abi/src/";
const KERNEL: &str = "terway-ebpf/src/";
const USER: &str = "terway-daemon/src/bpf/";
/// The ABI that the tree last agreed on: its version, and the hash of its source.
pub(super) const RECORD: &str = "terway-ebpf/abi/ABI_HASH";

/// All rules of the border. An empty side is a finding too: the rules would hold of nothing.
pub(super) fn check(files: &[File], record: Option<&str>) -> Vec<Finding> {
    let side = |prefix: &str| -> String {
        let rust = files.iter().filter(|f| f.path.starts_with(prefix) && f.path.ends_with(".rs"));
        rust.map(|f| Source::new(before_tests(&f.text)).without_comments()).collect()
    };
    let (kernel, user) = (side(KERNEL), side(USER));
    let mut found = Vec::new();
    for (prefix, text) in [(KERNEL, &kernel), (USER, &user)] {
        if text.is_empty() {
            found.push(Finding::new(prefix, 1, "border", "no source here; this rule looks in the wrong place"));
        }
    }
    for file in files.iter().filter(|f| f.path.starts_with(ABI) && f.path.ends_with(".rs")) {
        found.extend(names(file, &kernel, &user));
        found.extend(drops(file, &kernel));
    }
    if !found.is_empty() || user.is_empty() {
        return finish(found, files, record);
    }
    if !has_word(&user, "Drop") {
        found.push(Finding::new(USER, 1, "border", "nothing here names drop reasons; report them by `Drop::name`"));
    }
    finish(found, files, record)
}

fn finish(mut found: Vec<Finding>, files: &[File], record: Option<&str>) -> Vec<Finding> {
    found.extend(literals(files));
    found.extend(version(files, record));
    found
}

/// `pub const NAME: &str = "VALUE";` of the ABI, used by either spelling on both sides. A list of the ABI that is used
/// stands for all that it holds.
fn names(file: &File, kernel: &str, user: &str) -> Vec<Finding> {
    let text = Source::new(before_tests(&file.text)).without_comments();
    let lists = lists(&text);
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let Some((name, value)) = constant(line) else { continue };
        let uses = |side: &str| {
            has_word(side, name)
                || has_word(side, value)
                || lists.iter().any(|(list, members)| members.contains(&name) && has_word(side, list))
        };
        for (side, place) in [(kernel, KERNEL), (user, USER)] {
            if !side.is_empty() && !uses(side) {
                let advice = format!("`{name}` is not used in {place}; a name stands on both sides or goes");
                found.push(Finding::new(&file.path, index + 1, "border", &advice));
            }
        }
    }
    found
}

/// A string constant that names something across the border. `PIN_DIR` and the like name files, not kernel objects.
fn constant(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.strip_prefix("    ")?.trim_start().strip_prefix("pub const ")?.split_once(": &str = \"")?;
    Some((name, rest.split_once('"')?.0))
}

/// `pub const LIST: [&str; N] = [A, B];`
fn lists(text: &str) -> Vec<(&str, Vec<&str>)> {
    let one = |part: &'_ str| -> Option<usize> { part.find(": [&str;") };
    text.split("pub const ")
        .skip(1)
        .filter_map(|part| {
            let name = &part[..one(part)?];
            let body = part.split_once("= [")?.1.split_once(']')?.0;
            Some((name, body.split(',').map(str::trim).filter(|m| !m.is_empty()).collect()))
        })
        .collect()
}

/// `Variant = 1, "name", …` in the table of drop reasons: each is given by a program.
fn drops(file: &File, kernel: &str) -> Vec<Finding> {
    if !file.path.ends_with("/drop.rs") {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (index, line) in before_tests(&file.text).lines().enumerate() {
        let Some((variant, rest)) = line.trim().split_once(" = ") else { continue };
        let numbered = rest.split_once(", \"").is_some_and(|(n, _)| n.bytes().all(|b| b.is_ascii_digit()));
        if numbered && !has_word(kernel, variant) {
            let advice = format!("no program drops for `{variant}`; a reason that cannot happen misleads");
            found.push(Finding::new(&file.path, index + 1, "border", &advice));
        }
    }
    found
}

/// User space asks for kernel objects by the ABI's constants, never by a literal.
fn literals(files: &[File]) -> Vec<Finding> {
    let calls = ["map(\"", "map_mut(\"", "take_map(\"", "program(\"", "program_mut(\"", "override_global(\""];
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.path.starts_with(USER)) {
        let text = Source::new(before_tests(&file.text)).without_comments();
        for (index, line) in text.lines().enumerate() {
            if calls.iter().any(|c| line.contains(&format!(".{c}"))) {
                found.push(Finding::new(&file.path, index + 1, "border", "use the constant in terway_abi::names"));
            }
        }
    }
    found
}

/// The version in the source, and the hash of all that is not comment or test.
pub(super) fn present(files: &[File]) -> Option<(u32, String)> {
    let mut sources: Vec<_> = files.iter().filter(|f| f.path.starts_with(ABI) && f.path.ends_with(".rs")).collect();
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    let mut hash = Sha256::new();
    let mut version = None;
    for file in sources {
        let text = Source::new(before_tests(&file.text)).without_comments();
        let line = text.lines().find_map(|l| l.trim().strip_prefix("pub const ABI_VERSION: u32 = "));
        version = version.or_else(|| line?.trim_end_matches(';').parse().ok());
        hash.update(&file.path);
        for word in text.split_whitespace() {
            hash.update([0]);
            hash.update(word);
        }
    }
    let digest = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Some((version?, digest))
}

fn version(files: &[File], record: Option<&str>) -> Option<Finding> {
    let Some((version, hash)) = present(files) else {
        return Some(Finding::new(ABI, 1, "abi", "there is no ABI_VERSION here"));
    };
    let recorded = record.and_then(|r| r.trim().split_once(' ')).and_then(|(v, h)| Some((v.parse::<u32>().ok()?, h)));
    let advice = match recorded {
        Some((old, old_hash)) if old == version && old_hash == hash => return None,
        Some((old, _)) if old >= version => {
            "the ABI changed: raise ABI_VERSION and PIN_DIR, then `cargo xtask tidy --bless-abi`"
        }
        _ => "record this ABI: `cargo xtask tidy --bless-abi`",
    };
    Some(Finding::new(RECORD, 1, "abi", advice))
}

/// The record to write, or why not.
pub(super) fn bless(files: &[File], record: Option<&str>) -> Result<String, &'static str> {
    let (version, hash) = present(files).ok_or("terway-abi has no ABI_VERSION")?;
    let fresh = format!("{version} {hash}\n");
    let recorded = record.and_then(|r| r.split_once(' ')?.0.parse::<u32>().ok());
    if recorded.is_some_and(|old| old >= version) && record != Some(&fresh) {
        return Err("the ABI changed but ABI_VERSION did not: pins of the old layout would be taken for the new one");
    }
    Ok(fresh)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> File {
        File { path: path.into(), text: text.into() }
    }

    fn tree() -> Vec<File> {
        vec![
            file(
                "terway-ebpf/abi/src/lib.rs",
                "//! Abi.\npub const ABI_VERSION: u32 = 1;\npub mod names {\n    pub const FLOWS: &str = \"FLOWS\";\n    \
                 pub const BUDGET: &str = \"BUDGET\";\n    pub const MAPS: [&str; 2] = [FLOWS, BUDGET];\n}\n",
            ),
            file("terway-ebpf/abi/src/drop.rs", "drops! {\n    Spoofed = 1, \"spoofed\", \"Text.\";\n}\n"),
            file("terway-ebpf/src/maps.rs", "static FLOWS: X; static BUDGET: X; fn f() { Drop::Spoofed }\n"),
            file("terway-daemon/src/bpf/maps.rs", "use names; for m in names::MAPS {} Drop::from_number(1)\n"),
        ]
    }

    fn blessed(files: &[File]) -> String {
        bless(files, None).unwrap()
    }

    #[test]
    fn a_border_in_order_has_no_findings() {
        let files = tree();
        assert!(check(&files, Some(&blessed(&files))).is_empty());
    }

    #[test]
    fn a_name_on_one_side_only_is_found() {
        let mut files = tree();
        files[2].text = "static FLOWS: X; fn f() { Drop::Spoofed } // BUDGET in a comment does not count\n".into();
        let found = check(&files, Some(&blessed(&files)));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].advice.contains("`BUDGET`") && found[0].line == 5);
        files = tree();
        files[3].text = "names::FLOWS Drop\n".into();
        assert_eq!(check(&files, Some(&blessed(&files))).len(), 1);
    }

    #[test]
    fn a_drop_reason_nobody_gives_is_found() {
        let mut files = tree();
        files[2].text = "FLOWS BUDGET\n\n#[cfg(test)]\nmod tests { Drop::Spoofed }\n".into();
        let found = check(&files, Some(&blessed(&files)));
        assert!(found.iter().any(|f| f.advice.contains("`Spoofed`")), "{found:?}");
    }

    #[test]
    fn a_literal_name_in_user_space_is_found() {
        let mut files = tree();
        files[3].text.push_str("ebpf.map_mut(\"FLOWS\")\n");
        assert_eq!(check(&files, Some(&blessed(&files))).len(), 1);
    }

    #[test]
    fn a_missing_side_is_found() {
        let mut files = tree();
        files.remove(3);
        assert!(check(&files, Some(&blessed(&files))).iter().any(|f| f.advice.contains("wrong place")));
    }

    #[test]
    fn a_changed_abi_needs_a_version() {
        let mut files = tree();
        let record = blessed(&files);
        files[0].text = files[0].text.replace("//! Abi.", "//! Other words, more   space.");
        assert!(check(&files, Some(&record)).is_empty(), "comments are not the ABI");
        files[0].text.push_str("pub struct New;\n");
        assert!(check(&files, Some(&record))[0].advice.contains("raise ABI_VERSION"));
        assert!(bless(&files, Some(&record)).is_err());
        files[0].text = files[0].text.replace("ABI_VERSION: u32 = 1", "ABI_VERSION: u32 = 2");
        assert!(check(&files, Some(&record))[0].advice.contains("bless"));
        let new = bless(&files, Some(&record)).unwrap();
        assert!(new.starts_with("2 ") && check(&files, Some(&new)).is_empty());
        assert_eq!(bless(&files, Some(&new)).unwrap(), new, "blessing twice changes nothing");
    }
}
