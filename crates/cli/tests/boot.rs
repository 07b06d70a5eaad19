//! What `anykvm boot` says to bad input: one line that names the file and the reason, exit code 2, and
//! every file as it was.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("anykvm-boot-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A bzImage of one setup sector and one sector of code, as far as its header goes.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 3 * 512];
    image[0x1f1] = 1;
    image[0x1f4] = 32;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    image[0x236] = 1;
    image[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x20_0000_u32.to_le_bytes());
    image
}

fn boot(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_anykvm"))
        .arg("boot")
        .args(arguments)
        .output()
        .unwrap()
}

/// Checks for exit code 2 and one line with these words in it.
#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty());
    assert_eq!(message.lines().count(), 1, "{message}");
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn bad_kernels() {
    let folder = Folder::new("kernels");
    refused(
        &boot(&["--kernel", "/nonexistent/vmlinuz"]),
        &["/nonexistent/vmlinuz", "No such file"],
    );
    refused(&boot(&["--kernel", text(&folder.0)]), &[text(&folder.0)]);
    for (name, bytes, reason) in [
        ("empty", Vec::new(), "empty"),
        ("short", b"MZ".to_vec(), "truncated"),
        ("cut", bzimage()[..1100].to_vec(), "truncated"),
        ("text", vec![b'#'; 8192], "neither"),
        ("elf", b"\x7fELF\x02\x01\x01".to_vec(), "truncated"),
    ] {
        let path = folder.file(name, &bytes);
        refused(&boot(&["--kernel", text(&path)]), &[text(&path), reason]);
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}

#[test]
fn too_little_memory() {
    let folder = Folder::new("memory");
    let kernel = folder.file("vmlinuz", &bzimage());
    for size in ["0", "1M", "16M"] {
        refused(
            &boot(&["--kernel", text(&kernel), "--mem", size]),
            &["--mem"],
        );
    }
    refused(
        &boot(&["--kernel", text(&kernel), "--mem", "8M"]),
        &[text(&kernel), "18 MiB"],
    );
}

#[test]
fn bad_initrds() {
    let folder = Folder::new("initrds");
    let kernel = folder.file("vmlinuz", &bzimage());
    let empty = folder.file("empty", b"");
    let large = folder.file("large", &vec![0; 16 << 20]);
    for (initrd, reason) in [
        ("/nonexistent/initrd", "No such file"),
        (text(&empty), "empty"),
        (text(&large), "does not fit"),
    ] {
        refused(
            &boot(&[
                "--kernel",
                text(&kernel),
                "--initrd",
                initrd,
                "--mem",
                "32M",
            ]),
            &[initrd, reason],
        );
    }
}

#[test]
fn bad_disks() {
    let folder = Folder::new("disks");
    let kernel = folder.file("vmlinuz", &bzimage());
    let odd = folder.file("odd", &[1; 777]);
    let empty = folder.file("empty", b"");
    // A program that runs cannot be opened for writing, not even by root.
    let busy = std::env::current_exe().unwrap();
    for (disk, reason) in [
        ("/nonexistent/disk", "No such file"),
        (text(&folder.0), "writing"),
        (text(&busy), "writing"),
        (text(&empty), "empty"),
        (text(&odd), "multiple of 512"),
    ] {
        refused(
            &boot(&["--kernel", text(&kernel), "--mem", "64M", "--disk", disk]),
            &[disk, reason],
        );
    }
    assert_eq!(fs::read(&odd).unwrap(), [1; 777]);
    assert_eq!(fs::read(&empty).unwrap(), b"");
}

#[test]
fn the_same_disk_twice() {
    let folder = Folder::new("twice");
    let kernel = folder.file("vmlinuz", &bzimage());
    let disk = folder.file("disk", &[0; 1024]);
    let disk = text(&disk);
    refused(
        &boot(&["--kernel", text(&kernel), "--disk", disk, "--disk", disk]),
        &[disk, "in use"],
    );
}

#[test]
fn command_lines_that_make_no_sense() {
    for arguments in [
        &[][..],
        &["--kernel"],
        &["--kernel", "k", "--cpus", "0"],
        &["--kernel", "k", "--cpus", "255"],
        &["--kernel", "k", "--mem", "lots"],
    ] {
        let output = boot(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn a_code_cache_too_small_to_work_with() {
    let folder = Folder::new("cache");
    let kernel = folder.file("kernel", &bzimage());
    let kernel = text(&kernel);
    for (option, value, reason) in [
        ("--jit-cache", "1023K", "less than 1M"),
        ("--jit", "sometimes", "off, on, always"),
    ] {
        let output = boot(&["--kernel", kernel, option, value]);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(
            message.contains(option) && message.contains(reason),
            "{message}"
        );
    }
    let output = Command::new(env!("CARGO_BIN_EXE_anykvm"))
        .args(["boot", "--kernel", kernel])
        .env("ANYKVM_JIT_CACHE", "100")
        .output()
        .unwrap();
    refused(&output, &["ANYKVM_JIT_CACHE=100", "less than 1M"]);
}
