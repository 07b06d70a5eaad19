//! One QEMU that is controlled while its guest runs: its console as it comes, a keyboard, and the control
//! socket.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::console::FATAL;
use crate::qmp::Qmp;

/// What the guest says when something was lost.
const WRONG: &str = "anykvm-guest: wrong";

/// A running QEMU; ended when dropped.
pub struct Machine {
    child: Child,
    keyboard: Option<ChildStdin>,
    console: Arc<Mutex<Vec<u8>>>,
    pub qmp: Qmp,
    socket: PathBuf,
    log: PathBuf,
    limit: Duration,
}

impl Machine {
    /// Starts `command`, a QEMU, with its serial port here. What it prints is added to the file `log`.
    /// `limit`: for everything that is waited for.
    pub fn start(mut command: Command, socket: &Path, log: &Path, limit: Duration) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let (reader, writer) = std::io::pipe()?;
        let mut file = OpenOptions::new().create(true).append(true).open(log)?;
        command
            .args(["-serial", "stdio", "-monitor", "none", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        writeln!(file, "# {command:?}")?;
        let child = command
            .stdin(Stdio::piped())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let console = Arc::new(Mutex::new(Vec::new()));
        collect(reader, file, console.clone());
        // The command keeps its copies of the pipe's writing end until it is dropped.
        drop(command);
        let mut child = Ended(Some(child));
        let qmp = Qmp::connect(socket, limit)?;
        let mut child = child.0.take().context("it was started")?;
        Ok(Self {
            keyboard: child.stdin.take(),
            child,
            console,
            qmp,
            socket: socket.to_path_buf(),
            log: log.to_path_buf(),
            limit,
        })
    }

    /// Everything it has printed.
    pub fn console(&self) -> String {
        let console = self.console.lock().unwrap();
        String::from_utf8_lossy(&console).into_owned()
    }

    /// Waits for words on the console, from this many bytes on.
    pub fn wait_for(&mut self, words: &str, from: usize) -> Result<()> {
        self.wait_until(words, |console| {
            console.get(from..).is_some_and(|new| new.contains(words))
        })
    }

    /// Waits until `done` says so of the console, unless something is wrong first.
    pub fn wait_until(&mut self, what: &str, done: impl Fn(&str) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let console = self.console();
            self.require_sound(&console)?;
            if done(&console) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("QEMU ended with {status} before '{what}'");
            }
            if start.elapsed() > self.limit {
                self.describe();
                bail!("no '{what}' after {} s", self.limit.as_secs());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Adds to the log what the machine's processors are at, several times.
    fn describe(&mut self) {
        let Ok(mut log) = OpenOptions::new().append(true).open(&self.log) else {
            return;
        };
        for _ in 0..3 {
            for command in [
                "info status",
                "info registers -a",
                "info lapic 0",
                "info lapic 1",
            ] {
                let answer = self
                    .qmp
                    .execute("human-monitor-command", json!({"command-line": command}));
                let text = match &answer {
                    Ok(answer) => answer.as_str().unwrap_or_default().to_owned(),
                    Err(error) => format!("{error:#}"),
                };
                // It is an addition to a failure that is reported anyway.
                let _ = writeln!(log, "# {command}\n{text}");
            }
            thread::sleep(Duration::from_secs(1));
        }
    }

    fn require_sound(&self, console: &str) -> Result<()> {
        for words in FATAL.iter().copied().chain([WRONG]) {
            if let Some(line) = console.lines().find(|line| line.contains(words)) {
                // What follows is worth having.
                thread::sleep(Duration::from_millis(300));
                bail!("the guest said '{}'", line.trim_end());
            }
        }
        Ok(())
    }

    /// Types at the guest.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        let keyboard = self.keyboard.as_mut().context("no keyboard")?;
        Ok(keyboard.write_all(text.as_bytes())?)
    }

    /// Waits for its end, which must be a good one; what it has printed.
    pub fn finish(mut self) -> Result<String> {
        let start = Instant::now();
        let status = loop {
            self.require_sound(&self.console())?;
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if start.elapsed() > self.limit {
                bail!("no end after {} s", self.limit.as_secs());
            }
            thread::sleep(Duration::from_millis(50));
        };
        if !status.success() {
            bail!("QEMU ended with {status}");
        }
        Ok(self.console())
    }

    /// Ends it.
    pub fn quit(mut self) -> Result<()> {
        self.qmp.execute("quit", json!({}))?;
        self.finish().map(|_| ())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// A program that is not to outlive a failure.
struct Ended(Option<Child>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn collect(mut reader: std::io::PipeReader, mut file: File, console: Arc<Mutex<Vec<u8>>>) {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            // A full disk must not stop the program that is watched.
            let _ = file.write_all(&buffer[..count]);
            console.lock().unwrap().extend_from_slice(&buffer[..count]);
        }
    });
}
