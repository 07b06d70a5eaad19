//! The project's chores: `cargo xtask demo | test | stress | migrate | signals | selftests | kvm-ioctls | crates |
//! bench | diff | boundary | fuzz | docs | golden`.

#![forbid(unsafe_code)]

mod bench;
mod boundary;
mod build;
mod crate_tests;
mod demo;
mod diff;
mod e2e;
mod fuzz;
mod guest;
mod process;
mod qmp;
mod selftests;
mod signals;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::LazyLock;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot Debian's kernel to a shell in the built-in VMM, from nothing
    Demo(demo::DemoArgs),
    /// Run all tests, or those whose names contain one of the given words
    Test(e2e::TestArgs),
    /// Run stress-ng on four processors, each stressor for a given time
    Stress(e2e::StressArgs),
    /// Move a busy guest from one QEMU to another and back, or save and load it
    Migrate(e2e::MigrateArgs),
    /// Kick vCPU threads a million times, in every way a monitor has
    Signals(signals::SignalArgs),
    /// Run the tests of the crate kvm-ioctls
    KvmIoctls,
    /// Run the tests of published crates that use /dev/kvm: kvm-ioctls, and parts of monitors
    Crates(crate_tests::CrateArgs),
    /// Run KVM's own test programs
    Selftests(selftests::SelftestArgs),
    /// Measure; without a word what, everything, and write docs/benchmarks.md and docs/benchmarks.svg
    Bench(bench::BenchArgs),
    /// Compare random instructions with the host's processor
    Diff(diff::DiffArgs),
    /// Save guest programs' state at every boundary and go on in a new VM
    Boundary(boundary::BoundaryArgs),
    /// Look for guests that the processor cannot stand
    #[command(subcommand)]
    Fuzz(fuzz::FuzzTask),
    /// Bring the tables of docs/api.md and docs/processor.md up to date
    Docs,
    /// Bring the listings of translated code in crates/jit/tests/golden up to date
    Golden,
    /// Prepare the test guest and print where it is
    Guest,
}

fn main() -> ExitCode {
    LazyLock::force(&START);
    match perform(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<ExitCode> {
    match task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => e2e::run(&args),
        Task::Stress(args) => e2e::stress(&args),
        Task::Migrate(args) => e2e::migrate(&args),
        Task::Signals(args) => signals::run(&args),
        Task::KvmIoctls => crate_tests::run_short(),
        Task::Crates(args) => crate_tests::run(&args),
        Task::Selftests(args) => selftests::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Diff(args) => diff::run(&args),
        Task::Boundary(args) => boundary::run(&args),
        Task::Fuzz(task) => fuzz::run(&task),
        Task::Docs => build::docs(),
        Task::Golden => build::golden(),
        Task::Guest => {
            let guest = guest::Guest::prepare()?;
            println!("kernel     {}", guest.kernel.display());
            println!("vmlinux    {}", guest.vmlinux()?.display());
            println!("initramfs  {}", guest.initramfs.display());
            Ok(ExitCode::SUCCESS)
        }
    }
}

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// One line about what is being done, with the seconds since the start.
pub fn progress(what: &str) {
    eprintln!("[{:6.1} s] {what}", START.elapsed().as_secs_f64());
}

/// The root of the source tree.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_path_buf()
}
