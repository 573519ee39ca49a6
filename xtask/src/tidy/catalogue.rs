//! The catalogue of errors has no dead entry: a code that nothing reports is a promise that nobody keeps.

use super::source::{Source, before_tests, has_word};
use super::{File, Finding};

/// Where the codes are declared.
const CATALOGUE: &str = "terway-daemon/core/src/errors.rs";

/// Codes that no shipped code names.
pub(super) fn check(files: &[File]) -> Vec<Finding> {
    let Some(catalogue) = files.iter().find(|file| file.path == CATALOGUE) else { return Vec::new() };
    let shipped = |path: &str| {
        path.ends_with(".rs")
            && (path.starts_with("terway-daemon/") || path.starts_with("terway-cni/"))
            && path != CATALOGUE
            && !path.split('/').any(|part| matches!(part, "tests" | "tests.rs"))
    };
    let code: Vec<String> = files
        .iter()
        .filter(|file| shipped(&file.path))
        .map(|file| Source::new(before_tests(&file.text)).code())
        .collect();
    let mut found = Vec::new();
    for (index, line) in catalogue.text.lines().enumerate() {
        let Some((name, _)) = line.trim().split_once(" = \"TW") else { continue };
        if !code.iter().any(|code| has_word(code, name)) {
            let advice =
                format!("nothing reports {name}: use it where its cause is met, or take it out before it ships");
            found.push(Finding::new(CATALOGUE, index + 1, "catalogue", &advice));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> File {
        File { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn a_code_that_nothing_reports_is_found() {
        let catalogue = "    /// Doc.\n    USED = \"TW0001\", \"used\", 1,\n    IDLE = \"TW0002\", \"idle\", 1,\n";
        let mut files = vec![
            file(CATALOGUE, catalogue),
            file("terway-daemon/src/a.rs", "//! IDLE is only in a comment.\nfn f() { e(errors::USED) }\n"),
            file("terway-daemon/core/src/x/tests.rs", "fn f() { e(errors::IDLE) }\n"),
        ];
        let found = check(&files);
        assert_eq!((found.len(), found[0].line, found[0].rule), (1, 3, "catalogue"));
        files.push(file("terway-cni/src/b.rs", "use errors::{IDLE};\n"));
        assert!(check(&files).is_empty());
    }
}
