//! The persistent store: the records of [`terway_core::ipam`] in one redb file, written by one thread; commits that wait at the same time
//! share one flush.
//!
//! A write is in order from the moment [`Store::commit`] or [`Store::commit_lazily`] returns. After a crash the file holds all writes up to
//! some point and none after it; every write that was reported durable is before that point.

mod error;
mod writer;

use std::fs::{self, File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition};
use terway_core::ipam::{Change, Record};
use tokio::sync::oneshot;

pub use error::StoreError;
use writer::{Job, Writer};

use crate::supervise::{self, OnPanic};

/// Key: the record key's text. Value: the record's bytes.
const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("records");

/// The store. Dropping it writes what is still to be written and waits for that.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    database: Arc<Database>,
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    flushes: Arc<AtomicU64>,
}

impl Store {
    /// Opens the file, or makes it if there is none; checks that everything in it can be read.
    ///
    /// # Errors
    /// See [`StoreError`]. None of them alters the file, except that redb repairs its own structures.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let path = path.into();
        if !path.exists() {
            create(&path).map_err(|source| StoreError::Io { path: path.clone(), source })?;
        }
        let database = guarded(&path, || open(&path))?;
        guarded(&path, || load(&path, &database))?;
        let flushes = Arc::new(AtomicU64::new(0));
        let (jobs, queue) = mpsc::channel();
        let database = Arc::new(database);
        let writer = Writer::new(path.clone(), Arc::clone(&database), queue, Arc::clone(&flushes));
        let writer = supervise::spawn_thread("store", OnPanic::EndDaemon, move || writer.run())
            .map_err(|source| StoreError::Io { path: path.clone(), source })?;
        Ok(Self { path, database, jobs: Some(jobs), writer: Some(writer), flushes })
    }

    /// Every record.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn load(&self) -> Result<Vec<Record>, StoreError> {
        guarded(&self.path, || load(&self.path, &self.database))
    }

    /// Writes all of `changes` or none, after everything that was handed over before. The write is under way when this returns; the
    /// result resolves when it is on disk, also if nobody polls it.
    pub fn commit(&self, changes: Vec<Change>) -> Commit {
        self.committed(changes, None)
    }

    /// As [`commit`](Self::commit), and opens a gate for a thread that gets ready meanwhile.
    pub fn commit_gated(&self, changes: Vec<Change>) -> (Commit, Gate) {
        let (opener, opens) = mpsc::channel();
        (self.committed(changes, Some(opener)), Gate { opens, path: self.path.clone() })
    }

    fn committed(&self, changes: Vec<Change>, gate: Option<mpsc::Sender<()>>) -> Commit {
        let (done, wait) = oneshot::channel();
        self.send(Job { changes, done: Some(done), gate });
        Commit { wait, path: self.path.clone() }
    }

    /// Like [`commit`](Self::commit), with the next durable write or a tenth of a second later, whichever comes first.
    pub fn commit_lazily(&self, changes: Vec<Change>) {
        self.send(Job { changes, done: None, gate: None });
    }

    /// How many transactions have been flushed to disk: fewer than commits when many came at once.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // A writer that is gone has dropped the other end; the waiter's channel then says so.
            let _gone = jobs.send(job);
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!(path = %self.path.display(), "the store's writer panicked");
        }
    }
}

/// Gate of a thread that waits for a durable write.
#[derive(Debug)]
#[must_use = "what depends on the write may start only behind it"]
pub struct Gate {
    opens: mpsc::Receiver<()>,
    path: PathBuf,
}

impl Gate {
    /// Waits. The writer wakes this thread itself: by way of the runtime an ADD would wait for one thread more.
    ///
    /// # Errors
    /// When the write failed.
    pub fn wait(self) -> Result<(), StoreError> {
        self.opens.recv().map_err(|mpsc::RecvError| StoreError::Stopped { path: self.path })
    }
}

/// A durable write under way.
#[derive(Debug)]
#[must_use = "what depends on the write may start only when this resolves"]
pub struct Commit {
    wait: oneshot::Receiver<Result<(), StoreError>>,
    path: PathBuf,
}

impl Commit {
    /// Waits on a thread that may block; panics on one that runs async tasks.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn wait(self) -> Result<(), StoreError> {
        let path = self.path;
        self.wait.blocking_recv().unwrap_or(Err(StoreError::Stopped { path }))
    }
}

impl Future for Commit {
    type Output = Result<(), StoreError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let path = self.path.clone();
        Pin::new(&mut self.wait).poll(cx).map(|result| result.unwrap_or(Err(StoreError::Stopped { path })))
    }
}

/// Renames the file to `<name>.<label>-<n>` with the first free `n`, and returns the new path.
///
/// Never done by [`Store::open`]: with the file goes the knowledge of which address is whose, and a pool that starts without it
/// hands out addresses that running pods have. It is for a caller who has made sure that no pod is running, and who says so loudly.
///
/// # Errors
/// When no name is free or the rename fails.
pub fn set_aside(path: &Path, label: &str) -> io::Result<PathBuf> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    for n in 1..1000 {
        let aside = path.with_file_name(format!("{name}.{label}-{n}"));
        if !aside.exists() {
            fs::rename(path, &aside)?;
            sync_folder(path)?;
            return Ok(aside);
        }
    }
    Err(io::Error::other("a thousand files were set aside already"))
}

/// Makes an empty store under another name first, so that a file of the right name is always complete: an empty or short one is damage, not
/// a creation that was cut off.
fn create(path: &Path) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let unfinished = path.with_file_name(name);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    let database = Database::builder().create_file(file).map_err(io::Error::other)?;
    let write = database.begin_write().map_err(io::Error::other)?;
    write.open_table(RECORDS).map(drop).map_err(io::Error::other)?;
    write.commit().map_err(io::Error::other)?;
    drop(database);
    fs::rename(&unfinished, path)?;
    sync_folder(path)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let refused = |source| match source {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
        DatabaseError::Storage(StorageError::Io(source))
            if !matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
        {
            StoreError::Io { path: path.to_owned(), source }
        }
        other => StoreError::unreadable(path, &other),
    };
    let mut database = Database::open(path).map_err(refused)?;
    // Reading alone verifies no checksums: a flipped bit in a value would be another record. What redb repairs here is an older state, without writes
    // that were reported durable.
    match database.check_integrity().map_err(refused)? {
        true => Ok(database),
        false => Err(StoreError::Unreadable {
            path: path.to_owned(),
            reason: "the checksums do not fit its contents".to_owned(),
        }),
    }
}

fn load(path: &Path, database: &Database) -> Result<Vec<Record>, StoreError> {
    let read = database.begin_read().map_err(|e| StoreError::unreadable(path, &e))?;
    let table = read.open_table(RECORDS).map_err(|e| StoreError::unreadable(path, &e))?;
    let mut records = Vec::new();
    for entry in table.iter().map_err(|e| StoreError::unreadable(path, &e))? {
        let (key, value) = entry.map_err(|e| StoreError::unreadable(path, &e))?;
        let bad = |source| StoreError::Record {
            path: path.to_owned(),
            key: key.value().to_owned(),
            source: Arc::new(source),
        };
        records.push(Record::decode(value.value()).map_err(bad)?);
    }
    Ok(records)
}

/// redb checks what it reads by assertions too: a panic about a damaged file is an error like the others.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let read = || supervise::scope("store-file", OnPanic::Contain, read);
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        let words =
            panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
        Err(StoreError::Unreadable { path: path.to_owned(), reason: words.unwrap_or_default() })
    })
}

#[cfg(test)]
mod tests;
