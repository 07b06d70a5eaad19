//! `cargo xtask bench`: anykvm against the host itself and against QEMU's TCG, always in one run, so
//! that all columns have the same machine at the same time.

mod boot;
mod chart;
mod coverage;
mod page;
mod pair;
mod work;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest::{self, Guest, Overlay};
use crate::process::{self, Outcome};
use crate::{build, progress, workspace};

#[derive(clap::Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    task: Option<BenchTask>,
    /// How often each machine boots, and each program runs; the fastest counts
    #[arg(long, default_value_t = 2)]
    runs: u32,
}

#[derive(clap::Subcommand)]
enum BenchTask {
    /// Boot the same kernel and initramfs in `anykvm boot` and in QEMU's TCG
    Boot,
    /// A program of twelve kinds of work: on the host, and as a guest's in QEMU's TCG, in anykvm's
    /// interpreter and with translation
    Work,
    /// Two processes side by side, on one processor and on two
    Pair,
    /// How many of a guest's instructions translated code executes, booting and in each kind of work;
    /// writes that part of docs/benchmarks.md
    Coverage,
    /// Exits in a loop under the Rust API, and the cost of reading and writing a vCPU's state
    Exits,
}

pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    if let Some(BenchTask::Exits) = args.task {
        print!("{}", exits()?);
        return Ok(ExitCode::SUCCESS);
    }
    let bench = Bench::prepare(args.runs.max(1))?;
    match args.task {
        Some(BenchTask::Boot) => print!("{}", boot::measure(&bench)?),
        Some(BenchTask::Work) => print!("{}", work::measure(&bench)?),
        Some(BenchTask::Pair) => print!("{}", pair::measure(&bench)?),
        Some(BenchTask::Coverage) => {
            let coverage = coverage::measure(&bench)?;
            print!("{coverage}");
            coverage.write()?;
        }
        Some(BenchTask::Exits) => {}
        None => page::write(&bench)?,
    }
    Ok(ExitCode::SUCCESS)
}

const LIMIT: Duration = Duration::from_secs(600);

/// Where guest code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    Tcg,
    Interpreter,
    Translated,
}

const ENGINES: [Engine; 3] = [Engine::Tcg, Engine::Interpreter, Engine::Translated];

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::Tcg => "TCG",
            Self::Interpreter => "interpreter",
            Self::Translated => "translated",
        }
    }
}

/// What is measured with.
struct Bench {
    anykvm: PathBuf,
    guest: Guest,
    /// The guest's initramfs with the program.
    initramfs: PathBuf,
    /// The program.
    work: PathBuf,
    runs: u32,
}

impl Bench {
    fn prepare(runs: u32) -> Result<Self> {
        let guest = Guest::prepare()?;
        guest::require_qemu()?;
        let anykvm = build::anykvm()?;
        let folder = build::target().join("bench");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let work = folder.join("work");
        guest::compile("work", 64, &work)?;
        let mut overlay = Overlay::new(&guest);
        overlay.add("bin/work", 0o755, &work)?;
        let initramfs = overlay.write(&folder.join("work.cpio"))?;
        Ok(Self {
            anykvm,
            guest,
            initramfs,
            work,
            runs,
        })
    }

    /// A machine that boots and carries out a task: the same for every engine, with no serial output to
    /// speak of.
    fn machine(&self, engine: Engine, task: &str, initramfs: &Path, cpus: u32) -> Result<Command> {
        let jit = match engine {
            Engine::Interpreter => "off",
            Engine::Translated => "on",
            Engine::Tcg => return self.tcg(task, initramfs, cpus),
        };
        Ok(self.translating(jit, task, initramfs, cpus))
    }

    fn tcg(&self, task: &str, initramfs: &Path, cpus: u32) -> Result<Command> {
        // Without a paravirtual clock the kernel measures the TSC against the PIT, which under TCG
        // fails for good when the host is busy at that moment: tell it the frequency, the host's.
        let khz = host_khz()?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", "microvm", "-accel", "tcg,thread=multi", "-cpu", "max"])
            .args(["-m", "256", "-smp", &cpus.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", "stdio", "-no-reboot", "-append"])
            .arg(format!(
                "console=ttyS0 tsc_early_khz={khz} {}",
                parameters(task)
            ))
            .args(["-kernel".as_ref(), self.guest.kernel.as_os_str()])
            .args(["-initrd".as_ref(), initramfs.as_os_str()]);
        Ok(command)
    }

    /// The built-in monitor, whose `--jit` is this.
    fn translating(&self, jit: &str, task: &str, initramfs: &Path, cpus: u32) -> Command {
        let mut command = Command::new(&self.anykvm);
        command
            .args(["boot", "--stats", "--mem", "256M", "--jit", jit])
            .args(["--cpus", &cpus.to_string(), "--append", &parameters(task)])
            .args(["--kernel".as_ref(), self.guest.kernel.as_os_str()])
            .args(["--initrd".as_ref(), initramfs.as_os_str()]);
        command
    }

    /// A machine that counts instructions, and what is left to the interpreter.
    fn counting(&self, task: &str) -> Command {
        let mut command = self.translating("count", task, &self.initramfs, 1);
        let report = build::target().join("bench").join(format!("{task}.txt"));
        command.arg("--jit-report").arg(report);
        command
    }

    /// Runs a command to its end.
    fn finish(&self, command: &mut Command, name: &str) -> Result<Outcome> {
        progress(name);
        let log = build::target()
            .join("bench")
            .join(format!("{}.log", name.replace([' ', ','], "-")));
        let outcome = process::run(command, &log, LIMIT, &["Kernel panic"])
            .with_context(|| format!("{name}, see {}", log.display()))?;
        if !outcome.status.success() {
            bail!("{name} failed, see {}", log.display());
        }
        Ok(outcome)
    }
}

/// The kernel's command line.
fn parameters(task: &str) -> String {
    format!("quiet anykvm.task={task}")
}

/// The numbers behind `anykvm-guest: work NAME` in a program's output. What the monitor says may follow before
/// the line's end.
fn times(outcome: &Outcome) -> impl Iterator<Item = (String, f64)> {
    outcome.output.lines().filter_map(|line| {
        let (_, rest) = line.split_once("anykvm-guest: work ")?;
        let (kind, time) = rest.trim().split_once(' ')?;
        let end = time.find(|c: char| !c.is_ascii_digit());
        let time = &time[..end.unwrap_or(time.len())];
        Some((kind.to_owned(), time.parse().ok()?))
    })
}

/// The host's frequency as /proc/cpuinfo has it.
fn host_khz() -> Result<u64> {
    fs::read_to_string("/proc/cpuinfo")?
        .lines()
        .filter(|line| line.starts_with("cpu MHz"))
        .find_map(|line| line.split_once(':')?.1.trim().parse::<f64>().ok())
        .map(|mhz| (mhz * 1000.0) as u64)
        .context("/proc/cpuinfo names no frequency")
}

/// The cost of exits, and of a vCPU's state, as the programs print it.
fn exits() -> Result<String> {
    build::release(&["anykvm-benches"])?;
    let anykvm = build::anykvm()?;
    let folder = build::target().join("bench");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let state = folder.join("state");
    let status = Command::new("cc")
        .args(["-O2", "-Wall", "-Werror"])
        .arg(workspace().join("benches/programs/state.c"))
        .arg("-o")
        .arg(&state)
        .status()
        .context("cannot start cc")?;
    if !status.success() {
        bail!("cannot compile the benchmark of a vCPU's state");
    }
    let mut under_shim = Command::new(&anykvm);
    under_shim
        .args(["run", "--backend", "soft", "--"])
        .arg(&state);
    let exits = printed(&mut Command::new(build::target().join("release/exits")))?;
    Ok(exits + "\n" + &printed(&mut under_shim)?)
}

/// What a program prints.
fn printed(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot start the benchmark")?;
    if !output.status.success() {
        bail!(
            "the benchmark of exits failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    String::from_utf8(output.stdout).context("the benchmark of exits printed no text")
}
