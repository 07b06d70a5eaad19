//! x87 control instructions and what of the x87 is ours to keep: the exception summary, the tag
//! word's two forms, and the instruction and data pointers (SDM Vol. 1, 8.1).
//!
//! Arithmetic runs on the host ([`super::simd::native`]) with the guest's control word; an unmasked
//! exception becomes pending there and is #MF at the next waiting instruction.
//!
//! The pointers are kept as FXSAVE lays them out for the code that ran: a 64-bit offset in 64-bit
//! code, else a 32-bit offset with the selector above it. Control instructions do not change them.

use iced_x86::{Code, Mnemonic, OpKind};

use crate::assist::{self, Class, MemoryUse, StackUse, Stub};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::events::vector;
use crate::exit::Stop;
use crate::mode::Mode;
use crate::state::{XsaveArea, cr0, reg, seg};

/// Offsets in the legacy region (SDM Vol. 1, table 10-2).
mod at {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const ST: usize = 32;
}

/// FCW after FNINIT.
pub const FCW_INIT: u16 = 0x37f;
/// FCW bits that can be set; bit 6 always is.
const FCW_BITS: u16 = 0x1f3f;
const FCW_FIXED: u16 = 0x40;
const EXCEPTIONS: u16 = 0x3f;
const ES: u16 = 1 << 7;
const BUSY: u16 = 1 << 15;
const C1: u16 = 1 << 9;
/// C0 to C3.
const CONDITIONS: u16 = 0x4700;
/// Exception flags and SF.
const STICKY: u16 = 0x7f;

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    Some(match insn.raw.mnemonic() {
        Mnemonic::Wait => wait,
        Mnemonic::Fninit => fninit,
        Mnemonic::Fnclex => fnclex,
        Mnemonic::Fnstcw => fnstcw,
        Mnemonic::Fldcw => fldcw,
        Mnemonic::Fnstsw if insn.raw.op0_kind() == OpKind::Register => fnstsw_ax,
        Mnemonic::Fnstsw => fnstsw,
        Mnemonic::Fnstenv => fnstenv,
        Mnemonic::Fldenv => fldenv,
        Mnemonic::Fnsave => fnsave,
        Mnemonic::Frstor => frstor,
        Mnemonic::Fnop => fnop,
        // 8087 and 287 controls, no-operations since.
        Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => no_operation,
        _ => return None,
    })
}

fn wait(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    if cpu.state.cr0 & (cr0::TS | cr0::MP) == cr0::TS | cr0::MP {
        return Err(cpu.raise_vector(vector::NM));
    }
    cpu.check_x87_pending()
}

fn fnop(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    cpu.check_x87_pending()
}

fn no_operation(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)
}

fn fninit(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    initialise(cpu);
    Ok(())
}

fn initialise(cpu: &mut Cpu) {
    set_top(cpu, 0);
    let x = &mut cpu.state.xsave;
    x.0[..24].fill(0);
    x.set_u16(at::FCW, FCW_INIT);
}

fn fnclex(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    let x = &mut cpu.state.xsave;
    x.set_u16(at::FSW, x.u16(at::FSW) & 0x7f00);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    cpu.write(insn, cpu.state.xsave.u16(at::FCW))
}

fn fldcw(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    cpu.check_x87_pending()?;
    let fcw = cpu.read::<u16>(insn)?;
    set_control(cpu, fcw);
    Ok(())
}

fn fnstsw(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    cpu.write(insn, cpu.state.xsave.u16(at::FSW))
}

fn fnstsw_ax(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    let fsw = u64::from(cpu.state.xsave.u16(at::FSW));
    let rax = &mut cpu.state.regs[reg::RAX];
    *rax = *rax & !0xffff | fsw;
    Ok(())
}

fn fnstenv(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    let wide = insn.raw.code() == Code::Fnstenv_m28byte;
    let (env, len) = environment(cpu, wide);
    let offset = cpu.effective_address(insn);
    cpu.write_bytes(insn.seg, offset, &env[..len])?;
    let fcw = cpu.state.xsave.u16(at::FCW);
    set_control(cpu, fcw | EXCEPTIONS);
    Ok(())
}

fn fldenv(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    cpu.check_x87_pending()?;
    let wide = insn.raw.code() == Code::Fldenv_m28byte;
    let mut env = [0; 28];
    let len = if wide { 28 } else { 14 };
    let offset = cpu.effective_address(insn);
    cpu.read_bytes(insn.seg, offset, &mut env[..len])?;
    load_environment(cpu, &env, wide);
    Ok(())
}

fn fnsave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    let wide = insn.raw.code() == Code::Fnsave_m108byte;
    let (env, len) = environment(cpu, wide);
    let mut image = [0; 108];
    image[..len].copy_from_slice(&env[..len]);
    for n in 0..8 {
        image[len + n * 10..][..10].copy_from_slice(&cpu.state.xsave.0[at::ST + n * 16..][..10]);
    }
    let offset = cpu.effective_address(insn);
    cpu.write_bytes(insn.seg, offset, &image[..len + 80])?;
    initialise(cpu);
    Ok(())
}

fn frstor(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::X87)?;
    cpu.check_x87_pending()?;
    let wide = insn.raw.code() == Code::Frstor_m108byte;
    let len = if wide { 28 } else { 14 };
    let mut image = [0; 108];
    let offset = cpu.effective_address(insn);
    cpu.read_bytes(insn.seg, offset, &mut image[..len + 80])?;
    let mut env = [0; 28];
    env[..len].copy_from_slice(&image[..len]);
    load_environment(cpu, &env, wide);
    for n in 0..8 {
        let st = &mut cpu.state.xsave.0[at::ST + n * 16..][..16];
        st[..10].copy_from_slice(&image[len + n * 10..][..10]);
        st[10..].fill(0);
    }
    Ok(())
}

/// Sets FCW and the exception summary that follows from it.
fn set_control(cpu: &mut Cpu, fcw: u16) {
    cpu.state.xsave.set_u16(at::FCW, fcw);
    normalise(&mut cpu.state.xsave);
}

/// Makes control and status words loaded from memory what the registers hold: FCW's reserved bits
/// fixed, FSW's ES and B set if and only if an unmasked exception is pending.
pub(crate) fn normalise(x: &mut XsaveArea) {
    let fcw = x.u16(at::FCW) & FCW_BITS | FCW_FIXED;
    x.set_u16(at::FCW, fcw);
    let fsw = x.u16(at::FSW);
    let summary = if fsw & !fcw & EXCEPTIONS != 0 {
        ES | BUSY
    } else {
        0
    };
    x.set_u16(at::FSW, fsw & !(ES | BUSY) | summary);
}

fn top(cpu: &Cpu) -> usize {
    usize::from(cpu.state.xsave.u16(at::FSW) >> 11 & 7)
}

/// Sets TOP. Registers are stored by their place on the stack, so they move; which physical
/// register holds what does not change.
fn set_top(cpu: &mut Cpu, new: usize) {
    let old = top(cpu);
    let x = &mut cpu.state.xsave;
    x.0[at::ST..at::ST + 128].rotate_left((new.wrapping_sub(old) & 7) * 16);
    x.set_u16(at::FSW, x.u16(at::FSW) & !(7 << 11) | (new as u16) << 11);
}

/// What every MMX instruction but EMMS does to the x87: TOP 0, all registers valid.
pub(crate) fn enter_mmx(cpu: &mut Cpu) {
    set_top(cpu, 0);
    cpu.state.xsave.0[at::FTW] = 0xff;
}

impl Cpu {
    /// An MMX register: the mantissa of the x87 register with that physical number.
    pub(crate) fn mmx(&self, n: u8) -> [u8; 8] {
        let st = usize::from(n).wrapping_sub(top(self)) & 7;
        self.state.xsave.u64(at::ST + st * 16).to_le_bytes()
    }
}

/// The tag word in full (SDM Vol. 1, 8.1.7): 0 valid, 1 zero, 2 special, 3 empty.
fn full_tags(cpu: &Cpu) -> u16 {
    let x = &cpu.state.xsave;
    let top = top(cpu);
    (0..8usize).fold(0, |tags, physical| {
        if x.0[at::FTW] >> physical & 1 == 0 {
            return tags | 3 << (physical * 2);
        }
        let st = at::ST + (physical.wrapping_sub(top) & 7) * 16;
        let mantissa = x.u64(st);
        let exponent = x.u16(st + 8) & 0x7fff;
        let tag = match (exponent, mantissa) {
            (0, 0) => 1,
            (1..=0x7ffe, m) if m >> 63 == 1 => 0,
            _ => 2,
        };
        tags | tag << (physical * 2)
    })
}

/// The pointers' layout in an environment: real and virtual-8086 mode have linear addresses.
fn linear_pointers(cpu: &Cpu) -> bool {
    !cpu.state.protected() || cpu.state.virtual_8086()
}

/// FSTENV's image and its length (SDM Vol. 1, figures 8-9 to 8-12).
fn environment(cpu: &Cpu, wide: bool) -> ([u8; 28], usize) {
    let x = &cpu.state.xsave;
    let words = [x.u16(at::FCW), x.u16(at::FSW), full_tags(cpu)];
    let (fip, fdp) = (x.u64(at::FIP), x.u64(at::FDP));
    let fop = u32::from(x.u16(at::FOP) & 0x7ff);
    // 64-bit code leaves no selectors.
    let selector = |p: u64| {
        if cpu.mode().code64() {
            0
        } else {
            (p >> 32) as u32 & 0xffff
        }
    };
    let (cs, ds) = (selector(fip), selector(fdp));
    let (ip, dp) = (fip as u32, fdp as u32);
    let pointers = if linear_pointers(cpu) {
        let ip = (cs << 4).wrapping_add(ip);
        let dp = (ds << 4).wrapping_add(dp);
        if wide {
            [
                ip & 0xffff | 0xffff_0000,
                ip >> 16 << 12 | fop,
                dp & 0xffff | 0xffff_0000,
                dp >> 16 << 12,
            ]
        } else {
            [ip, ip >> 16 << 12 | fop, dp, dp >> 16 << 12]
        }
    } else if wide {
        [ip, cs | fop << 16, dp, ds | 0xffff_0000]
    } else {
        [ip, cs, dp, ds]
    };
    let mut image = [0; 28];
    if wide {
        for (to, w) in image.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&(u32::from(w) | 0xffff_0000).to_le_bytes());
        }
        for (to, p) in image[12..].chunks_exact_mut(4).zip(pointers) {
            to.copy_from_slice(&p.to_le_bytes());
        }
        (image, 28)
    } else {
        for (to, w) in image.chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&w.to_le_bytes());
        }
        for (to, p) in image[6..].chunks_exact_mut(2).zip(pointers) {
            to.copy_from_slice(&(p as u16).to_le_bytes());
        }
        (image, 14)
    }
}

fn load_environment(cpu: &mut Cpu, image: &[u8; 28], wide: bool) {
    let word = |n: usize| {
        let i = if wide { n * 4 } else { n * 2 };
        u32::from(u16::from_le_bytes([image[i], image[i + 1]]))
            | if wide {
                u32::from(u16::from_le_bytes([image[i + 2], image[i + 3]])) << 16
            } else {
                0
            }
    };
    let (fcw, fsw, tags) = (word(0) as u16, word(1) as u16, word(2) as u16);
    let (a, b, c, d) = (word(3), word(4), word(5), word(6));
    let (ip, cs, dp, ds, fop) = match (linear_pointers(cpu), wide) {
        (true, true) => {
            let high = |p: u32| (p >> 12 & 0xffff) << 16;
            (a & 0xffff | high(b), 0, c & 0xffff | high(d), 0, b)
        }
        (true, false) => {
            let high = |p: u32| (p >> 12 & 0xf) << 16;
            (a | high(b), 0, c | high(d), 0, b)
        }
        (false, true) => (a, b & 0xffff, c, d & 0xffff, b >> 16),
        (false, false) => (a, b, c, d, 0),
    };
    set_top(cpu, usize::from(fsw >> 11 & 7));
    let code64 = cpu.mode().code64();
    let pointer = |selector: u32, offset: u32| {
        u64::from(offset) | if code64 { 0 } else { u64::from(selector) << 32 }
    };
    let x = &mut cpu.state.xsave;
    x.set_u16(at::FSW, fsw);
    x.0[at::FTW] = (0..8).fold(0, |abridged, n| {
        abridged | u8::from(tags >> (n * 2) & 3 != 3) << n
    });
    x.set_u16(at::FOP, fop as u16 & 0x7ff);
    x.set_u64(at::FIP, pointer(cs, ip));
    x.set_u64(at::FDP, pointer(ds, dp));
    set_control(cpu, fcw);
}

/// Runs an arithmetic, load, store or comparison instruction on the host: the short way if every
/// exception is masked, the registers it uses hold values and there is room for what it pushes;
/// else with the whole x87 state.
pub fn native(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let Some((stub, _)) = assist::lookup(insn.imm) else {
        return Err(Stop::Unimplemented);
    };
    match stub.stack() {
        Some(stack) if takes_short_way(cpu, stack) => {
            cpu.check_class(Class::X87)?;
            cpu.check_x87_pending()?;
            short_way(cpu, insn, stub, stack)
        }
        _ => super::simd::native(cpu, insn),
    }
}

fn takes_short_way(cpu: &Cpu, stack: &StackUse) -> bool {
    let x = &cpu.state.xsave;
    // Bit n: ST(n) holds a value.
    let valid = x.0[at::FTW].rotate_right(top(cpu) as u32);
    let used = (1 << stack.loads) - 1;
    x.u16(at::FCW) & EXCEPTIONS == EXCEPTIONS
        && valid & used == used
        && !(stack.pushes && valid & 0x80 != 0)
}

fn short_way(cpu: &mut Cpu, insn: &Insn, stub: &Stub, stack: &StackUse) -> Result<(), Stop> {
    let size = usize::from(stub.size);
    if stub.memory == MemoryUse::Read {
        super::simd::load_operand(cpu, insn, size)?;
    }
    cpu.counters.assisted += 1;
    let loads = usize::from(stack.loads);
    let (registers, _) = cpu.state.xsave.0[at::ST..at::ST + 128].as_chunks::<16>();
    for (slot, st) in cpu.assist.st.iter_mut().zip(&registers[..loads]) {
        *slot = *st;
    }
    cpu.assist.fcw = cpu.state.xsave.u16(at::FCW).into();

    stub.call_short(&mut cpu.assist);

    if stub.memory == MemoryUse::Write {
        let data = cpu.assist.memory;
        cpu.write_operand(insn, data.get(..size).unwrap_or_default())?;
    }
    let old = top(cpu);
    let new = old
        .wrapping_add(usize::from(stack.pops))
        .wrapping_sub(stack.pushes.into())
        & 7;
    set_top(cpu, new);
    let x = &mut cpu.state.xsave;
    let (registers, _) = x.0[at::ST..at::ST + 128].as_chunks_mut::<16>();
    for (st, slot) in registers
        .iter_mut()
        .zip(&cpu.assist.st[..usize::from(stack.stores())])
    {
        st[..10].copy_from_slice(&slot[..10]);
    }
    for n in 0..usize::from(stack.pops) {
        x.0[at::FTW] &= !(1 << (old.wrapping_add(n) & 7));
    }
    if stack.pushes {
        x.0[at::FTW] |= 1 << new;
    }
    let defined = if stack.compares { CONDITIONS } else { C1 };
    let fsw = cpu.assist.fsw as u16;
    x.set_u16(
        at::FSW,
        x.u16(at::FSW) & !defined | fsw & (defined | STICKY),
    );
    if stub.flags != 0 {
        cpu.state.rflags = cpu.state.rflags & !stub.flags | cpu.assist.flags() & stub.flags;
    }
    note_instruction(cpu, insn);
    Ok(())
}

/// Whether an instruction that runs on the host is a control instruction all the same.
fn is_control(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Ffree | Mnemonic::Ffreep | Mnemonic::Fincstp | Mnemonic::Fdecstp
    )
}

/// Notes instruction, data pointer and opcode of a non-control instruction just executed.
pub(crate) fn note_instruction(cpu: &mut Cpu, insn: &Insn) {
    if is_control(insn.raw.mnemonic()) {
        return;
    }
    let code64 = cpu.mode().code64();
    let pointer = |selector: u16, offset: u64| {
        if code64 {
            offset
        } else {
            offset & 0xffff_ffff | u64::from(selector) << 32
        }
    };
    let s = &cpu.state;
    let cs = s.seg[usize::from(seg::CS)].selector;
    let fip = pointer(cs, s.rip().wrapping_sub(insn.len.into()));
    let memory = insn.raw.op_kinds().any(|k| k == OpKind::Memory);
    let fdp = memory.then(|| {
        let n = crate::decode::segment_number(insn.raw.memory_segment()).unwrap_or(seg::DS);
        pointer(s.seg[usize::from(n)].selector, cpu.effective_address(insn))
    });
    // No prefix is in the range of the x87 opcodes.
    let opcode = insn.encoding().windows(2).find(|w| w[0] & 0xf8 == 0xd8);
    let fop = opcode.map_or(0, |w| u16::from(w[0] & 7) << 8 | u16::from(w[1]));
    let x = &mut cpu.state.xsave;
    x.set_u64(at::FIP, fip);
    x.set_u16(at::FOP, fop);
    if let Some(fdp) = fdp {
        x.set_u64(at::FDP, fdp);
    }
}
