//! Supervision of the daemon's tasks, threads and blocking operations: what a panic in each of them does.
//!
//! Everything that runs concurrently in the daemon starts here, under a name and with an [`OnPanic`]; clippy refuses the bare functions of
//! tokio and std (`clippy.toml`). The panic hook logs every panic with its location and counts it in `terway_panics_total`. A panic of a task
//! whose state must not be used half-changed ends the process inside the hook, before the stack unwinds: its locks stay held, so no other
//! task sees that state, and the next start restores it from the store and the pinned maps. Packets of running pods flow meanwhile.

use std::any::Any;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::pin::Pin;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use std::{io, process, thread};

use futures_util::FutureExt as _;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use terway_core::errors::{self, Error};
use tokio::task::JoinHandle;
use tracing::{error, warn};

/// Exit code of a daemon that a panic ended, as of any Rust process.
pub const EXIT_CODE: i32 = 101;

/// The first and the longest pause before a task that panicked is started again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// A task that ran this long before it panicked is started again after the first pause.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// How long `terway-cli status` shows a panic that did not end the daemon.
const SHOWN_FOR: Duration = Duration::from_secs(3600);

/// The consequence of a panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPanic {
    /// The process ends with [`EXIT_CODE`]. For whatever changes the state of the engine or the store.
    EndDaemon,
    /// The task is started again after a pause. For actors that rebuild their state from the objects and the maps.
    Restart,
    /// The operation fails with [`errors::PANIC`], everything else goes on. For single requests and connections.
    Contain,
}

impl OnPanic {
    const fn consequence(self) -> &'static str {
        match self {
            Self::EndDaemon => "the daemon ends",
            Self::Restart => "the task is restarted",
            Self::Contain => "the operation failed",
        }
    }
}

/// The supervised task, thread or operation that runs now on a thread.
#[derive(Clone, Copy, Debug)]
struct Task {
    name: &'static str,
    on_panic: OnPanic,
}

thread_local! {
    static CURRENT: Cell<Option<Task>> = const { Cell::new(None) };
}

impl Task {
    /// Runs `work` as this task.
    fn run<T>(self, work: impl FnOnce() -> T) -> T {
        struct Restore(Option<Task>);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(self.0);
            }
        }
        let _restore = Restore(CURRENT.replace(Some(self)));
        work()
    }
}

/// A future that is polled as a task.
struct Supervised<F> {
    task: Task,
    future: Pin<Box<F>>,
}

impl<F: Future> Supervised<F> {
    fn new(name: &'static str, on_panic: OnPanic, future: F) -> Self {
        Self { task: Task { name, on_panic }, future: Box::pin(future) }
    }
}

impl<F: Future> Future for Supervised<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let task = self.task;
        task.run(|| {
            #[cfg(debug_assertions)]
            injection::await_file(task.name, context.waker());
            self.future.as_mut().poll(context)
        })
    }
}

/// Spawns a task whose panic ends the daemon.
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    spawn_bare(Supervised::new(name, OnPanic::EndDaemon, future))
}

/// Spawns a task that is started again, with a growing pause, each time it panics. It ends when its future does.
pub fn spawn_restarting<F>(name: &'static str, mut start: impl FnMut() -> F + Send + 'static) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    spawn_bare(async move {
        let mut pause = BACKOFF.0;
        loop {
            let started = Instant::now();
            let run = Supervised::new(name, OnPanic::Restart, async { start().await });
            if AssertUnwindSafe(run).catch_unwind().await.is_ok() {
                return;
            }
            if started.elapsed() >= STABLE_AFTER {
                pause = BACKOFF.0;
            }
            warn!(task = name, ?pause, "restarting a task that panicked");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    })
}

/// Spawns a task whose panic ends only itself: one connection, one answer.
pub fn spawn_contained<F>(name: &'static str, future: F) -> JoinHandle<()>
where
    F: Future<Output: Send> + Send + 'static,
{
    spawn_bare(async move {
        let _panicked = contain(name, future).await;
    })
}

/// Runs a future whose panic is an error of its caller.
///
/// # Errors
/// [`errors::PANIC`].
pub async fn contain<T>(name: &'static str, future: impl Future<Output = T>) -> Result<T, Error> {
    AssertUnwindSafe(Supervised::new(name, OnPanic::Contain, future))
        .catch_unwind()
        .await
        .map_err(|panic| Error::new(errors::PANIC, format!("{name}: {}", message(&*panic))))
}

/// Runs `work` as an operation of its own inside a task, e.g. as one whose panic ends the daemon inside a request whose panics do not.
pub fn scope<T>(name: &'static str, on_panic: OnPanic, work: impl FnOnce() -> T) -> T {
    Task { name, on_panic }.run(|| {
        #[cfg(debug_assertions)]
        injection::point(name);
        work()
    })
}

/// Runs `work` on a thread that may block, as a part of the present task: a panic has the task's consequence.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let task = CURRENT.get().unwrap_or(Task { name: "blocking", on_panic: OnPanic::Contain });
    on_blocking_thread(move || task.run(work)).await
}

/// As [`blocking`], as an operation of its own; see [`scope`].
pub async fn blocking_scope<T: Send + 'static>(
    name: &'static str,
    on_panic: OnPanic,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    on_blocking_thread(move || scope(name, on_panic, work)).await
}

async fn on_blocking_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    #[expect(clippy::disallowed_methods, reason = "the supervised form of it")]
    let done = tokio::task::spawn_blocking(work);
    match done.await {
        Ok(value) => value,
        // The hook has reported it; the caller's task is unwound in its turn.
        Err(error) if error.is_panic() => panic::resume_unwind(error.into_panic()),
        // The runtime is shutting down.
        Err(_) => std::future::pending().await,
    }
}

/// Spawns a named thread.
///
/// # Errors
/// When the kernel gives no thread; `work` is dropped then.
pub fn spawn_thread(
    name: &'static str,
    on_panic: OnPanic,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<thread::JoinHandle<()>> {
    spawn_thread_from(thread::Builder::new(), name, on_panic, work)
}

/// As [`spawn_thread`], with the stack of `builder`.
///
/// # Errors
/// As [`spawn_thread`].
pub fn spawn_thread_from(
    builder: thread::Builder,
    name: &'static str,
    on_panic: OnPanic,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<thread::JoinHandle<()>> {
    #[expect(clippy::disallowed_methods, reason = "the supervised form of it")]
    builder.name(name.to_owned()).spawn(move || Task { name, on_panic }.run(work))
}

fn spawn_bare<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    #[expect(clippy::disallowed_methods, reason = "the supervised form of it")]
    tokio::spawn(future)
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TaskLabels {
    task: &'static str,
}

static PANICS: LazyLock<Family<TaskLabels, Counter>> = LazyLock::new(Family::default);

/// The last panic of a task that did not end the daemon.
struct Recent {
    at: Instant,
    count: u32,
    text: String,
}

static RECENT: Mutex<BTreeMap<&'static str, Recent>> = Mutex::new(BTreeMap::new());

/// Registers the counter of panics.
pub fn register_metrics(registry: &mut Registry) {
    registry.register("terway_panics", "Panics by the task in which they happened", PANICS.clone());
}

/// The panics of the last hour that did not end the daemon, for `terway-cli status`.
#[must_use]
pub fn problems() -> Vec<Error> {
    let recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
    recent
        .iter()
        .filter(|(_, recent)| recent.at.elapsed() < SHOWN_FOR)
        .map(|(task, Recent { count, text, .. })| {
            let times = if *count == 1 { String::new() } else { format!(" {count} times, the last time") };
            Error::new(errors::PANIC, format!("task {task}{times} {text}"))
        })
        .collect()
}

/// Installs the panic hook of the daemon. Without it (in unit tests) a panic only unwinds its task.
pub fn install_panic_hook() {
    #[cfg(debug_assertions)]
    injection::start();
    panic::set_hook(Box::new(report));
}

/// The message of a panic.
fn message(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("")
}

fn report(info: &PanicHookInfo<'_>) {
    let thread = thread::current();
    // Connections of the HTTP libraries have tasks of their own; what they call of the daemon is supervised. On the main thread nothing is.
    let unknown = if thread.name() == Some("main") { OnPanic::EndDaemon } else { OnPanic::Contain };
    let Task { name, on_panic } = CURRENT.get().unwrap_or(Task { name: "unsupervised", on_panic: unknown });
    PANICS.get_or_create(&TaskLabels { task: name }).inc();
    let reason = info.payload_as_str().unwrap_or("");
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    let consequence = on_panic.consequence();
    // Empty unless RUST_BACKTRACE asks for one.
    let backtrace = std::backtrace::Backtrace::capture();
    let backtrace = match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => backtrace.to_string(),
        _ => String::new(),
    };
    error!(
        code = errors::PANIC.id,
        task = name,
        thread = thread.name().unwrap_or_default(),
        location,
        reason,
        consequence,
        backtrace,
        "panic"
    );
    let text = format!("panicked at {location}: {reason}");
    if on_panic == OnPanic::EndDaemon {
        error!(
            code = errors::PANIC.id,
            cause = errors::PANIC.cause,
            detail = format!("task {name} {text}"),
            remedy = errors::PANIC.remedy,
            "terwayd ends"
        );
        process::exit(EXIT_CODE);
    }
    let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
    let entry = recent.entry(name).or_insert_with(|| Recent { at: Instant::now(), count: 0, text: String::new() });
    *entry = Recent { at: Instant::now(), count: entry.count.saturating_add(1), text };
}

/// Checks whether a test wants the present thread to panic here. Nothing in a release build.
pub fn injection_point(name: &'static str) {
    #[cfg(debug_assertions)]
    injection::point(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// Panics on demand, for tests: a file in the folder that `TERWAY_PANIC_DIR` names makes the task of the file's name panic. The file is
/// removed when it was seen. Not in a release build.
#[cfg(debug_assertions)]
mod injection {
    use std::collections::{BTreeSet, HashMap};
    use std::path::Path;
    use std::sync::{Mutex, OnceLock, PoisonError};
    use std::task::Waker;
    use std::time::Duration;

    use super::{OnPanic, spawn_thread};

    #[derive(Default)]
    struct State {
        due: BTreeSet<String>,
        wakers: HashMap<&'static str, Vec<Waker>>,
    }

    static STATE: OnceLock<Mutex<State>> = OnceLock::new();

    pub(super) fn start() {
        let Some(dir) = std::env::var_os("TERWAY_PANIC_DIR") else { return };
        STATE.get_or_init(Mutex::default);
        let _detached = spawn_thread("panic-injection", OnPanic::Contain, move || {
            loop {
                std::thread::sleep(Duration::from_millis(10));
                look(Path::new(&dir));
            }
        });
    }

    fn look(dir: &Path) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let (Ok(name), Some(state)) = (entry.file_name().into_string(), STATE.get()) else { continue };
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            for waker in state.wakers.get(name.as_str()).into_iter().flatten() {
                waker.wake_by_ref();
            }
            state.due.insert(name);
            drop(state);
            let _ = std::fs::remove_file(entry.path());
        }
    }

    /// Panics if that is due for `name`; else has the task polled when it is.
    pub(super) fn await_file(name: &'static str, waker: &Waker) {
        let Some(state) = STATE.get() else { return };
        {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let wakers = state.wakers.entry(name).or_default();
            if !wakers.iter().any(|known| known.will_wake(waker)) {
                // Tasks come and go; those that have gone do nothing when they are woken.
                if wakers.len() >= 64 {
                    wakers.remove(0);
                }
                wakers.push(waker.clone());
            }
        }
        point(name);
    }

    pub(super) fn point(name: &'static str) {
        let Some(state) = STATE.get() else { return };
        let due = state.lock().unwrap_or_else(PoisonError::into_inner).due.remove(name);
        assert!(!due, "a test injected this panic into {name}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_restarting_task_runs_again_after_a_growing_pause_until_it_ends() {
        let runs = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&runs);
        let start = tokio::time::Instant::now();
        let task = spawn_restarting("test", move || {
            let run = counted.fetch_add(1, Ordering::SeqCst);
            async move { assert!(run >= 3, "not yet") }
        });
        task.await.unwrap();
        assert_eq!(runs.load(Ordering::SeqCst), 4);
        assert_eq!(start.elapsed().as_millis() / 100, 7, "100 + 200 + 400 ms");
    }

    #[tokio::test]
    async fn a_contained_panic_is_an_error_with_its_message() {
        let error = contain("request", async { panic!("no such thing as {}", 7) }).await.map(|(): ()| ()).unwrap_err();
        assert_eq!((error.code, error.detail.as_str()), (errors::PANIC, "request: no such thing as 7"));
        assert_eq!(contain("request", async { 1 }).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn a_panic_on_a_blocking_thread_passes_to_the_task_and_its_name_goes_along() {
        let name = contain("outer", blocking(|| CURRENT.get().map(|task| task.name))).await.unwrap();
        assert_eq!(name, Some("outer"));
        let inner = blocking_scope("inner", OnPanic::EndDaemon, || CURRENT.get().map(|task| task.name));
        assert_eq!(contain("outer", inner).await.unwrap(), Some("inner"));
        let panicked = contain("outer", blocking(|| panic!("deep"))).await.map(|(): ()| ()).unwrap_err();
        assert_eq!(panicked.detail, "outer: deep");
    }

    #[test]
    fn scopes_nest_and_end_with_their_work() {
        let now = || CURRENT.get().map(|task| task.name);
        assert_eq!(now(), None);
        scope("a", OnPanic::Contain, || {
            scope("b", OnPanic::EndDaemon, || assert_eq!(now(), Some("b")));
            assert_eq!(now(), Some("a"));
            let unwound = panic::catch_unwind(|| scope("c", OnPanic::Contain, || panic!("c")));
            assert!(unwound.is_err() && now() == Some("a"));
        });
        assert_eq!(now(), None);
    }
}
