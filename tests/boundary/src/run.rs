//! One program, moved from VM to VM, beside the same program that stays where it is.

use crate::monitor::{Part, Program, Record, Session, Stop};
use crate::state::Saved;
use anyhow::{Context, Result, bail};
use anykvm::{Kvm, TranslationMode};

/// How a program ends that nobody disturbs.
struct Outcome {
    log: Vec<Record>,
    end: Saved,
}

/// What is done between two parts of a run.
type Pause = fn(&mut Session) -> Result<()>;

/// Runs to the end, cut behind such parts, and between them `pause`.
fn run(
    kvm: &Kvm,
    program: &Program,
    engine: TranslationMode,
    part: Part,
    pause: Pause,
) -> Result<Outcome> {
    let mut session = Session::new(kvm, program, engine)?;
    while session.advance(part)? != Stop::End {
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

fn same_outcome(a: &Outcome, b: &Outcome, way: &str) -> Result<()> {
    same_log(&a.log, &b.log).with_context(|| format!("exits undisturbed, and {way}"))?;
    same_state(&a.end, &b.end).with_context(|| format!("at the end undisturbed, and {way}"))
}

/// Runs a program to its end, interpreted and translated, in one piece and cut in ways that must not be noticed.
fn check_cuts(kvm: &Kvm, program: &Program) -> Result<Outcome> {
    use TranslationMode::{Always, Off};
    let one = Part::Turns(1);
    let outcome = run(kvm, program, Off, Part::ALL, |_| Ok(()))?;
    let ways: [(_, _, _, Pause); 5] = [
        ("translated", Always, Part::ALL, |_| Ok(())),
        ("cut", Off, one, |_| Ok(())),
        ("completed", Off, Part::Turns(3), |s| s.complete()),
        ("read", Off, Part::Turns(7), |s| {
            s.complete()?;
            s.save().map(|_| ())
        }),
        ("translated and cut", Always, one, |_| Ok(())),
    ];
    for (way, engine, part, pause) in ways {
        let other = run(kvm, program, engine, part, pause)?;
        same_outcome(&outcome, &other, way)?;
    }
    Ok(outcome)
}

/// Runs a program to its end and moves it to a new VM after parts of as many instructions as `gap` says each
/// time, by how often it has been moved. What moves is interpreted, and the parts are turns; or translated, and compared with the interpreter.
/// Returns how often it was moved. An error is the first difference.
pub fn check(
    kvm: &Kvm,
    program: &Program,
    engine: TranslationMode,
    mut gap: impl FnMut(u64) -> u64,
) -> Result<u64> {
    let outcome = check_cuts(kvm, program)?;
    let mut still = Session::new(kvm, program, TranslationMode::Off)?;
    let mut moving = Session::new(kvm, program, engine)?;
    let mut moves = 0;
    loop {
        let part = match engine {
            TranslationMode::Off => Part::Turns(gap(moves)),
            _ => Part::Instructions(gap(moves)),
        };
        let at = |what: &str| format!("{engine:?}, {what}, move {moves} ({part:?})");
        let stops = (still.advance(part)?, moving.advance(part)?);
        same_log(&still.log, &moving.log).with_context(|| at("exits after moving"))?;
        if stops.0 == Stop::End {
            break;
        }
        still.complete()?;
        moving.complete()?;
        if moving.reads_clock()? {
            continue;
        }
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
