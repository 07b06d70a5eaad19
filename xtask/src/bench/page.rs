//! `docs/benchmarks.md` and `docs/benchmarks.svg`: all measurements, from one run.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result};

use super::boot::{self, Boots};
use super::coverage;
use super::pair::{self, Pairs};
use super::work::{self, Work};
use super::{Bench, ENGINES, chart, exits};
use crate::{progress, workspace};

/// Measures everything and writes the page and its chart.
pub fn write(bench: &Bench) -> Result<()> {
    let exits = exits()?;
    let work = work::measure(bench)?;
    let boots = boot::measure(bench)?;
    let pairs = pair::measure(bench)?;
    let coverage = coverage::measure(bench)?;
    print!("{work}\n{boots}\n{coverage}\n{pairs}\n{exits}");
    let docs = workspace().join("docs");
    for (name, text) in [
        ("benchmarks.md", page(&work, &boots, &pairs, &exits)?),
        ("benchmarks.svg", chart::draw(&work)),
    ] {
        let path = docs.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        progress(&format!("wrote {}", path.display()));
    }
    coverage.write()
}

fn page(work: &Work, boots: &Boots, pairs: &Pairs, exits: &str) -> Result<String> {
    let mut text = String::from(
        "# Benchmarks\n\n<!-- Written by cargo xtask bench. -->\n\n\
         Everything on this page was measured in one run of\n\n    cargo xtask bench\n\n",
    );
    let (processor, cores) = machine()?;
    writeln!(
        text,
        "on {processor}, {cores} processors. Guests have 256 MiB, Debian's kernel and one processor, unless \
         another\nnumber is said; QEMU's TCG gets the same kernel and programs (`-M microvm -cpu max`). The \
         fastest of several\nruns counts.\n"
    )?;
    text.push_str("## Twelve kinds of work\n\n");
    text.push_str(
        "How many times as long as on the host itself (`tests/guest/programs/work.c`).\n\n\
         ![The table as a chart](benchmarks.svg)\n\n| kind of work | host |",
    );
    for engine in ENGINES {
        write!(text, " {} |", engine.name())?;
    }
    text.push_str("\n|---|---:|---:|---:|---:|\n");
    for kind in &work.0 {
        write!(text, "| {} | {:.2} ms |", kind.name, kind.native)?;
        for ratio in kind.ratios {
            write!(text, " {ratio:.2} |")?;
        }
        text.push('\n');
    }
    text.push_str("| **geometric mean** | |");
    for mean in work.means() {
        write!(text, " **{mean:.2}** |")?;
    }
    text.push_str("\n\n## Booting\n\nA kernel with its initramfs to user space and off again.\n\n");
    text.push_str("| | wall time | processor time |\n|---|---:|---:|\n");
    for t in &boots.times {
        let name = t.engine.name();
        writeln!(text, "| {name} | {:.2} s | {:.2} s |", t.wall, t.cpu)?;
    }
    writeln!(
        text,
        "\nTranslating took {:.0} ns for an instruction of the guest's: {:.0} ms for the {:.0} instructions that \
         were\ntranslated in this boot, {:.1} MiB of code. Beside guest RAM the processor held {:.1} MiB, \
         and the VM {:.1} MiB.\n",
        boots.translation_ns()?,
        boots.counter("jit_translation_ns")? / 1e6,
        boots.counter("jit_block_instructions")?,
        boots.counter("jit_code_bytes")? / f64::from(1 << 20),
        boots.counter("engine_memory_bytes")? / f64::from(1 << 20),
        boots.counter("vm_engine_memory_bytes")? / f64::from(1 << 20),
    )?;
    text.push_str(
        "## Two processors\n\nTwo processes that do the same side by side, on one processor and on two.\n\n\
         | | one | two | gain |\n|---|---:|---:|---:|\n",
    );
    for p in &pairs.0 {
        writeln!(
            text,
            "| {} | {:.2} s | {:.2} s | {:.2} |",
            p.name,
            p.one,
            p.two,
            p.gain()
        )?;
    }
    writeln!(
        text,
        "\n## Exits\n\nNanoseconds from a guest to its monitor and back, through the Rust API; and for a vCPU's state, through \
         the ioctls\nof an unmodified program (`benches/programs/state.c`).\n"
    )?;
    for line in exits.lines() {
        writeln!(text, "    {line}")?;
    }
    Ok(text)
}

/// The processor's name and how many there are.
fn machine() -> Result<(String, usize)> {
    let info = fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let names = info
        .lines()
        .filter(|line| line.starts_with("model name"))
        .filter_map(|line| line.split_once(':'));
    let name = names
        .clone()
        .next()
        .map_or("an x86-64 processor", |n| n.1.trim());
    Ok((name.to_owned(), names.count().max(1)))
}
