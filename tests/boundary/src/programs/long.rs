//! What programs for 64-bit mode share: page tables, descriptors, handlers for every vector, stacks.
//!
//! A handler folds vector, error code, RIP, RFLAGS, the time and what else belongs to the event into a
//! number of the processor's own, so that an event one instruction too early or too late changes it. Behind
//! a fault the program goes on at the address in R15; page faults in [`LAZY`] map the page.

use crate::machine::{Machine, cpuid};
use crate::monitor::{END, LOWER_ALL};
use anyhow::{Context, Result};
use anykvm::Kvm;
use anykvm::bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where code begins.
pub const CODE: u64 = 0x1_0000;
/// Where a processor is started by a SIPI with vector 0x0E.
pub const TRAMPOLINE: u64 = 0xe000;
/// Where the other processors' code begins.
pub const OTHERS: u64 = 0x1_8000;
/// SMBASE of a processor: the handler is 32 KiB behind it, the state at the end of that.
const fn smbase(processor: u64) -> u64 {
    0x3_0000 - processor * 0x1000
}
/// Data, readable and writable: to 0x5_FFFF.
pub const DATA: u64 = 0x4_0000;
/// Pages that are mapped at their first use.
pub const LAZY: u64 = 0x8_0000;
/// The last page of RAM; behind it in linear space is [`DEVICE`].
pub const LAST: u64 = 0x9_f000;
/// Device memory, linear: a page at the end of RAM.
pub const EDGE: u64 = 0xa_0000;
/// Device memory, physical and linear.
pub const DEVICE: u64 = 0xd000_0000;
/// The local APIC.
pub const LAPIC: u64 = 0xfee0_0000;
/// The I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;

/// PE, MP, ET, NE, WP, AM, PG.
const CR0: u32 = 0x8005_0033;
/// DE, PAE, PGE, OSFXSR, OSXMMEXCPT, OSXSAVE.
const CR4: u32 = 0x4_06a8;
const GDT_LIMIT: u16 = 11 * 8 - 1;
const PML4: u64 = 0x1000;
const TABLE: u64 = 0x4000;
const GDT: u64 = 0x500;
const TSS: u64 = 0x6000;
const IDT: u64 = 0x7000;
/// A page for each processor, which GS leads to.
const OWN: u64 = 0x9000;
const HANDLERS: u64 = 0x2_0000;
/// Stacks of 16 KiB, by processor, and for the IST.
const STACKS: u64 = 0x6_0000;
const IST: u64 = 0x7_0000;
/// In a processor's page: the number, and behind it how often each vector came.
pub const HASH: i32 = 0;
/// See [`HASH`].
pub const COUNTS: i32 = 0x100;

/// Processors there is room for.
const PROCESSORS: u64 = 3;

/// Selectors.
pub const KERNEL_CODE: u16 = 8;
/// See [`KERNEL_CODE`].
pub const KERNEL_DATA: u16 = 16;
/// See [`KERNEL_CODE`].
pub const USER_DATA: u16 = 0x1b;
/// See [`KERNEL_CODE`].
pub const USER_CODE: u16 = 0x23;

type Image = Vec<(u64, Vec<u8>)>;

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Memory with everything but the code at [`CODE`].
pub fn image() -> Image {
    let mut image: Image = Vec::new();
    image.push((PML4, words(&[0x2007])));
    image.push((0x2000, words(&[0x3007, 0, 0, 0x5007])));
    image.push((0x3000, words(&[TABLE | 7])));
    let lazy = LAZY >> 12..LAST >> 12;
    let entries: Vec<u64> = (0..512u64)
        .map(|n| match n {
            _ if n << 12 == EDGE => DEVICE | 3,
            _ if lazy.contains(&n) || n << 12 > EDGE => 0,
            _ => n << 12 | 7,
        })
        .collect();
    image.push((TABLE, words(&entries)));
    let high = |address: u64| 0x5000 + ((address - 0xc000_0000) >> 21) * 8;
    for address in [DEVICE, LAPIC, IOAPIC] {
        image.push((high(address), words(&[(address & !0x1f_ffff) | 0x93])));
    }
    let mut gdt = vec![
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for n in 0..PROCESSORS {
        let at = TSS + n * 0x100;
        gdt.push(0x67 | (at & 0xff_ffff) << 16 | 0x89 << 40 | (at >> 24) << 56);
        gdt.push(0);
        // RSP0, and the stacks of double faults and NMIs.
        let mut tss = vec![0; 0x68];
        for (field, stack) in [
            (4, STACKS + n * 0x4000 + 0x2000),
            (0x24, IST + n * 0x4000 + 0x2000),
            (0x2c, IST + n * 0x4000 + 0x4000),
        ] {
            tss[field..field + 8].copy_from_slice(&stack.to_le_bytes());
        }
        image.push((at, tss));
    }
    image.push((GDT, words(&gdt)));
    image.push((TRAMPOLINE, trampoline()));
    // inc dword ptr [0x8100]; inc ax; rsm
    let smi_handler = [0x66, 0xff, 0x06, 0x00, 0x81, 0x40, 0x0f, 0xaa];
    for n in 0..PROCESSORS {
        image.push((smbase(n) + 0x8000, smi_handler.to_vec()));
    }
    let (code, entries) = handlers();
    image.push((HANDLERS, code));
    let idt = entries.iter().enumerate().flat_map(|(vector, at)| {
        let ist = match vector {
            8 => 1u64,
            2 => 2,
            _ => 0,
        };
        // INT3, INTO and interrupts from 0x80 may be called by user code.
        let dpl = if matches!(vector, 3 | 4) || vector >= 0x80 {
            3
        } else {
            0u64
        };
        [
            (at & 0xffff)
                | u64::from(KERNEL_CODE) << 16
                | ist << 32
                | 0x8e << 40
                | dpl << 45
                | (at >> 16 & 0xffff) << 48,
            at >> 32,
        ]
    });
    image.push((IDT, words(&idt.collect::<Vec<_>>())));
    image
}

/// From real mode to [`OTHERS`]: what a SIPI starts.
fn trampoline() -> Vec<u8> {
    let mut code = vec![0xfa];
    // lgdt cs:[0x80]
    code.extend([0x2e, 0x66, 0x0f, 0x01, 0x16, 0x80, 0x00]);
    let mov_eax = |value: u32| [&[0x66, 0xb8][..], &value.to_le_bytes()].concat();
    code.extend(mov_eax(CR4));
    code.extend([0x0f, 0x22, 0xe0]); // mov cr4, eax
    code.extend(mov_eax(PML4 as u32));
    code.extend([0x0f, 0x22, 0xd8]); // mov cr3, eax
    code.extend([0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0]); // mov ecx, IA32_EFER
    code.extend(mov_eax(0x901));
    code.extend([0x66, 0x31, 0xd2, 0x0f, 0x30]); // xor edx, edx; wrmsr
    code.extend(mov_eax(CR0));
    code.extend([0x0f, 0x22, 0xc0]); // mov cr0, eax
    code.extend([0x66, 0xea]); // jmp far
    code.extend((OTHERS as u32).to_le_bytes());
    code.extend(KERNEL_CODE.to_le_bytes());
    code.resize(0x80, 0);
    code.extend(GDT_LIMIT.to_le_bytes());
    code.extend((GDT as u32).to_le_bytes());
    // The operand of LIDT.
    code.resize(0x90, 0);
    code.extend(0xfffu16.to_le_bytes());
    code.extend(IDT.to_le_bytes());
    code
}

/// The first instructions of the other processors: segments, tables, stack and vector state of their own.
pub fn enter_other(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, u32::from(KERNEL_DATA))?;
    for segment in [ss, ds, es] {
        a.mov(segment, eax)?;
    }
    a.lidt(ptr(TRAMPOLINE as i32 + 0x90))?;
    a.mov(edx, LAPIC as u32)?;
    a.mov(ebx, dword_ptr(rdx + 0x20))?;
    a.shr(ebx, 24)?;
    a.mov(esp, ebx)?;
    a.shl(esp, 14)?;
    a.add(esp, STACKS as i32 + 0x4000)?;
    a.mov(eax, ebx)?;
    a.shl(eax, 12)?;
    a.add(eax, OWN as i32)?;
    a.xor(edx, edx)?;
    a.mov(ecx, 0xc000_0101u32)?; // IA32_GS_BASE
    a.wrmsr()?;
    // Its task-state segment, which may be busy from an earlier start.
    a.mov(eax, ebx)?;
    a.shl(eax, 4)?;
    a.add(eax, 0x28)?;
    a.mov(byte_ptr(rax + GDT as i32 + 5), 0x89)?;
    a.ltr(ax)?;
    a.xor(ecx, ecx)?;
    a.xgetbv()?;
    a.mov(eax, 7)?;
    a.xsetbv()?;
    a.mov(r15d, OTHERS as u32)
}

/// Exceptions with an error code.
fn has_error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

/// Code of all handlers, and where each begins.
fn handlers() -> (Vec<u8>, Vec<u64>) {
    let mut a = CodeAssembler::new(64).expect("64 bits");
    let mut labels = Vec::new();
    emit_handlers(&mut a, &mut labels).expect("handlers");
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = a.assemble_options(HANDLERS, options).expect("handlers");
    let entries = labels
        .iter()
        .map(|l| result.label_ip(l).expect("a label"))
        .collect();
    (result.inner.code_buffer, entries)
}

fn emit_handlers(a: &mut CodeAssembler, entries: &mut Vec<CodeLabel>) -> Result<(), IcedError> {
    let mut common = a.create_label();
    for vector in 0..256u64 {
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        entries.push(here);
        if !has_error_code(vector) {
            a.push(0)?;
        }
        a.push(vector as i32)?;
        a.jmp(common)?;
    }
    a.set_label(&mut common)?;
    a.push(rax)?;
    a.push(rbx)?;
    a.push(rcx)?;
    a.push(rdx)?;
    // Vector at +32, error code +40, RIP +48, CS +56, RFLAGS +64.
    a.mov(rbx, qword_ptr(rsp + 32))?;
    a.mov(rax, qword_ptr(HASH).gs())?;
    for at in [32, 40, 48, 64] {
        a.rol(rax, 9)?;
        a.xor(rax, qword_ptr(rsp + at))?;
    }
    a.mov(rcx, rax)?;
    a.rdtsc()?;
    a.rol(rcx, 11)?;
    a.add(rcx, rax)?;
    a.mov(qword_ptr(HASH).gs(), rcx)?;
    a.inc(qword_ptr(rbx * 8 + COUNTS).gs())?;
    let mut out = a.create_label();
    let mut interrupt = a.create_label();
    let mut debug = a.create_label();
    let mut page = a.create_label();
    let mut resume = a.create_label();
    a.cmp(rbx, 0x20)?;
    a.jae(interrupt)?;
    a.cmp(rbx, 1)?;
    a.je(debug)?;
    a.cmp(rbx, 2)?;
    a.je(out)?;
    a.cmp(rbx, 3)?;
    a.je(out)?;
    a.cmp(rbx, 4)?;
    a.je(out)?;
    a.cmp(rbx, 14)?;
    a.je(page)?;
    a.set_label(&mut resume)?;
    a.mov(qword_ptr(rsp + 48), r15)?;
    a.set_label(&mut out)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.pop(rbx)?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()?;

    // #DB: DR6 counts; TF ends after some; RF lets an instruction breakpoint be passed.
    a.set_label(&mut debug)?;
    let mut still = a.create_label();
    a.mov(rax, dr6)?;
    a.xor(qword_ptr(HASH).gs(), rax)?;
    a.mov(eax, 0xffff_0ff0u32)?;
    a.mov(dr6, rax)?;
    a.or(dword_ptr(rsp + 64), 0x1_0000)?;
    a.mov(rax, qword_ptr(COUNTS + 8).gs())?;
    a.test(eax, 15)?;
    a.jne(still)?;
    a.and(dword_ptr(rsp + 64), !0x100)?;
    a.set_label(&mut still)?;
    a.jmp(out)?;

    // #PF in the pages that are mapped at their first use.
    a.set_label(&mut page)?;
    a.mov(rax, cr2)?;
    a.xor(qword_ptr(HASH).gs(), rax)?;
    a.cmp(rax, LAZY as i32)?;
    a.jb(resume)?;
    a.cmp(rax, LAST as i32)?;
    a.jae(resume)?;
    a.mov(ecx, eax)?;
    a.shr(ecx, 12)?;
    a.and(eax, 0xff_f000u32)?;
    a.or(eax, 7)?;
    a.mov(qword_ptr(rcx * 8 + TABLE as i32), rax)?;
    a.invlpg(ptr(rax))?;
    a.jmp(out)?;

    // Interrupts: those of the PIC, INT n from 0x80 on, those of the APIC; sometimes others may come in.
    a.set_label(&mut interrupt)?;
    let mut apic = a.create_label();
    let mut slave = a.create_label();
    let mut master = a.create_label();
    let mut more = a.create_label();
    a.cmp(rbx, 0x80)?;
    a.jae(more)?;
    // Devices whose lines stay up are quieted.
    a.mov(edx, u32::from(LOWER_ALL))?;
    a.out(dx, al)?;
    a.cmp(rbx, 0x30)?;
    a.jae(apic)?;
    a.mov(al, 0x20)?;
    a.cmp(rbx, 0x28)?;
    a.jb(master)?;
    a.set_label(&mut slave)?;
    a.out(0xa0, al)?;
    a.set_label(&mut master)?;
    a.out(0x20, al)?;
    a.jmp(more)?;
    a.set_label(&mut apic)?;
    a.mov(edx, (LAPIC + 0xb0) as u32)?;
    a.mov(dword_ptr(rdx), 0)?;
    a.set_label(&mut more)?;
    a.mov(rax, qword_ptr(rbx * 8 + COUNTS).gs())?;
    a.test(al, 3)?;
    a.jne(out)?;
    a.sti()?;
    a.nop()?;
    a.nop()?;
    a.cli()?;
    a.jmp(out)
}

/// Code at [`CODE`] that ends the program.
pub fn assemble(
    build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Vec<u8>> {
    let mut a = CodeAssembler::new(64)?;
    build(&mut a)?;
    a.out(i32::from(END), al)?;
    Ok(a.assemble(CODE)?)
}

/// 64-bit mode at [`CODE`], with paging, a TSS, interrupts off, and all the vector state CPUID has.
pub fn start(kvm: &Kvm, machine: &Machine) -> Result<()> {
    for (n, vcpu) in machine.vcpus.iter().enumerate() {
        vcpu.set_cpuid2(&cpuid(kvm)?)?;
        let smbase = kvm_msr_entry {
            index: 0x9e,
            data: smbase(n as u64),
            ..Default::default()
        };
        vcpu.set_msrs(&Msrs::from_entries(&[smbase]).context("MSRs")?)?;
        if n == 0 {
            start_boot(vcpu)?;
        }
    }
    Ok(())
}

fn start_boot(vcpu: &anykvm::VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    let segment = |selector, type_, l| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db: 1 - l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(KERNEL_CODE, 11, 1);
    for s in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.ss,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        *s = segment(KERNEL_DATA, 3, 0);
    }
    sregs.gs.base = OWN;
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        selector: 0x28,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    let table = |base, limit| kvm_dtable {
        base,
        limit,
        ..Default::default()
    };
    sregs.gdt = table(GDT, GDT_LIMIT);
    sregs.idt = table(IDT, 0xfff);
    sregs.cr0 = CR0.into();
    sregs.cr3 = PML4;
    sregs.cr4 = CR4.into();
    // SCE, LME, LMA, NXE.
    sregs.efer = 0xd01;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rsp: STACKS + 0x4000,
        rflags: 2,
        r15: CODE,
        ..Default::default()
    })?;
    let mut xcrs = vcpu.get_xcrs()?;
    xcrs.nr_xcrs = 1;
    // x87, SSE, AVX, and AVX-512 where there is such.
    xcrs.xcrs[0].value = 0xe7;
    if vcpu.set_xcrs(&xcrs).is_err() {
        xcrs.xcrs[0].value = 7;
        vcpu.set_xcrs(&xcrs)?;
    }
    Ok(())
}
