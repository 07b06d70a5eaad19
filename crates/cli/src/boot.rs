//! `anykvm boot`: the built-in VMM.

use std::path::PathBuf;
use std::process::ExitCode;

/// The command line of `anykvm boot`.
#[derive(clap::Args)]
pub struct BootArgs {
    /// The kernel: a bzImage, or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
}

/// Boots the kernel and returns when the machine has stopped.
pub fn run(args: BootArgs) -> ExitCode {
    eprintln!(
        "anykvm: cannot boot {}: this build has no VMM",
        args.kernel.display()
    );
    ExitCode::from(2)
}
