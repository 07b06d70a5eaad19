//! A fixed number of random sequences of ioctls: the short form of `cargo xtask fuzz ioctls`. With
//! `ANYKVM_FUZZ_SECONDS` as many as there is time for, from another seed each run.

mod random;

use random::Random;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

const INPUTS: u64 = 250;
/// An input that takes longer counts as one that never ends.
const LIMIT: Duration = Duration::from_secs(60);

/// Ends the process when the input at work does not end.
fn watch(at_work: Arc<AtomicU64>) {
    std::thread::spawn(move || {
        loop {
            let seed = at_work.load(Relaxed);
            std::thread::sleep(LIMIT);
            if seed != 0 && at_work.load(Relaxed) == seed {
                eprintln!("does not end; again: ANYKVM_FUZZ_SEED={seed}");
                std::process::abort();
            }
        }
    });
}

/// The input of a seed.
fn input(seed: u64) -> Vec<u8> {
    let mut random = Random(seed | 1);
    (0..512).flat_map(|_| random.next().to_le_bytes()).collect()
}

#[test]
fn random_inputs() {
    let from_environment = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    if let Some(seed) = from_environment("ANYKVM_FUZZ_SEED") {
        return anykvm_fuzz::ioctls(&input(seed));
    }
    let seconds = from_environment("ANYKVM_FUZZ_SECONDS");
    let first = match seconds {
        Some(_) => SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |t| t.as_nanos() as u64),
        None => 0x5eed,
    };
    let end = seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let mut count = 0;
    let mut random = Random(first | 1);
    let at_work = Arc::new(AtomicU64::new(0));
    watch(at_work.clone());
    while end.map_or(count < INPUTS, |end| Instant::now() < end) {
        let seed = random.next();
        at_work.store(seed, Relaxed);
        let data = input(seed);
        let result = std::panic::catch_unwind(|| anykvm_fuzz::ioctls(&data));
        assert!(result.is_ok(), "again: ANYKVM_FUZZ_SEED={seed}");
        count += 1;
    }
    at_work.store(0, Relaxed);
    println!("{count} inputs");
}
