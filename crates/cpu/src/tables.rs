//! Descriptor-table registers and instructions that inspect descriptors: LGDT, LIDT, SGDT, SIDT,
//! LLDT, SLDT, LTR, STR, LAR, LSL, VERR, VERW, ARPL (SDM Vol. 2; Vol. 3, 2.4 and 5.10).

use crate::cpu::Cpu;
use crate::crregs::is_canonical;
use crate::decode::Insn;
use crate::descriptor::{Descriptor, is_null, selector_error, system_type};
use crate::events::vector;
use crate::exit::Stop;
use crate::state::{Segment, Table, cr4, rflags};
use crate::width::Width;
use iced_x86::OpKind;

impl Cpu {
    /// #GP(0) unless CPL is 0.
    pub(crate) fn require_cpl0(&mut self) -> Result<(), Stop> {
        if self.state.cpl() == 0 {
            Ok(())
        } else {
            Err(self.gp0())
        }
    }

    /// #GP(0) if user-mode instruction prevention forbids SGDT, SIDT, SLDT, SMSW and STR.
    pub(crate) fn check_umip(&mut self) -> Result<(), Stop> {
        if self.state.cr4 & cr4::UMIP != 0 && self.state.cpl() > 0 {
            return Err(self.gp0());
        }
        Ok(())
    }

    /// #UD in real and virtual-8086 mode.
    fn require_protected(&mut self) -> Result<(), Stop> {
        if self.without_descriptors() {
            Err(self.ud())
        } else {
            Ok(())
        }
    }

    /// A 16-bit register or memory operand that is operand 0.
    pub(crate) fn read_op0_u16(&mut self, insn: &Insn) -> Result<u16, Stop> {
        if insn.raw.op0_kind() == OpKind::Memory {
            self.read::<u16>(insn)
        } else {
            Ok(self.state.regs[insn.op0] as u16)
        }
    }

    /// Stores a 16-bit system register: memory takes 16 bits, a register its operand size.
    fn store_selector(&mut self, insn: &Insn, value: u16) -> Result<(), Stop> {
        if insn.raw.op0_kind() == OpKind::Memory {
            return self.write::<u16>(insn, value);
        }
        if insn.raw.op0_register().is_gpr16() {
            value.set(&mut self.state.regs, insn.op0);
        } else {
            self.state.regs[insn.op0] = value.into();
        }
        Ok(())
    }

    fn load_table(&mut self, insn: &Insn) -> Result<Table, Stop> {
        self.require_cpl0()?;
        let at = self.effective_address(insn);
        let limit = self.read_at::<u16>(insn.seg, at)?;
        let at = at.wrapping_add(2) & insn.addr_mask;
        let base = if self.state.code64() {
            let base = self.read_at::<u64>(insn.seg, at)?;
            self.check_canonical_base(base)?;
            base
        } else {
            let base = u64::from(self.read_at::<u32>(insn.seg, at)?);
            // A 16-bit operand size takes 24 bits of base.
            if is_16bit_table(insn) {
                base & 0xff_ffff
            } else {
                base
            }
        };
        Ok(Table {
            base,
            limit,
            ..Table::default()
        })
    }

    fn store_table(&mut self, insn: &Insn, table: Table) -> Result<(), Stop> {
        self.check_umip()?;
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
        bytes[2..].copy_from_slice(&table.base.to_le_bytes());
        let len = if self.state.code64() { 10 } else { 6 };
        let at = self.effective_address(insn);
        // Alignment checking wants the base aligned, not the limit (SDM Vol. 3, 3.5.1).
        let linear = self.linear(insn.seg, at, len, true)?.wrapping_add(2);
        self.check_alignment(linear, 4, self.data_access(true))?;
        let (limit, base) = bytes.split_at(2);
        self.probe_write(insn.seg, at, len)?;
        self.write_bytes(insn.seg, at, limit)?;
        self.write_bytes(
            insn.seg,
            at.wrapping_add(2) & insn.addr_mask,
            &base[..len - 2],
        )
    }
}

fn is_16bit_table(insn: &Insn) -> bool {
    use iced_x86::Code;
    matches!(insn.raw.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16)
}

/// LGDT.
pub(crate) fn lgdt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.state.gdtr = cpu.load_table(insn)?;
    Ok(())
}

/// LIDT.
pub(crate) fn lidt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.state.idtr = cpu.load_table(insn)?;
    Ok(())
}

/// SGDT.
pub(crate) fn sgdt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.store_table(insn, cpu.state.gdtr)
}

/// SIDT.
pub(crate) fn sidt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.store_table(insn, cpu.state.idtr)
}

/// SLDT.
pub(crate) fn sldt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_protected()?;
    cpu.check_umip()?;
    cpu.store_selector(insn, cpu.state.ldtr.selector)
}

/// STR.
pub(crate) fn str(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_protected()?;
    cpu.check_umip()?;
    cpu.store_selector(insn, cpu.state.tr.selector)
}

/// Finds the system descriptor that LLDT or LTR names.
fn system_descriptor(cpu: &mut Cpu, selector: u16, valid: &[u8]) -> Result<Descriptor, Stop> {
    let error = selector_error(selector);
    if selector & 4 != 0 {
        return Err(cpu.raise_error(vector::GP, error));
    }
    let mut d = cpu.fetch_descriptor(selector, vector::GP)?;
    if !d.system_kind().is_some_and(|k| valid.contains(&k)) {
        return Err(cpu.raise_error(vector::GP, error));
    }
    if !d.present() {
        return Err(cpu.raise_error(vector::NP, error));
    }
    if cpu.state.long_mode() {
        cpu.fetch_upper_half(&mut d, vector::GP)?;
        if !is_canonical(d.base(), cpu.cpuid.has_la57()) {
            return Err(cpu.raise_error(vector::GP, error));
        }
    }
    Ok(d)
}

/// LLDT.
pub(crate) fn lldt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = cpu.read_op0_u16(insn)?;
    cpu.state.ldtr = if is_null(selector) {
        Segment {
            selector,
            attr: Segment::UNUSABLE,
            ..Segment::default()
        }
    } else {
        system_descriptor(cpu, selector, &[system_type::LDT])?.segment()
    };
    Ok(())
}

/// LTR.
pub(crate) fn ltr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = cpu.read_op0_u16(insn)?;
    if is_null(selector) {
        return Err(cpu.gp0());
    }
    let valid: &[u8] = if cpu.state.long_mode() {
        &[system_type::TSS_AVAILABLE]
    } else {
        &[system_type::TSS_AVAILABLE, system_type::TSS16_AVAILABLE]
    };
    let mut d = system_descriptor(cpu, selector, valid)?;
    cpu.set_busy(&mut d)?;
    cpu.state.tr = d.segment();
    Ok(())
}

/// LAR, LSL, VERR, VERW: the descriptor a selector names, if the running code may see it.
fn visible(cpu: &mut Cpu, selector: u16) -> Result<Option<Descriptor>, Stop> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(d) = cpu.find_descriptor(selector)? else {
        return Ok(None);
    };
    let cpl = cpu.state.cpl().max((selector & 3) as u8);
    Ok((d.is_conforming() || d.dpl() >= cpl).then_some(d))
}

fn set_zf(cpu: &mut Cpu, zf: bool) {
    cpu.state.rflags = cpu.state.rflags & !rflags::ZF | if zf { rflags::ZF } else { 0 };
}

/// The selector operand of LAR and LSL (operand 1).
fn selector_op1(cpu: &mut Cpu, insn: &Insn) -> Result<u16, Stop> {
    if insn.raw.op1_kind() == OpKind::Memory {
        cpu.read::<u16>(insn)
    } else {
        Ok(cpu.state.regs[insn.op1] as u16)
    }
}

/// System types LAR accepts (SDM Vol. 2, table 3-53), by mode.
fn lar_accepts(kind: u8, long: bool) -> bool {
    use system_type as t;
    match kind {
        t::TSS16_AVAILABLE | t::TSS16_BUSY | t::CALL_GATE16 | t::TASK_GATE => !long,
        t::LDT | t::TSS_AVAILABLE | t::TSS_BUSY | t::CALL_GATE => true,
        _ => false,
    }
}

/// System types LSL accepts (SDM Vol. 2, table 3-58), by mode.
fn lsl_accepts(kind: u8, long: bool) -> bool {
    use system_type as t;
    match kind {
        t::TSS16_AVAILABLE | t::TSS16_BUSY => !long,
        t::LDT | t::TSS_AVAILABLE | t::TSS_BUSY => true,
        _ => false,
    }
}

/// LAR.
pub(crate) fn lar<T: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_protected()?;
    let selector = selector_op1(cpu, insn)?;
    let long = cpu.state.long_mode();
    let found =
        visible(cpu, selector)?.filter(|d| d.system_kind().is_none_or(|k| lar_accepts(k, long)));
    set_zf(cpu, found.is_some());
    if let Some(d) = found {
        let rights = d.access_rights() & 0x00ff_ff00;
        T::from_u64(rights.into()).set(&mut cpu.state.regs, insn.op0);
    }
    Ok(())
}

/// LSL.
pub(crate) fn lsl<T: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_protected()?;
    let selector = selector_op1(cpu, insn)?;
    let long = cpu.state.long_mode();
    let found =
        visible(cpu, selector)?.filter(|d| d.system_kind().is_none_or(|k| lsl_accepts(k, long)));
    set_zf(cpu, found.is_some());
    if let Some(d) = found {
        T::from_u64(d.limit().into()).set(&mut cpu.state.regs, insn.op0);
    }
    Ok(())
}

/// VERR.
pub(crate) fn verr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_protected()?;
    let selector = cpu.read_op0_u16(insn)?;
    let ok = visible(cpu, selector)?.is_some_and(|d| d.is_readable());
    set_zf(cpu, ok);
    Ok(())
}

/// VERW.
pub(crate) fn verw(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_protected()?;
    let selector = cpu.read_op0_u16(insn)?;
    let ok = visible(cpu, selector)?.is_some_and(|d| d.is_writable());
    set_zf(cpu, ok);
    Ok(())
}

/// ARPL.
pub(crate) fn arpl(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.require_protected()?;
    let rpl = cpu.state.regs[insn.op1] as u16 & 3;
    let memory = insn.raw.op0_kind() == OpKind::Memory;
    let old = if memory {
        cpu.read::<u16>(insn)?
    } else {
        cpu.state.regs[insn.op0] as u16
    };
    let raised = old & 3 < rpl;
    // A selector that stays is not written.
    if raised && memory {
        cpu.write(insn, old & !3 | rpl)?;
    } else if raised {
        (old & !3 | rpl).set(&mut cpu.state.regs, insn.op0);
    }
    set_zf(cpu, raised);
    Ok(())
}
