//! Reads what the guest says on its console: lines `anykvm-guest: key=value` from `tests/guest`.

use anyhow::{Context, Result, bail};

const PREFIX: &str = "anykvm-guest: ";

/// What ends a run at once: nothing good comes after it.
pub const FATAL: &[&str] = &["Kernel panic", "KVM: entry failed", "KVM internal error"];

/// MD5 of 1 MiB of zeroes.
pub const ZEROES: &str = "b6d81b360a5672d80c27430f39153e2c";

/// The guest's console output.
pub struct Console<'a>(pub &'a str);

impl Console<'_> {
    fn lines(&self) -> impl Iterator<Item = &str> {
        self.0
            .lines()
            .filter_map(|line| Some(line.split_once(PREFIX)?.1.trim_end()))
    }

    /// Fails unless the task ran to its end.
    pub fn require_done(&self, task: &str) -> Result<()> {
        if self.lines().any(|line| line == format!("task {task} done")) {
            return Ok(());
        }
        let last = self
            .0
            .lines()
            .map(str::trim_end)
            .rfind(|line| !line.is_empty());
        bail!(
            "the guest did not finish; its last line: {}",
            last.unwrap_or("(none)")
        )
    }

    /// The value the guest gave for `key`.
    pub fn value(&self, key: &str) -> Result<&str> {
        self.lines()
            .filter_map(|line| line.split_once('='))
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
            .with_context(|| format!("the guest said nothing of {key}"))
    }

    /// Fails unless the guest gave this value.
    pub fn require(&self, key: &str, wanted: &str) -> Result<()> {
        let value = self.value(key)?;
        if value != wanted {
            bail!("{key} is {value}, not {wanted}");
        }
        Ok(())
    }
}

/// What every guest must have computed in task `check`, whatever the machine is like.
pub fn require_sound(console: &Console, cpus: usize) -> Result<()> {
    console.require_done("check")?;
    console.require("cpus", &cpus.to_string())?;
    console.require("hypervisor", "KVM")?;
    // and the sum of 1/n^2 up to 10000; md5 of the numbers to 20000
    console.require("md5", ZEROES)?;
    console.require("float", "1.6448340718")?;
    console.require("gzip", "e071f707df7bbeee2a6a1eb48011ddd0")?;
    console.require("forks", "50")?;
    let slept: f64 = console.value("slept")?.parse()?;
    if !(0.9..=2.0).contains(&slept) {
        bail!("a sleep of one second took {slept} s of the guest's clock");
    }
    console.require("trouble", "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "[  1.0] x\r\nanykvm-guest: cpus=2\r\nanykvm-guest: task check done\r\nlast\r\n";

    #[test]
    fn values_are_found_and_compared() {
        let console = Console(TEXT);
        console.require("cpus", "2").unwrap();
        assert!(console.require("cpus", "1").is_err());
        assert!(console.value("other").is_err());
    }

    #[test]
    fn an_unfinished_guest_is_told_by_its_last_line() {
        let console = Console(TEXT);
        console.require_done("check").unwrap();
        let message = console.require_done("disk").err().unwrap().to_string();
        assert!(message.ends_with("last"), "{message}");
    }
}
