//! A small monitor that asks of `/dev/kvm` what Firecracker and Cloud Hypervisor ask of it, in their order, by
//! the crates that they are made of. It boots a kernel, and saves the machine to a folder when the guest
//! has said some words; a new process goes on from there.
//!
//!     monitor boot FOLDER --kind firecracker --entry pvh --kernel FILE --initrd FILE --command-line … --until WORDS
//!     monitor resume FOLDER --until WORDS [--finish WORDS]
//!
//! With `--finish`, a line is typed instead of saving, and the end of the guest's work awaited.

mod acpi;
mod boot;
mod cpu;
mod devices;
mod ioapic;
mod machine;

mod snapshot;
mod vcpu;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};

use machine::Machine;

/// Whose way is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
pub enum Kind {
    /// All interrupt controllers in KVM; memory saved as a file whose dirty pages are renewed.
    Firecracker,
    /// The I/O APIC in the monitor, its pins as MSI routes; the clock stands while the machine is paused.
    CloudHypervisor,
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Entry {
    /// 64-bit, by Linux's boot protocol.
    Linux,
    /// 32-bit, by Xen's PVH.
    Pvh,
}

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Start a kernel
    Boot {
        #[arg(long)]
        kind: Kind,
        #[command(flatten)]
        guest: boot::Guest,
        #[command(flatten)]
        then: Then,
    },
    /// Go on with a machine that was saved
    Resume {
        #[command(flatten)]
        then: Then,
    },
}

/// What happens when the guest has run.
#[derive(clap::Args)]
struct Then {
    /// Where the machine is kept
    folder: PathBuf,
    /// Save, or finish, when the guest has printed this
    #[arg(long)]
    until: String,
    /// How often it has to have printed that
    #[arg(long, default_value_t = 2)]
    times: usize,
    /// Do not save: type a line, and wait for these words
    #[arg(long)]
    finish: Option<String>,
    /// How many seconds the guest may take to say any of this
    #[arg(long, default_value_t = 200)]
    limit: u64,
}

fn main() -> Result<()> {
    match Cli::parse().action {
        Action::Boot { kind, guest, then } => {
            let machine = Machine::boot(kind, &guest)?;
            go_on(machine, &then)
        }
        Action::Resume { then } => {
            let machine = snapshot::load(&then.folder)?;
            go_on(machine, &then)
        }
    }
}

fn go_on(mut machine: Machine, then: &Then) -> Result<()> {
    let limit = Duration::from_secs(then.limit);
    machine.resume()?;
    machine.wait_for(&then.until, then.times, limit)?;
    // A guest that is stopped and goes on in the same process, first.
    machine.pause()?;
    machine.resume()?;
    machine.wait_for(&then.until, then.times + 1, limit)?;
    match &then.finish {
        Some(words) => {
            machine.devices.type_in(b"stop\n")?;
            machine.wait_for(words, 1, limit)?;
            machine.pause()
        }
        None => {
            machine.pause()?;
            let pages = snapshot::save(&machine, &then.folder)?;
            ensure!(pages > 0, "the guest has written nothing");
            eprintln!("monitor: {pages} pages saved");
            Ok(())
        }
    }
}
