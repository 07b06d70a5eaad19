//! `cargo xtask bench work`: `tests/guest/programs/work.c` on the host and in guests, side by side.

use std::collections::BTreeMap;
use std::fmt;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Bench, ENGINES, times};

/// Nanoseconds of each kind of work.
type Times = BTreeMap<String, f64>;

/// One kind of work.
pub struct Kind {
    pub name: String,
    /// Milliseconds on the host.
    pub native: f64,
    /// How many times as long it takes under each of [`ENGINES`].
    pub ratios: [f64; 3],
}

pub struct Work(pub Vec<Kind>);

/// The columns are measured in turn, and the fastest run of each kind counts.
pub fn measure(bench: &Bench) -> Result<Work> {
    let mut native = Times::new();
    let mut engines: [Times; 3] = Default::default();
    for run in 1..=bench.runs {
        let outcome = bench.finish(&mut Command::new(&bench.work), &format!("work {run}, host"))?;
        merge(&mut native, times(&outcome));
        for (column, engine) in engines.iter_mut().zip(ENGINES) {
            let mut command = bench.machine(engine, "work", &bench.initramfs, 1)?;
            let outcome = bench.finish(&mut command, &format!("work {run}, {}", engine.name()))?;
            merge(column, times(&outcome));
        }
    }
    if native.is_empty() {
        bail!("the program has measured nothing");
    }
    let kind = |(name, time): (&String, &f64)| {
        let mut ratios = [0.0; 3];
        for (ratio, column) in ratios.iter_mut().zip(&engines) {
            *ratio = column.get(name).context("a kind is missing")? / time;
        }
        Ok(Kind {
            name: name.clone(),
            native: time / 1e6,
            ratios,
        })
    };
    native.iter().map(kind).collect::<Result<_>>().map(Work)
}

fn merge(best: &mut Times, found: impl Iterator<Item = (String, f64)>) {
    for (kind, time) in found {
        let entry = best.entry(kind).or_insert(f64::INFINITY);
        *entry = entry.min(time);
    }
}

impl Work {
    /// The geometric means of the columns.
    pub fn means(&self) -> [f64; 3] {
        let mean = |at: usize| {
            let sum: f64 = self.0.iter().map(|kind| kind.ratios[at].ln()).sum();
            (sum / self.0.len() as f64).exp()
        };
        [mean(0), mean(1), mean(2)]
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<16} {:>10}", "kind of work", "host, ms")?;
        for engine in ENGINES {
            write!(f, " {:>12}", engine.name())?;
        }
        writeln!(f)?;
        for kind in &self.0 {
            write!(f, "{:<16} {:>10.2}", kind.name, kind.native)?;
            for ratio in kind.ratios {
                write!(f, " {ratio:>11.2}x")?;
            }
            writeln!(f)?;
        }
        write!(f, "{:<16} {:>10}", "geometric mean", "")?;
        for mean in self.means() {
            write!(f, " {mean:>11.2}x")?;
        }
        writeln!(f)
    }
}
