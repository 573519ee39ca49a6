//! Report of a list of map operations: which of them the kernel has refused.

use std::sync::Arc;

use super::error::BpfError;

/// A refused operation: it is not in effect, and is run again by the handle's `retry`.
#[derive(Clone, Debug)]
pub struct RefusedOp<Op> {
    /// The operation.
    pub op: Op,
    /// Why it, or an operation that it depends on, was refused.
    pub error: Arc<BpfError>,
}

/// Report of a list of operations: all that are not in effect, be they of this list or of an earlier one.
///
/// An operation is not reported any more when it has succeeded, or when a later one on the same object has.
#[derive(Clone, Debug)]
#[must_use]
pub struct ApplyReport<Op> {
    /// The refused operations, dependencies first.
    pub refused: Vec<RefusedOp<Op>>,
}

impl<Op> ApplyReport<Op> {
    /// Whether everything is in effect.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.refused.is_empty()
    }

    /// One error for all refused operations.
    ///
    /// # Errors
    /// [`BpfError::Refused`] if there are any.
    pub fn into_result(self) -> Result<(), BpfError> {
        BpfError::of_all(self.refused.iter().map(|refused| refused.error.to_string()))
    }
}
