//! Hardware task switching: 16- and 32-bit TSS, busy and NT flags, the checks of the incoming task
//! (SDM Vol. 3, ch. 8).

use crate::cpu::Cpu;
use crate::debug::DR6_BT;
use crate::descriptor::{Descriptor, is_null, selector_error, system_type};
use crate::events::vector;
use crate::exit::Stop;
use crate::segment::{null_segment, v86_segment};
use crate::state::{Segment, cr0, cr4, rflags, seg};

/// What causes a task switch (SDM Vol. 3, table 8-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TaskSwitch {
    /// JMP.
    Jump,
    /// CALL.
    Call,
    /// An interrupt or exception through a task gate.
    Interrupt,
    /// IRET with NT set.
    Return,
}

/// Lowest limit of a 32-bit TSS.
const MIN_LIMIT32: u32 = 103;
/// Lowest limit of a 16-bit TSS.
const MIN_LIMIT16: u32 = 43;
/// DR7.L0-L3 and LE, cleared by a task switch.
const DR7_LOCAL: u64 = 0x155;
/// Offset of the T flag (SDM Vol. 3, 8.2.1).
const TRAP_FLAG_OFFSET: u64 = 100;

/// The dynamic fields of a TSS.
#[derive(Clone, Copy, Debug, Default)]
struct Fields {
    link: u16,
    cr3: Option<u32>,
    eip: u32,
    eflags: u32,
    gpr: [u32; 8],
    /// ES, CS, SS, DS, FS, GS.
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Cpu {
    /// Finds the TSS a JMP, CALL or task gate names: it must be available and in the GDT.
    pub(crate) fn tss_for(&mut self, selector: u16, fault: u8) -> Result<Descriptor, Stop> {
        let error = selector_error(selector);
        if is_null(selector) || selector & 4 != 0 {
            return Err(self.raise_error(fault, error));
        }
        let tss = self.fetch_descriptor(selector, fault)?;
        let available = matches!(
            tss.system_kind(),
            Some(system_type::TSS16_AVAILABLE | system_type::TSS_AVAILABLE)
        );
        if !available {
            return Err(self.raise_error(fault, error));
        }
        if !tss.present() {
            return Err(self.raise_error(vector::NP, error));
        }
        Ok(tss)
    }

    /// Switches to a task. `flags`: the RFLAGS image to save in the outgoing TSS. Faults before the
    /// new task's state is loaded leave everything as it was; those after it (#TS, #NP, #SS of its
    /// selectors) belong to the new task.
    pub(crate) fn switch_task(
        &mut self,
        mut tss: Descriptor,
        why: TaskSwitch,
        flags: u64,
    ) -> Result<(), Stop> {
        let wide = tss.kind() & 8 != 0;
        let min = if wide { MIN_LIMIT32 } else { MIN_LIMIT16 };
        if tss.limit() < min {
            return Err(self.raise_error(vector::TS, selector_error(tss.selector)));
        }
        let mut new = self.read_tss(tss.base(), wide)?;
        // The outgoing TSS must take its fields: a fault there comes before the switch.
        let old_flags = if why == TaskSwitch::Return {
            flags & !rflags::NT
        } else {
            flags
        };
        self.save_task(old_flags)?;
        let old = self.state.tr;
        if matches!(why, TaskSwitch::Jump | TaskSwitch::Return) {
            self.clear_busy(old.selector)?;
        }
        if matches!(why, TaskSwitch::Call | TaskSwitch::Interrupt) {
            self.write_system::<u16>(tss.base(), old.selector)?;
            new.link = old.selector;
        }
        if why != TaskSwitch::Return {
            self.set_busy(&mut tss)?;
        } else {
            tss.low |= 2 << 40;
        }
        if matches!(why, TaskSwitch::Call | TaskSwitch::Interrupt) {
            new.eflags |= rflags::NT as u32;
        }
        self.state.tr = tss.segment();
        self.state.cr0 |= cr0::TS;
        self.state.dr7 &= !DR7_LOCAL;
        let loaded = self.load_task(&new, wide);
        if loaded.is_ok() && new.trap {
            // #DB before the new task's first instruction (SDM Vol. 3, 18.3.1.5).
            self.debug_hits |= DR6_BT;
        }
        if loaded == Err(Stop::Fault) {
            // The switch stays; the fault is taken in the new task, at its first instruction.
            self.fault.trap = true;
        }
        loaded
    }

    fn read_tss(&mut self, base: u64, wide: bool) -> Result<Fields, Stop> {
        let at = |offset: u64| base.wrapping_add(offset) & 0xffff_ffff;
        let mut f = Fields {
            link: self.read_system(at(0))?,
            ..Fields::default()
        };
        if wide {
            f.cr3 = Some(self.read_system(at(28))?);
            f.eip = self.read_system(at(32))?;
            f.eflags = self.read_system(at(36))?;
            for (i, r) in f.gpr.iter_mut().enumerate() {
                *r = self.read_system(at(40 + 4 * i as u64))?;
            }
            for (i, s) in f.segments.iter_mut().enumerate() {
                *s = self.read_system(at(72 + 4 * i as u64))?;
            }
            f.ldt = self.read_system(at(96))?;
            f.trap = self.read_system::<u16>(at(TRAP_FLAG_OFFSET))? & 1 != 0;
        } else {
            f.eip = self.read_system::<u16>(at(14))?.into();
            f.eflags = self.read_system::<u16>(at(16))?.into();
            for (i, r) in f.gpr.iter_mut().enumerate() {
                *r = 0xffff_0000 | u32::from(self.read_system::<u16>(at(18 + 2 * i as u64))?);
            }
            for (i, s) in f.segments[..4].iter_mut().enumerate() {
                *s = self.read_system(at(34 + 2 * i as u64))?;
            }
            f.ldt = self.read_system(at(42))?;
        }
        Ok(f)
    }

    /// Writes the dynamic fields of the current task into its TSS.
    fn save_task(&mut self, flags: u64) -> Result<(), Stop> {
        let tr = self.state.tr;
        let at = |offset: u64| tr.base.wrapping_add(offset) & 0xffff_ffff;
        let rip = self.state.rip();
        let regs = self.state.regs;
        let segments: [u16; 6] = std::array::from_fn(|n| self.state.seg[n].selector);
        if tr.kind() & 8 != 0 {
            self.write_system::<u32>(at(32), rip as u32)?;
            self.write_system::<u32>(at(36), flags as u32)?;
            for i in 0..8u8 {
                self.write_system::<u32>(at(40 + 4 * u64::from(i)), regs[i] as u32)?;
            }
            for (i, s) in segments.iter().enumerate() {
                self.write_system::<u16>(at(72 + 4 * i as u64), *s)?;
            }
        } else {
            self.write_system::<u16>(at(14), rip as u16)?;
            self.write_system::<u16>(at(16), flags as u16)?;
            for i in 0..8u8 {
                self.write_system::<u16>(at(18 + 2 * u64::from(i)), regs[i] as u16)?;
            }
            for (i, s) in segments[..4].iter().enumerate() {
                self.write_system::<u16>(at(34 + 2 * i as u64), *s)?;
            }
        }
        Ok(())
    }

    fn clear_busy(&mut self, selector: u16) -> Result<(), Stop> {
        if let Some(d) = self.find_descriptor(selector)? {
            let access = (d.low >> 40) as u8;
            self.write_system::<u8>(d.address.wrapping_add(5), access & !2)?;
        }
        Ok(())
    }

    /// Loads the new task's state. From here on faults are the new task's.
    fn load_task(&mut self, new: &Fields, wide: bool) -> Result<(), Stop> {
        if let Some(cr3) = new.cr3
            && self.state.cr0 & cr0::PG != 0
        {
            self.load_task_cr3(cr3.into())?;
        }
        self.state.set_rip(new.eip.into());
        let keep = if wide { 0 } else { self.state.rflags & !0xffff };
        self.state.rflags = keep | u64::from(new.eflags) & rflags::WRITABLE | rflags::FIXED;
        if !wide {
            self.state.rflags &= !(rflags::VM | rflags::RF);
        }
        for (i, v) in new.gpr.iter().enumerate() {
            self.state.regs[i as u8] = (*v).into();
        }
        // Selectors first, all unusable: a fault below shows them as they are in the TSS.
        self.state.ldtr = Segment {
            selector: new.ldt,
            attr: Segment::UNUSABLE,
            ..Segment::default()
        };
        let v86 = self.state.virtual_8086();
        let cpl = if v86 {
            3
        } else {
            (new.segments[usize::from(seg::CS)] & 3) as u8
        };
        for (s, selector) in self.state.seg.iter_mut().zip(new.segments) {
            *s = if v86 {
                v86_segment(selector)
            } else {
                null_segment(selector)
            };
        }
        self.state.seg[usize::from(seg::SS)].set_dpl(cpl);
        self.update_mode();
        self.load_task_ldt(new.ldt)?;
        if !v86 {
            self.load_task_code(new.segments[usize::from(seg::CS)])?;
            self.load_task_stack(new.segments[usize::from(seg::SS)], cpl)?;
            for n in [seg::DS, seg::ES, seg::FS, seg::GS] {
                self.load_task_data(n, new.segments[usize::from(n)], cpl)?;
            }
        }
        self.update_mode();
        if new.eip > self.state.seg[usize::from(seg::CS)].limit {
            return Err(self.gp0());
        }
        self.recheck_events();
        Ok(())
    }

    fn load_task_cr3(&mut self, cr3: u64) -> Result<(), Stop> {
        if self.state.cr4 & cr4::PAE != 0 && !self.state.long_mode() {
            match self.load_pdptrs(cr3) {
                Some(p) => self.state.pdptr = p,
                None => return Err(self.gp0()),
            }
        }
        self.state.cr3 = cr3;
        self.address_space_changed(false);
        Ok(())
    }

    fn load_task_ldt(&mut self, selector: u16) -> Result<(), Stop> {
        if is_null(selector) {
            return Ok(());
        }
        let error = selector_error(selector);
        if selector & 4 != 0 {
            return Err(self.raise_error(vector::TS, error));
        }
        let ldt = self.fetch_descriptor(selector, vector::TS)?;
        if ldt.system_kind() != Some(system_type::LDT) || !ldt.present() {
            return Err(self.raise_error(vector::TS, error));
        }
        self.state.ldtr = ldt.segment();
        Ok(())
    }

    fn load_task_code(&mut self, selector: u16) -> Result<(), Stop> {
        let error = selector_error(selector);
        if is_null(selector) {
            return Err(self.raise_error(vector::TS, error));
        }
        let mut cs = self.fetch_descriptor(selector, vector::TS)?;
        let rpl = (selector & 3) as u8;
        let privilege_ok = if cs.is_conforming() {
            cs.dpl() <= rpl
        } else {
            cs.dpl() == rpl
        };
        if !cs.is_code() || !privilege_ok {
            return Err(self.raise_error(vector::TS, error));
        }
        if !cs.present() {
            return Err(self.raise_error(vector::NP, error));
        }
        self.set_accessed(&mut cs)?;
        self.state.seg[usize::from(seg::CS)] = cs.segment();
        Ok(())
    }

    fn load_task_stack(&mut self, selector: u16, cpl: u8) -> Result<(), Stop> {
        let error = selector_error(selector);
        if is_null(selector) {
            return Err(self.raise_error(vector::TS, error));
        }
        let mut ss = self.fetch_descriptor(selector, vector::TS)?;
        if !ss.is_writable() || ss.dpl() != cpl || (selector & 3) as u8 != cpl {
            return Err(self.raise_error(vector::TS, error));
        }
        if !ss.present() {
            return Err(self.raise_error(vector::SS, error));
        }
        self.set_accessed(&mut ss)?;
        self.state.seg[usize::from(seg::SS)] = ss.segment();
        Ok(())
    }

    fn load_task_data(&mut self, n: u8, selector: u16, cpl: u8) -> Result<(), Stop> {
        if is_null(selector) {
            return Ok(());
        }
        let error = selector_error(selector);
        let mut d = self.fetch_descriptor(selector, vector::TS)?;
        let rpl = (selector & 3) as u8;
        if !d.is_readable() || !d.is_conforming() && d.dpl() < cpl.max(rpl) {
            return Err(self.raise_error(vector::TS, error));
        }
        if !d.present() {
            return Err(self.raise_error(vector::NP, error));
        }
        self.set_accessed(&mut d)?;
        self.state.seg[usize::from(n)] = d.segment();
        Ok(())
    }

    /// IRET with NT set: back to the task that the current TSS links to (SDM Vol. 2, IRET,
    /// TASK-RETURN).
    pub(crate) fn return_to_linked_task(&mut self) -> Result<(), Stop> {
        let tr = self.state.tr;
        let link = self.read_system::<u16>(tr.base & 0xffff_ffff)?;
        let error = selector_error(link);
        if is_null(link) || link & 4 != 0 {
            return Err(self.raise_error(vector::TS, error));
        }
        let tss = self.fetch_descriptor(link, vector::TS)?;
        let busy = matches!(
            tss.system_kind(),
            Some(system_type::TSS16_BUSY | system_type::TSS_BUSY)
        );
        if !busy {
            return Err(self.raise_error(vector::TS, error));
        }
        if !tss.present() {
            return Err(self.raise_error(vector::NP, error));
        }
        self.switch_task(tss, TaskSwitch::Return, self.state.rflags)
    }
}
