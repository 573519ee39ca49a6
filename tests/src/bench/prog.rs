//! `prog`: nanoseconds per packet of the programs alone, by `BPF_PROG_TEST_RUN`.

use anyhow::Result;

use crate::figures::{Bar, Better, Figure};
use crate::prog_bench;

/// Bars in nanoseconds: an established packet, and the first one of a flow.
const ESTABLISHED: f64 = 150.0;
const FIRST: f64 = 600.0;

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
            bars: vec![Bar::AtMost(if name.ends_with("first") { FIRST } else { ESTABLISHED })],
            name: format!("{}_ns", name.replace(' ', "_")),
            value: ns,
            anchor: None,
            better: Better::Less,
        })
        .collect())
}
