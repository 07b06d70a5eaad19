//! `cargo xtask kvm-ioctls`: the unit and doc tests of the crate kvm-ioctls, as it is published, under
//! `anykvm run`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::{build, process, progress};

const LIMIT: Duration = Duration::from_secs(900);

/// Tests that fail, and what is missing.
const NOT_YET: &[(&str, &str)] = &[];

pub fn run() -> Result<ExitCode> {
    let anykvm = build::anykvm()?;
    let failed = test(&anykvm)?;
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The same as one of the tests: an error with the names of those that fail.
pub fn check(anykvm: &Path) -> Result<()> {
    let failed = test(anykvm)?;
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// Prints what fails; returns the names of those that are not known to.
fn test(anykvm: &Path) -> Result<Vec<String>> {
    let source = source()?;
    let mut command = cargo(&source);
    command
        .args(["test", "--no-fail-fast", "--target-dir"])
        .arg(source.join("target"))
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER",
            format!("{} run --backend soft --", anykvm.display()),
        );
    let log = build::target().join("e2e/kvm-ioctls.log");
    let outcome = process::run(&mut command, &log, LIMIT, &[])?;
    let mut failed = Vec::new();
    let mut passed = 0;
    for line in outcome.output.lines() {
        let Some(line) = line.strip_prefix("test ") else {
            continue;
        };
        if line.ends_with("... ok") {
            passed += 1;
        } else if let Some(name) = line.strip_suffix(" ... FAILED") {
            match NOT_YET.iter().find(|(part, _)| name.contains(part)) {
                Some((_, missing)) => println!("fail  {name}: not there yet: {missing}"),
                None => {
                    println!("FAIL  {name}");
                    failed.push(name.to_owned());
                }
            }
        }
    }
    println!("{passed} passed, {} failed unexpectedly", failed.len());
    if passed == 0 {
        bail!("no test has run; {}", log.display());
    }
    Ok(failed)
}

/// Cargo for a package that has nothing to do with this workspace.
fn cargo(folder: &Path) -> Command {
    let mut command = build::cargo();
    command.current_dir(folder);
    command
}

/// The newest published version, unpacked: cargo downloads it as the dependency of an empty package.
fn source() -> Result<PathBuf> {
    let folder = build::target().join("kvm-ioctls");
    let crate_folder = folder.join("vendor/kvm-ioctls");
    if crate_folder.join("Cargo.toml").exists() {
        return Ok(crate_folder);
    }
    progress("downloading the crate kvm-ioctls");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    fs::write(
        folder.join("Cargo.toml"),
        "[package]\nname = \"empty\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\
         [lib]\npath = \"lib.rs\"\n[dependencies]\nkvm-ioctls = \"*\"\n[workspace]\n",
    )?;
    fs::write(folder.join("lib.rs"), "")?;
    let status = cargo(&folder)
        .args(["vendor", "--quiet", "vendor"])
        .stdout(std::process::Stdio::null())
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "cargo vendor failed");
    // Not a member of the workspace that it lies in.
    let manifest = crate_folder.join("Cargo.toml");
    let text = fs::read_to_string(&manifest).with_context(|| manifest.display().to_string())?;
    fs::write(&manifest, text + "\n[workspace]\n")?;
    Ok(crate_folder)
}
