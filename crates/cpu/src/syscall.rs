//! SYSCALL, SYSRET, SYSENTER and SYSEXIT (SDM Vol. 2; APM Vol. 3 where the vendors differ).

use crate::cpu::Cpu;
use crate::debug::DR6_BS;
use crate::decode::Insn;
use crate::exit::Stop;
use crate::state::{Segment, efer, reg, rflags, seg};

/// Flat 4 GiB code, read/execute, accessed, present, DPL 0.
pub const CODE: u32 = Segment::G | Segment::P | Segment::S | 0xb;
/// Flat 4 GiB data, read/write, accessed, present, DPL 0, big.
pub const DATA: u32 = Segment::G | Segment::DB | Segment::P | Segment::S | 0x3;

fn flat(selector: u16, attr: u32, dpl: u8) -> Segment {
    let mut s = Segment {
        base: 0,
        limit: u32::MAX,
        attr,
        selector,
        ..Segment::default()
    };
    s.set_dpl(dpl);
    s
}

impl Cpu {
    /// Loads the fixed flat CS and SS of a fast system call.
    fn set_flat_segments(&mut self, cs: u16, ss: u16, code: u32, cpl: u8) {
        self.state.seg[usize::from(seg::CS)] = flat(cs, CODE | code, cpl);
        self.state.seg[usize::from(seg::SS)] = flat(ss, DATA, cpl);
        self.update_mode();
    }
}

/// Whether there are SYSCALL and SYSRET here: Intel has them in 64-bit mode only, AMD in every mode.
fn has_syscall(cpu: &Cpu) -> bool {
    cpu.state.msr.efer & efer::SCE != 0 && (cpu.state.code64() || cpu.cpuid.is_amd())
}

/// SYSCALL.
pub(crate) fn syscall(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let msr = cpu.state.msr;
    if !has_syscall(cpu) {
        return Err(cpu.ud());
    }
    let cs = (msr.star >> 32) as u16 & 0xfffc;
    let ss = cs.wrapping_add(8);
    let rip = cpu.state.rip();
    if cpu.state.long_mode() {
        let target = if cpu.state.code64() {
            msr.lstar
        } else {
            msr.cstar
        };
        cpu.state.regs[reg::RCX] = rip;
        cpu.state.regs[11] = cpu.state.rflags & !rflags::RF;
        cpu.state.rflags = cpu.state.rflags & !(msr.sfmask | rflags::RF) | rflags::FIXED;
        cpu.state.set_rip(target);
        cpu.set_flat_segments(cs, ss, Segment::L, 0);
    } else {
        cpu.state.regs[reg::RCX] = rip & 0xffff_ffff;
        cpu.state.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        cpu.state.set_rip(msr.star & 0xffff_ffff);
        cpu.set_flat_segments(cs, ss, Segment::DB, 0);
    }
    Ok(())
}

/// SYSRET: to 64-bit code with a 64-bit operand size, else to 32-bit code.
pub(crate) fn sysret<const WIDE: bool>(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let msr = cpu.state.msr;
    if !has_syscall(cpu) {
        return Err(cpu.ud());
    }
    if !cpu.state.protected() {
        return Err(cpu.gp0());
    }
    cpu.require_cpl0()?;
    let rcx = cpu.state.regs[reg::RCX];
    // Intel checks the return address here, at CPL 0; AMD's fetch faults at CPL 3.
    if WIDE && !cpu.cpuid.is_amd() {
        cpu.check_canonical_value(rcx)?;
    }
    let base = (msr.star >> 48) as u16;
    let cs = if WIDE { base.wrapping_add(16) } else { base } | 3;
    let ss = base.wrapping_add(8) | 3;
    if cpu.state.long_mode() {
        let r11 = cpu.state.regs[11];
        let keep = !(rflags::RF | rflags::VM);
        cpu.state.rflags = r11 & rflags::WRITABLE & keep | rflags::FIXED;
    } else {
        cpu.state.rflags |= rflags::IF;
    }
    cpu.state
        .set_rip(if WIDE { rcx } else { rcx & 0xffff_ffff });
    let mut stack = cpu.state.seg[usize::from(seg::SS)];
    cpu.set_flat_segments(cs, ss, if WIDE { Segment::L } else { Segment::DB }, 3);
    // AMD's leaves the hidden part of SS but for the level.
    if cpu.cpuid.is_amd() {
        stack.selector = ss;
        stack.set_dpl(3);
        cpu.set_segment(seg::SS, stack);
    }
    // Unlike POPF and IRET, SYSRET is itself trapped by the TF it loads.
    if cpu.state.rflags & rflags::TF != 0 {
        cpu.debug_hits |= DR6_BS;
    }
    cpu.recheck_events();
    Ok(())
}

/// SYSENTER.
pub(crate) fn sysenter(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let msr = cpu.state.msr;
    if !cpu.state.protected() {
        return Err(cpu.gp0());
    }
    // AMD has it in legacy mode only.
    if cpu.cpuid.is_amd() && cpu.state.long_mode() {
        return Err(cpu.ud());
    }
    let cs = msr.sysenter_cs as u16 & 0xfffc;
    if cs == 0 {
        return Err(cpu.gp0());
    }
    let long = cpu.state.long_mode();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.state.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cpu.state.regs[reg::RSP] = msr.sysenter_esp & mask;
    cpu.state.set_rip(msr.sysenter_eip & mask);
    cpu.set_flat_segments(
        cs,
        cs.wrapping_add(8),
        if long { Segment::L } else { Segment::DB },
        0,
    );
    Ok(())
}

/// SYSEXIT: to 64-bit code with a 64-bit operand size, else to 32-bit code.
pub(crate) fn sysexit<const WIDE: bool>(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if !cpu.state.protected() || cpu.state.cpl() != 0 {
        return Err(cpu.gp0());
    }
    if cpu.cpuid.is_amd() && cpu.state.long_mode() {
        return Err(cpu.ud());
    }
    let base = cpu.state.msr.sysenter_cs as u16 & 0xfffc;
    if base == 0 {
        return Err(cpu.gp0());
    }
    let (rcx, rdx) = (cpu.state.regs[reg::RCX], cpu.state.regs[reg::RDX]);
    let (cs, mask) = if WIDE {
        (base.wrapping_add(32), u64::MAX)
    } else {
        (base.wrapping_add(16), 0xffff_ffff)
    };
    if WIDE {
        cpu.check_canonical_value(rcx)?;
        cpu.check_canonical_value(rdx)?;
    }
    cpu.state.regs[reg::RSP] = rcx & mask;
    cpu.state.set_rip(rdx & mask);
    let code = if WIDE { Segment::L } else { Segment::DB };
    cpu.set_flat_segments(cs | 3, cs.wrapping_add(8) | 3, code, 3);
    Ok(())
}
