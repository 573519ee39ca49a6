//! `prog`: nanoseconds per packet of the programs alone, by `BPF_PROG_TEST_RUN`.

use anyhow::Result;

use crate::figures::{Bar, Better, Figure};
use crate::prog_bench;

/// Bars in nanoseconds: established packet, established packet with NAT, first packet of a flow.
const ESTABLISHED: f64 = 150.0;
const TRANSLATED: f64 = 180.0;
const FIRST: f64 = 600.0;

/// First packets to Services have no bar: they create two entries, and are rare with translation at the socket.
fn bar(name: &str) -> Vec<Bar> {
    match (name.contains("service"), name.ends_with("first")) {
        (true, true) => vec![Bar::None],
        (true, false) => vec![Bar::AtMost(TRANSLATED)],
        (false, true) => vec![Bar::AtMost(FIRST)],
        (false, false) => vec![Bar::AtMost(ESTABLISHED)],
    }
}

/// Measures on a thread of its own, which enters a sandbox and ends with it.
///
/// # Errors
/// When a right is missing or the kernel refuses a step.
pub fn measure() -> Result<Vec<Figure>> {
    let measured =
        std::thread::spawn(prog_bench::measure).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok(measured
        .into_iter()
        .map(|(name, ns)| Figure {
            bench: "prog",
            bars: bar(&name),
            name: format!("{}_ns", name.replace(' ', "_")),
            value: ns,
            anchor: None,
            better: Better::Less,
        })
        .collect())
}
