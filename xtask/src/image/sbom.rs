//! The software bill of materials of the image: every crate that is linked into its programs, as SPDX 2.3 JSON
//! (<https://spdx.github.io/spdx-spec/v2.3/>).

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::process;
use crate::workspace::Workspace;

/// The packages whose programs the image holds.
const ROOTS: [&str; 2] = ["terway-cni", "terway-daemon"];

/// The document for the crates that are linked on this platform. The same tree gives the same document.
///
/// # Errors
/// Cargo cannot resolve the dependencies.
pub(super) fn document(workspace: &Workspace, name: &str) -> Result<Value> {
    let mut cargo = workspace.cargo("metadata");
    cargo.args(["--format-version", "1", "--locked", "--filter-platform"]);
    cargo.arg(format!("{}-unknown-linux-gnu", std::env::consts::ARCH));
    let metadata: Value = serde_json::from_str(&process::output(&mut cargo)?).context("cargo metadata")?;
    let packages = linked(&metadata)?;
    let id = |package: &Value| {
        format!("SPDXRef-{}-{}", text(&package["name"]), text(&package["version"]).replace('+', "-")).replace('_', "-")
    };
    let listed: Vec<Value> = packages
        .values()
        .map(|package| {
            let registry = package["source"].is_string();
            json!({
                "SPDXID": id(package),
                "name": package["name"],
                "versionInfo": package["version"],
                "downloadLocation": if registry {
                    format!("https://crates.io/crates/{}/{}", text(&package["name"]), text(&package["version"]))
                } else {
                    "NOASSERTION".to_owned()
                },
                "filesAnalyzed": false,
                "licenseConcluded": "NOASSERTION",
                "licenseDeclared": package["license"].as_str().unwrap_or("NOASSERTION").replace('/', " OR "),
                "copyrightText": "NOASSERTION",
                "externalRefs": [{
                    "referenceCategory": "PACKAGE-MANAGER",
                    "referenceType": "purl",
                    "referenceLocator": format!("pkg:cargo/{}@{}", text(&package["name"]), text(&package["version"])),
                }],
            })
        })
        .collect();
    let roots = packages.values().filter(|package| ROOTS.contains(&text(&package["name"])));
    let relationships: Vec<Value> = roots
        .map(|root| {
            json!({"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": id(root)})
        })
        .collect();
    Ok(json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": format!("https://spdx.org/spdxdocs/terway-{}", super::sha256(serde_json::to_string(&listed)?.as_bytes())),
        // Fixed, so that the image is reproducible; the versions above say all.
        "creationInfo": {"created": "1970-01-01T00:00:00Z", "creators": ["Tool: cargo-xtask-image"]},
        "packages": listed,
        "relationships": relationships,
    }))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The packages that the roots depend on other than for building and testing, by name and version. Proc macros and what only they need
/// are among them: cargo does not tell them apart here.
fn linked(metadata: &Value) -> Result<BTreeMap<String, &Value>> {
    let list = |value: &'_ Value| value.as_array().cloned().unwrap_or_default();
    let by_id: BTreeMap<&str, &Value> =
        metadata["packages"].as_array().into_iter().flatten().map(|package| (text(&package["id"]), package)).collect();
    let nodes: BTreeMap<&str, &Value> =
        metadata["resolve"]["nodes"].as_array().into_iter().flatten().map(|node| (text(&node["id"]), node)).collect();
    let mut left: Vec<String> = by_id
        .values()
        .filter(|package| ROOTS.contains(&text(&package["name"])))
        .map(|p| text(&p["id"]).to_owned())
        .collect();
    ensure!(left.len() == ROOTS.len(), "the workspace lacks one of {ROOTS:?}");
    let mut seen = BTreeSet::new();
    while let Some(id) = left.pop() {
        if !seen.insert(id.clone()) {
            continue;
        }
        let node = nodes.get(id.as_str()).with_context(|| format!("{id} is not resolved"))?;
        for dependency in list(&node["deps"]) {
            if list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()) {
                left.push(text(&dependency["pkg"]).to_owned());
            }
        }
    }
    let named = |id: &String| {
        let package = by_id.get(id.as_str())?;
        Some((format!("{} {}", text(&package["name"]), text(&package["version"])), *package))
    };
    Ok(seen.iter().filter_map(named).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sbom_has_linked_crates_with_licences_and_no_test_crates() {
        let workspace = Workspace::find().unwrap();
        let document = document(&workspace, "terway").unwrap();
        let packages = document["packages"].as_array().unwrap();
        let find = |name: &str| packages.iter().find(|package| package["name"] == name);
        for name in ["aya", "tokio", "terway-core", "rustls", "terway-cni"] {
            let package = find(name).unwrap_or_else(|| panic!("{name} is missing"));
            assert_ne!(package["licenseDeclared"], "NOASSERTION", "{name}");
        }
        for name in ["proptest", "insta", "prost-build", "xtask"] {
            assert!(find(name).is_none(), "{name} is not in the image");
        }
        let ids: BTreeSet<_> = packages.iter().map(|package| text(&package["SPDXID"])).collect();
        assert_eq!(ids.len(), packages.len(), "identifiers are unique");
        let is_valid = |id: &&str| id.bytes().all(|b| b.is_ascii_alphanumeric() || b".-".contains(&b));
        assert!(ids.iter().all(is_valid), "SPDX 2.3, 3.2: letters, numbers, `.` and `-`");
    }
}
