//! libFuzzer's entry to [`terway_fuzz::eni_conf`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| terway_fuzz::eni_conf(data));
