//! QEMU's control socket (QEMU Machine Protocol): a line of JSON for each command, answer and event.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection that takes commands.
pub struct Qmp {
    answers: BufReader<UnixStream>,
    commands: UnixStream,
}

impl Qmp {
    /// Connects to the socket, which QEMU may be about to make. A command that takes longer than `limit`
    /// fails.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let start = Instant::now();
        let commands = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if start.elapsed() < limit => thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            }
        };
        commands.set_read_timeout(Some(limit))?;
        let mut qmp = Self {
            answers: BufReader::new(commands.try_clone()?),
            commands,
        };
        // The greeting.
        qmp.message()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self
            .answers
            .read_line(&mut line)
            .context("no answer on QEMU's control socket")?;
        if count == 0 {
            bail!("QEMU has closed its control socket");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Runs a command; what it returns. Events are passed over.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        self.commands
            .write_all(format!("{text}\n").as_bytes())
            .with_context(|| format!("{command} on QEMU's control socket"))?;
        loop {
            let mut answer = self.message().with_context(|| command.to_owned())?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// A command of the human monitor, for what has no command here. It must have nothing to say.
    pub fn monitor(&mut self, line: &str) -> Result<()> {
        let answer = self.execute("human-monitor-command", json!({"command-line": line}))?;
        match answer.as_str().map(str::trim) {
            Some("") => Ok(()),
            _ => bail!("{line}: {answer}"),
        }
    }
}
