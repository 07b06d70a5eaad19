//! FXSAVE, FXRSTOR and the XSAVE family (SDM Vol. 1, 10.5 and ch. 13).
//!
//! The registers always hold their values in [`crate::CpuState::xsave`]; whether a component is in
//! its initial configuration (XINUSE) is found by looking at it.

use iced_x86::Mnemonic;

use super::simd::{MXCSR_MASK, xcr0};
use crate::cpu::Cpu;
use crate::cpuid::{components, feature};
use crate::decode::{Handler, Insn};
use crate::events::vector;
use crate::exit::Stop;
use crate::mode::Mode;
use crate::state::{CpuState, XsaveArea, cr0, cr4, efer, reg};

/// Components behind the header: XCR0 bit, offset in the register file, size.
const EXTENDED: [(u64, usize, usize); 5] = [
    (xcr0::AVX, XsaveArea::YMM_HI, 256),
    (xcr0::OPMASK, XsaveArea::OPMASK, 64),
    (xcr0::ZMM_HI256, XsaveArea::ZMM_HI, 512),
    (xcr0::HI16_ZMM, XsaveArea::HI16_ZMM, 1024),
    (xcr0::PKRU, XsaveArea::PKRU, 8),
];

const HEADER: usize = XsaveArea::XSTATE_BV;
const HEADER_END: usize = HEADER + 64;
const MXCSR: std::ops::Range<usize> = XsaveArea::MXCSR..XsaveArea::MXCSR + 8;
const X87_CONTROL: std::ops::Range<usize> = 0..24;
const X87_REGISTERS: std::ops::Range<usize> = 32..160;
const MXCSR_INIT: u32 = 0x1f80;
/// XCOMP_BV: the area is in the compacted format.
const COMPACTED: u64 = 1 << 63;

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    Some(match insn.raw.mnemonic() {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => fxsave,
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => fxrstor,
        Mnemonic::Xsave | Mnemonic::Xsave64 => xsave,
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => xsaveopt,
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => xsavec,
        Mnemonic::Xsaves | Mnemonic::Xsaves64 => xsaves,
        Mnemonic::Xrstor | Mnemonic::Xrstor64 => xrstor,
        Mnemonic::Xrstors | Mnemonic::Xrstors64 => xrstors,
        _ => return None,
    })
}

/// Whether the instruction has REX.W: x87 pointers are 64-bit offsets without selectors.
fn is_wide(insn: &Insn) -> bool {
    use Mnemonic as M;
    matches!(
        insn.raw.mnemonic(),
        M::Fxsave64
            | M::Fxrstor64
            | M::Xsave64
            | M::Xsaveopt64
            | M::Xsavec64
            | M::Xsaves64
            | M::Xrstor64
            | M::Xrstors64
    )
}

/// Components that are not in their initial configuration, as XGETBV with ECX = 1 reports them.
pub fn in_use(s: &CpuState) -> u64 {
    let x = &s.xsave;
    let zero = |from: usize, len: usize| {
        let (words, rest) = x.0[from..from + len].as_chunks::<8>();
        words.iter().fold(0, |any, w| any | u64::from_le_bytes(*w)) == 0
            && rest.iter().all(|b| *b == 0)
    };
    let mut bits = 0;
    if x.u16(0) != super::x87::FCW_INIT || !zero(2, 22) || !zero(X87_REGISTERS.start, 128) {
        bits |= xcr0::X87;
    }
    if !zero(XsaveArea::XMM, 256) {
        bits |= xcr0::SSE;
    }
    for (bit, offset, size) in EXTENDED {
        if !zero(offset, size) {
            bits |= bit;
        }
    }
    bits
}

/// How many of the bytes of a component are reached: outside 64-bit mode half of those of sixteen
/// registers, and nothing of ZMM16-31 (SDM Vol. 1, 13.5).
fn reach(cpu: &Cpu, bit: u64, size: usize) -> usize {
    match bit {
        _ if cpu.mode().code64() => size,
        xcr0::SSE | xcr0::AVX | xcr0::ZMM_HI256 => size / 2,
        xcr0::HI16_ZMM => 0,
        _ => size,
    }
}

/// The legacy region as the instruction stores it: pointers in its format, MXCSR_MASK filled in.
fn legacy_image(cpu: &Cpu, wide: bool) -> [u8; 416] {
    let x = &cpu.state.xsave;
    let mut image = [0; 416];
    image.copy_from_slice(&x.0[..416]);
    image[5] = 0;
    if !wide {
        // 64-bit code leaves no selectors.
        let mask = if cpu.mode().code64() {
            0xffff_ffff
        } else {
            0xffff_ffff_ffff
        };
        image[8..16].copy_from_slice(&(x.u64(8) & mask).to_le_bytes());
        image[16..24].copy_from_slice(&(x.u64(16) & mask).to_le_bytes());
    }
    image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    image
}

/// Loads x87 state from a legacy region.
fn load_x87(x: &mut XsaveArea, image: &[u8; 416], wide: bool) {
    x.0[X87_CONTROL].copy_from_slice(&image[X87_CONTROL]);
    x.0[5] = 0;
    if !wide {
        x.set_u64(8, x.u64(8) & 0xffff_ffff_ffff);
        x.set_u64(16, x.u64(16) & 0xffff_ffff_ffff);
    }
    for st in X87_REGISTERS.step_by(16) {
        x.0[st..st + 10].copy_from_slice(&image[st..st + 10]);
        x.0[st + 10..st + 16].fill(0);
    }
    super::x87::normalise(x);
}

fn init_x87(x: &mut XsaveArea) {
    x.0[X87_CONTROL].fill(0);
    x.0[X87_REGISTERS].fill(0);
    x.set_u16(0, super::x87::FCW_INIT);
}

/// FXSAVE and FXRSTOR: #NM and alignment. True if XMM registers are left out (EFER.FFXSR: AMD APM
/// Vol. 2, 11.4.4).
fn begin_fx(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Stop> {
    if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(cpu.raise_vector(vector::NM));
    }
    // #AC, where it is on, is for less than four bytes (SDM Vol. 2, FXSAVE).
    cpu.check_alignment(cpu.operand_linear(insn), 4, cpu.data_access(false))?;
    cpu.check_operand_alignment(insn, 16)?;
    let s = &cpu.state;
    Ok(s.msr.efer & efer::FFXSR != 0 && s.code64() && s.cpl() == 0)
}

fn fxsave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let fast = begin_fx(cpu, insn)?;
    let image = legacy_image(cpu, is_wide(insn));
    let len = if fast {
        160
    } else {
        160 + reach(cpu, xcr0::SSE, 256)
    };
    let offset = cpu.effective_address(insn);
    cpu.write_bytes(insn.seg, offset, &image[..len])
}

fn fxrstor(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let fast = begin_fx(cpu, insn)?;
    let len = if fast {
        160
    } else {
        160 + reach(cpu, xcr0::SSE, 256)
    };
    let mut image = [0; 416];
    let offset = cpu.effective_address(insn);
    cpu.read_bytes(insn.seg, offset, &mut image[..len])?;
    let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp0());
    }
    let x = &mut cpu.state.xsave;
    load_x87(x, &image, is_wide(insn));
    x.set_u32(XsaveArea::MXCSR, mxcsr);
    x.0[160..len].copy_from_slice(&image[160..len]);
    Ok(())
}

/// Instruction forms of the save side.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Save {
    Plain,
    Optimised,
    Compacted,
    Supervisor,
}

fn xsave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    save(cpu, insn, Save::Plain)
}
fn xsaveopt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    save(cpu, insn, Save::Optimised)
}
fn xsavec(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    save(cpu, insn, Save::Compacted)
}
fn xsaves(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    save(cpu, insn, Save::Supervisor)
}

/// #UD, #NM, #GP of all of them; the requested-feature bitmap.
fn begin(cpu: &mut Cpu, insn: &Insn, supervisor: bool) -> Result<u64, Stop> {
    let offered = !supervisor || cpu.cpuid.has(feature::XSAVES);
    if cpu.state.cr4 & cr4::OSXSAVE == 0 || !offered {
        return Err(cpu.ud());
    }
    if cpu.state.cr0 & cr0::TS != 0 {
        return Err(cpu.raise_vector(vector::NM));
    }
    if supervisor && cpu.state.cpl() != 0 {
        return Err(cpu.gp0());
    }
    cpu.check_operand_alignment(insn, 64)?;
    let s = &cpu.state;
    let enabled = s.xcr0 | if supervisor { s.msr.xss } else { 0 };
    let r = &s.regs;
    Ok((r[reg::RDX] << 32 | r[reg::RAX] & 0xffff_ffff) & enabled)
}

/// Components behind the header: XCR0 bit, offset in memory, offset in the register file, size. In the
/// standard format a component has its place, in the compacted one it is behind those before it.
fn offsets(layout: Option<u64>) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut next = HEADER_END;
    components().iter().filter_map(move |c| {
        let bit = 1 << c.bit;
        match layout {
            None => Some((bit, c.offset, c.register, c.size)),
            Some(present) if present & bit != 0 => {
                let at = next;
                next += c.size;
                Some((bit, at, c.register, c.size))
            }
            Some(_) => None,
        }
    })
}

fn save(cpu: &mut Cpu, insn: &Insn, form: Save) -> Result<(), Stop> {
    let rfbm = begin(cpu, insn, form == Save::Supervisor)?;
    let base = cpu.effective_address(insn);
    let at = |offset: usize| base.wrapping_add(offset as u64) & insn.addr_mask;
    let compacted = matches!(form, Save::Compacted | Save::Supervisor);
    let mut used = in_use(&cpu.state);
    if compacted && cpu.state.xsave.u32(XsaveArea::MXCSR) != MXCSR_INIT {
        used |= xcr0::SSE;
    }
    let stored = if form == Save::Plain {
        rfbm
    } else {
        rfbm & used
    };
    let image = legacy_image(cpu, is_wide(insn));
    let mut header = [0; 16];
    header[..8].copy_from_slice(&(used & rfbm).to_le_bytes());
    header[8..].copy_from_slice(&(rfbm | COMPACTED).to_le_bytes());
    if !compacted {
        // It will be written: a fault is that of a store.
        cpu.probe_write(insn.seg, at(HEADER), 8)?;
        let old = cpu.read_at::<u64>(insn.seg, at(HEADER))?;
        header[..8].copy_from_slice(&(old & !rfbm | used & rfbm).to_le_bytes());
    }

    // The pieces: offset in memory, offset in the register file, length.
    let mut pieces = Pieces::default();
    if stored & xcr0::X87 != 0 {
        pieces.add(0, X87_CONTROL.start, X87_CONTROL.len());
        pieces.add(
            X87_REGISTERS.start,
            X87_REGISTERS.start,
            X87_REGISTERS.len(),
        );
    }
    let mxcsr = if compacted {
        stored & xcr0::SSE
    } else {
        rfbm & (xcr0::SSE | xcr0::AVX)
    };
    if mxcsr != 0 {
        pieces.add(MXCSR.start, MXCSR.start, MXCSR.len());
    }
    if stored & xcr0::SSE != 0 {
        pieces.add(XsaveArea::XMM, XsaveArea::XMM, reach(cpu, xcr0::SSE, 256));
    }
    for (bit, offset, register, size) in offsets(compacted.then_some(rfbm)) {
        if stored & bit != 0 {
            pieces.add(offset, register, reach(cpu, bit, size));
        }
    }
    let header_len = if compacted { 16 } else { 8 };
    // None is written before all are known to be writable.
    for (offset, _, len) in pieces.iter() {
        cpu.probe_write(insn.seg, at(offset), len)?;
    }
    cpu.probe_write(insn.seg, at(HEADER), header_len)?;
    for (offset, from, len) in pieces.iter() {
        if from < HEADER {
            cpu.write_bytes(insn.seg, at(offset), &image[from..from + len])?;
        } else {
            let mut done = 0;
            while done < len {
                let mut piece = [0; 256];
                let n = (len - done).min(piece.len());
                piece[..n].copy_from_slice(&cpu.state.xsave.0[from + done..from + done + n]);
                cpu.write_bytes(insn.seg, at(offset + done), &piece[..n])?;
                done += n;
            }
        }
    }
    cpu.write_bytes(insn.seg, at(HEADER), &header[..header_len])
}

/// At most the four pieces of the legacy region and the components behind the header.
#[derive(Default)]
struct Pieces {
    all: [(usize, usize, usize); 4 + EXTENDED.len()],
    n: usize,
}

impl Pieces {
    fn add(&mut self, offset: usize, from: usize, len: usize) {
        if let Some(piece) = self.all.get_mut(self.n).filter(|_| len != 0) {
            *piece = (offset, from, len);
            self.n += 1;
        }
    }
    fn iter(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        self.all.into_iter().take(self.n)
    }
}

fn xrstor(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    restore(cpu, insn, false)
}
fn xrstors(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    restore(cpu, insn, true)
}

fn restore(cpu: &mut Cpu, insn: &Insn, supervisor: bool) -> Result<(), Stop> {
    let rfbm = begin(cpu, insn, supervisor)?;
    let base = cpu.effective_address(insn);
    let at = |offset: usize| base.wrapping_add(offset as u64) & insn.addr_mask;
    let enabled = cpu.state.xcr0 | if supervisor { cpu.state.msr.xss } else { 0 };

    let mut header = [0; 64];
    cpu.read_bytes(insn.seg, at(HEADER), &mut header)?;
    let (words, _) = header.as_chunks::<8>();
    let (xstate_bv, xcomp_bv) = (u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1]));
    let compacted = xcomp_bv & COMPACTED != 0;
    // SDM Vol. 1, 13.8.1 and 13.8.2.
    let valid = if compacted {
        xcomp_bv & !COMPACTED & !enabled == 0
            && xstate_bv & !(xcomp_bv & !COMPACTED) == 0
            && words[2..].iter().all(|w| *w == [0; 8])
    } else {
        !supervisor && xstate_bv & !enabled == 0 && xcomp_bv == 0 && words[2] == [0; 8]
    };
    if !valid {
        return Err(cpu.gp0());
    }
    let load = rfbm & xstate_bv;
    let init = rfbm & !xstate_bv;

    let mut legacy = [0; 416];
    let mut new = cpu.state.xsave;
    if load & xcr0::X87 != 0 {
        cpu.read_bytes(insn.seg, at(0), &mut legacy[X87_CONTROL])?;
        cpu.read_bytes(
            insn.seg,
            at(X87_REGISTERS.start),
            &mut legacy[X87_REGISTERS],
        )?;
        load_x87(&mut new, &legacy, is_wide(insn));
    } else if init & xcr0::X87 != 0 {
        init_x87(&mut new);
    }
    let mxcsr = if compacted {
        load & xcr0::SSE
    } else {
        rfbm & (xcr0::SSE | xcr0::AVX)
    };
    if mxcsr != 0 {
        let v = cpu.read_at::<u32>(insn.seg, at(MXCSR.start))?;
        if v & !MXCSR_MASK != 0 {
            return Err(cpu.gp0());
        }
        new.set_u32(XsaveArea::MXCSR, v);
    } else if compacted && init & xcr0::SSE != 0 {
        new.set_u32(XsaveArea::MXCSR, MXCSR_INIT);
    }
    let xmm = XsaveArea::XMM..XsaveArea::XMM + reach(cpu, xcr0::SSE, 256);
    if load & xcr0::SSE != 0 {
        cpu.read_bytes(insn.seg, at(xmm.start), &mut new.0[xmm])?;
    } else if init & xcr0::SSE != 0 {
        new.0[xmm].fill(0);
    }
    for (bit, offset, register, size) in offsets(compacted.then_some(xcomp_bv)) {
        let to = register..register + reach(cpu, bit, size);
        if load & bit != 0 && !to.is_empty() {
            cpu.read_bytes(insn.seg, at(offset), &mut new.0[to])?;
        }
    }
    for (bit, register, size) in EXTENDED {
        if init & bit != 0 {
            let to = register..register + reach(cpu, bit, size);
            new.0[to].fill(0);
        }
    }
    // The component's upper half is reserved (SDM Vol. 1, 13.5.7).
    new.0[XsaveArea::PKRU + 4..XsaveArea::PKRU + 8].fill(0);
    let pkru = cpu.state.xsave.pkru();
    cpu.state.xsave = new;
    cpu.pkru_changed(pkru);
    Ok(())
}
