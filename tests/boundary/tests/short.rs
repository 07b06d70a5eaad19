//! The short form of `cargo xtask boundary`.

use anykvm_boundary::campaign::{Campaign, run};

#[test]
fn programs_that_move_to_new_vms_run_the_same() {
    let summary = run(&Campaign {
        points: 2000,
        seed: 0,
        filter: None,
        failures: 1,
    });
    let summary = summary.unwrap();
    assert!(
        summary.failures.is_empty(),
        "{}",
        summary.failures.join("\n")
    );
    assert!(summary.points >= 2000);
}
