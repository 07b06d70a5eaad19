//! The MSRs the processor keeps (SDM Vol. 4; AMD APM Vol. 2, appendix A): what RDMSR and WRMSR do
//! with them, what KVM_GET_MSRS and KVM_SET_MSRS carry, and the list of those worth saving.
//!
//! Three kinds: registers kept in the state as written ([`STATE`]), registers that read as a
//! constant and drop writes because software touches them although a virtual machine has no such
//! hardware ([`CONSTANT`], as Linux's `kvm_get_msr_common`), and those with behaviour. All others
//! (APIC, machine check, the clock, paravirtual ones) belong to the [`crate::Machine`].

pub(crate) mod instructions;
mod table;

use crate::cpuid::{CpuidTable, feature};
use crate::state::{CpuState, cr0, efer, seg};
pub use table::{ARCH_CAPABILITIES, FEATURES, Row, Writes, rows};
use table::{CONSTANT, Kept, MTRR_CAP_VALUE, STATE, is_mtrr_type};

/// Who accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// RDMSR or WRMSR.
    Guest,
    /// The owner, saving or restoring: may set what a guest may not.
    Host,
}

/// The MSR exists, but not for this processor, this access or this value: #GP(0) for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("MSR access refused")]
pub struct Refused;

/// MSR numbers (SDM Vol. 4, table 2-2; APM Vol. 2, appendix A).
#[allow(missing_docs)]
pub mod index {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const UCODE_REV: u32 = 0x8b;
    pub const SMBASE: u32 = 0x9e;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const UMWAIT_CONTROL: u32 = 0xe1;
    pub const POWER_CTL: u32 = 0x1fc;
    pub const PERF_CAPABILITIES: u32 = 0x345;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const LAST_BRANCH_FROM: u32 = 0x1db;
    pub const LAST_BRANCH_TO: u32 = 0x1dc;
    pub const LAST_INT_FROM: u32 = 0x1dd;
    pub const LAST_INT_TO: u32 = 0x1de;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const XSS: u32 = 0xda0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const HWCR: u32 = 0xc001_0015;
    pub const VM_CR: u32 = 0xc001_0114;
    pub const VIRT_SPEC_CTRL: u32 = 0xc001_011f;
    pub const DE_CFG: u32 = 0xc001_1029;
}
use index as i;

/// IA32_MTRR_PHYSBASE0 to IA32_MTRR_PHYSMASK7.
pub const MTRR_VAR: std::ops::RangeInclusive<u32> = 0x200..=0x20f;
/// The fixed-range MTRRs, in the order the state keeps them.
pub const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
/// The x2APIC's registers.
const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;

/// IA32_MISC_ENABLE: MONITOR and MWAIT exist.
pub const MISC_ENABLE_MWAIT: u64 = 1 << 18;

/// The MSRs that carry the processor's state from one machine to another: this module's part of
/// KVM_GET_MSR_INDEX_LIST.
pub fn saved() -> Vec<u32> {
    let saved = rows().into_iter().filter(|row| row.saved);
    saved.flat_map(|row| row.first..=row.last).collect()
}

/// Reads an MSR; `None` if the processor does not keep it.
pub fn read(
    s: &CpuState,
    cpuid: &CpuidTable,
    index: u32,
    access: Access,
) -> Option<Result<u64, Refused>> {
    if X2APIC.contains(&index) || index == i::TSC_DEADLINE {
        return None;
    }
    if let Some(k) = STATE.iter().find(|k| k.index == index) {
        if !k.exists(cpuid, access) {
            return Some(Err(Refused));
        }
        let mut msrs = s.msr;
        return Some(Ok(*(k.field)(&mut msrs)));
    }
    if MTRR_VAR.contains(&index) {
        return Some(Ok(s.msr.mtrr_var[(index - MTRR_VAR.start()) as usize]));
    }
    if let Some(n) = MTRR_FIXED.iter().position(|m| *m == index) {
        return Some(Ok(s.msr.mtrr_fixed[n]));
    }
    if let Some((_, _, value)) = CONSTANT.iter().find(|(c, ..)| *c == index) {
        return Some(Ok(*value));
    }
    Some(Ok(match index {
        i::EFER => s.msr.efer,
        i::FS_BASE => s.seg[usize::from(seg::FS)].base,
        i::GS_BASE => s.seg[usize::from(seg::GS)].base,
        i::TSC => s.tsc(),
        i::TSC_ADJUST => s.msr.tsc_adjust,
        i::MTRR_CAP => MTRR_CAP_VALUE,
        i::SMBASE if access == Access::Host || s.events.smm => s.msr.smbase,
        i::SMBASE | i::PRED_CMD | i::FLUSH_CMD => return Some(Err(Refused)),
        _ => return None,
    }))
}

/// Writes an MSR; `None` if the processor does not keep it, or the clock must know (the
/// time-stamp counter and its adjustment). After a change of EFER the caches of what depends on it
/// must be dropped ([`crate::Cpu::state_changed`]).
pub fn write(
    s: &mut CpuState,
    cpuid: &CpuidTable,
    index: u32,
    value: u64,
    access: Access,
) -> Option<Result<(), Refused>> {
    if X2APIC.contains(&index) || index == i::TSC_DEADLINE {
        return None;
    }
    if let Some(k) = STATE.iter().find(|k| k.index == index) {
        return Some(write_kept(s, cpuid, k, value, access));
    }
    if MTRR_VAR.contains(&index) {
        return Some(write_mtrr_var(
            s,
            cpuid,
            (index - MTRR_VAR.start()) as usize,
            value,
        ));
    }
    if let Some(n) = MTRR_FIXED.iter().position(|m| *m == index) {
        if Writes::MtrrTypes.check(value, false).is_err() {
            return Some(Err(Refused));
        }
        s.msr.mtrr_fixed[n] = value;
        return Some(Ok(()));
    }
    if CONSTANT.iter().any(|(c, ..)| *c == index) {
        return Some(Ok(()));
    }
    Some(match index {
        i::EFER => write_efer(s, cpuid, value, access),
        i::FS_BASE => write_base(s, cpuid, seg::FS, value),
        i::GS_BASE => write_base(s, cpuid, seg::GS, value),
        i::SMBASE if access == Access::Host => {
            s.msr.smbase = value;
            Ok(())
        }
        i::PRED_CMD | i::FLUSH_CMD => write_command(cpuid, index, value, access),
        i::MTRR_CAP | i::SMBASE => Err(Refused),
        _ => return None,
    })
}

fn write_kept(
    s: &mut CpuState,
    cpuid: &CpuidTable,
    k: &Kept,
    value: u64,
    access: Access,
) -> Result<(), Refused> {
    if !k.exists(cpuid, access) {
        return Err(Refused);
    }
    match k.writes {
        Writes::HostOnly if access == Access::Guest => return Err(Refused),
        Writes::Lock if access == Access::Guest && *(k.field)(&mut s.msr) & 1 != 0 => {
            return Err(Refused);
        }
        Writes::HostElseDropped if access == Access::Guest => return Ok(()),
        writes => writes.check(value, cpuid.has_la57())?,
    }
    *(k.field)(&mut s.msr) = value;
    Ok(())
}

/// SDM Vol. 3, 12.11.2.3.
fn write_mtrr_var(
    s: &mut CpuState,
    cpuid: &CpuidTable,
    n: usize,
    value: u64,
) -> Result<(), Refused> {
    let beyond = !0 << cpuid.phys_bits();
    let good = if n.is_multiple_of(2) {
        is_mtrr_type(value as u8) && value & (beyond | 0xf00) == 0
    } else {
        value & (beyond | 0x7ff) == 0
    };
    if !good {
        return Err(Refused);
    }
    s.msr.mtrr_var[n] = value;
    Ok(())
}

fn write_base(s: &mut CpuState, cpuid: &CpuidTable, n: u8, value: u64) -> Result<(), Refused> {
    Writes::Canonical.check(value, cpuid.has_la57())?;
    s.seg[usize::from(n)].base = value;
    Ok(())
}

/// IA32_PRED_CMD and IA32_FLUSH_CMD: there are no predictors and caches to flush.
fn write_command(
    cpuid: &CpuidTable,
    index: u32,
    value: u64,
    access: Access,
) -> Result<(), Refused> {
    let exists = if index == i::PRED_CMD {
        cpuid.has(feature::SPEC_CTRL) || cpuid.has(feature::AMD_IBPB)
    } else {
        cpuid.has(feature::FLUSH_L1D)
    };
    if value & !1 != 0 || access == Access::Guest && !exists {
        return Err(Refused);
    }
    Ok(())
}

/// SDM Vol. 3, 2.2.1: LMA follows from LME and paging and cannot be written; LME cannot change
/// while paging is on.
fn write_efer(
    s: &mut CpuState,
    cpuid: &CpuidTable,
    value: u64,
    access: Access,
) -> Result<(), Refused> {
    let old = s.msr.efer;
    let valid = match access {
        Access::Guest => cpuid.efer_valid(),
        Access::Host => efer::IMPLEMENTED,
    };
    let lme_while_paging = (old ^ value) & efer::LME != 0 && s.cr0 & cr0::PG != 0;
    if value & !valid != 0 || access == Access::Guest && lme_while_paging {
        return Err(Refused);
    }
    s.msr.efer = value & !efer::LMA | old & efer::LMA;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_msr_is_in_two_tables() {
        let mut all = saved();
        all.extend(CONSTANT.iter().map(|(c, ..)| *c));
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), n);
    }

    #[test]
    fn feature_control_is_locked_once() {
        let cpuid = CpuidTable::default();
        let mut s = CpuState::new();
        let mut set = |value, access| write(&mut s, &cpuid, i::FEATURE_CONTROL, value, access);
        assert_eq!(set(5, Access::Guest), Some(Err(Refused)));
        assert_eq!(set(1, Access::Guest), Some(Ok(())));
        assert_eq!(set(1, Access::Guest), Some(Err(Refused)));
        assert_eq!(set(0, Access::Host), Some(Ok(())));
        assert_eq!(set(1, Access::Guest), Some(Ok(())));
    }

    #[test]
    fn saved_msrs_are_read_and_written_by_the_owner() {
        let cpuid = CpuidTable::default();
        let mut s = CpuState::new();
        for index in saved() {
            let value = read(&s, &cpuid, index, Access::Host).unwrap().unwrap();
            match write(&mut s, &cpuid, index, value, Access::Host) {
                Some(r) => assert_eq!(r, Ok(()), "{index:#x}"),
                None => assert!([i::TSC, i::TSC_ADJUST].contains(&index)),
            }
        }
    }

    #[test]
    fn values_are_checked() {
        let cpuid = CpuidTable::default();
        let mut s = CpuState::new();
        let cases = [
            (i::PAT, 0x0007_0406_0007_0406, true),
            (i::PAT, 2, false),
            (i::MTRR_DEF_TYPE, 0xc06, true),
            (i::MTRR_DEF_TYPE, 2, false),
            (i::LSTAR, 0xffff_8000_0000_0000, true),
            (i::LSTAR, 0x8000_0000_0000_0000, false),
            (i::SFMASK, 1 << 32, false),
            (i::UCODE_REV, 5, true),
            (i::ARCH_CAPABILITIES, 0, false),
            (i::MTRR_CAP, 0, false),
            (0x250, 0x0606_0606_0606_0606, true),
            (0x250, 7, false),
            (0x201, 0xff, false),
        ];
        for (index, value, good) in cases {
            let r = write(&mut s, &cpuid, index, value, Access::Guest).unwrap();
            assert_eq!(r.is_ok(), good, "{index:#x} {value:#x}");
        }
        assert_eq!(s.msr.ucode_rev, 0x1_0000_0000);
        assert_eq!(write(&mut s, &cpuid, 0x6e0, 0, Access::Guest), None);
    }

    #[test]
    fn efer_rules() {
        let cpuid = CpuidTable::default();
        let mut s = CpuState::new();
        write_efer(&mut s, &cpuid, efer::LME | efer::LMA, Access::Host).unwrap();
        assert_eq!(s.msr.efer, efer::LME);
        s.cr0 |= cr0::PG;
        assert_eq!(write_efer(&mut s, &cpuid, 0, Access::Guest), Err(Refused));
        assert_eq!(
            write_efer(&mut s, &cpuid, 1 << 63, Access::Host),
            Err(Refused)
        );
    }
}
