//! The gRPC contract between the plugin, the command line and the daemon of one node, and how an error of the catalogue travels in it.
//!
//! [`v1`] is generated from `terway/v1/node.proto` by `cargo xtask codegen` and committed. Server code is behind the feature `server`.

mod detail;

pub use detail::{METADATA_KEY, detail, status};

/// What the daemon's clients take for an answer at the most, bytes: 30 000 Services with their endpoints are a tenth of it. gRPC's own limit is
/// 4 MiB.
pub const ANSWER_BYTES: usize = 256 << 20;

/// Version 1 of the contract.
pub mod v1 {
    #![allow(
        clippy::allow_attributes_without_reason,
        clippy::clone_on_ref_ptr,
        clippy::use_self,
        missing_docs,
        unused_qualifications,
        reason = "generated code; its documentation is that of the .proto file"
    )]
    include!("generated.rs");
}
