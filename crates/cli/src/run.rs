//! `anykvm run`: starts a command with the software KVM in its address space.
//!
//! The command is replaced into this process (`execve`) with `LD_PRELOAD` naming libanykvm.so, so
//! nothing of anykvm stays behind when it ends or is killed. Everything that would make the dynamic
//! loader ignore the shim silently (a static program, a set-user-ID program, another architecture)
//! is found before that and said in one line.

mod host_kvm;
mod program;

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::jit::JitArgs;

/// File name of the shim library.
const LIBRARY: &str = "libanykvm.so";

/// The command line of `anykvm run`.
#[derive(clap::Args)]
pub struct RunArgs {
    /// Who provides /dev/kvm: the host if it really runs a guest and else software (auto), always
    /// software (soft), always the host (kvm)
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    backend: Backend,

    #[command(flatten)]
    jit: JitArgs,

    /// Test whether the host's /dev/kvm runs a guest, and exit
    #[arg(long, hide = true)]
    probe_host: bool,

    /// The command and its arguments
    #[arg(
        value_name = "CMD",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    command: Vec<OsString>,
}

/// Who provides `/dev/kvm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Backend {
    /// The host's KVM if it runs a guest, else software.
    Auto,
    /// Software.
    Soft,
    /// The host's KVM.
    Kvm,
}

/// Why the command was not started.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("no command given: anykvm run [--backend auto|soft|kvm] -- CMD...")]
    NoCommand,
    #[error("{}: command not found", .0.display())]
    NotFound(OsString),
    #[error("{}: {}", .0.display(), .1)]
    NotExecutable(PathBuf, &'static str),
    #[error("{}: cannot execute: {}", .0.display(), .1)]
    Exec(PathBuf, std::io::Error),
    #[error("{}: {}", .0.display(), .1)]
    Unsupported(PathBuf, &'static str),
    #[error("the shim library {} is missing: {}", .0.display(), .1)]
    NoLibrary(PathBuf, &'static str),
    #[error("the shim library cannot be preloaded from {}: {}", .0.display(), .1)]
    LibraryPath(PathBuf, &'static str),
    #[error("--backend kvm: {0}")]
    NoHostKvm(String),
}

impl Error {
    /// Exit codes as a shell gives them; 2 for everything that is anykvm's own.
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::NotFound(_) => ExitCode::from(127),
            Self::Exec(_, e) if e.kind() == ErrorKind::NotFound => ExitCode::from(127),
            Self::NotExecutable(..) | Self::Exec(..) => ExitCode::from(126),
            _ => ExitCode::from(2),
        }
    }
}

/// Runs the command; returns only when it could not be started.
pub fn run(args: RunArgs) -> ExitCode {
    if args.probe_host {
        return match host_kvm::run_guests_or_die() {
            Ok(()) => ExitCode::SUCCESS,
            Err(reason) => {
                println!("{reason}");
                ExitCode::FAILURE
            }
        };
    }
    match start(&args) {
        Ok(never) => match never {},
        Err(e) => {
            eprintln!("anykvm: {e}");
            e.exit_code()
        }
    }
}

/// Checks the command, chooses the backend and becomes the command.
fn start(args: &RunArgs) -> Result<std::convert::Infallible, Error> {
    let (name, rest) = args.command.split_first().ok_or(Error::NoCommand)?;
    let path = program::find(name)?;

    let (host, why) = match args.backend {
        Backend::Soft => (false, "as asked".to_string()),
        Backend::Kvm => {
            host_kvm::open().map_err(Error::NoHostKvm)?;
            (true, "as asked".to_string())
        }
        Backend::Auto => match host_kvm::probe() {
            Ok(()) => (true, "it runs guests".to_string()),
            Err(reason) => (false, format!("the host's /dev/kvm: {reason}")),
        },
    };

    let mut command = Command::new(&path);
    command.arg0(name).args(rest);
    if host {
        command.env("ANYKVM_BACKEND", "kvm");
        eprintln!("anykvm: backend kvm, the host's /dev/kvm ({why})");
    } else {
        program::check_preloadable(&path)?;
        let library = find_library()?;
        let preload = ld_preload(&library, std::env::var_os("LD_PRELOAD").as_deref())?;
        command.env("LD_PRELOAD", preload);
        command.env("ANYKVM_BACKEND", "soft");
        args.jit.hand_on(&mut command);
        eprintln!("anykvm: backend soft, a software processor ({why})");
    }
    Err(Error::Exec(path, command.exec()))
}

/// The shim: where `ANYKVM_LIB` says, next to this executable (a build tree), or in
/// `../lib/anykvm` of it (an installation).
fn find_library() -> Result<PathBuf, Error> {
    let exists = |p: &Path| p.metadata().is_ok_and(|m| m.is_file());
    if let Some(path) = std::env::var_os("ANYKVM_LIB").filter(|v| !v.is_empty()) {
        let path = PathBuf::from(path);
        return match std::path::absolute(&path) {
            Ok(absolute) if exists(&absolute) => Ok(absolute),
            _ => Err(Error::NoLibrary(path, "no such file (ANYKVM_LIB)")),
        };
    }
    let here = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.to_path_buf()))
        .unwrap_or_default();
    let beside = here.join(LIBRARY);
    [beside.clone(), here.join("../lib/anykvm").join(LIBRARY)]
        .into_iter()
        .find(|p| exists(p))
        .ok_or(Error::NoLibrary(
            beside,
            "build it (cargo build --release) or set ANYKVM_LIB",
        ))
}

/// `LD_PRELOAD` with the shim in front of what it held. The loader splits it at colons and spaces
/// and has no way to quote them.
fn ld_preload(library: &Path, existing: Option<&OsStr>) -> Result<OsString, Error> {
    let bytes = library.as_os_str().as_bytes();
    if bytes.iter().any(|b| matches!(b, b':' | b' ')) {
        return Err(Error::LibraryPath(
            library.to_path_buf(),
            "its path holds a space or a colon, which LD_PRELOAD cannot express",
        ));
    }
    let mut value = library.as_os_str().to_os_string();
    if let Some(rest) = existing.filter(|v| !v.is_empty()) {
        value.push(":");
        value.push(rest);
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_goes_in_front() {
        let lib = Path::new("/opt/libanykvm.so");
        assert_eq!(ld_preload(lib, None).unwrap(), "/opt/libanykvm.so");
        assert_eq!(
            ld_preload(lib, Some(OsStr::new(""))).unwrap(),
            "/opt/libanykvm.so"
        );
        assert_eq!(
            ld_preload(lib, Some(OsStr::new("a.so b.so"))).unwrap(),
            "/opt/libanykvm.so:a.so b.so"
        );
    }

    #[test]
    fn a_path_that_ld_preload_cannot_express_is_refused() {
        assert!(ld_preload(Path::new("/a b/libanykvm.so"), None).is_err());
        assert!(ld_preload(Path::new("/a:b/libanykvm.so"), None).is_err());
    }
}
