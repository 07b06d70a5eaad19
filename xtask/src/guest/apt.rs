//! Debian packages, by the ordinary client. Downloading and unpacking needs no privileges, so only QEMU,
//! which has many dependencies, is ever installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::progress;

/// Unpacks `package` into `folder`, downloading it first. `folder` appears complete or not at all.
pub fn unpack(package: &str, folder: &Path) -> Result<()> {
    unpack_all(&[], &[package.to_owned()], folder)
}

/// The same with several packages, in one tree, and nothing that they depend on.
pub fn unpack_these(packages: &[&str], folder: &Path) -> Result<()> {
    let packages: Vec<_> = packages.iter().map(|&name| name.to_owned()).collect();
    unpack_all(&[], &packages, folder)
}

/// The same by an apt with these options.
pub fn unpack_by(options: &[String], package: &str, folder: &Path) -> Result<()> {
    unpack_all(options, &[package.to_owned()], folder)
}

/// The same with several packages and all that they depend on, in one tree.
pub fn unpack_with_dependencies(packages: &[&str], folder: &Path) -> Result<()> {
    unpack_all(&[], &closure(packages)?, folder)
}

fn unpack_all(options: &[String], packages: &[String], folder: &Path) -> Result<()> {
    let scratch = folder.with_extension(format!("new.{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
    let tree = scratch.join("tree");
    for deb in download(options, packages, &scratch)? {
        run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
    }
    if let Err(error) = fs::rename(&tree, folder)
        && !folder.exists()
    {
        return Err(error).with_context(|| folder.display().to_string());
    }
    fs::remove_dir_all(&scratch).with_context(|| scratch.display().to_string())
}

fn download(options: &[String], packages: &[String], folder: &Path) -> Result<Vec<PathBuf>> {
    let what = packages.join(" ");
    require("apt-get", &what)?;
    require("dpkg-deb", &what)?;
    match packages {
        [package] => progress(&format!("downloading the Debian package {package}")),
        _ => progress(&format!("downloading {} Debian packages", packages.len())),
    }
    let fetch = || {
        run(Command::new("apt-get")
            .args(["-qq", "-o", "APT::Sandbox::User=root"])
            .args(options)
            .arg("download")
            .args(packages)
            .current_dir(folder))
    };
    if fetch().is_err() {
        let failed = || format!("cannot download from Debian: {what}");
        update().with_context(failed)?;
        fetch().with_context(failed)?;
    }
    let debs: Vec<_> = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    if debs.len() != packages.len() {
        bail!("apt-get downloaded {} files for {what}", debs.len());
    }
    Ok(debs)
}

/// The packages and all that they depend on, each once.
fn closure(packages: &[&str]) -> Result<Vec<String>> {
    require("apt-cache", &packages.join(" "))?;
    let look = || -> Result<Vec<String>> {
        let output = Command::new("apt-cache")
            .args(["depends", "--recurse", "--no-recommends", "--no-suggests"])
            .args(["--no-conflicts", "--no-breaks", "--no-replaces"])
            .arg("--no-enhances")
            .args(packages)
            .stderr(Stdio::null())
            .output()
            .context("apt-cache")?;
        // A package begins its line; what it needs stands indented below, virtual packages in <>.
        Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter(|line| line.starts_with(|first: char| first.is_ascii_alphanumeric()))
            .map(str::to_owned)
            .collect())
    };
    let known = |found: &[String]| packages.iter().all(|name| found.iter().any(|f| f == name));
    let mut found = look()?;
    if !known(&found) {
        update()?;
        found = look()?;
    }
    if !known(&found) {
        bail!("apt does not know all of {}", packages.join(" "));
    }
    Ok(found)
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

pub fn require(program: &str, package: &str) -> Result<()> {
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
pub fn run(command: &mut Command) -> Result<()> {
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
