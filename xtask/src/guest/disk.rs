//! A disk that a PC's BIOS boots: GRUB in its first sectors, as grub-install would put it there, and an ext2
//! filesystem with the guest. Made without privileges: the programs come from unpacked packages, and mke2fs
//! fills the filesystem itself.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::{Guest, apt, packages};

/// The programs and the libraries that a small system may lack.
const PACKAGES: &[&str] = &[
    "grub-pc-bin",
    "grub-common",
    "libdevmapper1.02.1",
    "e2fsprogs",
    "libext2fs2",
    "libcom-err2",
];
/// What core.img has in it; everything else GRUB would load from the filesystem.
const MODULES: &[&str] = &[
    "biosdisk",
    "part_msdos",
    "ext2",
    "normal",
    "serial",
    "terminal",
    "linux",
    "echo",
];
const SECTOR: u64 = 512;
/// The partition begins at 1 MiB; core.img lies between the first sector and it.
const PARTITION: u64 = 2048;
const PARTITION_SIZE: u64 = 63 << 11;
/// Of boot.img, what belongs into the first sector: what follows is the partition table.
const BOOT_CODE: usize = 440;

/// Writes the disk. GRUB starts the guest's kernel with these parameters.
pub fn with_grub(guest: &Guest, path: &Path, parameters: &str) -> Result<()> {
    let tools = packages("grub", PACKAGES)?;
    let scratch = path.with_extension("files");
    let grub = scratch.join("boot/grub");
    fs::create_dir_all(&grub).with_context(|| grub.display().to_string())?;
    fs::copy(&guest.kernel, scratch.join("boot/vmlinuz"))?;
    fs::copy(&guest.initramfs, scratch.join("boot/initramfs"))?;
    fs::write(grub.join("grub.cfg"), configuration(parameters))?;

    let disk = File::create(path).with_context(|| path.display().to_string())?;
    disk.set_len((PARTITION + PARTITION_SIZE) * SECTOR)?;
    filesystem(&tools, &scratch, path)?;
    let core = path.with_extension("core");
    let modules = modules(&tools);
    apt::run(
        tool(&tools, "usr/bin/grub-mkimage")
            .args(["-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-d"])
            .arg(&modules)
            .arg("-o")
            .arg(&core)
            .args(MODULES),
    )?;
    write_boot_sectors(
        &disk,
        &fs::read(modules.join("boot.img"))?,
        &fs::read(&core)?,
    )?;
    fs::remove_file(&core)?;
    fs::remove_dir_all(&scratch).with_context(|| scratch.display().to_string())
}

fn modules(tools: &Path) -> PathBuf {
    tools.join("usr/lib/grub/i386-pc")
}

/// A program of the unpacked packages.
fn tool(tools: &Path, program: &str) -> Command {
    let libraries = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"]
        .map(|folder| tools.join(folder).display().to_string());
    let mut command = Command::new(tools.join(program));
    command.env("LD_LIBRARY_PATH", libraries.join(":"));
    command
}

/// The menu is on the serial line, and its only entry starts by itself.
fn configuration(parameters: &str) -> String {
    format!(
        "serial --unit=0 --speed=115200\n\
         terminal_input serial\n\
         terminal_output serial\n\
         set timeout=2\n\
         menuentry 'Debian by GRUB' {{\n\
         linux /boot/vmlinuz {parameters}\n\
         initrd /boot/initramfs\n\
         }}\n"
    )
}

fn filesystem(tools: &Path, files: &Path, disk: &Path) -> Result<()> {
    apt::run(
        tool(tools, "sbin/mke2fs")
            .args(["-q", "-F", "-t", "ext2"])
            .args(["-E", &format!("offset={}", PARTITION * SECTOR), "-d"])
            .arg(files)
            .arg(disk)
            .arg(format!("{}k", PARTITION_SIZE * SECTOR / 1024)),
    )
}

/// boot.img loads the sector behind itself, and that one, the first of core.img, the rest, which follows it:
/// so say the block lists that both come with.
fn write_boot_sectors(disk: &File, boot: &[u8], core: &[u8]) -> Result<()> {
    ensure!(boot.len() as u64 == SECTOR, "boot.img is not one sector");
    if core.len() as u64 > (PARTITION - 1) * SECTOR {
        bail!("core.img does not fit before the partition");
    }
    disk.write_all_at(&boot[..BOOT_CODE], 0)?;
    disk.write_all_at(core, SECTOR)?;
    // Active, type Linux; the CHS addresses are those of what CHS cannot say.
    let mut entry = [0x80, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff].to_vec();
    entry.extend((PARTITION as u32).to_le_bytes());
    entry.extend((PARTITION_SIZE as u32).to_le_bytes());
    disk.write_all_at(&entry, 446)?;
    disk.write_all_at(&[0x55, 0xaa], 510)?;
    Ok(())
}
