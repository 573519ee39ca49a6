//! How an error of the catalogue rides on a failed call.
//!
//! A gRPC status has a code of 17 and a sentence; a user needs the catalogue's code, cause and remedy. They travel as a serialised
//! [`ErrorDetail`] in the trailing metadata [`METADATA_KEY`], where the status' own `details` would need `google.rpc.Any` around them.

use prost::Message as _;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

use crate::v1::ErrorDetail;

/// Key of the trailing metadata; the suffix `-bin` makes gRPC carry bytes (base64 on the wire).
pub const METADATA_KEY: &str = "terway-error-bin";

/// A failed call's status that carries `detail`; its message is the cause and the particulars.
#[must_use]
pub fn status(code: Code, detail: &ErrorDetail) -> Status {
    let mut metadata = MetadataMap::with_capacity(1);
    metadata.insert_bin(METADATA_KEY, MetadataValue::from_bytes(&detail.encode_to_vec()));
    let message = [detail.code.as_str(), detail.cause.as_str(), detail.detail.as_str()].join(" ");
    Status::with_metadata(code, message.trim(), metadata)
}

/// The detail that a failed call's status carries; `None` when the call failed outside the daemon's code (transport, deadline).
#[must_use]
pub fn detail(status: &Status) -> Option<ErrorDetail> {
    let bytes = status.metadata().get_bin(METADATA_KEY)?.to_bytes().ok()?;
    ErrorDetail::decode(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> ErrorDetail {
        ErrorDetail {
            code: "TW0202".to_owned(),
            cause: "A vSwitch is empty.".to_owned(),
            remedy: "Add one.".to_owned(),
            detail: "vsw-1 – voll".to_owned(),
            cni_code: 11,
        }
    }

    #[test]
    fn a_detail_survives_the_headers_it_travels_in() {
        let sent = status(Code::ResourceExhausted, &sample());
        let headers = sent.into_http::<()>().into_parts().0.headers;
        let received = Status::from_header_map(&headers).unwrap();
        assert_eq!(received.code(), Code::ResourceExhausted);
        assert_eq!(detail(&received), Some(sample()));
        assert!(received.message().contains("vsw-1"), "{}", received.message());
    }

    #[test]
    fn garbage_and_absence_are_no_detail() {
        assert_eq!(detail(&Status::unavailable("gone")), None);
        let mut metadata = MetadataMap::new();
        metadata.insert_bin(METADATA_KEY, MetadataValue::from_bytes(&[0xff; 3]));
        assert_eq!(detail(&Status::with_metadata(Code::Internal, "x", metadata)), None);
    }
}
