//! Rules about single files.

use super::Finding;
use super::source::{Source, find_words};

/// The longest file there may be; over 600 lines one asks why.
const LINES: usize = 900;
/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 8] = ["common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"];
/// Notes to oneself; written apart here, so that the rule does not find itself.
const NOTES: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("HA", "CK")];
/// Places that a checkout must not depend on: package registries' hosts and the folder beside a developer's checkout.
const OUTSIDE: [&str; 10] = [
    concat!("deb.", "debian.org"),
    concat!("security.", "debian.org"),
    concat!("snapshot.", "debian.org"),
    concat!("static.", "crates.io"),
    concat!("index.", "crates.io"),
    concat!("files.", "pythonhosted.org"),
    concat!("registry.", "npmjs.org"),
    concat!("proxy.", "golang.org"),
    concat!("../", "shared"),
    concat!("/work/", "shared"),
];

/// What is wrong with a Rust file.
pub(super) fn rust(path: &str, text: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    let generated = text.lines().take(3).any(|l| l.contains(concat!("@", "generated")));
    if !generated {
        if !text.starts_with("//!") {
            found.push(Finding::new(path, 1, "header", "start with `//!` and say what this room is for"));
        }
        let lines = text.lines().count();
        if lines > LINES {
            found.push(Finding::new(path, lines, "size", &format!("{lines} lines; split it, {LINES} is the most")));
        }
    }
    let source = Source::new(text);
    let (code, comments) = (source.code(), source.comments());
    found.extend(unexplained_unsafe(path, &code, &comments));
    if !generated {
        found.extend(unexplained_allow(path, &code));
    }
    for name in EMPTY_NAMES {
        for at in find_words(&code, name) {
            if code[..at].trim_end().ends_with("mod") {
                found.push(empty_name(path, line_of(&code, at), name));
            }
        }
    }
    found
}

/// What is wrong with the text of any file.
pub(super) fn any(path: &str, text: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    for part in path.split('/') {
        let stem = part.split('.').next().unwrap_or(part);
        if EMPTY_NAMES.contains(&stem) {
            found.push(empty_name(path, 1, stem));
        }
    }
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        for note in NOTES {
            if find_words(line, note).next().is_some() {
                let advice = format!("{note}: do it now, or file an issue");
                found.push(Finding::new(path, number, "note", &advice));
            }
        }
        for place in OUTSIDE {
            if line.contains(place) {
                found.push(Finding::new(path, number, "outside", &format!("do not name {place}; the tools know it")));
            }
        }
        if secret(line) {
            found.push(Finding::new(path, number, "secret", "take the credential out of the history and revoke it"));
        }
    }
    found
}

fn empty_name(path: &str, line: usize, name: &str) -> Finding {
    Finding::new(path, line, "name", &format!("`{name}` says nothing; name it after what it holds"))
}

/// `unsafe` needs `SAFETY:` (or, for a function's contract, `# Safety`) on its line or right above its statement.
///
/// Clippy checks the same for what the host compiles; this also covers the programs, which clippy never sees.
fn unexplained_unsafe(path: &str, code: &str, comments: &str) -> Vec<Finding> {
    let code: Vec<_> = code.lines().collect();
    let comments: Vec<_> = comments.lines().collect();
    let explained = |line: usize| comments.get(line).is_some_and(|c| c.contains("SAFETY:") || c.contains("# Safety"));
    let mut found = Vec::new();
    for (number, line) in code.iter().enumerate() {
        // `#[unsafe(…)]` is an attribute's syntax, and function pointer types promise nothing.
        let real = find_words(line, "unsafe").any(|at| !line[at + 6..].trim_start().starts_with('('));
        if !real {
            continue;
        }
        let mut above = number;
        let mut good = explained(number);
        while !good && above > 0 {
            above -= 1;
            let before = code[above].trim();
            let ends = before.ends_with(';') || before.ends_with('{') || before.ends_with('}');
            if ends && !before.starts_with('#') {
                break;
            }
            good = explained(above);
        }
        if !good {
            found.push(Finding::new(path, number + 1, "unsafe", "write `// SAFETY:` above it: why is this sound?"));
        }
    }
    found
}

/// An exception to a lint needs a reason.
fn unexplained_allow(path: &str, code: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("#[").chain(code.match_indices("#![")) {
        let attribute = bracketed(&code[at..]);
        let exception = ["allow", "expect"]
            .into_iter()
            .any(|w| find_words(attribute, w).any(|i| attribute[i + w.len()..].trim_start().starts_with('(')));
        if exception && !find_words(attribute, "reason").any(|i| attribute[i + 6..].trim_start().starts_with('=')) {
            found.push(Finding::new(path, line_of(code, at), "allow", "add `reason = \"…\"`, or follow the lint"));
        }
    }
    found
}

/// The text up to the bracket that closes the first one.
fn bracketed(text: &str) -> &str {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => {
                depth -= 1;
                if depth == 0 {
                    return &text[..=at];
                }
            }
            _ => {}
        }
    }
    text
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// Alibaba Cloud and AWS access keys, tokens of code hosts, private keys.
fn secret(line: &str) -> bool {
    if line.contains(concat!("-----", "BEGIN")) && line.contains(concat!("PRIVATE ", "KEY-----")) {
        return true;
    }
    let token = |prefix: &str, length: usize| {
        line.match_indices(prefix).any(|(at, _)| {
            let tail: String = line[at + prefix.len()..].chars().take_while(|c| c.is_ascii_alphanumeric()).collect();
            let lower = tail.to_ascii_lowercase();
            // Keys of the simulated cloud say what they are.
            let made_up = ["test", "fake", "example", "sample", "demo", "sim"].iter().any(|w| lower.contains(w));
            tail.len() >= length && !made_up
        })
    };
    token("LTAI", 12) || token("AKIA", 16) || token("ghp_", 30) || token("glpat-", 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(found: &[Finding]) -> Vec<&str> {
        found.iter().map(|f| f.rule).collect()
    }

    fn of(text: &str) -> Vec<Finding> {
        rust("x.rs", &format!("//! Room.\n{text}"))
    }

    #[test]
    fn header_and_size() {
        assert_eq!(rules(&rust("x.rs", "fn f() {}\n")), ["header"]);
        assert_eq!(rules(&of(&"fn f() {}\n".repeat(900))), ["size"]);
        assert!(of(&"fn f() {}\n".repeat(899)).is_empty());
        assert!(rust("x.rs", concat!("// This file is @", "generated\n")).is_empty());
    }

    #[test]
    fn unsafe_needs_its_reason_nearby() {
        assert_eq!(of("fn f() {\n    unsafe { g() };\n}\n")[0].line, 3);
        for good in [
            "// SAFETY: g wants nothing.\nunsafe { g() };\n",
            "let x = unsafe { g() }; // SAFETY: as above.\n",
            "// SAFETY: pads are zero.\n#[cfg(x)]\nunsafe impl P for X {}\n",
            "// SAFETY: valid.\nlet x =\n    unsafe { g() };\n",
            "/// Does.\n///\n/// # Safety\n/// The caller.\npub unsafe fn f() {}\n",
            "#[unsafe(no_mangle)]\nfn f() {}\n",
            "// unsafe is a word here\nlet s = \"unsafe\";\n",
        ] {
            assert!(of(good).is_empty(), "{good}");
        }
        let far = "// SAFETY: of another.\nlet y = 1;\nunsafe { g() };\n";
        assert_eq!(rules(&of(far)), ["unsafe"]);
    }

    #[test]
    fn exceptions_need_a_reason() {
        for bad in [
            "#[allow(dead_code)]\nfn f() {}\n",
            "#![expect(unused)]\n",
            "#[cfg_attr(x, allow(\n  unused))]\nfn f() {}\n",
        ] {
            assert_eq!(rules(&of(bad)), ["allow"], "{bad}");
        }
        for good in [
            "#[allow(dead_code, reason = \"why\")]\nfn f() {}\n",
            "fn f() { x.expect(1); }\n",
            "#[derive(Debug)]\nstruct A;\n",
        ] {
            assert!(of(good).is_empty(), "{good}");
        }
    }

    #[test]
    fn names_that_say_nothing() {
        assert_eq!(rules(&of("mod utils;\n")), ["name"]);
        assert_eq!(rules(&any("a/helpers/x.rs", "")), ["name"]);
        assert_eq!(rules(&any("a/common.rs", "")), ["name"]);
        assert!(of("let common = 1;\n").is_empty() && any("a/command.rs", "").is_empty());
    }

    #[test]
    fn notes_outside_and_secrets() {
        assert_eq!(rules(&any("a.md", concat!("x TO", "DO: y\n"))), ["note"]);
        assert_eq!(rules(&any("a.md", concat!("see .", "./shared/x\n"))), ["outside"]);
        assert_eq!(rules(&any("a.sh", concat!("get http://deb.", "debian.org/x\n"))), ["outside"]);
        assert_eq!(rules(&any("a.rs", concat!("\"LTA", "I5tAbCdEfGhIjKlMn\"\n"))), ["secret"]);
        assert_eq!(rules(&any("a.pem", concat!("-----BEGIN RSA PRIVATE", " KEY-----\n"))), ["secret"]);
        assert!(any("a.rs", concat!("\"LTA", "I5tFakeKeyForTests\" METHODOLOGY\n")).is_empty());
    }
}
