//! `cargo xtask boundary`: see the library.

use anykvm_boundary::campaign::{self, Campaign};
use clap::Parser;
use std::process::ExitCode;
use std::time::Instant;

/// Guest programs whose state is moved to a new VM after every few instructions.
#[derive(Parser)]
#[command(name = "cargo xtask boundary", bin_name = "cargo xtask boundary")]
struct Args {
    /// How many moves
    #[arg(long, default_value_t = 100_000)]
    points: u64,
    /// Another seed gives other programs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only programs whose names contain this
    filter: Option<String>,
    /// Stop after so many failures
    #[arg(long, default_value_t = 10)]
    failures: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let start = Instant::now();
    let summary = campaign::run(&Campaign {
        points: args.points,
        seed: args.seed,
        filter: args.filter,
        failures: args.failures,
    });
    let summary = match summary {
        Ok(summary) => summary,
        Err(error) => {
            eprintln!("boundary: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    for failure in &summary.failures {
        println!("{failure}");
    }
    println!(
        "{} programs moved {} times in {:.0} s, {} failures",
        summary.programs,
        summary.points,
        start.elapsed().as_secs_f64(),
        summary.failures.len()
    );
    if summary.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
