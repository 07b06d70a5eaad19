//! Debian's kernel in `anykvm boot`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::console::{Console, FATAL, require_sound};
use super::{Bench, Needs, Test};
use crate::process::{self, Typed};

const LIMIT: Duration = Duration::from_secs(240);
/// 64 MiB of data after 1 MiB for the mark.
const DISK_SIZE: u64 = 65 << 20;

pub fn tests() -> Vec<Test> {
    vec![
        test("boot-cpus1", 1, |bench, test| {
            check(bench, test, Kernel::Compressed, None)
        }),
        test("boot-vmlinux", 1, |bench, test| {
            check(bench, test, Kernel::Elf, None)
        }),
        test("boot-cpus2", 2, |bench, test| {
            check(bench, test, Kernel::Compressed, None)
        }),
        test("boot-interpreted", 2, |bench, test| {
            check(bench, test, Kernel::Compressed, Some("off"))
        }),
        test("boot-translated-always", 2, |bench, test| {
            check(bench, test, Kernel::Elf, Some("always"))
        }),
        test("boot-small-cache", 2, small_cache),
        test("boot-lockstep", 1, lockstep),
        test("boot-disk", 1, disk),
        test("boot-shell", 1, shell),
        test("boot-terminal", 1, terminal),
    ]
}

fn test(
    name: &str,
    cpus: usize,
    body: impl Fn(&Bench, &Test) -> Result<()> + Send + Sync + 'static,
) -> Test {
    Test {
        name: name.to_owned(),
        cpus,
        limit: LIMIT,
        needs: Needs::Guest,
        body: Box::new(body),
    }
}

fn command(bench: &Bench, kernel: &Path, test: &Test, task: &str) -> Command {
    let mut command = Command::new(&bench.anykvm);
    command
        .args(["boot", "--stats", "--mem", "512M"])
        .args(["--cpus", &test.cpus.to_string()])
        .args(["--append", &format!("anykvm.task={task}")])
        .arg("--kernel")
        .arg(kernel)
        .arg("--initrd")
        .arg(&bench.guest().initramfs);
    command
}

/// The form the kernel is loaded in.
#[derive(Clone, Copy)]
enum Kernel {
    /// A bzImage.
    Compressed,
    /// A vmlinux, which begins by PVH.
    Elf,
}

/// Boots with `ANYKVM_JIT` set to `jit`, if that says something.
fn check(bench: &Bench, test: &Test, kernel: Kernel, jit: Option<&str>) -> Result<()> {
    let kernel = match kernel {
        Kernel::Elf => bench.guest().vmlinux()?,
        Kernel::Compressed => bench.guest().kernel.clone(),
    };
    let outcome = process::run(
        command(bench, &kernel, test, "check").envs(jit.map(|jit| ("ANYKVM_JIT", jit))),
        &bench.log(test),
        test.limit,
        FATAL,
    )?;
    let console = Console(&outcome.output);
    require_sound(&console, test.cpus)?;
    console.require("x2apic", "yes")?;
    console.require("tsc_deadline", "yes")?;
    if !console.value("clocksources")?.contains("kvm-clock") {
        bail!("the guest has no kvm-clock");
    }
    require_end(&outcome.output, "the guest powered off")?;
    if outcome.status.code() != Some(0) {
        bail!("power-off gave {}", outcome.status);
    }
    if test.cpus > 1 {
        let flushes = "KVM setup pv remote TLB flush";
        if !outcome.output.contains(flushes) {
            bail!("the guest leaves no TLB flush to processors that do not run");
        }
    }
    Ok(())
}

/// A counter of those that `--stats` prints at the end; 0 if it is not there.
fn counter(output: &str, name: &str) -> u64 {
    let mut words = output.split([',', '\n']).map(|part| {
        let part = part.trim().trim_start_matches("anykvm: ");
        part.split_once(' ').unwrap_or_default()
    });
    let found = words.find(|(found, _)| *found == name);
    found
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

/// With as little room for translated code as there may be, which is full again and again.
fn small_cache(bench: &Bench, test: &Test) -> Result<()> {
    let outcome = process::run(
        command(bench, &bench.guest().kernel, test, "check").args(["--jit-cache", "1M"]),
        &bench.log(test),
        test.limit,
        FATAL,
    )?;
    require_sound(&Console(&outcome.output), test.cpus)?;
    require_end(&outcome.output, "the guest powered off")?;
    let flushes = counter(&outcome.output, "jit_flushes");
    let bytes = counter(&outcome.output, "jit_code_bytes");
    if flushes < 10 || bytes == 0 || bytes > 1 << 20 {
        bail!("{bytes} bytes of code, and the cache was emptied {flushes} times");
    }
    Ok(())
}

/// Everything that is executed is compared with the interpreter. There is nobody else who writes to the
/// guest's memory.
fn lockstep(bench: &Bench, test: &Test) -> Result<()> {
    let outcome = process::run(
        command(bench, &bench.guest().kernel, test, "bench").args(["--jit", "lockstep"]),
        &bench.log(test),
        test.limit,
        FATAL,
    )?;
    Console(&outcome.output).require_done("bench")?;
    require_end(&outcome.output, "the guest powered off")?;
    let compared = counter(&outcome.output, "jit_compared_instructions");
    let disturbed = counter(&outcome.output, "jit_disturbed_stretches");
    if compared < 500_000_000 || disturbed != 0 {
        bail!("{compared} instructions compared, {disturbed} differences that did not come again");
    }
    Ok(())
}

/// Two runs with the same disk: the first ends with a reset, and nothing may be lost between them.
fn disk(bench: &Bench, test: &Test) -> Result<()> {
    let image = bench.folder.join(format!("{}.img", test.name));
    new_disk(&image)?;
    let log = bench.log(test);
    let mut sums = Vec::new();
    for (run, key, end) in [
        (1, "disk wrote", "the guest reset itself"),
        (2, "disk read", "the guest powered off"),
    ] {
        let mut command = command(bench, &bench.guest().kernel, test, "disk");
        command.arg("--disk").arg(&image);
        let log = log.with_extension(format!("{run}.log"));
        let outcome = process::run(&mut command, &log, test.limit, FATAL)
            .with_context(|| format!("run {run}, see {}", log.display()))?;
        let console = Console(&outcome.output);
        sums.push(console.value(key)?.to_owned());
        require_end(&outcome.output, end)?;
        if outcome.status.code() != Some(0) {
            bail!("run {run} gave {}", outcome.status);
        }
    }
    if sums[0] != sums[1] {
        bail!("the disk's checksum was {} and is {}", sums[0], sums[1]);
    }
    require_disk(&image, &sums[0])?;
    fs::remove_file(&image).with_context(|| image.display().to_string())
}

/// What the guest's init says before its shell.
const SHELL: &str = "A shell on the serial console";

/// Commands typed at the guest's shell, standard input being a pipe.
fn shell(bench: &Bench, test: &Test) -> Result<()> {
    let mut command = command(bench, &bench.guest().kernel, test, "");
    let typed = [
        Typed::once(SHELL, "echo product=$((6*7))\n"),
        Typed::once("product=42", "poweroff -f\n"),
    ];
    let log = bench.log(test);
    let outcome = process::converse(&mut command, &log, test.limit, FATAL, &typed)?;
    require_end(&outcome.output, "the guest powered off")
}

/// On a terminal (that of script(1)): left by the escape key and by a signal, the terminal's modes are
/// as they were before.
fn terminal(bench: &Bench, test: &Test) -> Result<()> {
    let boot = format!("{:?}", command(bench, &bench.guest().kernel, test, ""));
    for (part, leave, end) in [
        ("key", "", "ended from the keyboard"),
        // SIGTERM to the monitor, the parent of the shell that finds it
        (
            "signal",
            "(sleep 8; pkill -TERM -P $$ anykvm) & ",
            "Terminated",
        ),
    ] {
        let script = format!("echo modes=$(stty -g); {leave}{boot}; echo modes=$(stty -g)");
        let mut command = Command::new("script");
        command.args(["-qec", &script, "/dev/null"]);
        let typed = [Typed::once(
            SHELL,
            if leave.is_empty() { "\x01x" } else { "" },
        )];
        let log = bench.log(test).with_extension(format!("{part}.log"));
        let outcome = process::converse(&mut command, &log, test.limit, FATAL, &typed)
            .with_context(|| format!("{part}, see {}", log.display()))?;
        let modes: Vec<_> = outcome
            .output
            .lines()
            .filter_map(|line| line.trim().strip_prefix("modes="))
            .collect();
        if modes.len() != 2 || modes[0] != modes[1] {
            bail!("{part}: the terminal's modes before and after: {modes:?}");
        }
        require_end(&outcome.output, end)?;
    }
    Ok(())
}

fn require_end(output: &str, end: &str) -> Result<()> {
    if !output.contains(end) {
        bail!("anykvm did not say '{end}'");
    }
    Ok(())
}

/// An empty disk of the size that task `disk` wants.
pub fn new_disk(path: &Path) -> Result<()> {
    fs::File::create(path)
        .and_then(|file| file.set_len(DISK_SIZE))
        .with_context(|| path.display().to_string())
}

/// Fails unless the data on the disk, as the host sees it, has this checksum and is not all zeroes.
pub fn require_disk(path: &Path, sum: &str) -> Result<()> {
    let image = fs::read(path).with_context(|| path.display().to_string())?;
    if image.len() as u64 != DISK_SIZE {
        bail!("the disk image has changed its size to {}", image.len());
    }
    let data = &image[1 << 20..];
    if data.iter().all(|byte| *byte == 0) {
        bail!("nothing was written to the disk image");
    }
    let host = md5(data)?;
    if host != sum {
        bail!("the guest says that the disk's checksum is {sum}, and it is {host}");
    }
    Ok(())
}

/// The MD5 sum of `data`, by the host's program.
pub fn md5(data: &[u8]) -> Result<String> {
    use std::io::Write;
    use std::process::Stdio;

    let mut child = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start md5sum")?;
    child
        .stdin
        .take()
        .context("md5sum has no input")?
        .write_all(data)?;
    let output = child.wait_with_output()?;
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .next()
        .map(str::to_owned)
        .context("md5sum printed nothing")
}
