//! Real files, changed in the ways kubelet, editors and accidents change them.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use serde_json::json;
use tempfile::TempDir;
use terway_core::config::Config;

use super::*;

fn eni_conf(max_idle: u32) -> String {
    json!({"vswitches": {"z": ["vsw-1"]}, "security_group": "sg-1", "max_pool_size": max_idle}).to_string()
}

/// A running source on a folder of its own.
struct Bench {
    dir: TempDir,
    registry: Registry,
    source: Arc<ConfigSource>,
}

impl Bench {
    fn paths(dir: &Path, config: &str) -> Paths {
        Paths { config: dir.join(config), overlay: None, kept: Some(dir.join("kept.json")) }
    }

    /// Opens and follows what `lay` lays down.
    fn on(config: &str, lay: impl FnOnce(&Path)) -> Self {
        let dir = TempDir::new().unwrap();
        lay(dir.path());
        let mut registry = Registry::default();
        let metrics = ConfigMetrics::new(&mut registry);
        let source = Arc::new(ConfigSource::open(Self::paths(dir.path(), config), metrics).unwrap());
        tokio::spawn(Arc::clone(&source).run());
        Self { dir, registry, source }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn until(&self, what: &str, reached: impl Fn(&Config, &ConfigStatus) -> bool) {
        for _ in 0..500 {
            if reached(&self.source.config(), &self.source.status()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: {:?}", self.source.status());
    }

    async fn until_max_idle(&self, max_idle: u32) {
        self.until(&format!("max_pool_size {max_idle}"), |c, s| c.max_idle == max_idle && s.failure.is_none()).await;
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}

/// As kubelet's atomic writer: a new folder, a link beside, one rename, the old folder away.
fn swap(mount: &Path, version: &str, files: &[(&str, &str)]) {
    fs::create_dir_all(mount.join(version)).unwrap();
    for (name, text) in files {
        fs::write(mount.join(version).join(name), text).unwrap();
    }
    let old = fs::read_link(mount.join("..data")).ok();
    symlink(version, mount.join("..data_tmp")).unwrap();
    fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
    for (name, _) in files {
        if mount.join(name).symlink_metadata().is_err() {
            symlink(Path::new("..data").join(name), mount.join(name)).unwrap();
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(mount.join(old)).unwrap();
    }
}

#[tokio::test]
async fn a_mounted_configmap_is_followed_through_swaps() {
    let bench = Bench::on("eni", |dir| swap(&dir.join("eni"), "..1", &[("eni_conf", &eni_conf(5))]));
    let mut news = bench.source.subscribe();
    for round in 2..5u32 {
        let files = [
            ("eni_conf", eni_conf(4 + round)),
            ("disable_network_policy", "true".to_owned()),
            ("in_cluster_loadbalance", "false".to_owned()),
        ];
        let files: Vec<(&str, &str)> = files.iter().map(|(n, t)| (*n, t.as_str())).collect();
        swap(&bench.path("eni"), &format!("..{round}"), &files);
        bench.until_max_idle(4 + round).await;
        assert_eq!(news.borrow_and_update().max_idle, 4 + round);
    }
    let status = bench.source.status();
    assert_eq!((status.generation, status.recent.len()), (4, 3));
    assert_eq!(status.pending_restart.iter().map(|c| c.key).collect::<Vec<_>>(), ["in_cluster_loadbalance"]);
    let config = bench.source.config();
    assert!(config.in_cluster_loadbalance, "what needs a restart does not change under a running daemon");
    assert!(!config.policy_enabled, "what does not, does");
}

#[tokio::test]
async fn a_file_of_a_mounted_configmap_is_followed_too() {
    let bench = Bench::on("eni/eni_conf", |dir| swap(&dir.join("eni"), "..1", &[("eni_conf", &eni_conf(5))]));
    for (version, max_idle) in [("..2", 6), ("..3", 7)] {
        swap(&bench.path("eni"), version, &[("eni_conf", &eni_conf(max_idle))]);
        bench.until_max_idle(max_idle).await;
    }
}

#[tokio::test]
async fn editors_rewrite_rename_and_delete() {
    let bench = Bench::on("eni_conf", |dir| fs::write(dir.join("eni_conf"), eni_conf(5)).unwrap());
    let file = bench.path("eni_conf");
    fs::write(&file, eni_conf(6)).unwrap();
    bench.until_max_idle(6).await;

    fs::write(bench.path("eni_conf.new"), eni_conf(7)).unwrap();
    fs::rename(bench.path("eni_conf.new"), &file).unwrap();
    bench.until_max_idle(7).await;

    fs::rename(&file, bench.path("eni_conf~")).unwrap();
    fs::write(&file, eni_conf(8)).unwrap();
    bench.until_max_idle(8).await;
    assert_eq!(bench.source.status().generation, 4, "neighbours are no edits, and one edit is taken once");
}

#[tokio::test]
async fn a_deleted_file_changes_nothing_until_it_is_back() {
    let bench = Bench::on("a/eni", |dir| {
        fs::create_dir_all(dir.join("a/eni")).unwrap();
        fs::write(dir.join("a/eni/eni_conf"), eni_conf(5)).unwrap();
    });
    fs::remove_file(bench.path("a/eni/eni_conf")).unwrap();
    bench
        .until("missing", |c, s| {
            c.max_idle == 5 && s.failure.as_ref().is_some_and(|f| f.error.detail.contains("eni_conf"))
        })
        .await;
    fs::write(bench.path("a/eni/eni_conf"), eni_conf(6)).unwrap();
    bench.until_max_idle(6).await;

    fs::remove_dir_all(bench.path("a")).unwrap();
    bench
        .until("unreadable", |c, s| c.max_idle == 6 && s.failure.as_ref().is_some_and(|f| f.result == "unreadable"))
        .await;
    fs::create_dir_all(bench.path("a/eni")).unwrap();
    fs::write(bench.path("a/eni/eni_conf"), eni_conf(7)).unwrap();
    bench.until_max_idle(7).await;
}

#[tokio::test]
async fn a_bad_edit_keeps_what_is_in_force_and_says_why() {
    let bench = Bench::on("eni_conf", |dir| fs::write(dir.join("eni_conf"), eni_conf(5)).unwrap());
    let whole = eni_conf(6);
    // Half of it, as a slow writer leaves it for longer than the quiet time.
    fs::write(bench.path("eni_conf"), &whole[..whole.len() / 2]).unwrap();
    bench
        .until("half-written", |c, s| {
            c.max_idle == 5 && s.failure.as_ref().is_some_and(|f| f.error.detail.contains("not JSON"))
        })
        .await;
    assert!(bench.metrics().contains("terway_config_last_reload_successful 0"), "{}", bench.metrics());
    fs::write(bench.path("eni_conf"), &whole).unwrap();
    bench.until_max_idle(6).await;

    fs::write(bench.path("eni_conf"), json!({"ip_stack": "v4", "access_secret": "hush", "access_key": 5}).to_string())
        .unwrap();
    bench.until("refused", |c, s| c.max_idle == 6 && s.failure.as_ref().is_some_and(|f| f.result == "refused")).await;
    let detail = bench.source.status().failure.unwrap().error.detail;
    assert!(detail.contains("ip_stack") && detail.contains("vswitches") && !detail.contains("hush"), "{detail}");
    let outcomes = bench.source.outcomes();
    assert_eq!((outcomes.borrow().reason(), outcomes.borrow().generation), ("ConfigRefused", 2));
    assert!(outcomes.borrow().message().contains("ip_stack"), "{}", outcomes.borrow().message());

    // Back to what is in force: no change, and no failure any more.
    fs::write(bench.path("eni_conf"), &whole).unwrap();
    bench.until_max_idle(6).await;
    let (text, status) = (bench.metrics(), bench.source.status());
    assert_eq!((status.generation, status.recent.len()), (2, 1));
    assert!(outcomes.has_changed().unwrap() && outcomes.borrow().reason() == "ConfigAccepted");
    for line in [
        "terway_config_last_reload_successful 1",
        "terway_config_reload_total{result=\"applied\"} 3",
        "terway_config_reload_total{result=\"refused\"} 2",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[tokio::test]
async fn the_nodes_own_layer_comes_and_goes() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("eni_conf"), eni_conf(5)).unwrap();
    fs::create_dir(dir.path().join("own")).unwrap();
    fs::write(dir.path().join("own/eni_conf"), r#"{"max_pool_size": 9}"#).unwrap();
    let paths = Paths { overlay: Some(dir.path().join("own")), ..Bench::paths(dir.path(), "eni_conf") };
    let source = Arc::new(ConfigSource::open(paths, ConfigMetrics::default()).unwrap());
    assert_eq!(source.config().max_idle, 9);
    tokio::spawn(Arc::clone(&source).run());
    let bench = Bench { dir, registry: Registry::default(), source };
    fs::write(bench.path("own/eni_conf"), r#"{"max_pool_size": null, "min_pool_size": 1}"#).unwrap();
    bench.until("deleted by null", |c, _| (c.min_idle, c.max_idle) == (1, 5)).await;
}

#[tokio::test]
async fn a_storm_of_edits_ends_with_the_last_one() {
    let bench = Bench::on("eni_conf", |dir| fs::write(dir.join("eni_conf"), eni_conf(5)).unwrap());
    for n in 0..300u32 {
        let text = eni_conf(n);
        // Some of them are torn.
        let text = if n % 7 == 3 { &text[..20] } else { &text };
        fs::write(bench.path("eni_conf"), text).unwrap();
        if n % 50 == 0 {
            tokio::time::sleep(Duration::from_millis(130)).await;
        }
    }
    bench.until_max_idle(299).await;
}

#[tokio::test]
async fn a_node_starts_with_the_last_good_configuration_when_the_present_one_is_bad() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("eni_conf");
    let open = || ConfigSource::open(Bench::paths(dir.path(), "eni_conf"), ConfigMetrics::default());
    fs::write(&file, "{").unwrap();
    assert_eq!(open().unwrap_err().code, errors::CONFIG_REFUSED);

    fs::write(&file, eni_conf(7)).unwrap();
    assert_eq!(open().unwrap().config().max_idle, 7);
    let mode = fs::metadata(dir.path().join("kept.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "the access key is in it");

    for bad in ["{", "{}"] {
        fs::write(&file, bad).unwrap();
        let source = open().unwrap();
        assert_eq!(source.config().max_idle, 7);
        assert!(source.status().failure.is_some());
        fs::write(&file, eni_conf(8)).unwrap();
        source.reload();
        assert_eq!(source.config().max_idle, 8);
        assert!(source.status().failure.is_none());
        fs::write(&file, eni_conf(7)).unwrap();
        source.reload();
    }

    fs::write(dir.path().join("kept.json"), "junk").unwrap();
    fs::remove_file(&file).unwrap();
    assert_eq!(open().unwrap_err().code, errors::CONFIG_UNREADABLE);
}

#[test]
fn what_is_no_document_is_not_read() {
    let dir = TempDir::new().unwrap();
    let eni = dir.path().join("eni");
    fs::create_dir_all(eni.join("folder")).unwrap();
    fs::write(eni.join("eni_conf"), eni_conf(5)).unwrap();
    for (name, text) in [(".eni_conf.swp", "x"), ("eni_conf~", "x"), ("stranger", "secret")] {
        fs::write(eni.join(name), text).unwrap();
    }
    let paths = Bench::paths(dir.path(), "eni");
    let documents = paths.read().unwrap();
    assert_eq!(documents.data.keys().collect::<Vec<_>>(), ["eni_conf", "stranger"]);
    assert_eq!(documents.data["stranger"], "");

    fs::write(eni.join("eni_conf"), " ".repeat((1 << 20) + 1)).unwrap();
    assert!(paths.read().unwrap_err().contains("larger"));
    fs::write(eni.join("eni_conf"), [0xff]).unwrap();
    assert!(paths.read().unwrap_err().contains("eni_conf"));
}
