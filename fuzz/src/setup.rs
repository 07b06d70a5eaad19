//! A guest's memory and processor as an input describes them: a computer that works in its mode,
//! then the changes.

use anykvm_cpu::Cpu;
use anykvm_cpu::crregs::xcr0_valid;
use anykvm_cpu::msr::{self, Access};
use anykvm_cpu::state::{CpuState, Segment, Table, XsaveArea, cr0, cr4, efer, reg, rflags, seg};

use crate::input::{Input, Start};
use crate::layout::*;

impl Start {
    fn long(self) -> bool {
        matches!(self, Self::Compatibility | Self::Long | Self::Long57)
    }
    fn code64(self) -> bool {
        matches!(self, Self::Long | Self::Long57)
    }
    fn real(self) -> bool {
        matches!(self, Self::Real | Self::Unreal)
    }
    fn paging(self) -> bool {
        self.long() || matches!(self, Self::Virtual8086 | Self::Paging32 | Self::Pae)
    }
}

/// A descriptor: base, limit, access byte, flags (G, D/B, L, AVL in bits 3-0).
fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 15) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

fn gate(selector: u16, offset: u64, access: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | access << 40 | (offset >> 16 & 0xffff) << 48
}

/// Guest memory from 0.
struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
    fn put64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }
    fn put32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_le_bytes());
    }
    fn define(&mut self, selector: u16, value: u64) {
        self.put64(GDT + u64::from(selector & !7), value);
    }
}

/// The guest's RAM before its first instruction.
pub fn image(input: &Input) -> Vec<u8> {
    let mut image = Image(vec![0; RAM_SIZE as usize]);
    descriptors(&mut image, input.start);
    page_tables(&mut image, input.start);
    let handler = input.handler;
    for n in 0..256 {
        image.put(HANDLERS + n * 16, &[0xf4; 16]);
        image.put(HANDLERS + n * 16, handler);
    }
    // RSM, if the code does not come first.
    image.put(SMM_ENTRY, &[0x0f, 0xaa]);
    image.put(SMM_ENTRY, handler);
    let code = &input.code[..input.code.len().min(CODE_SIZE as usize)];
    image.put(CODE, code);
    for (at, value) in &input.descriptors {
        let at = GDT + u64::from(*at) % (SYSTEM_END - GDT - 8);
        image.put64(at, *value);
    }
    for (at, value) in &input.entries {
        let at = TABLES + u64::from(*at) * 8 % (TABLE_PAGES << 12);
        image.put64(at, *value);
    }
    image.0
}

fn descriptors(image: &mut Image, start: Start) {
    let code_flags = if start.code64() { 0xa } else { 0xc };
    image.define(CODE0, descriptor(0, 0xf_ffff, 0x9b, code_flags));
    image.define(DATA0, descriptor(0, 0xf_ffff, 0x93, 0xc));
    image.define(CODE3, descriptor(0, 0xf_ffff, 0xfb, code_flags));
    image.define(DATA3, descriptor(0, 0xf_ffff, 0xf3, 0xc));
    image.define(OTHER_CODE, descriptor(0, 0xf_ffff, 0x9f, code_flags ^ 6));
    image.define(CODE16, descriptor(0, 0xffff, 0x9b, 0));
    image.define(DATA16, descriptor(0, 0xffff, 0x93, 0));
    image.define(LDT_SELECTOR, descriptor(LDT, 0x7ff, 0x82, 0));
    image.define(TSS_SELECTOR, descriptor(TSS, 0x20ff, 0x8b, 0));
    if !start.long() {
        image.define(OTHER_TSS_SELECTOR, descriptor(OTHER_TSS, 0x67, 0x89, 0));
        image.define(TASK_GATE, gate(OTHER_TSS_SELECTOR, 0, 0xe5));
    }
    image.define(CALL_GATE, gate(CODE0, CODE + 0x40, 0xec));
    for n in 0..0x20 {
        let access = 0x92 | (n & 3) << 5 | (n & 4) << 1;
        image.put64(LDT + n * 8, descriptor(0, 0xf_ffff, access, 0xc));
    }
    for n in 0..256 {
        let access = if n & 0xf0 == 0x80 { 0xee } else { 0x8e };
        let gate = gate(CODE0, HANDLERS + n * 16, access);
        if start.long() {
            image.put64(IDT + n * 16, gate | u64::from(n == 8) << 32);
        } else if start.real() {
            image.put32(n * 4, (HANDLERS + n * 16) as u32);
        } else {
            image.put64(IDT + n * 8, gate);
        }
    }
    if start.long() {
        image.put64(TSS + 4, STACK0);
        image.put64(TSS + 36, STACK0 - 0x800);
    } else {
        image.put64(TSS + 4, STACK0 | u64::from(DATA0) << 32);
        other_task(image);
    }
    // The I/O permission bitmap, and the interrupt redirection bitmap before it.
    image.put(TSS + 0x66, &0x88u16.to_le_bytes());
}

/// A 32-bit task that a task gate leads to (SDM Vol. 3, 7.2.1).
fn other_task(image: &mut Image) {
    image.put32(
        OTHER_TSS + 28,
        if CODE < RAM_SIZE { TABLES as u32 } else { 0 },
    );
    image.put32(OTHER_TSS + 32, CODE as u32 + 0x20);
    image.put32(OTHER_TSS + 36, 2);
    image.put32(OTHER_TSS + 56, STACK3 as u32);
    for (n, selector) in [DATA0, CODE0, DATA0, DATA0, DATA0, DATA0]
        .into_iter()
        .enumerate()
    {
        image.put32(OTHER_TSS + 72 + n as u64 * 4, selector.into());
    }
}

/// Present, writable, user.
const RIGHTS: u64 = 7;
/// The entry maps a large page.
const LARGE: u64 = 0x80;

/// The first page is the root. The first 2 MiB (32-bit paging: 4 MiB) are mapped page by page to
/// themselves, what follows in large pages.
fn page_tables(image: &mut Image, start: Start) {
    let page = |n: u64| TABLES + n * 0x1000;
    if matches!(start, Start::Paging32 | Start::Virtual8086) {
        image.put32(page(0), (page(1) | RIGHTS) as u32);
        for n in 1..1024 {
            image.put32(page(0) + n * 4, ((n % 2) << 22 | RIGHTS | LARGE) as u32);
        }
        for n in 0..1024 {
            image.put32(page(1) + n * 4, (n << 12 | RIGHTS) as u32);
        }
        return;
    }
    // Directory of pages and first table of pages: the same for all others.
    let (directory, table) = (page(3), page(4));
    image.put64(directory, table | RIGHTS);
    for n in 1..512 {
        image.put64(directory + n * 8, (n % 3) << 21 | RIGHTS | LARGE);
    }
    for n in 0..512 {
        image.put64(table + n * 8, n << 12 | RIGHTS);
    }
    if start == Start::Pae {
        for n in 0..4 {
            image.put64(page(0) + n * 8, directory | 1);
        }
        return;
    }
    let (root, pointers) = if start == Start::Long57 {
        image.put64(page(0), page(1) | RIGHTS);
        image.put64(page(0) + 511 * 8, page(1) | RIGHTS);
        (page(1), page(2))
    } else {
        (page(0), page(2))
    };
    image.put64(root, pointers | RIGHTS);
    image.put64(root + 511 * 8, pointers | RIGHTS);
    image.put64(pointers, directory | RIGHTS);
    // Above 4 GiB, and 1 GiB at once.
    image.put64(pointers + 8, RIGHTS | LARGE);
    image.put64(pointers + 4 * 8, HIGH | RIGHTS | LARGE);
    image.put64(pointers + 511 * 8, directory | RIGHTS);
}

/// The processor before its first instruction.
pub fn processor(cpu: &mut Cpu, input: &Input) {
    control_registers(cpu, input);
    let s = &mut cpu.state;
    segments(s, input);
    s.regs[reg::RSP] = if input.user { STACK3 } else { STACK0 };
    s.set_rip(CODE);
    let change = input.rflags & rflags::WRITABLE & !rflags::VM;
    s.rflags = rflags::FIXED | change;
    if input.start == Start::Virtual8086 {
        s.rflags |= rflags::VM;
    }
    for (n, value) in &input.registers {
        match n % 24 {
            n @ 0..16 => s.regs[n] = *value,
            n @ 16..20 => s.db[usize::from(n - 16)] = *value,
            20 => s.dr6 = 0xffff_0ff0 | value & 0xe00f,
            21 => s.dr7 = 0x400 | value & 0xffff_23ff,
            22 => s.cr2 = *value,
            _ => s.msr.kernel_gs_base = 0,
        }
    }
    for change in &input.segments {
        change_segment(s, change);
    }
    for (at, value) in &input.xsave {
        let at = usize::from(*at) % (s.xsave.0.len() / 8) * 8;
        s.xsave.set_u64(at, *value);
    }
    // MXCSR has no more bits than these, and nobody can load others.
    let mxcsr = s.xsave.u32(XsaveArea::MXCSR) & 0xffff;
    s.xsave.set_u32(XsaveArea::MXCSR, mxcsr);
    s.xsave.0[512..576].fill(0);
    events(s, input.events);
    let saved = msr::saved();
    let table = cpu.cpuid.clone();
    for (n, value) in &input.msrs {
        let index = saved[usize::from(*n) % saved.len()];
        // What is not a value for it is refused; EFER has its own field.
        if index != msr::index::EFER {
            let _ = msr::write(&mut cpu.state, &table, index, *value, Access::Host);
        }
    }
    cpu.state_changed();
}

/// As KVM_SET_SREGS allows: consistent, whatever bits are changed.
fn control_registers(cpu: &mut Cpu, input: &Input) {
    let [change0, change4, change_efer, change_x] = input.control;
    let start = input.start;
    let valid4 = !cpu.cpuid.cr4_reserved();
    let efer_valid = cpu.cpuid.efer_valid();
    let supported = cpu.cpuid.xcr0_supported();
    let s = &mut cpu.state;
    let free0 = cr0::MP | cr0::EM | cr0::TS | cr0::NE | cr0::WP | cr0::AM | cr0::CD;
    s.cr0 = cr0::ET | cr0::NE | cr0::WP ^ change0 & free0;
    if !start.real() {
        s.cr0 |= cr0::PE;
    }
    let fixed4 = cr4::PAE | cr4::LA57 | cr4::PCIDE;
    let usual4 = cr4::PSE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
    s.cr4 = (usual4 ^ change4 & !fixed4) & valid4;
    s.xcr0 = 7;
    let x = (7 ^ change_x) | 1;
    if xcr0_valid(x & supported, supported) {
        s.xcr0 = x & supported;
    }
    s.msr.efer = efer::SCE | change_efer & efer_valid & !(efer::LME | efer::LMA);
    if start.paging() {
        s.cr0 |= cr0::PG;
        s.cr3 = TABLES;
    }
    if start.long() {
        s.cr4 |= cr4::PAE | change4 & cr4::PCIDE;
        s.msr.efer |= efer::LME | efer::LMA | efer::NX;
        if start == Start::Long57 {
            s.cr4 |= cr4::LA57;
        }
    }
    if start == Start::Pae {
        s.cr4 |= cr4::PAE;
        s.pdptr = [(TABLES + 0x3000) | 1; 4];
    }
    s.msr.star = u64::from(CODE0) << 32 | u64::from(CODE3 - 16) << 48;
    s.msr.lstar = CODE + 0x20;
    s.msr.cstar = CODE + 0x20;
    s.msr.sysenter_cs = CODE0.into();
    s.msr.sysenter_eip = CODE + 0x20;
    s.msr.sysenter_esp = STACK0;
}

fn segments(s: &mut CpuState, input: &Input) {
    let start = input.start;
    let user = input.user && !start.real();
    let (code, data) = match (start, user) {
        (Start::Virtual8086, _) => (0xf3, 0xf3),
        (Start::Real | Start::Unreal | Start::Protected16, false) => (0x9b, 0x93),
        (Start::Protected16, true) => (0xfb, 0xf3),
        (_, false) => (if start.code64() { 0xa09b } else { 0xc09b }, 0xc093),
        (_, true) => (if start.code64() { 0xa0fb } else { 0xc0fb }, 0xc0f3),
    };
    let small = matches!(start, Start::Real | Start::Virtual8086 | Start::Protected16);
    let selectors = match (start, user) {
        (Start::Real | Start::Unreal | Start::Virtual8086, _) => (0, 0),
        (Start::Protected16, false) => (CODE16, DATA16),
        (_, true) => (CODE3, DATA3),
        (_, false) => (CODE0, DATA0),
    };
    for (n, segment) in s.seg[..6].iter_mut().enumerate() {
        let is_code = n == usize::from(seg::CS);
        *segment = Segment {
            limit: if small { 0xffff } else { u32::MAX },
            attr: if is_code { code } else { data },
            selector: if is_code { selectors.0 } else { selectors.1 },
            ..Segment::default()
        };
    }
    s.gdtr = Table {
        base: GDT,
        limit: 0x7ff,
        ..Table::default()
    };
    s.idtr = Table {
        base: if start.real() { 0 } else { IDT },
        limit: if start.real() { 0x3ff } else { 0xfff },
        ..Table::default()
    };
    s.tr = Segment {
        base: TSS,
        limit: 0x20ff,
        attr: 0x8b,
        selector: TSS_SELECTOR,
        ..Segment::default()
    };
    s.ldtr = Segment {
        base: LDT,
        limit: 0x7ff,
        attr: 0x82,
        selector: LDT_SELECTOR,
        ..Segment::default()
    };
}

fn change_segment(s: &mut CpuState, change: &crate::input::SegmentChange) {
    let new = Segment {
        base: change.base,
        limit: change.limit,
        // Access byte, flags, and unusable.
        attr: change.attr & 0x1_f0ff,
        selector: change.selector,
        ..Segment::default()
    };
    let table = Table {
        base: change.base,
        limit: change.limit as u16,
        ..Table::default()
    };
    match change.which {
        n @ 0..6 => s.seg[usize::from(n)] = new,
        6 => s.ldtr = new,
        7 => s.tr = new,
        8 => s.gdtr = table,
        _ => s.idtr = table,
    }
}

/// Events as KVM_SET_VCPU_EVENTS can leave them.
fn events(s: &mut CpuState, bits: u64) {
    let e = &mut s.events;
    let bit = |n: u32| bits >> n & 1 != 0;
    e.exception.pending = bit(0);
    e.exception.injected = bit(1) && !bit(0);
    e.exception.vector = (bits >> 8 & 31) as u8;
    e.exception.has_error_code = bit(2);
    e.exception.error_code = (bits >> 16) as u32;
    e.exception.has_payload = bit(3);
    e.exception.payload = bits >> 40;
    e.interrupt.injected = bit(4);
    e.interrupt.soft = bit(5);
    e.interrupt.vector = (bits >> 24) as u8;
    e.nmi_pending = u8::from(bit(6));
    e.nmi_masked = bit(7);
    e.smi_pending = bit(13);
    e.smm = bit(14);
    e.shadow = (bits >> 48 & 3) as u8;
}
