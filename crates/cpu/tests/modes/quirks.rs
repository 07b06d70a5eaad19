//! Where KVM differs from processors, and what turns that off (KVM API, 7.32, KVM_CAP_DISABLE_QUIRKS2):
//! hypercall instructions, MONITOR and MWAIT.

use anykvm_cpu::cpuid::CpuidTable;
use anykvm_cpu::machine::Quirk;
use anykvm_cpu::msr::MISC_ENABLE_MWAIT;
use anykvm_cpu::state::reg;

use crate::harness::Computer;
use crate::machine::*;

const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];

fn without(c: &mut Computer, quirk: Quirk) {
    c.ports.no_quirks.lock().unwrap().push(quirk);
}

/// The vendor's own instruction works as it is; the other is rewritten, or #UD without the quirk.
#[test]
fn hypercall_instructions() {
    for at in [Real, Prot32(0), Compat32(0), Long(0)] {
        for (amd, own) in [(false, VMCALL), (true, VMMCALL)] {
            for code in [VMCALL, VMMCALL] {
                for fixes in [true, false] {
                    let mut c = computer(at, &code);
                    vendor(&mut c, amd);
                    if !fixes {
                        without(&mut c, Quirk::FixHypercall);
                    }
                    let what = format!("{code:x?} in {at:?}, AMD {amd}, rewritten {fixes}");
                    let ok = fixes || code == own;
                    assert_eq!(end(&mut c), if ok { Done } else { UD }, "{what}");
                    // What the harness answers.
                    let answer = if at == Long(0) { u64::MAX } else { 0xffff_ffff };
                    assert_eq!(c.reg(reg::RAX), if ok { answer } else { 0 }, "{what}");
                    let mut now = [0; 3];
                    c.memory.read(CODE, &mut now).unwrap();
                    assert_eq!(now, if fixes { own } else { code }, "{what}");
                }
            }
        }
    }
    // Behind a prefix, and through a code segment with a base.
    let mut c = computer(Real, &[0x2e, 0x0f, 0x01, 0xc1]);
    vendor(&mut c, true);
    c.cpu.state.seg[1].base = 0x800;
    c.cpu.state.set_rip(CODE - 0x800);
    c.cpu.state_changed();
    assert_eq!(end(&mut c), Done);
    let mut now = [0; 4];
    c.memory.read(CODE, &mut now).unwrap();
    assert_eq!(now, [0x2e, 0x0f, 0x01, 0xd9]);
}

/// MONITOR and MWAIT at CPL 0 by the quirks, CPUID's MONITOR flag and IA32_MISC_ENABLE; and whether the
/// guest's CPUID shows the flag.
#[test]
fn monitor_and_mwait() {
    // Quirk "never faults", quirk "of CPUID", CPUID's flag, the MSR's; works, shown.
    for (never, of_cpuid, flag, msr, works, shown) in [
        (true, true, false, false, true, false),
        (true, true, true, false, true, true),
        (true, false, false, true, true, true),
        (false, true, false, false, false, false),
        (false, true, false, true, false, false),
        (false, true, true, false, true, true),
        (false, false, true, false, false, false),
        (false, false, false, true, true, true),
    ] {
        for last in [0xc8u8, 0xc9] {
            let mut c = computer(Long(0), &[0x0f, 0x01, last]);
            set_up(&mut c, never, of_cpuid, flag, msr);
            let want = if works { Done } else { UD };
            assert_eq!(end(&mut c), want, "{never} {of_cpuid} {flag} {msr}");
        }
        // mov eax, 1; cpuid
        let mut c = computer(Long(0), &[0xb8, 1, 0, 0, 0, 0x0f, 0xa2]);
        set_up(&mut c, never, of_cpuid, flag, msr);
        assert_eq!(end(&mut c), Done);
        let bit = c.reg(reg::RCX) >> 3 & 1 != 0;
        assert_eq!(bit, shown, "{never} {of_cpuid} {flag} {msr}");
    }
}

fn set_up(c: &mut Computer, never: bool, of_cpuid: bool, flag: bool, msr: bool) {
    if !never {
        without(c, Quirk::MwaitNeverFaults);
    }
    if !of_cpuid {
        without(c, Quirk::MwaitOfCpuid);
    }
    let mut entries = c.cpu.cpuid.entries().to_vec();
    for e in entries.iter_mut().filter(|e| e.function == 1) {
        e.ecx = e.ecx & !(1 << 3) | u32::from(flag) << 3;
    }
    c.cpu.cpuid = CpuidTable::new(entries);
    c.cpu.state.msr.misc_enable = if msr { MISC_ENABLE_MWAIT } else { 0 };
    c.cpu.state_changed();
}
