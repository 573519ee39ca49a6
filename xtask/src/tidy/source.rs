//! Just enough of Rust's lexical grammar to tell code, comments and literals apart, so that a rule about code does not
//! trip over a word in a sentence.

/// What a byte of a file belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Code,
    Comment,
    /// The inside of a string or character literal; its quotes are code.
    Literal,
}

/// A Rust file, taken apart.
pub(super) struct Source {
    kinds: Vec<Kind>,
    text: String,
}

impl Source {
    /// Reads a file's text.
    pub(super) fn new(text: &str) -> Self {
        Self { kinds: classify(text.as_bytes()), text: text.to_owned() }
    }

    /// The text with comments and literals blanked; lines and columns stay.
    pub(super) fn code(&self) -> String {
        self.only(&[Kind::Code])
    }

    /// The text with everything but comments blanked.
    pub(super) fn comments(&self) -> String {
        self.only(&[Kind::Comment])
    }

    /// The text with comments blanked, literals kept.
    pub(super) fn without_comments(&self) -> String {
        self.only(&[Kind::Code, Kind::Literal])
    }

    fn only(&self, kept: &[Kind]) -> String {
        let keep = |(byte, kind): (u8, &Kind)| if byte == b'\n' || kept.contains(kind) { byte } else { b' ' };
        let bytes: Vec<u8> = self.text.bytes().zip(&self.kinds).map(keep).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// The text before its test module, which by habit is the last thing in a file.
pub(super) fn before_tests(text: &str) -> &str {
    text.find("\n#[cfg(test)]\nmod ").map_or(text, |at| &text[..at])
}

/// Whether `text` holds `word` with no letter, digit or underscore beside it.
pub(super) fn has_word(text: &str, word: &str) -> bool {
    find_words(text, word).next().is_some()
}

/// Offsets of `word` in `text` where it stands alone.
pub(super) fn find_words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| !part(text[..at].chars().next_back()) && !part(text[at + word.len()..].chars().next()))
}

fn classify(text: &[u8]) -> Vec<Kind> {
    let mut kinds = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let (kind, length) = if rest.starts_with(b"//") {
            (Kind::Comment, rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()))
        } else if rest.starts_with(b"/*") {
            (Kind::Comment, block_comment(rest))
        } else if let Some(length) = literal(rest, at.checked_sub(1).map(|i| text[i])) {
            (Kind::Literal, length)
        } else {
            (Kind::Code, 1)
        };
        kinds.extend(std::iter::repeat_n(kind, length));
        at += length;
    }
    kinds
}

/// Block comments nest.
fn block_comment(text: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        match text[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => {
                (depth, at) = (depth - 1, at + 2);
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    text.len()
}

/// The length of a string or character literal that starts here.
fn literal(text: &[u8], before: Option<u8>) -> Option<usize> {
    let in_word = before.is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    match text {
        [b'"', ..] => Some(quoted(text, 1)),
        // br"…", r#"…"#, but not the raw identifier r#fn.
        [b'r', ..] if !in_word => raw(text, 1),
        [b'b', b'r', ..] if !in_word => raw(text, 2),
        [b'\'', b'\\', ..] => text[2..].iter().skip(1).position(|b| *b == b'\'').map(|i| i + 4),
        // 'x' or a character of several bytes; a lifetime has no quote that soon.
        [b'\'', rest @ ..] => {
            let width = std::str::from_utf8(&rest[..rest.len().min(4)])
                .ok()
                .or_else(|| (1..4).rev().find_map(|n| std::str::from_utf8(rest.get(..n)?).ok()))
                .and_then(|s| s.chars().next())
                .map_or(1, char::len_utf8);
            (rest.get(width) == Some(&b'\'')).then_some(width + 2)
        }
        _ => None,
    }
}

fn quoted(text: &[u8], start: usize) -> usize {
    let mut at = start;
    while at < text.len() {
        match text[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

fn raw(text: &[u8], prefix: usize) -> Option<usize> {
    let hashes = text[prefix..].iter().take_while(|b| **b == b'#').count();
    let start = prefix + hashes;
    if text.get(start) != Some(&b'"') {
        return None;
    }
    let mut end = vec![b'"'];
    end.extend(std::iter::repeat_n(b'#', hashes));
    let body = &text[start + 1..];
    let found = body.windows(end.len()).position(|w| w == end);
    Some(found.map_or(text.len(), |i| start + 1 + i + end.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn squeezed(text: &str) -> String {
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn comments_and_literals_leave_the_code() {
        let source = Source::new(
            "let a = \"unsafe // no\"; // a comment \"x\"\n/* one /* two */ still */ let b = 'u'; let c: &'static str = r#\"unsafe \"q\" \"#;\n",
        );
        assert_eq!(squeezed(&source.code()), "let a = ; let b = ; let c: &'static str = ;");
        assert_eq!(squeezed(&source.comments()), "// a comment \"x\" /* one /* two */ still */");
        assert!(source.without_comments().contains("unsafe // no"));
    }

    #[test]
    fn characters_and_lifetimes() {
        for (text, code) in [
            ("f('\\'', b'\"', '\\u{1f}', 'ä') // x", "f( , b , , )"),
            ("fn f<'a>(x: &'a str) {}", "fn f<'a>(x: &'a str) {}"),
            ("let r#fn = br##\"a\"#\"##; next", "let r#fn = ; next"),
            ("let s = \"a\\\\\"; t", "let s = ; t"),
        ] {
            assert_eq!(squeezed(&Source::new(text).code()), code, "{text}");
        }
    }

    #[test]
    fn lines_stay_in_place() {
        let text = "a\n// b\n\"c\nd\"\ne\n";
        let code = Source::new(text).code();
        assert_eq!(code.len(), text.len());
        assert_eq!(code.lines().nth(4), Some("e"));
    }

    #[test]
    fn words_stand_alone() {
        assert!(has_word("x unsafe{", "unsafe"));
        assert!(!has_word("not_unsafe unsafer", "unsafe"));
        assert_eq!(before_tests("a\n#[cfg(test)]\nmod tests {}\n"), "a");
    }
}
