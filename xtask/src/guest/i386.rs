//! Debian for 32-bit processors: a kernel and busybox of architecture i386. The system's apt is asked with
//! folders of its own, in the cache, so that the system's package lists and architectures stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result};

use super::{apt, build_initramfs, cache_folder, find_kernel, write_whole};
use crate::progress;

/// A 32-bit kernel and a root filesystem for it.
pub struct Guest32 {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

impl Guest32 {
    /// Prepares what is missing from the cache folder. `metapackage` names the kernel.
    pub fn prepare(metapackage: &str) -> Result<Self> {
        // Tests run side by side, and may want the same packages.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap();
        let folder = cache_folder().join("i386");
        let kernel_tree = folder.join(metapackage);
        let busybox_tree = folder.join("busybox");
        if !kernel_tree.exists() || !busybox_tree.exists() {
            let apt = Apt::new(&folder.join("apt"))?;
            let package = apt.dependency(metapackage)?;
            apt.unpack(&package, &kernel_tree)?;
            apt.unpack("busybox-static", &busybox_tree)?;
        }
        // The host may be unable to run the 32-bit busybox, whose applets are those of the other.
        let lister = cache_folder().join("busybox/bin/busybox");
        let image = build_initramfs(&kernel_tree, &busybox_tree, &lister)?;
        let initramfs = folder.join(format!("{metapackage}.cpio"));
        write_whole(&initramfs, &image)?;
        Ok(Self {
            kernel: find_kernel(&kernel_tree)?,
            initramfs,
        })
    }
}

/// An apt that knows i386 alone.
struct Apt {
    folder: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// With the package lists of the system's sources.
    fn new(folder: &Path) -> Result<Self> {
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            let sub = folder.join(sub);
            fs::create_dir_all(&sub).with_context(|| sub.display().to_string())?;
        }
        let status = folder.join("status");
        fs::write(&status, "").with_context(|| status.display().to_string())?;
        let option = |key: &str, value: &str| ["-o".to_owned(), format!("{key}={value}")];
        let inside = |name: &str| folder.join(name).display().to_string();
        let options = [
            option("APT::Architecture", "i386"),
            option("APT::Architectures", "i386"),
            option("APT::Sandbox::User", "root"),
            option("Acquire::Languages", "none"),
            option("Dir::State", &inside("state")),
            option("Dir::State::status", &inside("status")),
            option("Dir::Cache", &inside("cache")),
        ];
        Ok(Self {
            folder: folder.to_path_buf(),
            options: options.into_iter().flatten().collect(),
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).current_dir(&self.folder);
        command
    }

    /// The kernel that a metapackage depends on.
    fn dependency(&self, metapackage: &str) -> Result<String> {
        apt::require("apt-get", metapackage)?;
        progress("fetching the package lists of Debian for i386");
        // One list of several may be out of step on a mirror; what counts is whether the package is known.
        let updated = apt::run(self.command("apt-get").args(["-qq", "update"]));
        let output = self
            .command("apt-cache")
            .args(["depends", metapackage])
            .output()
            .context("cannot start apt-cache")?;
        let known = String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|package| package.starts_with("linux-image-"))
            .map(str::to_owned);
        match (known, updated) {
            (Some(package), _) => Ok(package),
            (None, Err(error)) => Err(error),
            (None, Ok(())) => anyhow::bail!("Debian for i386 has no package {metapackage}"),
        }
    }

    fn unpack(&self, package: &str, tree: &Path) -> Result<()> {
        if tree.exists() {
            return Ok(());
        }
        apt::unpack_by(&self.options, package, tree)
    }
}
