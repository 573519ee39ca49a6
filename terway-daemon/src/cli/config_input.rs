//! Input of `terway-cli config`: a folder, an `eni_conf` document, or a ConfigMap manifest as `kubectl get -o yaml|json` prints it.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use terway_core::config::ConfigMapData;

use crate::config_source;

/// The key of the document in the ConfigMap.
const ENI_CONF: &str = "eni_conf";

/// Whether a path stands for standard input.
pub(super) fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Reads one configuration; `-` is standard input.
///
/// # Errors
/// One sentence that names the file.
pub(super) fn read(path: &Path) -> Result<ConfigMapData> {
    if is_stdin(path) {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text).context("standard input")?;
        return of_text(text).context("standard input");
    }
    if path.is_dir() {
        return config_source::read_data(path).map_err(anyhow::Error::msg);
    }
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    of_text(text).with_context(|| path.display().to_string())
}

/// A manifest has a `kind`, which `eni_conf` has not.
fn of_text(text: String) -> Result<ConfigMapData> {
    let document: Option<Value> = yaml_serde::from_str(&text).ok();
    match document.as_ref().and_then(|document| document["kind"].as_str()) {
        None => Ok(ConfigMapData::from([(ENI_CONF.to_owned(), text)])),
        Some("ConfigMap") => of_config_map(document.as_ref().unwrap_or(&Value::Null)),
        Some(kind) if kind == "List" || kind == "ConfigMapList" => {
            let items =
                document.as_ref().and_then(|list| list["items"].as_array()).map(Vec::as_slice).unwrap_or_default();
            let holds = |item: &&Value| item["kind"] == "ConfigMap" && item["data"][ENI_CONF].is_string();
            let found: Vec<&Value> = items.iter().filter(holds).collect();
            match found.as_slice() {
                [one] => of_config_map(one),
                [] => bail!("no ConfigMap of the list has the key {ENI_CONF}"),
                more => bail!("{} ConfigMaps of the list have the key {ENI_CONF}; give one of them", more.len()),
            }
        }
        Some(kind) => bail!("is a manifest of kind {kind}, not a ConfigMap"),
    }
}

fn of_config_map(manifest: &Value) -> Result<ConfigMapData> {
    let Some(data) = manifest["data"].as_object() else { bail!("the ConfigMap has no data") };
    let text = |(key, value): (&String, &Value)| match value.as_str() {
        Some(text) => Ok((key.clone(), text.to_owned())),
        None => bail!("the value of {key} in the ConfigMap is not a string"),
    };
    data.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata:
  name: eni-config
  namespace: kube-system
  resourceVersion: "12"
data:
  disable_network_policy: "false"
  eni_conf: |
    {"version": "1", "vswitches": {"z": ["vsw-1"]}}
"#;

    fn error(text: &str) -> String {
        format!("{:#}", of_text(text.to_owned()).unwrap_err())
    }

    #[test]
    fn a_document_is_taken_as_it_is() {
        let text = r#"{"version": "1"}"#;
        assert_eq!(of_text(text.to_owned()).unwrap()[ENI_CONF], text);
        // What is no JSON at all is for the check to refuse.
        assert_eq!(of_text("{".to_owned()).unwrap()[ENI_CONF], "{");
    }

    #[test]
    fn manifests_of_kubectl_are_read_as_yaml_and_json_alone_and_in_a_list() {
        let data = of_text(MANIFEST.to_owned()).unwrap();
        assert_eq!(data["disable_network_policy"], "false");
        assert!(data[ENI_CONF].contains("vsw-1"));
        let json: Value = yaml_serde::from_str(MANIFEST).unwrap();
        assert_eq!(of_text(json.to_string()).unwrap(), data);
        let other = serde_json::json!({"kind": "ConfigMap", "data": {"x": "y"}});
        let list = |items: Value| serde_json::json!({"kind": "List", "apiVersion": "v1", "items": items}).to_string();
        assert_eq!(of_text(list(serde_json::json!([other, json]))).unwrap(), data);
        assert!(error(&list(serde_json::json!([other]))).contains("no ConfigMap"));
        assert!(error(&list(serde_json::json!([json, json]))).contains("2 ConfigMaps"));
    }

    #[test]
    fn other_kinds_and_values_are_errors() {
        assert!(error("kind: Secret").contains("kind Secret"));
        assert!(error("kind: ConfigMap").contains("no data"));
        assert!(error("{kind: ConfigMap, data: {eni_conf: {a: 1}}}").contains("not a string"));
    }
}
