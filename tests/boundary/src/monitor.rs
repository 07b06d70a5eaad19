//! A VMM without devices of its own: it answers every exit by rule, notes it, injects what a program asks
//! for, and lets one vCPU run after the other. Nothing it does depends on where runs are cut.

use crate::machine::{Chip, IRQFD_GSI, Machine, NS_PER_INSTRUCTION, Setup};
use crate::state::Saved;
use anyhow::{Context, Result, bail};
use anykvm::bindings::{KVM_MP_STATE_RUNNABLE, kvm_msi};
use anykvm::{Errno, Kvm, TranslationMode, VcpuExit};
use std::collections::BTreeSet;
use std::fmt;

/// The port whose write ends a program.
pub const END: u16 = 0x99;
/// Ports that make interrupts, by what is written: a pulse on this GSI, ...
pub const PULSE: u16 = 0x200;
/// ... a level on it that stays, ...
pub const RAISE: u16 = 0x201;
/// ... until here, ...
pub const LOWER: u16 = 0x202;
/// ... (of all of them), ...
pub const LOWER_ALL: u16 = 0x208;
/// ... a signal of the irqfd, ...
pub const SIGNAL: u16 = 0x203;
/// ... an NMI for this vCPU, ...
pub const NMI: u16 = 0x204;
/// ... an SMI, ...
pub const SMI: u16 = 0x205;
/// ... an MSI with this vector for vCPU 0, ...
pub const MSI: u16 = 0x206;
/// ... without controllers in the kernel: this vector, when the vCPU takes it.
pub const VECTOR: u16 = 0x207;

/// R13 while a program reads what KVM writes by its clock: in another VM the numbers would be others, and the
/// program would begin again.
pub const READING: u64 = 0x5ead_1776_c10c;

/// Something that comes from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// A pulse on a GSI.
    Pulse(u32),
    /// A signal of the irqfd.
    Signal,
    /// KVM_NMI.
    Nmi(usize),
    /// KVM_SMI.
    Smi(usize),
    /// KVM_SIGNAL_MSI.
    Msi(u8),
    /// Without controllers in the kernel: this vector, when vCPU 0 takes it.
    Vector(u8),
}

/// A guest program, and what it runs in.
pub struct Program {
    /// Its name.
    pub name: String,
    /// The VM.
    pub setup: Setup,
    /// Memory at the beginning.
    pub image: Vec<(u64, Vec<u8>)>,
    /// Puts the vCPUs into the state it begins with.
    pub start: fn(&Kvm, &Machine) -> Result<()>,
    /// What comes from outside, by nanoseconds since the start.
    pub injections: Vec<(u64, Injection)>,
    /// How many instructions a vCPU runs before another may.
    pub slice: u64,
    /// A program that runs longer is stuck.
    pub most_ns: u64,
}

/// One exit.
#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    vcpu: usize,
    ns: u64,
    what: &'static str,
    address: u64,
    data: Vec<u8>,
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            vcpu,
            ns,
            what,
            address,
            data,
        } = self;
        write!(f, "{ns} ns, vCPU {vcpu}: {what} {address:#x} {data:02x?}")
    }
}

/// An exit, its answer given.
struct Exit {
    what: &'static str,
    address: u64,
    data: Vec<u8>,
}

impl Exit {
    fn answered(exit: VcpuExit, answers: &mut u64) -> Self {
        let (what, address, data): (_, u64, &[u8]) = match exit {
            VcpuExit::IoOut(port, data) => ("out", port.into(), data),
            VcpuExit::IoIn(port, data) => {
                fill(answers, port.into(), data);
                ("in", port.into(), data)
            }
            VcpuExit::MmioRead(address, data) => {
                fill(answers, address, data);
                ("read", address, data)
            }
            VcpuExit::MmioWrite(address, data) => ("write", address, data),
            VcpuExit::Hlt => ("hlt", 0, &[]),
            VcpuExit::IrqWindowOpen => ("window", 0, &[]),
            VcpuExit::SetTpr => ("tpr", 0, &[]),
            VcpuExit::IoapicEoi(vector) => ("eoi", vector.into(), &[]),
            VcpuExit::Shutdown => ("shutdown", 0, &[]),
            _ => ("?", 0, &[]),
        };
        Self {
            what,
            address,
            data: data.to_vec(),
        }
    }
}

/// Data for a read: another each time.
fn fill(answers: &mut u64, address: u64, data: &mut [u8]) {
    for byte in data {
        *answers = answers
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(address | 1);
        *byte = (*answers >> 56) as u8;
    }
}

/// How far a vCPU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// So many turns.
    Turns(u64),
    /// Until so many instructions are completed and events delivered.
    Instructions(u64),
}

impl Part {
    /// To the next exit.
    pub const ALL: Self = Self::Turns(u64::MAX);
}

/// Why [`Session::advance`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The turns are over, or the vCPU's time.
    Count,
    /// An exit, or a vCPU that waits.
    Exit,
    /// The program is at its end.
    End,
}

/// A program under way.
pub struct Session<'a> {
    kvm: &'a Kvm,
    program: &'a Program,
    /// The VM it is in now.
    pub machine: Machine,
    /// The exits so far.
    pub log: Vec<Record>,
    current: usize,
    slice_end: u64,
    waiting: usize,
    injected: usize,
    /// GSIs that are up.
    lines: BTreeSet<u32>,
    /// Vectors for KVM_INTERRUPT.
    vectors: Vec<u8>,
    answers: u64,
    ended: bool,
}

/// When every program starts on its clock.
const START_NS: u64 = 1_000_000_000;

impl<'a> Session<'a> {
    /// At the program's beginning.
    pub fn new(kvm: &'a Kvm, program: &'a Program, engine: TranslationMode) -> Result<Self> {
        let machine = Machine::new(kvm, &program.setup, engine, START_NS)?;
        for (at, bytes) in &program.image {
            machine.ram.write(*at as usize, bytes);
        }
        (program.start)(kvm, &machine)?;
        Ok(Self {
            kvm,
            program,
            machine,
            log: Vec::new(),
            current: 0,
            slice_end: START_NS + program.slice * NS_PER_INSTRUCTION,
            waiting: 0,
            injected: 0,
            lines: BTreeSet::new(),
            vectors: Vec::new(),
            answers: 0,
            ended: false,
        })
    }

    fn now(&self) -> u64 {
        self.machine.vm.counted_ns().unwrap_or_default()
    }

    fn next_injection(&self) -> Option<u64> {
        let (at, _) = self.program.injections.get(self.injected)?;
        Some(START_NS + at)
    }

    /// Lets one vCPU run, for at most so much.
    pub fn advance(&mut self, most: Part) -> Result<Stop> {
        if self.ended {
            return Ok(Stop::End);
        }
        let now = self.now();
        let end = START_NS + self.program.most_ns;
        if now >= end {
            self.note("time is over", 0, &[]);
            self.ended = true;
            return Ok(Stop::End);
        }
        while self.next_injection().is_some_and(|at| at <= now) {
            self.inject()?;
        }
        let until = self
            .next_injection()
            .map_or(self.slice_end, |at| at.min(self.slice_end))
            .min(end);
        let (turns, until) = match most {
            Part::Turns(n) => (n, until),
            Part::Instructions(n) => {
                let ns = n.saturating_mul(NS_PER_INSTRUCTION);
                (u64::MAX, until.min(now.saturating_add(ns)))
            }
        };
        match self.run_current(turns, until) {
            Ok(exit) => {
                self.waiting = 0;
                self.act(exit)?;
                return Ok(if self.ended { Stop::End } else { Stop::Exit });
            }
            Err(Errno::EINTR) => {
                self.waiting = 0;
                if self.now() >= self.slice_end {
                    self.next_vcpu();
                }
                return Ok(Stop::Count);
            }
            // A processor's first INIT ends KVM_RUN so, even if the SIPI is there, too; unless its state
            // was read before, which takes both.
            Err(Errno::EAGAIN) if self.runs_now()? => return Ok(Stop::Count),
            Err(Errno::EAGAIN) => {}
            Err(e) => return Err(e).with_context(|| self.dump()),
        }
        if self.now() != now {
            // It ran before.
            self.waiting = 0;
        }
        self.waiting += 1;
        self.next_vcpu();
        if self.waiting > self.machine.vcpus.len() {
            self.waiting = 0;
            if self.next_injection().is_some() {
                self.inject()?;
            } else if !self.machine.vm.skip_to_next_timer() {
                self.note("all wait", 0, &[]);
                self.ended = true;
                return Ok(Stop::End);
            }
        }
        Ok(Stop::Exit)
    }

    fn runs_now(&self) -> Result<bool> {
        let state = self.machine.vcpus[self.current].get_mp_state()?;
        Ok(state.mp_state == KVM_MP_STATE_RUNNABLE)
    }

    fn next_vcpu(&mut self) {
        self.current = (self.current + 1) % self.machine.vcpus.len();
        self.slice_end = self.now() + self.program.slice * NS_PER_INSTRUCTION;
    }

    fn dump(&self) -> String {
        let states: Vec<_> = self.machine.vcpus.iter().map(|v| v.dump()).collect();
        let last = &self.log[self.log.len().saturating_sub(8)..];
        format!("{last:#?}\n{}", states.join("\n"))
    }

    fn note(&mut self, what: &'static str, address: u64, data: &[u8]) {
        self.log.push(Record {
            vcpu: self.current,
            ns: self.now(),
            what,
            address,
            data: data.to_vec(),
        });
    }

    /// Runs the current vCPU to its next exit, which is answered.
    fn run_current(&mut self, turns: u64, until: u64) -> anykvm::Result<Exit> {
        let exit = self.machine.vcpus[self.current].run_counted(turns, until)?;
        Ok(Exit::answered(exit, &mut self.answers))
    }

    /// Notes an exit and does what it asks for.
    fn act(&mut self, exit: Exit) -> Result<()> {
        self.note(exit.what, exit.address, &exit.data);
        match exit.what {
            "out" => {
                let value = exit.data.first().copied().unwrap_or_default();
                self.port(exit.address as u16, value)?;
            }
            "shutdown" => self.ended = true,
            "hlt" if !self.vectors.is_empty() => {}
            // Nothing happens before that.
            "hlt" if self.next_injection().is_some() => self.inject()?,
            "hlt" => self.ended = true,
            "?" => bail!("an exit that no program has: {}", self.dump()),
            _ => {}
        }
        self.offer_vector()
    }

    fn port(&mut self, port: u16, value: u8) -> Result<()> {
        let gsi = u32::from(value);
        match port {
            END => self.ended = true,
            PULSE => self.do_inject(Injection::Pulse(gsi))?,
            // A line that is up is not raised: behind a move KVM takes that for an edge.
            RAISE if self.lines.insert(gsi) => self.machine.vm.set_irq_line(gsi, true)?,
            LOWER => {
                self.lines.remove(&gsi);
                self.machine.vm.set_irq_line(gsi, false)?;
            }
            LOWER_ALL => {
                for gsi in std::mem::take(&mut self.lines) {
                    self.machine.vm.set_irq_line(gsi, false)?;
                }
            }
            SIGNAL => self.do_inject(Injection::Signal)?,
            NMI => self.do_inject(Injection::Nmi(value.into()))?,
            SMI => self.do_inject(Injection::Smi(value.into()))?,
            MSI => self.do_inject(Injection::Msi(value))?,
            VECTOR => self.vectors.push(value),
            _ => {}
        }
        Ok(())
    }

    fn inject(&mut self) -> Result<()> {
        let (_, injection) = self.program.injections[self.injected];
        self.injected += 1;
        self.do_inject(injection)?;
        self.offer_vector()
    }

    fn do_inject(&mut self, injection: Injection) -> Result<()> {
        let vm = &self.machine.vm;
        match injection {
            Injection::Pulse(gsi) if self.lines.contains(&gsi) => {}
            Injection::Signal if self.lines.contains(&IRQFD_GSI) => {}
            Injection::Pulse(gsi) => {
                vm.set_irq_line(gsi, true)?;
                vm.set_irq_line(gsi, false)?;
            }
            Injection::Signal => self.machine.irqfd.write(1)?,
            Injection::Vector(vector) => self.vectors.push(vector),
            Injection::Nmi(vcpu) => self.machine.vcpus[vcpu].nmi()?,
            Injection::Smi(vcpu) => self.machine.vcpus[vcpu].smi()?,
            Injection::Msi(vector) => {
                let msi = kvm_msi {
                    address_lo: 0xfee0_0000,
                    data: vector.into(),
                    ..Default::default()
                };
                match vm.signal_msi(msi) {
                    // The APIC is off.
                    Ok(_) | Err(Errno::EPERM) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    /// Without controllers in the kernel: hands over a vector when the vCPU can take it, else asks to be
    /// told.
    fn offer_vector(&mut self) -> Result<()> {
        if self.machine.setup.chip != Chip::None {
            return Ok(());
        }
        let vcpu = &mut self.machine.vcpus[self.current];
        if !self.vectors.is_empty() && vcpu.ready_for_interrupt_injection() {
            vcpu.interrupt(self.vectors.remove(0).into())?;
        }
        vcpu.set_kvm_request_interrupt_window((!self.vectors.is_empty()).into());
        Ok(())
    }

    /// Completes what the last exit left half done, as a VMM that is about to save does.
    pub fn complete(&mut self) -> Result<()> {
        for n in 0..self.machine.vcpus.len() {
            let (current, slice_end) = (self.current, self.slice_end);
            self.current = n;
            self.machine.vcpus[n].set_kvm_immediate_exit(1);
            loop {
                match self.run_current(u64::MAX, u64::MAX) {
                    Ok(exit) => self.act(exit)?,
                    Err(Errno::EINTR) => break,
                    Err(e) => return Err(e).with_context(|| self.dump()),
                }
            }
            self.machine.vcpus[n].set_kvm_immediate_exit(0);
            (self.current, self.slice_end) = (current, slice_end);
        }
        Ok(())
    }

    /// Whether a vCPU reads what KVM writes by its clock.
    pub fn reads_clock(&self) -> Result<bool> {
        for vcpu in &self.machine.vcpus {
            if vcpu.get_regs()?.r13 == READING {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Everything that can be read.
    pub fn save(&self) -> Result<Saved> {
        Saved::read(&self.machine)
    }

    /// Goes on in a new VM with this state.
    pub fn move_to_new(&mut self, saved: &Saved) -> Result<()> {
        let engine = self.machine.engine;
        let new = Machine::new(self.kvm, &self.program.setup, engine, self.now())?;
        saved.write(&new)?;
        self.machine = new;
        if self.machine.setup.chip == Chip::None {
            for (n, vcpu) in self.machine.vcpus.iter_mut().enumerate() {
                vcpu.set_kvm_cr8(saved.cr8(n));
            }
            // The new run pages say nothing yet.
            self.complete()?;
            self.machine.vcpus[self.current]
                .set_kvm_request_interrupt_window((!self.vectors.is_empty()).into());
        }
        Ok(())
    }
}
