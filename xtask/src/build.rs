//! Builds the programs that are demonstrated, tested and measured.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::{progress, workspace};

/// Builds the `anykvm` command and the shim library in release mode; the path of the command.
pub fn anykvm() -> Result<PathBuf> {
    release(&["anykvm-cli", "anykvm-preload"])?;
    Ok(target().join("release/anykvm"))
}

/// Builds these packages in release mode. Cargo's own progress is shown.
pub fn release(packages: &[&str]) -> Result<()> {
    progress(&format!("building {} (release)", packages.join(", ")));
    let mut command = cargo();
    command.args(["build", "--release"]);
    for package in packages {
        command.args(["--package", package]);
    }
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the build failed");
    }
    Ok(())
}

/// Builds the monitor of `tests/monitor`; the path of the command.
pub fn monitor() -> Result<PathBuf> {
    let status = cargo()
        .args(["build", "--quiet", "--package", "anykvm-monitor"])
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the build failed");
    }
    Ok(target().join("debug/monitor"))
}

/// Has the test of the pages that are made from the code write them.
pub fn docs() -> Result<ExitCode> {
    written_by_a_test(
        &["--package", "anykvm", "--lib", "_page"],
        "ANYKVM_WRITE_DOCS",
    )
}

/// Has the test of the listings of translated code write them.
pub fn golden() -> Result<ExitCode> {
    written_by_a_test(
        &["--package", "anykvm-jit", "--test", "golden"],
        "ANYKVM_WRITE_GOLDEN",
    )
}

/// Runs a test that writes the files it otherwise compares when a variable is set.
fn written_by_a_test(which: &[&str], variable: &str) -> Result<ExitCode> {
    let status = cargo()
        .args(["test", "--quiet"])
        .args(which)
        .env(variable, "1")
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the files were not written");
    }
    Ok(ExitCode::SUCCESS)
}

/// The cargo that runs us, in the source tree.
pub fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(workspace());
    command
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}
