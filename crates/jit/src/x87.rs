//! x87 and MMX: the guest's x87 state lives in the host's own while translated code that uses it runs.
//!
//! It is loaded when the first block that needs it is entered, and stored on the way out. FXRSTOR and FXSAVE
//! do that; they move the XMM registers and MXCSR, too, so these are always loaded first
//! ([`crate::vectors`]).
//!
//! Such code is only entered when the guest may use the x87, masks all its exceptions and has none pending:
//! then no instruction raises one. The instruction and data pointers would be the host's; the guest's own
//! are noted behind each instruction that sets them, as the interpreter notes them. What changes the
//! control word, and the environment's loads and stores, are the interpreter's.

use std::mem::offset_of;

use anykvm_cpu::state::{CpuState, Segment, XsaveArea, cr0, seg};
use anykvm_cpu::{Insn, assist, cpuid};
use iced_x86::{
    Code, CpuidFeature, IcedError, Instruction, MemoryOperand, Mnemonic, OpKind, Register,
};

use crate::asm::{Asm, Hole, at, shared, slot};
use crate::exits::Wish;
use crate::flags::Flags;
use crate::legacy::{Word, low_half};
use crate::memory::Address;
use crate::regs::{POINTER, SCRATCH};
use crate::shared::{Shared, Slot};
use crate::stubs::Stub;
use crate::translate::{Block, Site};

/// Offsets in the legacy region (SDM Vol. 1, table 10-2).
const FCW: usize = 0;
const FSW: usize = 2;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR_MASK: usize = 28;

/// What translated code keeps of the x87 outside the host's registers.
#[derive(Debug, Default)]
#[repr(C)]
pub struct X87 {
    /// Not zero while the guest's state is in the host's.
    live: u64,
    /// Not zero if translated code may use it.
    pub allow: u64,
    /// The host's control word, while the guest's is in force.
    host_fcw: u64,
    /// The guest's opcode, instruction pointer and data pointer, while `live`.
    fop: u64,
    fip: u64,
    fdp: u64,
    /// The four bytes of the legacy region that FXSAVE stores and the guest does not own.
    mxcsr_mask: u64,
}

macro_rules! field {
    ($name:ident) => {
        (offset_of!(Shared, x87) + offset_of!(X87, $name)) as i64
    };
}

/// Whether translated code may use the x87 now.
pub fn allowed(s: &CpuState) -> bool {
    const EXCEPTIONS: u16 = 0x3f;
    const ES: u16 = 1 << 7;
    s.cr0 & (cr0::EM | cr0::TS) == 0
        && s.xsave.u16(FCW) & EXCEPTIONS == EXCEPTIONS
        && s.xsave.u16(FSW) & ES == 0
}

/// Whether the instruction belongs to the x87 or to MMX.
pub fn belongs(raw: &Instruction) -> bool {
    use CpuidFeature as F;
    let registers = (0..raw.op_count())
        .filter(|i| raw.op_kind(*i) == OpKind::Register)
        .map(|i| raw.op_register(i))
        .any(|r| r.is_mm() || r.is_st());
    registers || is_fpu(raw) || raw.cpuid_features().contains(&F::MMX)
}

fn is_fpu(raw: &Instruction) -> bool {
    use CpuidFeature as F;
    raw.cpuid_features()
        .iter()
        .any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
        || raw.mnemonic() == Mnemonic::Fisttp
}

/// Whether translated code executes it, which belongs to the x87 or to MMX.
pub fn executes(raw: &Instruction) -> bool {
    use Mnemonic as M;
    let runs = match raw.mnemonic() {
        M::Fnstsw | M::Fnstcw => true,
        // They change what must not change here, or want to see the pointers.
        M::Fldcw | M::Fninit | M::Fnclex => false,
        M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor => false,
        M::Wait | M::Fnop | M::Fneni | M::Fndisi | M::Fnsetpm => false,
        _ => assist::serves(raw),
    };
    runs && cpuid::executes(raw)
}

/// Whether the pointers are noted behind an instruction: it is an x87 instruction, and not for control.
fn sets_pointers(raw: &Instruction) -> bool {
    use Mnemonic as M;
    let control = matches!(
        raw.mnemonic(),
        M::Ffree | M::Ffreep | M::Fincstp | M::Fdecstp | M::Fnstsw | M::Fnstcw
    );
    is_fpu(raw) && !control
}

fn area(offset: usize) -> MemoryOperand {
    at(SCRATCH, (offset_of!(CpuState, xsave) + offset) as i64)
}

fn store_u32(a: &mut Asm, to: MemoryOperand, from: Register) -> Result<(), IcedError> {
    a.emit(Code::Mov_rm32_r32, to, low_half(from))
}

fn load_u32(a: &mut Asm, to: Register, from: MemoryOperand) -> Result<(), IcedError> {
    a.emit(Code::Mov_r32_rm32, low_half(to), from)
}

fn load_u16(a: &mut Asm, to: Register, from: MemoryOperand) -> Result<(), IcedError> {
    a.emit(Code::Movzx_r32_rm16, low_half(to), from)
}

/// Generates the function that loads the state; the XMM registers are in the host's. It changes nothing but
/// that, RCX and R15.
pub fn loader(a: &mut Asm) -> Result<usize, IcedError> {
    let start = a.here();
    a.load(SCRATCH, slot(Slot::State))?;
    for n in 0..16u32 {
        a.emit(
            Code::Movups_xmmm128_xmm,
            area(XsaveArea::XMM + n as usize * 16),
            Register::XMM0 + n,
        )?;
    }
    let mxcsr = area(XsaveArea::MXCSR);
    a.put(&Instruction::with1(Code::Stmxcsr_m32, mxcsr)?)?;
    load_u16(a, POINTER, area(FOP))?;
    a.store(shared(field!(fop)), POINTER)?;
    a.load(POINTER, area(FIP))?;
    a.store(shared(field!(fip)), POINTER)?;
    a.load(POINTER, area(FDP))?;
    a.store(shared(field!(fdp)), POINTER)?;
    load_u32(a, POINTER, area(MXCSR_MASK))?;
    a.store(shared(field!(mxcsr_mask)), POINTER)?;
    let host = shared(field!(host_fcw));
    a.put(&Instruction::with1(Code::Fnstcw_m2byte, host)?)?;
    a.put(&Instruction::with1(Code::Fxrstor64_m512byte, area(0))?)?;
    a.store_u32(shared(field!(live)), 1)?;
    a.put(&Instruction::with(Code::Retnq))?;
    Ok(start)
}

/// Emits what stores the state, if it is in the host's, and gives the host its own back. R15 holds the address
/// of the processor's state. Destroys RCX.
pub fn store(a: &mut Asm) -> Result<(), IcedError> {
    a.load(POINTER, shared(field!(live)))?;
    let zero = a.jrcxz();
    let live = a.jmp();
    a.land_short(zero);
    let done = a.jmp();
    a.land(live);
    a.put(&Instruction::with1(Code::Fxsave64_m512byte, area(0))?)?;
    a.load(POINTER, shared(field!(fop)))?;
    a.emit(Code::Mov_rm16_r16, area(FOP), Register::CX)?;
    a.load(POINTER, shared(field!(fip)))?;
    a.store(area(FIP), POINTER)?;
    a.load(POINTER, shared(field!(fdp)))?;
    a.store(area(FDP), POINTER)?;
    a.load(POINTER, shared(field!(mxcsr_mask)))?;
    store_u32(a, area(MXCSR_MASK), POINTER)?;
    a.put(&Instruction::with(Code::Fninit))?;
    let host = shared(field!(host_fcw));
    a.put(&Instruction::with1(Code::Fldcw_m2byte, host)?)?;
    a.store_u32(shared(field!(live)), 0)?;
    a.land(done);
    Ok(())
}

/// The code that loads the state, when a block is entered without it.
pub(crate) struct Loader {
    start: usize,
    back: Hole,
}

impl Block {
    /// Emits the call of the loader, or what leaves the block to the interpreter if it must not be used.
    pub fn x87_loader(&mut self) -> Result<Loader, IcedError> {
        let refuse = self.a.jmp();
        let start = self.a.here();
        self.a.load(POINTER, shared(field!(allow)))?;
        self.a.jrcxz_back(refuse.0 - 1);
        let call = self.a.call();
        self.outward.push((call, Stub::LoadX87));
        let back = self.a.jmp();
        let exit = (self.exits).add(Wish::Block, self.start, Flags::Host(None));
        self.exits.lead(refuse, exit);
        Ok(Loader { start, back })
    }

    /// Emits the test whether the state is loaded; the vector registers are.
    pub fn x87_test(&mut self, loader: &Loader) -> Result<(), IcedError> {
        self.a.load(POINTER, shared(field!(live)))?;
        self.a.jrcxz_back(loader.start);
        self.a.land(loader.back);
        Ok(())
    }
}

fn selector(n: u8) -> i64 {
    let segment = offset_of!(CpuState, seg) + usize::from(n) * size_of::<Segment>();
    (segment + offset_of!(Segment, selector)) as i64
}

/// Stores the offset in R15 and, in 32-bit code, a segment's selector as one of the pointers.
fn store_pointer(b: &mut Block, to: i64, segment: u8) -> Result<(), IcedError> {
    if b.word == Word::Quad {
        return b.a.store(shared(to), SCRATCH);
    }
    store_u32(&mut b.a, shared(to), SCRATCH)?;
    b.a.load(SCRATCH, slot(Slot::State))?;
    load_u16(&mut b.a, SCRATCH, at(SCRATCH, selector(segment)))?;
    store_u32(&mut b.a, shared(to + 4), SCRATCH)
}

/// Behind an instruction: notes its instruction and data pointer and its opcode, if it sets them. Destroys RCX
/// and R15; leaves the flags alone if the instruction has no memory operand.
pub(crate) fn note(b: &mut Block, insn: &Insn, site: Site) -> Result<(), IcedError> {
    let raw = &insn.raw;
    if !sets_pointers(raw) {
        return Ok(());
    }
    b.a.load(SCRATCH, slot(Slot::Page))?;
    b.a.lea(SCRATCH, at(SCRATCH, site.at))?;
    store_pointer(b, field!(fip), seg::CS)?;
    // No prefix is in the range of the x87 opcodes.
    let opcode = insn.encoding().windows(2).find(|w| w[0] & 0xf8 == 0xd8);
    let fop = opcode.map_or(0, |w| u32::from(w[0] & 7) << 8 | u32::from(w[1]));
    b.a.store_u32(shared(field!(fop)), fop)?;
    let Some(address) = Address::of(insn, site.next) else {
        return Ok(());
    };
    if raw.op_kinds().any(|k| k == OpKind::Memory) {
        b.flags.release(&mut b.a)?;
        address.offset().compute(&mut b.a, SCRATCH, 0)?;
        let segment = match raw.memory_segment() {
            Register::ES => seg::ES,
            Register::CS => seg::CS,
            Register::SS => seg::SS,
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => seg::DS,
        };
        store_pointer(b, field!(fdp), segment)?;
    }
    Ok(())
}
