//! `cargo xtask bench`: boots against QEMU's TCG, and the cost of an exit.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest::{self, Guest};
use crate::process::{self, Outcome};
use crate::{build, progress};

#[derive(clap::Subcommand)]
pub enum BenchTask {
    /// Boot the same kernel and initramfs in `anykvm boot` and in QEMU's TCG
    Boot {
        /// How often each of them boots; the fastest counts
        #[arg(long, default_value_t = 2)]
        runs: u32,
    },
    /// A program of twelve kinds of work: on the host, and as a guest's in QEMU's TCG, in anykvm's
    /// interpreter and with translation
    Work,
    /// Port I/O exits in a loop under the Rust API
    Exits,
}

pub fn run(task: &BenchTask) -> Result<ExitCode> {
    match task {
        BenchTask::Boot { runs } => boot(*runs),
        BenchTask::Work => crate::work::run(),
        BenchTask::Exits => exits(),
    }
}

pub const LIMIT: Duration = Duration::from_secs(600);
/// What both machines get, so that they do the same work: no serial output to speak of.
const PARAMETERS: &str = "quiet anykvm.task=bench";

fn boot(runs: u32) -> Result<ExitCode> {
    let guest = Guest::prepare()?;
    guest::require_qemu()?;
    let anykvm = build::anykvm()?;

    // Without a paravirtual clock the kernel measures the TSC against the PIT, which under TCG fails
    // for good when the host is busy at that moment: tell it the frequency, which is the host's.
    let tcg_parameters = format!("console=ttyS0 tsc_early_khz={} {PARAMETERS}", host_khz()?);

    let mut software = Vec::new();
    let mut tcg = Vec::new();
    for run in 1..=runs.max(1) {
        progress(&format!("run {run}: anykvm boot"));
        let mut command = Command::new(&anykvm);
        command
            .args(["boot", "--stats", "--mem", "256M"])
            .args(["--append", PARAMETERS])
            .arg("--kernel")
            .arg(&guest.kernel)
            .arg("--initrd")
            .arg(&guest.initramfs);
        software.push(measured(&mut command, "anykvm")?);

        progress(&format!("run {run}: QEMU TCG, machine microvm"));
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", "256"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", "stdio", "-no-reboot"])
            .args(["-append", &tcg_parameters])
            .arg("-kernel")
            .arg(&guest.kernel)
            .arg("-initrd")
            .arg(&guest.initramfs);
        tcg.push(measured(&mut command, "qemu-tcg")?);
    }
    let software = fastest(software);
    let tcg = fastest(tcg);

    println!("{:<12} {:>10} {:>14}", "", "wall", "process time");
    for (name, outcome) in [("anykvm boot", &software), ("QEMU TCG", &tcg)] {
        println!(
            "{name:<12} {:>8.2} s {:>12.2} s",
            outcome.wall.as_secs_f64(),
            outcome.cpu.as_secs_f64()
        );
    }
    println!(
        "{:<12} {:>9.2}x {:>13.2}x   (anykvm / TCG; below 1 is faster)",
        "ratio",
        software.wall.as_secs_f64() / tcg.wall.as_secs_f64(),
        software.cpu.as_secs_f64() / tcg.cpu.as_secs_f64()
    );
    for line in software
        .output
        .lines()
        .filter(|line| line.starts_with("anykvm: "))
    {
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

fn measured(command: &mut Command, name: &str) -> Result<Outcome> {
    let log = log(name);
    let outcome = process::run(command, &log, LIMIT, &["Kernel panic"])
        .with_context(|| format!("{name}, see {}", log.display()))?;
    if !outcome.status.success() || !outcome.output.contains("anykvm-guest: task bench done") {
        bail!("{name} did not boot to the end, see {}", log.display());
    }
    Ok(outcome)
}

/// The host's frequency as /proc/cpuinfo has it.
pub fn host_khz() -> Result<u64> {
    std::fs::read_to_string("/proc/cpuinfo")?
        .lines()
        .filter(|line| line.starts_with("cpu MHz"))
        .find_map(|line| line.split_once(':')?.1.trim().parse::<f64>().ok())
        .map(|mhz| (mhz * 1000.0) as u64)
        .context("/proc/cpuinfo names no frequency")
}

fn fastest(outcomes: Vec<Outcome>) -> Outcome {
    outcomes
        .into_iter()
        .min_by_key(|outcome| outcome.cpu)
        .expect("there was at least one run")
}

pub fn log(name: &str) -> PathBuf {
    build::target().join("bench").join(format!("{name}.log"))
}

fn exits() -> Result<ExitCode> {
    build::release(&["anykvm-benches"])?;
    let status = Command::new(build::target().join("release/exits"))
        .status()
        .context("cannot start the benchmark")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
