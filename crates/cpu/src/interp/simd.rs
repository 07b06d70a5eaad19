//! SIMD, x87, bit-manipulation and the other computing instructions: everything [`crate::assist`]
//! runs on the host, and who may use which registers when (SDM Vol. 2, 2.4 and 2.5; Vol. 3, 14.1).

use iced_x86::EncodingKind;

use crate::assist::{self, Class, Frame, HIGH_BYTE, MemoryUse, Stub, Underflow};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::events::vector;
use crate::exit::Stop;
use crate::state::{XsaveArea, cr0, cr4, rflags};

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
    /// What EVEX-encoded instructions need.
    pub const AVX512: u64 = SSE | AVX | OPMASK | ZMM_HI256 | HI16_ZMM;
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
    let done_here = super::simd_moves::select(insn)
        .or_else(|| super::opmask::select(insn))
        .or_else(|| super::simd_evex_moves::select(insn));
    if done_here.is_some() {
        return done_here;
    }
    match assist::bind(&insn.raw) {
        Some(packed) => {
            insn.imm = packed;
            let x87 = assist::lookup(packed).is_some_and(|(stub, _)| stub.stack().is_some());
            Some(match insn.raw.encoding() {
                EncodingKind::EVEX => super::simd_evex::native,
                _ if x87 => super::x87::native,
                _ => native,
            })
        }
        // CPUID offers no extension with these encodings but those that stubs serve.
        None if insn.raw.encoding() != EncodingKind::Legacy && !assist::serves(&insn.raw) => {
            Some(unavailable)
        }
        None => None,
    }
}

/// An instruction that this processor does not have.
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
            Class::Avx => return self.check_extended(xcr0::SSE | xcr0::AVX),
            Class::Opmask => return self.check_extended(xcr0::SSE | xcr0::OPMASK),
            Class::Evex => return self.check_extended(xcr0::AVX512),
        };
        Err(self.raise_vector(fault))
    }

    /// As [`Cpu::check_class`], of classes that need CR4.OSXSAVE and these bits of XCR0 (SDM Vol. 2,
    /// 2.8, "OS XSAVE Enabling Requirements").
    #[inline(always)]
    fn check_extended(&mut self, components: u64) -> Result<(), Stop> {
        let s = &self.state;
        let enabled = s.cr4 & cr4::OSXSAVE != 0
            && s.xcr0 & components == components
            && s.protected()
            && !s.virtual_8086();
        if enabled && s.cr0 & cr0::TS == 0 {
            return Ok(());
        }
        let fault = if enabled { vector::NM } else { vector::UD };
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
            64 => buf.copy_from_slice(self.read_64(seg, offset)?.as_flattened()),
            8 => buf[..8].copy_from_slice(&self.read_at::<u64>(seg, offset)?.to_le_bytes()),
            4 => buf[..4].copy_from_slice(&self.read_at::<u32>(seg, offset)?.to_le_bytes()),
            2 => buf[..2].copy_from_slice(&self.read_at::<u16>(seg, offset)?.to_le_bytes()),
            1 => buf[0] = self.read_at::<u8>(seg, offset)?,
            n => self.read_bytes(seg, offset, &mut buf[..n.min(64)])?,
        }
        Ok(buf)
    }

    /// Reads an element as masked moves and gathers do: without an alignment check (SDM Vol. 2,
    /// VMASKMOV, VPGATHERDD).
    pub(crate) fn read_element(
        &mut self,
        seg: u8,
        offset: u64,
        size: usize,
    ) -> Result<[u8; 64], Stop> {
        if self.state.rflags & rflags::AC == 0 {
            return self.read_operand_at(seg, offset, size);
        }
        let mut element = [0; 64];
        self.read_bytes(seg, offset, &mut element[..size.min(64)])?;
        Ok(element)
    }

    /// Writes a memory operand of 1 to 64 bytes; up to 8 bytes are a single access.
    #[inline(always)]
    pub(crate) fn write_operand(&mut self, insn: &Insn, data: &[u8]) -> Result<(), Stop> {
        let offset = self.effective_address(insn);
        self.write_element(insn.seg, offset, data)
    }

    /// As [`Cpu::write_operand`], at an offset through a segment code.
    #[inline(always)]
    pub(crate) fn write_element(&mut self, seg: u8, offset: u64, data: &[u8]) -> Result<(), Stop> {
        match *data {
            [a] => self.write_at(seg, offset, a),
            [a, b] => self.write_at(seg, offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_at(seg, offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.write_at(seg, offset, u64::from_le_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => self.write_bytes(seg, offset, data),
        }
    }

    /// Writes an element as scatters do: without an alignment check.
    pub(super) fn write_unaligned(
        &mut self,
        seg: u8,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Stop> {
        if self.state.rflags & rflags::AC == 0 {
            return self.write_element(seg, offset, data);
        }
        self.write_bytes(seg, offset, data)
    }

    /// Sets exception flags in MXCSR.
    #[inline(always)]
    pub(super) fn add_mxcsr_flags(&mut self, flags: u32) {
        if flags != 0 {
            let mxcsr = self.state.xsave.u32(XsaveArea::MXCSR);
            self.state.xsave.set_u32(XsaveArea::MXCSR, mxcsr | flags);
        }
    }

    /// The memory operand's linear address, unchecked.
    #[inline(always)]
    pub(crate) fn operand_linear(&self, insn: &Insn) -> u64 {
        let base = self.state.seg[usize::from(insn.seg & 7)].base;
        base.wrapping_add(self.effective_address(insn))
    }

    /// #GP(0) if the memory operand's linear address is no multiple of `size`.
    #[inline(always)]
    pub(crate) fn check_operand_alignment(&mut self, insn: &Insn, size: u64) -> Result<(), Stop> {
        if self.operand_linear(insn) & (size - 1) == 0 {
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
        cpu.assist.vectors[slot][0] = cpu.xmm(n);
        if v.bytes == 32 {
            cpu.assist.vectors[slot][1] = cpu.ymm_hi(n);
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
    let mxcsr = run_mxcsr(cpu, stub);
    if stub.x87 {
        load_x87(cpu);
    }

    probe_store(cpu, insn, stub)?;
    stub.call(&mut cpu.assist);

    let raised = finish_mxcsr(cpu, stub, mxcsr)?;
    let stored = stub.class != Class::X87 || !x87_store_withheld(&cpu.assist);
    if stub.memory == MemoryUse::Write && stored {
        let data = cpu.assist.memory;
        cpu.write_operand(insn, data.get(..size).unwrap_or_default())?;
    } else if stub.memory == MemoryUse::Write {
        // A store that does not take place faults all the same.
        let offset = cpu.effective_address(insn);
        cpu.probe_write(insn.seg, offset, size)?;
        cpu.check_store_alignment(insn, size)?;
    }
    cpu.add_mxcsr_flags(raised);
    if stub.x87 {
        store_x87(cpu);
        if stub.class == Class::X87 {
            super::x87::note_instruction(cpu, insn);
        }
    }
    for (slot, v) in stub.vectors().iter().enumerate().filter(|(_, v)| v.write) {
        let n = binding.vectors[slot];
        let [lo, hi, ..] = cpu.assist.vectors[slot];
        match (stub.class, v.bytes) {
            (Class::Avx, 32) => cpu.set_ymm(n, &lo, &hi),
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

/// Sets the MXCSR to run with; the guest's.
#[inline(always)]
pub(super) fn run_mxcsr(cpu: &mut Cpu, stub: &Stub) -> u32 {
    let mxcsr = cpu.state.xsave.u32(XsaveArea::MXCSR);
    cpu.assist.mxcsr = host_mxcsr(mxcsr, stub.underflows);
    mxcsr
}

/// A store's page fault comes before its SIMD floating-point exceptions.
#[inline(always)]
fn probe_store(cpu: &mut Cpu, insn: &Insn, stub: &Stub) -> Result<(), Stop> {
    if stub.mxcsr && stub.memory == MemoryUse::Write {
        let offset = cpu.effective_address(insn);
        return cpu.probe_write(insn.seg, offset, stub.size.into());
    }
    Ok(())
}

/// The exception flags an instruction raised, after it ran; an unmasked one stops it.
#[inline(always)]
pub(super) fn finish_mxcsr(cpu: &mut Cpu, stub: &Stub, mxcsr: u32) -> Result<u32, Stop> {
    if !stub.mxcsr {
        return Ok(0);
    }
    let raised = cpu.assist.mxcsr & MXCSR_FLAGS;
    let unmasked = raised & !(mxcsr >> 7) & MXCSR_FLAGS;
    if unmasked != 0 {
        return Err(simd_exception(cpu, mxcsr, raised, unmasked));
    }
    Ok(raised)
}

/// The MXCSR to run with: the guest's rounding and denormal modes, every exception masked, no flag
/// set. With underflow unmasked, a tiny result is an underflow even if it is exact; flush-to-zero
/// makes the host report it so, and the flushed result is never committed.
fn host_mxcsr(guest: u32, underflows: Underflow) -> u32 {
    let mut mode = guest & MXCSR_MASK & !MXCSR_FLAGS;
    if guest & MXCSR_UM == 0 {
        match underflows {
            Underflow::Raised => mode |= MXCSR_FTZ,
            Underflow::NotRaised => mode &= !MXCSR_FTZ,
            Underflow::Suppressed => {}
        }
    }
    mode | MXCSR_MASKS
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
