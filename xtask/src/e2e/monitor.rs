//! The monitor of `tests/monitor`, which does what Firecracker and Cloud Hypervisor do: a busy guest is paused, goes
//! on, is saved, and goes on in a new process.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::console::{Console, FATAL};
use super::{Bench, Needs, Test};
use crate::guest::Overlay;
use crate::{build, process};

const LIMIT: Duration = Duration::from_secs(240);
const CPUS: usize = 2;
/// How often the machine is saved.
const ROUNDS: usize = 3;
const AT_WORK: &str = "anykvm-guest: migrate at work";
const WRONG: &str = "anykvm-guest: wrong";

/// Whose way, how the kernel is entered, and the guest's clock.
const MACHINES: [(&str, &str, &str); 2] = [
    ("firecracker", "linux", "kvm-clock"),
    ("cloud-hypervisor", "pvh", "tsc"),
];

pub fn tests() -> Vec<Test> {
    MACHINES
        .into_iter()
        .map(|(kind, entry, clocksource)| Test {
            name: format!("monitor-{kind}"),
            cpus: CPUS,
            limit: LIMIT,
            needs: Needs::Guest,
            body: Box::new(move |bench, test| perform(bench, test, kind, entry, clocksource)),
        })
        .collect()
}

fn perform(bench: &Bench, test: &Test, kind: &str, entry: &str, clocksource: &str) -> Result<()> {
    let mut overlay = Overlay::new(bench.guest());
    overlay.compiled("migrate", 64)?;
    let initrd = overlay.write(&bench.file(test, "cpio"))?;
    let folder = bench.file(test, "saved");
    let monitor = build::monitor()?;
    let command = || {
        let mut command = Command::new(&bench.anykvm);
        command.args(["run", "--backend", "soft", "--"]);
        command.arg(&monitor);
        command
    };
    let words = if clocksource == "tsc" {
        "clocksource=tsc tsc=reliable"
    } else {
        "clocksource=kvm-clock"
    };
    let mut boot = command();
    boot.arg("boot").arg(&folder);
    boot.args(["--kind", kind, "--entry", entry, "--kernel"])
        .arg(bench.guest().vmlinux()?)
        .arg("--initrd")
        .arg(&initrd)
        .args(["--cpus", &CPUS.to_string()])
        .args(["--until", AT_WORK, "--command-line"])
        .arg(format!(
            "console=ttyS0 quiet anykvm.task=migrate anykvm.without=disk {words}"
        ));
    let mut console = run(bench, test, &mut boot)?;
    for round in 1..=ROUNDS {
        let mut resume = command();
        resume.arg("resume").arg(&folder).args(["--until", AT_WORK]);
        if round == ROUNDS {
            resume.args(["--finish", "anykvm-guest: task migrate done"]);
        }
        console += &run(bench, test, &mut resume).with_context(|| format!("round {round}"))?;
    }
    fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let console = Console(&console);
    console.require("migrate cpus", &CPUS.to_string())?;
    console.require("migrate clocksource", clocksource)?;
    console.require_done("migrate")?;
    console.require("migrate", "passed")?;
    console.require("trouble", "0")
}

/// One process of the monitor, to its end.
fn run(bench: &Bench, test: &Test, command: &mut Command) -> Result<String> {
    let outcome = process::run(command, &bench.log(test), test.limit, FATAL)?;
    if !outcome.status.success() {
        let last = outcome.output.lines().next_back().unwrap_or_default();
        bail!("the monitor ended with {}: {last}", outcome.status);
    }
    if outcome.output.contains(WRONG) {
        bail!("the guest has lost something");
    }
    Ok(outcome.output)
}
