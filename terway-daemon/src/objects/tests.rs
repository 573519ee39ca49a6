//! Real files in a real folder, watched by the kernel.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use terway_core::objects::Kind;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::dir::FileIndex;
use super::document::read;
use super::store::StoreWriter;
use super::{Batch, DirSource, ObjectSource as _, ObjectStore, Scope};

const TWO: &str = "\
# a comment
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  ports: [{port: 80}]
---
apiVersion: v1
kind: Service
metadata:
  name: api
spec:
  clusterIP: 10.96.0.2
  ports:
  - port: 80
    targetPort: http
";

fn lines(path: &str, text: &str) -> (Vec<String>, Vec<(usize, String)>) {
    let content = read(Path::new(path), text);
    (content.objects.iter().map(|(line, o)| format!("{line} {}", o.key())).collect(), content.problems)
}

#[test]
fn a_bad_document_is_reported_by_line_and_affects_no_other() {
    assert_eq!(lines("a.yaml", TWO), (vec!["3 Service shop/web".into(), "10 Service default/api".into()], vec![]));
    let wrong_type = TWO.replace("port: 80}", "port: high}");
    let (good, bad) = lines("a.yaml", &wrong_type);
    assert_eq!(good, ["10 Service default/api"], "one bad document takes no other with it");
    assert_eq!(bad[0].0, 8, "{bad:?}");
    assert!(bad[0].1.contains("port") && !bad[0].1.contains("at line"), "{bad:?}");
    let (good, bad) = lines("a.yaml", &TWO.replace("spec:\n  clusterIP: 10.96.0.2", "spec: [\n  clusterIP: 10.96.0.2"));
    assert_eq!(good, ["3 Service shop/web"]);
    assert!(bad[0].0 >= 13, "{bad:?}");
}

#[test]
fn other_kinds_are_skipped_and_other_versions_are_problems() {
    let other = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n---\napiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: x}\n";
    assert_eq!(lines("a.yaml", other), (vec![], vec![]));
    let (_, bad) =
        lines("a.yaml", "\napiVersion: discovery.k8s.io/v1alpha1\nkind: EndpointSlice\nmetadata: {name: x}\n");
    assert_eq!(
        bad,
        [(2, "EndpointSlice is read in apiVersion discovery.k8s.io/v1, not in discovery.k8s.io/v1alpha1".into())]
    );
    let (_, bad) = lines("a.yaml", "metadata: {name: x}\n");
    assert_eq!(bad, [(1, "the document has no `kind`".into())]);
    assert_eq!(lines("a.yaml", ""), (vec![], vec![]));
}

#[test]
fn a_bad_list_item_is_reported_by_line() {
    let list = "\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Namespace
  metadata: {name: a}
- apiVersion: v1
  kind: Pod
  metadata:
    name: p
    labels: {app: 1}
- apiVersion: v1
  kind: Namespace
  metadata: {name: b}
";
    let (good, bad) = lines("a.yaml", list);
    assert_eq!(good, ["4 Namespace a", "12 Namespace b"]);
    assert_eq!(bad.len(), 1);
    assert!(bad[0].0 == 7 && bad[0].1.starts_with("items[1]: "), "{bad:?}");
    let json = r#"{"apiVersion":"v1","kind":"List","items":[
        {"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a"}},
        {"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","labels":{"app":1}}}]}"#;
    let (good, bad) = lines("a.json", json);
    assert_eq!(good, ["1 Namespace a"]);
    assert_eq!(bad[0].0, 3, "{bad:?}");
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )
}

struct Watched {
    dir: tempfile::TempDir,
    batches: mpsc::Receiver<Batch>,
    store: Arc<ObjectStore>,
    writer: StoreWriter,
    problems: Vec<String>,
}

impl Watched {
    async fn start(dir: tempfile::TempDir) -> Self {
        let source = Box::new(DirSource::new(dir.path()).unwrap());
        let (send, batches) = mpsc::channel(16);
        tokio::spawn(source.run(send));
        let store = Arc::<ObjectStore>::default();
        let writer = StoreWriter::new(Arc::clone(&store));
        let mut this = Self { dir, batches, store, writer, problems: Vec::new() };
        assert!(this.next().await, "the first batch lists every kind");
        this
    }

    /// Applies the next batch; whether all kinds are synced then.
    async fn next(&mut self) -> bool {
        let batch = timeout(Duration::from_secs(5), self.batches.recv()).await.expect("a batch within 5 s").unwrap();
        if let Some(problems) = &batch.problems {
            self.problems =
                problems.iter().map(|p| p.to_string().replace(&self.dir.path().display().to_string(), "")).collect();
        }
        self.writer.apply(vec![batch]).has_synced(&Kind::ALL)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn services(&self) -> Vec<String> {
        self.store.read().services().values().map(|s| format!("{} {}", s.meta.object.name, s.cluster_ips[0])).collect()
    }
}

#[tokio::test]
async fn files_are_created_changed_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), service("a", "10.96.0.1")).unwrap();
    fs::write(dir.path().join("notes.txt"), "not ours").unwrap();
    fs::write(dir.path().join(".hidden.yaml"), service("h", "10.96.0.9")).unwrap();
    let mut w = Watched::start(dir).await;
    assert_eq!(w.services(), ["a 10.96.0.1"]);

    w.write("b.yaml", &service("b", "10.96.0.2"));
    w.next().await;
    assert_eq!(w.services(), ["a 10.96.0.1", "b 10.96.0.2"]);

    // An editor's way: write aside, move into place.
    w.write("a.tmp", &service("a", "10.96.0.3"));
    fs::rename(w.dir.path().join("a.tmp"), w.dir.path().join("a.yaml")).unwrap();
    w.next().await;
    assert_eq!(w.services(), ["a 10.96.0.3", "b 10.96.0.2"]);

    fs::remove_file(w.dir.path().join("b.yaml")).unwrap();
    w.next().await;
    assert_eq!(w.services(), ["a 10.96.0.3"]);
    assert_eq!(w.store.read().pods().len(), 0);
}

#[tokio::test]
async fn a_bad_file_keeps_its_objects_and_is_reported_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = format!("{}---\n{}", service("a", "10.96.0.1"), service("b", "10.96.0.2"));
    fs::write(dir.path().join("f.yaml"), &good).unwrap();
    let mut w = Watched::start(dir).await;
    assert_eq!(w.services().len(), 2);

    // The first document changes, the second breaks: the change counts, the broken one stays as it was.
    w.write("f.yaml", &format!("{}---\n{}", service("a", "10.96.0.7"), service("b", "no-address")));
    w.next().await;
    assert_eq!(w.services(), ["a 10.96.0.7", "b 10.96.0.2"]);
    assert_eq!(w.problems.len(), 1, "{:?}", w.problems);
    assert!(w.problems[0].starts_with("/f.yaml:") && w.problems[0].contains("no-address"), "{:?}", w.problems);

    w.write("f.yaml", &service("a", "10.96.0.7"));
    w.next().await;
    assert_eq!(
        (w.services(), w.problems.len()),
        (vec!["a 10.96.0.7".to_owned()], 0),
        "without a bad document, b is deleted"
    );
}

#[tokio::test]
async fn an_object_in_two_files_is_taken_from_the_first_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("m.yaml"), service("a", "10.96.0.1")).unwrap();
    let mut w = Watched::start(dir).await;
    w.write("z.yaml", &service("a", "10.96.0.2"));
    w.next().await;
    assert_eq!(w.services(), ["a 10.96.0.1"]);
    assert!(w.problems[0].starts_with("/z.yaml:1: Service default/a is in "), "{:?}", w.problems);
    w.write("b.yaml", &service("a", "10.96.0.3"));
    w.next().await;
    assert_eq!(w.services(), ["a 10.96.0.3"]);
    fs::remove_file(w.dir.path().join("b.yaml")).unwrap();
    w.next().await;
    assert_eq!(w.services(), ["a 10.96.0.1"], "the next file takes over");
    fs::remove_file(w.dir.path().join("m.yaml")).unwrap();
    w.next().await;
    assert_eq!((w.services(), w.problems.len()), (vec!["a 10.96.0.2".to_owned()], 0));
}

#[tokio::test]
async fn a_config_map_as_kubelet_mounts_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("..1")).unwrap();
    fs::write(at("..1").join("a.yaml"), service("a", "10.96.0.1")).unwrap();
    std::os::unix::fs::symlink("..1", at("..data")).unwrap();
    std::os::unix::fs::symlink("..data/a.yaml", at("a.yaml")).unwrap();
    fs::create_dir(at("..2")).unwrap();
    fs::write(at("..2").join("a.yaml"), service("a", "10.96.0.2")).unwrap();
    let mut w = Watched::start(dir).await;
    assert_eq!(w.services(), ["a 10.96.0.1"]);
    std::os::unix::fs::symlink("..2", w.dir.path().join("..data_tmp")).unwrap();
    fs::rename(w.dir.path().join("..data_tmp"), w.dir.path().join("..data")).unwrap();
    w.next().await;
    assert_eq!(w.services(), ["a 10.96.0.2"]);
}

#[tokio::test]
async fn a_removed_folder_deletes_nothing() {
    let outer = tempfile::tempdir().unwrap();
    let inner = tempfile::tempdir_in(outer.path()).unwrap();
    let path = inner.path().to_owned();
    fs::write(path.join("a.yaml"), service("a", "10.96.0.1")).unwrap();
    fs::write(path.join("b.yaml"), service("b", "10.96.0.2")).unwrap();
    let mut w = Watched::start(inner).await;
    fs::rename(&path, outer.path().join("away")).unwrap();
    assert!(timeout(Duration::from_millis(300), w.batches.recv()).await.is_err(), "a missing folder says nothing");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), service("a", "10.96.0.1")).unwrap();
    w.next().await;
    assert_eq!(w.services(), ["a 10.96.0.1"], "objects that are not in the new folder are deleted");
}

#[tokio::test]
async fn a_missing_folder_is_refused() {
    let error = DirSource::new("/nowhere/at/all").unwrap_err().to_string();
    assert!(error.starts_with("cannot watch /nowhere/at/all: "), "{error}");
}

/// The contents of a file in the property test: for each of a few Services the last byte of its address, if it is in the file.
type Written = Option<Vec<Option<u8>>>;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// After any writing and removing of files, each Service is as in the first file that holds it, every other file is reported, and
    /// an unchanged file that is read again causes no update.
    #[test]
    fn the_first_of_several_files_is_effective(
        steps in prop::collection::vec(
            (0..3_usize, prop::option::weighted(0.8, prop::collection::vec(prop::option::of(1..4_u8), 3))), 1..24),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::<ObjectStore>::default();
        let (mut index, mut writer) = (FileIndex::default(), StoreWriter::new(Arc::clone(&store)));
        let mut files: [Written; 3] = Default::default();
        for (at, written) in steps {
            let path = dir.path().join(format!("{at}.yaml"));
            match &written {
                None => drop(fs::remove_file(&path)),
                Some(all) => {
                    let held = all.iter().enumerate().filter_map(|(i, ip)| Some((i, (*ip)?)));
                    let documents: Vec<String> =
                        held.map(|(i, ip)| service(&format!("s{i}"), &format!("10.96.0.{ip}"))).collect();
                    fs::write(&path, documents.join("---\n")).unwrap();
                }
            }
            files[at] = written;
            writer.apply(vec![Batch { updates: index.load(&path), problems: None }]);
            let objects = store.read();

            let (mut wanted, mut shadowed) = (Vec::new(), Vec::new());
            for i in 0..3 {
                let holders: Vec<(usize, u8)> = (0..3).filter_map(|f| Some((f, files[f].as_ref()?[i]?))).collect();
                wanted.extend(holders.first().map(|(_, ip)| format!("s{i} 10.96.0.{ip}")));
                shadowed.extend(holders.iter().skip(1).map(|(f, _)| (format!("{f}.yaml"), i)));
            }
            let served: Vec<String> =
                objects.services().values().map(|s| format!("{} {}", s.meta.object.name, s.cluster_ips[0])).collect();
            prop_assert_eq!(served, wanted);
            let reported = index.problems().into_iter().map(|p| {
                let Scope::Document { file, .. } = &p.scope else { panic!("{p:?}") };
                let name = file.file_name().unwrap().to_str().unwrap().to_owned();
                (name, (0..3).find(|i| p.reason.starts_with(&format!("Service default/s{i} is in"))).unwrap())
            });
            shadowed.sort();
            let mut reported: Vec<(String, usize)> = reported.collect();
            reported.sort();
            prop_assert_eq!(reported, shadowed);
            prop_assert_eq!(index.load(&path), vec![]);
        }
    }
}
