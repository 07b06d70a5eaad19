//! `cargo xtask test`: the workspace's own tests, then real kernels in `anykvm boot` and in an
//! unmodified QEMU, each with a time limit; the guest's console of a failed test is kept.
//!
//! Guest code is translated, as it is for users, or as `ANYKVM_JIT` in the environment says; some tests
//! are run with the interpreter alone, and with everything translated before it first runs, in addition.

mod boot;
mod console;
mod firmware;
mod gdb;
mod http;
mod linux;
mod machine;
mod migrate;
mod models;
mod monitor;
mod qemu;
mod stress;

pub use migrate::{MigrateArgs, run as migrate};
pub use stress::{StressArgs, run as stress};

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guest::{self, Guest};
use crate::{build, process, progress};

#[derive(clap::Args)]
pub struct TestArgs {
    /// Run only tests whose names contain one of these
    filters: Vec<String>,
    /// Print the names of the tests and run none
    #[arg(long)]
    list: bool,
    /// How many machines may run at the same time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

/// One test.
struct Test {
    name: String,
    /// Processors that it keeps busy.
    cpus: usize,
    limit: Duration,
    needs: Needs,
    body: Body,
}

type Body = Box<dyn Fn(&Bench, &Test) -> Result<()> + Send + Sync>;

/// What has to be there for a test.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Only the source tree.
    Sources,
    /// The release build and the guest.
    Guest,
    /// QEMU too.
    Qemu,
}

/// What tests find prepared.
struct Bench {
    anykvm: PathBuf,
    guest: Option<Guest>,
    /// Consoles, and disks while a test runs.
    folder: PathBuf,
}

impl Bench {
    fn guest(&self) -> &Guest {
        self.guest.as_ref().expect("the guest was prepared")
    }

    /// The file that a test's console is kept in.
    fn log(&self, test: &Test) -> PathBuf {
        self.file(test, "log")
    }

    /// A file of a test's own.
    fn file(&self, test: &Test, extension: &str) -> PathBuf {
        self.folder.join(format!("{}.{extension}", test.name))
    }
}

struct Finished {
    name: String,
    result: Result<()>,
    time: Duration,
}

/// The packages whose tests `ANYKVM_JIT` makes others of.
const WAYS: [(&str, &str, &[&str]); 2] = [
    (
        "always",
        "always",
        &["anykvm-cpu", "anykvm", "anykvm-preload"],
    ),
    ("interpreted", "off", &["anykvm", "anykvm-preload"]),
];

pub fn run(args: &TestArgs) -> Result<ExitCode> {
    let mut tests = vec![Test {
        name: "workspace".to_owned(),
        cpus: usize::MAX,
        limit: Duration::from_secs(40 * 60),
        needs: Needs::Sources,
        body: Box::new(workspace_tests),
    }];
    for (name, jit, packages) in WAYS {
        tests.push(Test {
            name: format!("workspace-{name}"),
            cpus: usize::MAX,
            limit: Duration::from_secs(20 * 60),
            needs: Needs::Sources,
            body: Box::new(move |bench, test| {
                let mut command = build::cargo();
                command.args(["test", "--no-fail-fast"]);
                command.env("ANYKVM_JIT", jit);
                for package in packages {
                    command.args(["--package", package]);
                }
                cargo_test(bench, test, &mut command)
            }),
        });
    }
    tests.push(Test {
        name: "differential".to_owned(),
        cpus: 2,
        limit: Duration::from_secs(10 * 60),
        needs: Needs::Sources,
        body: Box::new(differential),
    });
    tests.push(Test {
        name: "boundary-boot".to_owned(),
        cpus: 1,
        limit: Duration::from_secs(10 * 60),
        needs: Needs::Guest,
        body: Box::new(boundary_boot),
    });
    tests.extend(boot::tests());
    tests.extend(qemu::tests());
    tests.extend(linux::tests());
    tests.extend(gdb::tests());
    tests.extend(firmware::tests());
    tests.extend(models::tests());
    tests.extend(stress::tests());
    tests.extend(migrate::tests());
    tests.extend(monitor::tests());
    tests.push(Test {
        name: "contract-shim".to_owned(),
        cpus: 2,
        limit: Duration::from_secs(10 * 60),
        needs: Needs::Guest,
        body: Box::new(contract_through_the_shim),
    });
    tests.push(Test {
        name: "kvm-selftests".to_owned(),
        cpus: 2,
        limit: Duration::from_secs(20 * 60),
        needs: Needs::Guest,
        body: Box::new(|bench, _| crate::selftests::short(&bench.anykvm)),
    });
    tests.push(Test {
        name: "kvm-ioctls".to_owned(),
        cpus: 2,
        limit: Duration::from_secs(15 * 60),
        needs: Needs::Guest,
        body: Box::new(|bench, _| crate::crate_tests::check(&bench.anykvm)),
    });
    tests.retain(|test| {
        args.filters.is_empty() || args.filters.iter().any(|filter| test.name.contains(filter))
    });
    if args.list {
        for test in &tests {
            println!("{}", test.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if tests.is_empty() {
        bail!("no test has such a name");
    }
    run_tests(tests, args.jobs.max(1))
}

fn run_tests(tests: Vec<Test>, jobs: usize) -> Result<ExitCode> {
    let bench = prepare(&tests)?;
    let finished = run_all(&bench, tests, jobs);
    Ok(report(&bench, &finished))
}

fn prepare(tests: &[Test]) -> Result<Bench> {
    let need = |what| tests.iter().any(|test| test.needs == what);
    let folder = build::target().join("e2e");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut bench = Bench {
        anykvm: PathBuf::new(),
        guest: None,
        folder,
    };
    if need(Needs::Guest) || need(Needs::Qemu) {
        bench.guest = Some(Guest::prepare()?);
        bench.anykvm = build::anykvm()?;
    }
    if need(Needs::Qemu) {
        guest::require_qemu()?;
    }
    Ok(bench)
}

/// Runs the tests in order, as many side by side as there are jobs for their processors.
fn run_all(bench: &Bench, tests: Vec<Test>, jobs: usize) -> Vec<Finished> {
    let mut queue: VecDeque<_> = tests.into_iter().collect();
    let mut finished = Vec::new();
    while let Some(first) = queue.pop_front() {
        let mut group = vec![first];
        let mut busy = group[0].cpus;
        while let Some(next) = queue.front()
            && busy.saturating_add(next.cpus) <= jobs
        {
            busy += next.cpus;
            group.extend(queue.pop_front());
        }
        finished.extend(run_group(bench, group));
    }
    finished
}

fn run_group(bench: &Bench, group: Vec<Test>) -> Vec<Finished> {
    let finished = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for test in &group {
            scope.spawn(|| {
                let start = Instant::now();
                let result = (test.body)(bench, test);
                let time = start.elapsed();
                progress(&format!(
                    "{:<28} {} ({:.1} s)",
                    test.name,
                    match &result {
                        Ok(()) => "passed".to_owned(),
                        Err(error) => format!("FAILED: {error:#}"),
                    },
                    time.as_secs_f64()
                ));
                finished.lock().unwrap().push(Finished {
                    name: test.name.clone(),
                    result,
                    time,
                });
            });
        }
    });
    finished.into_inner().unwrap()
}

/// The table, and the closing line that says it all.
fn report(bench: &Bench, finished: &[Finished]) -> ExitCode {
    println!();
    println!("{:<28} {:<7} {:>8}", "test", "result", "time");
    for test in finished {
        let result = if test.result.is_ok() { "pass" } else { "FAIL" };
        println!(
            "{:<28} {result:<7} {:>6.1} s",
            test.name,
            test.time.as_secs_f64()
        );
    }
    let failures: Vec<_> = finished
        .iter()
        .filter(|test| test.result.is_err())
        .collect();
    for test in &failures {
        if let Err(error) = &test.result {
            println!();
            println!("{}: {error:#}", test.name);
            println!(
                "    its output is in {}",
                bench.folder.join(format!("{}.log", test.name)).display()
            );
        }
    }
    println!();
    println!(
        "{} passed, {} failed",
        finished.len() - failures.len(),
        failures.len()
    );
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Unit tests, API tests and documentation tests of every crate.
fn workspace_tests(bench: &Bench, test: &Test) -> Result<()> {
    progress("unit and API tests of the workspace");
    let mut command = build::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    cargo_test(bench, test, &mut command)
}

fn cargo_test(bench: &Bench, test: &Test, command: &mut Command) -> Result<()> {
    let outcome = process::run(command, &bench.log(test), test.limit, &[])?;
    for line in outcome.output.lines() {
        let line = line.trim_start();
        if line.starts_with("Running") || line.starts_with("Doc-tests") {
            println!("{line}");
        } else if line.starts_with("test result:") {
            println!("    {line}");
        }
    }
    if !outcome.status.success() {
        for line in outcome.output.lines().filter(|line| is_complaint(line)) {
            println!("{line}");
        }
        bail!("cargo test failed");
    }
    Ok(())
}

/// The contract tests and random ioctls once more, as programs that open `/dev/kvm` under `anykvm run`: raw
/// pointers, real descriptors, other processes.
fn contract_through_the_shim(bench: &Bench, test: &Test) -> Result<()> {
    let mut command = build::cargo();
    command.args(["test", "--package", "anykvm", "--package", "anykvm-fuzz"]);
    command.args(["--test", "contract", "--test", "ioctls"]);
    command.env("ANYKVM_TEST_HOST_KVM", "1");
    command.env(
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER",
        format!("{} run --backend soft --", bench.anykvm.display()),
    );
    cargo_test(bench, test, &mut command)
}

/// The short form of `cargo xtask diff`.
fn differential(bench: &Bench, test: &Test) -> Result<()> {
    let mut command = crate::diff::command()?;
    command.args(["--cases", "1000000"]);
    let outcome = process::run(&mut command, &bench.log(test), test.limit, &[])?;
    print!("{}", outcome.output);
    if !outcome.status.success() {
        bail!("instructions differ");
    }
    Ok(())
}

/// The short form of `cargo xtask boundary boot`.
fn boundary_boot(bench: &Bench, test: &Test) -> Result<()> {
    let mut command = crate::boundary::command(bench.guest())?;
    command.args(["boot", "--boot-translated", "--boot-moves", "200"]);
    let outcome = process::run(&mut command, &bench.log(test), test.limit, &[])?;
    print!("{}", outcome.output);
    if !outcome.status.success() {
        bail!("a boot that moves is not the same");
    }
    Ok(())
}

/// A line of cargo's output that says what is wrong.
fn is_complaint(line: &str) -> bool {
    line.starts_with("error")
        || line.contains("panicked at")
        || (line.starts_with("test ") && line.ends_with("FAILED"))
}
