//! The writer thread: changes that arrive while it flushes go into the next transaction together.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use redb::{Database, Durability};
use terway_core::ipam::Change;
use tokio::sync::oneshot;

use super::{RECORDS, StoreError};
use crate::supervise;

/// How long a lazy write may wait for a durable one to join.
const LAZY: Duration = Duration::from_millis(100);

/// One write; durable if somebody waits for it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) changes: Vec<Change>,
    pub(super) done: Option<oneshot::Sender<Result<(), StoreError>>>,
    pub(super) gate: Option<Sender<()>>,
}

pub(super) struct Writer {
    path: PathBuf,
    database: Arc<Database>,
    queue: Receiver<Job>,
    flushes: Arc<AtomicU64>,
}

impl Writer {
    pub(super) const fn new(
        path: PathBuf,
        database: Arc<Database>,
        queue: Receiver<Job>,
        flushes: Arc<AtomicU64>,
    ) -> Self {
        Self { path, database, queue, flushes }
    }

    /// Until the store is dropped, or a write fails: after that nothing may be written, for it could depend on what is lost.
    pub(super) fn run(self) {
        let mut jobs = Vec::new();
        let mut due = None;
        loop {
            let open = match due {
                None => self.queue.recv().map_err(|_closed| RecvTimeoutError::Disconnected),
                Some(due) => self.queue.recv_timeout(Instant::saturating_duration_since(&due, Instant::now())),
            };
            let closed = matches!(open, Err(RecvTimeoutError::Disconnected));
            let late = matches!(open, Err(RecvTimeoutError::Timeout));
            jobs.extend(open);
            jobs.extend(self.queue.try_iter());
            if !closed && !late && jobs.iter().all(|job: &Job| job.done.is_none()) {
                due = due.or_else(|| Some(Instant::now() + LAZY));
                continue;
            }
            if !jobs.is_empty() && !self.flush(&mut jobs) {
                return;
            }
            due = None;
            if closed {
                return;
            }
        }
    }

    /// Writes all jobs in one transaction and tells who waits. Says whether it went well.
    fn flush(&self, jobs: &mut Vec<Job>) -> bool {
        supervise::injection_point("store");
        let result = self.write(jobs);
        if let Err(error) = &result {
            tracing::error!(%error, "failed to write the store");
        }
        let went_well = result.is_ok();
        // A gate that is dropped unopened says that the write failed.
        for gate in jobs.iter_mut().filter_map(|job| job.gate.take()).filter(|_| went_well) {
            let _gone = gate.send(());
        }
        for done in jobs.drain(..).filter_map(|job| job.done) {
            // Whoever stopped waiting knows the outcome from the next start.
            let _gone = done.send(match &result {
                Ok(()) => Ok(()),
                Err(error) => Err(error.share()),
            });
        }
        went_well
    }

    fn write(&self, jobs: &[Job]) -> Result<(), StoreError> {
        let failed = |source: redb::Error| StoreError::Write { path: self.path.clone(), source: Arc::new(source) };
        let encode = |source| StoreError::Encode { path: self.path.clone(), source: Arc::new(source) };
        let mut write = self.database.begin_write().map_err(|e| failed(e.into()))?;
        write.set_durability(Durability::Immediate).map_err(|e| failed(e.into()))?;
        {
            let mut table = write.open_table(RECORDS).map_err(|e| failed(e.into()))?;
            for change in jobs.iter().flat_map(|job| &job.changes) {
                match change {
                    Change::Put(record) => {
                        let key = record.key().encode().map_err(encode)?;
                        let value = record.encode().map_err(encode)?;
                        table.insert(key.as_str(), value.as_slice()).map_err(|e| failed(e.into()))?;
                    }
                    Change::Delete(key) => {
                        let key = key.encode().map_err(encode)?;
                        table.remove(key.as_str()).map_err(|e| failed(e.into()))?;
                    }
                }
            }
        }
        write.commit().map_err(|e| failed(e.into()))?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl StoreError {
    /// The same failure for another waiter.
    fn share(&self) -> Self {
        match self {
            Self::Write { path, source } => Self::Write { path: path.clone(), source: Arc::clone(source) },
            Self::Encode { path, source } => Self::Encode { path: path.clone(), source: Arc::clone(source) },
            other => Self::Unreadable { path: PathBuf::new(), reason: other.to_string() },
        }
    }
}
