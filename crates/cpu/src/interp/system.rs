//! System instructions: which function of the crate's system modules executes each.

use iced_x86::{Code, Mnemonic};

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::machine::Quirk;
use crate::mode::Mode;
use crate::state::seg;
use crate::{
    cpuid, crregs, drregs, eflags, exception, far, hypercall, iret, msr, pkru, segment, smm,
    syscall, tables,
};

/// Handlers of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let code = insn.raw.code();
    control_transfer(code)
        .or_else(|| segments(code))
        .or_else(|| descriptor_tables(code))
        .or_else(|| by_mnemonic(insn.raw.mnemonic()))
}

fn control_transfer(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 => far::jmp_far::<u16>,
        Code::Jmp_ptr1632 | Code::Jmp_m1632 => far::jmp_far::<u32>,
        Code::Jmp_m1664 => far::jmp_far::<u64>,
        Code::Call_ptr1616 | Code::Call_m1616 => far::call_far::<u16>,
        Code::Call_ptr1632 | Code::Call_m1632 => far::call_far::<u32>,
        Code::Call_m1664 => far::call_far::<u64>,
        Code::Retfw | Code::Retfw_imm16 => far::ret_far::<u16>,
        Code::Retfd | Code::Retfd_imm16 => far::ret_far::<u32>,
        Code::Retfq | Code::Retfq_imm16 => far::ret_far::<u64>,
        Code::Iretw => iret::iret::<u16>,
        Code::Iretd => iret::iret::<u32>,
        Code::Iretq => iret::iret::<u64>,
        Code::Int_imm8 => exception::int_n,
        Code::Int3 => exception::int3,
        Code::Int1 => exception::int1,
        Code::Into => exception::into,
        Code::Syscall => syscall::syscall,
        Code::Sysretd => syscall::sysret::<false>,
        Code::Sysretq => syscall::sysret::<true>,
        Code::Sysenter => syscall::sysenter,
        Code::Sysexitd => syscall::sysexit::<false>,
        Code::Sysexitq => syscall::sysexit::<true>,
        _ => return None,
    })
}

fn segments(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            segment::mov_to_segment
        }
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            segment::mov_from_segment
        }
        Code::Pushw_ES
        | Code::Pushw_CS
        | Code::Pushw_SS
        | Code::Pushw_DS
        | Code::Pushw_FS
        | Code::Pushw_GS => segment::push_segment::<u16>,
        Code::Pushd_ES
        | Code::Pushd_CS
        | Code::Pushd_SS
        | Code::Pushd_DS
        | Code::Pushd_FS
        | Code::Pushd_GS => segment::push_segment::<u32>,
        Code::Pushq_FS | Code::Pushq_GS => segment::push_segment::<u64>,
        Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => {
            segment::pop_segment::<u16>
        }
        Code::Popd_ES | Code::Popd_SS | Code::Popd_DS | Code::Popd_FS | Code::Popd_GS => {
            segment::pop_segment::<u32>
        }
        Code::Popq_FS | Code::Popq_GS => segment::pop_segment::<u64>,
        Code::Les_r16_m1616 => segment::load_far_pointer::<u16, { seg::ES }>,
        Code::Les_r32_m1632 => segment::load_far_pointer::<u32, { seg::ES }>,
        Code::Lds_r16_m1616 => segment::load_far_pointer::<u16, { seg::DS }>,
        Code::Lds_r32_m1632 => segment::load_far_pointer::<u32, { seg::DS }>,
        Code::Lss_r16_m1616 => segment::load_far_pointer::<u16, { seg::SS }>,
        Code::Lss_r32_m1632 => segment::load_far_pointer::<u32, { seg::SS }>,
        Code::Lss_r64_m1664 => segment::load_far_pointer::<u64, { seg::SS }>,
        Code::Lfs_r16_m1616 => segment::load_far_pointer::<u16, { seg::FS }>,
        Code::Lfs_r32_m1632 => segment::load_far_pointer::<u32, { seg::FS }>,
        Code::Lfs_r64_m1664 => segment::load_far_pointer::<u64, { seg::FS }>,
        Code::Lgs_r16_m1616 => segment::load_far_pointer::<u16, { seg::GS }>,
        Code::Lgs_r32_m1632 => segment::load_far_pointer::<u32, { seg::GS }>,
        Code::Lgs_r64_m1664 => segment::load_far_pointer::<u64, { seg::GS }>,
        Code::Rdfsbase_r32 => segment::rd_base::<u32, { seg::FS }>,
        Code::Rdfsbase_r64 => segment::rd_base::<u64, { seg::FS }>,
        Code::Rdgsbase_r32 => segment::rd_base::<u32, { seg::GS }>,
        Code::Rdgsbase_r64 => segment::rd_base::<u64, { seg::GS }>,
        Code::Wrfsbase_r32 => segment::wr_base::<u32, { seg::FS }>,
        Code::Wrfsbase_r64 => segment::wr_base::<u64, { seg::FS }>,
        Code::Wrgsbase_r32 => segment::wr_base::<u32, { seg::GS }>,
        Code::Wrgsbase_r64 => segment::wr_base::<u64, { seg::GS }>,
        Code::Swapgs => segment::swapgs,
        _ => return None,
    })
}

fn descriptor_tables(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Lar_r16_rm16 => tables::lar::<u16>,
        Code::Lar_r32_r32m16 => tables::lar::<u32>,
        Code::Lar_r64_r64m16 => tables::lar::<u64>,
        Code::Lsl_r16_rm16 => tables::lsl::<u16>,
        Code::Lsl_r32_r32m16 => tables::lsl::<u32>,
        Code::Lsl_r64_r64m16 => tables::lsl::<u64>,
        Code::Pushfw => eflags::pushf::<u16>,
        Code::Pushfd => eflags::pushf::<u32>,
        Code::Pushfq => eflags::pushf::<u64>,
        Code::Popfw => eflags::popf::<u16>,
        Code::Popfd => eflags::popf::<u32>,
        Code::Popfq => eflags::popf::<u64>,
        Code::Mov_r32_cr | Code::Mov_r64_cr => crregs::mov_from_cr,
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => crregs::mov_to_cr,
        Code::Mov_r32_dr | Code::Mov_r64_dr => drregs::mov_from_dr,
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => drregs::mov_to_dr,
        _ => return None,
    })
}

fn by_mnemonic(mnemonic: Mnemonic) -> Option<Handler> {
    Some(match mnemonic {
        Mnemonic::Lgdt => tables::lgdt,
        Mnemonic::Lidt => tables::lidt,
        Mnemonic::Sgdt => tables::sgdt,
        Mnemonic::Sidt => tables::sidt,
        Mnemonic::Lldt => tables::lldt,
        Mnemonic::Sldt => tables::sldt,
        Mnemonic::Ltr => tables::ltr,
        Mnemonic::Str => tables::str,
        Mnemonic::Verr => tables::verr,
        Mnemonic::Verw => tables::verw,
        Mnemonic::Arpl => tables::arpl,
        Mnemonic::Lmsw => crregs::lmsw,
        Mnemonic::Smsw => crregs::smsw,
        Mnemonic::Clts => crregs::clts,
        Mnemonic::Invlpg => crregs::invlpg,
        Mnemonic::Invpcid => crregs::invpcid,
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => crregs::cache_flush,
        Mnemonic::Xgetbv => crregs::xgetbv,
        Mnemonic::Xsetbv => crregs::xsetbv,
        Mnemonic::Rdpkru => pkru::rdpkru,
        Mnemonic::Wrpkru => pkru::wrpkru,
        Mnemonic::Cli => eflags::cli,
        Mnemonic::Sti => eflags::sti,
        Mnemonic::Clac => eflags::clac,
        Mnemonic::Stac => eflags::stac,
        Mnemonic::Hlt => eflags::hlt,
        Mnemonic::Cpuid => cpuid::execute,
        Mnemonic::Rdmsr => msr::instructions::rdmsr,
        Mnemonic::Wrmsr => msr::instructions::wrmsr,
        Mnemonic::Rdtsc => msr::instructions::rdtsc,
        Mnemonic::Rdtscp => msr::instructions::rdtscp,
        Mnemonic::Rdpid => msr::instructions::rdpid,
        Mnemonic::Rdpmc => msr::instructions::rdpmc,
        Mnemonic::Rsm => smm::rsm,
        Mnemonic::Vmcall | Mnemonic::Vmmcall => hypercall::hypercall,
        Mnemonic::Monitor | Mnemonic::Mwait => monitor,
        _ => return None,
    })
}

/// MONITOR and MWAIT do nothing, as in KVM: by one of its quirks even if the guest has not got them,
/// which IA32_MISC_ENABLE tells, or by another CPUID.
fn monitor(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let has = if cpu.machine.has_quirk(Quirk::MwaitOfCpuid) {
        cpu.cpuid.has(cpuid::feature::MWAIT)
    } else {
        cpu.state.msr.misc_enable & msr::MISC_ENABLE_MWAIT != 0
    };
    let allowed = has || cpu.machine.has_quirk(Quirk::MwaitNeverFaults);
    if allowed && cpu.state.cpl() == 0 {
        Ok(())
    } else {
        Err(cpu.ud())
    }
}
