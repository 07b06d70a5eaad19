//! KVM_GET/SET_MSRS (KVM API, sections 4.18 and 4.19), the MSR lists, and what RDMSR and WRMSR do for
//! the MSRs the processor does not handle itself (SDM Vol. 4; AMD APM Vol. 2, appendix A; KVM's own:
//! `Documentation/virt/kvm/x86/msr.rst`).
//!
//! Three kinds: registers kept in the processor's state ([`STATE`]), registers that exist only to
//! be read as a constant with writes dropped ([`CONSTANT`]), and those with behaviour. A write by the
//! VMM (`Access::Host`) may set what a guest may not: it restores a state.

use anykvm_abi::{
    MSR_KVM_ASYNC_PF_ACK, MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT, MSR_KVM_POLL_CONTROL,
    MSR_KVM_PV_EOI_EN, MSR_KVM_STEAL_TIME, MSR_KVM_SYSTEM_TIME, MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK, MSR_KVM_WALL_CLOCK_NEW,
};
use anykvm_cpu::CpuState;
use anykvm_cpu::state::{Msrs, cr0, efer, seg};

use crate::machine::VcpuMachine;
use crate::{cpuid, mce};

/// 256 or more in one call are E2BIG.
pub(crate) const MAX_ENTRIES: usize = 256;

/// Why an MSR access is refused; what a guest gets for either is #GP, unless user space asked to see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MsrError {
    /// There is no such MSR.
    Unknown,
    /// There is, but not for this access or value.
    Invalid,
}

pub(crate) type MsrAccess<T> = std::result::Result<T, MsrError>;

/// Who accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Guest,
    Host,
}

pub(crate) const TSC: u32 = 0x10;
pub(crate) const APIC_BASE: u32 = 0x1b;
const FEATURE_CONTROL: u32 = 0x3a;
const TSC_ADJUST: u32 = 0x3b;
const SPEC_CTRL: u32 = 0x48;
const PRED_CMD: u32 = 0x49;
const UCODE_REV: u32 = 0x8b;
const SMBASE: u32 = 0x9e;
const PLATFORM_INFO: u32 = 0xce;
const UMWAIT_CONTROL: u32 = 0xe1;
const MTRR_CAP: u32 = 0xfe;
const ARCH_CAPABILITIES: u32 = 0x10a;
const FLUSH_CMD: u32 = 0x10b;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const DEBUGCTL: u32 = 0x1d9;
const MTRR_VAR: std::ops::RangeInclusive<u32> = 0x200..=0x20f;
/// The fixed-range MTRRs, in the order the processor keeps them.
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
const PAT: u32 = 0x277;
const MTRR_DEF_TYPE: u32 = 0x2ff;
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;
const XSS: u32 = 0xda0;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;
const HWCR: u32 = 0xc001_0015;
const VIRT_SPEC_CTRL: u32 = 0xc001_011f;
const DE_CFG: u32 = 0xc001_1029;

/// What may be written to a register kept in the processor's state.
#[derive(Clone, Copy, Debug)]
enum Allow {
    Anything,
    /// Only these bits.
    Bits(u64),
    Canonical,
    /// Only by the VMM; the guest gets #GP.
    HostOnly,
    /// Guest writes are dropped.
    HostElseDropped,
    /// Eight memory types (SDM Vol. 3, 12.12.2).
    PatTypes,
    /// Eight MTRR memory types (SDM Vol. 3, 12.11.2.2).
    MtrrTypes,
}

type Field = fn(&mut Msrs) -> &mut u64;

/// MSRs that are kept in the processor's state as written.
const STATE: &[(u32, Allow, Field)] = &[
    (FEATURE_CONTROL, Allow::HostOnly, |m| &mut m.feature_control),
    (SPEC_CTRL, Allow::Bits(0x587), |m| &mut m.spec_ctrl),
    (UCODE_REV, Allow::HostElseDropped, |m| &mut m.ucode_rev),
    (SMBASE, Allow::HostOnly, |m| &mut m.smbase),
    (PLATFORM_INFO, Allow::HostOnly, |m| &mut m.platform_info),
    (UMWAIT_CONTROL, Allow::Bits(0xffff_fffd), |m| {
        &mut m.umwait_control
    }),
    (ARCH_CAPABILITIES, Allow::HostOnly, |m| {
        &mut m.arch_capabilities
    }),
    (SYSENTER_CS, Allow::Anything, |m| &mut m.sysenter_cs),
    (SYSENTER_ESP, Allow::Canonical, |m| &mut m.sysenter_esp),
    (SYSENTER_EIP, Allow::Canonical, |m| &mut m.sysenter_eip),
    (MISC_ENABLE, Allow::Anything, |m| &mut m.misc_enable),
    (DEBUGCTL, Allow::Bits(0x3), |m| &mut m.debugctl),
    (0x1db, Allow::HostOnly, |m| &mut m.last_branch_from),
    (0x1dc, Allow::HostOnly, |m| &mut m.last_branch_to),
    (0x1dd, Allow::HostOnly, |m| &mut m.last_int_from),
    (0x1de, Allow::HostOnly, |m| &mut m.last_int_to),
    (PAT, Allow::PatTypes, |m| &mut m.pat),
    (MTRR_DEF_TYPE, Allow::Bits(0xcff), |m| &mut m.mtrr_def_type),
    (XSS, Allow::Bits(0), |m| &mut m.xss),
    (STAR, Allow::Anything, |m| &mut m.star),
    (LSTAR, Allow::Canonical, |m| &mut m.lstar),
    (CSTAR, Allow::Canonical, |m| &mut m.cstar),
    (SFMASK, Allow::Bits(0xffff_ffff), |m| &mut m.sfmask),
    (KERNEL_GS_BASE, Allow::Canonical, |m| &mut m.kernel_gs_base),
    (TSC_AUX, Allow::Bits(0xffff_ffff), |m| &mut m.tsc_aux),
    (HWCR, Allow::Bits(0x0109_1f7f), |m| &mut m.hwcr),
    (VIRT_SPEC_CTRL, Allow::Bits(0x4), |m| &mut m.virt_spec_ctrl),
];

/// MSRs that read as a constant and drop writes, as in Linux (`kvm_get_msr_common`): hardware that a
/// virtual machine does not have but that software touches.
const CONSTANT: &[(u32, u64)] = &[
    (0x17, 0),               // IA32_PLATFORM_ID
    (0x2a, 0),               // EBL_CR_POWERON
    (0x2c, 1 << 24),         // EBC_FREQUENCY_ID
    (0x79, 0),               // IA32_BIOS_UPDT_TRIG
    (0xc1, 0),               // PERFCTR0
    (0xc2, 0),               // PERFCTR1
    (0xcd, 3),               // FSB_FREQ
    (0x11e, 0xbe70_2111),    // BBL_CR_CTL3
    (0x186, 0),              // EVNTSEL0
    (0x187, 0),              // EVNTSEL1
    (0x198, 1000 | 4 << 40), // IA32_PERF_STATUS
    (0x199, 0),              // IA32_PERF_CTL
    (0x606, 0),              // RAPL_POWER_UNIT
    (0x611, 0),              // PKG_ENERGY_STATUS
    (0x619, 0),              // DRAM_ENERGY_STATUS
    (0x639, 0),              // PP0_ENERGY_STATUS
    (0x641, 0),              // PP1_ENERGY_STATUS
    (0xc001_0000, 0),        // PerfEvtSel0-3, PerfCtr0-3
    (0xc001_0001, 0),
    (0xc001_0002, 0),
    (0xc001_0003, 0),
    (0xc001_0004, 0),
    (0xc001_0005, 0),
    (0xc001_0006, 0),
    (0xc001_0007, 0),
    (0xc001_0010, 0), // SYSCFG
    (0xc001_001f, 0), // NB_CFG
    (0xc001_0020, 0), // PATCH_LOADER
    (0xc001_0055, 0), // INT_PENDING_MSG
    (0xc001_0058, 0), // MMIO_CONF_BASE
    (0xc001_0112, 0), // TSEG_ADDR
    (0xc001_0113, 0), // TSEG_MASK
    (0xc001_0117, 0), // VM_HSAVE_PA
    (0xc001_1022, 0), // DC_CFG
    (0xc001_1023, 0), // TW_CFG
    (DE_CFG, 2),      // DE_CFG: LFENCE is serialising
    (0xc001_102a, 0), // BU_CFG2
    (0xc001_102c, 0), // EX_CFG
];

/// Eight variable ranges, fixed ranges, write-combining (SDM Vol. 3, 12.11.1).
const MTRR_CAP_VALUE: u64 = 0x508;

/// What the processor does not suffer from: it does not speculate on behalf of the guest.
const ARCH_CAPABILITIES_VALUE: u64 = 1 << 0 // RDCL_NO
    | 1 << 3 // SKIP_L1DFL_VMENTRY
    | 1 << 4 // SSB_NO
    | 1 << 5 // MDS_NO
    | 1 << 6 // IF_PSCHANGE_MC_NO
    | 1 << 8; // TAA_NO

/// KVM_GET_MSR_INDEX_LIST: all that KVM_GET_MSRS and KVM_SET_MSRS carry from one machine to another.
pub(crate) fn index_list() -> Vec<u32> {
    let mut list = vec![
        SYSENTER_CS,
        SYSENTER_ESP,
        SYSENTER_EIP,
        STAR,
        CSTAR,
        KERNEL_GS_BASE,
        SFMASK,
        LSTAR,
        TSC,
        PAT,
        FEATURE_CONTROL,
        TSC_AUX,
        SPEC_CTRL,
        UMWAIT_CONTROL,
        XSS,
        EFER,
        FS_BASE,
        GS_BASE,
        APIC_BASE,
        DEBUGCTL,
        MSR_KVM_WALL_CLOCK,
        MSR_KVM_SYSTEM_TIME,
        MSR_KVM_WALL_CLOCK_NEW,
        MSR_KVM_SYSTEM_TIME_NEW,
        MSR_KVM_ASYNC_PF_EN,
        MSR_KVM_ASYNC_PF_INT,
        MSR_KVM_ASYNC_PF_ACK,
        MSR_KVM_STEAL_TIME,
        MSR_KVM_PV_EOI_EN,
        MSR_KVM_POLL_CONTROL,
        TSC_ADJUST,
        TSC_DEADLINE,
        ARCH_CAPABILITIES,
        MISC_ENABLE,
        mce::MCG_STATUS,
        mce::MCG_CTL,
        SMBASE,
        PLATFORM_INFO,
        UCODE_REV,
        HWCR,
        VIRT_SPEC_CTRL,
        MTRR_DEF_TYPE,
    ];
    list.extend(MTRR_VAR);
    list.extend(MTRR_FIXED);
    list
}

/// KVM_GET_MSR_FEATURE_INDEX_LIST, with the values that KVM_GET_MSRS on `/dev/kvm` gives.
pub(crate) const FEATURES: &[(u32, u64)] = &[
    (UCODE_REV, 0x1_0000_0000),
    (ARCH_CAPABILITIES, ARCH_CAPABILITIES_VALUE),
    (DE_CFG, 2),
];

fn valid_mtrr_type(t: u8) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6)
}

fn canonical(value: u64) -> bool {
    // The widest form: 57 bits with LA57; the processor checks the mode's own width on use.
    (value as i64) << 7 >> 7 == value as i64
}

impl Allow {
    fn check(self, value: u64) -> MsrAccess<()> {
        let good = match self {
            Self::Anything | Self::HostOnly | Self::HostElseDropped => true,
            Self::Bits(bits) => value & !bits == 0,
            Self::Canonical => canonical(value),
            Self::PatTypes => value
                .to_le_bytes()
                .iter()
                .all(|t| valid_mtrr_type(*t) || *t == 7),
            Self::MtrrTypes => value.to_le_bytes().iter().all(|t| valid_mtrr_type(*t)),
        };
        if good { Ok(()) } else { Err(MsrError::Invalid) }
    }
}

/// Reads an MSR.
pub(crate) fn read(m: &VcpuMachine, s: &CpuState, index: u32, access: Access) -> MsrAccess<u64> {
    if let Some((_, _, field)) = STATE.iter().find(|(i, ..)| *i == index) {
        let mut msrs = s.msr;
        return Ok(*field(&mut msrs));
    }
    if let Some((_, value)) = CONSTANT.iter().find(|(i, _)| *i == index) {
        return Ok(*value);
    }
    if let Some(n) = MTRR_FIXED.iter().position(|i| *i == index) {
        return Ok(s.msr.mtrr_fixed[n]);
    }
    if MTRR_VAR.contains(&index) {
        return Ok(s.msr.mtrr_var[(index - MTRR_VAR.start()) as usize]);
    }
    if X2APIC.contains(&index) {
        let lapic = m.lapic().ok_or(MsrError::Invalid)?;
        return lapic.msr_read(index).map_err(|_| MsrError::Invalid);
    }
    match index {
        TSC => Ok(m.guest_tsc(s)),
        TSC_ADJUST => Ok(s.msr.tsc_adjust),
        TSC_DEADLINE => Ok(m.lapic().map_or(0, |l| l.tsc_deadline())),
        APIC_BASE => Ok(m.apic_base()),
        MTRR_CAP => Ok(MTRR_CAP_VALUE),
        EFER => Ok(s.msr.efer),
        FS_BASE => Ok(s.seg[usize::from(seg::FS)].base),
        GS_BASE => Ok(s.seg[usize::from(seg::GS)].base),
        _ if mce::is_mce(index) => m.mce().read(index, access),
        _ => m.paravirt_read(index, access),
    }
}

/// Writes an MSR.
pub(crate) fn write(
    m: &VcpuMachine,
    s: &mut CpuState,
    index: u32,
    value: u64,
    access: Access,
) -> MsrAccess<()> {
    let guest = access == Access::Guest;
    if let Some((_, allow, field)) = STATE.iter().find(|(i, ..)| *i == index) {
        match allow {
            Allow::HostOnly if guest => return Err(MsrError::Invalid),
            Allow::HostElseDropped if guest => return Ok(()),
            _ => allow.check(value)?,
        }
        *field(&mut s.msr) = value;
        return Ok(());
    }
    if CONSTANT.iter().any(|(i, _)| *i == index) {
        return Ok(());
    }
    if let Some(n) = MTRR_FIXED.iter().position(|i| *i == index) {
        Allow::MtrrTypes.check(value)?;
        s.msr.mtrr_fixed[n] = value;
        return Ok(());
    }
    if MTRR_VAR.contains(&index) {
        let n = (index - MTRR_VAR.start()) as usize;
        check_mtrr_var(n, value, &m.cpuid())?;
        s.msr.mtrr_var[n] = value;
        return Ok(());
    }
    if X2APIC.contains(&index) {
        let lapic = m.lapic().ok_or(MsrError::Invalid)?;
        return lapic.msr_write(index, value).map_err(|_| MsrError::Invalid);
    }
    match index {
        TSC => m.write_tsc(s, value, access),
        TSC_ADJUST => m.write_tsc_adjust(s, value, access),
        TSC_DEADLINE => {
            if let Some(lapic) = m.lapic() {
                lapic.set_tsc_deadline(value);
            }
        }
        APIC_BASE => m.set_apic_base(value, access)?,
        EFER => write_efer(s, value, access, &m.cpuid())?,
        FS_BASE | GS_BASE => {
            Allow::Canonical.check(value)?;
            let register = if index == FS_BASE { seg::FS } else { seg::GS };
            s.seg[usize::from(register)].base = value;
        }
        PRED_CMD | FLUSH_CMD if value <= 1 => {}
        PRED_CMD | FLUSH_CMD | MTRR_CAP => return Err(MsrError::Invalid),
        _ if mce::is_mce(index) => m.mce().write(index, value, access)?,
        _ => m.paravirt_write(index, value, access)?,
    }
    Ok(())
}

/// SDM Vol. 3, 12.11.2.3.
fn check_mtrr_var(n: usize, value: u64, cpuid: &cpuid::GuestCpuid) -> MsrAccess<()> {
    let reserved = cpuid.reserved_gpa_bits();
    let good = if n.is_multiple_of(2) {
        valid_mtrr_type(value as u8) && value & (reserved | 0xf00) == 0
    } else {
        value & (reserved | 0x7ff) == 0
    };
    if good { Ok(()) } else { Err(MsrError::Invalid) }
}

/// SDM Vol. 3, 2.2.1. LMA follows from LME and paging and cannot be written.
fn write_efer(
    s: &mut CpuState,
    value: u64,
    access: Access,
    cpuid: &cpuid::GuestCpuid,
) -> MsrAccess<()> {
    let old = s.msr.efer;
    let changes_lme = (old ^ value) & efer::LME != 0;
    let allowed = match access {
        Access::Guest => cpuid.table().efer_valid(),
        Access::Host => efer::SCE | efer::LME | efer::LMA | efer::NX | efer::FFXSR,
    };
    let guest_lme_while_paging = access == Access::Guest && changes_lme && s.cr0 & cr0::PG != 0;
    if value & !allowed != 0 || guest_lme_while_paging {
        return Err(MsrError::Invalid);
    }
    s.msr.efer = value & !efer::LMA | old & efer::LMA;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_msr_is_in_two_tables() {
        let mut all: Vec<u32> = STATE.iter().map(|(i, ..)| *i).collect();
        all.extend(CONSTANT.iter().map(|(i, _)| *i));
        all.extend(MTRR_FIXED);
        all.extend(MTRR_VAR);
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), n);
    }

    #[test]
    fn index_list_has_no_duplicates() {
        let mut list = index_list();
        let n = list.len();
        list.sort_unstable();
        list.dedup();
        assert_eq!(list.len(), n);
    }

    #[test]
    fn values_are_checked() {
        assert!(Allow::PatTypes.check(0x0007_0406_0007_0406).is_ok());
        assert!(Allow::PatTypes.check(2).is_err());
        assert!(Allow::MtrrTypes.check(0x0606_0606_0606_0606).is_ok());
        assert!(Allow::MtrrTypes.check(7).is_err());
        assert!(Allow::Canonical.check(0xffff_8000_0000_0000).is_ok());
        assert!(Allow::Canonical.check(0x8000_0000_0000_0000).is_err());
        assert!(Allow::Bits(0xff).check(0x100).is_err());
    }

    #[test]
    fn efer_keeps_lma() {
        let mut s = CpuState::new();
        let cpuid = cpuid::GuestCpuid::default();
        write_efer(&mut s, efer::LME | efer::LMA, Access::Host, &cpuid).unwrap();
        assert_eq!(s.msr.efer, efer::LME);
        s.cr0 |= cr0::PG;
        assert!(write_efer(&mut s, 0, Access::Guest, &cpuid).is_err());
        assert!(write_efer(&mut s, 1 << 63, Access::Host, &cpuid).is_err());
    }
}
