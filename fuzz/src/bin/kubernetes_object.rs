//! libFuzzer's entry to [`terway_fuzz::kubernetes_object`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| terway_fuzz::kubernetes_object(data));
