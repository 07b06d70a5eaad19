//! IRET: flags by privilege and size, and between 64-bit and compatibility mode (SDM Vol. 2, IRET;
//! Vol. 3, 6.14.3). Its code and stack segments are in [`crate::transfers`], task returns in
//! [`crate::tasks`], virtual-8086 mode in [`crate::v86`].

use anykvm_cpu::events::vector::GP;
use anykvm_cpu::state::{reg, rflags};

use crate::harness::tables::*;
use crate::machine::*;
use crate::transfers::{FRAME, TARGET, push};

const ERROR: u32 = FREE as u32;

/// Which flags IRET changes, by CPL, IOPL and operand size (SDM Vol. 2, IRET; Vol. 1, 3.4.3).
#[test]
fn flags_of_iret() {
    use rflags::{AC, ID, IF, IOPL, NT, VIF, VIP};
    const ALL: u64 = AC | ID | IF | IOPL | VIF | VIP;
    // IRETD; CPL, IOPL before; those of ALL that change.
    for (wide, cpl, iopl, changes) in [
        (true, 0u8, 0u64, ALL),
        (false, 0, 0, IF | IOPL),
        (true, 3, 0, AC | ID),
        (true, 3, 3, AC | ID | IF),
        (false, 3, 3, IF),
        (false, 3, 0, 0),
    ] {
        let code: &[u8] = if wide { &[0xcf] } else { &[0x66, 0xcf] };
        let mut c = computer(Prot32(cpl), code);
        c.put(TARGET, &[END]);
        c.cpu.state.rflags = rflags::FIXED | iopl << 12;
        c.cpu.state_changed();
        let cs = if cpl == 0 { CODE0 } else { CODE3 };
        push(
            &mut c,
            if wide { 4 } else { 2 },
            &[TARGET, cs.into(), ALL & !NT | 2],
        );
        assert_eq!(end(&mut c), Done);
        let saved = u64::from(c.stack32(2)) & ALL;
        assert_eq!(
            saved,
            changes | iopl << 12,
            "wide {wide} CPL {cpl} IOPL {iopl}"
        );
    }
}

/// IRET between 64-bit and compatibility mode, and back (SDM Vol. 2, IRET; Vol. 3, 6.14.3).
#[test]
fn iret_between_code_sizes() {
    // 64-bit to 32-bit code at CPL 0 and 3, and from compatibility code with IRETD.
    for (at, code, size, target, l_flags) in [
        (Long(0), &[0x48, 0xcf][..], 8u64, 0u8, 0xcu8),
        (Long(0), &[0x48, 0xcf], 8, 3, 0xc),
        (Long(0), &[0xcf], 4, 3, 0xc),
        (Compat32(0), &[0xcf], 4, 0, 0xa),
        (Compat32(0), &[0xcf], 4, 3, 0xa),
        (Compat32(3), &[0xcf], 4, 3, 0xa),
    ] {
        let mut c = computer(at, code);
        c.put(TARGET, &[END]);
        c.define(FREE, descriptor(0, 0xf_ffff, 0x9b | target << 5, l_flags));
        let ss = if target == 3 { DATA3 } else { DATA0 };
        let mut frame = vec![TARGET, u64::from(FREE) | u64::from(target), 2];
        let same = matches!(at, Compat32(cpl) if cpl == target);
        if !same {
            frame.extend([0x9800, ss.into()]);
        }
        push(&mut c, size, &frame);
        assert_eq!(end(&mut c), Done, "{at:?} {target}");
        assert_eq!(c.stack64(1), u64::from(FREE) | u64::from(target));
        assert_eq!(
            c.stack64(3),
            if same { 0xa000 } else { 0x9800 },
            "{at:?} {target}"
        );
    }
    // Null SS to compatibility mode is #GP(0).
    let mut c = computer(Long(0), &[0x48, 0xcf]);
    c.define(FREE, descriptor(0, 0xf_ffff, 0x9b, 0xc));
    push(&mut c, 8, &[TARGET, FREE.into(), 2, 0x9800, 0]);
    assert_eq!(end(&mut c), GP0);
    // A code segment with both L and D.
    for code in [&[0x48u8, 0xcf][..], &[0x48, 0xcb], &[0xff, 0x2f]] {
        let mut c = computer(Long(0), code);
        c.define(FREE, descriptor(0, 0xf_ffff, 0x9b, 0xe));
        c.cpu.state.regs[reg::RDI] = FRAME;
        c.put64(FRAME, TARGET | u64::from(FREE) << 32);
        push(&mut c, 8, &[TARGET, FREE.into(), 2, 0x9800, DATA0.into()]);
        assert_eq!(end(&mut c), Fault(GP, ERROR), "{code:x?}");
    }
}
