//! `cargo xtask selftests`: KVM's own test programs, which come with the kernel's source, under
//! `anykvm run`. They are built outside the source tree, unchanged but for [`MENDED`].

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::guest::selftest_source;
use crate::{build, process, progress};

#[derive(clap::Args)]
pub struct SelftestArgs {
    /// Run only tests whose names contain one of these
    filters: Vec<String>,
    /// Leave out those that take longest
    #[arg(long)]
    short: bool,
}

/// Tests that need what there is not; they say so themselves, or fail at it.
const EXCUSED: &[(&str, &str)] = &[
    (
        "access_tracking_perf_test",
        "a host kernel with idle page tracking",
    ),
    ("amx_test", "AMX"),
    (
        "emulator_error_test",
        "an instruction that the processor lacks",
    ),
    ("evmcs_test", "nested VMX"),
    ("hyperv_", "Hyper-V's interface"),
    ("mmio_warning_test", "an Intel host's module parameters"),
    ("nested_exceptions_test", "nested virtualisation"),
    (
        "nx_huge_pages_test",
        "a host that splits huge pages for its guests",
    ),
    ("pmu_event_filter_test", "performance counters"),
    ("sev_migrate_tests", "SEV"),
    ("svm_", "nested SVM"),
    ("triple_fault_event_test", "nested virtualisation"),
    ("ucna_injection_test", "corrected machine-check interrupts"),
    ("vmx_", "nested VMX"),
    ("xen_", "Xen event channels"),
    ("xss_msr_test", "XSAVES"),
];

/// Tests that fail, and what is missing.
const NOT_YET: &[(&str, &str)] = &[];

/// Faults of the tests that Linux has mended since: file, what it has, what it should have.
///
/// dirty_log_test lets the guest go on before it tells it the new number to write. Where threads wait long for a
/// processor the guest may still write the number before the last after the log was read, and the page is
/// reported next time with a number that the test does not expect any more.
const MENDED: &[(&str, &str, &str)] = &[(
    "dirty_log_test.c",
    "\t\tsem_post(&sem_vcpu_cont);\n\t\tsync_global_to_guest(vm, iteration);\n",
    "\t\tsync_global_to_guest(vm, iteration);\n\t\tsem_post(&sem_vcpu_cont);\n",
)];

/// Tests that take longest.
const LONG: &[&str] = &[
    "hardware_disable_test",
    "max_guest_memory_test",
    "memslot_perf_test",
    "rseq_test",
    "set_memory_region_test",
];

/// What kselftest programs return for "skipped".
const SKIPPED: i32 = 4;
const LIMIT: Duration = Duration::from_secs(300);
/// For those that take longest.
const LONG_LIMIT: Duration = Duration::from_secs(1800);

/// How a test ended.
enum End {
    Passed,
    /// This is missing ([`NOT_YET`]).
    NotYet(String),
    /// It needs this, which there is not.
    Skipped(String),
    Failed(String),
}

pub fn run(args: &SelftestArgs) -> Result<ExitCode> {
    let anykvm = build::anykvm()?;
    let failed = run_with(&anykvm, |name| {
        let wanted = args.filters.is_empty() || args.filters.iter().any(|f| name.contains(f));
        wanted && !(args.short && is_long(name))
    })?;
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// All but the longest; an error with the names of those that fail.
pub fn short(anykvm: &Path) -> Result<()> {
    let failed = run_with(anykvm, |name| !is_long(name))?;
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn is_long(name: &str) -> bool {
    LONG.iter().any(|long| name.contains(long))
}

/// Runs those wanted, prints a table, and returns the names of those that fail.
fn run_with(anykvm: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let programs = programs()?;
    let logs = build::target().join("selftests");
    let (mut passed, mut skipped, mut not_yet, mut failed) = (0, 0, 0, Vec::new());
    for name in names(&programs)?.iter().filter(|name| wanted(name)) {
        let log = logs.join(format!("{}.log", name.replace('/', "-")));
        let (word, why) = match run_one(anykvm, &programs, name, &log)? {
            End::Passed => {
                passed += 1;
                ("pass", String::new())
            }
            End::Skipped(why) => {
                skipped += 1;
                ("skip", why)
            }
            End::NotYet(why) => {
                not_yet += 1;
                ("fail", format!("not there yet: {why}"))
            }
            End::Failed(why) => {
                failed.push(name.clone());
                ("FAIL", why)
            }
        };
        println!("{word}  {name:<42} {why}");
    }
    println!(
        "{passed} passed, {skipped} skipped, {not_yet} known to fail, {} others failed",
        failed.len()
    );
    Ok(failed)
}

fn run_one(anykvm: &Path, programs: &Path, name: &str, log: &Path) -> Result<End> {
    let mut command = Command::new(anykvm);
    command
        .args(["run", "--backend", "soft", "--"])
        .arg(programs.join(name))
        .current_dir(programs);
    let excuse = EXCUSED
        .iter()
        .find(|(part, _)| name.contains(part))
        .map(|(_, needs)| format!("needs {needs}"));
    let limit = if is_long(name) { LONG_LIMIT } else { LIMIT };
    let outcome = match process::run(&mut command, log, limit, &[]) {
        Ok(outcome) => outcome,
        Err(error) => return Ok(End::Failed(format!("{error:#}; {}", log.display()))),
    };
    if let Some((_, missing)) = NOT_YET.iter().find(|(known, _)| *known == name)
        && !outcome.status.success()
    {
        return Ok(End::NotYet((*missing).to_owned()));
    }
    Ok(match (outcome.status.code(), excuse) {
        (Some(0), _) => End::Passed,
        (_, Some(excuse)) => End::Skipped(excuse),
        (Some(SKIPPED), None) => {
            let said = outcome.output.lines().last().unwrap_or_default();
            End::Failed(format!("it was skipped: {said}"))
        }
        _ => End::Failed(format!("{}; {}", outcome.status, log.display())),
    })
}

/// Where the built programs are.
fn programs() -> Result<PathBuf> {
    let source = selftest_source()?;
    let programs = source.join("built.mended");
    if !programs.exists() {
        compile(&source, &programs)?;
    }
    Ok(programs)
}

fn compile(source: &Path, programs: &Path) -> Result<()> {
    progress("building KVM's own tests");
    let tests = source.join("tools/testing/selftests/kvm");
    for (file, fault, right) in MENDED {
        let path = tests.join(file);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        if !text.contains(right) {
            ensure!(text.contains(fault), "{file} has changed");
            fs::write(&path, text.replace(fault, right))?;
        }
    }
    let scratch = source.join(format!("built.new.{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
    // The kernel's copy of this header lacks a macro that the ones for users need; and one test uses
    // another kernel's name of an assertion.
    let flags = "-w -include /usr/include/linux/stddef.h -D'TEST_ASSERT_EQ(a,b)=ASSERT_EQ(a,b)'";
    let output = Command::new("make")
        .args(["-j2", "-C"])
        .arg(&tests)
        .arg(format!("OUTPUT={}", scratch.display()))
        .arg(format!("EXTRA_CFLAGS={flags}"))
        // What cargo tells its own children about make is not for this one.
        .env_remove("MAKEFLAGS")
        .env_remove("CARGO_MAKEFLAGS")
        .output()
        .context("make (Debian: make, gcc and libc6-dev) is needed")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr));
    }
    fs::rename(&scratch, programs).with_context(|| programs.display().to_string())
}

/// The programs' names, in order.
fn names(programs: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for folder in ["", "x86_64"] {
        let folder_path = programs.join(folder);
        let entries =
            fs::read_dir(&folder_path).with_context(|| folder_path.display().to_string())?;
        for entry in entries {
            let path = entry?.path();
            // Objects and dependencies have extensions; libraries are in a folder of their own.
            if path.is_file() && path.extension().is_none() {
                let name = path.strip_prefix(programs)?;
                names.push(name.display().to_string());
            }
        }
    }
    names.sort();
    Ok(names)
}
