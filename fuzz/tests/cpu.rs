//! The inputs that are kept, and a fixed number of random ones: the short form of `cargo xtask fuzz cpu`.
//! A panic of the processor fails the test with the input's file or seed in its message; what the
//! kernel ends (an access beyond a slot) or what does not end leaves it on standard error.

mod random;

use random::Random;
use std::fs;
use std::path::Path;

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/cpu")
}

#[test]
fn kept_inputs() {
    let mut count = 0;
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        eprintln!("{}", path.display());
        anykvm_fuzz::cpu(&fs::read(&path).unwrap());
        anykvm_fuzz::translated(&fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count > 0, "no input in {}", folder().display());
}

/// First bytes of instructions that change what the next ones mean.
const OPENINGS: &[&[u8]] = &[
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x20],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x0f, 0x38],
    &[0x0f, 0x3a],
    &[0x8e],
    &[0x9a],
    &[0xca],
    &[0xcd],
    &[0xcf],
    &[0x48, 0xcf],
    &[0x9d],
    &[0xea],
    &[0xff],
    &[0xc4],
    &[0xc5],
    &[0x62],
    &[0xd9],
    &[0xf3, 0xa4],
    &[0xf3, 0x6c],
];

/// An input of random bytes in which instructions begin often.
fn random(seed: u64) -> Vec<u8> {
    let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut input: Vec<u8> = (0..1024).map(|_| r.next() as u8).collect();
    input[0] = seed as u8;
    // The code lies behind ten bytes of counts.
    let mut at = 10;
    for _ in 0..16 {
        let opening = OPENINGS[r.next() as usize % OPENINGS.len()];
        input[at..at + opening.len()].copy_from_slice(opening);
        at += opening.len() + r.next() as usize % 6;
    }
    input
}

fn each_random(run: fn(&[u8])) {
    let rounds: u64 = std::env::var("ANYKVM_TEST_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(3000);
    for seed in 0..rounds {
        let result = std::panic::catch_unwind(|| run(&random(seed)));
        assert!(result.is_ok(), "seed {seed}");
    }
}

#[test]
fn random_inputs() {
    each_random(anykvm_fuzz::cpu);
}

#[test]
fn random_inputs_translated() {
    each_random(anykvm_fuzz::translated);
}
