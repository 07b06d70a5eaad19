//! The program that `anykvm run` is to start: where it is, and whether the dynamic loader will load
//! the shim into it (System V ABI, "Program Header": PT_INTERP; ld.so(8): LD_PRELOAD and
//! secure-execution mode; execve(2): interpreter scripts).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use super::Error;

/// How many `#!` lines execve follows (Linux: `BINPRM` recursion limit).
const MAX_INTERPRETERS: usize = 5;

const EM_X86_64: u16 = 62;
const PT_INTERP: u32 = 3;

/// What a file is to execve.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// `#!`: the interpreter's path.
    Script(PathBuf),
    /// An ELF file whose PT_INTERP names this dynamic loader.
    Dynamic(Vec<u8>),
    /// An ELF file without PT_INTERP.
    Static,
    /// An ELF file for another processor (or the 32-bit half of this one).
    Foreign,
    /// Anything else: `execvp` gives it to the shell.
    Other,
}

/// Finds the file a shell would run for `name`.
pub fn find(name: &OsStr) -> Result<PathBuf, Error> {
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        if !path.exists() {
            return Err(Error::NotFound(name.to_os_string()));
        }
        return executable(&path).map(|()| path);
    }
    let search = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    let mut refused = None;
    for folder in std::env::split_paths(&search) {
        let path = match folder.as_os_str().is_empty() {
            true => Path::new(".").join(name),
            false => folder.join(name),
        };
        if name.is_empty() || !path.exists() {
            continue;
        }
        match executable(&path) {
            Ok(()) => return Ok(path),
            Err(e) => refused = refused.or(Some(e)),
        }
    }
    Err(refused.unwrap_or_else(|| Error::NotFound(name.to_os_string())))
}

fn executable(path: &Path) -> Result<(), Error> {
    if path.is_dir() {
        return Err(Error::NotExecutable(path.into(), "is a directory"));
    }
    access(path, Access::EXEC_OK)
        .map_err(|_| Error::NotExecutable(path.into(), "permission denied"))
}

/// Refuses the programs in which the loader would not load the shim, or could not.
pub fn check_preloadable(path: &Path) -> Result<(), Error> {
    let refuse = |path: &Path, why| Err(Error::Unsupported(path.into(), why));
    let mut path = path.to_path_buf();
    for _ in 0..=MAX_INTERPRETERS {
        // An unreadable program may still be executable; then there is nothing to check.
        let Ok(file) = File::open(&path) else {
            return Ok(());
        };
        if let Ok(meta) = file.metadata() {
            let uid = rustix::process::getuid().as_raw();
            let gid = rustix::process::getgid().as_raw();
            let setuid = meta.mode() & 0o4000 != 0 && meta.uid() != uid;
            let setgid = meta.mode() & 0o2000 != 0 && meta.gid() != gid;
            if setuid || setgid {
                return refuse(
                    &path,
                    "is set-user-ID or set-group-ID: the dynamic loader would ignore the shim",
                );
            }
        }
        match kind(&file) {
            Kind::Script(interpreter) => path = interpreter,
            Kind::Static if is_loader(&path) => return Ok(()),
            Kind::Static => {
                return refuse(&path, "is statically linked, which is not yet supported");
            }
            Kind::Foreign => {
                return refuse(&path, "is not an x86-64 program, which is not supported");
            }
            Kind::Dynamic(loader) if loader.windows(7).any(|w| w == b"ld-musl") => {
                return refuse(&path, "is linked against musl, which is not yet supported");
            }
            Kind::Dynamic(_) | Kind::Other => return Ok(()),
        }
    }
    Ok(())
}

/// Whether this is glibc's dynamic loader itself, run as a program with another's name behind it: it has no
/// PT_INTERP, and loads the shim.
fn is_loader(path: &Path) -> bool {
    let name = path.file_name();
    name.is_some_and(|name| name.as_bytes().starts_with(b"ld-linux-x86-64.so."))
}

/// Reads what execve would look at. A damaged header counts as [`Kind::Other`]: execve's own error
/// is the better message.
fn kind(file: &File) -> Kind {
    let mut head = [0u8; 256];
    let mut len = 0;
    while let Ok(n @ 1..) = file.read_at(&mut head[len..], len as u64) {
        len += n;
    }
    let head = &head[..len];
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|&b| b == b'\n').next().unwrap_or_default();
        let words = line.split(|b| matches!(b, b' ' | b'\t' | b'\r'));
        return match words.into_iter().find(|w| !w.is_empty()) {
            Some(word) => Kind::Script(PathBuf::from(OsString::from_vec(word.to_vec()))),
            None => Kind::Other,
        };
    }
    if !head.starts_with(b"\x7fELF") || len < 64 {
        return Kind::Other;
    }
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let (class, data) = (head[4], head[5]);
    if class != 2 || data != 1 || u16_at(18) != EM_X86_64 {
        return Kind::Foreign;
    }
    let mut offset = [0u8; 8];
    offset.copy_from_slice(&head[32..40]);
    program_headers(file, u64::from_le_bytes(offset), u16_at(54), u16_at(56)).unwrap_or(Kind::Other)
}

/// Looks for PT_INTERP among `count` program headers of `size` bytes at `offset`.
fn program_headers(file: &File, offset: u64, size: u16, count: u16) -> Option<Kind> {
    for i in 0..count {
        let mut header = [0u8; 56];
        let at = offset.checked_add(u64::from(i) * u64::from(size))?;
        file.read_exact_at(&mut header, at).ok()?;
        let u64_at = |at: usize| {
            let bytes: [u8; 8] = std::array::from_fn(|i| header[at + i]);
            u64::from_le_bytes(bytes)
        };
        if u64_at(0) as u32 == PT_INTERP {
            let mut loader = vec![0; usize::try_from(u64_at(32)).ok()?.min(4096)];
            file.read_exact_at(&mut loader, u64_at(8)).ok()?;
            return Some(Kind::Dynamic(loader));
        }
    }
    Some(Kind::Static)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_with(bytes: &[u8]) -> File {
        let fd = rustix::fs::memfd_create("program", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        file
    }

    fn elf(class: u8, machine: u16, headers: &[(u32, u64, u64)]) -> Vec<u8> {
        let mut bytes = vec![0u8; 64];
        bytes[..4].copy_from_slice(b"\x7fELF");
        bytes[4] = class;
        bytes[5] = 1;
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&(headers.len() as u16).to_le_bytes());
        for (kind, offset, size) in headers {
            let mut header = [0u8; 56];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&offset.to_le_bytes());
            header[32..40].copy_from_slice(&size.to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        bytes
    }

    #[test]
    fn elf_kinds() {
        let dynamic = elf(2, 62, &[(1, 0, 0), (PT_INTERP, 1, 3)]);
        assert_eq!(kind(&file_with(&dynamic)), Kind::Dynamic(b"ELF".to_vec()));
        let fixed = elf(2, 62, &[(1, 0, 0)]);
        assert_eq!(kind(&file_with(&fixed)), Kind::Static);
        let foreign = elf(1, 3, &[(1, 0, 0)]);
        assert_eq!(kind(&file_with(&foreign)), Kind::Foreign);
    }

    #[test]
    fn scripts_and_other_files() {
        let script = |bytes| kind(&file_with(bytes));
        let sh = Kind::Script(PathBuf::from("/bin/sh"));
        assert_eq!(script(b"#! /bin/sh -e\necho\n"), sh);
        assert_eq!(script(b"#!/bin/sh"), sh);
        assert_eq!(script(b"#!\n"), Kind::Other);
        assert_eq!(script(b"echo hello\n"), Kind::Other);
        assert_eq!(script(b""), Kind::Other);
    }

    #[test]
    fn damaged_elf_files_are_left_to_execve() {
        let mut cut = elf(2, 62, &[(PT_INTERP, 0, 4)]);
        cut.truncate(80);
        assert_eq!(kind(&file_with(&cut)), Kind::Other);
        let mut far = elf(2, 62, &[(1, 0, 0)]);
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(kind(&file_with(&far)), Kind::Other);
    }
}
