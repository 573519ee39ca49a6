//! libFuzzer's entry to [`terway_fuzz::openapi_reply`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| terway_fuzz::openapi_reply(data));
