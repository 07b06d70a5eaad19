//! Linux boots, does some work and powers off, while it is moved to new VMs at random instructions: the machine
//! of `anykvm boot`, with counted time. Every exit and its time, what the console says, the instructions and
//! the memory in the end must be those of a boot that stays where it is.
//!
//! A new VM takes over the memory as it is mapped; now and then it gets a copy instead.

use crate::machine::Chip;
use crate::ram::PAGE;
use crate::state::{State, blank};
use anyhow::{Context, Result, bail, ensure};
use anykvm::bindings::kvm_cpuid_entry2;
use anykvm::{CountedTime, Errno, Kvm, Translation, TranslationMode, VcpuExit, VcpuFd, VmFd};
use anykvm_cli::boot::guest::{Guest, GuestConfig};
use anykvm_cli::boot::memory::{self, MemorySize};
use anykvm_cli::boot::{acpi, layout};
use anykvm_differential::random::Random;
use std::cell::Cell;
use std::collections::hash_map::DefaultHasher;
use std::convert::Infallible;
use std::hash::Hasher;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_superio::{Serial, Trigger, serial::NoEvents};

const MEMORY: u64 = 192 << 20;
/// When the machine's clock starts.
const START_NS: u64 = 1_000_000_000;
/// A boot that takes more nanoseconds is stuck. An instruction takes one.
const MOST_NS: u64 = 100_000_000_000;
/// One move of so many copies the memory.
const COPIES: u64 = 50;

/// What to boot.
pub struct Boot {
    /// The kernel: a bzImage or a vmlinux.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// Kernel parameters.
    pub parameters: String,
}

/// What a boot came to.
#[derive(PartialEq, Eq)]
pub struct Outcome {
    /// What the console said.
    pub console: Vec<u8>,
    /// What the clock showed when the guest powered off.
    ns: u64,
    /// Instructions and events until then.
    pub instructions: u64,
    /// All exits and their times.
    exits: u64,
    /// Memory, but for what KVM writes by the clock.
    memory: u64,
}

/// The serial port's interrupt: it has gone up.
#[derive(Clone, Default)]
struct Line(Rc<Cell<bool>>);

impl Trigger for Line {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

/// A boot under way.
struct Session<'a> {
    kvm: &'a Kvm,
    vcpu: [VcpuFd; 1],
    vm: VmFd,
    guest: Guest,
    engine: TranslationMode,
    uart: Serial<Line, NoEvents, Vec<u8>>,
    line: Line,
    exits: DefaultHasher,
    instructions: u64,
    off: bool,
}

/// Random numbers would be others each time.
fn without_random_numbers(entry: &mut kvm_cpuid_entry2) {
    match (entry.function, entry.index) {
        (1, _) => entry.ecx &= !(1 << 30),
        (7, 0) => entry.ebx &= !(1 << 18),
        _ => {}
    }
}

fn new_vm(
    kvm: &Kvm,
    guest: &Guest,
    engine: TranslationMode,
    now_ns: u64,
) -> Result<(VmFd, VcpuFd)> {
    let vm = kvm.create_vm_with_counted_time(CountedTime {
        start_ns: now_ns,
        ns_per_instruction: 1,
    })?;
    vm.set_translation(Translation {
        mode: engine,
        ..Translation::default()
    })?;
    guest.equip_vm(&vm)?;
    let vcpu = vm.create_vcpu(0)?;
    Ok((vm, vcpu))
}

impl<'a> Session<'a> {
    fn new(kvm: &'a Kvm, boot: &Boot, engine: TranslationMode) -> Result<Self> {
        let guest = Guest::load(&GuestConfig {
            kernel: &boot.kernel,
            initrd: Some(&boot.initrd),
            command_line: &boot.parameters,
            memory: MemorySize(MEMORY),
            cpus: 1,
            disks: 0,
        })?;
        let (vm, vcpu) = new_vm(kvm, &guest, engine, START_NS)?;
        guest.prepare_vcpu(kvm, &vcpu, 0, without_random_numbers)?;
        let line = Line::default();
        Ok(Self {
            kvm,
            vcpu: [vcpu],
            vm,
            guest,
            engine,
            uart: Serial::new(line.clone(), Vec::new()),
            line,
            exits: DefaultHasher::new(),
            instructions: 0,
            off: false,
        })
    }

    fn now(&self) -> u64 {
        self.vm.counted_ns().unwrap_or_default()
    }

    /// Runs until then, or until the guest is off.
    fn run_until(&mut self, ns: u64) -> Result<()> {
        while !self.off && self.now() < ns {
            ensure!(self.now() < MOST_NS, "it does not end: {}", self.dump());
            let before = self.now();
            let ran = self.run_once(ns);
            // One takes one nanosecond.
            self.instructions += self.now() - before;
            match ran {
                Ok(()) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => ensure!(
                    self.vm.skip_to_next_timer(),
                    "it waits for nothing: {}",
                    self.dump()
                ),
                Err(e) => return Err(e).with_context(|| self.dump()),
            }
        }
        Ok(())
    }

    /// To the next exit, which is answered.
    fn run_once(&mut self, until: u64) -> anykvm::Result<()> {
        let [vcpu] = &mut self.vcpu;
        let serial = |port: u16| {
            let register = port.wrapping_sub(layout::SERIAL);
            (register < layout::SERIAL_LENGTH).then_some(register as u8)
        };
        let mut note = |what: u64, data: &[u8]| {
            self.exits.write_u64(what);
            self.exits.write(data);
        };
        match vcpu.run_counted(u64::MAX, until)? {
            VcpuExit::IoIn(port, data) => {
                for byte in &mut *data {
                    *byte = match serial(port) {
                        Some(register) => self.uart.read(register),
                        None if matches!(
                            port,
                            layout::I8042 | layout::I8042_COMMAND | layout::SLEEP_STATUS
                        ) =>
                        {
                            0
                        }
                        None => 0xff,
                    };
                }
                note(u64::from(port), data);
            }
            VcpuExit::IoOut(port, data) => {
                for byte in data {
                    if let Some(register) = serial(port) {
                        // It fails only if the line or the console does, and neither can.
                        let _ = self.uart.write(register, *byte);
                    }
                    let reset = port == layout::I8042_COMMAND && *byte == layout::I8042_RESET;
                    let off = port == layout::SLEEP_CONTROL && acpi::is_soft_off(*byte);
                    self.off |= reset || off;
                }
                note(1 << 32 | u64::from(port), data);
            }
            VcpuExit::MmioRead(address, data) => {
                data.fill(0xff);
                note(2 << 32 ^ address, data);
            }
            VcpuExit::MmioWrite(address, data) => note(3 << 32 ^ address, data),
            _ => return Err(Errno::EIO),
        }
        self.exits.write_u64(self.now());
        if self.line.0.take() {
            self.vm.set_irq_line(layout::SERIAL_GSI, true)?;
            self.vm.set_irq_line(layout::SERIAL_GSI, false)?;
        }
        Ok(())
    }

    fn dump(&self) -> String {
        self.vcpu[0].dump()
    }

    /// Completes what the last exit left half done.
    fn complete(&mut self) -> Result<()> {
        self.vcpu[0].set_kvm_immediate_exit(1);
        loop {
            match self.run_once(u64::MAX) {
                Ok(()) => {}
                Err(Errno::EINTR) => break,
                Err(e) => return Err(e).with_context(|| self.dump()),
            }
        }
        self.vcpu[0].set_kvm_immediate_exit(0);
        Ok(())
    }

    fn state(&self) -> Result<State> {
        State::read(&self.vm, &self.vcpu, Chip::Full)
    }

    /// Goes on in a new VM.
    fn move_to_new(&mut self, copy: bool) -> Result<()> {
        self.complete()?;
        let state = self.state()?;
        if copy {
            let new = memory::allocate(MemorySize(MEMORY))?;
            for_each_page(&self.guest.memory, |at, page| {
                Ok(new.write_slice(page, GuestAddress(at))?)
            })?;
            self.guest.memory = Arc::new(new);
        }
        let (vm, vcpu) = new_vm(self.kvm, &self.guest, self.engine, self.now())?;
        // The old VM uses the memory no longer.
        (self.vcpu, self.vm) = ([vcpu], vm);
        state.write(&self.vm, &self.vcpu)?;
        match state.difference(&self.state()?) {
            Some(what) => bail!("read, and read back: {what}"),
            None => Ok(()),
        }
    }

    fn outcome(self) -> Result<Outcome> {
        let written = self.state()?.written_by_kvm();
        let mut memory = DefaultHasher::new();
        for_each_page(&self.guest.memory, |at, page| {
            let mut page = *page;
            blank(&mut page, at as usize, &written);
            memory.write_u64(at);
            memory.write(&page);
            Ok(())
        })?;
        Ok(Outcome {
            console: self.uart.writer().clone(),
            ns: self.now(),
            instructions: self.instructions,
            exits: self.exits.finish(),
            memory: memory.finish(),
        })
    }
}

/// The pages that are not all zero.
fn for_each_page(
    memory: &GuestMemoryMmap<()>,
    mut see: impl FnMut(u64, &[u8; PAGE]) -> Result<()>,
) -> Result<()> {
    let mut page = [0; PAGE];
    for region in memory.iter() {
        let start = region.start_addr().0;
        for at in (start..start + region.len()).step_by(PAGE) {
            memory.read_slice(&mut page, GuestAddress(at))?;
            if page != [0; PAGE] {
                see(at, &page)?;
            }
        }
    }
    Ok(())
}

/// Boots without moving.
pub fn undisturbed(kvm: &Kvm, boot: &Boot, engine: TranslationMode) -> Result<Outcome> {
    let mut session = Session::new(kvm, boot, engine)?;
    session.run_until(u64::MAX)?;
    session.outcome()
}

/// Boots, moving about so many times; returns what came of it, and how many moves there were. `whole` is what
/// came of a boot that did not move.
pub fn moved(
    kvm: &Kvm,
    boot: &Boot,
    engine: TranslationMode,
    moves: u64,
    random: &mut Random,
    whole: &Outcome,
) -> Result<u64> {
    let mut session = Session::new(kvm, boot, engine)?;
    let gap = (whole.instructions / moves.max(1)).max(1);
    let mut done = 0;
    loop {
        // Half of the moves soon follow another.
        let next = match random.below(4) {
            0 => 1 + random.below(8),
            1 => 1 + random.below(2000),
            _ => 1 + random.below(4 * gap),
        };
        session.run_until(session.now().saturating_add(next))?;
        if session.off {
            break;
        }
        let at = session.instructions;
        session
            .move_to_new(random.once_in(COPIES))
            .with_context(|| format!("move {done}, behind {at} instructions"))?;
        done += 1;
    }
    same(whole, &session.outcome()?)?;
    Ok(done)
}

/// Whether two boots were the same.
pub fn same(a: &Outcome, b: &Outcome) -> Result<()> {
    let n = a.console.iter().zip(&b.console).take_while(|(a, b)| a == b);
    let n = n.count();
    if n < a.console.len().max(b.console.len()) {
        let line = |o: &Outcome| {
            let end = o.console.len().min(n + 200);
            String::from_utf8_lossy(&o.console[n.saturating_sub(300).min(end)..end]).into_owned()
        };
        bail!("the consoles differ:\n{}\n---- and\n{}", line(a), line(b));
    }
    let count = |o: &Outcome| (o.instructions, o.ns);
    let (one, two) = (count(a), count(b));
    ensure!(
        one == two,
        "instructions, nanoseconds: {one:?}, and {two:?}"
    );
    ensure!(a.exits == b.exits, "other exits, or at other times");
    ensure!(a.memory == b.memory, "other memory in the end");
    Ok(())
}
