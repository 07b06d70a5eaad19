//! Debian's unmodified QEMU with `-accel kvm`, under `anykvm run`.

use std::fs;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::boot::{md5, new_disk, require_disk};
use super::console::{Console, FATAL, require_sound};
use super::{Bench, Needs, Test, http};
use crate::process::{self, Outcome, Typed};

const LIMIT: Duration = Duration::from_secs(300);

/// Where the interrupt controllers are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Irqchip {
    On,
    Split,
    Off,
}

impl Irqchip {
    fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Split => "split",
            Self::Off => "off",
        }
    }
}

/// Machine type, processors, interrupt controllers: each machine type with every kind of interrupt
/// controllers, each with one and with two processors. Not `off` with two: QEMU 7.2's userspace APIC never
/// withdraws a SIPI, so that a second processor which halts spins with QEMU's lock held, on any KVM.
const MACHINES: &[(&str, usize, Irqchip)] = &[
    ("microvm", 1, Irqchip::On),
    ("microvm", 1, Irqchip::Split),
    ("microvm", 1, Irqchip::Off),
    ("pc", 1, Irqchip::On),
    ("pc", 1, Irqchip::Off),
    ("q35", 1, Irqchip::Split),
    ("q35", 1, Irqchip::Off),
    ("microvm", 2, Irqchip::On),
    ("pc", 2, Irqchip::Split),
    ("q35", 2, Irqchip::On),
];

pub fn tests() -> Vec<Test> {
    let mut tests: Vec<Test> = MACHINES
        .iter()
        .map(|&(machine, cpus, irqchip)| Test {
            name: format!("qemu-{machine}-smp{cpus}-{}", irqchip.name()),
            cpus,
            limit: LIMIT,
            needs: Needs::Qemu,
            body: Box::new(move |bench, test| check(bench, test, machine, irqchip, None)),
        })
        .collect();
    for (name, jit) in [("interpreted", "off"), ("translated-always", "always")] {
        tests.push(Test {
            name: format!("qemu-{name}"),
            cpus: 2,
            limit: LIMIT,
            needs: Needs::Qemu,
            body: Box::new(move |bench, test| check(bench, test, "q35", Irqchip::On, Some(jit))),
        });
    }
    for machine in ["microvm", "q35"] {
        tests.push(Test {
            name: format!("qemu-disk-{machine}"),
            cpus: 1,
            limit: LIMIT * 2,
            needs: Needs::Qemu,
            body: Box::new(move |bench, test| disk(bench, test, machine)),
        });
    }
    for machine in ["microvm", "pc"] {
        tests.push(Test {
            name: format!("qemu-net-{machine}"),
            cpus: 1,
            limit: LIMIT,
            needs: Needs::Qemu,
            body: Box::new(move |bench, test| net(bench, test, machine)),
        });
    }
    tests
}

/// QEMU as a user would start it; pc and q35 keep their default VGA card.
fn qemu(bench: &Bench, test: &Test, kind: &str, irqchip: Irqchip, parameters: &str) -> Command {
    let mut command = machine(bench, kind, irqchip);
    command
        .args(["-m", "512", "-smp", &test.cpus.to_string()])
        .args(["-serial", "stdio", "-monitor", "none"])
        .args(["-append", &format!("console=ttyS0 {parameters}")])
        .arg("-kernel")
        .arg(&bench.guest().kernel)
        .arg("-initrd")
        .arg(&bench.guest().initramfs);
    command
}

/// QEMU with an empty machine and no window.
pub fn machine(bench: &Bench, kind: &str, irqchip: Irqchip) -> Command {
    // KVM sends a guest's IPIs (KVM_HC_SEND_IPI) only with local APICs of its own, and this QEMU offers
    // that to guests without them too.
    let cpu = if irqchip == Irqchip::Off {
        "host,kvm-pv-ipi=off"
    } else {
        "host"
    };
    let mut command = machine_of_model(bench, kind, cpu);
    command.args(["-accel", &format!("kvm,kernel-irqchip={}", irqchip.name())]);
    command
}

/// The same with a processor of some model, and no accelerator chosen yet.
pub fn machine_of_model(bench: &Bench, kind: &str, cpu: &str) -> Command {
    let mut command = Command::new(&bench.anykvm);
    command
        .args(["run", "--backend", "soft", "--", "qemu-system-x86_64"])
        .args(["-M", kind, "-cpu", cpu, "-display", "none"]);
    command
}

/// Runs a machine to its end, which must be a good one.
pub fn run(bench: &Bench, test: &Test, command: &mut Command) -> Result<Outcome> {
    converse(bench, test, command, &[])
}

/// The same, and types as [`process::converse`] does.
pub fn converse(
    bench: &Bench,
    test: &Test,
    command: &mut Command,
    typed: &[Typed],
) -> Result<Outcome> {
    let outcome = process::converse(command, &bench.log(test), test.limit, FATAL, typed)?;
    if !outcome.status.success() {
        let last = outcome.output.lines().next_back().unwrap_or_default();
        bail!("QEMU ended with {}: {}", outcome.status, last.trim_end());
    }
    Ok(outcome)
}

/// Boots with `ANYKVM_JIT` set to `jit`, if that says something.
fn check(
    bench: &Bench,
    test: &Test,
    machine: &str,
    irqchip: Irqchip,
    jit: Option<&str>,
) -> Result<()> {
    let mut command = qemu(bench, test, machine, irqchip, "anykvm.task=check");
    command
        .envs(jit.map(|jit| ("ANYKVM_JIT", jit)))
        .args(["-nic", "none", "-no-reboot"]);
    let outcome = run(bench, test, &mut command)?;
    let console = Console(&outcome.output);
    require_sound(&console, test.cpus)?;
    console.require("clocksource", "kvm-clock")?;
    // Without an APIC in KVM these are QEMU's to offer, and QEMU 7.2 has neither.
    let apic = if irqchip == Irqchip::Off { "no" } else { "yes" };
    console.require("x2apic", apic)?;
    console.require("tsc_deadline", apic)?;
    if !outcome.output.contains("reboot: Power down") {
        bail!("the guest did not power off");
    }
    Ok(())
}

/// One run of QEMU, in which the guest reboots: random data written, and the same after the reboot.
fn disk(bench: &Bench, test: &Test, machine: &str) -> Result<()> {
    let image = bench.folder.join(format!("{}.img", test.name));
    new_disk(&image)?;
    // Linux reboots microvm, whose ACPI is hardware-reduced, by way of EFI and then the BIOS, which
    // fails in QEMU whatever the accelerator; a triple fault is what works.
    let parameters = if machine == "microvm" {
        "reboot=t anykvm.task=disk"
    } else {
        "anykvm.task=disk"
    };
    let mut command = qemu(bench, test, machine, virtio(machine), parameters);
    let device = device("virtio-blk", machine, "drive=disk");
    command
        .args(["-nic", "none"])
        .args([
            "-drive",
            &format!("if=none,id=disk,format=raw,file={}", image.display()),
        ])
        .args(["-device", &device]);
    let outcome = run(bench, test, &mut command)?;
    let console = Console(&outcome.output);
    console.require_done("disk")?;
    let sum = console.value("disk wrote")?;
    console.require("disk read", sum)?;
    console.require("disk", "same")?;
    require_disk(&image, sum)?;
    fs::remove_file(&image).with_context(|| image.display().to_string())
}

/// The guest fetches a file from the host.
fn net(bench: &Bench, test: &Test, machine: &str) -> Result<()> {
    let (port, sum) = served()?;
    let parameters = format!("anykvm.task=net anykvm.url=http://10.0.2.2:{port}/file");
    let mut command = qemu(bench, test, machine, virtio(machine), &parameters);
    command
        .args(["-netdev", "user,id=net"])
        .args([
            "-device",
            &device("virtio-net", machine, "netdev=net,romfile="),
        ])
        .arg("-no-reboot");
    let outcome = run(bench, test, &mut command)?;
    let console = Console(&outcome.output);
    console.require_done("net")?;
    console.require("net md5", &sum)
}

/// Interrupt controllers for tests of virtio devices. Those of microvm are wired to a second IOAPIC, of
/// QEMU's own, which hears of no EOI when the first one is in KVM.
fn virtio(machine: &str) -> Irqchip {
    if machine == "microvm" {
        Irqchip::Split
    } else {
        Irqchip::On
    }
}

/// A virtio device on the machine's bus. Option ROMs are a thing of PCI.
fn device(kind: &str, machine: &str, options: &str) -> String {
    if machine == "microvm" {
        format!("{kind}-device,{}", options.trim_end_matches(",romfile="))
    } else {
        format!("{kind}-pci,{options}")
    }
}

/// Port and checksum of the file that guests fetch: 4 MiB that look random (xorshift64*).
fn served() -> Result<(u16, String)> {
    static SERVED: OnceLock<(u16, String)> = OnceLock::new();
    if let Some(served) = SERVED.get() {
        return Ok(served.clone());
    }
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let body: Vec<u8> = (0..(4 << 20) / 8)
        .flat_map(|_| {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
        })
        .collect();
    let sum = md5(&body)?;
    let port = http::serve(body)?;
    Ok(SERVED.get_or_init(|| (port, sum)).clone())
}
