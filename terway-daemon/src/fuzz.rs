//! Entries for fuzz targets: parsers of external input that are not public otherwise.

use std::path::Path;

/// Reads a file of manifests, by the format that its name tells.
pub fn manifest(path: &Path, text: &str) {
    crate::objects::fuzz_document(path, text);
}

/// Reads a reply of the OpenAPI as each action does.
pub fn openapi_reply(body: &[u8]) {
    crate::cloud::fuzz_reply(body);
}
