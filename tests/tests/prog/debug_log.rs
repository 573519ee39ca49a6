//! The debug log of the slow path: from the programs through aya-log into `tracing`.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use terway_tests::sandbox::Sandbox;

use super::*;

/// Collects what a subscriber writes.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The log of a first packet and an established one, in programs with or without the debug log.
fn log_of_one_flow(sandbox: &Sandbox, debug: bool) -> String {
    let stage = Stage::with(&Config { debug, ..Config::new(sandbox.pin_root()) }).unwrap();
    let frame = stage.sent_by(&stage.a).ip("10.0.0.1", "10.0.0.2");
    for flags in [flags::SYN, flags::ACK] {
        let frame = frame.clone().tcp(40_000, 80, flags).build();
        let ran =
            stage.datapath.programs().run(Program::FromPod, &frame, RunContext::on(stage.a.host_ifindex)).unwrap();
        assert_eq!(ran.action, REDIRECT);
    }
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter("terway_datapath=info")
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tracing::subscriber::with_default(subscriber, || {
        runtime.block_on(async {
            let mut log = stage.datapath.programs().take_debug_log().unwrap();
            // The records are in the ring buffer already; the stream does not end.
            let _ended = tokio::time::timeout(Duration::from_secs(2), log.run()).await;
        });
    });
    let bytes = lines.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn debug_log_has_the_decisions_of_the_slow_path() {
    let sandbox = sandbox_or_skip!();
    let log = log_of_one_flow(&sandbox, true);
    // One line each, of the first packet only.
    for expected in
        ["proto 6 10.0.0.1:40000 -> 10.0.0.2:80 stale policy 0", "route: action 1 oif ", "verdict: counter 0 "]
    {
        assert_eq!(log.matches(expected).count(), 1, "{expected:?} in {log}");
    }
}

#[test]
fn debug_log_is_empty_when_off() {
    let sandbox = sandbox_or_skip!();
    assert_eq!(log_of_one_flow(&sandbox, false), "");
}
