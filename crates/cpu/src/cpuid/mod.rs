//! CPUID: the table a processor answers from, how a leaf is found in it, and the bits that follow
//! the processor's state (SDM Vol. 2, CPUID; look-up rules as Linux's `arch/x86/kvm/cpuid.c`).

mod standard_format;
mod supported;
mod table;

pub use standard_format::{Component, components};
pub use supported::{REPEATED_EDX, supported};
pub use table::{FLAGS, Row, Source, WITHOUT_FLAG, executes, feature, has_instructions, offered};

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::exit::Stop;
use crate::machine::Quirk;
use crate::msr::MISC_ENABLE_MWAIT;
use crate::state::{CpuState, cr4, efer, reg};

/// One leaf or sub-leaf (`struct kvm_cpuid_entry2`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// Leaf (EAX on input).
    pub function: u32,
    /// Sub-leaf (ECX on input), where it is significant.
    pub index: u32,
    /// The leaf has sub-leaves.
    pub significant_index: bool,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// A register of CPUID's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A feature flag: leaf, sub-leaf, register, bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature(pub u32, pub u32, pub Register, pub u32);

/// The CPUID of one processor, with what is asked often kept beside it.
#[derive(Clone, Debug)]
pub struct CpuidTable {
    entries: Vec<CpuidEntry>,
    amd: bool,
    phys_bits: u8,
    cr4_reserved: u64,
    efer_valid: u64,
    xcr0_supported: u64,
    smap: bool,
    rdtscp: bool,
    invpcid: bool,
    la57: bool,
}

impl Default for CpuidTable {
    /// Until CPUID is set, the processor has everything this crate implements.
    fn default() -> Self {
        Self::new(supported())
    }
}

/// CR4 bits that exist without a CPUID flag this crate looks at.
const CR4_ALWAYS: u64 = cr4::TSD | cr4::PCE | cr4::OSXMMEXCPT;

/// CR4 bits and the feature each needs.
const CR4_FEATURES: &[(u64, Feature)] = &[
    (cr4::VME | cr4::PVI, feature::VME),
    (cr4::DE, feature::DE),
    (cr4::PSE, feature::PSE),
    (cr4::PAE, feature::PAE),
    (cr4::MCE, feature::MCE),
    (cr4::PGE, feature::PGE),
    (cr4::OSFXSR, feature::FXSR),
    (cr4::UMIP, feature::UMIP),
    (cr4::LA57, feature::LA57),
    (cr4::FSGSBASE, feature::FSGSBASE),
    (cr4::PCIDE, feature::PCID),
    (cr4::OSXSAVE, feature::XSAVE),
    (cr4::SMEP, feature::SMEP),
    (cr4::SMAP, feature::SMAP),
    (cr4::PKE, feature::PKU),
];

/// EFER bits and the feature each needs.
const EFER_FEATURES: &[(u64, Feature)] = &[
    (efer::SCE, feature::SYSCALL),
    (efer::LME | efer::LMA, feature::LM),
    (efer::NX, feature::NX),
    (efer::FFXSR, feature::FFXSR),
    (efer::AUTOIBRS, feature::AUTOIBRS),
];

impl CpuidTable {
    /// A table of entries.
    pub fn new(entries: Vec<CpuidEntry>) -> Self {
        let mut t = Self {
            entries,
            amd: false,
            phys_bits: 36,
            cr4_reserved: 0,
            efer_valid: 0,
            xcr0_supported: 1,
            smap: false,
            rdtscp: false,
            invpcid: false,
            la57: false,
        };
        let of = |t: &Self, table: &[(u64, Feature)]| {
            table
                .iter()
                .filter(|(_, f)| t.has(*f))
                .fold(0, |bits, (b, _)| bits | b)
        };
        t.amd = t.find(0, 0).is_some_and(|e| {
            [(0x6874_7541, 0x444d_4163), (0x6f67_7948, 0x656e_6975)].contains(&(e.ebx, e.ecx))
        });
        // SDM Vol. 3, 4.1.4: without leaf 0x80000008, 36 bits with PAE.
        t.phys_bits = t
            .find(0x8000_0008, 0)
            .map_or(36, |e| (e.eax as u8).clamp(32, 52));
        t.cr4_reserved = !(CR4_ALWAYS | of(&t, CR4_FEATURES));
        t.efer_valid = of(&t, EFER_FEATURES);
        t.xcr0_supported = t
            .find(0xd, 0)
            .map_or(0, |e| u64::from(e.edx) << 32 | u64::from(e.eax));
        t.smap = t.has(feature::SMAP);
        t.rdtscp = t.has(feature::RDTSCP);
        t.invpcid = t.has(feature::INVPCID);
        t.la57 = t.has(feature::LA57);
        t
    }

    /// The entries.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// The entry of exactly this leaf and sub-leaf.
    pub fn find(&self, function: u32, index: u32) -> Option<&CpuidEntry> {
        self.entries
            .iter()
            .find(|e| e.function == function && (!e.significant_index || e.index == index))
    }

    /// Whether a feature flag is set.
    pub fn has(&self, f: Feature) -> bool {
        let Feature(function, index, register, bit) = f;
        self.find(function, index).is_some_and(|e| {
            let value = match register {
                Register::Eax => e.eax,
                Register::Ebx => e.ebx,
                Register::Ecx => e.ecx,
                Register::Edx => e.edx,
            };
            value >> bit & 1 != 0
        })
    }

    /// The vendor is AMD (or Hygon): decides where SYSCALL and SYSENTER exist.
    pub fn is_amd(&self) -> bool {
        self.amd
    }
    /// Width of physical addresses.
    pub fn phys_bits(&self) -> u8 {
        self.phys_bits
    }
    /// CR4 bits that are reserved for this processor.
    pub fn cr4_reserved(&self) -> u64 {
        self.cr4_reserved
    }
    /// EFER bits that exist for this processor.
    pub fn efer_valid(&self) -> u64 {
        self.efer_valid
    }
    /// XCR0 bits that may be set.
    pub fn xcr0_supported(&self) -> u64 {
        self.xcr0_supported
    }
    /// SMAP, and with it CLAC and STAC.
    pub fn has_smap(&self) -> bool {
        self.smap
    }
    /// RDTSCP.
    pub fn has_rdtscp(&self) -> bool {
        self.rdtscp
    }
    /// 57-bit linear addresses.
    pub fn has_la57(&self) -> bool {
        self.la57
    }
    /// INVPCID.
    pub fn has_invpcid(&self) -> bool {
        self.invpcid
    }

    /// What CPUID returns in EAX, EBX, ECX, EDX.
    pub fn cpuid(&self, s: &CpuState, around: Around, function: u32, index: u32) -> [u32; 4] {
        let entry = self.find(function, index).or_else(|| {
            let function = self.out_of_range(function)?;
            self.find(function, index)
        });
        let Some(e) = entry else {
            return self.absent_subleaf(function, index);
        };
        let mut out = [e.eax, e.ebx, e.ecx, e.edx];
        dynamic_bits(s, around, e, &mut out);
        out
    }

    /// Intel processors answer leaves beyond the maximum of their class with the data of the
    /// highest basic leaf; AMD's answer zero.
    fn out_of_range(&self, function: u32) -> Option<u32> {
        let basic = self.find(0, 0)?;
        if self.amd {
            return None;
        }
        // A hypervisor's own ranges start at multiples of 0x100; an absent one counts as basic.
        let class = if (0x4000_0000..0x5000_0000).contains(&function) {
            self.find(function & 0xffff_ff00, 0)
        } else if function >= 0xc000_0000 {
            self.find(0xc000_0000, 0)
        } else {
            self.find(function & 0x8000_0000, 0)
        };
        if class.is_some_and(|c| function <= c.eax) {
            return None;
        }
        Some(basic.eax)
    }

    /// Sub-leaves beyond the last of leaves 0xB and 0x1F still return the x2APIC id in EDX and the
    /// index in CL.
    fn absent_subleaf(&self, function: u32, index: u32) -> [u32; 4] {
        if function != 0xb && function != 0x1f {
            return [0; 4];
        }
        match self.find(function, 1) {
            Some(e) => [0, 0, index & 0xff, e.edx],
            None => [0; 4],
        }
    }
}

/// What CPUID follows besides the processor's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Around {
    /// IA32_APIC_BASE.EN.
    pub apic_enabled: bool,
    /// The MONITOR flag follows IA32_MISC_ENABLE ([`crate::machine::Quirk::MwaitOfCpuid`] is off).
    pub mwait_of_msr: bool,
}

impl Default for Around {
    /// As after reset.
    fn default() -> Self {
        Self {
            apic_enabled: true,
            mwait_of_msr: false,
        }
    }
}

/// The bits that follow CR4, XCR0, IA32_APIC_BASE and IA32_MISC_ENABLE.
fn dynamic_bits(s: &CpuState, around: Around, e: &CpuidEntry, out: &mut [u32; 4]) {
    let apic_enabled = around.apic_enabled;
    let mut set = |register: usize, bit: u32, on: bool| {
        out[register] = out[register] & !(1 << bit) | u32::from(on) << bit;
    };
    match (e.function, e.index) {
        (1, _) => {
            set(2, 27, s.cr4 & cr4::OSXSAVE != 0);
            set(3, 9, apic_enabled);
            if around.mwait_of_msr {
                set(2, 3, s.msr.misc_enable & MISC_ENABLE_MWAIT != 0);
            }
        }
        (7, 0) => set(2, 4, s.cr4 & cr4::PKE != 0),
        (0x8000_0001, _) if e.edx >> 9 & 1 != 0 => set(3, 9, apic_enabled),
        (0xd, 0) => out[1] = xsave_size(s.xcr0),
        (0xd, 1) if e.eax & 0b1010 != 0 => out[1] = compacted_size(s.xcr0 | s.msr.xss),
        _ => {}
    }
}

/// Legacy region and header.
const XSAVE_MIN: u32 = 576;

/// Bytes of a standard-format XSAVE area for these components.
pub fn xsave_size(xcr0: u64) -> u32 {
    components()
        .iter()
        .filter(|c| xcr0 >> c.bit & 1 != 0)
        .map(|c| (c.offset + c.size) as u32)
        .fold(XSAVE_MIN, u32::max)
}

/// Bytes of a compacted XSAVE area for these components.
pub fn compacted_size(components: u64) -> u32 {
    self::components()
        .iter()
        .filter(|c| components >> c.bit & 1 != 0)
        .fold(XSAVE_MIN, |total, c| total + c.size as u32)
}

/// CPUID. With CPUID faulting enabled it is #GP outside CPL 0; this crate does not offer that.
pub(crate) fn execute(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let function = cpu.state.regs[reg::RAX] as u32;
    let index = cpu.state.regs[reg::RCX] as u32;
    let around = Around {
        apic_enabled: cpu.apic_enabled(),
        mwait_of_msr: !cpu.machine.has_quirk(Quirk::MwaitOfCpuid),
    };
    let out = cpu.cpuid.cpuid(&cpu.state, around, function, index);
    for (register, value) in [reg::RAX, reg::RBX, reg::RCX, reg::RDX]
        .into_iter()
        .zip(out)
    {
        cpu.state.regs[register] = value.into();
    }
    Ok(())
}

impl Cpu {
    /// IA32_APIC_BASE.EN.
    fn apic_enabled(&self) -> bool {
        const APIC_BASE: u32 = 0x1b;
        match self.machine.read_msr(&self.state, APIC_BASE) {
            crate::machine::MsrResult::Done(base) => base >> 11 & 1 != 0,
            _ => true,
        }
    }

    /// Gives the processor its CPUID; what depends on it follows.
    pub fn set_cpuid(&mut self, table: CpuidTable) {
        self.phys_bits = table.phys_bits();
        self.cpuid = table;
        self.flush_tlb();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> CpuidEntry {
        CpuidEntry {
            function,
            eax,
            ..CpuidEntry::default()
        }
    }

    fn intel() -> CpuidTable {
        let vendor = CpuidEntry {
            ebx: 0x756e_6547,
            edx: 0x4965_6e69,
            ecx: 0x6c65_746e,
            ..entry(0, 0xd)
        };
        CpuidTable::new(vec![
            vendor,
            entry(1, 0x600),
            CpuidEntry {
                significant_index: true,
                ..entry(0xd, 7)
            },
            CpuidEntry {
                index: 1,
                edx: 5,
                significant_index: true,
                ..entry(0xb, 1)
            },
            entry(0x8000_0000, 0x8000_0008),
            entry(0x8000_0008, 0x3027),
        ])
    }

    // SDM Vol. 2, CPUID: "If a value entered for CPUID.EAX is higher than the maximum …".
    #[test]
    fn beyond_the_last_leaf() {
        let s = CpuState::new();
        let t = intel();
        assert_eq!(t.cpuid(&s, Around::default(), 0x20, 0)[0], 7);
        assert_eq!(t.cpuid(&s, Around::default(), 0x8000_0009, 0)[0], 7);
        // In range but absent: zero.
        assert_eq!(t.cpuid(&s, Around::default(), 5, 0), [0; 4]);
        assert_eq!(t.cpuid(&s, Around::default(), 0xb, 9), [0, 0, 9, 5]);
        assert_eq!(t.phys_bits(), 39);
    }

    #[test]
    fn dynamic_bits_follow_the_state() {
        let mut s = CpuState::new();
        let t = intel();
        assert_eq!(t.cpuid(&s, Around::default(), 1, 0)[2] >> 27 & 1, 0);
        s.cr4 |= cr4::OSXSAVE;
        assert_eq!(t.cpuid(&s, Around::default(), 1, 0)[2] >> 27 & 1, 1);
        assert_eq!(t.cpuid(&s, Around::default(), 1, 0)[3] >> 9 & 1, 1);
        assert_eq!(t.cpuid(&s, Around::default(), 0xd, 0)[1], 576);
        s.xcr0 = 7;
        assert_eq!(t.cpuid(&s, Around::default(), 0xd, 0)[1], 832);
    }

    #[test]
    fn sizes() {
        assert_eq!(xsave_size(3), 576);
        let last = components()[3];
        assert_eq!(xsave_size(0xe7), (last.offset + last.size) as u32);
        assert_eq!(compacted_size(0xe7), 2688 - (1088 - 832));
    }
}
