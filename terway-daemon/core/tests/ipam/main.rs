//! The address pool against a model of everything around it: a cloud that hands out real addresses and fails, a kernel that remembers what is
//! wired, a store that keeps a prefix of the writes, and an engine that runs effects in any order the contract allows and dies at any point.
//!
//! `PROPTEST_CASES=10000 cargo test -p terway-core --test ipam` looks longer; `TERWAY_TRACE=FILE` writes the last failing history there.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod burst;
mod cloud;
mod edits;
mod random;
mod restart;
mod rules;
mod timing;
mod world;
