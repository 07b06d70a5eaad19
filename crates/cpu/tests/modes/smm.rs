//! System-management mode: entry and RSM from every mode, the state-save area, what is blocked, and the
//! states RSM refuses (SDM Vol. 3, ch. 32; APM Vol. 2, 10.2 and table 10-1, which KVM follows).

use anykvm_cpu::cpuid::CpuidTable;
use anykvm_cpu::events::SHADOW_STI;
use anykvm_cpu::memory::MemoryMap;
use anykvm_cpu::state::{CpuState, cr0, cr4, efer, reg, rflags};

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

const SMBASE: u64 = 0x3_0000;
const HANDLER: u64 = SMBASE + 0x8000;
const RSM: [u8; 2] = [0x0f, 0xaa];
/// Offsets from SMBASE in the 64-bit map.
const SAVED_CR0: u64 = 0xff58;
const SAVED_CR3: u64 = 0xff50;
const SAVED_CR4: u64 = 0xff48;
const SAVED_EFER: u64 = 0xfed0;
const SAVED_SMBASE: u64 = 0xff00;

/// SMM sees the same memory; its handler is `handler`.
fn with_handler(c: &mut Computer, handler: &[u8]) {
    let slots = c.memory.map(0).slots().cloned().collect();
    c.memory.replace(1, MemoryMap::new(slots).unwrap(), None);
    c.put(HANDLER, handler);
    c.cpu.state.msr.smbase = SMBASE;
    c.cpu.state.events.smi_pending = true;
    c.cpu.state_changed();
}

/// A processor without long mode, whose map is the 32-bit one.
fn without_long_mode(c: &mut Computer) {
    let mut entries = c.cpu.cpuid.entries().to_vec();
    for e in entries.iter_mut().filter(|e| e.function == 0x8000_0001) {
        e.edx &= !(1 << 29);
    }
    c.cpu.cpuid = CpuidTable::new(entries);
    c.cpu.state_changed();
}

fn seen(s: &CpuState) -> String {
    let control = (s.cr0, s.cr3, s.cr4, s.msr.efer, s.dr6, s.dr7, s.rflags);
    let tables = (s.gdtr, s.idtr, s.ldtr, s.tr);
    format!(
        "{:x?} {control:x?} {:x?} {tables:x?} {:?}",
        s.regs,
        &s.seg[..6],
        s.events
    )
}

/// SMI before the first instruction, RSM, and the code runs as if nothing had been.
#[test]
fn invisible_in_every_mode() {
    for at in [
        Real,
        V86(0),
        V86(3),
        Prot16(0),
        Prot16(3),
        Prot32(0),
        Prot32(3),
        Compat16(3),
        Compat32(0),
        Long(0),
        Long(3),
    ] {
        for map32 in [false, true] {
            if map32 && matches!(at, Long(_) | Compat16(_) | Compat32(_)) {
                continue;
            }
            let mut states = Vec::new();
            for smi in [false, true] {
                let mut c = computer(at, &[0x90]);
                if map32 {
                    without_long_mode(&mut c);
                }
                for n in 0..16u8 {
                    if n != reg::RSP && (n < 8 || matches!(at, Long(_))) {
                        c.cpu.state.regs[n] = 0x0101_0101 * u64::from(n + 1);
                    }
                }
                with_handler(&mut c, &RSM);
                c.cpu.state.events.smi_pending = smi;
                c.cpu.state_changed();
                assert_eq!(end(&mut c), Done, "{at:?}, 32-bit map {map32}");
                states.push(seen(&c.cpu.state));
            }
            assert_eq!(states[0], states[1], "{at:?}, 32-bit map {map32}");
        }
    }
}

/// The processor at the handler's first instruction (SDM Vol. 3, table 32-4).
#[test]
fn state_at_entry() {
    let mut c = computer(Long(3), &[0x90]);
    c.cpu.state.dr7 = 0x4ff;
    c.cpu.state.cr0 |= cr0::EM | cr0::TS | cr0::MP;
    with_handler(&mut c, &[0xf4]);
    assert_eq!(end(&mut c), Halt);
    let s = &c.cpu.state;
    assert!(s.events.smm && s.events.nmi_masked);
    assert_eq!((s.rip(), s.rflags), (0x8001, 2));
    assert_eq!(s.cr0 & (cr0::PE | cr0::EM | cr0::TS | cr0::PG), 0);
    assert_ne!(s.cr0 & cr0::MP, 0);
    assert_eq!((s.cr4, s.msr.efer, s.dr7), (0, 0, 0x400));
    assert_eq!((s.seg[1].base, s.seg[1].selector), (SMBASE, 0x3000));
    for (n, segment) in s.seg[..6].iter().enumerate() {
        assert_eq!(segment.limit, u32::MAX);
        if n != 1 {
            assert_eq!((segment.base, segment.selector), (0, 0));
        }
    }
}

/// The 64-bit map (APM Vol. 2, table 10-1): offset, bytes, what stands there.
#[test]
fn state_save_area() {
    let mut c = computer(Long(3), &[0x90]);
    for n in 0..16u8 {
        if n != reg::RSP {
            c.cpu.state.regs[n] = 0x1111_0000_2222_0000 + u64::from(n);
        }
    }
    c.cpu.state.seg[4].base = 0xffff_8000_1234_5000;
    with_handler(&mut c, &[0xf4]);
    let s = c.cpu.state.clone();
    assert_eq!(end(&mut c), Halt);
    let segment = |n: usize| s.seg[n];
    let rows: &[(u64, u64, u64)] = &[
        (0xfff8, 8, s.regs[reg::RAX]),
        (0xfff0, 8, s.regs[reg::RCX]),
        (0xffd8, 8, s.regs[reg::RSP]),
        (0xff80, 8, s.regs[15]),
        (0xff78, 8, CODE),
        (0xff70, 8, s.rflags),
        (0xff68, 8, s.dr6),
        (0xff60, 8, s.dr7),
        (SAVED_CR0, 8, s.cr0),
        (SAVED_CR3, 8, s.cr3),
        (SAVED_CR4, 8, s.cr4),
        (SAVED_SMBASE, 4, SMBASE),
        // The revision: SMBASE relocation, the 64-bit map.
        (0xfefc, 4, 0x2_0064),
        (SAVED_EFER, 8, s.msr.efer),
        // GDTR, LDTR, IDTR, TR.
        (0xfe64, 2, s.gdtr.limit.into()),
        (0xfe68, 8, s.gdtr.base),
        (0xfe84, 2, s.idtr.limit.into()),
        (0xfe88, 8, s.idtr.base),
        (0xfe90, 2, s.tr.selector.into()),
        (0xfe92, 2, 0x8b),
        (0xfe94, 4, s.tr.limit.into()),
        (0xfe98, 8, s.tr.base),
        // ES, CS, SS, FS.
        (0xfe00, 2, segment(0).selector.into()),
        (0xfe10, 2, segment(1).selector.into()),
        (0xfe12, 2, (segment(1).attr & 0xffff).into()),
        (0xfe14, 4, segment(1).limit.into()),
        (0xfe20, 2, segment(2).selector.into()),
        (0xfe48, 8, 0xffff_8000_1234_5000),
    ];
    for &(offset, bytes, want) in rows {
        let mask = if bytes == 8 {
            u64::MAX
        } else {
            (1 << (bytes * 8)) - 1
        };
        assert_eq!(c.get64(SMBASE + offset) & mask, want, "{offset:x}");
    }
}

/// What the handler writes into the area is what RSM loads; SMBASE moves the next SMI.
#[test]
fn the_handler_changes_the_state() {
    // mov dword cs:[fff8], 1234h; mov dword cs:[ff00], 40000h; rsm: CS is SMBASE.
    let mut handler = vec![0x2e, 0x66, 0xc7, 0x06, 0xf8, 0xff, 0x34, 0x12, 0, 0];
    handler.extend([0x2e, 0x66, 0xc7, 0x06, 0x00, 0xff, 0, 0, 4, 0]);
    handler.extend(RSM);
    let mut c = computer(Prot32(0), &[0x90, 0xf4]);
    with_handler(&mut c, &handler);
    c.put(0x4_8000, &[0xf4]);
    assert_eq!(end(&mut c), Halt);
    assert_eq!(
        (c.reg(reg::RAX), c.cpu.state.msr.smbase),
        (0x1234, 0x4_0000)
    );
    c.cpu.state.events.smi_pending = true;
    c.cpu.state_changed();
    assert_eq!(end(&mut c), Halt);
    assert_eq!(c.cpu.state.seg[1].base, 0x4_0000);
    assert_eq!(c.get64(0x4_ff78), CODE + 2);
}

/// RSM to a state that no processor can be in: shutdown (SDM Vol. 3, 32.5; APM Vol. 2, 10.3.5).
#[test]
fn invalid_states() {
    // Field, what is flipped in it, whether RSM takes it.
    for (offset, bits, ok) in [
        (SAVED_CR0, cr0::WP, true),
        (SAVED_CR0, cr0::PE, false),
        (SAVED_CR0, cr0::NW, false),
        (SAVED_CR0, cr0::CD | cr0::NW, true),
        (SAVED_CR0, 1 << 32, false),
        (SAVED_CR4, cr4::PGE, true),
        (SAVED_CR4, 1 << 15, false),
        (SAVED_CR4, 1 << 63, false),
        // Long mode without PAE.
        (SAVED_CR4, cr4::PAE, false),
        (SAVED_CR3, 1 << 62, false),
        (SAVED_EFER, efer::NX, true),
        (SAVED_EFER, 1 << 63, false),
        (SAVED_EFER, 1 << 1, false),
    ] {
        let mut c = computer(Long(0), &[0x90]);
        with_handler(&mut c, &[0xf4, 0x0f, 0xaa]);
        assert_eq!(end(&mut c), Halt);
        let at = SMBASE + offset;
        let value = c.get64(at) ^ bits;
        c.put64(at, value);
        assert_eq!(
            end(&mut c),
            if ok { Done } else { Shutdown },
            "{offset:x} {bits:x}"
        );
    }
    // PCIDE is for long mode.
    let mut c = computer(Prot32(0), &[0x90]);
    with_handler(&mut c, &[0xf4, 0x0f, 0xaa]);
    assert_eq!(end(&mut c), Halt);
    c.put64(SMBASE + SAVED_CR4, cr4::PCIDE);
    assert_eq!(end(&mut c), Shutdown);
}

/// In SMM SMIs wait for RSM, NMIs for RSM or an IRET, interrupts for IF (SDM Vol. 3, 32.3.1, 32.7 and
/// 32.8).
#[test]
fn what_waits() {
    // A second SMI: the handler runs twice, counting in memory at 0:8100h.
    let mut c = computer(Long(0), &[0x90]);
    let mut handler = vec![0xfe, 0x06, 0x00, 0x81];
    handler.extend([0xf4, 0x0f, 0xaa]);
    with_handler(&mut c, &handler);
    for count in 1..=2 {
        assert_eq!(end(&mut c), Halt);
        assert_eq!(c.get64(0x8100), count);
        c.cpu.state.events.smi_pending = count == 1;
        c.cpu.state_changed();
    }
    assert_eq!(end(&mut c), Done);

    // An NMI and an interrupt behind RSM, in that order, at the instruction the SMI interrupted.
    let mut c = computer(Long(0), &[0x90]);
    c.cpu.state.rflags |= rflags::IF;
    with_handler(&mut c, &[0x90, 0x90, 0xf4, 0x0f, 0xaa]);
    c.cpu.state.events.nmi_pending = 1;
    *c.ports.interrupt.lock().unwrap() = Some(0x61);
    c.cpu.state_changed();
    assert_eq!(end(&mut c), Halt);
    assert_eq!(c.cpu.state.rip(), 0x8003);
    assert_eq!(end(&mut c), Event(2));
    assert_eq!(c.stack64(0), CODE);

    // NMIs that were blocked stay so.
    let mut c = computer(Long(0), &[0x90]);
    with_handler(&mut c, &RSM);
    c.cpu.state.events.nmi_masked = true;
    c.cpu.state.events.nmi_pending = 1;
    c.cpu.state_changed();
    assert_eq!(end(&mut c), Done);
    assert_eq!(c.cpu.state.events.nmi_pending, 1);

    // IRET in the handler opens it for NMIs: lidt cs:[8100h]; mov sp, 9000h; push 2; push cs;
    // push 8011h; iret; (8011h:) hlt. The NMI's handler is at 0:1200h.
    let mut c = computer(Long(0), &[0x90]);
    with_handler(
        &mut c,
        &[
            0x2e, 0x0f, 0x01, 0x1e, 0, 0x81, 0xbc, 0, 0x90, 0x6a, 2, 0x0e, 0x68, 0x11, 0x80, 0xcf,
            0x90, 0xf4,
        ],
    );
    c.put(HANDLER + 0x100, &[0xff, 3, 0, 0, 0, 0]);
    c.put(8, &0x1200u32.to_le_bytes());
    c.put(0x1200, &[0xf4]);
    c.cpu.state.events.nmi_pending = 1;
    c.cpu.state_changed();
    assert_eq!(end(&mut c), Halt);
    assert_eq!((c.cpu.state.rip(), c.cpu.state.events.smm), (0x1201, true));
    assert_eq!(c.get64(0x9000 - 6) & 0xffff_ffff, 0x3000_8011);
}

/// The interrupt shadow is saved and comes back.
#[test]
fn shadow() {
    let mut c = computer(Long(0), &[0x90, 0x90]);
    c.cpu.state.rflags |= rflags::IF;
    c.cpu.state.events.shadow = SHADOW_STI;
    *c.ports.interrupt.lock().unwrap() = Some(0x61);
    with_handler(&mut c, &[0xf4, 0x0f, 0xaa]);
    assert_eq!(end(&mut c), Halt);
    assert_eq!(c.cpu.state.events.shadow, 0);
    assert_eq!(end(&mut c), Event(0x61));
    assert_eq!(c.stack64(0), CODE + 1);
}

/// SMI in HLT: the saved RIP is behind it, and RSM goes on there, as with KVM, which restarts neither HLT
/// nor I/O.
#[test]
fn behind_a_halt() {
    let mut c = computer(Long(0), &[0xf4, 0x90]);
    assert_eq!(end(&mut c), Halt);
    with_handler(&mut c, &[0xf4, 0x0f, 0xaa]);
    assert_eq!(end(&mut c), Halt);
    assert_eq!(c.get64(SMBASE + 0xff78), CODE + 1);
    assert_eq!(c.get64(SMBASE + 0xfec8) & 0xffff, 0);
    assert_eq!(end(&mut c), Done);
    assert_eq!(c.stack64(0), CODE + 3);
    // The GDT of the tests is as it was.
    assert_eq!(c.cpu.state.gdtr.base, GDT);
}
