//! Which instructions end a block: those that transfer control, and those behind which the mode,
//! the memory mapping or the interruptibility may be another.

use iced_x86::{FlowControl, Instruction, Mnemonic, Register};

/// Whether the run loop must look around behind this instruction.
pub fn ends_block(raw: &Instruction) -> bool {
    if raw.flow_control() != FlowControl::Next {
        return true;
    }
    let system = matches!(
        raw.mnemonic(),
        Mnemonic::Cli
            | Mnemonic::Hlt
            | Mnemonic::Popf
            | Mnemonic::Popfd
            | Mnemonic::Popfq
            | Mnemonic::Clac
            | Mnemonic::Stac
            | Mnemonic::Lmsw
            | Mnemonic::Clts
            | Mnemonic::Invlpg
            | Mnemonic::Invpcid
            | Mnemonic::Wrmsr
            | Mnemonic::Xsetbv
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
            | Mnemonic::Xrstors
            | Mnemonic::Xrstors64
            | Mnemonic::Lss
            | Mnemonic::Lds
            | Mnemonic::Les
            | Mnemonic::Lfs
            | Mnemonic::Lgs
            | Mnemonic::Cpuid
            | Mnemonic::Serialize
            | Mnemonic::Mwait
            | Mnemonic::Pause
            | Mnemonic::Rsm
    );
    let to_register = raw.op0_register();
    let special = to_register.is_segment_register() || to_register.is_cr() || to_register.is_dr();
    let writes_op0 = matches!(raw.mnemonic(), Mnemonic::Mov | Mnemonic::Pop);
    system || writes_op0 && special && to_register != Register::None
}
