//! Conversions between domain types and the messages of the gRPC contract (`terway-proto`).
//!
//! A leaf: it imports the domain modules, and only `server` and the command line import it. Domain modules do not import `terway-proto`.

pub(crate) mod policy;
pub(crate) mod services;

use terway_core::errors::Error;
use terway_core::ident::{AttachmentKey, PodRef};
use terway_core::objects::ObjectName;
use terway_proto::v1;

/// An error of the catalogue.
pub(crate) fn error_detail(error: &Error) -> v1::ErrorDetail {
    v1::ErrorDetail {
        code: error.code.id.to_owned(),
        cause: error.code.cause.to_owned(),
        remedy: error.code.remedy.to_owned(),
        detail: error.detail.clone(),
        cni_code: error.code.cni,
    }
}

/// The key of an attachment.
pub(crate) fn attachment(key: &AttachmentKey) -> v1::Attachment {
    let AttachmentKey { network, container_id, ifname } = key.clone();
    v1::Attachment { network, container_id, ifname }
}

/// A pod of this node.
pub(crate) fn pod(pod: &PodRef) -> v1::Pod {
    let PodRef { namespace, name, uid } = pod.clone();
    v1::Pod { namespace, name, uid }
}

/// A pod of any node, by its name.
pub(crate) fn pod_name(name: &ObjectName) -> v1::Pod {
    v1::Pod { namespace: name.namespace.to_string(), name: name.name.to_string(), uid: String::new() }
}
