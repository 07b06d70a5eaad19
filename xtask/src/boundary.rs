//! `cargo xtask boundary`: guest programs that move to a new VM after every few instructions.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::{build, workspace};

#[derive(clap::Args)]
pub struct BoundaryArgs {
    /// --points N, --seed S, FAMILY; --help explains
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub fn run(args: &BoundaryArgs) -> Result<ExitCode> {
    build::release(&["anykvm-boundary"])?;
    let status = Command::new(build::target().join("release/anykvm-boundary"))
        .current_dir(workspace())
        .args(&args.arguments)
        .status()
        .context("cannot start the programs")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
