//! libFuzzer's entry to [`terway_fuzz::store_record`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| terway_fuzz::store_record(data));
