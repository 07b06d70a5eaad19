//! SIMD, x87, bit-manipulation and the other computing instructions: everything [`crate::assist`]
//! runs on the host, and who may use which registers when (SDM Vol. 2, 2.4 and 2.5; Vol. 3, 14.1).

use iced_x86::EncodingKind;

use crate::assist::{self, Class, Frame, HIGH_BYTE, MemoryUse};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::events::vector;
use crate::exit::Stop;
use crate::state::{XsaveArea, cr0, cr4};

/// XCR0 bits (SDM Vol. 1, 13.3).
pub mod xcr0 {
    #![allow(missing_docs)]
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const OPMASK: u64 = 1 << 5;
    pub const ZMM_HI256: u64 = 1 << 6;
    pub const HI16_ZMM: u64 = 1 << 7;
    pub const PKRU: u64 = 1 << 9;
}

/// MXCSR's exception flags.
pub const MXCSR_FLAGS: u32 = 0x3f;
const MXCSR_MASKS: u32 = 0x1f80;
const MXCSR_UM: u32 = 1 << 11;
const MXCSR_FTZ: u32 = 1 << 15;
/// Flags of exceptions found before the operation is carried out: invalid, denormal, divide by zero.
const MXCSR_BEFORE: u32 = 0b111;
/// MXCSR bits that exist (also what FXSAVE stores as MXCSR_MASK).
pub const MXCSR_MASK: u32 = 0xffff;

/// The handler of an instruction that a stub can run; the stub's number goes into the instruction.
pub fn select(insn: &mut Insn) -> Option<Handler> {
    if let Some(handler) = super::simd_moves::select(insn) {
        return Some(handler);
    }
    match assist::bind(&insn.raw) {
        Some(packed) if assist::host_has(&insn.raw) => {
            insn.imm = packed;
            let x87 = assist::lookup(packed).is_some_and(|(stub, _)| stub.stack().is_some());
            Some(if x87 { super::x87::native } else { native })
        }
        Some(_) => Some(unavailable),
        // CPUID offers no extension with these encodings but those that stubs serve, and XCR0
        // cannot enable AVX-512's state.
        None if insn.raw.encoding() != EncodingKind::Legacy && !assist::serves(&insn.raw) => {
            Some(unavailable)
        }
        None => None,
    }
}

/// An instruction that the host, or this processor, and so the guest, does not have.
fn unavailable(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Err(cpu.ud())
}

impl Cpu {
    /// #UD and #NM of instructions that use a class of registers.
    #[inline(always)]
    pub(crate) fn check_class(&mut self, class: Class) -> Result<(), Stop> {
        let s = &self.state;
        let fault = match class {
            Class::Gpr => return Ok(()),
            Class::GprVex => {
                if s.protected() && !s.virtual_8086() {
                    return Ok(());
                }
                vector::UD
            }
            Class::X87 => {
                if s.cr0 & (cr0::EM | cr0::TS) == 0 {
                    return Ok(());
                }
                vector::NM
            }
            Class::Mmx => {
                if s.cr0 & (cr0::EM | cr0::TS) == 0 {
                    return Ok(());
                }
                if s.cr0 & cr0::EM != 0 {
                    vector::UD
                } else {
                    vector::NM
                }
            }
            Class::Sse => {
                let enabled = s.cr0 & cr0::EM == 0 && s.cr4 & cr4::OSFXSR != 0;
                if enabled && s.cr0 & cr0::TS == 0 {
                    return Ok(());
                }
                if enabled { vector::NM } else { vector::UD }
            }
            Class::Avx => {
                const AVX: u64 = xcr0::SSE | xcr0::AVX;
                let enabled = s.cr4 & cr4::OSXSAVE != 0
                    && s.xcr0 & AVX == AVX
                    && s.protected()
                    && !s.virtual_8086();
                if enabled && s.cr0 & cr0::TS == 0 {
                    return Ok(());
                }
                if enabled { vector::NM } else { vector::UD }
            }
        };
        Err(self.raise_vector(fault))
    }

    /// #MF if an unmasked x87 exception is pending: the check every waiting x87 and MMX instruction
    /// begins with (SDM Vol. 1, 8.6). CR0.NE is taken as set: FERR# and IRQ 13 are not modelled.
    #[inline(always)]
    pub(crate) fn check_x87_pending(&mut self) -> Result<(), Stop> {
        let x = &self.state.xsave;
        if x.u16(2) & !x.u16(0) & 0x3f == 0 {
            return Ok(());
        }
        Err(self.raise_vector(vector::MF))
    }

    /// Low 16 bytes of a vector register.
    #[inline(always)]
    pub(crate) fn xmm(&self, n: u8) -> [u8; 16] {
        let at = XsaveArea::XMM + usize::from(n & 15) * 16;
        let mut v = [0; 16];
        v.copy_from_slice(&self.state.xsave.0[at..at + 16]);
        v
    }
    /// Bytes 16-31 of a vector register.
    #[inline(always)]
    pub(crate) fn ymm_hi(&self, n: u8) -> [u8; 16] {
        let at = XsaveArea::YMM_HI + usize::from(n & 15) * 16;
        let mut v = [0; 16];
        v.copy_from_slice(&self.state.xsave.0[at..at + 16]);
        v
    }
    /// Sets the low 16 bytes of a vector register, the rest stays (legacy SSE).
    #[inline(always)]
    pub(crate) fn set_xmm(&mut self, n: u8, v: &[u8; 16]) {
        let at = XsaveArea::XMM + usize::from(n & 15) * 16;
        self.state.xsave.0[at..at + 16].copy_from_slice(v);
    }
    /// Sets 32 bytes of a vector register and clears the rest (VEX).
    #[inline(always)]
    pub(crate) fn set_ymm(&mut self, n: u8, lo: &[u8; 16], hi: &[u8; 16]) {
        self.set_xmm(n, lo);
        let n = usize::from(n & 15);
        let at = XsaveArea::YMM_HI + n * 16;
        self.state.xsave.0[at..at + 16].copy_from_slice(hi);
        if self.state.xcr0 & xcr0::ZMM_HI256 != 0 {
            let at = XsaveArea::ZMM_HI + n * 32;
            self.state.xsave.0[at..at + 32].fill(0);
        }
    }

    /// Reads a memory operand of 1 to 64 bytes; up to 8 bytes are a single access.
    #[inline(always)]
    pub(crate) fn read_operand(&mut self, insn: &Insn, size: usize) -> Result<[u8; 64], Stop> {
        let offset = self.effective_address(insn);
        self.read_operand_at(insn.seg, offset, size)
    }

    /// As [`Cpu::read_operand`], at an offset through a segment code.
    #[inline(always)]
    pub(crate) fn read_operand_at(
        &mut self,
        seg: u8,
        offset: u64,
        size: usize,
    ) -> Result<[u8; 64], Stop> {
        let mut buf = [0; 64];
        match size {
            16 => buf[..16].copy_from_slice(&self.read_16(seg, offset)?),
            32 => buf[..32].copy_from_slice(self.read_32(seg, offset)?.as_flattened()),
            8 => buf[..8].copy_from_slice(&self.read_at::<u64>(seg, offset)?.to_le_bytes()),
            4 => buf[..4].copy_from_slice(&self.read_at::<u32>(seg, offset)?.to_le_bytes()),
            2 => buf[..2].copy_from_slice(&self.read_at::<u16>(seg, offset)?.to_le_bytes()),
            1 => buf[0] = self.read_at::<u8>(seg, offset)?,
            n => self.read_bytes(seg, offset, &mut buf[..n.min(64)])?,
        }
        Ok(buf)
    }

    /// Writes a memory operand of 1 to 64 bytes; up to 8 bytes are a single access.
    #[inline(always)]
    pub(crate) fn write_operand(&mut self, insn: &Insn, data: &[u8]) -> Result<(), Stop> {
        let offset = self.effective_address(insn);
        match *data {
            [a] => self.write_at(insn.seg, offset, a),
            [a, b] => self.write_at(insn.seg, offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_at(insn.seg, offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => self.write_at(
                insn.seg,
                offset,
                u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            ),
            _ => self.write_bytes(insn.seg, offset, data),
        }
    }

    /// #GP(0) if the memory operand's linear address is no multiple of `size`.
    #[inline(always)]
    pub(crate) fn check_operand_alignment(&mut self, insn: &Insn, size: u64) -> Result<(), Stop> {
        let base = self.state.seg[usize::from(insn.seg & 7)].base;
        let linear = base.wrapping_add(self.effective_address(insn));
        if linear & (size - 1) == 0 {
            Ok(())
        } else {
            Err(self.gp0())
        }
    }
}

/// Runs an instruction on the host.
pub fn native(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let Some((stub, binding)) = assist::lookup(insn.imm) else {
        return Err(Stop::Unimplemented);
    };
    cpu.check_class(stub.class)?;
    if stub.x87 {
        if stub.class == Class::Sse {
            cpu.check_class(Class::Mmx)?;
        }
        cpu.check_x87_pending()?;
    }
    if stub.aligned {
        cpu.check_operand_alignment(insn, stub.size.into())?;
    }
    let size = usize::from(stub.size);
    if stub.memory == MemoryUse::Read {
        load_operand(cpu, insn, size)?;
    }
    cpu.counters.assisted += 1;

    for (slot, v) in stub.vectors().iter().enumerate().filter(|(_, v)| v.read) {
        let n = binding.vectors[slot];
        let lo = cpu.xmm(n);
        cpu.assist.vectors[slot][..16].copy_from_slice(&lo);
        if v.bytes == 32 {
            let hi = cpu.ymm_hi(n);
            cpu.assist.vectors[slot][16..32].copy_from_slice(&hi);
        }
    }
    for slot in 0..stub.gprs().len() {
        let code = binding.gprs[slot];
        let shift = if code & HIGH_BYTE != 0 { 8 } else { 0 };
        cpu.assist.gprs[slot] = cpu.state.regs[code & 15] >> shift;
    }
    if stub.reads_flags {
        cpu.assist.set_flags(cpu.state.rflags);
    }
    let mxcsr = cpu.state.xsave.u32(XsaveArea::MXCSR);
    cpu.assist.mxcsr = host_mxcsr(mxcsr);
    if stub.x87 {
        load_x87(cpu);
    }

    stub.call(&mut cpu.assist);

    if stub.mxcsr {
        let raised = cpu.assist.mxcsr & MXCSR_FLAGS;
        let unmasked = raised & !(mxcsr >> 7) & MXCSR_FLAGS;
        if unmasked != 0 {
            return Err(simd_exception(cpu, mxcsr, raised, unmasked));
        }
    }
    let stored = stub.class != Class::X87 || !x87_store_withheld(&cpu.assist);
    if stub.memory == MemoryUse::Write && stored {
        let data = cpu.assist.memory;
        cpu.write_operand(insn, data.get(..size).unwrap_or_default())?;
    }
    if stub.mxcsr {
        let raised = cpu.assist.mxcsr & MXCSR_FLAGS;
        cpu.state.xsave.set_u32(XsaveArea::MXCSR, mxcsr | raised);
    }
    if stub.x87 {
        store_x87(cpu);
        if stub.class == Class::X87 {
            super::x87::note_instruction(cpu, insn);
        }
    }
    for (slot, v) in stub.vectors().iter().enumerate().filter(|(_, v)| v.write) {
        let n = binding.vectors[slot];
        let (halves, _) = cpu.assist.vectors[slot].as_chunks::<16>();
        let lo = halves[0];
        match (stub.class, v.bytes) {
            (Class::Avx, 32) => {
                let hi = halves[1];
                cpu.set_ymm(n, &lo, &hi);
            }
            (Class::Avx, _) => cpu.set_ymm(n, &lo, &[0; 16]),
            _ => cpu.set_xmm(n, &lo),
        }
    }
    for (slot, write) in stub.gprs().iter().enumerate() {
        if *write {
            cpu.state.regs[binding.gprs[slot] & 15] = cpu.assist.gprs[slot];
        }
    }
    if stub.flags != 0 {
        cpu.state.rflags = cpu.state.rflags & !stub.flags | cpu.assist.flags() & stub.flags;
    }
    Ok(())
}

/// Puts the memory operand into the frame, in stores of the size the stub loads.
#[inline(always)]
pub(super) fn load_operand(cpu: &mut Cpu, insn: &Insn, size: usize) -> Result<(), Stop> {
    let offset = cpu.effective_address(insn);
    match size {
        16 => {
            let v = cpu.read_16(insn.seg, offset)?;
            cpu.assist.memory[..16].copy_from_slice(&v);
        }
        8 => {
            let v = cpu.read_at::<u64>(insn.seg, offset)?;
            cpu.assist.memory[..8].copy_from_slice(&v.to_le_bytes());
        }
        4 => {
            let v = cpu.read_at::<u32>(insn.seg, offset)?;
            cpu.assist.memory[..4].copy_from_slice(&v.to_le_bytes());
        }
        _ => cpu.assist.memory = cpu.read_operand_at(insn.seg, offset, size)?,
    }
    Ok(())
}

/// The MXCSR to run with: the guest's rounding and denormal modes, every exception masked, no flag
/// set. With underflow unmasked, a tiny result is an underflow even if it is exact; flush-to-zero
/// makes the host report it so, and the flushed result is never committed.
fn host_mxcsr(guest: u32) -> u32 {
    let ftz = if guest & MXCSR_UM == 0 { MXCSR_FTZ } else { 0 };
    guest & MXCSR_MASK & !MXCSR_FLAGS | MXCSR_MASKS | ftz
}

/// An unmasked SIMD floating-point exception: flags are set, nothing else is (SDM Vol. 1, 11.5.3).
#[cold]
fn simd_exception(cpu: &mut Cpu, mxcsr: u32, raised: u32, unmasked: u32) -> Stop {
    // One found before the operation keeps those that arise in it from being found.
    let seen = if unmasked & MXCSR_BEFORE != 0 {
        raised & MXCSR_BEFORE
    } else {
        raised
    };
    cpu.state.xsave.set_u32(XsaveArea::MXCSR, mxcsr | seen);
    let v = if cpu.state.cr4 & cr4::OSXMMEXCPT != 0 {
        vector::XM
    } else {
        vector::UD
    };
    cpu.raise_vector(v)
}

/// Bytes of an FXSAVE image that are x87 state: control, status and tag words, opcode, pointers.
const X87_CONTROL: std::ops::Range<usize> = 0..24;
/// ST0-ST7.
const X87_REGISTERS: std::ops::Range<usize> = 32..160;

fn load_x87(cpu: &mut Cpu) {
    let from = &cpu.state.xsave.0;
    let to = &mut cpu.assist.x87.0;
    to[X87_CONTROL].copy_from_slice(&from[X87_CONTROL]);
    to[24..28].copy_from_slice(&cpu.assist.mxcsr.to_le_bytes());
    to[X87_REGISTERS].copy_from_slice(&from[X87_REGISTERS]);
}

fn store_x87(cpu: &mut Cpu) {
    let from = &cpu.assist.x87.0;
    let to = &mut cpu.state.xsave.0;
    // Status and tag words; the pointers would be the stub's.
    to[2..5].copy_from_slice(&from[2..5]);
    to[X87_REGISTERS].copy_from_slice(&from[X87_REGISTERS]);
}

/// Whether an x87 store did not take place because of an unmasked exception (all but precision,
/// which is found after the result is stored; SDM Vol. 1, 8.5).
fn x87_store_withheld(frame: &Frame) -> bool {
    let fcw = frame.x87.0[0];
    let fsw = frame.x87.0[2];
    fsw & !fcw & 0b01_1111 != 0
}
