//! Instructions that are not compared, and why.

use iced_x86::{CpuidFeature, FlowControl, Instruction, Mnemonic as M, OpKind};

/// Why an instruction is not run, if it is not.
pub fn reason(insn: &Instruction) -> Option<&'static str> {
    use CpuidFeature as F;
    const HIDDEN: &[F] = &[
        F::SVM,
        F::SKINIT,
        F::SEV_ES,
        F::SEV_SNP,
        F::MONITOR,
        F::MONITORX,
        F::RDPRU,
        F::MCOMMIT,
        F::INVLPGB,
        F::WAITPKG,
    ];
    const SVM: [M; 3] = [M::Clgi, M::Stgi, M::Skinit];
    let features = insn.cpuid_features();
    if SVM.contains(&insn.mnemonic()) || features.iter().any(|f| HIDDEN.contains(f)) {
        return Some("a hypervisor below the host may hide them, or answer in its place");
    }
    Some(match insn.mnemonic() {
        M::Syscall | M::Sysenter => "system calls enter the host's kernel",
        M::Int if insn.immediate8() == 0x80 => "system calls enter the host's kernel",
        M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdpru | M::Rdrand | M::Rdseed => {
            "another value every time or on every processor"
        }
        M::Senduipi => "without UINTR its prefix means nothing, and it is RDRAND",
        M::Rdpmc => "the host's kernel decides whether user mode may (CR4.PCE)",
        M::Cpuid | M::Xgetbv => "the guest's CPUID and XCR0 are its own",
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => {
            "Linux emulates them for user programs where UMIP forbids them"
        }
        M::Vmcall | M::Vmmcall => "leave to the hypervisor the host itself may run on",
        M::Lsl => "the limit of Linux's CPU-number segment is that of the moment",
        _ => return None,
    })
}

/// Whether the instruction only stands alone in a case: processors differ in it (see
/// [`crate::tolerated`]), and others behind it would carry the difference on.
pub fn alone(insn: &Instruction, bytes: &[u8]) -> bool {
    use CpuidFeature as F;
    const UNDEFINED_FLAGS: [F; 2] = [F::BMI1, F::BMI2];
    const STATES: [M; 16] = [
        M::Fnstenv,
        M::Fnsave,
        M::Fxsave,
        M::Fxsave64,
        M::Xsave,
        M::Xsave64,
        M::Xsaveopt,
        M::Xsaveopt64,
        M::Xsavec,
        M::Xsavec64,
        M::Lfs,
        M::Lgs,
        M::Lss,
        M::Loope,
        M::Loopne,
        M::Popa,
    ];
    let prefixes = &bytes[..insn.len().min(6)];
    // By more than one, OF is what the host likes.
    let rotation = matches!(insn.mnemonic(), M::Rcl | M::Rcr)
        && !(insn.op1_kind() == OpKind::Immediate8 && insn.immediate8() == 1);
    insn.flow_control() != FlowControl::Next && prefixes.contains(&0x66)
        || insn.is_jmp_far_indirect()
        || insn.is_call_far_indirect()
        || insn.cpuid_features().contains(&F::SHA)
        || insn
            .cpuid_features()
            .iter()
            .any(|f| UNDEFINED_FLAGS.contains(f))
        || STATES.contains(&insn.mnemonic())
        || rotation
        || insn.mnemonic() == M::Push && insn.op0_register().is_segment_register()
}
