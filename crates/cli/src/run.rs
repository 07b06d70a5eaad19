//! `anykvm run`: starts a command with the software KVM in its address space.

use std::ffi::OsString;
use std::process::ExitCode;

/// The command line of `anykvm run`.
#[derive(clap::Args)]
pub struct RunArgs {
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Runs the command; returns only when it could not be started.
pub fn run(args: RunArgs) -> ExitCode {
    eprintln!(
        "anykvm: cannot run {:?}: this build has no shim library",
        args.command
    );
    ExitCode::from(2)
}
