//! The daemon's rooms. Each acts on one thing outside; what to do is decided in `terway-core`.

pub mod net;
