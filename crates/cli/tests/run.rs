//! `anykvm run`: what it refuses, with which exit code and line, and what the command finds.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder of this test's own, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("anykvm-run-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `anykvm run --backend soft` with a library that need only exist.
fn run(library: &Path, command: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_anykvm"))
        .args(["run", "--backend", "soft", "--"])
        .args(command)
        .env("ANYKVM_LIB", library)
        .env_remove("LD_PRELOAD")
        .output()
        .unwrap()
}

/// Asserts the exit code and that stderr is one line holding `text`.
fn refused(output: &Output, code: i32, text: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(text), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn refusals() {
    let folder = Folder::new("refusals");
    let library = folder.file("libanykvm.so", b"", 0o644);
    let plain = folder.file("plain", b"#!/bin/sh\n", 0o644);
    let mut elf = vec![0u8; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    let fixed = folder.file("fixed", &elf, 0o755);
    let script = format!("#!{}\n", fixed.display());
    let script = folder.file("script", script.as_bytes(), 0o755);

    refused(&run(&library, &[]), 2, "no command given");
    refused(&run(&library, &["no-such-command-here"]), 127, "not found");
    refused(&run(&library, &["/no/such/file"]), 127, "not found");
    refused(
        &run(&library, &[plain.to_str().unwrap()]),
        126,
        "permission",
    );
    refused(&run(&library, &["/tmp"]), 126, "directory");
    refused(
        &run(&library, &[fixed.to_str().unwrap()]),
        2,
        "statically linked",
    );
    refused(
        &run(&library, &[script.to_str().unwrap()]),
        2,
        "statically linked",
    );
    refused(&run(&folder.0.join("none.so"), &["true"]), 2, "missing");
}

#[test]
fn the_command_gets_the_shim_its_arguments_and_its_exit_code() {
    let folder = Folder::new("starts");
    let library = folder.file("libanykvm.so", b"", 0o644);
    let command = [
        // glibc's loader may be told what to run.
        "/lib64/ld-linux-x86-64.so.2",
        "/bin/sh",
        "-c",
        "echo $LD_PRELOAD $ANYKVM_BACKEND $1; exit 7",
        "sh",
        "-x",
    ];
    for command in [&command[..], &command[1..]] {
        let output = run(&library, command);
        let expected = format!("{} soft -x\n", library.display());
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
        assert_eq!(output.status.code(), Some(7));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.starts_with("anykvm: backend soft"), "{said}");
    }
}
