//! The policy compiler against an oracle written from the documentation: random worlds, random histories of changes, and the rules that
//! implementations get wrong, one by one.
//!
//! `POLICY_WORLDS=100000 POLICY_HISTORIES=20000 cargo test --release -p terway-core --test policy` looks longer; `POLICY_SEED=N` begins elsewhere.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod complexity;
mod counted;
mod datapath;
mod dice;
mod failures;
mod fixture;
mod history;
mod making;
mod random;
mod rules;
mod scale;

/// A number from the environment.
#[allow(clippy::disallowed_methods, reason = "who runs the tests says how long")]
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
