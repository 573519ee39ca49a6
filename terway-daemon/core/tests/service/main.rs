//! The Service planner against an oracle, under random changes, one operation at a time.

#![allow(clippy::unwrap_used, reason = "tests")]

mod failures;
mod maglev;
mod minimal;
mod oracle;
mod random;
mod rules;
mod scale;
mod world;
