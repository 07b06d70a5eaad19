//! `cargo xtask bench work`: `tests/guest/programs/work.c` on the host and in guests, side by side.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::bench::{LIMIT, host_khz, log};
use crate::guest::{self, Guest, Overlay};
use crate::{build, process, progress};

/// Nanoseconds of each kind of work.
type Times = BTreeMap<String, f64>;

/// Where the program runs.
const COLUMNS: [&str; 4] = ["native", "TCG", "interpreter", "translated"];

pub fn run() -> Result<ExitCode> {
    let guest = Guest::prepare()?;
    guest::require_qemu()?;
    let anykvm = build::anykvm()?;
    let folder = build::target().join("bench");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;

    let program = folder.join("work");
    guest::compile("work", 64, &program)?;
    let mut overlay = Overlay::new(&guest);
    overlay.add("bin/work", 0o755, &program)?;
    let initramfs = overlay.write(&folder.join("work.cpio"))?;

    let mut native = Command::new(&program);
    let mut interpreter = boot(&anykvm, &guest.kernel, &initramfs, "off");
    let mut translated = boot(&anykvm, &guest.kernel, &initramfs, "on");
    let mut tcg = tcg(&guest.kernel, &initramfs)?;
    let commands = [&mut native, &mut tcg, &mut interpreter, &mut translated];
    let mut columns = Vec::new();
    for (name, command) in COLUMNS.into_iter().zip(commands) {
        progress(name);
        columns.push(measured(command, name)?);
    }
    print(&columns)?;
    Ok(ExitCode::SUCCESS)
}

const PARAMETERS: &str = "quiet anykvm.task=work";

fn boot(anykvm: &Path, kernel: &Path, initramfs: &Path, jit: &str) -> Command {
    let mut command = Command::new(anykvm);
    command
        .env("ANYKVM_JIT", jit)
        .args(["boot", "--mem", "256M", "--append", PARAMETERS])
        .arg("--kernel")
        .arg(kernel)
        .arg("--initrd")
        .arg(initramfs);
    command
}

fn tcg(kernel: &Path, initramfs: &Path) -> Result<Command> {
    let parameters = format!("console=ttyS0 tsc_early_khz={} {PARAMETERS}", host_khz()?);
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", "256"])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-serial", "stdio", "-no-reboot"])
        .args(["-append", &parameters])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs);
    Ok(command)
}

/// Runs a command and reads the times it prints.
fn measured(command: &mut Command, name: &str) -> Result<Times> {
    let log = log(&format!("work-{name}"));
    let outcome = process::run(command, &log, LIMIT, &["Kernel panic"])
        .with_context(|| format!("{name}, see {}", log.display()))?;
    let times: Times = outcome
        .output
        .lines()
        .filter_map(|line| {
            let (_, rest) = line.split_once("anykvm-guest: work ")?;
            let (kind, time) = rest.trim().split_once(' ')?;
            Some((kind.to_owned(), time.parse().ok()?))
        })
        .collect();
    if times.is_empty() {
        bail!("{name} has measured nothing, see {}", log.display());
    }
    Ok(times)
}

/// One line a kind: milliseconds on the host, then how many times as long it takes elsewhere.
fn print(columns: &[Times]) -> Result<()> {
    let [native, others @ ..] = columns else {
        bail!("nothing was measured");
    };
    println!("{:<16} {:>10}", "", "native");
    print!("{:<16} {:>10}", "kind of work", "ms");
    for name in &COLUMNS[1..] {
        print!(" {name:>12}");
    }
    println!();
    let mut logarithms = vec![0.0; others.len()];
    for (kind, time) in native {
        print!("{kind:<16} {:>10.2}", time / 1e6);
        for (column, sum) in others.iter().zip(&mut logarithms) {
            let ratio = column.get(kind).context("a kind is missing")? / time;
            *sum += ratio.ln();
            print!(" {ratio:>11.2}x");
        }
        println!();
    }
    print!("{:<16} {:>10}", "geometric mean", "");
    for sum in &logarithms {
        print!(" {:>11.2}x", (sum / native.len() as f64).exp());
    }
    println!();
    Ok(())
}
