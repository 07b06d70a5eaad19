//! `cargo xtask crates` and `kvm-ioctls`: tests of published crates that use `/dev/kvm`, as they are published, under `anykvm run`:
//! kvm-ioctls, and parts of the monitors Dragonball and libkrun, which come from Firecracker.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::{build, process, progress};

const LIMIT: Duration = Duration::from_secs(900);

/// The crate whose tests are among those of `cargo xtask test`.
const SHORT: &str = "kvm-ioctls";

/// Crates, and what cargo is told to test all that they have.
const CRATES: &[(&str, &[&str])] = &[
    (SHORT, &[]),
    ("dbs-arch", &["--lib"]),
    ("dbs-interrupt", &["--lib", "--all-features"]),
    ("msb_krun_arch", &["--lib"]),
    ("msb_krun_vmm", &["--lib"]),
];

/// Tests that fail, and what is missing.
const NOT_YET: &[(&str, &str)] = &[];

#[derive(clap::Args)]
pub struct CrateArgs {
    /// Only crates whose names contain one of these
    filters: Vec<String>,
}

/// `cargo xtask kvm-ioctls`.
pub fn run_short() -> Result<ExitCode> {
    run(&CrateArgs {
        filters: vec![SHORT.to_owned()],
    })
}

pub fn run(args: &CrateArgs) -> Result<ExitCode> {
    let anykvm = build::anykvm()?;
    let wanted = |name: &str| {
        args.filters.is_empty() || args.filters.iter().any(|filter| name.contains(filter))
    };
    let mut failed = Vec::new();
    for (name, options) in CRATES.iter().filter(|(name, _)| wanted(name)) {
        println!("{name}");
        failed.extend(test(&anykvm, name, options)?);
    }
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One of the tests: an error with the names of those that fail.
pub fn check(anykvm: &Path) -> Result<()> {
    let failed = test(anykvm, SHORT, &[])?;
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// Prints what fails; returns the names of those that are not known to.
fn test(anykvm: &Path, name: &str, options: &[&str]) -> Result<Vec<String>> {
    let source = source(name)?;
    let mut command = cargo(&source);
    command
        .args(["test", "--no-fail-fast", "--target-dir"])
        .arg(source.join("target"))
        .args(options)
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER",
            format!("{} run --backend soft --", anykvm.display()),
        );
    let log = build::target().join(format!("e2e/{name}.log"));
    let outcome = process::run(&mut command, &log, LIMIT, &[])?;
    let mut failed = Vec::new();
    let (mut passed, mut known) = (0, 0);
    for line in outcome.output.lines() {
        let Some(line) = line.strip_prefix("test ") else {
            continue;
        };
        if line.ends_with("... ok") {
            passed += 1;
        } else if let Some(name) = line.strip_suffix(" ... FAILED") {
            match NOT_YET.iter().find(|(part, _)| name.contains(part)) {
                Some((_, missing)) => {
                    known += 1;
                    println!("fail  {name}: not there yet: {missing}");
                }
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
    if !outcome.status.success() && failed.is_empty() && known == 0 {
        bail!("a test program did not come to its end; {}", log.display());
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
fn source(name: &str) -> Result<PathBuf> {
    let folder = build::target().join(name);
    let crate_folder = folder.join("vendor").join(name);
    if crate_folder.join("Cargo.toml").exists() {
        return Ok(crate_folder);
    }
    progress(&format!("downloading the crate {name}"));
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    fs::write(
        folder.join("Cargo.toml"),
        format!(
            "[package]\nname = \"empty\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\
             [lib]\npath = \"lib.rs\"\n[dependencies]\n{name} = \"*\"\n[workspace]\n"
        ),
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
