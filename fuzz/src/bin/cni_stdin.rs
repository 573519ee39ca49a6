//! libFuzzer's entry to [`terway_fuzz::cni_stdin`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| terway_fuzz::cni_stdin(data));
