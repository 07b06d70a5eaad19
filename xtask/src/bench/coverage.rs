//! `cargo xtask bench coverage`: how many of a guest's instructions translated code executes, in a boot and
//! in each kind of work. The monitor counts them, and the guest makes marks in between.

use std::fmt;
use std::fs;

use anyhow::{Context, Result, bail};

use super::Bench;
use crate::{progress, workspace};

/// What comes in front of and behind the table in `docs/benchmarks.md`.
const BEGIN: &str = "<!-- Written by cargo xtask bench coverage. -->\n";
const END: &str = "<!-- End of what cargo xtask bench coverage writes. -->\n";

/// Instructions of a stretch of the guest's life.
pub struct Part {
    pub name: String,
    pub all: u64,
    pub translated: u64,
}

impl Part {
    /// Percent.
    pub fn share(&self) -> f64 {
        self.translated as f64 * 100.0 / self.all.max(1) as f64
    }
}

/// The boot, then the kinds of work.
pub struct Coverage(pub Vec<Part>);

/// A mark: instructions up to there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mark {
    all: u64,
    translated: u64,
}

impl Mark {
    fn since(self, before: Self, name: String) -> Part {
        Part {
            name,
            all: self.all - before.all,
            translated: self.translated - before.translated,
        }
    }
}

/// The counts in the line that the monitor prints for something.
fn mark(output: &str, what: &str) -> Result<Mark> {
    let start = format!("anykvm: {what}: ");
    let line = output.lines().find_map(|l| l.split_once(&start));
    let read = || {
        let (_, line) = line?;
        let counts = line.rsplit_once("counted, ")?.1;
        let (translated, rest) = counts.split_once(" of ")?;
        Some(Mark {
            translated: translated.parse().ok()?,
            all: rest.split_once(' ')?.0.parse().ok()?,
        })
    };
    read().with_context(|| format!("the monitor has not counted up to: {what}"))
}

/// Boots, works, and reads the marks.
pub fn measure(bench: &Bench) -> Result<Coverage> {
    let mut command = bench.counting("coverage");
    let outcome = bench.finish(&mut command, "coverage")?;
    let mut parts = vec![
        mark(&outcome.output, "boot to user space")?
            .since(Mark::default(), "boot to user space".to_owned()),
    ];
    for (n, (kind, _)) in super::times(&outcome).enumerate() {
        let before = mark(&outcome.output, &format!("mark {}", 2 + 2 * n))?;
        let behind = mark(&outcome.output, &format!("mark {}", 3 + 2 * n))?;
        parts.push(behind.since(before, kind));
    }
    if parts.len() == 1 {
        bail!("the program has done nothing");
    }
    if mark(&outcome.output, &format!("mark {}", 2 * parts.len())).is_ok() {
        bail!("the program has done more than it says, so marks belong to other kinds of work");
    }
    Ok(Coverage(parts))
}

impl Coverage {
    /// The part of the page that is about it.
    pub fn section(&self) -> String {
        let mut text = format!(
            "## What is translated\n\n{BEGIN}\nHow many of the guest's instructions translated code executed, the \
             rest being interpreted: a boot of\nDebian's kernel, and each kind of work with what the kernel did \
             meanwhile.\n\n| | instructions | translated |\n|---|---:|---:|\n"
        );
        for part in &self.0 {
            text.push_str(&format!(
                "| {} | {:.1} million | {:.3} % |\n",
                part.name,
                part.all as f64 / 1e6,
                part.share()
            ));
        }
        text + "\n" + END
    }

    /// Puts it in the place of what the page says now.
    pub fn write(&self) -> Result<()> {
        let path = workspace().join("docs/benchmarks.md");
        let page = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let section = self.section();
        let heading = section.split_once(BEGIN).map_or("", |(heading, _)| heading);
        let parts = page
            .split_once(&format!("{heading}{BEGIN}"))
            .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
        let new = match parts {
            Some((before, behind)) => format!("{before}{section}{behind}"),
            None => format!("{page}\n{section}"),
        };
        fs::write(&path, new).with_context(|| path.display().to_string())?;
        progress(&format!("wrote {}", path.display()));
        Ok(())
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<20} {:>16} {:>14} {:>12}",
            "", "instructions", "interpreted", "translated"
        )?;
        for part in &self.0 {
            writeln!(
                f,
                "{:<20} {:>16} {:>14} {:>10.3} %",
                part.name,
                part.all,
                part.all - part.translated,
                part.share()
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read() {
        let output = "x\r\nanykvm: mark 4: 2.50 s, 2.00 s of processor time, 150.0 million instructions counted, \
                      149 of 150 translated (99.333 %)\n";
        let found = mark(output, "mark 4").unwrap();
        let wanted = Mark {
            all: 150,
            translated: 149,
        };
        assert_eq!(found, wanted);
        assert!(mark(output, "mark 5").is_err());
    }
}
