//! Guests from libFuzzer, interpreted and translated.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| anykvm_fuzz::translated(data));
