//! `terway-cli mapping`: each pod's way, layer by layer, and what does not fit.

use std::fmt::Write as _;

use serde_json::{Value, json};
use terway_proto::v1;

use super::table::{Style, error_json, error_line, pod_json, pod_name, pretty};

/// Whether everything fits and everybody answered.
pub(super) fn agrees(reply: &v1::GetMappingResponse) -> bool {
    !reply.findings.iter().any(|finding| finding.mismatch) && reply.sources.iter().all(|source| source.error.is_none())
}

pub(super) fn render(reply: &v1::GetMappingResponse, style: Style) -> String {
    if style.is_json() {
        return pretty(&json!({
            "agrees": agrees(reply),
            "pods": reply.pods.iter().map(row_value).collect::<Vec<_>>(),
            "findings": reply.findings.iter().map(finding_value).collect::<Vec<_>>(),
            "sources": reply.sources.iter()
                .map(|source| json!({"name": source.name, "error": error_json(source.error.as_ref())}))
                .collect::<Vec<_>>(),
        }));
    }
    let mut out = rows(&reply.pods, style);
    if !reply.findings.is_empty() {
        out.push('\n');
        out.push_str(&findings(&reply.findings, style));
    }
    for source in &reply.sources {
        if let Some(error) = &source.error {
            let _ =
                writeln!(out, "\n{} did not answer: {}\n  remedy  {}", source.name, error_line(error), error.remedy);
        }
    }
    out
}

fn rows(pods: &[v1::MappingRow], style: Style) -> String {
    let head = [
        "POD",
        "ADDRESSES",
        "INTERFACE",
        "ENI",
        "LINK",
        "ROUTE",
        "RULE",
        "DATAPATH",
        "CLOUD",
        "+ENI-INTERFACE",
        "+PHASE",
        "+CONTAINER",
        "+IFNAME",
    ];
    let rows = pods.iter().map(|row| {
        let key = row.attachment.clone().unwrap_or_default();
        let mut cells =
            vec![pod_name(row.pod.as_ref()), row.addresses.join(","), row.host_ifname.clone(), row.eni.clone()];
        cells.extend(layers(row).map(|(_, verdict)| mark(verdict)));
        cells.extend([row.eni_ifname.clone(), row.phase.clone(), key.container_id, key.ifname]);
        cells
    });
    style.table(&head, rows)
}

/// The findings as a table.
pub(super) fn findings(findings: &[v1::Finding], style: Style) -> String {
    let rows = findings.iter().map(|f| {
        let mark = if f.mismatch { "MISMATCH" } else { "note" };
        let (pod, kind, subject) = (pod_name(f.pod.as_ref()), f.kind.clone(), f.subject.clone());
        vec![mark.to_owned(), kind, pod, subject, f.action.clone(), f.evidence.clone()]
    });
    style.table(&["VERDICT", "KIND", "POD", "SUBJECT", "ACTION", "EVIDENCE"], rows)
}

/// The layers of a row by name.
pub(super) fn layers(row: &v1::MappingRow) -> impl Iterator<Item = (&'static str, &String)> {
    [
        ("link", &row.link),
        ("route", &row.route),
        ("rule", &row.rule),
        ("datapath", &row.datapath),
        ("cloud", &row.cloud),
    ]
    .into_iter()
}

/// What is wrong must meet the eye.
pub(super) fn mark(verdict: &str) -> String {
    match verdict {
        "wrong" => "WRONG".to_owned(),
        "unknown" => "?".to_owned(),
        other => other.to_owned(),
    }
}

pub(super) fn row_value(row: &v1::MappingRow) -> Value {
    let key = row.attachment.clone().unwrap_or_default();
    json!({
        "pod": pod_json(row.pod.as_ref()), "network": key.network, "containerID": key.container_id,
        "ifname": key.ifname, "phase": row.phase, "addresses": row.addresses, "eni": row.eni,
        "eniInterface": row.eni_ifname, "hostInterface": row.host_ifname,
        "layers": layers(row).map(|(name, verdict)| (name.to_owned(), verdict.clone().into()))
            .collect::<serde_json::Map<_, _>>(),
    })
}

pub(super) fn finding_value(f: &v1::Finding) -> Value {
    json!({
        "kind": f.kind, "pod": pod_json(f.pod.as_ref()),
        "containerID": f.attachment.as_ref().map(|key| key.container_id.clone()),
        "subject": f.subject, "evidence": f.evidence, "action": f.action, "mismatch": f.mismatch,
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn mismatches_are_marked() {
        insta::assert_snapshot!("mapping", sample::all(|style| render(&sample::mapping(), style)));
    }

    #[test]
    fn notes_agree_mismatches_and_silence_do_not() {
        let mut reply = sample::mapping();
        assert!(!agrees(&reply));
        reply.findings.retain(|finding| !finding.mismatch);
        assert!(!reply.findings.is_empty() && !agrees(&reply));
        reply.sources.iter_mut().for_each(|source| source.error = None);
        assert!(agrees(&reply));
    }
}
