//! The test guest: Debian's cloud kernel and an initramfs with busybox, the virtio drivers and the
//! scripts of `tests/guest`, prepared once into a cache folder.

mod apt;
mod bzimage;
mod cpio;
pub mod disk;
mod i386;
mod kmod;
mod overlay;
pub mod qcow2;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};

use crate::{progress, workspace};
use cpio::{Archive, Node};
pub use i386::Guest32;
pub use overlay::{Overlay, compile};

/// Drivers that are modules in Debian's kernel and that the tests need.
const DRIVERS: &[&str] = &["virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net"];

const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";

/// The prepared guest.
pub struct Guest {
    /// The kernel as the package has it, a bzImage.
    pub kernel: PathBuf,
    /// Busybox, the drivers and the scripts.
    pub initramfs: PathBuf,
    folder: PathBuf,
}

impl Guest {
    /// Prepares what is missing from the cache folder.
    pub fn prepare() -> Result<Self> {
        let folder = cache_folder();
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;

        let kernel_tree = folder.join("kernel");
        if !kernel_tree.exists() {
            let package = apt::dependency(KERNEL_METAPACKAGE, "linux-image-")?;
            apt::unpack(&package, &kernel_tree)?;
        }
        let busybox_tree = folder.join("busybox");
        if !busybox_tree.exists() {
            apt::unpack("busybox-static", &busybox_tree)?;
        }

        let kernel = find_kernel(&kernel_tree)?;
        let initramfs = folder.join("initramfs.cpio");
        let busybox = busybox_tree.join("bin/busybox");
        let image = build_initramfs(&kernel_tree, &busybox_tree, &busybox)?;
        if fs::read(&initramfs).ok().as_deref() != Some(&image) {
            write_whole(&initramfs, &image)?;
            progress(&format!(
                "wrote {} ({} KiB)",
                initramfs.display(),
                image.len() / 1024
            ));
        }
        Ok(Self {
            kernel,
            initramfs,
            folder,
        })
    }

    /// The kernel as an ELF file, unpacked from the bzImage.
    pub fn vmlinux(&self) -> Result<PathBuf> {
        let path = self.folder.join("vmlinux");
        if !path.exists() {
            let image = fs::read(&self.kernel)?;
            write_whole(&path, &bzimage::unpack(&image)?)?;
        }
        Ok(path)
    }
}

/// Makes sure that QEMU is there.
pub fn require_qemu() -> Result<()> {
    apt::install("qemu-system-x86", "qemu-system-x86_64")
}

/// Makes sure that gdb is there.
pub fn require_gdb() -> Result<()> {
    apt::install("gdb", "gdb")
}

/// Debian packages unpacked into one tree of the cache, which has this name.
pub fn packages(name: &str, packages: &[&str]) -> Result<PathBuf> {
    // Tests run side by side, and may want the same packages.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap();
    let tree = cache_folder().join(name);
    if !tree.exists() {
        apt::unpack_these(packages, &tree)?;
    }
    Ok(tree)
}

/// The part of Debian's kernel source that KVM's own tests are built from.
pub fn selftest_source() -> Result<PathBuf> {
    const PARTS: [&str; 3] = ["tools", "arch/x86/include", "scripts"];
    let folder = cache_folder().join("selftests");
    if folder.exists() {
        return Ok(folder);
    }
    let package = apt::dependency("linux-source", "linux-source-")?;
    let scratch = folder.with_extension(format!("new.{}", std::process::id()));
    apt::unpack(&package, &scratch)?;
    progress("unpacking the kernel's source");
    let tree = scratch.join("tree");
    fs::create_dir_all(&tree).with_context(|| tree.display().to_string())?;
    apt::run(
        Command::new("tar")
            .args(["--strip-components=1", "-xJf"])
            .arg(scratch.join(format!("usr/src/{package}.tar.xz")))
            .arg("-C")
            .arg(&tree)
            .args(PARTS.map(|part| format!("{package}/{part}"))),
    )?;
    fs::rename(&tree, &folder).with_context(|| folder.display().to_string())?;
    fs::remove_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
    Ok(folder)
}

fn cache_folder() -> PathBuf {
    match std::env::var_os("ANYKVM_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => workspace().join("target/guest"),
    }
}

fn find_kernel(tree: &Path) -> Result<PathBuf> {
    let boot = tree.join("boot");
    fs::read_dir(&boot)
        .with_context(|| boot.display().to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
        })
        .with_context(|| format!("no vmlinuz in {}", boot.display()))
}

/// `lister` is a busybox that runs here and has the same applets.
fn build_initramfs(kernel_tree: &Path, busybox_tree: &Path, lister: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/modules",
        "proc",
        "root",
        "sys",
        "tasks",
        "tmp",
    ] {
        archive.add(folder, &Node::Directory);
    }
    // The kernel opens the console for the first process before anything is mounted.
    archive.add("dev/console", &Node::CharDevice { major: 5, minor: 1 });

    let busybox = busybox_tree.join("bin/busybox");
    add_file(&mut archive, "bin/busybox", 0o755, &busybox)?;
    archive.add("sbin", &Node::Symlink("bin"));
    for applet in applets(lister)? {
        if applet != "busybox" {
            archive.add(&format!("bin/{applet}"), &Node::Symlink("busybox"));
        }
    }

    let modules =
        kmod::Modules::find(&only_folder(&kernel_tree.join("lib/modules"))?.join("kernel"))?;
    let mut order = String::new();
    for module in modules.in_load_order(DRIVERS)? {
        let file = format!("{}.ko", module.name);
        add_file(
            &mut archive,
            &format!("lib/modules/{file}"),
            0o644,
            &module.path,
        )?;
        order.push_str(&file);
        order.push('\n');
    }
    archive.add(
        "lib/modules/order",
        &Node::File {
            mode: 0o644,
            data: order.as_bytes(),
        },
    );

    let scripts = workspace().join("tests/guest");
    add_file(&mut archive, "init", 0o755, &scripts.join("init"))?;
    let tasks = scripts.join("tasks");
    let mut names: Vec<_> = fs::read_dir(&tasks)
        .with_context(|| tasks.display().to_string())?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    for name in names {
        add_file(
            &mut archive,
            &format!("tasks/{name}"),
            0o644,
            &tasks.join(&name),
        )?;
    }
    Ok(archive.finish())
}

fn add_file(archive: &mut Archive, name: &str, mode: u32, path: &Path) -> Result<()> {
    let data = fs::read(path).with_context(|| path.display().to_string())?;
    archive.add(name, &Node::File { mode, data: &data });
    Ok(())
}

/// The names busybox answers to.
fn applets(busybox: &Path) -> Result<Vec<String>> {
    let output = Command::new(busybox)
        .arg("--list")
        .output()
        .with_context(|| busybox.display().to_string())?;
    if !output.status.success() {
        bail!("{} --list failed: {}", busybox.display(), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(str::to_owned)
        .collect())
}

fn only_folder(parent: &Path) -> Result<PathBuf> {
    fs::read_dir(parent)
        .with_context(|| parent.display().to_string())?
        .next()
        .with_context(|| format!("{} is empty", parent.display()))?
        .map(|entry| entry.path())
        .with_context(|| parent.display().to_string())
}

/// Writes a file so that it appears complete or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let scratch = path.with_extension(format!("new.{}", std::process::id()));
    fs::write(&scratch, bytes)
        .and_then(|()| fs::rename(&scratch, path))
        .with_context(|| path.display().to_string())
}
