//! What CPUID may offer a guest: the host's CPUID limited to what this crate implements, plus what
//! it implements whatever the host has (SDM Vol. 2, CPUID; APM Vol. 3, appendix E).
//!
//! Vector and other user-mode instructions run on the host's own processor, so they need the host's
//! flag. Everything of system mode is done in software. AMX, TSX, SGX, CET, MPX,
//! MONITOR/MWAIT, performance counters and nested virtualisation are not implemented.

use super::{CpuidEntry, xsave_size};
use std::arch::x86_64::__cpuid_count;

/// Where a leaf's flags come from.
struct Flags {
    /// Offered if the host has them.
    host: u32,
    /// Offered on any host.
    always: u32,
}

const fn bits<const N: usize>(list: [u32; N]) -> u32 {
    let mut value = 0;
    let mut i = 0;
    while i < N {
        value |= 1 << list[i];
        i += 1;
    }
    value
}

/// Leaf 1, ECX.
const LEAF1_ECX: Flags = Flags {
    // SSE3 PCLMULQDQ SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE AVX F16C RDRAND
    host: bits([0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]),
    // PCID x2APIC hypervisor; not TSC-deadline, which depends on where the APIC is: KVM has a
    // capability for it instead (KVM API, 4.46), and who creates the APIC in KVM adds the flag.
    always: bits([17, 21, 31]),
};
/// Leaf 1, ECX: flags that need the host's operating system to have enabled YMM state.
const LEAF1_ECX_AVX: u32 = bits([12, 28, 29]);
/// Leaf 1, EDX: FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE-36 CLFSH MMX
/// FXSR SSE SSE2.
const LEAF1_EDX: u32 = bits([
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26,
]);
/// Leaf 7, EBX.
const LEAF7_EBX: Flags = Flags {
    // BMI1 AVX2 FDP_EXCPTN_ONLY BMI2 ERMS ZERO_FCS_FDS RDSEED ADX CLFLUSHOPT CLWB SHA
    host: bits([3, 5, 6, 8, 9, 13, 18, 19, 23, 24, 29]),
    // FSGSBASE TSC_ADJUST SMEP INVPCID SMAP
    always: bits([0, 1, 7, 10, 20]),
};
const LEAF7_EBX_AVX: u32 = bits([5]);
/// Leaf 7, EBX, ECX and sub-leaf 1's EAX: AVX512F and the extensions of it that stubs serve, from the
/// host where its operating system has enabled opmask and ZMM state.
const LEAF7_EBX_AVX512: u32 = bits([16, 17, 21, 28, 30, 31]); // F DQ IFMA CD BW VL
const LEAF7_ECX_AVX512: u32 = bits([1, 6, 11, 12, 14]); // VBMI VBMI2 VNNI BITALG VPOPCNTDQ
const LEAF7_1_EAX_AVX512: u32 = bits([5]); // BF16
/// Leaf 7, sub-leaf 1, EAX: AVX-VNNI, from the host.
const LEAF7_1_EAX_AVX: u32 = bits([4]);
/// Leaf 7, ECX.
const LEAF7_ECX: Flags = Flags {
    // GFNI VAES VPCLMULQDQ
    host: bits([8, 9, 10]),
    // UMIP PKU LA57 RDPID CLDEMOTE MOVDIRI; not MOVDIR64B, whose 64 bytes hosts cannot store as one
    always: bits([2, 3, 16, 22, 25, 27]),
};
const LEAF7_ECX_AVX: u32 = bits([9, 10]);
/// Leaf 7, EDX: fast short REP MOV from the host; SERIALIZE and IA32_ARCH_CAPABILITIES always.
const LEAF7_EDX: Flags = Flags {
    host: bits([4]),
    always: bits([14, 29]),
};
/// Leaf 7, EDX on Intel: SPEC_CTRL, which IBRS_ALL in IA32_ARCH_CAPABILITIES goes with.
const LEAF7_EDX_INTEL: u32 = bits([26]);
/// Leaf 0xD.1, EAX: XSAVEOPT XSAVEC XGETBV1.
const XSAVE_FORMS: u32 = bits([0, 1, 2]);
/// Leaf 0x80000001, ECX.
const EXTENDED_ECX: Flags = Flags {
    // LZCNT SSE4A PREFETCHW; not misaligned SSE, since MXCSR has no MM bit here.
    host: bits([5, 6, 8]),
    // LAHF/SAHF
    always: bits([0]),
};
/// Leaf 0x80000001, EDX: SYSCALL NX 1GB-pages RDTSCP LM.
const EXTENDED_EDX: u32 = bits([11, 20, 26, 27, 29]);
/// Leaf 0x80000001, EDX on AMD: leaf 1's flags again, without those that are not there (APM).
const EXTENDED_EDX_AMD: u32 = LEAF1_EDX & 0x0183_f3ff;
/// The same leaf's MMXEXT, from the host.
const EXTENDED_EDX_HOST: u32 = bits([22]);
/// Leaf 0x80000008, EBX: WBNOINVD; IBRS, which IBRS_ALL in IA32_ARCH_CAPABILITIES goes with;
/// speculative store bypass and branch type confusion do not exist
/// in an interpreter.
const ADDRESS_EBX_AMD: u32 = bits([9, 14, 26, 29]);
/// Leaf 0x80000021, EAX: no nested data breakpoints, LFENCE serialises, null selectors clear the
/// base, automatic IBRS, no speculative return-stack overflow.
const EXTENDED2_EAX: u32 = bits([0, 2, 6, 8, 29]);
/// Leaf 0x80000021, ECX: not affected by transient scheduler attacks.
const EXTENDED2_ECX: u32 = bits([1, 2]);
/// XCR0 bit of PKRU, which is done in software.
const PKRU: u32 = 1 << 9;
/// IA32 APIC timer always running (leaf 6, EAX).
const ARAT: u32 = 1 << 2;
/// Invariant TSC (leaf 0x80000007, EDX).
const INVARIANT_TSC: u32 = 1 << 8;

fn host(function: u32, index: u32) -> CpuidEntry {
    // Every host this crate supports has CPUID; leaves beyond the maximum are filtered by callers.
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

fn with_index(entry: CpuidEntry) -> CpuidEntry {
    CpuidEntry {
        significant_index: true,
        ..entry
    }
}

fn limit(value: u32, flags: &Flags) -> u32 {
    value & flags.host | flags.always
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
    list.push(feature_leaf(vectors.avx));
    if intel {
        list.push(CpuidEntry { ..host(2, 0) });
        list.extend(cache_leaves(4, host_max));
    }
    list.push(CpuidEntry {
        eax: ARAT,
        ..CpuidEntry {
            function: 6,
            ..CpuidEntry::default()
        }
    });
    list.extend(structured_leaves(vectors, intel, host_max));
    // No topology: a valid one is told by sub-leaf 1, and only the VMM knows it.
    list.push(with_index(CpuidEntry {
        function: 0xb,
        ..CpuidEntry::default()
    }));
    list.extend(xsave_leaves(vectors));
    list.extend(extended_leaves(intel));
    list
}

fn feature_leaf(avx: bool) -> CpuidEntry {
    let h = host(1, 0);
    let mut ecx = limit(h.ecx, &LEAF1_ECX);
    if !avx {
        ecx &= !LEAF1_ECX_AVX;
    }
    // EBX keeps CLFLUSH's line size; APIC id and processor count are the VMM's to fill in.
    CpuidEntry {
        ebx: h.ebx & 0xff00,
        ecx,
        edx: LEAF1_EDX,
        ..h
    }
}

/// Leaf 7 and its sub-leaf 1, if that has anything to say.
fn structured_leaves(vectors: Vectors, intel: bool, host_max: u32) -> Vec<CpuidEntry> {
    let leaf = |index| CpuidEntry {
        function: 7,
        index,
        ..CpuidEntry::default()
    };
    let h = if host_max >= 7 { host(7, 0) } else { leaf(0) };
    let more = if h.eax >= 1 { host(7, 1) } else { leaf(1) };
    let flags = |host: u32, list: &Flags, avx: u32, avx512: u32| {
        let hidden = if vectors.avx { 0 } else { avx };
        let shown = if vectors.avx512 { host & avx512 } else { 0 };
        limit(host, list) & !hidden | shown
    };
    let mut more_eax = 0;
    if vectors.avx {
        more_eax |= more.eax & LEAF7_1_EAX_AVX;
    }
    if vectors.avx512 {
        more_eax |= more.eax & LEAF7_1_EAX_AVX512;
    }
    let intel_edx = if intel { LEAF7_EDX_INTEL } else { 0 };
    let mut list = vec![with_index(CpuidEntry {
        eax: u32::from(more_eax != 0),
        ebx: flags(h.ebx, &LEAF7_EBX, LEAF7_EBX_AVX, LEAF7_EBX_AVX512),
        ecx: flags(h.ecx, &LEAF7_ECX, LEAF7_ECX_AVX, LEAF7_ECX_AVX512),
        edx: limit(h.edx, &LEAF7_EDX) | intel_edx,
        ..leaf(0)
    })];
    if more_eax != 0 {
        list.push(with_index(CpuidEntry {
            eax: more_eax,
            ..leaf(1)
        }));
    }
    list
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
    if host(1, 0).ecx >> 26 & 1 == 0 {
        return Vec::new();
    }
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
            eax: XSAVE_FORMS,
            ebx: size,
            ..leaf(1)
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
    let h = leaf(0x8000_0001);
    let amd_edx = if intel {
        0
    } else {
        EXTENDED_EDX_AMD | h.edx & EXTENDED_EDX_HOST
    };
    let last = if intel { 0x8000_0008 } else { 0x8000_0021 };
    let mut list = vec![
        CpuidEntry {
            eax: last,
            ..leaf(0x8000_0000)
        },
        CpuidEntry {
            ecx: limit(h.ecx, &EXTENDED_ECX),
            edx: EXTENDED_EDX | amd_edx,
            ..h
        },
    ];
    list.extend((0x8000_0002..=0x8000_0006).map(leaf));
    let power = leaf(0x8000_0007);
    list.push(CpuidEntry {
        eax: 0,
        ebx: 0,
        ecx: 0,
        edx: power.edx & INVARIANT_TSC,
        ..power
    });
    let address = leaf(0x8000_0008);
    // Linear addresses: 57 bits, since the MMU has 5-level paging.
    list.push(CpuidEntry {
        eax: 57 << 8 | (address.eax & 0xff).clamp(36, 52),
        ebx: if intel { 0 } else { ADDRESS_EBX_AMD },
        ecx: 0,
        edx: 0,
        ..address
    });
    if !intel {
        list.push(CpuidEntry {
            function: 0x8000_0021,
            eax: EXTENDED2_EAX,
            ecx: EXTENDED2_ECX,
            ..CpuidEntry::default()
        });
    }
    list
}

#[cfg(test)]
mod tests {
    use super::super::{CpuidTable, feature};
    use super::*;

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
