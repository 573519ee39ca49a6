//! The address pool against a model of everything around it: a cloud that hands out real addresses and fails, a kernel that remembers what is
//! wired, a store that keeps a prefix of the writes, and an engine that runs effects in any order the contract allows and dies at any point.
//!
//! Long histories (`random`) are few and checked wholly; short ones (`short`) are 10^5 and checked on what each step changes; in `boundary` the process
//! dies before, during and after every single effect of some stories.
//!
//! `PROPTEST_CASES=10000` makes more long histories, `TERWAY_HISTORIES=1000000` more short ones, `TERWAY_SEED=100000` others; `TERWAY_TRACE=FILE` writes the
//! last failing one there.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod boundary;
mod burst;
mod cloud;
mod drive;
mod edits;
mod engine;
mod history;
mod promises;
mod random;
mod restart;
mod rules;
mod short;
mod timing;
mod world;
