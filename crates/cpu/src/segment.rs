//! Loading segment registers (SDM Vol. 2, MOV, POP, LDS/LES/LFS/LGS/LSS; Vol. 3, 3.4.3 and 5.5):
//! checks, faults, the accessed flag, and the modes that do without descriptors.

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::descriptor::{Descriptor, is_null, selector_error};
use crate::events::{SHADOW_MOV_SS, vector};
use crate::exit::Stop;
use crate::memory::access::Ram;
use crate::state::{Segment, seg};
use crate::width::Width;
use iced_x86::{OpKind, Register};

/// Access rights of a segment register in virtual-8086 mode: present, DPL 3, writable data,
/// accessed (as VMX requires of it).
pub(crate) const V86_ATTR: u32 = 0xf3;

/// The number of a segment register operand.
pub(crate) fn number(r: Register) -> u8 {
    (r.number() as u8).min(seg::GS)
}

impl Cpu {
    /// Real and virtual-8086 mode: segment registers are loaded without descriptors.
    pub(crate) fn without_descriptors(&self) -> bool {
        !self.state.protected() || self.state.virtual_8086()
    }

    /// MOV or POP to DS, ES, FS, GS or SS: what the register becomes. Nothing changes yet but the
    /// descriptor's accessed flag.
    pub(crate) fn segment_for(&mut self, n: u8, selector: u16) -> Result<Segment, Stop> {
        if self.without_descriptors() {
            return Ok(self.segment_without_descriptor(n, selector));
        }
        if n == seg::SS {
            self.stack_segment_for(selector)
        } else {
            self.data_segment_for(selector)
        }
    }

    /// A load in real or virtual-8086 mode. Real mode keeps the limit and the rights of the last
    /// descriptor ("unreal" mode depends on it); a register that held null becomes usable.
    pub(crate) fn segment_without_descriptor(&self, n: u8, selector: u16) -> Segment {
        if self.state.virtual_8086() {
            return v86_segment(selector);
        }
        let mut s = self.state.seg[usize::from(n)];
        if s.unusable() {
            s = Segment {
                limit: 0xffff,
                attr: 0x93,
                ..Segment::default()
            };
        }
        s.load_real(selector);
        s
    }

    fn stack_segment_for(&mut self, selector: u16) -> Result<Segment, Stop> {
        let cpl = self.state.cpl();
        if is_null(selector) {
            // A null SS is allowed in 64-bit code below CPL 3 with RPL = CPL.
            if self.state.code64() && cpl != 3 && (selector & 3) as u8 == cpl {
                return Ok(null_stack_segment(selector, cpl));
            }
            return Err(self.raise_error(vector::GP, 0));
        }
        let mut d = self.fetch_descriptor(selector, vector::GP)?;
        if (selector & 3) as u8 != cpl || !d.is_writable() || d.dpl() != cpl {
            return Err(self.raise_error(vector::GP, selector_error(selector)));
        }
        if !d.present() {
            return Err(self.raise_error(vector::SS, selector_error(selector)));
        }
        self.set_accessed(&mut d)?;
        Ok(d.segment())
    }

    fn data_segment_for(&mut self, selector: u16) -> Result<Segment, Stop> {
        if is_null(selector) {
            return Ok(null_segment(selector));
        }
        let mut d = self.fetch_descriptor(selector, vector::GP)?;
        if !d.is_readable() || !data_privilege_ok(&d, self.state.cpl()) {
            return Err(self.raise_error(vector::GP, selector_error(selector)));
        }
        if !d.present() {
            return Err(self.raise_error(vector::NP, selector_error(selector)));
        }
        self.set_accessed(&mut d)?;
        Ok(d.segment())
    }

    /// Puts a segment into DS, ES, FS, GS or SS.
    pub(crate) fn set_segment(&mut self, n: u8, s: Segment) {
        self.state.seg[usize::from(n)] = s;
        self.update_mode();
    }

    /// Makes data segment registers that the new, less privileged level may not use null (SDM
    /// Vol. 2, RET and IRET, RETURN-TO-OUTER-PRIVILEGE-LEVEL).
    pub(crate) fn drop_privileged_segments(&mut self, cpl: u8) {
        for n in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = &mut self.state.seg[usize::from(n)];
            let conforming = s.is_code() && s.kind() & 4 != 0;
            // A null selector's register keeps its base: that is where 64-bit code has FS and GS.
            if !is_null(s.selector) && s.dpl() < cpl && !conforming && s.attr & Segment::S != 0 {
                s.selector = 0;
                s.attr = Segment::UNUSABLE;
            }
        }
    }
}

/// A data segment's privilege check: DPL ≥ CPL and RPL, unless it is conforming code.
fn data_privilege_ok(d: &Descriptor, cpl: u8) -> bool {
    d.is_conforming() || d.dpl() >= cpl.max((d.selector & 3) as u8)
}

/// What a null selector leaves in a data segment register. The base is cleared, in 64-bit mode too
/// (Intel; AMD with NullSelectorClearsBase).
pub(crate) fn null_segment(selector: u16) -> Segment {
    Segment {
        selector,
        attr: Segment::UNUSABLE,
        ..Segment::default()
    }
}

/// SS with a null selector in 64-bit mode; its DPL is the CPL.
pub(crate) fn null_stack_segment(selector: u16, cpl: u8) -> Segment {
    let mut s = Segment {
        selector,
        attr: Segment::UNUSABLE,
        ..Segment::default()
    };
    s.set_dpl(cpl);
    s
}

/// A segment register in virtual-8086 mode (SDM Vol. 3, 20.2.1).
pub(crate) fn v86_segment(selector: u16) -> Segment {
    Segment {
        base: u64::from(selector) << 4,
        limit: 0xffff,
        attr: V86_ATTR,
        selector,
        ..Segment::default()
    }
}

/// MOV Sreg, r/m16.
pub(crate) fn mov_to_segment(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let selector = if insn.raw.op1_kind() == OpKind::Memory {
        cpu.read::<u16>(insn)?
    } else {
        u16::get(&cpu.state.regs, insn.op1)
    };
    let n = number(insn.raw.op0_register());
    let s = cpu.segment_for(n, selector)?;
    cpu.set_segment(n, s);
    if n == seg::SS {
        cpu.set_interrupt_shadow(SHADOW_MOV_SS);
    }
    Ok(())
}

/// MOV r/m, Sreg: a register is zero-extended to the operand size, memory is always 16 bits.
pub(crate) fn mov_from_segment(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let selector = cpu.state.seg[usize::from(number(insn.raw.op1_register()))].selector;
    match insn.raw.op0_register() {
        Register::None => return cpu.write::<u16>(insn, selector),
        r if r.is_gpr16() => selector.set(&mut cpu.state.regs, insn.op0),
        _ => cpu.state.regs[insn.op0] = selector.into(),
    }
    Ok(())
}

/// PUSH Sreg. With a 32-bit operand size Intel's processors write only the low 16 bits, AMD's all
/// (SDM Vol. 2, PUSH, allows both).
pub(crate) fn push_segment<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let selector = cpu.state.seg[usize::from(number(insn.raw.op0_register()))].selector;
    if T::BYTES == 4 && !cpu.cpuid.is_amd() {
        let (code, mask) = cpu.stack();
        let sp = cpu.state.regs[crate::state::reg::RSP].wrapping_sub(4) & mask;
        cpu.write_at::<u16>(code, sp, selector)?;
        cpu.set_stack_pointer(sp, mask);
        return Ok(());
    }
    cpu.push(T::from_u64(selector.into()))
}

/// POP Sreg.
pub(crate) fn pop_segment<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (code, mask) = cpu.stack();
    let sp = cpu.state.regs[crate::state::reg::RSP];
    // As with PUSH: half of a 32-bit operand, or all of it.
    let selector = if cpu.cpuid.is_amd() {
        cpu.read_at::<T>(code, sp & mask)?.to_u64() as u16
    } else {
        cpu.read_at::<u16>(code, sp & mask)?
    };
    let n = number(insn.raw.op0_register());
    let s = cpu.segment_for(n, selector)?;
    cpu.set_stack_pointer(sp.wrapping_add(T::BYTES as u64), mask);
    cpu.set_segment(n, s);
    if n == seg::SS {
        cpu.set_interrupt_shadow(SHADOW_MOV_SS);
    }
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS: offset of size `T` to a register, selector to a segment register.
pub(crate) fn load_far_pointer<T: Ram, const N: u8>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    let at = cpu.effective_address(insn);
    let offset = cpu.read_at::<T>(insn.seg, at)?;
    let selector =
        cpu.read_at::<u16>(insn.seg, at.wrapping_add(T::BYTES as u64) & insn.addr_mask)?;
    let s = cpu.segment_for(N, selector)?;
    offset.set(&mut cpu.state.regs, insn.op0);
    cpu.set_segment(N, s);
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE: #UD without CR4.FSGSBASE.
fn require_fsgsbase(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.state.cr4 & crate::state::cr4::FSGSBASE == 0 {
        return Err(cpu.raise_vector(vector::UD));
    }
    Ok(())
}

/// RDFSBASE, RDGSBASE.
pub(crate) fn rd_base<T: Width, const N: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    require_fsgsbase(cpu)?;
    T::from_u64(cpu.state.seg[usize::from(N)].base).set(&mut cpu.state.regs, insn.op0);
    Ok(())
}

/// WRFSBASE, WRGSBASE.
pub(crate) fn wr_base<T: Width, const N: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    require_fsgsbase(cpu)?;
    let base = T::get(&cpu.state.regs, insn.op0).to_u64();
    cpu.check_canonical_base(base)?;
    cpu.state.seg[usize::from(N)].base = base;
    Ok(())
}

/// SWAPGS.
pub(crate) fn swapgs(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    cpu.require_cpl0()?;
    std::mem::swap(
        &mut cpu.state.seg[usize::from(seg::GS)].base,
        &mut cpu.state.msr.kernel_gs_base,
    );
    Ok(())
}
