//! gdb and QEMU's gdbstub: breakpoints, watchpoints and single-steps in a running Linux kernel, which uses debug registers
//! itself (`tests/guest/gdb.py`, `tests/guest/tasks/debugged`).

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::console::{Console, require_sound};
use super::qemu::{self, Irqchip};
use super::{Bench, Needs, Test};
use crate::guest::{self, Overlay};
use crate::{process, workspace};

const LIMIT: Duration = Duration::from_secs(600);

pub fn tests() -> Vec<Test> {
    vec![Test {
        name: "gdb".to_owned(),
        cpus: 2,
        limit: LIMIT,
        needs: Needs::Qemu,
        body: Box::new(session),
    }]
}

fn session(bench: &Bench, test: &Test) -> Result<()> {
    guest::require_gdb()?;
    let mut overlay = Overlay::new(bench.guest());
    overlay.compiled("debugged", 64)?;
    let initrd = overlay.write(&bench.file(test, "cpio"))?;
    let socket = bench.file(test, "socket");
    let _ = fs::remove_file(&socket);
    let mut command = qemu::machine(bench, "q35", Irqchip::On);
    command
        .args(["-m", "512", "-smp", "2", "-nic", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-monitor", "none"])
        .args(["-append", "console=ttyS0 nokaslr anykvm.task=debugged"])
        .args([
            "-gdb".to_owned(),
            format!("unix:path={},server=on,wait=off", socket.display()),
        ])
        .arg("-kernel")
        .arg(&bench.guest().kernel)
        .arg("-initrd")
        .arg(&initrd);
    thread::scope(|scope| {
        let machine = scope.spawn(|| qemu::run(bench, test, &mut command));
        let debugged = debug(bench, test, &socket, || machine.is_finished());
        let outcome = machine.join().expect("a test's thread does not panic");
        debugged?;
        let outcome = outcome?;
        let console = Console(&outcome.output);
        for when in ["debugged", "debugged after"] {
            console.require(&format!("{when} hits"), "0x000000000000000a")?;
        }
        require_sound(&console, test.cpus)
    })
}

/// Waits until the guest is at work, and starts gdb.
fn debug(bench: &Bench, test: &Test, socket: &Path, gone: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    let console = loop {
        let console = fs::read(bench.log(test)).unwrap_or_default();
        let console = String::from_utf8_lossy(&console).into_owned();
        if console.contains("debugger may come") {
            break console;
        }
        if gone() || start.elapsed() > test.limit {
            bail!("the guest did not get to work");
        }
        thread::sleep(Duration::from_millis(100));
    };
    let symbols: String = console
        .lines()
        .filter_map(|line| Some(line.split_once("anykvm-guest: symbol ")?.1.trim_end()))
        .flat_map(|line| [line, "\n"])
        .collect();
    let file = bench.file(test, "symbols");
    fs::write(&file, symbols).with_context(|| file.display().to_string())?;
    let script = workspace().join("tests/guest/gdb.py");
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-x"]).arg(script).env(
        "ANYKVM_GDB",
        format!("{},{}", socket.display(), file.display()),
    );
    let log = bench.file(test, "gdb.log");
    let outcome = process::run(&mut gdb, &log, test.limit, &["gdb: wrong"])
        .with_context(|| format!("gdb, see {}", log.display()))?;
    ensure!(
        outcome.output.contains("gdb: all done"),
        "gdb did not get to the end, see {}",
        log.display()
    );
    Ok(())
}
