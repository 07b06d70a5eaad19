//! What runs before an operating system, or instead of one: OVMF, GRUB, memtest86+, as Debian has them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::console::{Console, require_sound};
use super::qemu::{self, Irqchip};
use super::{Bench, Needs, Test};
use crate::guest::{self, disk};
use crate::process::Typed;

/// Most of them take half a minute and memtest86+ three, on a machine with nothing else to do.
const LIMIT: Duration = Duration::from_secs(20 * 60);
/// Standard input and output as the serial console alone; no network card, and a reset ends the run.
const SERIAL: &[&str] = &[
    "-serial",
    "stdio",
    "-monitor",
    "none",
    "-nic",
    "none",
    "-no-reboot",
];

pub fn tests() -> Vec<Test> {
    vec![
        test("memtest-64", |b, t| memtest(b, t, "memtest86+x64.bin")),
        test("memtest-32", |b, t| memtest(b, t, "memtest86+ia32.bin")),
        test("ovmf-smm-shell", ovmf_shell),
        test("ovmf-linux", ovmf_linux),
        test("grub-linux", grub_linux),
    ]
}

fn test(name: &str, body: fn(&Bench, &Test) -> Result<()>) -> Test {
    Test {
        name: name.to_owned(),
        cpus: 1,
        limit: LIMIT,
        needs: Needs::Qemu,
        body: Box::new(body),
    }
}

/// A q35 with OVMF in its two flash chips: the code, read-only, and a copy of the variables, which is the
/// second result. The width of physical addresses is limited because this OVMF maps all of them, with 2 MiB
/// pages: with 48 bits that takes more memory than the machine has, under any accelerator.
fn ovmf(bench: &Bench, test: &Test, code: &str) -> Result<(Command, Variables)> {
    let folder = guest::packages("ovmf", &["ovmf"])?.join("usr/share/OVMF");
    let variables = Variables {
        template: folder.join("OVMF_VARS_4M.fd"),
        copy: bench.file(test, "fd"),
    };
    fs::copy(&variables.template, &variables.copy)
        .with_context(|| variables.template.display().to_string())?;
    let mut command = qemu::machine_of_model(bench, "q35,smm=on", "host,host-phys-bits-limit=40");
    let flash = |unit, options: &str, file: &Path| {
        let file = file.display();
        format!("if=pflash,format=raw,unit={unit}{options},file={file}")
    };
    command
        .args(["-accel", "kvm", "-m", "256"])
        .args(["-drive", &flash(0, ",readonly=on", &folder.join(code))])
        .args(["-drive", &flash(1, "", &variables.copy)])
        .args(SERIAL);
    Ok((command, variables))
}

/// The flash chip with the firmware's variables.
struct Variables {
    template: PathBuf,
    copy: PathBuf,
}

impl Variables {
    /// Fails unless the firmware has written variables of its own.
    fn require_written(self) -> Result<()> {
        ensure!(
            fs::read(&self.template)? != fs::read(&self.copy)?,
            "the firmware has written no variables"
        );
        fs::remove_file(&self.copy).with_context(|| self.copy.display().to_string())
    }
}

/// The build with secure boot, which runs its variable service in system management mode: the flash chip
/// takes writes from there alone. Commands are typed at the shell, and what it makes of them is looked at.
fn ovmf_shell(bench: &Bench, test: &Test) -> Result<()> {
    const PROMPT: &str = "Shell> ";
    let (mut command, variables) = ovmf(bench, test, "OVMF_CODE_4M.secboot.fd")?;
    command.args([
        "-global",
        "driver=cfi.pflash01,property=secure,value=on",
        "-global",
        "ICH9-LPC.disable_s3=1",
    ]);
    let typed = [
        Typed::once(PROMPT, "set -v part firm\r"),
        Typed::once(PROMPT, "echo %part%ware\r"),
        Typed::once(PROMPT, "ver\r"),
        Typed::once(PROMPT, "reset -s\r"),
    ];
    let outcome = qemu::converse(bench, test, &mut command, &typed)?;
    for words in ["UEFI Interactive Shell v2.", "firmware", "UEFI v2."] {
        if !outcome.output.contains(words) {
            bail!("the shell did not say '{words}'");
        }
    }
    variables.require_written()
}

/// The shell's start-up script starts Debian's kernel, which is an EFI program, from a FAT filesystem.
fn ovmf_linux(bench: &Bench, test: &Test) -> Result<()> {
    let (mut command, variables) = ovmf(bench, test, "OVMF_CODE_4M.fd")?;
    let files = bench.file(test, "files");
    fs::create_dir_all(&files).with_context(|| files.display().to_string())?;
    fs::copy(&bench.guest().kernel, files.join("vmlinuz.efi"))?;
    fs::copy(&bench.guest().initramfs, files.join("initramfs"))?;
    fs::write(
        files.join("startup.nsh"),
        "fs0:\r\nvmlinuz.efi initrd=\\initramfs console=ttyS0 anykvm.task=check\r\n",
    )?;
    let drive = format!(
        "if=none,id=files,format=raw,readonly=on,file=fat:{}",
        files.display()
    );
    command
        .args(["-drive", &drive])
        .args(["-device", "virtio-blk-pci,drive=files"]);
    let outcome = qemu::run(bench, test, &mut command)?;
    require_sound(&Console(&outcome.output), test.cpus)?;
    if !outcome.output.contains("efi: EFI v2.") {
        bail!("the kernel was not started by EFI");
    }
    variables.require_written()?;
    fs::remove_dir_all(&files).with_context(|| files.display().to_string())
}

/// SeaBIOS, GRUB from the first sectors of an IDE disk, and the kernel from its filesystem.
fn grub_linux(bench: &Bench, test: &Test) -> Result<()> {
    let image = bench.file(test, "img");
    disk::with_grub(bench.guest(), &image, "console=ttyS0 anykvm.task=check")?;
    let mut command = qemu::machine(bench, "pc", Irqchip::On);
    command
        .args(["-m", "256"])
        .args(["-drive", &format!("format=raw,file={}", image.display())])
        .args(SERIAL);
    let outcome = qemu::run(bench, test, &mut command)?;
    require_sound(&Console(&outcome.output), test.cpus)?;
    if !outcome.output.contains("Debian by GRUB") {
        bail!("GRUB showed no menu");
    }
    fs::remove_file(&image).with_context(|| image.display().to_string())
}

/// One whole pass over 8 MiB, then the escape key, which resets the machine. Most of the time is the last
/// test's: it waits twice for 80 seconds.
fn memtest(bench: &Bench, test: &Test, program: &str) -> Result<()> {
    let program = guest::packages("memtest86+", &["memtest86+"])?
        .join("boot")
        .join(program);
    let mut command = qemu::machine(bench, "pc", Irqchip::On);
    command
        .args(["-m", "8", "-append", "console=ttyS0,115200 nosmp"])
        .arg("-kernel")
        .arg(&program)
        .args(SERIAL);
    let typed = [Typed::once("Pass:  1 ", "\x1b")];
    let outcome = qemu::converse(bench, test, &mut command, &typed)?;
    // The status line is printed again and again.
    let counts: Vec<_> = outcome
        .output
        .split("Errors: ")
        .skip(1)
        .filter_map(|rest| rest.split_whitespace().next())
        .collect();
    if counts.is_empty() || counts.iter().any(|&count| count != "0") {
        bail!("memtest86+ counted errors: {}", counts.join(" "));
    }
    for words in ["#0 ", "#10 ", "Status: Pass"] {
        if !outcome.output.contains(words) {
            bail!("memtest86+ did not show '{words}'");
        }
    }
    Ok(())
}
