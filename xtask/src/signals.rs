//! `cargo xtask signals`: a million kicks of vCPU threads, under `anykvm run` and through the library.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{build, process, progress, workspace};

#[derive(clap::Args)]
pub struct SignalArgs {
    /// How many kicks, divided among all ways to kick and all loops
    #[arg(long, default_value_t = 1_000_000)]
    kicks: u64,
}

const LIMIT: Duration = Duration::from_secs(3600);

pub fn run(args: &SignalArgs) -> Result<ExitCode> {
    let anykvm = build::anykvm()?;
    let folder = build::target().join("e2e");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let program = folder.join("signal_stress");
    let compiler = Command::new("cc")
        .args(["-O1", "-Wall", "-Werror", "-D_GNU_SOURCE", "-pthread"])
        .arg(workspace().join("crates/preload/tests/programs/signal_stress.c"))
        .arg("-o")
        .arg(&program)
        .status()
        .context("cannot start cc")?;
    ensure!(compiler.success(), "the test program does not compile");

    progress(&format!("{} kicks under anykvm run", args.kicks));
    let mut command = Command::new(&anykvm);
    command
        .args(["run", "--backend", "soft", "--"])
        .arg(&program)
        .arg(args.kicks.to_string());
    let outcome = process::run(&mut command, &folder.join("signals.log"), LIMIT, &[])?;
    print!("{}", outcome.output);
    ensure!(outcome.status.success(), "kicks under anykvm run failed");

    progress(&format!("{} kicks through the library", args.kicks));
    let mut command = build::cargo();
    command
        .args(["test", "--quiet", "--package", "anykvm", "--test", "guest"])
        .arg("kicks")
        .env("ANYKVM_KICKS", args.kicks.to_string());
    let log = folder.join("signals-library.log");
    let outcome = process::run(&mut command, &log, LIMIT, &[])?;
    print!("{}", outcome.output);
    ensure!(outcome.status.success(), "kicks through the library failed");
    Ok(ExitCode::SUCCESS)
}
