//! libFuzzer's entry to [`terway_fuzz::manifest`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| terway_fuzz::manifest(data));
