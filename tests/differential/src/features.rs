//! Which instructions can be compared: those whose extension both processors have, or neither.

use anykvm_cpu::cpuid::{CpuidEntry, CpuidTable, Feature, Register};
use iced_x86::CpuidFeature as F;
use std::arch::x86_64::__cpuid_count;

/// The CPUID flag of an extension (SDM Vol. 2, CPUID; APM Vol. 3, appendix D). `None`: it has no
/// flag, or neither processor has it.
fn flag(f: F) -> Option<Feature> {
    use Register::{Eax, Ebx, Ecx, Edx};
    let (leaf, sub, register, bit) = match f {
        F::SSE3 => (1, 0, Ecx, 0),
        F::PCLMULQDQ => (1, 0, Ecx, 1),
        F::MONITOR => (1, 0, Ecx, 3),
        F::SSSE3 => (1, 0, Ecx, 9),
        F::FMA => (1, 0, Ecx, 12),
        F::CMPXCHG16B => (1, 0, Ecx, 13),
        F::SSE4_1 => (1, 0, Ecx, 19),
        F::SSE4_2 => (1, 0, Ecx, 20),
        F::MOVBE => (1, 0, Ecx, 22),
        F::POPCNT => (1, 0, Ecx, 23),
        F::AES => (1, 0, Ecx, 25),
        F::XSAVE => (1, 0, Ecx, 26),
        F::AVX => (1, 0, Ecx, 28),
        F::F16C => (1, 0, Ecx, 29),
        F::RDRAND => (1, 0, Ecx, 30),
        F::FSGSBASE => (7, 0, Ebx, 0),
        F::BMI1 => (7, 0, Ebx, 3),
        F::HLE => (7, 0, Ebx, 4),
        F::AVX2 => (7, 0, Ebx, 5),
        F::BMI2 => (7, 0, Ebx, 8),
        F::INVPCID => (7, 0, Ebx, 10),
        F::RTM => (7, 0, Ebx, 11),
        F::MPX => (7, 0, Ebx, 14),
        F::AVX512F => (7, 0, Ebx, 16),
        F::AVX512DQ => (7, 0, Ebx, 17),
        F::RDSEED => (7, 0, Ebx, 18),
        F::ADX => (7, 0, Ebx, 19),
        F::SMAP => (7, 0, Ebx, 20),
        F::AVX512_IFMA => (7, 0, Ebx, 21),
        F::CLFLUSHOPT => (7, 0, Ebx, 23),
        F::CLWB => (7, 0, Ebx, 24),
        F::AVX512PF => (7, 0, Ebx, 26),
        F::AVX512ER => (7, 0, Ebx, 27),
        F::AVX512CD => (7, 0, Ebx, 28),
        F::SHA => (7, 0, Ebx, 29),
        F::AVX512BW => (7, 0, Ebx, 30),
        F::AVX512VL => (7, 0, Ebx, 31),
        F::AVX512_VBMI => (7, 0, Ecx, 1),
        F::PKU => (7, 0, Ecx, 3),
        F::WAITPKG => (7, 0, Ecx, 5),
        F::AVX512_VBMI2 => (7, 0, Ecx, 6),
        F::CET_SS => (7, 0, Ecx, 7),
        F::GFNI => (7, 0, Ecx, 8),
        F::VAES => (7, 0, Ecx, 9),
        F::VPCLMULQDQ => (7, 0, Ecx, 10),
        F::AVX512_VNNI => (7, 0, Ecx, 11),
        F::AVX512_BITALG => (7, 0, Ecx, 12),
        F::AVX512_VPOPCNTDQ => (7, 0, Ecx, 14),
        F::RDPID => (7, 0, Ecx, 22),
        F::KL => (7, 0, Ecx, 23),
        F::CLDEMOTE => (7, 0, Ecx, 25),
        F::MOVDIRI => (7, 0, Ecx, 27),
        F::MOVDIR64B => (7, 0, Ecx, 28),
        F::ENQCMD => (7, 0, Ecx, 29),
        F::UINTR => (7, 0, Edx, 5),
        F::AVX512_VP2INTERSECT => (7, 0, Edx, 8),
        F::SERIALIZE => (7, 0, Edx, 14),
        F::TSXLDTRK => (7, 0, Edx, 16),
        F::CET_IBT => (7, 0, Edx, 20),
        F::AMX_BF16 => (7, 0, Edx, 22),
        F::AVX512_FP16 => (7, 0, Edx, 23),
        F::AMX_TILE => (7, 0, Edx, 24),
        F::AMX_INT8 => (7, 0, Edx, 25),
        F::SHA512 => (7, 1, Eax, 0),
        F::SM3 => (7, 1, Eax, 1),
        F::SM4 => (7, 1, Eax, 2),
        F::RAO_INT => (7, 1, Eax, 3),
        F::AVX_VNNI => (7, 1, Eax, 4),
        F::AVX512_BF16 => (7, 1, Eax, 5),
        F::CMPCCXADD => (7, 1, Eax, 7),
        F::AVX_IFMA => (7, 1, Eax, 23),
        F::AVX_VNNI_INT8 => (7, 1, Edx, 4),
        F::AVX_NE_CONVERT => (7, 1, Edx, 5),
        F::AVX_VNNI_INT16 => (7, 1, Edx, 10),
        F::XSAVEOPT => (0xd, 1, Eax, 0),
        F::XSAVEC => (0xd, 1, Eax, 1),
        F::XSAVES => (0xd, 1, Eax, 3),
        F::PTWRITE => (0x14, 0, Ebx, 4),
        F::SVM => (0x8000_0001, 0, Ecx, 2),
        F::LZCNT => (0x8000_0001, 0, Ecx, 5),
        F::SSE4A => (0x8000_0001, 0, Ecx, 6),
        F::XOP => (0x8000_0001, 0, Ecx, 11),
        F::SKINIT => (0x8000_0001, 0, Ecx, 12),
        F::LWP => (0x8000_0001, 0, Ecx, 15),
        F::FMA4 => (0x8000_0001, 0, Ecx, 16),
        F::TBM => (0x8000_0001, 0, Ecx, 21),
        F::MONITORX => (0x8000_0001, 0, Ecx, 29),
        F::RDTSCP => (0x8000_0001, 0, Edx, 27),
        F::CLZERO => (0x8000_0008, 0, Ebx, 0),
        F::INVLPGB => (0x8000_0008, 0, Ebx, 3),
        F::RDPRU => (0x8000_0008, 0, Ebx, 4),
        F::MCOMMIT => (0x8000_0008, 0, Ebx, 8),
        F::WBNOINVD => (0x8000_0008, 0, Ebx, 9),
        _ => return None,
    };
    Some(Feature(leaf, sub, register, bit))
}

/// The CPUID of both processors.
pub struct Features {
    host: CpuidTable,
    guest: CpuidTable,
}

impl Features {
    /// The host's own, and what the guest is offered.
    pub fn new(guest: &CpuidTable) -> Self {
        let leaf = |function, index, significant_index| {
            let r = __cpuid_count(function, index);
            CpuidEntry {
                function,
                index,
                significant_index,
                eax: r.eax,
                ebx: r.ebx,
                ecx: r.ecx,
                edx: r.edx,
            }
        };
        let max = leaf(0, 0, false).eax;
        let extended = leaf(0x8000_0000, 0, false).eax;
        let wanted = [
            (0, 0, false),
            (1, 0, false),
            (7, 0, true),
            (7, 1, true),
            (0xd, 1, true),
            (0x14, 0, true),
            (0x8000_0000, 0, false),
            (0x8000_0001, 0, false),
            (0x8000_0008, 0, false),
        ];
        let known = |f: u32| f <= max || (0x8000_0000..=extended).contains(&f);
        let entries = wanted
            .into_iter()
            .filter(|(f, ..)| known(*f))
            .map(|(f, i, s)| leaf(f, i, s))
            .collect();
        Self {
            host: CpuidTable::new(entries),
            guest: CpuidTable::new(guest.entries().to_vec()),
        }
    }

    /// Whether both processors have an extension (`Some(true)`) or neither (`Some(false)`).
    pub fn agree(&self, f: F) -> Option<bool> {
        match flag(f) {
            None => Some(true),
            Some(flag) => {
                let (host, guest) = (self.host.has(flag), self.guest.has(flag));
                (host == guest).then_some(host)
            }
        }
    }

    /// Whether instructions of these extensions can be compared.
    pub fn comparable(&self, features: &[F]) -> bool {
        features.iter().all(|f| self.agree(*f).is_some())
    }

    /// Whether both processors have all these extensions.
    pub fn present(&self, features: &[F]) -> bool {
        features.iter().all(|f| self.agree(*f) == Some(true))
    }

    /// Whether both processors have them for certain: every x86-64 processor does, or CPUID says so.
    pub fn certain(&self, features: &[F]) -> bool {
        const BASE: &[F] = &[
            F::INTEL8086,
            F::INTEL186,
            F::INTEL286,
            F::INTEL386,
            F::INTEL486,
            F::X64,
            F::CMOV,
            F::CX8,
            F::FPU,
            F::FPU287,
            F::FPU387,
            F::FXSR,
            F::MMX,
            F::MULTIBYTENOP,
            F::PAUSE,
            F::SSE,
            F::SSE2,
            F::CLFSH,
        ];
        self.present(features)
            && features
                .iter()
                .all(|f| flag(*f).is_some() || BASE.contains(f))
    }

    /// Whether the host is AMD's (or Hygon's).
    pub fn host_is_amd(&self) -> bool {
        self.host.is_amd()
    }
}
