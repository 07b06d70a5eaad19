//! What the interpreter's processor has beside the case: page tables, descriptor tables with Linux's
//! user segments, and a handler for every vector that is only HLT. All of it is supervisor memory in
//! the upper half of the address space.

use super::{CODE_GPA, DATA_GPA};
use crate::case::{CODE, CODE_PAGES, DATA, DATA_PAGES, WRITABLE_PAGES, selector};
use anykvm_cpu::memory::GuestMemory;
use anykvm_cpu::state::{CpuState, Segment, Table, cr0, cr4, efer, reg};

/// Linear address of guest-physical address 0, for the supervisor.
const SYSTEM: u64 = 0xffff_8000_0000_0000;
const GDT: u64 = 0x1000;
const TSS: u64 = 0x2000;
const IDT: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
const STACK: u64 = 0x7000;
const PML4: u64 = 0x8000;
/// Tables below it, handed out one after another.
const TABLES: u64 = 0x9000;

const KERNEL_CODE: u16 = 0x10;
const KERNEL_DATA: u16 = 0x18;
const TASK: u16 = 0x40;
const CPU_NUMBER: u16 = 0x7b;

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const NX: u64 = 1 << 63;

/// Linux's GDT (arch/x86/include/asm/segment.h), as far as user mode can see it, with the
/// descriptors' accessed bits set.
const DESCRIPTORS: [(u16, u64); 8] = [
    (0x08, 0x00cf_9b00_0000_ffff),
    (KERNEL_CODE, 0x00af_9b00_0000_ffff),
    (KERNEL_DATA, 0x00cf_9300_0000_ffff),
    (selector::CODE32, 0x00cf_fb00_0000_ffff),
    (selector::DATA, 0x00cf_f300_0000_ffff),
    (selector::CODE64, 0x00af_fb00_0000_ffff),
    // The CPU's number: read-only, expand-down.
    (CPU_NUMBER, 0x0040_f500_0000_0000),
    (TASK, 0x0000_8b00_0000_0067 | (TSS & 0xff_ffff) << 16),
];

const HLT: u8 = 0xf4;

fn get(ram: &GuestMemory, gpa: u64) -> u64 {
    let mut bytes = [0; 8];
    ram.read(gpa, &mut bytes).expect("the tables are in RAM");
    u64::from_le_bytes(bytes)
}

fn put(ram: &GuestMemory, gpa: u64, bytes: &[u8]) {
    ram.write(gpa, bytes).expect("the tables are in RAM");
}

struct Pages<'a> {
    ram: &'a GuestMemory,
    next: u64,
}

impl Pages<'_> {
    fn map(&mut self, linear: u64, gpa: u64, flags: u64) {
        let mut table = PML4;
        for shift in [39, 30, 21] {
            let at = table + (linear >> shift & 511) * 8;
            let mut entry = get(self.ram, at);
            if entry == 0 {
                entry = self.next | P | RW | US;
                self.next += 0x1000;
                put(self.ram, at, &entry.to_le_bytes());
            }
            table = entry & !0xfff;
        }
        // Accessed and dirty, so that nothing is ever written here.
        let at = table + (linear >> 12 & 511) * 8;
        put(self.ram, at, &(gpa | flags | P | 0x60).to_le_bytes());
    }
}

/// Writes the tables.
pub fn write(ram: &GuestMemory) {
    let put64 = |gpa: u64, v: u64| put(ram, gpa, &v.to_le_bytes());
    let mut pages = Pages { ram, next: TABLES };
    for n in 0..8 {
        pages.map(SYSTEM + n * 0x1000, n * 0x1000, RW);
    }
    for n in 0..CODE_PAGES as u64 {
        pages.map(CODE + n * 0x1000, CODE_GPA + n * 0x1000, US);
    }
    for n in 0..DATA_PAGES as u64 {
        let write = if n < WRITABLE_PAGES as u64 { RW } else { 0 };
        pages.map(DATA + n * 0x1000, DATA_GPA + n * 0x1000, US | NX | write);
    }
    for (selector, descriptor) in DESCRIPTORS {
        put64(GDT + u64::from(selector & !7), descriptor);
    }
    put64(GDT + u64::from(TASK) + 8, SYSTEM >> 32);
    for v in 0..256 {
        let handler = SYSTEM + HANDLERS + v * 16;
        // INT3 and INTO have gates that user mode may use, as in Linux.
        let access: u64 = if matches!(v, 3 | 4) { 0xee } else { 0x8e };
        let low = handler & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | access << 40
            | (handler >> 16 & 0xffff) << 48;
        put64(IDT + v * 16, low);
        put64(IDT + v * 16 + 8, handler >> 32);
        put(ram, HANDLERS + v * 16, &[HLT]);
    }
    put64(TSS + 4, SYSTEM + STACK);
    // The I/O permission bitmap's offset is behind the limit: there is none.
    put(ram, TSS + 0x66, &[0x68, 0]);
}

/// Control registers and tables of the processor.
pub fn system_state(s: &mut CpuState) {
    s.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::MP | cr0::WP | cr0::AM;
    s.cr3 = PML4;
    s.cr4 = cr4::PAE
        | cr4::PGE
        | cr4::MCE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT
        | cr4::OSXSAVE
        | cr4::FSGSBASE
        | cr4::UMIP
        | cr4::SMEP;
    s.msr.efer = efer::LME | efer::LMA | efer::NX | efer::SCE;
    s.gdtr = Table {
        base: SYSTEM + GDT,
        limit: 0x7f,
        ..Table::default()
    };
    s.idtr = Table {
        base: SYSTEM + IDT,
        limit: 0xfff,
        ..Table::default()
    };
    s.tr = Segment {
        base: SYSTEM + TSS,
        limit: 0x67,
        attr: 0x8b,
        selector: TASK,
        ..Segment::default()
    };
    s.ldtr = Segment {
        attr: Segment::UNUSABLE,
        ..Segment::default()
    };
}

/// What a user segment register holds after a load of this selector; null for all but Linux's.
pub fn segment(selector: u16) -> Segment {
    let descriptor = DESCRIPTORS.iter().find(|(s, _)| *s == selector);
    match descriptor {
        Some((_, d)) => Segment {
            limit: u32::MAX,
            attr: (d >> 40 & 0xf0ff) as u32,
            selector,
            ..Segment::default()
        },
        None => Segment {
            attr: Segment::UNUSABLE,
            selector,
            ..Segment::default()
        },
    }
}

/// An event that was delivered.
pub struct Event {
    pub vector: u8,
    pub error: u32,
    pub rip: u64,
    pub cs: u16,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u16,
}

/// The event whose handler has halted.
pub fn handled(s: &CpuState, ram: &GuestMemory) -> Option<Event> {
    let at = s.rip().checked_sub(SYSTEM + HANDLERS + 1)?;
    if at & 15 != 0 || at >> 4 > 255 {
        return None;
    }
    let vector = (at >> 4) as u8;
    let rsp = s.regs[reg::RSP].checked_sub(SYSTEM)?;
    let word = |n: u64| get(ram, rsp + n * 8);
    let with_error = match STACK.checked_sub(rsp)? {
        0x28 => 0,
        0x30 => 1,
        _ => return None,
    };
    Some(Event {
        vector,
        error: if with_error == 1 { word(0) as u32 } else { 0 },
        rip: word(with_error),
        cs: word(with_error + 1) as u16,
        rflags: word(with_error + 2),
        rsp: word(with_error + 3),
        ss: word(with_error + 4) as u16,
    })
}
