//! `cargo xtask boundary`: see the library.

use anyhow::{Result, ensure};
use anykvm::{Kvm, TranslationMode};
use anykvm_boundary::boot::{self, Boot};
use anykvm_boundary::campaign::{self, Campaign};
use anykvm_differential::random::Random;
use clap::Parser;
use std::path::PathBuf;
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
    /// Only programs whose names contain this; "boot" is a boot of Linux
    filter: Option<String>,
    /// The kernel that boots; without one there is no boot
    #[arg(long, requires = "initrd")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// How often the boot moves
    #[arg(long, default_value_t = 2000)]
    boot_moves: u64,
    /// The boot that does not move is translated, too
    #[arg(long)]
    boot_translated: bool,
    /// Stop after so many failures
    #[arg(long, default_value_t = 10)]
    failures: u64,
}

/// Boots Linux, interpreted in one piece and translated with moves.
fn boot(args: &Args, kernel: PathBuf, initrd: PathBuf) -> Result<()> {
    let kvm = Kvm::new()?;
    let start = Instant::now();
    let boot = Boot {
        kernel,
        initrd,
        parameters: "console=ttyS0 reboot=k pci=off anykvm.task=check".to_owned(),
    };
    let engine = if args.boot_translated {
        TranslationMode::On
    } else {
        TranslationMode::Off
    };
    let whole = boot::undisturbed(&kvm, &boot, engine)?;
    let console = String::from_utf8_lossy(&whole.console);
    ensure!(console.contains("task check done"), "{console}");
    println!(
        "boot: {} instructions in {:.0} s without moves",
        whole.instructions,
        start.elapsed().as_secs_f64()
    );
    let start = Instant::now();
    let mut random = Random::new(args.seed, 2);
    let engine = TranslationMode::On;
    let moves = boot::moved(&kvm, &boot, engine, args.boot_moves, &mut random, &whole)?;
    println!(
        "boot: moved {moves} times in {:.0} s, all the same",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let (Some(kernel), Some(initrd)) = (args.kernel.clone(), args.initrd.clone())
        && args
            .filter
            .as_ref()
            .is_none_or(|f| "boot".contains(f.as_str()))
    {
        if let Err(error) = boot(&args, kernel, initrd) {
            println!("boot: {error:#}");
            return ExitCode::FAILURE;
        }
        if args.filter.is_some() {
            return ExitCode::SUCCESS;
        }
    }
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
