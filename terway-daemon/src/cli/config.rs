//! `terway-cli config`: what a configuration means, without a daemon.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Subcommand;
use serde_json::{Map, Value, json};
use terway_core::config::{
    Config, ConfigDocuments, InvalidValue, KEYS, Key, KeyChange, KeyLocation, REMOVED, Setting, Warning, by_name,
    nearest,
};

use super::config_input::{self, is_stdin};
use super::daemon::Failure;
use super::print;
use super::table::{Style, pretty};

/// Subcommands of `terway-cli config`. They need no daemon.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check a configuration as the daemon would: every invalid value and every warning. Exit code 1 if it is invalid.
    #[command(after_help = "Examples:
  terway-cli config check /etc/eni
  terway-cli config check eni_conf.json --zone cn-hangzhou-k
  kubectl -n kube-system get configmap eni-config -o yaml | terway-cli config check -")]
    Check {
        /// The configuration: a ConfigMap manifest (YAML or JSON), an eni_conf document, a folder as a ConfigMap is mounted, or - for
        /// standard input.
        #[arg(value_name = "PATH")]
        config: PathBuf,
        /// The node's own configuration, which is merged over the cluster's; same forms.
        #[arg(long, value_name = "PATH")]
        overlay: Option<PathBuf>,
        /// A zone that nodes are in: the check fails if it has no vSwitch.
        #[arg(long, value_name = "ZONE")]
        zone: Option<String>,
    },
    /// Explain a key: its value, default, unit, and when a change takes effect. Without a key, list all.
    #[command(after_help = "Examples:
  terway-cli config explain
  terway-cli config explain max_pool_size")]
    Explain {
        /// The key.
        #[arg(value_name = "KEY")]
        key: Option<String>,
    },
    /// Compare two configurations: what changes, and when each change takes effect. Exit code 1 if one of them is invalid.
    #[command(after_help = "Example:
  kubectl -n kube-system get configmap eni-config -o yaml | terway-cli config diff - new.yaml")]
    Diff {
        /// The present configuration; forms as for check.
        #[arg(value_name = "OLD")]
        old: PathBuf,
        /// The new configuration; forms as for check.
        #[arg(value_name = "NEW")]
        new: PathBuf,
    },
}

/// Result of checking a configuration: the configuration or every invalid value, and the warnings.
type Checked = (std::result::Result<Config, Vec<InvalidValue>>, Vec<Warning>);

pub(super) fn run(command: &Command, style: Style) -> Result<ExitCode> {
    let (text, is_valid) = match command {
        Command::Check { config, overlay, zone } => check(&read(config, overlay.as_deref())?, zone.as_deref(), style),
        Command::Explain { key: None } => (list(style), true),
        Command::Explain { key: Some(name) } => (explain(name, style)?, true),
        Command::Diff { old, new } => {
            one_stdin(old, Some(new))?;
            diff((old, read(old, None)?), (new, read(new, None)?), style)
        }
    };
    print(&text);
    Ok(if is_valid { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn one_stdin(first: &Path, second: Option<&Path>) -> Result<()> {
    if is_stdin(first) && second.is_some_and(is_stdin) {
        return Err(Failure::Usage("only one of the two can be - (standard input)".to_owned()).into());
    }
    Ok(())
}

fn read(config: &Path, overlay: Option<&Path>) -> Result<Checked> {
    one_stdin(config, overlay)?;
    let data = config_input::read(config)?;
    let overlay = overlay.map(config_input::read).transpose()?;
    Ok(ConfigDocuments { data, overlay }.check_with_warnings())
}

fn check(checked: &Checked, zone: Option<&str>, style: Style) -> (String, bool) {
    let (config, warnings) = (checked.0.as_ref().ok(), &checked.1);
    let errors = checked.0.as_ref().err().map(Vec::as_slice).unwrap_or_default();
    let vswitches = config.zip(zone).map(|(config, zone)| config.vswitches_of(zone));
    let good = config.is_some() && vswitches.is_none_or(|list| !list.is_empty());
    if style.is_json() {
        let text = pretty(&json!({
            "valid": good,
            "errors": errors.iter().map(invalid_json).collect::<Vec<_>>(),
            "warnings": warnings.iter().map(|w| json!({"key": w.key, "message": w.message})).collect::<Vec<_>>(),
            "zone": zone.map(|zone| json!({
                "name": zone, "vswitches": vswitches.map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>()),
            })),
            "settings": config.map(settings_json),
        }));
        return (text, good);
    }
    let mut lines: Vec<String> = errors.iter().map(|bad| format!("error    {bad}")).collect();
    lines.extend(warnings.iter().map(|warning| format!("warning  {warning}")));
    if let Some((zone, list)) = zone.zip(vswitches) {
        let names: Vec<String> = list.iter().map(ToString::to_string).collect();
        lines.push(match names.as_slice() {
            [] => format!("error    vswitches: none in zone {zone}: nodes there cannot create an ENI"),
            names => format!("zone     {zone}: {}", names.join(", ")),
        });
    }
    if let Some(config) = config.filter(|_| style.wide()) {
        let rows = config.settings().into_iter().map(|(key, value)| vec![key.name.to_owned(), value.to_string()]);
        lines.push(format!("\n{}", style.table(&["KEY", "VALUE"], rows)));
    }
    lines.push(match (good, warnings.len()) {
        (false, _) => "invalid: the daemon would keep its last good configuration".to_owned(),
        (true, 0) => "valid".to_owned(),
        (true, 1) => "valid, with one warning".to_owned(),
        (true, count) => format!("valid, with {count} warnings"),
    });
    (lines.join("\n") + "\n", good)
}

fn invalid_json(bad: &InvalidValue) -> Value {
    json!({"key": bad.key, "value": bad.value, "reason": bad.reason})
}

fn setting_json(setting: &Setting) -> Value {
    match setting {
        Setting::None => Value::Null,
        Setting::Value(value) => value.clone(),
        Setting::Hidden(_) => setting.to_string().into(),
    }
}

fn settings_json(config: &Config) -> Value {
    config
        .settings()
        .iter()
        .map(|(key, value)| (key.name.to_owned(), setting_json(value)))
        .collect::<Map<_, _>>()
        .into()
}

fn place(key: &Key) -> &'static str {
    match key.location {
        KeyLocation::EniConf => "eni_conf",
        KeyLocation::ConfigMap => "beside eni_conf in the ConfigMap",
    }
}

fn key_json(key: &Key) -> Value {
    json!({
        "key": key.name, "place": place(key), "value": key.kind.to_string(), "default": key.default.to_string(),
        "unit": key.unit, "effect": key.effect.as_str(), "about": key.about,
    })
}

fn list(style: Style) -> String {
    if style.is_json() {
        return pretty(&KEYS.iter().map(key_json).collect());
    }
    let rows = KEYS.iter().map(|key| {
        [key.name, &key.default.to_string(), key.unit, &key.effect.to_string(), &key.kind.to_string()]
            .map(str::to_owned)
            .to_vec()
    });
    style.table(&["KEY", "DEFAULT", "UNIT", "TAKES-EFFECT", "+VALUE"], rows)
}

fn explain(name: &str, style: Style) -> Result<String> {
    if let Some((name, successor)) = REMOVED.iter().find(|(removed, _)| *removed == name) {
        return Ok(match style.is_json() {
            true => pretty(&json!({"key": name, "removed": true, "about": successor})),
            false => format!("{name} was removed. {successor}\n"),
        });
    }
    let Some(key) = by_name(name) else {
        match nearest(name) {
            Some(near) => bail!("{name} is not a known key; did you mean {near}?"),
            None => bail!("{name} is not a known key; `terway-cli config explain` lists all"),
        }
    };
    if style.is_json() {
        return Ok(pretty(&key_json(key)));
    }
    let unit = if key.unit.is_empty() { String::new() } else { format!(" ({})", key.unit) };
    Ok(format!(
        "{}\n\n{}\n\nlocation   {}\nvalue      {}{unit}\ndefault    {}\neffective  {}\n",
        key.name,
        key.about,
        place(key),
        key.kind,
        key.default,
        key.effect
    ))
}

/// Every invalid value of two files.
fn invalid(sides: &[(&Path, Checked)], style: Style) -> String {
    let sides = sides.iter().filter_map(|(path, checked)| Some((path.display(), checked.0.as_ref().err()?)));
    if style.is_json() {
        let files = sides.map(
            |(path, bad)| json!({"file": path.to_string(), "errors": bad.iter().map(invalid_json).collect::<Vec<_>>()}),
        );
        return pretty(&json!({"valid": false, "files": files.collect::<Vec<_>>()}));
    }
    sides.flat_map(|(path, bad)| bad.iter().map(move |bad| format!("error    {path}: {bad}\n"))).collect()
}

fn diff(old: (&Path, Checked), new: (&Path, Checked), style: Style) -> (String, bool) {
    let (Ok(old_config), Ok(new_config)) = (&old.1.0, &new.1.0) else {
        return (invalid(&[old, new], style), false);
    };
    let changed = old_config.diff(new_config);
    let text = match style.is_json() {
        true => {
            let changes = changed.iter().map(|KeyChange { key, old, new, effect }| {
                json!({"key": key, "old": setting_json(old), "new": setting_json(new), "effect": effect.as_str()})
            });
            pretty(&json!({"valid": true, "changes": changes.collect::<Vec<_>>()}))
        }
        _ if changed.is_empty() => "no changes\n".to_owned(),
        _ => {
            let rows = changed.iter().map(|change| {
                vec![change.key.to_owned(), change.effect.to_string(), change.old.to_string(), change.new.to_string()]
            });
            style.table(&["KEY", "TAKES-EFFECT", "OLD", "NEW"], rows)
        }
    };
    (text, true)
}

#[cfg(test)]
mod tests {
    use super::super::Output;
    use super::*;

    const TEXT: Style = Style { output: Output::Table, headers: true };
    const JSON: Style = Style { output: Output::Json, headers: true };
    const WIDE: Style = Style { output: Output::Wide, headers: true };

    fn parse(text: &str) -> Checked {
        ConfigDocuments::of(text).check_with_warnings()
    }

    const GOOD: &str =
        r#"{"vswitches":{"z":["vsw-1"]},"security_group":"sg-1","access_key":"id","access_secret":"hush","colour":1}"#;

    #[test]
    fn a_good_configuration_passes_with_its_warnings_and_without_its_secrets() {
        for output in [TEXT, WIDE, JSON] {
            let (text, good) = check(&parse(GOOD), Some("z"), output);
            assert!(good && text.contains("colour") && !text.contains("hush"), "{text}");
        }
        let (text, good) = check(&parse(GOOD), Some("y"), TEXT);
        assert!(!good && text.contains("none in zone y"), "{text}");
        let json: Value = serde_json::from_str(&check(&parse(GOOD), Some("y"), JSON).0).unwrap();
        assert_eq!((&json["valid"], &json["zone"]["vswitches"]), (&json!(false), &json!([])));
    }

    #[test]
    fn an_invalid_configuration_fails_with_every_reason_and_keeps_its_warnings() {
        let bad = parse(r#"{"ip_stack":"v4","max_eni":-1,"colour":1}"#);
        let (text, good) = check(&bad, None, TEXT);
        assert!(!good && text.lines().filter(|l| l.starts_with("error    ")).count() == 3, "{text}");
        let json: Value = serde_json::from_str(&check(&bad, None, JSON).0).unwrap();
        assert_eq!(json["errors"].as_array().map(Vec::len), Some(3));
        assert!(text.contains("warning  colour"), "{text}");
        assert!(json["warnings"].as_array().unwrap().iter().any(|warning| warning["key"] == "colour"));
    }

    #[test]
    fn every_key_is_explained_and_a_slip_is_answered_with_the_right_one() {
        for key in KEYS {
            let text = explain(key.name, TEXT).unwrap();
            assert!(text.contains(key.about) && text.contains(key.effect.as_str()), "{text}");
            assert!(list(TEXT).contains(key.name));
        }
        assert!(explain("enable_eip_pool", TEXT).unwrap().contains("ack-extend-network-controller"));
        assert!(explain("max_pol_size", TEXT).unwrap_err().to_string().contains("max_pool_size"));
        assert!(explain("colour", TEXT).is_err());
    }

    #[test]
    fn a_difference_says_when_it_takes_effect() {
        let path = Path::new("eni_conf");
        let new =
            GOOD.replace("hush", "rush").replace("vsw-1", "vsw-2").replace("\"colour\":1", "\"ip_stack\":\"dual\"");
        let (text, good) = diff((path, parse(GOOD)), (path, parse(&new)), TEXT);
        assert!(good && !text.contains("ush\""), "{text}");
        for line in [
            "ip_stack       restart          ipv4",
            "vswitches      new allocations",
            "access_secret  now              <secret>",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert_eq!(diff((path, parse(GOOD)), (path, parse(GOOD)), TEXT), ("no changes\n".to_owned(), true));
        assert!(!diff((path, parse(GOOD)), (path, parse("{}")), TEXT).1);
    }

    #[test]
    fn files_and_folders_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("eni_conf");
        std::fs::write(&file, GOOD).unwrap();
        for path in [dir.path(), &file] {
            let command = Command::Check { config: path.to_owned(), overlay: None, zone: None };
            assert_eq!(run(&command, TEXT).unwrap(), ExitCode::SUCCESS);
        }
        let overlay = dir.path().join("own");
        std::fs::write(&overlay, r#"{"vswitches":null}"#).unwrap();
        let command = Command::Check { config: file.clone(), overlay: Some(overlay), zone: None };
        assert_eq!(run(&command, TEXT).unwrap(), ExitCode::FAILURE);
        let manifest = dir.path().join("eni-config.yaml");
        std::fs::write(&manifest, json!({"kind": "ConfigMap", "data": {"eni_conf": GOOD}}).to_string()).unwrap();
        let command = Command::Check { config: manifest, overlay: None, zone: Some("z".to_owned()) };
        assert_eq!(run(&command, TEXT).unwrap(), ExitCode::SUCCESS);
        let twice = Command::Diff { old: "-".into(), new: "-".into() };
        assert!(run(&twice, TEXT).unwrap_err().to_string().contains("only one"));
        let missing = Command::Diff { old: file, new: dir.path().join("missing") };
        assert!(run(&missing, TEXT).unwrap_err().to_string().contains("missing"));
    }
}
