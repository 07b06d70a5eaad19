//! Runs a guest twice, interpreted and translated, in a computer whose devices always answer the same: every
//! exit, and the state and memory at it, must be the same. What no budget ends must end by a request.

use std::cell::OnceCell;
use std::sync::Arc;

use anykvm_cpu::machine::{Hypercall, MsrResult};
use anykvm_cpu::memory::GuestMemory;
use anykvm_cpu::state::seg;
use anykvm_cpu::{Cpu, CpuState, Exit, Machine, Requests, requests};
use anykvm_jit::{Jit, Options};

use crate::drive::kick_soon;
use crate::input::Input;
use crate::layout::{HIGH, HIGH_SIZE, RAM_SIZE, ROM, ROM_SIZE, TOP, TOP_SIZE};
use crate::memory::Slots;
use crate::setup;

/// Instructions that the interpreter does between two exits before a guest is endless.
const BUDGET: u64 = 3000;
/// Exits that are looked at.
const EXITS: usize = 12;
/// Kicks that do not end a guest which ends by itself.
const KICKS: u32 = 20_000;

thread_local! {
    static SLOTS: OnceCell<Slots> = const { OnceCell::new() };
}

/// Ports and device memory that answer with their address; MSRs that are not the processor's are not there.
struct Fixed;

impl Machine for Fixed {
    fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        data.fill(port as u8);
        port & 1 != 0
    }
    fn pio_write(&self, port: u16, _: &[u8]) -> bool {
        port & 1 != 0
    }
    fn mmio_read(&self, _: &CpuState, address: u64, data: &mut [u8]) -> bool {
        data.fill((address >> 3) as u8);
        true
    }
    fn mmio_write(&self, _: &CpuState, _: u64, _: &[u8]) -> bool {
        true
    }
    fn interrupt_pending(&self) -> bool {
        false
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        None
    }
    fn wants_interrupt_window(&self) -> bool {
        false
    }
    fn read_cr8(&self) -> u64 {
        0
    }
    fn write_cr8(&self, _: u64) -> bool {
        false
    }
    fn read_msr(&self, _: &CpuState, _: u32) -> MsrResult<u64> {
        MsrResult::Fault
    }
    fn write_msr(&self, _: &mut CpuState, _: u32, _: u64) -> MsrResult<()> {
        MsrResult::Fault
    }
    fn msr_filter(&self, _: u32, _: bool) -> MsrResult<()> {
        MsrResult::Done(())
    }
    fn hypercall(&self, _: &mut CpuState, nr: u64, _: [u64; 5]) -> Hypercall {
        Hypercall::Done(nr)
    }
    fn take_ioapic_eoi(&self) -> Option<u8> {
        None
    }
    fn collect_events(&self, _: &mut CpuState) {}
}

/// One exit, and what there is then.
#[derive(PartialEq, Eq)]
struct Step {
    /// `None`: none came within the budget.
    exit: Option<Exit>,
    state: Vec<u64>,
    memory: Vec<u8>,
}

/// Runs one guest in both ways.
pub fn run(input: &Input) {
    SLOTS.with(|slots| {
        let slots = slots.get_or_init(Slots::new);
        let first = interpreted(slots, input);
        if has_chance(input) || first != interpreted(slots, input) {
            // The host's time, or a random number.
            translated(slots, input, &[]);
            return;
        }
        let second = translated(slots, input, &first);
        for (n, (i, t)) in first.iter().zip(&second).enumerate() {
            let Some(exit) = i.exit else { return };
            assert_eq!(Some(exit), t.exit, "exit {n}");
            let differ = i.state.iter().zip(&t.state).position(|(a, b)| a != b);
            let words = differ.map(|at| (at, i.state[at], t.state[at]));
            assert_eq!(
                words, None,
                "exit {n}, {exit:?}: word of state, interpreted, translated"
            );
            let differ = i.memory.iter().zip(&t.memory).position(|(a, b)| a != b);
            assert_eq!(
                differ, None,
                "exit {n}, {exit:?}: address of a byte of memory"
            );
        }
        assert_eq!(first.len(), second.len());
    });
}

/// Instructions whose undefined flags are not the same each time, or in both ways: RCL and RCR by more than one,
/// BMI1 and BMI2.
fn has_chance(input: &Input) -> bool {
    let rotates =
        |w: &[u8]| matches!(w, [0xc0 | 0xc1 | 0xd2 | 0xd3, m, ..] if matches!(m >> 3 & 7, 2 | 3));
    let bmi = |w: &[u8]| matches!(w, [0xc4, _, _, 0xf0 | 0xf2 | 0xf3 | 0xf5 | 0xf7]);
    [input.code, input.handler]
        .into_iter()
        .any(|code| code.windows(2).any(rotates) || code.windows(4).any(bmi))
}

fn guest(slots: &Slots, input: &Input) -> (Cpu, Arc<GuestMemory>) {
    let memory = slots.guest(&setup::image(input));
    let mut cpu = Cpu::new(
        memory.clone(),
        Arc::new(Fixed),
        Arc::new(Requests::default()),
    );
    setup::processor(&mut cpu, input);
    (cpu, memory)
}

fn translated(slots: &Slots, input: &Input, interpreted: &[Step]) -> Vec<Step> {
    let mut list = Vec::new();
    let (mut cpu, memory) = guest(slots, input);
    let options = Options {
        cache: 256 << 10,
        threshold: 1,
        ..Options::default()
    };
    cpu.set_translator(Some(Box::new(
        Jit::new(options).expect("executable memory"),
    )));
    let wanted = if interpreted.is_empty() {
        EXITS
    } else {
        interpreted.len()
    };
    for n in 0..wanted {
        let ends = interpreted.get(n).is_some_and(|step| step.exit.is_some());
        let mut kicks = 0;
        let exit = loop {
            kick_soon(cpu.requests().clone());
            match cpu.run(u64::MAX) {
                Exit::Request if ends => {
                    cpu.requests().take(requests::EXITS);
                    kicks += 1;
                    assert!(kicks < KICKS, "translated, it does not end\n{}", cpu.dump());
                }
                exit => break exit,
            }
        };
        let ended = exit != Exit::Request;
        list.push(step(&cpu, &memory, ended.then_some(exit)));
        if !ended || !answer(&mut cpu, exit) {
            break;
        }
    }
    list
}

fn interpreted(slots: &Slots, input: &Input) -> Vec<Step> {
    let mut list = Vec::new();
    let (mut cpu, memory) = guest(slots, input);
    for _ in 0..EXITS {
        let exit = cpu.run(BUDGET);
        let ended = exit != Exit::Budget;
        list.push(step(&cpu, &memory, ended.then_some(exit)));
        if !ended || !answer(&mut cpu, exit) {
            break;
        }
    }
    list
}

/// Does what an exit asks for; false if the guest cannot go on.
fn answer(cpu: &mut Cpu, exit: Exit) -> bool {
    match exit {
        Exit::Io { .. } => cpu.io.data.fill(0x5a),
        Exit::MmioRead { len, .. } => cpu.complete_mmio_read(&[0x5a; 8][..usize::from(len)]),
        Exit::MsrRead { .. } | Exit::MsrWrite { .. } => cpu.complete_msr(None),
        Exit::Hypercall { .. } => cpu.complete_hypercall(0),
        Exit::Shutdown | Exit::InternalError(_) | Exit::BadMemory => return false,
        _ => {}
    }
    true
}

fn step(cpu: &Cpu, memory: &GuestMemory, exit: Option<Exit>) -> Step {
    let s = &cpu.state;
    let mut state: Vec<u64> = (0..17).map(|n| s.regs[n]).collect();
    state.extend([s.rflags, s.cr0, s.cr2, s.cr3, s.cr4, s.xcr0, s.dr6, s.dr7]);
    state.extend(s.db);
    for part in s.seg[..=usize::from(seg::GS)]
        .iter()
        .chain([&s.ldtr, &s.tr])
    {
        let rest = u64::from(part.selector) | u64::from(part.attr) << 16;
        state.extend([part.base, u64::from(part.limit) | rest << 32]);
    }
    state.extend([
        s.gdtr.base,
        s.idtr.base,
        s.msr.efer,
        u64::from(s.events.shadow),
    ]);
    let words = s.xsave.0.chunks_exact(8);
    state.extend(words.map(|w| w.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))));
    let mut all = Vec::new();
    for (gpa, size) in [
        (0, RAM_SIZE),
        (ROM, ROM_SIZE),
        (TOP, TOP_SIZE),
        (HIGH, HIGH_SIZE),
    ] {
        let from = all.len();
        all.resize(from + size as usize, 0);
        memory.read(gpa, &mut all[from..]).expect("RAM");
    }
    Step {
        exit,
        state,
        memory: all,
    }
}
