//! The benchmarks of `cargo xtask bench`, one file each. All measure against an alternative in the same run, round by round in turn, so that
//! a machine whose speed drifts drifts for both.

use anyhow::Result;
use terway_sim::cluster::Options;

pub mod add;
pub mod ipam;
pub mod path;
pub mod policy;
pub mod prog;
pub mod svc;

/// A cluster of one node, whose daemon logs so much.
///
/// # Errors
/// When it is unknown where our programs are.
pub fn one_node(log: &str) -> Result<Options> {
    let mut options = Options::exclusive()?;
    options.nodes = 1;
    options.ip_stack = "ipv4";
    options.log = log.to_owned();
    Ok(options)
}
