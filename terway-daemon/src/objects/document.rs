//! Parser of manifests: from the text of a file to objects, each with its line.

use std::path::Path;

use serde::Deserialize;
use serde_json::value::RawValue;
use terway_core::objects::{Kind, Object};

/// The contents of a file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    /// Objects of the kinds that are read, each with its first line.
    pub(super) objects: Vec<(usize, Object)>,
    /// Documents that cannot be read: line and reason.
    pub(super) problems: Vec<(usize, String)>,
}

/// Whether a file is a manifest, by its name.
pub(super) fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let known = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
    known && !hidden
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Header {
    api_version: String,
    kind: String,
}

enum DocumentKind {
    Object(Kind),
    List,
    /// A kind that is not read.
    Other,
    Invalid(String),
}

impl Header {
    fn document_kind(&self) -> DocumentKind {
        if let Some(kind) = Kind::find(&self.api_version, &self.kind) {
            return DocumentKind::Object(kind);
        }
        let of_core = self.api_version == "v1";
        if of_core && self.kind == "List" || Kind::ALL.iter().any(|k| self.kind == format!("{k}List")) {
            return DocumentKind::List;
        }
        if self.kind.is_empty() {
            return DocumentKind::Invalid("the document has no `kind`".to_owned());
        }
        // Another version of the same group is an error; another group has a kind of the same name that is not read.
        let group = |version: &str| version.rsplit_once('/').map_or(String::new(), |(group, _)| group.to_owned());
        let ours = Kind::ALL.into_iter().find(|k| k.name() == self.kind);
        match ours.filter(|k| group(k.api_version()) == group(&self.api_version)) {
            Some(kind) => DocumentKind::Invalid(format!(
                "{kind} is read in apiVersion {}, not in {}",
                kind.api_version(),
                self.api_version
            )),
            None => DocumentKind::Other,
        }
    }
}

/// Parses a file in the format of its extension.
pub(super) fn read(path: &Path, text: &str) -> Content {
    if path.extension().is_some_and(|e| e == "json") { json(text) } else { yaml(text) }
}

fn yaml(text: &str) -> Content {
    let mut content = Content::default();
    for (before, document) in documents(text) {
        yaml_document(before, document, &mut content);
    }
    content
}

/// The documents of a stream, each with the number of lines before it. A line of `---` always separates (YAML 1.2.2, 9.1.2), so that one
/// document that cannot be parsed takes no other with it.
fn documents(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut begin, mut begin_line, mut at) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let separates =
            line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if separates && at > begin {
            documents.push((begin_line, &text[begin..at]));
            (begin, begin_line) = (at, number);
        }
        at += line.len();
    }
    documents.push((begin_line, &text[begin..]));
    documents
}

fn yaml_document(before: usize, text: &str, content: &mut Content) {
    let fail = |content: &mut Content, error: &yaml_serde::Error| {
        let line = error.location().map_or(1, |at| at.line().max(1));
        content.problems.push((before + line, reason(error)));
    };
    let header = match yaml_serde::from_str::<Option<Header>>(text) {
        Ok(Some(header)) => header,
        Ok(None) => return,
        Err(error) => return fail(content, &error),
    };
    let first = before + 1 + text.lines().take_while(|line| is_filler(line)).count();
    match header.document_kind() {
        DocumentKind::Other => {}
        DocumentKind::Invalid(why) => content.problems.push((first, why)),
        DocumentKind::Object(kind) => match Object::read(kind, yaml_serde::Deserializer::from_str(text)) {
            Ok(object) => content.objects.push((first, object)),
            Err(error) => fail(content, &error),
        },
        DocumentKind::List => match yaml_serde::from_str::<YamlList>(text) {
            Ok(list) => yaml_items(before, text, list, content),
            Err(error) => fail(content, &error),
        },
    }
}

fn is_filler(line: &str) -> bool {
    let line = line.trim();
    line.is_empty() || line.starts_with('#') || line.starts_with("---")
}

#[derive(Deserialize)]
struct YamlList {
    #[serde(default)]
    items: Vec<yaml_serde::Value>,
}

fn yaml_items(before: usize, text: &str, list: YamlList, content: &mut Content) {
    let lines = item_lines(text);
    for (i, item) in list.items.into_iter().enumerate() {
        let line = before + lines.get(i).copied().unwrap_or(1);
        let header: Header = match Deserialize::deserialize(&item) {
            Ok(header) => header,
            Err(error) => {
                content.problems.push((line, format!("items[{i}]: {}", reason(&error))));
                continue;
            }
        };
        match header.document_kind() {
            DocumentKind::Other => {}
            DocumentKind::List => content.problems.push((line, format!("items[{i}]: a list in a list"))),
            DocumentKind::Invalid(why) => content.problems.push((line, format!("items[{i}]: {why}"))),
            DocumentKind::Object(kind) => match Object::read(kind, item) {
                Ok(object) => content.objects.push((line, object)),
                Err(error) => content.problems.push((line, format!("items[{i}]: {}", reason(&error)))),
            },
        }
    }
}

/// The lines at which the elements of a block-style `items:` begin: those with the dash at the column of the first one.
fn item_lines(text: &str) -> Vec<usize> {
    let mut lines = text.lines().enumerate().skip_while(|(_, line)| !line.starts_with("items:")).skip(1).peekable();
    let indent = lines.peek().map_or(0, |(_, line)| line.len() - line.trim_start().len());
    let begins =
        |line: &str| line.len() > indent && line[..indent].trim().is_empty() && line[indent..].starts_with('-');
    lines
        .filter(|(_, line)| line.is_char_boundary(indent.min(line.len())) && begins(line))
        .map(|(i, _)| i + 1)
        .collect()
}

/// The error without its position, which is reported as a line of the file.
fn reason(error: &yaml_serde::Error) -> String {
    let text = error.to_string();
    text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]).to_owned()
}

#[derive(Deserialize)]
struct JsonList<'a> {
    #[serde(borrow, default)]
    items: Vec<&'a RawValue>,
}

/// JSON documents, one after the other.
fn json(text: &str) -> Content {
    let mut content = Content::default();
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    loop {
        match stream.next() {
            None => return content,
            Some(Ok(raw)) => json_document(text, raw, true, &mut content),
            Some(Err(error)) => {
                content.problems.push((error.line(), json_reason(&error)));
                return content;
            }
        }
    }
}

fn json_document(text: &str, raw: &RawValue, top: bool, content: &mut Content) {
    let begin = raw.get().as_ptr() as usize - text.as_ptr() as usize;
    let before = || text.as_bytes()[..begin].iter().filter(|b| **b == b'\n').count();
    let fail = |content: &mut Content, error: &serde_json::Error| {
        content.problems.push((before() + error.line().max(1), json_reason(error)));
    };
    let header = match serde_json::from_str::<Header>(raw.get()) {
        Ok(header) => header,
        Err(error) => return fail(content, &error),
    };
    match header.document_kind() {
        DocumentKind::Other => {}
        DocumentKind::Invalid(why) => content.problems.push((before() + 1, why)),
        DocumentKind::Object(kind) => match Object::read(kind, &mut serde_json::Deserializer::from_str(raw.get())) {
            // The line of a valid object is used only if another file holds it too; counting newlines for each would be quadratic.
            Ok(object) => content.objects.push((if top { before() + 1 } else { 1 }, object)),
            Err(error) => fail(content, &error),
        },
        DocumentKind::List if top => match serde_json::from_str::<JsonList<'_>>(raw.get()) {
            Ok(list) => list.items.into_iter().for_each(|item| json_document(text, item, false, content)),
            Err(error) => fail(content, &error),
        },
        DocumentKind::List => content.problems.push((before() + 1, "a list in a list".to_owned())),
    }
}

fn json_reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]).to_owned()
}
