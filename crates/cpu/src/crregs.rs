//! Control registers: MOV CR, LMSW, SMSW, CLTS, XSETBV, XGETBV, INVLPG, INVPCID, and the cache
//! instructions (SDM Vol. 3, 2.5, 2.6, 4.1.2 and 4.10; consistency rules as VM entry has them,
//! 27.3.1.1).

use crate::cpu::Cpu;
use crate::cpuid::feature;
use crate::decode::Insn;
use crate::exit::{Exit, Stop};
use crate::state::{cr0, cr4, efer, reg, seg};
use crate::width::Width;
use iced_x86::{OpKind, Register};

/// CR0 bits that exist; others are ignored when written.
const CR0_DEFINED: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// CR0 bits whose change reloads the PDPTEs under PAE paging (SDM Vol. 3, 4.4.1).
const CR0_PDPTR: u64 = cr0::CD | cr0::NW | cr0::PG;
/// CR4 bits whose change reloads the PDPTEs under PAE paging.
const CR4_PDPTR: u64 = cr4::PGE | cr4::PSE | cr4::PAE | cr4::SMEP;
/// CR4 bits whose change drops all translations.
const CR4_FLUSH: u64 = cr4::PGE | cr4::PSE | cr4::PAE | cr4::SMEP | cr4::LA57;
/// CR4 bits whose change affects only access rights.
const CR4_RIGHTS: u64 = cr4::SMAP | cr4::PKE;
/// CR3 bit 63 when written with CR4.PCIDE: keep what is cached for the PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;

fn control_register(r: Register) -> u8 {
    r.number() as u8
}

/// MOV r32/r64, CRn.
pub(crate) fn mov_from_cr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let n = control_register(insn.raw.op1_register());
    if !matches!(n, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let value = match n {
        0 => cpu.state.cr0,
        2 => cpu.state.cr2,
        3 => cpu.state.cr3,
        4 => cpu.state.cr4,
        _ => cpu.machine.read_cr8(),
    };
    let mask = if cpu.state.code64() {
        u64::MAX
    } else {
        0xffff_ffff
    };
    cpu.state.regs[insn.op0] = value & mask;
    Ok(())
}

/// MOV CRn, r32/r64.
pub(crate) fn mov_to_cr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let n = control_register(insn.raw.op0_register());
    if !matches!(n, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let mask = if cpu.state.code64() {
        u64::MAX
    } else {
        0xffff_ffff
    };
    let value = cpu.state.regs[insn.op1] & mask;
    match n {
        0 => cpu.write_cr0(value),
        2 => {
            cpu.state.cr2 = value;
            Ok(())
        }
        3 => cpu.write_cr3(value),
        4 => cpu.write_cr4(value),
        _ => cpu.write_cr8(value),
    }
}

impl Cpu {
    /// MOV to CR0.
    pub(crate) fn write_cr0(&mut self, value: u64) -> Result<(), Stop> {
        let s = &self.state;
        let old = s.cr0;
        let new = value & CR0_DEFINED | cr0::ET;
        let paging = new & cr0::PG != 0;
        let bad = value >> 32 != 0
            || new & (cr0::CD | cr0::NW) == cr0::NW
            || paging && new & cr0::PE == 0
            || !paging && (s.cr4 & cr4::PCIDE != 0 || s.code64());
        if bad {
            return Err(self.gp0());
        }
        let toggled = old ^ new;
        let mut lma = s.long_mode();
        if toggled & cr0::PG != 0 {
            lma = paging && s.msr.efer & efer::LME != 0;
            let cs = &s.seg[usize::from(seg::CS)];
            if lma && (s.cr4 & cr4::PAE == 0 || cs.long()) {
                return Err(self.gp0());
            }
        }
        let pae = paging && !lma && s.cr4 & cr4::PAE != 0;
        if pae && toggled & CR0_PDPTR != 0 {
            self.reload_pdptrs()?;
        }
        self.state.cr0 = new;
        if lma {
            self.state.msr.efer |= efer::LMA;
        } else {
            self.state.msr.efer &= !efer::LMA;
        }
        if toggled & cr0::PG != 0 {
            self.flush_tlb();
        } else if toggled & cr0::WP != 0 {
            self.flush_tlb_rights();
        }
        self.update_mode();
        Ok(())
    }

    /// MOV to CR3.
    pub(crate) fn write_cr3(&mut self, value: u64) -> Result<(), Stop> {
        let pcide = self.state.cr4 & cr4::PCIDE != 0;
        let keep = pcide && value & CR3_NO_FLUSH != 0;
        let new = if pcide { value & !CR3_NO_FLUSH } else { value };
        if self.state.long_mode() {
            if new >> self.phys_bits != 0 {
                return Err(self.gp0());
            }
        } else if self.state.cr0 & cr0::PG != 0 && self.state.cr4 & cr4::PAE != 0 {
            match self.load_pdptrs(new) {
                Some(p) => self.state.pdptr = p,
                None => return Err(self.gp0()),
            }
        }
        self.state.cr3 = new;
        self.address_space_changed(keep);
        Ok(())
    }

    /// MOV to CR4.
    pub(crate) fn write_cr4(&mut self, value: u64) -> Result<(), Stop> {
        let s = &self.state;
        let toggled = s.cr4 ^ value;
        let long = s.long_mode();
        let bad = value & self.cpuid.cr4_reserved() != 0
            || long && (value & cr4::PAE == 0 || toggled & cr4::LA57 != 0)
            || toggled & value & cr4::PCIDE != 0 && (!long || s.cr3 & 0xfff != 0);
        if bad {
            return Err(self.gp0());
        }
        let pae = s.cr0 & cr0::PG != 0 && !long && value & cr4::PAE != 0;
        if pae && toggled & CR4_PDPTR != 0 {
            self.reload_pdptrs()?;
        }
        self.state.cr4 = value;
        let pcid_off = toggled & !value & cr4::PCIDE != 0;
        if toggled & CR4_FLUSH != 0 || pcid_off {
            self.flush_tlb();
        } else if toggled & CR4_RIGHTS != 0 {
            self.flush_tlb_rights();
        }
        self.update_mode();
        Ok(())
    }

    fn reload_pdptrs(&mut self) -> Result<(), Stop> {
        match self.load_pdptrs(self.state.cr3) {
            Some(p) => {
                self.state.pdptr = p;
                Ok(())
            }
            None => Err(self.gp0()),
        }
    }

    fn write_cr8(&mut self, value: u64) -> Result<(), Stop> {
        if value > 15 {
            return Err(self.gp0());
        }
        if self.machine.write_cr8(value) {
            self.exit_behind(Exit::SetTpr);
        }
        self.recheck_events();
        Ok(())
    }

    /// A branch target of 64-bit mode: canonical for the linear-address width in force. #GP(0) if it
    /// is not.
    pub(crate) fn check_canonical_value(&mut self, address: u64) -> Result<(), Stop> {
        if is_canonical(address, self.state.cr4 & cr4::LA57 != 0) {
            Ok(())
        } else {
            Err(self.gp0())
        }
    }

    /// A base address of a segment or table, or an address to invalidate: canonical for the widest
    /// linear addresses the processor has, whatever CR4.LA57 is, as for MSRs. #GP(0) if it is not.
    pub(crate) fn check_canonical_base(&mut self, address: u64) -> Result<(), Stop> {
        if is_canonical(address, self.cpuid.has_la57()) {
            Ok(())
        } else {
            Err(self.gp0())
        }
    }
}

/// Whether bits above 47 (57-bit linear addresses: 56) are all equal to it.
pub(crate) fn is_canonical(address: u64, la57: bool) -> bool {
    let shift = if la57 { 7 } else { 16 };
    (address << shift) as i64 >> shift == address as i64
}

/// LMSW: the low four bits of CR0; PE cannot be cleared.
pub(crate) fn lmsw(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_cpl0()?;
    let value = u64::from(cpu.read_op0_u16(insn)?) & 15;
    let keep = cpu.state.cr0 & !(cr0::MP | cr0::EM | cr0::TS);
    cpu.write_cr0(keep | value)
}

/// SMSW.
pub(crate) fn smsw(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_umip()?;
    let value = cpu.state.cr0;
    let r = insn.raw.op0_register();
    if insn.raw.op0_kind() == OpKind::Memory {
        return cpu.write::<u16>(insn, value as u16);
    }
    if r.is_gpr16() {
        (value as u16).set(&mut cpu.state.regs, insn.op0);
    } else {
        cpu.state.regs[insn.op0] = value;
    }
    Ok(())
}

/// CLTS.
pub(crate) fn clts(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    cpu.require_cpl0()?;
    cpu.state.cr0 &= !cr0::TS;
    cpu.update_mode();
    Ok(())
}

/// INVLPG. A non-canonical address is ignored.
pub(crate) fn invlpg(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_cpl0()?;
    let offset = cpu.effective_address(insn);
    let linear = cpu.state.seg[usize::from(insn.seg & 7)]
        .base
        .wrapping_add(offset);
    let linear = if cpu.state.long_mode() {
        linear
    } else {
        linear & 0xffff_ffff
    };
    if cpu.canonical(linear) {
        cpu.flush_tlb_page(linear);
    }
    Ok(())
}

/// INVPCID (SDM Vol. 2).
pub(crate) fn invpcid(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if !cpu.cpuid.has_invpcid() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let mut kind = cpu.state.regs[insn.op0];
    if !cpu.state.code64() {
        kind &= 0xffff_ffff;
    }
    let at = cpu.effective_address(insn);
    let mut descriptor = [0; 16];
    cpu.read_bytes(insn.seg, at, &mut descriptor)?;
    let [low, linear] =
        [0, 8].map(|i| u64::from_le_bytes(descriptor[i..i + 8].try_into().unwrap_or_default()));
    let pcid = (low & 0xfff) as u16;
    let pcide = cpu.state.cr4 & cr4::PCIDE != 0;
    if kind > 3 || low >> 12 != 0 || kind < 2 && pcid != 0 && !pcide {
        return Err(cpu.gp0());
    }
    match kind {
        0 => {
            cpu.check_canonical_base(linear)?;
            cpu.flush_tlb_page(linear);
        }
        1 => cpu.flush_tlb_pcid(pcid),
        2 => cpu.flush_tlb(),
        _ => cpu.flush_tlb_non_global(),
    }
    Ok(())
}

/// INVD, WBINVD, WBNOINVD: there are no caches to write back.
pub(crate) fn cache_flush(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    cpu.require_cpl0()
}

/// XGETBV.
pub(crate) fn xgetbv(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let value = match cpu.state.regs[reg::RCX] as u32 {
        0 => cpu.state.xcr0,
        1 if cpu.cpuid.has(feature::XGETBV1) => {
            cpu.state.xcr0 & crate::interp::xsave::in_use(&cpu.state)
        }
        _ => return Err(cpu.gp0()),
    };
    cpu.state.regs[reg::RAX] = value & 0xffff_ffff;
    cpu.state.regs[reg::RDX] = value >> 32;
    Ok(())
}

/// XSETBV: x87 always set, AVX only with SSE, nothing CPUID does not offer.
pub(crate) fn xsetbv(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let regs = &cpu.state.regs;
    let value = regs[reg::RAX] & 0xffff_ffff | regs[reg::RDX] << 32;
    let index = regs[reg::RCX] as u32;
    if index != 0 || !xcr0_valid(value, cpu.cpuid.xcr0_supported()) {
        return Err(cpu.gp0());
    }
    cpu.state.xcr0 = value;
    cpu.update_mode();
    Ok(())
}

/// Whether XCR0 may hold a value (SDM Vol. 1, 13.3).
pub fn xcr0_valid(value: u64, supported: u64) -> bool {
    const X87: u64 = 1;
    const SSE: u64 = 2;
    const AVX: u64 = 4;
    const AVX512: u64 = 7 << 5;
    value & X87 != 0
        && value & !supported == 0
        && (value & AVX == 0 || value & SSE != 0)
        && (value & AVX512 == 0 || value & AVX512 == AVX512 && value & AVX != 0)
}
