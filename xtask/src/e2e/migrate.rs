//! A busy guest that is saved and loaded, and that moves from one QEMU to another while it runs. It compares
//! everything it writes, in memory and on its disk, and the clocks it reads (`tests/guest/programs/migrate.c`).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::console::Console;
use super::machine::Machine;
use super::{Bench, Needs, Test};
use crate::guest::{Overlay, qcow2};
use crate::progress;

/// For everything that is waited for: the host may be busy with others.
const LIMIT: Duration = Duration::from_secs(240);
const CPUS: usize = 2;
const DISK: u64 = 16 << 20;
const AT_WORK: &str = "anykvm-guest: migrate at work";
/// How often memory that was written meanwhile is sent again before a guest may be stopped.
const PASSES: u64 = 4;

#[derive(Clone, clap::Args)]
pub struct MigrateArgs {
    /// How often the guest moves
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Let KVM say which pages were written by rings instead of bitmaps
    #[arg(long)]
    dirty_ring: bool,
    /// The clock that the guest's kernel uses: kvm-clock or tsc
    #[arg(long, default_value = "kvm-clock")]
    clocksource: String,
    /// Move the guest before its memory, which follows when it is touched
    #[arg(long)]
    postcopy: bool,
    /// Save and load instead of moving
    #[arg(long)]
    save: bool,
    /// QEMU's machine type: q35 or pc
    #[arg(long, default_value = "q35")]
    machine: String,
    /// Where the I/O APIC is: on (in KVM) or split (in QEMU)
    #[arg(long, default_value = "on")]
    irqchip: String,
}

impl Default for MigrateArgs {
    fn default() -> Self {
        Self {
            rounds: 2,
            dirty_ring: false,
            clocksource: "kvm-clock".to_owned(),
            postcopy: false,
            save: false,
            machine: "q35".to_owned(),
            irqchip: "on".to_owned(),
        }
    }
}

pub fn tests() -> Vec<Test> {
    let short = |name: &str, args: MigrateArgs| Test {
        name: format!("migrate-{name}"),
        cpus: CPUS,
        limit: LIMIT,
        needs: Needs::Qemu,
        body: Box::new(move |bench, test| perform(bench, &test.name, &args)),
    };
    let usual = MigrateArgs::default;
    vec![
        short("log", usual()),
        short(
            "ring",
            MigrateArgs {
                dirty_ring: true,
                clocksource: "tsc".to_owned(),
                ..usual()
            },
        ),
        short(
            "save",
            MigrateArgs {
                save: true,
                machine: "pc".to_owned(),
                irqchip: "split".to_owned(),
                ..usual()
            },
        ),
    ]
}

/// `cargo xtask migrate`.
pub fn run(args: &MigrateArgs) -> Result<ExitCode> {
    let args = args.clone();
    let test = Test {
        name: "migrate".to_owned(),
        cpus: CPUS,
        limit: LIMIT,
        needs: Needs::Qemu,
        body: Box::new(move |bench, test| perform(bench, &test.name, &args)),
    };
    super::run_tests(vec![test], 1)
}

fn perform(bench: &Bench, name: &str, args: &MigrateArgs) -> Result<()> {
    let journey = Journey::prepare(bench, name, args)?;
    let console = if args.save {
        journey.save_and_load()?
    } else {
        journey.travel()?
    };
    let console = Console(&console);
    console.require_done("migrate")?;
    console.require("migrate", "passed")?;
    console.require("trouble", "0")
}

/// What all machines of one guest have in common.
struct Journey<'a> {
    bench: &'a Bench,
    name: &'a str,
    args: &'a MigrateArgs,
    initrd: PathBuf,
    disk: PathBuf,
    log: PathBuf,
}

/// How much the guest has done.
#[derive(Debug, Default, PartialEq)]
struct Done {
    pages: u64,
    blocks: u64,
    forks: u64,
    readings: [u64; 2],
}

impl<'a> Journey<'a> {
    fn prepare(bench: &'a Bench, name: &'a str, args: &'a MigrateArgs) -> Result<Self> {
        let file = |extension: &str| bench.folder.join(format!("{name}.{extension}"));
        let mut overlay = Overlay::new(bench.guest());
        overlay.compiled("migrate", 64)?;
        let initrd = overlay.write(&file("cpio"))?;
        let (disk, log) = (file("disk"), file("log"));
        if args.save {
            qcow2::create(&disk, DISK)?;
        } else {
            let image = File::create(&disk).with_context(|| disk.display().to_string())?;
            image.set_len(DISK)?;
        }
        File::create(&log).with_context(|| log.display().to_string())?;
        Ok(Self {
            bench,
            name,
            args,
            initrd,
            disk,
            log,
        })
    }

    /// A machine; `number` tells it from others that run at the same time.
    fn machine(&self, number: usize, options: &[&str]) -> Result<Machine> {
        let mut command = Command::new(&self.bench.anykvm);
        command.args(["run", "--backend", "soft", "--", "qemu-system-x86_64"]);
        let ring = if self.args.dirty_ring {
            ",dirty-ring-size=4096"
        } else {
            ""
        };
        let format = if self.args.save { "qcow2" } else { "raw" };
        let clocksource = match self.args.clocksource.as_str() {
            "tsc" => "clocksource=tsc tsc=reliable",
            other => &format!("clocksource={other}"),
        };
        command
            .args([
                "-accel",
                &format!("kvm{ring},kernel-irqchip={}", self.args.irqchip),
            ])
            .args(["-M", &self.args.machine, "-cpu", "host", "-m", "256"])
            .args(["-display", "none"])
            .args(["-vga", "none", "-nic", "none", "-no-reboot"])
            .args(["-smp", &CPUS.to_string()])
            .arg("-drive")
            .arg(format!(
                "if=virtio,format={format},file={}",
                self.disk.display()
            ))
            .args([
                "-append",
                &format!("console=ttyS0 quiet anykvm.task=migrate {clocksource}"),
            ])
            .arg("-kernel")
            .arg(&self.bench.guest().kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(options);
        let socket = self.file(&format!("{number}.qmp"));
        Machine::start(command, &socket, &self.log, LIMIT)
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.bench.folder.join(format!("{}.{extension}", self.name))
    }

    /// A machine whose guest has come to work.
    fn boot(&self) -> Result<Machine> {
        let mut machine = self.machine(0, &[])?;
        machine.wait_for(AT_WORK, 0)?;
        let text = machine.console();
        let console = Console(&text);
        console.require("migrate cpus", &CPUS.to_string())?;
        console.require("migrate clocksource", &self.args.clocksource)?;
        Ok(machine)
    }

    /// Has the guest look at everything once more; what it has said.
    fn end(&self, mut machine: Machine) -> Result<String> {
        machine.type_in("stop\n")?;
        let console = machine.finish()?;
        for file in [&self.disk, &self.initrd] {
            fs::remove_file(file).with_context(|| file.display().to_string())?;
        }
        Ok(console)
    }

    /// From one machine to the next, as often as asked for.
    fn travel(&self) -> Result<String> {
        let mut machine = self.boot()?;
        let mut done = said(&machine.console())?;
        for round in 1..=self.args.rounds {
            let socket = self.file("migration");
            let mut next = self.destination(round, &socket)?;
            let report = if self.args.postcopy {
                self.move_first(&mut machine, &socket)
            } else {
                self.copy_first(&mut machine, &socket)
            }
            .with_context(|| format!("round {round}"))?;
            progress(&format!("{} {round}: {report}", self.name));
            machine.quit()?;
            machine = next_at_work(&mut next, &done)
                .with_context(|| format!("round {round}"))
                .map(|now| {
                    done = now;
                    next
                })?;
        }
        self.end(machine)
    }

    fn destination(&self, round: usize, socket: &Path) -> Result<Machine> {
        let _ = fs::remove_file(socket);
        let mut next = self.machine(round, &["-incoming", "defer"])?;
        self.capabilities(&mut next)?;
        next.qmp
            .execute("migrate-incoming", json!({"uri": uri(socket)}))?;
        Ok(next)
    }

    fn capabilities(&self, machine: &mut Machine) -> Result<()> {
        if self.args.postcopy {
            let on = json!([{"capability": "postcopy-ram", "state": true}]);
            machine
                .qmp
                .execute("migrate-set-capabilities", json!({"capabilities": on}))?;
        }
        Ok(())
    }

    /// Memory first, and what is written meanwhile again; then the guest.
    fn copy_first(&self, machine: &mut Machine, socket: &Path) -> Result<String> {
        // So short a stop is never enough: there will be many passes.
        set(
            machine,
            json!({"downtime-limit": 1, "max-bandwidth": 1_u64 << 30}),
        )?;
        machine
            .qmp
            .execute("migrate", json!({"uri": uri(socket)}))?;
        let mut enough = false;
        let state = wait_for_migration(machine, |machine, state| {
            if !enough && passes(state) > PASSES {
                enough = true;
                set(machine, json!({"downtime-limit": 60_000}))?;
            }
            Ok(())
        })?;
        Ok(format!(
            "{} passes, {} KiB, stopped for {} ms",
            passes(&state),
            number(&state, "/ram/transferred") / 1024,
            number(&state, "/downtime"),
        ))
    }

    /// The guest first.
    fn move_first(&self, machine: &mut Machine, socket: &Path) -> Result<String> {
        self.capabilities(machine)?;
        set(
            machine,
            json!({"downtime-limit": 1, "max-bandwidth": 32_u64 << 20}),
        )?;
        machine
            .qmp
            .execute("migrate", json!({"uri": uri(socket)}))?;
        let mut moved = false;
        let state = wait_for_migration(machine, |machine, state| {
            if !moved && status(state) == "active" {
                machine.qmp.execute("migrate-start-postcopy", json!({}))?;
                moved = true;
            }
            Ok(())
        })?;
        let asked = number(&state, "/ram/postcopy-requests");
        ensure!(asked > 0, "the guest did not wait for any page");
        Ok(format!("waited for {asked} pages"))
    }

    /// Saves, goes on, and loads, in one machine and in a new one.
    fn save_and_load(&self) -> Result<String> {
        let mut machine = self.boot()?;
        for round in 1..=self.args.rounds {
            machine.qmp.monitor("savevm busy")?;
            progress(&format!("{} {round}: saved", self.name));
            let saved = said(&machine.console())?;
            next_at_work(&mut machine, &saved)?;
            if round % 2 == 1 {
                machine.qmp.monitor("loadvm busy")?;
            } else {
                machine.quit()?;
                machine = self.machine(round, &["-loadvm", "busy"])?;
            }
            next_at_work(&mut machine, &saved).with_context(|| format!("round {round}"))?;
            progress(&format!("{} {round}: loaded", self.name));
        }
        self.end(machine)
    }
}

/// Waits until the guest has done more of everything than `before`; how much.
fn next_at_work(machine: &mut Machine, before: &Done) -> Result<Done> {
    let from = machine.console().len();
    let more = |console: &str| {
        let now = console.get(from..).and_then(|new| said(new).ok());
        now.filter(|now| {
            now.pages > before.pages
                && now.blocks > before.blocks
                && now.forks > before.forks
                && now.readings[0] > before.readings[0]
                && now.readings[1] > before.readings[1]
        })
    };
    machine.wait_until("more work", |console| more(console).is_some())?;
    more(&machine.console()).context("the guest is at work")
}

/// What the guest has said last of how much it has done.
fn said(console: &str) -> Result<Done> {
    let end = console.rfind(AT_WORK).context("the guest is not at work")?;
    let value = |key: &str| -> Result<u64> {
        let lines = console[..end].lines().rev();
        let key = format!("anykvm-guest: {key}=0x");
        let text = lines
            .filter_map(|line| line.trim_end().strip_prefix(&key))
            .next()
            .with_context(|| format!("the guest said nothing of {key}"))?;
        Ok(u64::from_str_radix(text, 16)?)
    };
    Ok(Done {
        pages: value("migrate pages")?,
        blocks: value("migrate blocks")?,
        forks: value("migrate forks")?,
        readings: [value("migrate readings 0")?, value("migrate readings 1")?],
    })
}

fn uri(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

fn set(machine: &mut Machine, parameters: Value) -> Result<()> {
    machine.qmp.execute("migrate-set-parameters", parameters)?;
    Ok(())
}

fn status(state: &Value) -> &str {
    state["status"].as_str().unwrap_or_default()
}

fn number(state: &Value, pointer: &str) -> u64 {
    state.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

/// How often the pages that were written have been asked for.
fn passes(state: &Value) -> u64 {
    number(state, "/ram/dirty-sync-count")
}

/// Waits for the end of a migration, and calls `meanwhile` with its state again and again; the last one.
fn wait_for_migration(
    machine: &mut Machine,
    mut meanwhile: impl FnMut(&mut Machine, &Value) -> Result<()>,
) -> Result<Value> {
    let start = Instant::now();
    loop {
        let state = machine.qmp.execute("query-migrate", json!({}))?;
        match status(&state) {
            "completed" => return Ok(state),
            "failed" | "cancelled" | "postcopy-paused" => {
                bail!("the migration has failed: {state}")
            }
            _ if start.elapsed() > LIMIT => bail!("the migration does not end: {state}"),
            _ => meanwhile(machine, &state)?,
        }
        thread::sleep(Duration::from_millis(20));
    }
}
