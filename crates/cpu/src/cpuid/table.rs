//! The feature flags of CPUID this crate knows: where each is, when a guest is offered it, and which
//! instructions it governs (SDM Vol. 2, CPUID; APM Vol. 3, appendices D and E). KVM_GET_SUPPORTED_CPUID,
//! the instructions that are #UD, `docs/processor.md` and the test of each flag follow from it.

use std::sync::OnceLock;

use iced_x86::{CpuidFeature, Instruction, Mnemonic};

use super::{Feature, Register};

/// When a flag is offered (in KVM_GET_SUPPORTED_CPUID).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// On any host: done in software.
    Always,
    /// If the host's processor has it.
    Host,
    /// If the host's processor has it and its system has enabled YMM state.
    HostYmm,
    /// If the host's processor has it, and AVX-512 with opmask registers of 64 bits, and its system has
    /// enabled their state.
    HostZmm,
    /// With an Intel vendor string, on any such host.
    Intel,
    /// With an AMD vendor string, on any such host.
    Amd,
    /// Not offered; obeyed if the owner sets it.
    Owner,
    /// Not offered; follows a control register.
    State,
}

/// A flag.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// Where it is.
    pub feature: Feature,
    /// When it is offered.
    pub source: Source,
    /// The instructions that exist only with it.
    pub gates: &'static [CpuidFeature],
    /// What it says.
    pub about: &'static str,
}

macro_rules! features {
    ($($name:ident: $leaf:literal, $index:literal, $register:ident, $bit:literal,
       $source:ident, [$($gate:ident),*], $about:literal;)*) => {
        /// Each flag by its name.
        #[allow(missing_docs)]
        pub mod feature {
            use super::{Feature, Register};
            $(pub const $name: Feature = Feature($leaf, $index, Register::$register, $bit);)*
        }

        /// All flags, by leaf.
        pub const FLAGS: &[Row] = &[$(Row {
            name: stringify!($name),
            feature: feature::$name,
            source: Source::$source,
            gates: &[$(CpuidFeature::$gate),*],
            about: $about,
        }),*];
    };
}

features! {
    SSE3: 1, 0, Ecx, 0, Host, [SSE3], "SSE3 instructions";
    PCLMULQDQ: 1, 0, Ecx, 1, Host, [PCLMULQDQ], "carry-less multiplication";
    MWAIT: 1, 0, Ecx, 3, Owner, [], "MONITOR and MWAIT, which do nothing (KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)";
    SSSE3: 1, 0, Ecx, 9, Host, [SSSE3], "SSSE3 instructions";
    FMA: 1, 0, Ecx, 12, HostYmm, [FMA], "fused multiply-add";
    CX16: 1, 0, Ecx, 13, Host, [CMPXCHG16B], "CMPXCHG16B";
    PDCM: 1, 0, Ecx, 15, Owner, [], "IA32_PERF_CAPABILITIES, which is 0";
    PCID: 1, 0, Ecx, 17, Always, [], "process-context identifiers";
    SSE4_1: 1, 0, Ecx, 19, Host, [SSE4_1], "SSE4.1 instructions";
    SSE4_2: 1, 0, Ecx, 20, Host, [SSE4_2], "SSE4.2 instructions";
    X2APIC: 1, 0, Ecx, 21, Always, [], "x2APIC mode of the local APIC";
    MOVBE: 1, 0, Ecx, 22, Host, [MOVBE], "MOVBE";
    POPCNT: 1, 0, Ecx, 23, Host, [POPCNT], "POPCNT";
    TSC_DEADLINE: 1, 0, Ecx, 24, Owner, [], "APIC timer by TSC deadline: for who has the APIC in KVM (KVM API, 4.46)";
    AES: 1, 0, Ecx, 25, Host, [AES], "AES instructions";
    XSAVE: 1, 0, Ecx, 26, Always, [XSAVE], "XSAVE, XRSTOR, XSETBV, XGETBV";
    OSXSAVE: 1, 0, Ecx, 27, State, [], "CR4.OSXSAVE";
    AVX: 1, 0, Ecx, 28, HostYmm, [AVX], "AVX instructions";
    F16C: 1, 0, Ecx, 29, HostYmm, [F16C], "half-precision conversions";
    RDRAND: 1, 0, Ecx, 30, Host, [RDRAND], "RDRAND";
    HYPERVISOR: 1, 0, Ecx, 31, Always, [], "the processor is virtual";
    FPU: 1, 0, Edx, 0, Always, [FPU, FPU287, FPU387], "x87";
    VME: 1, 0, Edx, 1, Always, [], "virtual-8086 mode extensions, protected-mode virtual interrupts";
    DE: 1, 0, Edx, 2, Always, [], "I/O breakpoints; DR4 and DR5 are #UD with CR4.DE";
    PSE: 1, 0, Edx, 3, Always, [], "4 MiB pages";
    TSC: 1, 0, Edx, 4, Always, [TSC], "RDTSC and its restriction to CPL 0";
    MSR: 1, 0, Edx, 5, Always, [MSR], "RDMSR and WRMSR";
    PAE: 1, 0, Edx, 6, Always, [], "PAE paging";
    MCE: 1, 0, Edx, 7, Always, [], "machine-check exception and CR4.MCE";
    CX8: 1, 0, Edx, 8, Always, [CX8], "CMPXCHG8B";
    APIC: 1, 0, Edx, 9, Always, [], "local APIC (follows IA32_APIC_BASE.EN)";
    SEP: 1, 0, Edx, 11, Always, [SEP], "SYSENTER and SYSEXIT";
    MTRR: 1, 0, Edx, 12, Always, [], "memory-type range registers";
    PGE: 1, 0, Edx, 13, Always, [], "global pages";
    MCA: 1, 0, Edx, 14, Always, [], "machine-check architecture";
    CMOV: 1, 0, Edx, 15, Always, [CMOV], "conditional moves";
    PAT: 1, 0, Edx, 16, Always, [], "page attribute table";
    PSE36: 1, 0, Edx, 17, Always, [], "4 MiB pages above 4 GiB";
    CLFSH: 1, 0, Edx, 19, Always, [CLFSH], "CLFLUSH";
    MMX: 1, 0, Edx, 23, Always, [MMX], "MMX instructions";
    FXSR: 1, 0, Edx, 24, Always, [FXSR], "FXSAVE and FXRSTOR";
    SSE: 1, 0, Edx, 25, Always, [SSE], "SSE instructions";
    SSE2: 1, 0, Edx, 26, Always, [SSE2], "SSE2 instructions";
    ARAT: 6, 0, Eax, 2, Always, [], "the APIC timer never stops";
    FSGSBASE: 7, 0, Ebx, 0, Always, [FSGSBASE], "RDFSBASE and its kin, with CR4.FSGSBASE";
    TSC_ADJUST: 7, 0, Ebx, 1, Always, [], "IA32_TSC_ADJUST";
    BMI1: 7, 0, Ebx, 3, Host, [BMI1], "bit manipulation, first group";
    AVX2: 7, 0, Ebx, 5, HostYmm, [AVX2], "AVX2 instructions";
    SMEP: 7, 0, Ebx, 7, Always, [], "supervisor-mode execution prevention";
    BMI2: 7, 0, Ebx, 8, Host, [BMI2], "bit manipulation, second group";
    ERMS: 7, 0, Ebx, 9, Host, [], "REP MOVSB and STOSB are fast";
    INVPCID: 7, 0, Ebx, 10, Always, [INVPCID], "INVPCID";
    AVX512F: 7, 0, Ebx, 16, HostZmm, [AVX512F], "AVX-512 foundation";
    AVX512DQ: 7, 0, Ebx, 17, HostZmm, [AVX512DQ], "AVX-512 doublewords and quadwords";
    RDSEED: 7, 0, Ebx, 18, Host, [RDSEED], "RDSEED";
    ADX: 7, 0, Ebx, 19, Host, [ADX], "ADCX and ADOX";
    SMAP: 7, 0, Ebx, 20, Always, [SMAP], "supervisor-mode access prevention, CLAC and STAC";
    AVX512_IFMA: 7, 0, Ebx, 21, HostZmm, [AVX512_IFMA], "AVX-512 integer fused multiply-add";
    CLFLUSHOPT: 7, 0, Ebx, 23, Always, [CLFLUSHOPT], "CLFLUSHOPT";
    CLWB: 7, 0, Ebx, 24, Always, [CLWB], "CLWB";
    AVX512CD: 7, 0, Ebx, 28, HostZmm, [AVX512CD], "AVX-512 conflict detection";
    SHA: 7, 0, Ebx, 29, Host, [SHA], "SHA instructions";
    AVX512BW: 7, 0, Ebx, 30, HostZmm, [AVX512BW], "AVX-512 bytes and words";
    AVX512VL: 7, 0, Ebx, 31, HostZmm, [AVX512VL], "AVX-512 on XMM and YMM registers";
    AVX512_VBMI: 7, 0, Ecx, 1, HostZmm, [AVX512_VBMI], "AVX-512 byte permutations";
    UMIP: 7, 0, Ecx, 2, Always, [], "user-mode instruction prevention";
    PKU: 7, 0, Ecx, 3, Always, [PKU], "protection keys for user pages (KVM_GET_SUPPORTED_CPUID: where the host has PKRU)";
    OSPKE: 7, 0, Ecx, 4, State, [], "CR4.PKE";
    WAITPKG: 7, 0, Ecx, 5, Owner, [], "IA32_UMWAIT_CONTROL exists; the instructions are #UD all the same";
    AVX512_VBMI2: 7, 0, Ecx, 6, HostZmm, [AVX512_VBMI2], "AVX-512 byte and word compression, double shifts";
    GFNI: 7, 0, Ecx, 8, Host, [GFNI], "Galois-field instructions";
    VAES: 7, 0, Ecx, 9, HostYmm, [VAES], "AES instructions on YMM registers";
    VPCLMULQDQ: 7, 0, Ecx, 10, HostYmm, [VPCLMULQDQ], "carry-less multiplication on YMM registers";
    AVX512_VNNI: 7, 0, Ecx, 11, HostZmm, [AVX512_VNNI], "AVX-512 dot products";
    AVX512_BITALG: 7, 0, Ecx, 12, HostZmm, [AVX512_BITALG], "AVX-512 bit counts of bytes and words";
    AVX512_VPOPCNTDQ: 7, 0, Ecx, 14, HostZmm, [AVX512_VPOPCNTDQ], "AVX-512 bit counts";
    LA57: 7, 0, Ecx, 16, Always, [], "57-bit linear addresses, 5-level paging";
    RDPID: 7, 0, Ecx, 22, Always, [RDPID], "RDPID";
    CLDEMOTE: 7, 0, Ecx, 25, Always, [], "CLDEMOTE (without the flag its opcode is a NOP)";
    MOVDIRI: 7, 0, Ecx, 27, Always, [MOVDIRI], "MOVDIRI";
    FSRM: 7, 0, Edx, 4, Host, [], "short REP MOVSB is fast";
    SERIALIZE: 7, 0, Edx, 14, Always, [SERIALIZE], "SERIALIZE";
    SPEC_CTRL: 7, 0, Edx, 26, Intel, [], "IA32_SPEC_CTRL.IBRS and IA32_PRED_CMD; nothing speculates";
    STIBP: 7, 0, Edx, 27, Owner, [], "IA32_SPEC_CTRL.STIBP";
    FLUSH_L1D: 7, 0, Edx, 28, Owner, [], "IA32_FLUSH_CMD";
    ARCH_CAPABILITIES: 7, 0, Edx, 29, Always, [], "IA32_ARCH_CAPABILITIES";
    SSBD: 7, 0, Edx, 31, Owner, [], "IA32_SPEC_CTRL.SSBD";
    AVX_VNNI: 7, 1, Eax, 4, HostYmm, [AVX_VNNI], "VEX-encoded dot products";
    AVX512_BF16: 7, 1, Eax, 5, HostZmm, [AVX512_BF16], "AVX-512 conversions to bfloat16";
    FZRM: 7, 1, Eax, 10, Host, [], "REP MOVSB of no bytes is fast";
    FSRS: 7, 1, Eax, 11, Host, [], "short REP STOSB is fast";
    FSRC: 7, 1, Eax, 12, Host, [], "short REP CMPSB and SCASB are fast";
    XSAVEOPT: 0xd, 1, Eax, 0, Always, [XSAVEOPT], "XSAVEOPT";
    XSAVEC: 0xd, 1, Eax, 1, Always, [XSAVEC], "XSAVEC and compacted XRSTOR";
    XGETBV1: 0xd, 1, Eax, 2, Always, [], "XGETBV with ECX 1";
    XSAVES: 0xd, 1, Eax, 3, Owner, [XSAVES], "XSAVES, XRSTORS and IA32_XSS, which has no bits";
    LAHF_SAHF: 0x8000_0001, 0, Ecx, 0, Always, [], "LAHF and SAHF in 64-bit mode";
    CMP_LEGACY: 0x8000_0001, 0, Ecx, 1, Host, [], "a package with HTT has cores, not threads";
    LZCNT: 0x8000_0001, 0, Ecx, 5, Host, [LZCNT], "LZCNT";
    SSE4A: 0x8000_0001, 0, Ecx, 6, Host, [SSE4A], "SSE4A instructions";
    PREFETCHW: 0x8000_0001, 0, Ecx, 8, Always, [], "PREFETCHW (without the flag its opcode is a NOP)";
    SYSCALL: 0x8000_0001, 0, Edx, 11, Always, [SYSCALL], "SYSCALL and SYSRET";
    NX: 0x8000_0001, 0, Edx, 20, Always, [], "no-execute pages";
    MMXEXT: 0x8000_0001, 0, Edx, 22, Amd, [], "the integer part of SSE on MMX registers";
    FFXSR: 0x8000_0001, 0, Edx, 25, Owner, [], "EFER.FFXSR";
    PAGE1GB: 0x8000_0001, 0, Edx, 26, Always, [], "1 GiB pages";
    RDTSCP: 0x8000_0001, 0, Edx, 27, Always, [RDTSCP], "RDTSCP and IA32_TSC_AUX";
    LM: 0x8000_0001, 0, Edx, 29, Always, [X64], "long mode";
    INVARIANT_TSC: 0x8000_0007, 0, Edx, 8, Host, [], "the TSC runs at one rate";
    WBNOINVD: 0x8000_0008, 0, Ebx, 9, Amd, [], "WBNOINVD (without the flag its opcode is WBINVD)";
    AMD_IBPB: 0x8000_0008, 0, Ebx, 12, Owner, [], "IA32_PRED_CMD";
    AMD_IBRS: 0x8000_0008, 0, Ebx, 14, Amd, [], "IA32_SPEC_CTRL.IBRS; nothing speculates";
    AMD_STIBP: 0x8000_0008, 0, Ebx, 15, Owner, [], "IA32_SPEC_CTRL.STIBP";
    AMD_SSBD: 0x8000_0008, 0, Ebx, 24, Owner, [], "IA32_SPEC_CTRL.SSBD";
    VIRT_SSBD: 0x8000_0008, 0, Ebx, 25, Owner, [], "VIRT_SPEC_CTRL";
    SSB_NO: 0x8000_0008, 0, Ebx, 26, Amd, [], "no speculative store bypass";
    BTC_NO: 0x8000_0008, 0, Ebx, 29, Amd, [], "no branch type confusion";
    NO_NESTED_DATA_BP: 0x8000_0021, 0, Eax, 0, Amd, [], "data breakpoints are not nested";
    LFENCE_SERIALISING: 0x8000_0021, 0, Eax, 2, Amd, [], "LFENCE serialises";
    NULL_SELECTOR_CLEARS_BASE: 0x8000_0021, 0, Eax, 6, Amd, [], "a null selector clears the base";
    AUTOIBRS: 0x8000_0021, 0, Eax, 8, Amd, [], "EFER.AIBRSE";
    SRSO_NO: 0x8000_0021, 0, Eax, 29, Amd, [], "no speculative return-stack overflow";
    TSA_SQ_NO: 0x8000_0021, 0, Ecx, 1, Amd, [], "no transient scheduler attack by the store queue";
    TSA_L1_NO: 0x8000_0021, 0, Ecx, 2, Amd, [], "no transient scheduler attack by the L1 cache";
}

/// Instructions that exist on every processor with long mode, whether a flag tells of them or not; and
/// those whose opcode without their extension is something else that executes: NOP (ENDBR, CLDEMOTE,
/// PREFETCH of all kinds), WBINVD (WBNOINVD). MONITOR and MWAIT: see [`feature::MWAIT`].
pub const WITHOUT_FLAG: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::CPUID,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::RDPMC,
    CpuidFeature::SMM,
    CpuidFeature::MONITOR,
    CpuidFeature::CET_IBT,
    CpuidFeature::CLDEMOTE,
    CpuidFeature::PREFETCHITI,
    CpuidFeature::PREFETCHW,
    CpuidFeature::PREFETCHWT1,
    CpuidFeature::WBNOINVD,
];

/// What decides besides a flag's own bit.
struct Host {
    intel: bool,
    ymm: bool,
    zmm: bool,
}

impl Host {
    fn new() -> Self {
        Self {
            intel: super::supported::host(0, 0).ebx == 0x756e_6547,
            ymm: std::is_x86_feature_detected!("avx"),
            zmm: std::is_x86_feature_detected!("avx512f")
                && std::is_x86_feature_detected!("avx512bw"),
        }
    }

    /// Whether a flag could be offered.
    fn has(&self, row: &Row) -> bool {
        let bit = || super::supported::host_flag(row.feature);
        match row.source {
            Source::Always => true,
            Source::Host => bit(),
            Source::HostYmm => self.ymm && bit(),
            Source::HostZmm => self.zmm && bit(),
            Source::Intel => self.intel,
            Source::Amd => !self.intel,
            Source::Owner => true,
            Source::State => false,
        }
    }

    fn offers(&self, row: &Row) -> bool {
        row.source != Source::Owner && self.has(row)
    }
}

/// The flags that a guest of this host is offered.
pub fn offered() -> &'static [Row] {
    static ROWS: OnceLock<Vec<Row>> = OnceLock::new();
    ROWS.get_or_init(|| {
        let host = Host::new();
        let rows = FLAGS.iter().filter(|row| host.offers(row));
        rows.copied().collect()
    })
}

/// The offered flags of one register.
pub(super) fn offered_bits(function: u32, index: u32, register: Register) -> u32 {
    offered()
        .iter()
        .map(|row| row.feature)
        .filter(|f| (f.0, f.1, f.2) == (function, index, register))
        .fold(0, |bits, f| bits | 1 << f.3)
}

/// More than there are instruction features.
const FEATURES: usize = 256;

/// Whether instructions of an extension execute on this host: those of a flag that it could have offered.
/// Those of a flag that the owner may set look at the guest's CPUID themselves, those on vector registers
/// at XCR0.
pub fn has_instructions(of: CpuidFeature) -> bool {
    static KNOWN: OnceLock<[bool; FEATURES]> = OnceLock::new();
    let known = KNOWN.get_or_init(|| {
        let mut known = [false; FEATURES];
        let host = Host::new();
        let rows = FLAGS.iter().filter(|row| host.has(row));
        for feature in rows.flat_map(|row| row.gates).chain(WITHOUT_FLAG) {
            known[*feature as usize] = true;
        }
        known
    });
    known.get(of as usize).is_some_and(|k| *k)
}

/// Whether an instruction executes on this host; if not, it is #UD. VMCALL and VMMCALL are KVM's
/// hypercalls, and RDSSP without shadow stacks is a NOP (SDM Vol. 2, RDSSPD).
pub fn executes(raw: &Instruction) -> bool {
    use Mnemonic::{Rdsspd, Rdsspq, Vmcall, Vmmcall};
    matches!(raw.mnemonic(), Vmcall | Vmmcall | Rdsspd | Rdsspq)
        || raw.cpuid_features().iter().all(|f| has_instructions(*f))
}
