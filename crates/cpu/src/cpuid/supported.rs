//! What CPUID may offer a guest: the host's CPUID limited to what this crate implements, plus what
//! it implements whatever the host has (SDM Vol. 2, CPUID; APM Vol. 3, appendix E).
//!
//! Vector and other user-mode instructions run on the host's own processor, so they need the host's
//! flag. Everything of system mode is done in software. AMX, TSX, SGX, CET, MPX,
//! MONITOR/MWAIT, performance counters and nested virtualisation are not implemented.

use super::table::offered_bits;
use super::{CpuidEntry, Feature, Register, xsave_size};
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// XCR0 bit of PKRU, which is done in software.
const PKRU: u32 = 1 << 9;
/// Leaf 0x80000001, EDX on AMD has the flags of leaf 1 again, but for some (APM Vol. 3, appendix E).
pub const REPEATED_EDX: u32 = 0x0183_f3ff;

/// The host's leaf; beyond the maximum of its class it is no leaf, which callers look at.
pub(super) fn host(function: u32, index: u32) -> CpuidEntry {
    let r = __cpuid_count(function, index);
    CpuidEntry {
        function,
        index,
        significant_index: false,
        eax: r.eax,
        ebx: r.ebx,
        ecx: r.ecx,
        edx: r.edx,
    }
}

/// Whether the host has a flag.
pub(super) fn host_flag(feature: Feature) -> bool {
    let Feature(function, index, register, bit) = feature;
    let last = host(function & 0x8000_0000, 0).eax;
    if function > last || function == 7 && index > host(7, 0).eax {
        return false;
    }
    let e = host(function, index);
    let value = match register {
        Register::Eax => e.eax,
        Register::Ebx => e.ebx,
        Register::Ecx => e.ecx,
        Register::Edx => e.edx,
    };
    value >> bit & 1 != 0
}

fn with_index(entry: CpuidEntry) -> CpuidEntry {
    CpuidEntry {
        significant_index: true,
        ..entry
    }
}

/// A leaf that holds nothing but flags.
fn flags(function: u32, index: u32) -> CpuidEntry {
    let bits = |register| offered_bits(function, index, register);
    CpuidEntry {
        function,
        index,
        significant_index: false,
        eax: bits(Register::Eax),
        ebx: bits(Register::Ebx),
        ecx: bits(Register::Ecx),
        edx: bits(Register::Edx),
    }
}

/// Vector registers whose state the host's operating system has enabled.
#[derive(Clone, Copy)]
struct Vectors {
    avx: bool,
    avx512: bool,
}

impl Vectors {
    fn of_host() -> Self {
        use std::arch::is_x86_feature_detected as has;
        Self {
            avx: has!("avx"),
            // Stubs need opmask registers of 64 bits.
            avx512: has!("avx512f") && has!("avx512bw"),
        }
    }
}

/// The entries of KVM_GET_SUPPORTED_CPUID, KVM's own leaves apart.
pub fn supported() -> Vec<CpuidEntry> {
    // CPUID is slow where it is intercepted.
    static ENTRIES: OnceLock<Vec<CpuidEntry>> = OnceLock::new();
    ENTRIES.get_or_init(entries).clone()
}

fn entries() -> Vec<CpuidEntry> {
    let vectors = Vectors::of_host();
    let vendor = host(0, 0);
    let intel = vendor.ebx == 0x756e_6547;
    let host_max = vendor.eax;
    let mut list = Vec::with_capacity(40);
    let last = if intel { 0x1f } else { 0xd };
    list.push(CpuidEntry {
        eax: last,
        ..vendor
    });
    list.push(feature_leaf());
    if intel {
        list.push(CpuidEntry { ..host(2, 0) });
        list.extend(cache_leaves(4, host_max));
    }
    list.push(flags(6, 0));
    list.push(with_index(CpuidEntry {
        eax: 1,
        ..flags(7, 0)
    }));
    list.push(with_index(flags(7, 1)));
    // No topology: a valid one is told by sub-leaf 1, and only the VMM knows it.
    list.push(with_index(CpuidEntry {
        function: 0xb,
        ..CpuidEntry::default()
    }));
    list.extend(xsave_leaves(vectors));
    list.extend(extended_leaves(intel));
    list
}

/// EBX keeps CLFLUSH's line size; APIC id and processor count are the VMM's to fill in.
fn feature_leaf() -> CpuidEntry {
    let h = host(1, 0);
    CpuidEntry {
        eax: h.eax,
        ebx: h.ebx & 0xff00,
        ..flags(1, 0)
    }
}

/// Deterministic cache parameters: sub-leaves up to the first of type 0.
fn cache_leaves(function: u32, host_max: u32) -> Vec<CpuidEntry> {
    if host_max < function {
        return Vec::new();
    }
    let mut list = Vec::new();
    for index in 0..8 {
        let mut e = with_index(host(function, index));
        // Sharing between processors is topology, which is the VMM's.
        e.eax &= 0x3fff;
        let done = e.eax & 0x1f == 0;
        list.push(e);
        if done {
            break;
        }
    }
    list
}

fn xsave_leaves(vectors: Vectors) -> Vec<CpuidEntry> {
    let mut xcr0: u32 = PKRU | 3;
    if vectors.avx {
        xcr0 |= 1 << 2;
    }
    if vectors.avx512 {
        xcr0 |= 7 << 5;
    }
    let size = xsave_size(xcr0.into());
    let leaf = |index| CpuidEntry {
        function: 0xd,
        index,
        significant_index: true,
        ..CpuidEntry::default()
    };
    let mut list = vec![
        CpuidEntry {
            eax: xcr0,
            ebx: size,
            ecx: size,
            ..leaf(0)
        },
        CpuidEntry {
            ebx: size,
            ..with_index(flags(0xd, 1))
        },
    ];
    for c in super::components() {
        if xcr0 >> c.bit & 1 != 0 {
            list.push(CpuidEntry {
                eax: c.size as u32,
                ebx: c.offset as u32,
                ..leaf(c.bit)
            });
        }
    }
    list
}

fn extended_leaves(intel: bool) -> Vec<CpuidEntry> {
    let host_max = host(0x8000_0000, 0).eax;
    let leaf = |function| {
        if function <= host_max {
            host(function, 0)
        } else {
            CpuidEntry {
                function,
                ..CpuidEntry::default()
            }
        }
    };
    let last = if intel { 0x8000_0008 } else { 0x8000_0021 };
    let features = flags(0x8000_0001, 0);
    let repeated = if intel {
        0
    } else {
        offered_bits(1, 0, Register::Edx) & REPEATED_EDX
    };
    let h = leaf(0x8000_0001);
    let mut list = vec![
        CpuidEntry {
            eax: last,
            ..leaf(0x8000_0000)
        },
        CpuidEntry {
            eax: h.eax,
            ebx: h.ebx,
            edx: features.edx | repeated,
            ..features
        },
    ];
    list.extend((0x8000_0002..=0x8000_0006).map(leaf));
    list.push(flags(0x8000_0007, 0));
    let address = leaf(0x8000_0008);
    // Linear addresses: 57 bits, since the MMU has 5-level paging.
    list.push(CpuidEntry {
        eax: 57 << 8 | (address.eax & 0xff).clamp(36, 52),
        ..flags(0x8000_0008, 0)
    });
    if !intel {
        list.push(flags(0x8000_0021, 0));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::super::{CpuidTable, feature};
    use super::*;

    fn bits<const N: usize>(list: [u32; N]) -> u32 {
        list.iter().fold(0, |bits, bit| bits | 1 << bit)
    }

    #[test]
    fn offers_what_is_implemented_and_no_more() {
        let t = CpuidTable::new(supported());
        for f in [
            feature::PCID,
            feature::SMAP,
            feature::LA57,
            feature::NX,
            feature::LM,
            feature::RDTSCP,
            feature::PKU,
        ] {
            assert!(t.has(f), "{f:?}");
        }
        for f in [feature::MWAIT, feature::WAITPKG] {
            assert!(!t.has(f), "{f:?}");
        }
        // TSX, SGX, MPX; AVX-512's PF and ER; FP16, VP2INTERSECT, 4VNNIW, 4FMAPS.
        let leaf7 = t.find(7, 0).copied().unwrap_or_default();
        assert_eq!(leaf7.ebx & bits([2, 4, 11, 14, 26, 27]), 0);
        assert_eq!(leaf7.edx & bits([2, 3, 8, 23]), 0);
        assert_eq!(t.xcr0_supported() & !(0xe7 | 1 << 9), 0);
    }

    #[test]
    fn avx_512_comes_with_its_state() {
        let t = CpuidTable::new(supported());
        let avx512 = std::arch::is_x86_feature_detected!("avx512bw");
        let leaf7 = t.find(7, 0).copied().unwrap_or_default();
        assert_eq!(leaf7.ebx >> 16 & 1 != 0, avx512);
        let state = if avx512 { 7 } else { 0 };
        assert_eq!(t.xcr0_supported() >> 5 & 7, state);
        for bit in 5..8 {
            assert_eq!(t.find(0xd, bit).is_some(), avx512);
        }
        assert_eq!(t.find(7, 1).is_some(), leaf7.eax != 0);
    }

    #[test]
    fn no_leaf_twice() {
        let mut seen: Vec<_> = supported().iter().map(|e| (e.function, e.index)).collect();
        let n = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), n);
    }
}
