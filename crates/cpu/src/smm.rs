//! System-management mode: entry and RSM, with the state-save layouts that KVM uses: AMD's 64-bit
//! map when CPUID has long mode, else Intel's P6 map (SDM Vol. 3, ch. 32; APM Vol. 2, 10.2).

use crate::cpu::Cpu;
use crate::cpuid::feature;
use crate::debug::{loaded_dr6, loaded_dr7};
use crate::decode::Insn;
use crate::exit::Stop;
use crate::memory::PAGE;
use crate::memory::access::HostPage;
use crate::mmu::Access;
use crate::state::{CpuState, Segment, Table, cr0, cr4, efer, rflags, seg};

/// Bytes of the state-save area.
const SIZE: usize = 512;
/// Where it is, relative to SMBASE.
const OFFSET: u64 = 0xfe00;
/// Revision identifiers: SMBASE relocation; 64-bit map.
const REVISION_32: u32 = 0x2_0000;
const REVISION_64: u32 = 0x2_0064;

/// The state-save area; offsets as the manuals give them (0xFE00-0xFFFF from SMBASE).
struct Area([u8; SIZE]);

macro_rules! fields {
    ($get:ident, $put:ident, $t:ty) => {
        fn $get(&self, offset: usize) -> $t {
            let at = offset - OFFSET as usize;
            <$t>::from_le_bytes(
                self.0[at..at + size_of::<$t>()]
                    .try_into()
                    .unwrap_or_default(),
            )
        }
        fn $put(&mut self, offset: usize, v: $t) {
            let at = offset - OFFSET as usize;
            self.0[at..at + size_of::<$t>()].copy_from_slice(&v.to_le_bytes());
        }
    };
}

impl Area {
    fields!(u16, put_u16, u16);
    fields!(u32, put_u32, u32);
    fields!(u64, put_u64, u64);

    fn put_segment_64(&mut self, offset: usize, s: &Segment) {
        self.put_u16(offset, s.selector);
        self.put_u16(offset + 2, s.attr as u16);
        self.put_u32(offset + 4, s.limit);
        self.put_u64(offset + 8, s.base);
    }
    fn segment_64(&self, offset: usize) -> Segment {
        segment(
            self.u16(offset),
            self.u16(offset + 2),
            self.u32(offset + 4),
            self.u64(offset + 8),
        )
    }
    fn put_table_64(&mut self, offset: usize, t: &Table) {
        self.put_u32(offset + 4, t.limit.into());
        self.put_u64(offset + 8, t.base);
    }
    fn table_64(&self, offset: usize) -> Table {
        Table {
            base: self.u64(offset + 8),
            limit: self.u32(offset + 4) as u16,
            ..Table::default()
        }
    }
    /// Access rights, limit, base; the selector is elsewhere.
    fn put_segment_32(&mut self, offset: usize, selector: usize, s: &Segment) {
        self.put_u32(selector, s.selector.into());
        self.put_u32(offset, (s.attr & 0xffff) << 8);
        self.put_u32(offset + 4, s.limit);
        self.put_u32(offset + 8, s.base as u32);
    }
    fn segment_32(&self, offset: usize, selector: usize) -> Segment {
        segment(
            self.u32(selector) as u16,
            (self.u32(offset) >> 8) as u16,
            self.u32(offset + 4),
            self.u32(offset + 8).into(),
        )
    }
}

fn segment(selector: u16, attr: u16, limit: u32, base: u64) -> Segment {
    let attr = u32::from(attr) & 0xf0ff;
    let unusable = if attr & Segment::P == 0 {
        Segment::UNUSABLE
    } else {
        0
    };
    Segment {
        base,
        limit,
        attr: attr | unusable,
        selector,
        ..Segment::default()
    }
}

/// Offset of a segment register in the 32-bit map.
fn segment_offset_32(n: usize) -> usize {
    if n < 3 {
        0xff84 + n * 12
    } else {
        0xff2c + (n - 3) * 12
    }
}

fn save_64(s: &CpuState) -> Area {
    let mut a = Area([0; SIZE]);
    for n in 0..16u8 {
        a.put_u64(0xfff8 - usize::from(n) * 8, s.regs[n]);
    }
    a.put_u64(0xff78, s.rip());
    a.put_u64(0xff70, s.rflags);
    a.put_u64(0xff68, s.dr6);
    a.put_u64(0xff60, s.dr7);
    a.put_u64(0xff58, s.cr0);
    a.put_u64(0xff50, s.cr3);
    a.put_u64(0xff48, s.cr4);
    a.put_u32(0xff00, s.msr.smbase as u32);
    a.put_u32(0xfefc, REVISION_64);
    a.put_u64(0xfed0, s.msr.efer);
    a.0[0xfecb - OFFSET as usize] = s.events.shadow;
    a.put_segment_64(0xfe90, &s.tr);
    a.put_table_64(0xfe80, &s.idtr);
    a.put_segment_64(0xfe70, &s.ldtr);
    a.put_table_64(0xfe60, &s.gdtr);
    for (n, segment) in s.seg[..6].iter().enumerate() {
        a.put_segment_64(0xfe00 + n * 16, segment);
    }
    a
}

fn save_32(s: &CpuState) -> Area {
    let mut a = Area([0; SIZE]);
    a.put_u32(0xfffc, s.cr0 as u32);
    a.put_u32(0xfff8, s.cr3 as u32);
    a.put_u32(0xfff4, s.rflags as u32);
    a.put_u32(0xfff0, s.rip() as u32);
    for n in 0..8u8 {
        a.put_u32(0xffd0 + usize::from(n) * 4, s.regs[n] as u32);
    }
    a.put_u32(0xffcc, s.dr6 as u32);
    a.put_u32(0xffc8, s.dr7 as u32);
    a.put_segment_32(0xff5c, 0xffc4, &s.tr);
    a.put_segment_32(0xff78, 0xffc0, &s.ldtr);
    a.put_u32(0xff74, s.gdtr.base as u32);
    a.put_u32(0xff70, s.gdtr.limit.into());
    a.put_u32(0xff58, s.idtr.base as u32);
    a.put_u32(0xff54, s.idtr.limit.into());
    for (n, segment) in s.seg[..6].iter().enumerate() {
        a.put_segment_32(segment_offset_32(n), 0xffa8 + n * 4, segment);
    }
    a.0[0xff1a - OFFSET as usize] = s.events.shadow;
    a.put_u32(0xff14, s.cr4 as u32);
    a.put_u32(0xfefc, REVISION_32);
    a.put_u32(0xfef8, s.msr.smbase as u32);
    a
}

/// What RSM found in the area beyond what [`Cpu::rsm`] puts into the state directly.
struct Control {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}

fn restore_64(a: &Area, s: &mut CpuState) -> Control {
    for n in 0..16u8 {
        s.regs[n] = a.u64(0xfff8 - usize::from(n) * 8);
    }
    s.set_rip(a.u64(0xff78));
    s.rflags = u64::from(a.u32(0xff70)) & rflags::WRITABLE | rflags::FIXED;
    s.dr6 = loaded_dr6(a.u64(0xff68));
    s.dr7 = loaded_dr7(a.u64(0xff60));
    s.msr.smbase = a.u32(0xff00).into();
    s.tr = a.segment_64(0xfe90);
    s.idtr = a.table_64(0xfe80);
    s.ldtr = a.segment_64(0xfe70);
    s.gdtr = a.table_64(0xfe60);
    for (n, segment) in s.seg[..6].iter_mut().enumerate() {
        *segment = a.segment_64(0xfe00 + n * 16);
    }
    s.events.shadow = a.0[0xfecb - OFFSET as usize] & 3;
    Control {
        cr0: a.u64(0xff58),
        cr3: a.u64(0xff50),
        cr4: a.u64(0xff48),
        efer: a.u64(0xfed0),
    }
}

fn restore_32(a: &Area, s: &mut CpuState) -> Control {
    for n in 0..8u8 {
        s.regs[n] = a.u32(0xffd0 + usize::from(n) * 4).into();
    }
    s.set_rip(a.u32(0xfff0).into());
    s.rflags = u64::from(a.u32(0xfff4)) & rflags::WRITABLE | rflags::FIXED;
    s.dr6 = loaded_dr6(a.u32(0xffcc).into());
    s.dr7 = loaded_dr7(a.u32(0xffc8).into());
    s.msr.smbase = a.u32(0xfef8).into();
    s.tr = a.segment_32(0xff5c, 0xffc4);
    s.ldtr = a.segment_32(0xff78, 0xffc0);
    let table = |base, limit| Table {
        base: a.u32(base).into(),
        limit: a.u32(limit) as u16,
        ..Table::default()
    };
    s.gdtr = table(0xff74, 0xff70);
    s.idtr = table(0xff58, 0xff54);
    for (n, segment) in s.seg[..6].iter_mut().enumerate() {
        *segment = a.segment_32(segment_offset_32(n), 0xffa8 + n * 4);
    }
    s.events.shadow = a.0[0xff1a - OFFSET as usize] & 3;
    Control {
        cr0: a.u32(0xfffc).into(),
        cr3: a.u32(0xfff8).into(),
        cr4: a.u32(0xff14).into(),
        efer: 0,
    }
}

impl Cpu {
    /// Takes an SMI: saves the state below SMBASE + 64 KiB and starts the handler at SMBASE +
    /// 0x8000 (SDM Vol. 3, 32.4 and 32.5.1).
    pub(crate) fn enter_smm(&mut self) -> Result<(), Stop> {
        let long = self.cpuid.has(feature::LM);
        let s = &mut self.state;
        let area = if long { save_64(s) } else { save_32(s) };
        s.events.smm = true;
        s.events.smm_inside_nmi = s.events.nmi_masked;
        s.events.nmi_masked = true;
        s.events.shadow = 0;
        s.rflags = rflags::FIXED;
        s.set_rip(0x8000);
        s.cr0 &= !(cr0::PE | cr0::EM | cr0::TS | cr0::PG);
        s.cr4 = 0;
        s.msr.efer = 0;
        s.idtr = Table::default();
        s.dr7 = 0x400;
        let data = Segment {
            limit: u32::MAX,
            attr: 0x8093,
            ..Segment::default()
        };
        for n in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            s.seg[usize::from(n)] = data;
        }
        let smbase = s.msr.smbase;
        s.seg[usize::from(seg::CS)] = Segment {
            base: smbase,
            selector: (smbase >> 4) as u16,
            ..data
        };
        // From here the SMM address space is in force, without paging.
        self.reload_address_space();
        self.update_mode();
        let access = Access {
            write: true,
            implicit: true,
            ..Access::default()
        };
        self.write_pieces(smbase.wrapping_add(OFFSET), &area.0, access)
    }

    fn read_save_area(&self) -> Option<Area> {
        let gpa = self.state.msr.smbase.wrapping_add(OFFSET);
        let mut area = Area([0; SIZE]);
        let mut done = 0;
        while done < SIZE {
            let at = gpa.wrapping_add(done as u64);
            let slot = self.map.find(at)?;
            let host = slot.host() + (at - slot.gpa);
            let page = HostPage(host & !(PAGE - 1));
            done += page.read((host % PAGE) as usize, &mut area.0[done..]);
        }
        Some(area)
    }

    /// Puts control registers back in the order that their mutual rules allow; false if they are
    /// inconsistent (shutdown).
    fn restore_control(&mut self, c: &Control) -> bool {
        let s = &mut self.state;
        let paging = c.cr0 & cr0::PG != 0;
        let long = paging && c.efer & efer::LME != 0;
        let reserved = self.cpuid.cr4_reserved();
        let bad = c.cr0 >> 32 != 0
            || paging && c.cr0 & cr0::PE == 0
            || c.cr0 & (cr0::CD | cr0::NW) == cr0::NW
            || c.cr4 & reserved != 0
            || long && (c.cr4 & cr4::PAE == 0 || c.cr3 >> self.phys_bits != 0)
            || !long && c.cr4 & cr4::PCIDE != 0
            || c.efer & !efer::IMPLEMENTED != 0;
        if bad {
            return false;
        }
        s.cr0 = c.cr0 | cr0::ET;
        s.cr3 = c.cr3;
        s.cr4 = c.cr4;
        s.msr.efer = c.efer & !efer::LMA | if long { efer::LMA } else { 0 };
        self.reload_address_space();
        if paging && !long && c.cr4 & cr4::PAE != 0 {
            match self.load_pdptrs(c.cr3) {
                Some(p) => self.state.pdptr = p,
                None => return false,
            }
        }
        true
    }
}

/// RSM. Outside SMM #UD; a state that no processor could be in is a shutdown.
pub(crate) fn rsm(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if !cpu.state.events.smm {
        return Err(cpu.ud());
    }
    let Some(area) = cpu.read_save_area() else {
        cpu.state.events.triple_fault = true;
        cpu.recheck_events();
        return Ok(());
    };
    let long = cpu.cpuid.has(feature::LM);
    let s = &mut cpu.state;
    if !s.events.smm_inside_nmi {
        s.events.nmi_masked = false;
    }
    s.events.smm_inside_nmi = false;
    s.events.smm = false;
    let control = if long {
        restore_64(&area, s)
    } else {
        restore_32(&area, s)
    };
    if !cpu.restore_control(&control) {
        cpu.state.events.triple_fault = true;
    }
    cpu.update_mode();
    cpu.recheck_events();
    Ok(())
}
