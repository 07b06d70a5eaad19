//! `cargo xtask boundary`: guest programs, and a boot of Linux, that move to a new VM after every few
//! instructions.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::guest::Guest;
use crate::{build, workspace};

#[derive(clap::Args)]
pub struct BoundaryArgs {
    /// --points N, --seed S, --boot-moves N, FAMILY; --help explains
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub fn run(args: &BoundaryArgs) -> Result<ExitCode> {
    let status = command(&Guest::prepare()?)?
        .args(&args.arguments)
        .status()
        .context("cannot start the programs")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The program, built, with the kernel that it boots.
pub fn command(guest: &Guest) -> Result<Command> {
    build::release(&["anykvm-boundary"])?;
    let mut command = Command::new(build::target().join("release/anykvm-boundary"));
    command
        .current_dir(workspace())
        .arg("--kernel")
        .arg(guest.vmlinux()?)
        .arg("--initrd")
        .arg(&guest.initramfs);
    Ok(command)
}
