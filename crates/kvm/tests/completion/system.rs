//! Descriptor tables, page tables and code where there is no RAM; events whose frame is; faults behind reads.

use anykvm::TranslationMode;
use anykvm::bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
};
use iced_x86::code_asm::*;

use crate::cases::{Bits, RAX, RBX, RIP, RSP, case, case_from};
use crate::check::all;
use crate::machine::{CODE, Event, GDT, GM, IDT, M, Machine, TARGET};

const MODES: [TranslationMode; 2] = [TranslationMode::Off, TranslationMode::Always];

#[test]
fn table_registers() {
    let table = |limit: u16, base: u64| [&limit.to_le_bytes()[..], &base.to_le_bytes()].concat();
    all([
        case("sgdt", |a| a.sgdt(fword_ptr(rbx)))
            .with(RBX, M)
            .write(GM, &0x1fu16.to_le_bytes())
            .write(GM + 2, &GDT.to_le_bytes()),
        case("sidt", |a| a.sidt(fword_ptr(rbx)))
            .with(RBX, M)
            .write(GM, &0xfffu16.to_le_bytes())
            .write(GM + 2, &IDT.to_le_bytes()),
        case("lgdt", |a| a.lgdt(fword_ptr(rbx)))
            .with(RBX, M)
            .read(GM, &table(0x1f, GDT)[..2])
            .read(GM + 2, &table(0x1f, GDT)[2..]),
        case("smsw", |a| a.smsw(word_ptr(rbx)))
            .with(RBX, M)
            .write(GM, &[0x33, 0]),
        case("lmsw", |a| a.lmsw(word_ptr(rbx)))
            .with(RBX, M)
            .read(GM, &[0x33, 0]),
        case("mov fs, m", |a| a.mov(fs, word_ptr(rbx)))
            .with(RBX, M)
            .read(GM, &[16, 0]),
        case_from(Bits::Long, "lss rax, m", &[0x48, 0x0f, 0xb2, 0x03])
            .with(RBX, M)
            .read(GM, &[1, 2, 3, 4, 5, 6, 7, 8])
            .read(GM + 8, &[16, 0])
            .gives(RAX, 0x0807_0605_0403_0201),
        // REX.W CALL FAR
        case_from(Bits::Long, "call far m onto a device", &[0x48, 0xff, 0x1b])
            .with(RBX, M)
            .with(RSP, M + 0x100)
            .read(GM, &TARGET.to_le_bytes())
            .read(GM + 8, &[8, 0])
            .write(GM + 0xf8, &[8, 0, 0, 0, 0, 0, 0, 0])
            .write(GM + 0xf0, &(CODE + 3).to_le_bytes())
            .gives(RSP, M + 0xf0)
            .gives(RIP, TARGET),
    ]);
}

/// A guest at this code with these changes to its system registers.
fn guest(
    mode: TranslationMode,
    code: &[u8],
    change: impl Fn(&mut anykvm::bindings::kvm_sregs),
) -> Machine {
    let m = Machine::new(mode, Bits::Long);
    m.ram.write_bytes(CODE as usize, code);
    let mut sregs = m.vcpu.get_sregs().unwrap();
    change(&mut sregs);
    m.vcpu.set_sregs(&sregs).unwrap();
    let mut regs = case_from(Bits::Long, "", &[]).start;
    regs[RBX] = M;
    m.set_regs(&regs);
    m
}

/// A descriptor is read like any operand, and nothing else is asked for: its accessed flag is set.
#[test]
fn descriptors_in_device_memory() {
    for mode in MODES {
        // mov ax, 16; mov fs, ax; hlt
        let m = guest(mode, &[0x66, 0xb8, 16, 0, 0x8e, 0xe0, 0xf4], |s| {
            s.gdt.base = M
        });
        let read = Event::Read {
            gpa: GM + 16,
            len: 8,
        };
        assert_eq!(m.run(), read);
        assert_eq!(m.regs()[RIP], CODE + 4);
        m.answer(&read, &0x00cf_9300_0000_ffffu64.to_le_bytes());
        m.set_immediate_exit(true);
        assert!(Machine::interrupted(&m.run()));
        assert_eq!(m.regs()[RIP], CODE + 6);
        assert_eq!(m.vcpu.get_sregs().unwrap().fs.selector, 16);
        m.set_immediate_exit(false);
        assert_eq!(m.run(), Event::Halt);
    }
}

/// An interrupt through a gate in device memory, or onto a stack there, is no instruction's: KVM gives up, and so
/// does this. The state is as before, the event still to be delivered.
#[test]
fn events_that_meet_devices() {
    for mode in MODES {
        let gate_in_device = |s: &mut anykvm::bindings::kvm_sregs| s.idt.base = M;
        let nothing = |_: &mut anykvm::bindings::kvm_sregs| {};
        for on_stack in [false, true] {
            // ud2
            let m = if on_stack {
                guest(mode, &[0x0f, 0x0b], nothing)
            } else {
                guest(mode, &[0x0f, 0x0b], gate_in_device)
            };
            let gate = (TARGET & 0xffff) | 8 << 16 | 0x8e << 40;
            m.ram.write((IDT + 6 * 16) as usize, gate);
            let mut regs = m.regs();
            if on_stack {
                regs[RSP] = M + 0x100;
                m.set_regs(&regs);
            }
            assert_eq!(m.run(), Event::Other(KVM_EXIT_INTERNAL_ERROR));
            assert_eq!(m.exit_word(0) as u32, KVM_INTERNAL_ERROR_DELIVERY_EV);
            assert_eq!(m.exit_word(1), 6, "the vector");
            assert_eq!(m.regs(), regs);
            let e = m.vcpu.get_vcpu_events().unwrap();
            assert_eq!((e.exception.injected, e.exception.nr), (1, 6));
        }
    }
}

/// Code where there is no RAM cannot be executed: an emulation failure, with no bytes of an instruction.
#[test]
fn code_in_device_memory() {
    for mode in MODES {
        // jmp rbx; an instruction whose second half is there
        let m = guest(mode, &[0xff, 0xe3], |_| {});
        assert_eq!(m.run(), Event::Other(KVM_EXIT_INTERNAL_ERROR));
        assert_eq!(m.exit_word(0) as u32, KVM_INTERNAL_ERROR_EMULATION);
        assert_eq!(m.regs()[RIP], M);
        let m = guest(mode, &[0xff, 0xe3], |_| {});
        let mut regs = m.regs();
        regs[RBX] = M - 1;
        m.set_regs(&regs);
        m.ram.write(0x1_0fff, 0xb8u8);
        assert_eq!(m.run(), Event::Other(KVM_EXIT_INTERNAL_ERROR));
        assert_eq!(m.regs()[RIP], M - 1);
        assert_eq!(
            m.exit_word(2) & 0xffff,
            0xb801,
            "one byte of the instruction"
        );
    }
}

/// A fault behind a read drops its answer; a fault known before a read comes first.
#[test]
fn faults() {
    for mode in MODES {
        let handler = |m: &Machine, vector: u64| {
            m.ram.write(
                (IDT + vector * 16) as usize,
                (TARGET & 0xffff) | 8 << 16 | 0x8e << 40,
            );
            m.ram.write(TARGET as usize, 0xf4u8);
        };
        // div dword [rbx]
        let m = guest(mode, &[0xf7, 0x33], |_| {});
        handler(&m, 0);
        let read = Event::Read { gpa: GM, len: 4 };
        assert_eq!(m.run(), read);
        m.answer(&read, &[0; 4]);
        m.set_immediate_exit(true);
        assert!(Machine::interrupted(&m.run()));
        assert_eq!(m.regs()[RIP], CODE);
        // #DE is pending or already delivered; either is a state to save.
        m.set_immediate_exit(false);
        let m = m.moved(mode);
        assert_eq!(m.run(), Event::Halt);
        assert_eq!(m.regs()[RIP], TARGET + 1);
        // mov eax, [rbx] with its last bytes in a page that is not there: no read of the first.
        let m = guest(mode, &[0x8b, 0x03], |_| {});
        handler(&m, 14);
        let mut regs = m.regs();
        regs[RBX] = M - 0x1001;
        m.set_regs(&regs);
        assert_eq!(m.run(), Event::Halt);
        assert_eq!(m.vcpu.get_sregs().unwrap().cr2, M - 0x1001);
        // The same with the first bytes in a device: N + 0x1fff is R - 1, R + 0x1fff has nothing behind it.
        let m = guest(mode, &[0x8b, 0x03], |_| {});
        handler(&m, 14);
        // The page behind M is taken away.
        m.ram.write(0x4000 + ((M >> 12) as usize + 1) * 8, 0u64);
        regs[RBX] = M + 0xffe;
        m.set_regs(&regs);
        assert_eq!(m.run(), Event::Halt);
        assert_eq!(m.vcpu.get_sregs().unwrap().cr2, M + 0x1000);
        // xchg [rbx], eax of a page that may not be written: no read.
        let m = guest(mode, &[0x87, 0x03], |_| {});
        handler(&m, 14);
        m.ram.write(0x4000 + (M >> 12) as usize * 8, GM | 0x65);
        assert_eq!(m.run(), Event::Halt);
    }
}

/// A page table that is not in RAM has no entries: the page fault is the guest's.
#[test]
fn page_tables_in_device_memory() {
    for mode in MODES {
        // mov eax, [rbx + 0x200000]
        let m = guest(mode, &[0x8b, 0x83, 0, 0, 0x20, 0], |_| {});
        m.ram.write(0x3008, GM | 0x27);
        m.ram.write(
            (IDT + 14 * 16) as usize,
            (TARGET & 0xffff) | 8 << 16 | 0x8e << 40,
        );
        m.ram.write(TARGET as usize, 0xf4u8);
        assert_eq!(m.run(), Event::Halt);
        assert_eq!(m.vcpu.get_sregs().unwrap().cr2, M + 0x20_0000);
    }
}
