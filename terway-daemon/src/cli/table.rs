//! Tables and blocks of text, and the pieces of JSON that several commands share.

use std::fmt::Write as _;

use serde_json::{Value, json};
use terway_proto::v1;

use super::Output;

/// How the user wants it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) output: Output,
    pub(super) headers: bool,
}

impl Style {
    pub(super) fn wide(self) -> bool {
        self.output == Output::Wide
    }

    pub(super) fn is_json(self) -> bool {
        self.output == Output::Json
    }

    /// A table; columns whose head begins with `+` are only for wide screens. Empty cells become `-`.
    pub(super) fn table(self, head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
        let shown: Vec<usize> = (0..head.len()).filter(|i| self.wide() || !head[*i].starts_with('+')).collect();
        let pick = |line: &[String]| -> Vec<String> {
            let cell = |i: &usize| line.get(*i).filter(|cell| !cell.is_empty()).map_or("-", String::as_str).to_owned();
            shown.iter().map(cell).collect()
        };
        let mut lines = Vec::new();
        if self.headers {
            lines.push(shown.iter().map(|i| head[*i].trim_start_matches('+').to_owned()).collect());
        }
        lines.extend(rows.into_iter().map(|row| pick(&row)));
        aligned(&lines)
    }
}

/// Columns as wide as their widest cell, two spaces between them.
fn aligned(lines: &[Vec<String>]) -> String {
    let mut widths = vec![0; lines.iter().map(Vec::len).max().unwrap_or(0)];
    for line in lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for line in lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(out, "{}", cells.join("  ").trim_end());
    }
    out
}

/// Name and value a line, empty values left out.
pub(super) fn block(facts: &[(&str, String)]) -> String {
    let facts = facts.iter().filter(|(_, value)| !value.is_empty());
    aligned(&facts.map(|(name, value)| vec![(*name).to_owned(), value.clone()]).collect::<Vec<_>>())
}

/// `namespace/name`, empty without a name.
pub(super) fn pod_name(pod: Option<&v1::Pod>) -> String {
    match pod {
        Some(pod) if !pod.name.is_empty() => format!("{}/{}", pod.namespace, pod.name),
        _ => String::new(),
    }
}

pub(super) fn error_line(error: &v1::ErrorDetail) -> String {
    [error.code.as_str(), &error.cause, &error.detail]
        .into_iter()
        .filter(|s| !s.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

pub(super) fn pod_json(pod: Option<&v1::Pod>) -> Value {
    pod.map_or(Value::Null, |pod| json!({"namespace": pod.namespace, "name": pod.name, "uid": pod.uid}))
}

pub(super) fn error_json(error: Option<&v1::ErrorDetail>) -> Value {
    error.map_or(Value::Null, |e| json!({"code": e.code, "cause": e.cause, "remedy": e.remedy, "detail": e.detail}))
}

pub(super) fn errors_json(errors: &[v1::ErrorDetail]) -> Value {
    errors.iter().map(|error| error_json(Some(error))).collect()
}

pub(super) fn pool_json(pool: Option<&v1::Pool>) -> Value {
    let pool = pool.copied().unwrap_or_default();
    json!({
        "capacity": pool.capacity, "idle": pool.idle, "bound": pool.bound, "cooling": pool.cooling,
        "pending": pool.pending,
    })
}

pub(super) fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn style(output: Output, headers: bool) -> Style {
        Style { output, headers }
    }

    #[test]
    fn tables_align_do_not_trail_and_fill_gaps() {
        let rows = || [vec!["wide cell".to_owned(), "x".into(), "m".into()], vec![String::new(), "y".into()]];
        let head = ["A", "LONGER", "+MORE"];
        assert_eq!(style(Output::Table, true).table(&head, rows()), "A          LONGER\nwide cell  x\n-          y\n");
        assert_eq!(style(Output::Table, false).table(&head, rows()), "wide cell  x\n-          y\n");
        assert_eq!(style(Output::Wide, false).table(&head, rows()), "wide cell  x  m\n-          y  -\n");
    }

    #[test]
    fn blocks_leave_out_what_is_empty() {
        assert_eq!(block(&[("a", "1".into()), ("b", String::new()), ("long", "2".into())]), "a     1\nlong  2\n");
    }
}
