//! One write to the API server: counted, and its failure remembered for the status.

use http::StatusCode;
use tracing::{debug, warn};

use super::KubeWrites;
use crate::objects::ApiError;

/// The result of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The API server has it.
    Written,
    /// The object is not there.
    Missing,
    /// The object is not as it was expected to be, or exists.
    Conflict,
    /// The API server refuses it, whenever it is tried.
    Refused,
    /// The API server is away or overloaded.
    Failed,
}

impl Outcome {
    fn of(error: &ApiError) -> Self {
        match error.status() {
            Some(StatusCode::NOT_FOUND) => Self::Missing,
            // A JSON Patch whose test fails is answered with 422.
            Some(StatusCode::CONFLICT | StatusCode::UNPROCESSABLE_ENTITY) => Self::Conflict,
            Some(StatusCode::BAD_REQUEST | StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED) => Self::Refused,
            _ => Self::Failed,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Missing => "missing",
            Self::Conflict => "conflict",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

impl KubeWrites {
    /// Carries out a write of the kind `what`.
    pub(super) async fn write(&self, what: &'static str, write: impl Future<Output = Result<(), ApiError>>) -> Outcome {
        let result = write.await;
        let outcome = result.as_ref().map_or_else(Outcome::of, |()| Outcome::Written);
        self.metrics.write(what, outcome.as_str());
        match (outcome, result) {
            (Outcome::Refused | Outcome::Failed, Err(error)) => {
                let error = error.to_string();
                if self.failures.lock().insert(what, error.clone()).is_none() {
                    warn!(what, error, "failed to write to the API server");
                }
            }
            (_, result) => {
                if let Err(error) = result {
                    debug!(what, %error, "the object has changed");
                }
                self.failures.lock().remove(what);
            }
        }
        outcome
    }
}
