//! `cargo xtask bench boot`: the same kernel and initramfs to user space and off again.

use std::fmt;

use anyhow::{Context, Result, bail};

use super::{Bench, ENGINES, Engine};
use crate::process::Outcome;

/// Seconds of a boot.
#[derive(Clone, Copy)]
pub struct Time {
    pub engine: Engine,
    pub wall: f64,
    /// Processor time of the whole process.
    pub cpu: f64,
}

/// All boots, and what the last translated one counted.
pub struct Boots {
    pub times: Vec<Time>,
    statistics: String,
}

pub fn measure(bench: &Bench) -> Result<Boots> {
    let mut times: Vec<Time> = Vec::new();
    let mut statistics = String::new();
    for run in 1..=bench.runs {
        for (at, engine) in ENGINES.into_iter().enumerate() {
            let outcome = boot(bench, engine, run)?;
            let time = Time {
                engine,
                wall: outcome.wall.as_secs_f64(),
                cpu: outcome.cpu.as_secs_f64(),
            };
            match times.get_mut(at) {
                Some(best) if best.cpu <= time.cpu => {}
                Some(best) => *best = time,
                None => times.push(time),
            }
            if engine == Engine::Translated {
                statistics = outcome.output;
            }
        }
    }
    Ok(Boots { times, statistics })
}

fn boot(bench: &Bench, engine: Engine, run: u32) -> Result<Outcome> {
    let mut command = bench.machine(engine, "bench", &bench.guest.initramfs, 1)?;
    let outcome = bench.finish(&mut command, &format!("boot {run}, {}", engine.name()))?;
    if !outcome.output.contains("anykvm-guest: task bench done") {
        bail!("{} did not boot to the end", engine.name());
    }
    Ok(outcome)
}

impl Boots {
    /// A counter of the translated boot.
    pub fn counter(&self, name: &str) -> Result<f64> {
        self.statistics
            .split([',', '\n'])
            .filter_map(|part| part.trim().trim_start_matches("anykvm: ").split_once(' '))
            .find(|(found, _)| *found == name)
            .and_then(|(_, value)| value.trim().parse().ok())
            .with_context(|| format!("the statistics have no {name}"))
    }

    /// Nanoseconds it took to translate one instruction of the guest's.
    pub fn translation_ns(&self) -> Result<f64> {
        Ok(self.counter("jit_translation_ns")? / self.counter("jit_block_instructions")?)
    }
}

impl fmt::Display for Boots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<12} {:>10} {:>14}", "boot", "wall", "process time")?;
        for time in &self.times {
            let name = time.engine.name();
            writeln!(f, "{name:<12} {:>8.2} s {:>12.2} s", time.wall, time.cpu)?;
        }
        if let Ok(ns) = self.translation_ns() {
            writeln!(
                f,
                "translation: {ns:.0} ns for an instruction of the guest's"
            )?;
        }
        Ok(())
    }
}
