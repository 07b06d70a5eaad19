//! `cargo xtask bench pair`: what a second processor is good for. Two processes do the same work side
//! by side in a guest with one processor and in one with two.

use std::fmt;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Bench, Engine, times};
use crate::process::Outcome;

/// Seconds on one processor and on two.
pub struct Pair {
    pub name: &'static str,
    pub one: f64,
    pub two: f64,
}

impl Pair {
    /// How many times as fast two are.
    pub fn gain(&self) -> f64 {
        self.one / self.two
    }
}

pub struct Pairs(pub Vec<Pair>);

pub fn measure(bench: &Bench) -> Result<Pairs> {
    let mut pairs = vec![Pair {
        name: "native",
        one: best(bench, |_| {
            let mut command = Command::new("taskset");
            command.args(["-c", "0"]).arg(&bench.work).arg("pair");
            bench.finish(&mut command, "pair, host, 1")
        })?,
        two: best(bench, |_| {
            bench.finish(Command::new(&bench.work).arg("pair"), "pair, host, 2")
        })?,
    }];
    for engine in [Engine::Tcg, Engine::Translated] {
        let machine = |cpus: u32| {
            best(bench, |run| {
                let mut command = bench.machine(engine, "pair", &bench.initramfs, cpus)?;
                let name = format!("pair {run}, {}, {cpus}", engine.name());
                bench.finish(&mut command, &name)
            })
        };
        pairs.push(Pair {
            name: engine.name(),
            one: machine(1)?,
            two: machine(2)?,
        });
    }
    Ok(Pairs(pairs))
}

/// Seconds of the fastest run.
fn best(bench: &Bench, run: impl Fn(u32) -> Result<Outcome>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for number in 1..=bench.runs {
        let (_, time) = times(&run(number)?)
            .find(|(kind, _)| kind == "pair")
            .context("the program has measured nothing")?;
        best = best.min(time / 1e9);
    }
    Ok(best)
}

impl fmt::Display for Pairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<12} {:>10} {:>10}", "processors", "1", "2")?;
        for p in &self.0 {
            let gain = p.gain();
            writeln!(
                f,
                "{:<12} {:>8.2} s {:>8.2} s {gain:>6.2}x",
                p.name, p.one, p.two
            )?;
        }
        Ok(())
    }
}
