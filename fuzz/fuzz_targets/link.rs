#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| imbus_fuzz::link::run(data));
