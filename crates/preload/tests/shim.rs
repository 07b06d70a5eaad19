//! The shim as programs meet it: C programs (tests/programs) that use `/dev/kvm` as VMMs do, run
//! with libanykvm.so preloaded. Each checks one group of promises and ends with exit code 0, or says
//! which check failed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long one program may run.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// The folder of the profile this test was built in.
fn build_folder() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    exe.ancestors().nth(2).unwrap().to_path_buf()
}

/// libanykvm.so, built: cargo does not build a cdylib for the sake of a test.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = build_folder();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--lib", "--package", "anykvm-preload"]);
        build.arg("--target-dir").arg(folder.parent().unwrap());
        if folder.ends_with("release") {
            build.arg("--release");
        }
        assert!(
            build.status().unwrap().success(),
            "the library does not build"
        );
        folder.join("libanykvm.so")
    })
}

/// Compiles and runs tests/programs/`name`.c; panics with what it said unless it ends with 0.
fn run(name: &str) {
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs");
    let program = build_folder().join(format!("shim-test-{name}"));
    let compiler = Command::new("cc")
        .args(["-O1", "-Wall", "-Werror", "-D_GNU_SOURCE", "-pthread"])
        .arg(programs.join(format!("{name}.c")))
        .arg("-o")
        .arg(&program)
        .arg("-lm")
        .output()
        .expect("a C compiler (cc)");
    let said = String::from_utf8_lossy(&compiler.stderr);
    assert!(compiler.status.success(), "{said}");

    let log = build_folder().join(format!("shim-test-{name}.log"));
    let output = std::fs::File::create(&log).unwrap();
    let mut child = Command::new(&program)
        .env("LD_PRELOAD", library())
        .env_remove("ANYKVM_BACKEND")
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if started.elapsed() > TIME_LIMIT {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let said = std::fs::read_to_string(&log).unwrap();
    match status {
        None => panic!("{name}: not done after {TIME_LIMIT:?}\n{said}"),
        Some(status) => assert!(status.success(), "{name}: {status}\n{said}"),
    }
}

#[test]
fn the_device_node() {
    run("device");
}

#[test]
fn descriptors() {
    run("descriptors");
}

#[test]
fn processes() {
    run("processes");
}

#[test]
fn mappings() {
    run("mappings");
}

#[test]
fn signals() {
    run("signals");
}

#[test]
fn signal_mask() {
    run("signal_mask");
}

#[test]
fn fault_handlers() {
    run("faults");
}

#[test]
fn kicks() {
    run("kicks");
}

/// The short form of `cargo xtask signals`.
#[test]
fn signal_stress() {
    run("signal_stress");
}

/// pthread_cancel of a thread in KVM_RUN.
#[test]
fn cancel() {
    run("cancel");
}

#[test]
fn guest_memory() {
    run("guest_memory");
}

#[test]
fn pointers_and_unknown_ioctls() {
    run("pointers");
}

#[test]
fn seccomp() {
    run("seccomp");
}
