//! Ioctls from libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| anykvm_fuzz::ioctls(data));
