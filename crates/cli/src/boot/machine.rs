//! The machine: a VM with its memory, interrupt controllers, devices and processors, each processor on
//! a thread of its own.

use std::io;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;

use anykvm::{IoEventAddress, Kvm, Translation, Vcpu, VcpuExit, VcpuFd, VmFd};
use signal_hook::consts::SIGUSR1;
use signal_hook::iterator::Signals;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::bus::{Bus, Effect, Stop};
use super::console::{Console, Escape};
use super::error::BootError;
use super::guest::{Guest, GuestConfig};
use super::interrupt::InterruptLine;
use super::layout;
use super::memory::MemorySize;
use super::stats::Meter;
use super::virtio::block::Block;
use super::virtio::mmio::Transport;

/// What the machine is made of.
pub struct Config {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub command_line: String,
    pub memory: MemorySize,
    pub cpus: u8,
    pub disks: Vec<PathBuf>,
    pub translation: Translation,
}

/// A machine that is ready to run.
pub struct Machine {
    shared: Arc<Shared>,
    vcpus: Vec<VcpuFd>,
    stops: Receiver<Stop>,
}

/// What the processors' threads share. The guest's memory is among it, so it stays mapped as long as
/// any of them may run.
struct Shared {
    vm: VmFd,
    bus: Bus,
    meter: OnceLock<Meter>,
    stop: Sender<Stop>,
    /// The processors, which keep their counters when their threads have ended.
    vcpus: Vec<Arc<Vcpu>>,
    /// How often the user has asked for a dump of the processors.
    dumps: AtomicU32,
    _memory: Arc<GuestMemoryMmap<()>>,
}

impl Machine {
    /// Makes everything and loads the kernel. Files are looked at before the VM exists.
    pub fn new(config: &Config) -> Result<Self, BootError> {
        let guest = Guest::load(&GuestConfig {
            kernel: &config.kernel,
            initrd: config.initrd.as_deref(),
            command_line: &config.command_line,
            memory: config.memory,
            cpus: config.cpus,
            disks: config.disks.len(),
        })?;
        let disks: Vec<Block> = config
            .disks
            .iter()
            .enumerate()
            .map(|(index, path)| Block::open(path, index))
            .collect::<Result<_, _>>()?;
        let kvm = Kvm::new().map_err(BootError::host("cannot open KVM"))?;
        if usize::from(config.cpus) > kvm.get_max_vcpus() {
            return Err(BootError::Cpus(format!(
                "{} are too many, the limit is {}",
                config.cpus,
                kvm.get_max_vcpus()
            )));
        }
        let vm = kvm
            .create_vm()
            .map_err(BootError::host("cannot create a VM"))?;
        vm.set_translation(config.translation.clone())
            .map_err(BootError::host("cannot set how guest code is run"))?;
        guest.equip_vm(&vm)?;
        let console = Console::new(InterruptLine::new(&vm, layout::SERIAL_GSI)?);
        let disks = disks
            .into_iter()
            .enumerate()
            .map(|(index, block)| add_disk(&vm, &guest.memory, index, block))
            .collect::<Result<_, _>>()?;

        let mut vcpus = Vec::new();
        for id in 0..config.cpus {
            let vcpu = vm
                .create_vcpu(u64::from(id))
                .map_err(BootError::host("cannot create a processor"))?;
            guest.prepare_vcpu(&kvm, &vcpu, id, |_| {})?;
            vcpus.push(vcpu);
        }
        let objects = vcpus.iter().map(|vcpu| Arc::clone(vcpu.vcpu())).collect();
        let (stop, stops) = mpsc::channel();
        Ok(Self {
            shared: Arc::new(Shared {
                vm,
                bus: Bus { console, disks },
                meter: OnceLock::new(),
                stop,
                vcpus: objects,
                dumps: AtomicU32::new(0),
                _memory: guest.memory,
            }),
            vcpus,
            stops,
        })
    }

    /// Runs until the machine stops. The processors' threads end with the process.
    pub fn run(self) -> Result<(Stop, Report), BootError> {
        let Self {
            shared,
            vcpus,
            stops,
        } = self;
        let meter = shared.meter.get_or_init(Meter::start);
        let failed = BootError::host("cannot start a thread");
        let spawned = spawn_all(&shared, vcpus);
        spawned.map_err(failed)?;
        let stop = stops
            .recv()
            .unwrap_or_else(|_| Stop::Failed("every processor is gone".to_owned()));
        let report = Report(meter.report(&shared.vm));
        Ok((stop, report))
    }
}

/// The lines that `--stats` prints.
pub struct Report(pub String);

fn spawn_all(shared: &Arc<Shared>, vcpus: Vec<VcpuFd>) -> io::Result<()> {
    for (index, disk) in shared.bus.disks.iter().enumerate() {
        let disk = Arc::clone(disk);
        thread::Builder::new()
            .name(format!("disk{index}"))
            .spawn(move || disk.serve_bell())?;
    }
    let console = Arc::clone(shared);
    thread::Builder::new()
        .name("console".to_owned())
        .spawn(move || {
            console.bus.console.feed(|key| match key {
                Escape::Quit => {
                    let _ = console.stop.send(Stop::Quit);
                }
                Escape::Dump => console.dump(),
            });
        })?;
    let mut signals = Signals::new([SIGUSR1])?;
    let dumper = Arc::clone(shared);
    thread::Builder::new()
        .name("dump".to_owned())
        .spawn(move || {
            for _ in &mut signals {
                dumper.dump();
            }
        })?;
    for (id, vcpu) in vcpus.into_iter().enumerate() {
        let shared = Arc::clone(shared);
        thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                let stop = std::panic::catch_unwind(AssertUnwindSafe(|| shared.run_vcpu(id, vcpu)))
                    .unwrap_or_else(|_| {
                        Stop::Failed(format!("internal error: the thread of vCPU {id} panicked"))
                    });
                // Nobody listens any more when the machine has been stopped already.
                let _ = shared.stop.send(stop);
            })?;
    }
    Ok(())
}

impl Shared {
    /// Asks every processor for a dump.
    fn dump(&self) {
        self.dumps.fetch_add(1, Ordering::SeqCst);
        for vcpu in &self.vcpus {
            vcpu.kick_handle().kick();
        }
    }

    /// Runs a processor until something stops the machine.
    fn run_vcpu(&self, id: usize, mut vcpu: VcpuFd) -> Stop {
        let mut dumped = 0;
        loop {
            let asked = self.dumps.load(Ordering::SeqCst);
            if asked != dumped {
                dumped = asked;
                eprintln!("anykvm: vCPU {id}:\n{}", vcpu.dump());
            }
            let effect = match vcpu.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    self.bus.read_port(port, data);
                    Effect::None
                }
                Ok(VcpuExit::IoOut(port, data)) => self.bus.write_port(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => {
                    self.bus.read_memory(address, data);
                    Effect::None
                }
                Ok(VcpuExit::MmioWrite(address, data)) => self.bus.write_memory(address, data),
                Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Effect::None,
                Ok(VcpuExit::Shutdown) => {
                    Effect::Stop(Stop::Failed(format!("triple fault on vCPU {id}")))
                }
                Ok(VcpuExit::InternalError) => {
                    Effect::Stop(Stop::Failed(format!("internal error of KVM on vCPU {id}")))
                }
                Ok(VcpuExit::FailEntry(reason, _)) => Effect::Stop(Stop::Failed(format!(
                    "vCPU {id} cannot be entered, reason {reason:#x}"
                ))),
                Ok(exit) => Effect::Stop(Stop::Failed(format!(
                    "exit on vCPU {id} that this machine does not know: {exit:?}"
                ))),
                // EAGAIN: a processor that waited for its SIPI has been woken.
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Effect::None,
                Err(error) => Effect::Stop(Stop::Failed(format!("KVM_RUN on vCPU {id}: {error}"))),
            };
            match effect {
                Effect::None => {}
                Effect::Mark(number) => {
                    if let Some(meter) = self.meter.get() {
                        meter.mark(&self.vm, number);
                    }
                }
                Effect::Stop(stop) => {
                    if matches!(stop, Stop::Failed(_)) {
                        eprintln!("anykvm: vCPU {id}:\n{}", vcpu.dump());
                    }
                    return stop;
                }
            }
        }
    }
}

/// Puts a disk behind window `index`: its bell is an ioeventfd, its interrupt an irqfd.
fn add_disk(
    vm: &VmFd,
    guest: &Arc<GuestMemoryMmap<()>>,
    index: usize,
    block: Block,
) -> Result<Arc<Transport>, BootError> {
    let bell = EventFd::new(EFD_CLOEXEC).map_err(BootError::host("cannot create an eventfd"))?;
    let window = layout::VIRTIO_MMIO + index as u64 * layout::VIRTIO_MMIO_SIZE;
    vm.register_ioevent(
        &bell,
        &IoEventAddress::Mmio(window + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY)),
        0_u32,
    )
    .map_err(BootError::host("cannot register an ioeventfd"))?;
    let line = InterruptLine::new(vm, layout::VIRTIO_FIRST_GSI + index as u32)?;
    Ok(Arc::new(Transport::new(
        block,
        Arc::clone(guest),
        line,
        bell,
    )))
}
