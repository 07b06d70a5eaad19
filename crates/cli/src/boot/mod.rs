//! `anykvm boot`: a small VMM over the Rust API. One or more processors, memory, a serial console on
//! the terminal, block devices, hardware-reduced ACPI; no PCI, no firmware. It is the project's own
//! first user and the harness for its tests and benchmarks.

pub mod acpi;
mod boot_params;
mod bus;
mod console;
mod cpu;
pub mod error;
pub mod guest;
mod interrupt;
pub mod kernel;
pub mod layout;
mod machine;
pub mod memory;
mod stats;
mod terminal;
mod virtio;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use crate::jit::JitArgs;
use bus::Stop;
use error::BootError;
use machine::{Config, Machine, Report};
use memory::MemorySize;
use terminal::RawTerminal;

/// The exit code for a command line that cannot be carried out.
const EXIT_USAGE: u8 = 2;
/// Most processors that an 8-bit APIC id can number, 255 being everyone.
const MAX_CPUS: i64 = 254;

/// What the kernel has to know of this machine: where its console is, that the keyboard controller
/// resets it (with hardware-reduced ACPI Linux would look for EFI first), that it has no PCI.
const PARAMETERS: &str = "console=ttyS0 reboot=k pci=off";

/// The command line of `anykvm boot`.
#[derive(clap::Args)]
pub struct BootArgs {
    /// The kernel: a bzImage, or a vmlinux (ELF)
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel parameters, added to 'console=ttyS0 reboot=k pci=off'
    #[arg(
        long,
        value_name = "PARAMETERS",
        default_value = "",
        allow_hyphen_values = true
    )]
    append: String,
    /// Memory: a number of MiB, or with a unit (K, M, G)
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    mem: MemorySize,
    /// Number of processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=MAX_CPUS))]
    cpus: u8,
    /// A raw disk image, which the guest can write; may be given several times
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
    #[command(flatten)]
    jit: JitArgs,
    /// Print times, instructions and exits at the end
    #[arg(long)]
    stats: bool,
}

/// Boots the kernel and returns when the machine has stopped.
pub fn run(args: BootArgs) -> ExitCode {
    let start = Instant::now();
    match boot(&args) {
        Ok((stop, report)) => {
            let code = summarise(&stop, start);
            if args.stats {
                eprintln!("{}", report.0);
            }
            code
        }
        Err(error) => {
            eprintln!("anykvm: {error}");
            if error.is_internal() {
                ExitCode::FAILURE
            } else {
                ExitCode::from(EXIT_USAGE)
            }
        }
    }
}

fn boot(args: &BootArgs) -> Result<(Stop, Report), BootError> {
    if args.disks.len() > layout::VIRTIO_MAX {
        return Err(BootError::Disk {
            path: args.disks[layout::VIRTIO_MAX].clone(),
            reason: format!("only {} disks are possible", layout::VIRTIO_MAX),
        });
    }
    let machine = Machine::new(&Config {
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        command_line: format!("{PARAMETERS} {}", args.append)
            .trim_end()
            .to_owned(),
        memory: args.mem,
        cpus: args.cpus,
        disks: args.disks.clone(),
        translation: args.jit.translation().map_err(BootError::Translation)?,
    })?;
    if std::io::stdin().is_terminal() {
        eprintln!("anykvm: Ctrl-A x ends the machine, Ctrl-A d shows its processors");
    }
    let _raw = RawTerminal::enter().map_err(BootError::host("cannot set up the terminal"))?;
    machine.run()
}

/// One line about the end, and the exit code for it.
fn summarise(stop: &Stop, start: Instant) -> ExitCode {
    let seconds = start.elapsed().as_secs_f64();
    match stop {
        Stop::PowerOff => eprintln!("anykvm: the guest powered off after {seconds:.2} s"),
        Stop::Reset => eprintln!("anykvm: the guest reset itself after {seconds:.2} s"),
        Stop::Quit => eprintln!("anykvm: ended from the keyboard after {seconds:.2} s"),
        Stop::Failed(reason) => {
            eprintln!("anykvm: stopped after {seconds:.2} s: {reason}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
