//! `cargo xtask fuzz`: guests made by libFuzzer, which looks for inputs that reach code no input has
//! reached. The flags are those that stable Rust has for LLVM's own instrumentation.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::{build, progress, workspace};

#[derive(clap::Subcommand)]
pub enum FuzzTask {
    /// Random guests against the processor, in every mode
    Cpu(FuzzArgs),
    /// The same guests interpreted and translated, which must come to the same
    Translated(FuzzArgs),
    /// Random ioctls on the objects of the API
    Ioctls(FuzzArgs),
    /// Random ioctls of a program under `anykvm run`, not led by what they reach
    IoctlsShim(ShimArgs),
}

#[derive(clap::Args)]
pub struct FuzzArgs {
    /// How long; 0: until it is interrupted
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Processes side by side, which share what they find
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// With AddressSanitizer (a nightly toolchain)
    #[arg(long)]
    address_sanitizer: bool,
    /// Run only this input, as a failure left it
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Reduce the inputs found so far to as few as reach the same code, and keep them in the source tree
    #[arg(long)]
    merge: bool,
}

pub fn run(task: &FuzzTask) -> Result<ExitCode> {
    match task {
        FuzzTask::Cpu(args) => fuzz(args, "cpu"),
        FuzzTask::Translated(args) => fuzz(args, "translated"),
        FuzzTask::Ioctls(args) => fuzz(args, "ioctls"),
        FuzzTask::IoctlsShim(args) => ioctls_shim(args),
    }
}

#[derive(clap::Args)]
pub struct ShimArgs {
    /// How long
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// The test of random ioctls as a program that opens `/dev/kvm`: raw pointers and real descriptors.
fn ioctls_shim(args: &ShimArgs) -> Result<ExitCode> {
    let anykvm = build::anykvm()?;
    let mut command = build::cargo();
    command
        .args(["test", "--package", "anykvm-fuzz", "--test", "ioctls", "--"])
        .arg("--nocapture")
        .env("ANYKVM_TEST_HOST_KVM", "1")
        .env("ANYKVM_FUZZ_SECONDS", args.seconds.to_string())
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER",
            format!("{} run --backend soft --", anykvm.display()),
        );
    status(&mut command)
}

/// What makes the program tell libFuzzer which edges it takes and what it compares.
const INSTRUMENTATION: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Ccodegen-units=1",
    "-Cdebug-assertions=on",
    "-Coverflow-checks=on",
];
/// Naming the target keeps build scripts and macros free of the instrumentation.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// An input that takes longer counts as one that never ends.
const INPUT_SECONDS: u32 = 20;

fn fuzz(args: &FuzzArgs, name: &str) -> Result<ExitCode> {
    let program = build_target(name, args.address_sanitizer)?;
    // Guests mean the same to each target that takes them.
    let kind = if name == "ioctls" { name } else { "cpu" };
    let found = build::target().join("fuzz/corpus").join(kind);
    let kept = workspace().join("fuzz/corpus").join(kind);
    let failures = build::target().join("fuzz/failures").join(name);
    for folder in [&found, &kept, &failures] {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let mut options = vec![
        OsString::from(format!("-timeout={INPUT_SECONDS}")),
        "-max_len=2048".into(),
        "-len_control=20".into(),
        "-rss_limit_mb=4096".into(),
        "-print_final_stats=1".into(),
    ];
    let mut prefix = OsString::from("-artifact_prefix=");
    prefix.push(failures.join(""));
    options.push(prefix);
    if let Some(input) = &args.input {
        let input = input
            .canonicalize()
            .with_context(|| input.display().to_string())?;
        return status(Command::new(program).args(options).arg(input));
    }
    if args.merge {
        return status(
            Command::new(program)
                .args(options)
                .arg("-merge=1")
                .args([&kept, &found]),
        );
    }
    options.push(format!("-max_total_time={}", args.seconds).into());
    progress(&format!("{} process(es), {} s", args.jobs, args.seconds));
    let mut children = Vec::new();
    for _ in 0..args.jobs.max(1) {
        let child = Command::new(&program)
            .args(&options)
            .args([&found, &kept])
            .current_dir(workspace())
            .spawn()
            .with_context(|| program.display().to_string())?;
        children.push(child);
    }
    let mut failed = false;
    for mut child in children {
        failed |= !child.wait()?.success();
    }
    if failed {
        let file = failures.join("FILE");
        bail!(
            "an input failed; again: cargo xtask fuzz {name} --input {}",
            file.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the instrumented program, apart from all other builds.
fn build_target(name: &str, address_sanitizer: bool) -> Result<PathBuf> {
    progress("building the instrumented processor");
    let folder = build::target().join(if address_sanitizer {
        "fuzz-asan"
    } else {
        "fuzz"
    });
    let mut flags = INSTRUMENTATION.join(" ");
    if address_sanitizer {
        flags += " -Zsanitizer=address";
    }
    let mut command = build::cargo();
    if address_sanitizer {
        // The toolchain that runs us hands its own cargo down.
        command = Command::new("cargo");
        command
            .arg("+nightly")
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("CARGO")
            .current_dir(workspace());
    }
    let program = format!("fuzz-{name}");
    command
        .args(["build", "--release", "--package", "anykvm-fuzz"])
        .args(["--features", "libfuzzer", "--bin", &program])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&folder)
        .env("RUSTFLAGS", flags)
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_LTO", "off");
    if !command.status().context("cannot start cargo")?.success() {
        bail!("the build failed");
    }
    Ok(Path::new(&folder)
        .join(TARGET)
        .join("release")
        .join(program))
}

fn status(command: &mut Command) -> Result<ExitCode> {
    let status = command.status().context("cannot start the fuzzer")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
