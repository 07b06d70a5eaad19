//! Many programs, moved many times.

use crate::{programs, run};
use anyhow::{Result, bail};
use anykvm::{Kvm, TranslationMode};
use anykvm_differential::random::Random;
use std::time::Instant;

/// What to run.
pub struct Campaign {
    /// How many moves.
    pub points: u64,
    /// Another seed gives other programs.
    pub seed: u64,
    /// Only families whose names contain this.
    pub filter: Option<String>,
    /// Stop after so many failures.
    pub failures: u64,
}

/// What came of it.
#[derive(Default)]
pub struct Summary {
    /// Programs that ran.
    pub programs: u64,
    /// Moves.
    pub points: u64,
    /// Programs that were not the same, with the first difference.
    pub failures: Vec<String>,
}

/// Makes programs of all families in turn until there were enough moves. Every second program of a family
/// is translated. Two of four are moved after each turn or instruction, the others now and then; none so often that
/// there are not two of each family.
pub fn run(campaign: &Campaign) -> Result<Summary> {
    let kvm = Kvm::new()?;
    let wanted = |name: &str| campaign.filter.as_ref().is_none_or(|f| name.contains(f));
    let families: Vec<_> = programs::FAMILIES
        .iter()
        .filter(|f| wanted(f.name))
        .collect();
    if families.is_empty() {
        bail!("no program has that name");
    }
    let mut done = Summary::default();
    let (start, mut told) = (Instant::now(), 0);
    let share = (campaign.points / (2 * families.len() as u64)).max(20);
    for round in 0.. {
        for family in &families {
            let seed = campaign.seed.wrapping_mul(1_000_000).wrapping_add(round);
            let program = (family.make)(&kvm, &mut Random::new(seed, 0))?;
            let mut random = Random::new(seed, 1);
            let most = if round % 4 < 2 {
                1
            } else {
                1 << random.below(8)
            };
            done.programs += 1;
            let engine = if round % 2 == 1 {
                TranslationMode::Always
            } else {
                TranslationMode::Off
            };
            let mut begun = false;
            let gap = |moves| match moves {
                // Not always its beginning.
                0 if !std::mem::replace(&mut begun, true) => 1 + random.below(2000),
                _ if moves < share => 1 + random.below(most),
                _ => u64::MAX,
            };
            match run::check(&kvm, &program, engine, gap) {
                Ok(moves) => done.points += moves,
                Err(error) => done
                    .failures
                    .push(format!("{} {seed}: {error:#}", family.name)),
            }
            let seconds = start.elapsed().as_secs();
            if seconds >= told + 30 {
                told = seconds;
                let failures = done.failures.len();
                eprintln!("{seconds} s: {} moves, {failures} failures", done.points);
            }
            if done.points >= campaign.points || done.failures.len() as u64 >= campaign.failures {
                return Ok(done);
            }
        }
    }
    Ok(done)
}
