//! KVM_SET_CPUID, KVM_SET_CPUID2 and KVM_GET_CPUID2 (KVM API, sections 4.20 and 4.42): the CPUID a
//! vCPU was given, and what KVM itself derives from it: physical-address width, the XCR0 bits that may
//! be set, which paravirtual features the guest may use. Also KVM's own leaves
//! (`Documentation/virt/kvm/x86/cpuid.rst`).

use std::sync::OnceLock;

use anykvm_abi::{
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_FEATURE_PV_SEND_IPI, KVM_FEATURE_PV_UNHALT,
    kvm_cpuid_entry2,
};
use anykvm_cpu::CpuState;
use anykvm_cpu::cpuid::{Around, CpuidEntry, CpuidTable, compacted_size, components, xsave_size};

use crate::error::{Errno, Result};
use crate::paravirt_table::offered;

/// KVM_MAX_CPUID_ENTRIES: more are E2BIG.
pub(crate) const MAX_ENTRIES: usize = 256;

/// First leaf of KVM's signature and features, unless another hypervisor's interface comes first.
pub(crate) const KVM_SIGNATURE: u32 = 0x4000_0000;

/// KVM's own leaves, for KVM_GET_SUPPORTED_CPUID.
pub(crate) fn kvm_leaves() -> [kvm_cpuid_entry2; 2] {
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    [
        kvm_cpuid_entry2 {
            function: KVM_SIGNATURE,
            eax: KVM_SIGNATURE + 1,
            ebx: word(b"KVMK"),
            ecx: word(b"VMKV"),
            edx: word(b"M\0\0\0"),
            ..Default::default()
        },
        kvm_cpuid_entry2 {
            function: KVM_SIGNATURE + 1,
            eax: offered(),
            ..Default::default()
        },
    ]
}

/// The XCR0 bit of PKRU.
const PKRU: u32 = 9;
/// Protection keys in leaf 7, ECX.
const PKU: u32 = 1 << 3;

/// KVM_GET_SUPPORTED_CPUID: what the processor implements, and KVM's own leaves. As in Linux, protection keys
/// only where the host has them: QEMU asks the CPUID instruction where PKRU lies in the XSAVE area, and a
/// host without PKRU answers 0, at which a guest would save it. Who gives a guest PKU all the same has it.
pub(crate) fn supported() -> Vec<kvm_cpuid_entry2> {
    let pkru_on_host = components().iter().any(|c| c.bit == PKRU && c.of_host);
    let own = anykvm_cpu::cpuid::supported()
        .into_iter()
        .filter_map(|e| {
            if pkru_on_host {
                Some(e)
            } else {
                without_pku(e)
            }
        })
        .map(|e| kvm_cpuid_entry2 {
            function: e.function,
            index: e.index,
            flags: if e.significant_index {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            padding: [0; 3],
        });
    own.chain(kvm_leaves()).collect()
}

/// A leaf without protection keys, if anything is left of it.
fn without_pku(mut e: CpuidEntry) -> Option<CpuidEntry> {
    match (e.function, e.index) {
        (7, 0) => e.ecx &= !PKU,
        (0xd, 0) => {
            e.eax &= !(1 << PKRU);
            e.ecx = xsave_size(e.eax.into());
            e.ebx = e.ecx;
        }
        (0xd, 1) => e.ebx = compacted_size(host_xcr0() & !(1 << PKRU)),
        (0xd, PKRU) => return None,
        _ => {}
    }
    Some(e)
}

/// Features that need a local APIC in KVM. QEMU leaves them in with `kernel-irqchip=off`, and Linux has no
/// other way to send an IPI once it has chosen the hypercall.
pub(crate) const NEED_APIC: u32 = 1 << KVM_FEATURE_PV_SEND_IPI | NEED_HLT_EXITS;
/// Those that need HLT to be KVM's matter.
pub(crate) const NEED_HLT_EXITS: u32 = 1 << KVM_FEATURE_PV_UNHALT;

/// The CPUID of one vCPU.
#[derive(Clone, Debug)]
pub(crate) struct GuestCpuid {
    entries: Vec<kvm_cpuid_entry2>,
    /// What the processor answers from; until CPUID is set, all that KVM_GET_SUPPORTED_CPUID shows.
    table: CpuidTable,
    is_set: bool,
    features: Option<u32>,
}

impl Default for GuestCpuid {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            table: CpuidTable::new(supported().iter().map(entry).collect()),
            is_set: false,
            features: None,
        }
    }
}

impl GuestCpuid {
    /// What user space gave, checked (`kvm_check_cpuid`). `hidden` are paravirtual features that the guest does
    /// not get to see, whether they were given or not: bits of leaf 40000001H.
    pub fn new(entries: Vec<kvm_cpuid_entry2>, hidden: u32) -> Result<Self> {
        let mut list: Vec<CpuidEntry> = entries.iter().map(entry).collect();
        let mut table = CpuidTable::new(list.clone());
        let feature_leaf = find_feature_leaf(&table);
        if hidden != 0 {
            for e in &mut list {
                if Some(e.function) == feature_leaf {
                    e.eax &= !hidden;
                }
            }
            table = CpuidTable::new(list);
        }
        // The width of linear addresses can only be that of 4- or 5-level paging.
        let linear_bits = table.find(0x8000_0008, 0).map_or(48, |e| e.eax >> 8 & 0xff);
        if !matches!(linear_bits, 0 | 48 | 57) {
            return Err(Errno::EINVAL);
        }
        let features = feature_leaf
            .and_then(|leaf| table.find(leaf, 0))
            .map(|e| e.eax);
        Ok(Self {
            entries,
            table,
            is_set: true,
            features,
        })
    }

    /// What the processor answers from.
    pub fn table(&self) -> &CpuidTable {
        &self.table
    }
    /// Whether user space has set it.
    pub fn is_set(&self) -> bool {
        self.is_set
    }
    /// Whether these are the same entries (which may be set again after the vCPU has run): as they were
    /// set, or as they are read now.
    pub fn same(&self, other: &Self, state: &CpuState, around: Around) -> bool {
        let now = |of: &Self| of.entries_now(state, around);
        self.entries == other.entries || now(self) == now(other)
    }

    /// Whether the guest was told of a paravirtual feature.
    pub fn has_kvm_feature(&self, feature: u32) -> bool {
        self.features.is_some_and(|bits| bits >> feature & 1 != 0)
    }

    /// Address bits beyond MAXPHYADDR.
    pub fn reserved_gpa_bits(&self) -> u64 {
        u64::MAX
            .checked_shl(self.table.phys_bits().into())
            .unwrap_or(0)
    }

    /// XCR0 bits the guest may set: leaf 0xD's, among those there are.
    pub fn supported_xcr0(&self) -> u64 {
        self.table.xcr0_supported() & host_xcr0()
    }

    /// Family, model and stepping as leaf 1 gives them: EDX after RESET and INIT.
    pub fn signature(&self) -> Option<u32> {
        self.table.find(1, 0).map(|e| e.eax)
    }

    /// The entries with the bits that follow the processor's state (`kvm_update_cpuid_runtime`).
    pub fn entries_now(&self, state: &CpuState, around: Around) -> Vec<kvm_cpuid_entry2> {
        self.entries
            .iter()
            .map(|e| {
                let [eax, ebx, ecx, edx] = self.table.cpuid(state, around, e.function, e.index);
                kvm_cpuid_entry2 {
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..*e
                }
            })
            .collect()
    }
}

fn entry(e: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: e.function,
        index: e.index,
        significant_index: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    }
}

/// KVM's feature leaf lies behind the signature, which is at a multiple of 0x100 (other interfaces
/// may come first).
fn find_feature_leaf(table: &CpuidTable) -> Option<u32> {
    let [signature, _] = kvm_leaves();
    let signature = (signature.ebx, signature.ecx, signature.edx);
    let base = (KVM_SIGNATURE..KVM_SIGNATURE + 0x1_0000)
        .step_by(0x100)
        .find(|leaf| {
            table
                .find(*leaf, 0)
                .is_some_and(|e| (e.ebx, e.ecx, e.edx) == signature)
        })?;
    Some(base + 1)
}

/// XCR0 bits this processor has on this host.
pub(crate) fn host_xcr0() -> u64 {
    static BITS: OnceLock<u64> = OnceLock::new();
    *BITS.get_or_init(|| CpuidTable::default().xcr0_supported())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anykvm_abi::KVM_FEATURE_PV_EOI;
    use anykvm_cpu::cpuid::feature;
    use anykvm_cpu::state::cr4;

    fn leaf(function: u32, index: Option<u32>, eax: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index: index.unwrap_or(0),
            flags: index.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn features_are_found_behind_another_interface() {
        let [mut signature, mut features] = kvm_leaves();
        signature.function += 0x100;
        features.function += 0x100;
        features.eax = 1 << KVM_FEATURE_PV_UNHALT;
        let hyperv = leaf(KVM_SIGNATURE, None, 0x4000_0005, 0);
        let list = vec![hyperv, signature, features];
        let cpuid = GuestCpuid::new(list.clone(), NEED_APIC).unwrap();
        assert!(!cpuid.has_kvm_feature(KVM_FEATURE_PV_UNHALT));
        let cpuid = GuestCpuid::new(list, 0).unwrap();
        assert!(cpuid.has_kvm_feature(KVM_FEATURE_PV_UNHALT));
        assert!(!cpuid.has_kvm_feature(KVM_FEATURE_PV_EOI));
    }

    #[test]
    fn index_counts_only_where_it_is_significant() {
        let cpuid = GuestCpuid::new(
            vec![
                leaf(1, None, 0xf00, 1 << 21),
                leaf(7, Some(1), 0, 4),
                leaf(7, Some(0), 0, 8),
            ],
            0,
        )
        .unwrap();
        assert!(cpuid.table().has(feature::X2APIC));
        assert!(cpuid.table().has(feature::PKU) && !cpuid.table().has(feature::UMIP));
        assert_eq!(cpuid.signature(), Some(0xf00));
    }

    #[test]
    fn odd_linear_widths_are_refused() {
        for (bits, good) in [(0, true), (48, true), (57, true), (47, false), (64, false)] {
            let e = leaf(0x8000_0008, None, bits << 8 | 40, 0);
            assert_eq!(GuestCpuid::new(vec![e], 0).is_ok(), good, "{bits}");
        }
    }

    #[test]
    fn runtime_bits_follow_the_state() {
        let cpuid =
            GuestCpuid::new(vec![leaf(1, None, 0, 0), leaf(0xd, Some(0), 7, 0)], 0).unwrap();
        let mut s = CpuState::new();
        s.cr4 = cr4::OSXSAVE;
        s.xcr0 = 7;
        let now = cpuid.entries_now(&s, Around::default());
        assert_eq!((now[0].ecx, now[0].edx, now[1].ebx), (1 << 27, 1 << 9, 832));
    }
}
