//! The parts of `terwayd` and `terway-cli`.

pub mod cloud;
