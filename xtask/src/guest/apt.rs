//! Debian packages, by the ordinary client. Downloading and unpacking needs no privileges, so only QEMU,
//! which has many dependencies, is ever installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::progress;

/// Unpacks `package` into `folder`, downloading it first. `folder` appears complete or not at all.
pub fn unpack(package: &str, folder: &Path) -> Result<()> {
    let scratch = folder.with_extension(format!("new.{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
    let deb = download(package, &scratch)?;
    let tree = scratch.join("tree");
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
    if let Err(error) = fs::rename(&tree, folder)
        && !folder.exists()
    {
        return Err(error).with_context(|| folder.display().to_string());
    }
    fs::remove_dir_all(&scratch).with_context(|| scratch.display().to_string())
}

fn download(package: &str, folder: &Path) -> Result<PathBuf> {
    require("apt-get", package)?;
    require("dpkg-deb", package)?;
    progress(&format!("downloading the Debian package {package}"));
    let fetch = || {
        run(Command::new("apt-get")
            .args(["-qq", "-o", "APT::Sandbox::User=root", "download", package])
            .current_dir(folder))
    };
    if fetch().is_err() {
        update().with_context(|| format!("cannot download the Debian package {package}"))?;
        fetch().with_context(|| format!("cannot download the Debian package {package}"))?;
    }
    fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get downloaded nothing for {package}"))
}

/// The package that the metapackage `name` depends on and whose name starts with `prefix`.
pub fn dependency(name: &str, prefix: &str) -> Result<String> {
    require("apt-cache", name)?;
    let look = || -> Result<Option<String>> {
        let output = Command::new("apt-cache")
            .args(["depends", name])
            .stderr(Stdio::null())
            .output()
            .context("apt-cache")?;
        Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|package| package.starts_with(prefix))
            .map(str::to_owned))
    };
    if let Some(package) = look()? {
        return Ok(package);
    }
    update()?;
    look()?.with_context(|| format!("apt knows no package {name}"))
}

/// Makes sure that `program` is on the PATH, installing `package` where that is possible.
pub fn install(package: &str, program: &str) -> Result<()> {
    if on_path(program) {
        return Ok(());
    }
    if !on_path("apt-get") || !is_root() {
        bail!(
            "{program} is missing and cannot be installed from here (apt-get as root is needed): \
             install your distribution's package with it (Debian: {package}) and try again"
        );
    }
    progress(&format!("installing the Debian package {package}"));
    let install = || {
        run(Command::new("apt-get")
            .args(["-qq", "-y", "--no-install-recommends", "install", package])
            .env("DEBIAN_FRONTEND", "noninteractive"))
    };
    if install().is_err() {
        update()?;
        install().with_context(|| format!("cannot install the Debian package {package}"))?;
    }
    Ok(())
}

fn update() -> Result<()> {
    if !is_root() {
        bail!("apt's package lists are missing or old: run 'apt-get update' as root and try again");
    }
    progress("updating apt's package lists");
    run(Command::new("apt-get").args(["-qq", "update"]))
}

fn require(program: &str, package: &str) -> Result<()> {
    if on_path(program) {
        return Ok(());
    }
    bail!(
        "{program} is missing: the test guest is made from Debian's packages, and {package} can only be \
         fetched on Debian or a system derived from it. Elsewhere, put the unpacked packages into the \
         cache folder (ANYKVM_CACHE) as README.md says"
    )
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    })
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// Runs a command quietly; its output becomes the error when it fails.
fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{:?} failed ({}): {}",
            command.get_program(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
