//! libFuzzer's entry to [`terway_fuzz::packet`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| terway_fuzz::packet(data));
