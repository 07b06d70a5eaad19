//! `cargo xtask demo`: from a fresh clone to a shell in a virtual machine.

use std::io::IsTerminal;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::guest::Guest;
use crate::{build, progress};

#[derive(clap::Args)]
pub struct DemoArgs {
    /// Number of processors of the machine
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// Memory of the machine
    #[arg(long, default_value = "512M")]
    mem: String,
}

pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    let guest = Guest::prepare()?;
    let anykvm = build::anykvm()?;
    let mut command = Command::new(&anykvm);
    command
        .arg("boot")
        .arg("--kernel")
        .arg(&guest.kernel)
        .arg("--initrd")
        .arg(&guest.initramfs)
        .args(["--mem", &args.mem, "--cpus", &args.cpus.to_string()])
        .arg("--stats");
    if std::io::stdin().is_terminal() {
        progress("booting to a shell; 'exit' ends it");
    } else {
        progress("booting; standard input is no terminal, so a script runs in place of the shell");
        command.args(["--append", "anykvm.task=demo"]);
    }
    let status = command
        .status()
        .with_context(|| anykvm.display().to_string())?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        progress(&format!("anykvm boot failed: {status}"));
        ExitCode::FAILURE
    })
}
