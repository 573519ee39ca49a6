//! libFuzzer's entry to [`terway_fuzz::store_file`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| terway_fuzz::store_file(data));
