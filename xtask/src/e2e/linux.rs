//! What only an operating system asks of a processor and its surroundings: five levels of page tables, a
//! kernel started by a kernel, processors that go and come, sleep. Debian's kernel in QEMU.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use super::console::{Console, ZEROES, require_sound};
use super::qemu::{self, Irqchip};
use super::{Bench, Needs, Test};
use crate::guest::Overlay;
use crate::process::Typed;

const LIMIT: Duration = Duration::from_secs(300);

pub fn tests() -> Vec<Test> {
    vec![
        test("linux-la57", 1, la57),
        test("linux-la48", 1, la48),
        test("linux-compat-amd", 1, |bench, test| {
            compat(bench, test, "AuthenticAMD")
        }),
        test("linux-compat-intel", 1, |bench, test| {
            compat(bench, test, "GenuineIntel")
        }),
        Test {
            limit: LIMIT * 2,
            ..test("linux-rewrite", 2, rewrite)
        },
        test("linux-kexec", 2, kexec),
        test("linux-hotplug", 2, hotplug),
        test("linux-sleep", 2, sleep),
    ]
}

fn test(name: &str, cpus: usize, body: fn(&Bench, &Test) -> Result<()>) -> Test {
    Test {
        name: name.to_owned(),
        cpus,
        limit: LIMIT,
        needs: Needs::Qemu,
        body: Box::new(body),
    }
}

/// A machine with Debian's kernel.
fn machine(bench: &Bench, kind: &str, smp: &str, initrd: &Path, parameters: &str) -> Command {
    let mut command = qemu::machine(bench, kind, Irqchip::On);
    command
        .args(["-m", "768", "-smp", smp, "-nic", "none"])
        .args(["-append", &format!("console=ttyS0 {parameters}")])
        .arg("-kernel")
        .arg(&bench.guest().kernel)
        .arg("-initrd")
        .arg(initrd);
    command
}

/// Standard input and output as the guest's serial console alone.
const SERIAL: [&str; 4] = ["-serial", "stdio", "-monitor", "none"];

/// Linux shows the flag only while its page tables have five levels. A program has memory behind every entry
/// of the top-level table that is for users.
fn la57(bench: &Bench, test: &Test) -> Result<()> {
    let mut overlay = Overlay::new(bench.guest());
    overlay.compiled("la57", 64)?;
    let initrd = overlay.write(&bench.file(test, "cpio"))?;
    let mut command = machine(bench, "q35", "1", &initrd, "anykvm.task=la57");
    let outcome = qemu::run(bench, test, command.args(SERIAL))?;
    let console = Console(&outcome.output);
    require_sound(&console, test.cpus)?;
    console.require("la57", "yes")?;
    console.require("la57 program", "passed")
}

/// The same kernel asked to use four levels: a processor that has five must do that too.
fn la48(bench: &Bench, test: &Test) -> Result<()> {
    let initrd = bench.guest().initramfs.clone();
    let mut command = machine(bench, "q35", "1", &initrd, "no5lvl anykvm.task=check");
    let outcome = qemu::run(bench, test, command.args(SERIAL))?;
    let console = Console(&outcome.output);
    require_sound(&console, test.cpus)?;
    console.require("la57", "no")
}

/// A 32-bit program. Its system calls are SYSCALL or SYSENTER by the processor's vendor.
fn compat(bench: &Bench, test: &Test, vendor: &str) -> Result<()> {
    let mut overlay = Overlay::new(bench.guest());
    overlay.compiled("compat", 32)?;
    let initrd = overlay.write(&bench.file(test, "cpio"))?;
    let mut command = machine(bench, "q35", "1", &initrd, "anykvm.task=compat");
    command.args(["-cpu", &format!("host,vendor={vendor}")]);
    let outcome = qemu::run(bench, test, command.args(SERIAL))?;
    let console = Console(&outcome.output);
    console.require_done("compat")?;
    console.require("compat", "passed")?;
    console.require("vendor", vendor)
}

/// Code that changes, in a program and in the kernel: function tracing, probes, static branches, modules.
fn rewrite(bench: &Bench, test: &Test) -> Result<()> {
    let mut overlay = Overlay::new(bench.guest());
    overlay.compiled("rewrite", 64)?;
    let initrd = overlay.write(&bench.file(test, "cpio"))?;
    let mut command = machine(bench, "q35", "2", &initrd, "anykvm.task=rewrite");
    let outcome = qemu::run(bench, test, command.args(SERIAL))?;
    let console = Console(&outcome.output);
    console.require_done("rewrite")?;
    require_sound(&console, test.cpus)?;
    console.require("rewrite", "passed")?;
    if console.value("trace functions")? == "0" {
        bail!("the function tracer saw nothing");
    }
    for (what, wanted) in [("probes", "8"), ("wrong", "0"), ("events", "15")] {
        console.require(&format!("trace {what}"), wanted)?;
    }
    console.require("modules", "10")
}

/// Three kernels in one machine: the second is placed by kexec-tools and kexec_load, the third by
/// kexec_file_load. Kernel and initramfs are read from two disks.
fn kexec(bench: &Bench, test: &Test) -> Result<()> {
    let mut overlay = Overlay::new(bench.guest());
    overlay.programs("kexec-tools", &["kexec-tools"], &["sbin/kexec"])?;
    let initrd = overlay.write(&bench.file(test, "cpio"))?;
    let mut command = machine(bench, "q35", "2", &initrd, "anykvm.task=kexec");
    for file in [&bench.guest().kernel, &initrd] {
        command.args([
            "-drive",
            &format!("if=virtio,format=raw,readonly=on,file={}", file.display()),
        ]);
    }
    let outcome = qemu::run(bench, test, command.args(SERIAL))?;
    let console = Console(&outcome.output);
    for stage in ["kexec stage1", "kexec stage2", "kexec stage3"] {
        console.require(stage, &format!("{} cpu", test.cpus))?;
    }
    require_sound(&console, test.cpus)?;
    if outcome.output.matches("Linux version").count() != 3 {
        bail!("the console does not show three kernels");
    }
    Ok(())
}

/// Processors that the guest's kernel switches off and on, and two that are plugged in and taken out.
fn hotplug(bench: &Bench, test: &Test) -> Result<()> {
    const SMP: &str = "2,maxcpus=3,sockets=3,cores=1,threads=1";
    // Ctrl-A c changes between the guest's console and QEMU's monitor.
    const ADD: &str =
        "\x01cdevice_add host-x86_64-cpu,id=third,socket-id=2,core-id=0,thread-id=0\n\x01c";
    const REMOVE: &str = "\x01cdevice_del third\n\x01c";
    let initrd = bench.guest().initramfs.clone();
    let mut command = machine(bench, "q35", SMP, &initrd, "anykvm.task=hotplug");
    command.args(["-serial", "mon:stdio"]);
    let typed = [
        Typed::once("ready to add, time 1", ADD),
        Typed::once("ready to remove, time 1", REMOVE),
        Typed::once("ready to add, time 2", ADD),
        Typed::once("ready to remove, time 2", REMOVE),
    ];
    let outcome = qemu::converse(bench, test, &mut command, &typed)?;
    let console = Console(&outcome.output);
    require_sound(&console, test.cpus)?;
    console.require("hotplug rounds", "10")?;
    for time in [1, 2] {
        console.require(&format!("hotplug cpus{time}"), "3")?;
        console.require(&format!("hotplug md5-{time}"), ZEROES)?;
        console.require(&format!("hotplug left{time}"), "2")?;
    }
    Ok(())
}

/// Suspend to idle, ended by a byte on the serial line, and suspend to RAM, ended by QEMU's monitor. On a
/// pc: after suspend to RAM Debian's SeaBIOS leaves q35 without its ACPI registers, whatever the accelerator.
fn sleep(bench: &Bench, test: &Test) -> Result<()> {
    let initrd = bench.guest().initramfs.clone();
    // The console, which wakes, may not go to sleep itself.
    let parameters = "no_console_suspend anykvm.task=sleep";
    let mut command = machine(bench, "pc", "2", &initrd, parameters);
    command.args(["-serial", "mon:stdio"]);
    let typed = [
        Typed {
            after: "ready to sleep, freeze",
            text: "\n",
            until: Some("sleep freeze="),
        },
        Typed {
            after: "ready to sleep, mem",
            text: "\x01csystem_wakeup\n\x01c",
            until: Some("sleep mem="),
        },
    ];
    let outcome = qemu::converse(bench, test, &mut command, &typed)?;
    let console = Console(&outcome.output);
    require_sound(&console, test.cpus)?;
    console.require("sleep freeze", "woke with 2 cpu")?;
    console.require("sleep mem", "woke with 2 cpu")?;
    console.require("sleep times", "2")
}
