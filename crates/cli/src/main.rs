//! The `anykvm` command: `anykvm boot` starts a Linux kernel in the built-in VMM, `anykvm run` gives
//! an unmodified VMM a working `/dev/kvm`.

#![deny(unsafe_code)]

use std::process::ExitCode;

use anykvm_cli::{boot, run};
use clap::{Parser, Subcommand};

/// KVM without the hardware: virtual machines on any x86-64 Linux host.
#[derive(Parser)]
#[command(name = "anykvm", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a Linux kernel in the built-in VMM, its serial console on this terminal
    Boot(boot::BootArgs),
    /// Run a command that finds a working /dev/kvm
    Run(run::RunArgs),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Boot(args) => boot::run(args),
        Command::Run(args) => run::run(args),
    }
}
