//! One program, moved from VM to VM, beside the same program that stays where it is.

use crate::monitor::{Program, Record, Session, Stop};
use crate::state::Saved;
use anyhow::{Context, Result, bail};
use anykvm::Kvm;

/// How a program ends that nobody disturbs.
struct Outcome {
    log: Vec<Record>,
    end: Saved,
}

/// What is done between two parts of a run.
type Pause = fn(&mut Session) -> Result<()>;

/// Runs to the end, cut behind so many turns, and between them `pause`.
fn run(kvm: &Kvm, program: &Program, turns: u64, pause: Pause) -> Result<Outcome> {
    let mut session = Session::new(kvm, program)?;
    while session.advance(turns)? != Stop::End {
        pause(&mut session)?;
    }
    let end = session.save()?;
    Ok(Outcome {
        log: session.log,
        end,
    })
}

fn same_log(a: &[Record], b: &[Record]) -> Result<()> {
    let n = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    if n < a.len() || n < b.len() {
        bail!("exit {n}: {:?}, and {:?}", a.get(n), b.get(n));
    }
    Ok(())
}

fn same_state(a: &Saved, b: &Saved) -> Result<()> {
    match a.difference(b) {
        Some(what) => bail!("{what}"),
        None => Ok(()),
    }
}

/// Runs a program to its end and moves it to a new VM after as many turns as `gap` says each time.
/// Returns how often it was moved. An error is the first difference.
pub fn check(kvm: &Kvm, program: &Program, mut gap: impl FnMut() -> u64) -> Result<u64> {
    let outcome = run(kvm, program, u64::MAX, |_| Ok(()))?;
    let ways: [(_, Pause); 3] = [
        ("cut", |_| Ok(())),
        ("completed", |s| s.complete()),
        ("read", |s| {
            s.complete()?;
            s.save().map(|_| ())
        }),
    ];
    for (way, pause) in ways {
        let cut = run(kvm, program, 1, pause)?;
        same_log(&outcome.log, &cut.log)
            .with_context(|| format!("exits undisturbed, and {way}"))?;
        same_state(&outcome.end, &cut.end)
            .with_context(|| format!("at the end undisturbed, and {way}"))?;
    }
    let mut still = Session::new(kvm, program)?;
    let mut moving = Session::new(kvm, program)?;
    let mut moves = 0;
    loop {
        let turns = gap();
        let at = |what: &str| format!("{what}, move {moves} ({turns} turns)");
        let stops = (still.advance(turns)?, moving.advance(turns)?);
        same_log(&still.log, &moving.log).with_context(|| at("exits after moving"))?;
        if stops.0 == Stop::End {
            break;
        }
        still.complete()?;
        moving.complete()?;
        let state = moving.save()?;
        same_state(&still.save()?, &state).with_context(|| at("not moved, and moved"))?;
        moving.move_to_new(&state).with_context(|| at("moving"))?;
        same_state(&state, &moving.save()?).with_context(|| at("read, and read back"))?;
        moves += 1;
    }
    same_log(&outcome.log, &moving.log).context("exits undisturbed, and moved")?;
    same_state(&outcome.end, &moving.save()?).context("at the end undisturbed, and moved")?;
    Ok(moves)
}
