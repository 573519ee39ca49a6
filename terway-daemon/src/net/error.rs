//! Errors of network configuration.

use std::io;

use terway_core::errors::{self, Error};

/// An error of network configuration.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A netlink request or another system call failed.
    #[error("{op}: {source}{}", extack.as_ref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Kernel {
        /// The step, in words.
        op: String,
        /// The error number.
        source: io::Error,
        /// The kernel's own explanation (`NLMSGERR_ATTR_MSG`), where it gave one.
        extack: Option<String>,
    },
    /// The kernel's reply was lost (receive buffer overrun or time-out), so the outcome is unknown. Repeating the step is safe.
    #[error("{op}: the kernel's reply was lost")]
    NoAnswer {
        /// The step, in words.
        op: String,
    },
    /// A path is not the network namespace of a pod.
    #[error("{path}: {reason}")]
    Netns {
        /// The path.
        path: String,
        /// Why.
        reason: String,
    },
    /// The pod has an interface of this name that is not ours.
    #[error("CNI_IFNAME {ifname} exists in the pod")]
    IfnameTaken {
        /// The interface.
        ifname: String,
    },
    /// The node has an interface of the name we need that is not ours.
    #[error("the node's interface {name} exists and was not made by terway; rename or delete it")]
    ForeignLink {
        /// The interface.
        name: String,
    },
    /// The interface with this index has another name than planned, or none.
    #[error("interface {index} is {found} instead of {planned}")]
    Renamed {
        /// Interface index.
        index: u32,
        /// The name in the plan.
        planned: String,
        /// The name it has, or "gone".
        found: String,
    },
    /// The job panicked, or its thread ended.
    #[error("the network thread panicked or ended before the work was done")]
    Worker,
}

impl NetError {
    /// A system call's error during `op`.
    pub(super) fn io(op: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Kernel { op: op.into(), source: source.into(), extack: None }
    }

    /// The kernel's error number, if it gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

impl From<NetError> for Error {
    fn from(error: NetError) -> Self {
        let code = match &error {
            NetError::Netns { .. } => errors::CNI_NETNS,
            NetError::IfnameTaken { .. } => errors::IFNAME_TAKEN,
            NetError::Worker => errors::PANIC,
            _ => errors::NET_FAILED,
        };
        Self::new(code, error.to_string())
    }
}
