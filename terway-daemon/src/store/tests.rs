//! The store against a real file and a real SIGKILL.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use terway_core::errors::Error;
use terway_core::ipam::{Change, ClientToken, Record, RecordKey};

use super::*;

fn record(n: u64) -> Record {
    let (vswitch, security_groups, tags) = ("vsw-1".into(), Vec::new(), std::collections::BTreeMap::new());
    Record::Creation(terway_core::ipam::CreationRecord {
        token: ClientToken(format!("t{n:06}")),
        vswitch,
        security_groups,
        v4: 1,
        v6: 0,
        v4_prefixes: 0,
        v6_prefixes: 0,
        resource_group: None,
        tags,
    })
}

fn number(record: &Record) -> u64 {
    let RecordKey::Creation(ClientToken(token)) = record.key() else { panic!("{record:?}") };
    token[1..].parse().unwrap()
}

fn put(n: u64) -> Vec<Change> {
    vec![Change::Put(record(n))]
}

#[test]
fn what_is_committed_is_there_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.redb");
    let store = Store::open(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(store.load().unwrap(), []);
    store.commit(put(1)).wait().unwrap();
    store.commit_lazily(put(2));
    store.commit_lazily(vec![Change::Delete(record(1).key()), Change::Put(record(3))]);
    drop(store);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.load().unwrap(), [record(2), record(3)]);
    let second = Store::open(&path);
    assert!(matches!(second, Err(StoreError::InUse { .. })), "{second:?}");
}

#[test]
fn lazy_writes_come_by_themselves_or_with_the_next_durable_one() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("state.redb")).unwrap();
    let before = store.flushes();
    store.commit_lazily(put(1));
    let begun = std::time::Instant::now();
    // What is written can be read before it is counted.
    while store.load().unwrap().is_empty() || store.flushes() == before {
        assert!(begun.elapsed() < Duration::from_secs(10), "a lazy write never came");
        std::thread::sleep(Duration::from_millis(5));
    }
    let flushes = store.flushes();
    store.commit_lazily(put(2));
    store.commit(put(3)).wait().unwrap();
    assert_eq!((store.load().unwrap().len(), store.flushes()), (3, flushes + 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_commits_share_a_flush() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("state.redb")).unwrap();
    let before = store.flushes();
    let commits: Vec<_> = (0..500).map(|n| store.commit(put(n))).collect();
    for commit in commits {
        commit.await.unwrap();
    }
    let flushes = store.flushes() - before;
    assert_eq!(store.load().unwrap().len(), 500);
    assert!(flushes < 100, "{flushes} flushes for 500 commits that came at once");
}

#[test]
fn a_damaged_file_is_refused_untouched_and_set_aside_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.redb");
    let store = Store::open(&path).unwrap();
    for n in 0..200 {
        store.commit(put(n)).wait().unwrap();
    }
    drop(store);
    let sound = fs::read(&path).unwrap();
    let mut refused = 0;
    let damages: [(&str, Vec<u8>); 5] = [
        ("empty", Vec::new()),
        ("truncated", sound[..sound.len() / 2].to_vec()),
        ("one page", sound[..4096].to_vec()),
        ("other", b"this is no database ".repeat(1000)),
        ("zeroed header", [vec![0; 512], sound[512..].to_vec()].concat()),
    ];
    for (name, bytes) in damages {
        fs::write(&path, &bytes).unwrap();
        let error = Store::open(&path).expect_err(name);
        assert!(error.is_damage(), "{name}: {error}");
        assert!(Error::from(&error).detail.contains("state.redb"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "{name}: the evidence was altered");
        refused += 1;
        assert_eq!(set_aside(&path, "corrupt").unwrap(), folder.path().join(format!("state.redb.corrupt-{refused}")));
        assert!(!path.exists());
    }
    assert_eq!(Store::open(&path).unwrap().load().unwrap(), []);
}

#[test]
fn flipped_bytes_never_panic_and_never_yield_foreign_records() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.redb");
    let store = Store::open(&path).unwrap();
    let written: Vec<Record> = (0..50).map(record).collect();
    for n in 0..50 {
        store.commit(put(n)).wait().unwrap();
    }
    assert_eq!(store.load().unwrap(), written);
    drop(store);
    let sound = fs::read(&path).unwrap();
    // All over the file, and where there is something: most of it is empty.
    let used: Vec<usize> = (0..sound.len()).filter(|at| sound[*at] != 0).collect();
    let everywhere = (0..sound.len()).step_by(sound.len() / 97);
    let mut opened = 0;
    for at in everywhere.chain(used.iter().copied().step_by((used.len() / 200).max(1))) {
        let mut bytes = sound.clone();
        bytes[at] ^= 0x40;
        fs::write(&path, &bytes).unwrap();
        if let Ok(store) = Store::open(&path) {
            opened += 1;
            assert_eq!(store.load().unwrap(), written, "byte {at}: damage is reported, or changes nothing");
        }
    }
    assert!(opened > 0, "a flipped byte in an empty page hurts nobody");
}

#[test]
fn records_of_a_newer_daemon_are_refused_but_no_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.redb");
    Store::open(&path).unwrap().commit(put(1)).wait().unwrap();
    let database = Database::open(&path).unwrap();
    let write = database.begin_write().unwrap();
    let newer = terway_core::ipam::VERSION + 1;
    let record = format!(r#"{{"v":{newer},"kind":"of-the-future"}}"#);
    write.open_table(RECORDS).unwrap().insert("x", record.as_bytes()).unwrap();
    write.commit().unwrap();
    drop(database);
    let error = Store::open(&path).expect_err("a newer record");
    assert!(!error.is_damage() && error.to_string().contains(&format!("version {newer}")), "{error}");
}

const CHILD: &str = "TERWAY_STORE_TEST_FILE";

/// Commits 0, 1, 2, … and says each number once it is durable; every third is lazy and not said. Runs only as the child of the next test.
#[test]
#[ignore = "the child process of kill_nine_loses_nothing_that_was_reported"]
fn commit_until_killed() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let store = Store::open(path).unwrap();
    let next = store.load().unwrap().iter().map(number).max().map_or(0, |n| n + 1);
    let mut out = io::stdout();
    for n in next..next + 1_000_000 {
        if n % 3 == 0 {
            store.commit_lazily(put(n));
        } else {
            store.commit(put(n)).wait().unwrap();
            writeln!(out, "durable {n}").unwrap();
            out.flush().unwrap();
        }
    }
}

#[test]
fn kill_nine_loses_nothing_that_was_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.redb");
    let mut reported = None;
    for round in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::commit_until_killed", "--ignored", "--nocapture", "--test-threads=1"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        // Kill somewhere between the creation of the file and a few hundred commits, without the child's help.
        while seen < round * 17 {
            let line = lines.next().expect("the child ended by itself").unwrap();
            // libtest's own words may stand before ours on the first line.
            if let Some((_, n)) = line.split_once("durable ") {
                reported = Some(n.parse::<u64>().unwrap());
                seen += 1;
            }
        }
        if round == 0 {
            std::thread::sleep(Duration::from_millis(3));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            if let Some((_, n)) = line.split_once("durable ") {
                reported = n.parse::<u64>().ok().or(reported);
            }
        }
        let Some(reported) = reported else { continue };
        let stored: BTreeSet<_> = Store::open(&path).unwrap().load().unwrap().iter().map(number).collect();
        let last = stored.last().copied().unwrap();
        assert!(last >= reported, "round {round}: {reported} was reported, {last} is the last on disk");
        // A prefix of the writes, the lazy ones included: no gap.
        assert_eq!(stored.len() as u64, last + 1, "round {round}");
    }
    assert!(reported.unwrap() > 100);
}
