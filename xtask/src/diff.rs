//! `cargo xtask diff`: random instructions on the host's processor, interpreted and translated.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::{build, workspace};

#[derive(clap::Args)]
pub struct DiffArgs {
    /// --cases N, --seed S, --only NAME, --bits 64|32, --replay FILE, --coverage; --help explains
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub fn run(args: &DiffArgs) -> Result<ExitCode> {
    let status = command()?
        .args(&args.arguments)
        .status()
        .context("cannot start the comparison")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The program, built in release mode.
pub fn command() -> Result<Command> {
    build::release(&["anykvm-differential"])?;
    let mut command = Command::new(build::target().join("release/anykvm-differential"));
    command.current_dir(workspace());
    Ok(command)
}
