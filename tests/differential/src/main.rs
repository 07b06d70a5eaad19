//! `cargo xtask diff`: see the library.

use anyhow::{Context, Result, bail};
use anykvm_differential::case::Case;
use anykvm_differential::features::Features;
use anykvm_differential::generate::{Generator, Wanted};
use anykvm_differential::host::{self, BATCH};
use anykvm_differential::run::{Account, Engines, Verdict};
use anykvm_differential::{interpreter, text, tolerated};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Random instructions on the host's processor, interpreted and translated: every result is compared.
#[derive(Parser)]
#[command(name = "cargo xtask diff", bin_name = "cargo xtask diff")]
struct Args {
    /// How many cases
    #[arg(long, default_value_t = 10_000_000)]
    cases: u64,
    /// Another seed gives other cases
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only instructions whose code, mnemonic or CPUID feature has this name (a * at the end: begins
    /// with it)
    #[arg(long)]
    only: Option<String>,
    /// 64 or 32; both if it is not given
    #[arg(long, default_value_t = 0)]
    bits: u32,
    /// Run the case in this file instead
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Where failing cases are written
    #[arg(long, default_value = "target/differential")]
    folder: PathBuf,
    /// Stop once this many different failures are found
    #[arg(long, default_value_t = 20)]
    failures: usize,
    /// Print which encodings no case had
    #[arg(long)]
    coverage: bool,
}

fn main() -> ExitCode {
    match perform(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("diff: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(args: &Args) -> Result<bool> {
    if let Some(what) = host::missing() {
        println!("nothing was compared: this host has no {what}");
        return Ok(true);
    }
    interpreter::keep_panics_quiet();
    let mut engines = Engines::new().context("cannot make the engines")?;
    match &args.replay {
        Some(file) => replay(&mut engines, file),
        None => compare(&mut engines, args),
    }
}

fn replay(engines: &mut Engines, file: &Path) -> Result<bool> {
    let source = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let case = text::parse(&source).with_context(|| file.display().to_string())?;
    print!("{}", text::print(&case));
    let verdict = engines.run(std::slice::from_ref(&case)).pop();
    let (list, same) = match verdict {
        Some(Verdict::Different(list)) => (list, false),
        Some(Verdict::Undefined(list)) => (list, true),
        Some(Verdict::Tolerated(name)) => {
            println!("# tolerated: {name}");
            return Ok(true);
        }
        _ => (Vec::new(), true),
    };
    for d in &list {
        println!("# {d}");
    }
    println!("# {}", if same { "the same" } else { "DIFFERENT" });
    Ok(same)
}

fn compare(engines: &mut Engines, args: &Args) -> Result<bool> {
    if !matches!(args.bits, 0 | 32 | 64) {
        bail!("--bits is 32 or 64");
    }
    let wanted = Wanted {
        bits: args.bits,
        only: args.only.clone(),
    };
    let features = Features::new(engines.interpreter.cpuid());
    let mut generator = Generator::new(features, engines.components, &wanted, args.seed);
    if generator.is_empty() {
        bail!("no instruction has that name");
    }
    let mut account = Account::default();
    let start = Instant::now();
    let mut told = 0;
    while account.cases < args.cases && account.failures.len() < args.failures {
        let count = (args.cases - account.cases).min(BATCH as u64);
        let cases: Vec<Case> = (0..count).map(|_| generator.case()).collect();
        let verdicts = engines.run(&cases);
        account.enter(engines, &cases, verdicts);
        let seconds = start.elapsed().as_secs();
        if seconds >= told + 30 {
            told = seconds;
            eprintln!(
                "{seconds} s: {} cases, {} different failures",
                account.cases,
                account.failures.len()
            );
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    report(args, engines, &account, &generator, seconds)?;
    Ok(account.failures.is_empty())
}

fn report(
    args: &Args,
    engines: &Engines,
    account: &Account,
    generator: &Generator,
    seconds: f64,
) -> Result<()> {
    for (name, failure) in &account.failures {
        println!("\n--- {name} ({} times)\n{}", failure.count, failure.text());
        let file = args
            .folder
            .join(format!("{}.case", name.replace(' ', "-").to_lowercase()));
        std::fs::create_dir_all(&args.folder)?;
        std::fs::write(&file, failure.text()).with_context(|| file.display().to_string())?;
        println!("again: cargo xtask diff --replay {}", file.display());
    }
    let codes: Vec<_> = generator.codes().collect();
    let (seen, unseen): (Vec<_>, Vec<_>) =
        codes.iter().partition(|c| account.codes.contains_key(c));
    if args.coverage {
        for (bits, code) in &unseen {
            println!("no case of {code:?} in {bits}-bit code");
        }
    }
    for (what, why) in &generator.excluded {
        println!("left out: {why:>9}  {what}");
    }
    for (name, count) in &account.tolerated {
        let rule = tolerated::TOLERATED.iter().find(|t| t.name == *name);
        println!(
            "tolerated: {count:>7}  {name}: {}",
            rule.map_or("", |r| r.reason)
        );
    }
    for long in [false, true] {
        let ends = engines.ends.iter().filter(|((l, _), _)| *l == long);
        let ends: Vec<_> = ends
            .map(|((_, end), count)| format!("{end} {count}"))
            .collect();
        let length = if long { "several instructions" } else { "one" };
        println!("ends of cases of {length}: {}", ends.join(", "));
    }
    for (name, count) in &account.undefined {
        println!("undefined flags: {count:>5}  {name}");
    }
    println!(
        "{} cases of {} encodings ({} had none) in {seconds:.1} s, {:.1} µs each; seed {}",
        account.cases,
        seen.len(),
        unseen.len(),
        seconds * 1e6 / account.cases.max(1) as f64,
        args.seed
    );
    println!("{} different failures", account.failures.len());
    Ok(())
}
