//! Which MSRs the processor keeps, and what may be written to them (SDM Vol. 4, table 2-2; APM Vol. 2,
//! appendix A).

use super::{MTRR_FIXED, MTRR_VAR, Refused, index as i};
use crate::cpuid::{CpuidTable, Feature, feature};
use crate::crregs::is_canonical;
use crate::msr::Access;
use crate::state::Msrs;

/// What may be written to an MSR. What may not is #GP(0) for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// Any value.
    Anything,
    /// Only these bits.
    Bits(u64),
    /// A canonical address.
    Canonical,
    /// Nothing by a guest, anything by the owner.
    HostOnly,
    /// Anything by the owner; a guest's writes are dropped.
    HostElseDropped,
    /// The lock, bit 0; nothing by a guest while it is set (SDM Vol. 3, 24.7: IA32_FEATURE_CONTROL,
    /// whose other bits belong to features that there are not).
    Lock,
    /// Eight memory types (SDM Vol. 3, 12.12.2).
    PatTypes,
    /// Eight memory types of the MTRRs (SDM Vol. 3, 12.11.2.2).
    MtrrTypes,
    /// IA32_MTRR_DEF_TYPE (SDM Vol. 3, 12.11.2.1).
    MtrrDefType,
    /// Base and mask of a variable range (SDM Vol. 3, 12.11.2.3).
    MtrrRange,
    /// Dropped, whoever writes.
    Dropped,
    /// Nothing.
    Nothing,
    /// By rules of its own.
    Rules,
}

/// One register kept in the state.
pub(super) struct Kept {
    pub name: &'static str,
    pub index: u32,
    pub writes: Writes,
    /// A guest has the register if its CPUID has any of these (none: always).
    pub needs: &'static [Feature],
    pub field: fn(&mut Msrs) -> &mut u64,
}

const fn kept(
    name: &'static str,
    index: u32,
    writes: Writes,
    needs: &'static [Feature],
    field: fn(&mut Msrs) -> &mut u64,
) -> Kept {
    Kept {
        name,
        index,
        writes,
        needs,
        field,
    }
}

/// SPEC_CTRL: IBRS, STIBP, SSBD, IPRED_DIS_U/S, RRSBA_DIS_U, BHI_DIS_S.
const SPEC_CTRL_BITS: u64 = 0x5_7f;
/// HWCR: the P0-frequency flag and what firmware sets (as KVM tolerates).
const HWCR_BITS: u64 = 0x0109_1f7f;
const SPEC_FEATURES: &[Feature] = &[
    feature::SPEC_CTRL,
    feature::AMD_IBRS,
    feature::AMD_STIBP,
    feature::AMD_SSBD,
];

/// MSRs that are kept in the state as written, the most frequent first.
#[rustfmt::skip]
pub(super) const STATE: &[Kept] = &[
    kept("IA32_KERNEL_GS_BASE", i::KERNEL_GS_BASE, Writes::Canonical, &[], |m| &mut m.kernel_gs_base),
    kept("IA32_SPEC_CTRL", i::SPEC_CTRL, Writes::Bits(SPEC_CTRL_BITS), SPEC_FEATURES, |m| &mut m.spec_ctrl),
    kept("IA32_SYSENTER_CS", i::SYSENTER_CS, Writes::Anything, &[], |m| &mut m.sysenter_cs),
    kept("IA32_SYSENTER_ESP", i::SYSENTER_ESP, Writes::Canonical, &[], |m| &mut m.sysenter_esp),
    kept("IA32_SYSENTER_EIP", i::SYSENTER_EIP, Writes::Canonical, &[], |m| &mut m.sysenter_eip),
    kept("IA32_STAR", i::STAR, Writes::Anything, &[], |m| &mut m.star),
    kept("IA32_LSTAR", i::LSTAR, Writes::Canonical, &[], |m| &mut m.lstar),
    kept("IA32_CSTAR", i::CSTAR, Writes::Canonical, &[], |m| &mut m.cstar),
    kept("IA32_FMASK", i::SFMASK, Writes::Bits(0xffff_ffff), &[], |m| &mut m.sfmask),
    kept("IA32_TSC_AUX", i::TSC_AUX, Writes::Bits(0xffff_ffff), &[feature::RDTSCP, feature::RDPID], |m| &mut m.tsc_aux),
    kept("IA32_PAT", i::PAT, Writes::PatTypes, &[], |m| &mut m.pat),
    kept("IA32_MTRR_DEF_TYPE", i::MTRR_DEF_TYPE, Writes::MtrrDefType, &[], |m| &mut m.mtrr_def_type),
    kept("IA32_MISC_ENABLE", i::MISC_ENABLE, Writes::Anything, &[], |m| &mut m.misc_enable),
    kept("IA32_DEBUGCTL", i::DEBUGCTL, Writes::Bits(3), &[], |m| &mut m.debugctl),
    kept("LASTBRANCHFROMIP", i::LAST_BRANCH_FROM, Writes::HostOnly, &[], |m| &mut m.last_branch_from),
    kept("LASTBRANCHTOIP", i::LAST_BRANCH_TO, Writes::HostOnly, &[], |m| &mut m.last_branch_to),
    kept("LASTINTFROMIP", i::LAST_INT_FROM, Writes::HostOnly, &[], |m| &mut m.last_int_from),
    kept("LASTINTTOIP", i::LAST_INT_TO, Writes::HostOnly, &[], |m| &mut m.last_int_to),
    kept("IA32_FEATURE_CONTROL", i::FEATURE_CONTROL, Writes::Lock, &[], |m| &mut m.feature_control),
    kept("IA32_BIOS_SIGN_ID", i::UCODE_REV, Writes::HostElseDropped, &[], |m| &mut m.ucode_rev),
    kept("MSR_PLATFORM_INFO", i::PLATFORM_INFO, Writes::HostOnly, &[], |m| &mut m.platform_info),
    kept("MSR_POWER_CTL", i::POWER_CTL, Writes::Anything, &[], |m| &mut m.power_ctl),
    kept("IA32_PERF_CAPABILITIES", i::PERF_CAPABILITIES, Writes::Bits(0), &[feature::PDCM], |m| &mut m.perf_capabilities),
    kept("IA32_UMWAIT_CONTROL", i::UMWAIT_CONTROL, Writes::Bits(0xffff_fffd), &[feature::WAITPKG], |m| &mut m.umwait_control),
    kept("IA32_ARCH_CAPABILITIES", i::ARCH_CAPABILITIES, Writes::HostOnly, &[feature::ARCH_CAPABILITIES], |m| &mut m.arch_capabilities),
    kept("IA32_XSS", i::XSS, Writes::Bits(0), &[feature::XSAVES], |m| &mut m.xss),
    kept("HWCR", i::HWCR, Writes::Bits(HWCR_BITS), &[], |m| &mut m.hwcr),
    kept("VIRT_SPEC_CTRL", i::VIRT_SPEC_CTRL, Writes::Bits(4), &[feature::VIRT_SSBD], |m| &mut m.virt_spec_ctrl),
];

/// MSRs that read as a constant and drop writes: number, name, value.
pub(super) const CONSTANT: &[(u32, &str, u64)] = &[
    (0x17, "IA32_PLATFORM_ID", 0),
    (0x2a, "EBL_CR_POWERON", 0),
    (0x2c, "EBC_FREQUENCY_ID", 1 << 24), // 100 MHz bus
    (0x79, "IA32_BIOS_UPDT_TRIG", 0),
    (0xc1, "IA32_PMC0", 0),
    (0xc2, "IA32_PMC1", 0),
    (0xcd, "MSR_FSB_FREQ", 3),
    (0x11e, "BBL_CR_CTL3", 0xbe70_2111), // L2 present
    (0x186, "IA32_PERFEVTSEL0", 0),
    (0x187, "IA32_PERFEVTSEL1", 0),
    (0x198, "IA32_PERF_STATUS", 1000 | 4 << 40),
    (0x199, "IA32_PERF_CTL", 0),
    (0x606, "MSR_RAPL_POWER_UNIT", 0),
    (0x611, "MSR_PKG_ENERGY_STATUS", 0),
    (0x619, "MSR_DRAM_ENERGY_STATUS", 0),
    (0x639, "MSR_PP0_ENERGY_STATUS", 0),
    (0x641, "MSR_PP1_ENERGY_STATUS", 0),
    (0xc001_0000, "PerfEvtSel0", 0),
    (0xc001_0001, "PerfEvtSel1", 0),
    (0xc001_0002, "PerfEvtSel2", 0),
    (0xc001_0003, "PerfEvtSel3", 0),
    (0xc001_0004, "PerfCtr0", 0),
    (0xc001_0005, "PerfCtr1", 0),
    (0xc001_0006, "PerfCtr2", 0),
    (0xc001_0007, "PerfCtr3", 0),
    (0xc001_0010, "SYSCFG", 0),
    (0xc001_001f, "NB_CFG", 0),
    (0xc001_0020, "PATCH_LOADER", 0),
    (0xc001_0055, "INT_PENDING_MSG", 0),
    (0xc001_0058, "MMIO_CONF_BASE", 0),
    (0xc001_0112, "TSEG_ADDR", 0),
    (0xc001_0113, "TSEG_MASK", 0),
    (i::VM_CR, "VM_CR", 1 << 4), // SVM disabled by firmware
    (0xc001_0117, "VM_HSAVE_PA", 0),
    (0xc001_1022, "DC_CFG", 0),
    (0xc001_1023, "TW_CFG", 0),
    (i::DE_CFG, "DE_CFG", 2), // LFENCE is serialising
    (0xc001_102a, "BU_CFG2", 0),
    (0xc001_102c, "EX_CFG", 0),
];

/// MSRs with behaviour: name, number, what may be written, whether it is saved, the flags one of which a
/// guest needs.
type Other = (&'static str, u32, Writes, bool, &'static [Feature]);
#[rustfmt::skip]
const OTHERS: &[Other] = &[
    ("IA32_TIME_STAMP_COUNTER", i::TSC, Writes::Anything, true, &[]),
    ("IA32_TSC_ADJUST", i::TSC_ADJUST, Writes::Anything, true, &[]),
    ("IA32_PRED_CMD", i::PRED_CMD, Writes::Rules, false, &[feature::SPEC_CTRL, feature::AMD_IBPB]),
    ("IA32_SMBASE", i::SMBASE, Writes::HostOnly, true, &[]),
    ("IA32_MTRRCAP", i::MTRR_CAP, Writes::Nothing, false, &[]),
    ("IA32_FLUSH_CMD", i::FLUSH_CMD, Writes::Rules, false, &[feature::FLUSH_L1D]),
    ("IA32_EFER", i::EFER, Writes::Rules, true, &[]),
    ("IA32_FS_BASE", i::FS_BASE, Writes::Canonical, true, &[]),
    ("IA32_GS_BASE", i::GS_BASE, Writes::Canonical, true, &[]),
];

/// Eight variable ranges, fixed ranges, write-combining (SDM Vol. 3, 12.11.1).
pub(super) const MTRR_CAP_VALUE: u64 = 0x508;

/// IA32_ARCH_CAPABILITIES: what the processor does not suffer from, since it does not speculate:
/// RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO,
/// FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO.
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27;

/// KVM_GET_MSR_FEATURE_INDEX_LIST: MSRs that tell of the processor, with their values.
pub const FEATURES: &[(u32, u64)] = &[
    (i::UCODE_REV, 0x1_0000_0000),
    (i::ARCH_CAPABILITIES, ARCH_CAPABILITIES),
    (i::PERF_CAPABILITIES, 0),
    (i::DE_CFG, 2),
];

const MTRR_FIXED_NAMES: [&str; MTRR_FIXED.len()] = [
    "IA32_MTRR_FIX64K_00000",
    "IA32_MTRR_FIX16K_80000",
    "IA32_MTRR_FIX16K_A0000",
    "IA32_MTRR_FIX4K_C0000",
    "IA32_MTRR_FIX4K_C8000",
    "IA32_MTRR_FIX4K_D0000",
    "IA32_MTRR_FIX4K_D8000",
    "IA32_MTRR_FIX4K_E0000",
    "IA32_MTRR_FIX4K_E8000",
    "IA32_MTRR_FIX4K_F0000",
    "IA32_MTRR_FIX4K_F8000",
];

/// One MSR, or MSRs of one kind with numbers that follow each other.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its name, of the first if there are several.
    pub name: &'static str,
    /// Its number, or the first.
    pub first: u32,
    /// The last.
    pub last: u32,
    /// What may be written.
    pub writes: Writes,
    /// What it reads as after RESET, where that is a number.
    pub reset: Option<u64>,
    /// A guest has it if its CPUID has any of these flags (none: always).
    pub needs: &'static [Feature],
    /// It is in KVM_GET_MSR_INDEX_LIST.
    pub saved: bool,
}

/// Every MSR the processor keeps, by number.
pub fn rows() -> Vec<Row> {
    let mut msrs = Msrs::default();
    let mut list = Vec::new();
    let mut add = |name, first, last, writes, reset, needs, saved| {
        list.push(Row {
            name,
            first,
            last,
            writes,
            reset,
            needs,
            saved,
        });
    };
    for k in STATE {
        let reset = Some(*(k.field)(&mut msrs));
        add(k.name, k.index, k.index, k.writes, reset, k.needs, true);
    }
    for (index, name, value) in CONSTANT {
        add(
            name,
            *index,
            *index,
            Writes::Dropped,
            Some(*value),
            &[],
            false,
        );
    }
    for (name, index, writes, saved, needs) in OTHERS {
        add(name, *index, *index, *writes, None, needs, *saved);
    }
    let (first, last) = MTRR_VAR.into_inner();
    let range = Writes::MtrrRange;
    add(
        "IA32_MTRR_PHYSBASE0",
        first,
        last,
        range,
        Some(0),
        &[],
        true,
    );
    for (name, index) in MTRR_FIXED_NAMES.into_iter().zip(MTRR_FIXED) {
        add(name, index, index, Writes::MtrrTypes, Some(0), &[], true);
    }
    list.sort_by_key(|row| row.first);
    list
}

pub(super) fn is_mtrr_type(t: u8) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6)
}

impl Writes {
    pub(super) fn check(self, value: u64, la57: bool) -> Result<(), Refused> {
        let good = match self {
            Self::Bits(bits) => value & !bits == 0,
            Self::Lock => value & !1 == 0,
            Self::Canonical => is_canonical(value, la57),
            Self::PatTypes => value
                .to_le_bytes()
                .iter()
                .all(|t| is_mtrr_type(*t) || *t == 7),
            Self::MtrrTypes => value.to_le_bytes().iter().all(|t| is_mtrr_type(*t)),
            Self::MtrrDefType => value & !0xcff == 0 && is_mtrr_type(value as u8),
            _ => true,
        };
        if good { Ok(()) } else { Err(Refused) }
    }
}

impl Kept {
    pub(super) fn exists(&self, cpuid: &CpuidTable, access: Access) -> bool {
        access == Access::Host || self.needs.is_empty() || self.needs.iter().any(|f| cpuid.has(*f))
    }
}
