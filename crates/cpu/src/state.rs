//! The architectural state of one processor, in one `repr(C)` struct, so that translated code can
//! address it by offset and the KVM GET/SET calls are copies of it. Nothing architectural lives
//! anywhere else.

use crate::events::Events;

/// Register numbers as instructions encode them (SDM Vol. 2, table 3-1).
pub mod reg {
    #![allow(missing_docs)]
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    /// The instruction pointer's place in the register file (so that RIP-relative addressing is an
    /// ordinary base register).
    pub const RIP: u8 = 16;
    /// Always zero: the base or index of an address that has none.
    pub const ZERO: u8 = 17;
}

/// Segment register numbers as instructions encode them.
pub mod seg {
    #![allow(missing_docs)]
    pub const ES: u8 = 0;
    pub const CS: u8 = 1;
    pub const SS: u8 = 2;
    pub const DS: u8 = 3;
    pub const FS: u8 = 4;
    pub const GS: u8 = 5;
}

/// RFLAGS bits (SDM Vol. 1, 3.4.3).
pub mod rflags {
    #![allow(missing_docs)]
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// CF, PF, AF, ZF, SF and OF.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
    /// Every bit that is not reserved, but the fixed one.
    pub const WRITABLE: u64 = STATUS | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// CR0 bits (SDM Vol. 3, 2.5).
pub mod cr0 {
    #![allow(missing_docs)]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (SDM Vol. 3, 2.5).
pub mod cr4 {
    #![allow(missing_docs)]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// IA32_EFER bits (SDM Vol. 3, 2.2.1).
pub mod efer {
    #![allow(missing_docs)]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NX: u64 = 1 << 11;
    pub const FFXSR: u64 = 1 << 14;
    /// AMD: automatic IBRS.
    pub const AUTOIBRS: u64 = 1 << 21;
    /// Every bit this crate knows.
    pub const IMPLEMENTED: u64 = SCE | LME | LMA | NX | FFXSR | AUTOIBRS;
}

/// General registers 0-15, RIP and a constant zero, indexed by register code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[derive(Default)]
pub struct Regs([u64; 32]);

// The file has 32 slots and codes are masked, so that an access needs no bounds check.
impl std::ops::Index<u8> for Regs {
    type Output = u64;
    #[inline(always)]
    fn index(&self, code: u8) -> &u64 {
        &self.0[usize::from(code & 31)]
    }
}

impl std::ops::IndexMut<u8> for Regs {
    #[inline(always)]
    fn index_mut(&mut self, code: u8) -> &mut u64 {
        &mut self.0[usize::from(code & 31)]
    }
}

/// A segment register with its hidden part (SDM Vol. 3, 3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes, expanded by granularity.
    pub limit: u32,
    /// Access rights as in bits 8-23 of a descriptor's second dword: type 0-3, S 4, DPL 5-6, P 7,
    /// AVL 12, L 13, D/B 14, G 15; bit 16 set when the register is unusable (holds a null selector).
    pub attr: u32,
    /// The visible selector.
    pub selector: u16,
    /// Keeps the size a multiple of 8.
    pub reserved: [u16; 3],
}

impl Segment {
    /// The register holds no usable segment.
    pub const UNUSABLE: u32 = 1 << 16;
    /// Present.
    pub const P: u32 = 1 << 7;
    /// Code or data (as opposed to system) descriptor.
    pub const S: u32 = 1 << 4;
    /// 64-bit code.
    pub const L: u32 = 1 << 13;
    /// Default operation size / big stack.
    pub const DB: u32 = 1 << 14;
    /// Granularity of 4 KiB.
    pub const G: u32 = 1 << 15;

    /// The type field, 0-15.
    pub fn kind(&self) -> u8 {
        (self.attr & 15) as u8
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attr >> 5 & 3) as u8
    }
    /// Sets the descriptor privilege level.
    pub fn set_dpl(&mut self, dpl: u8) {
        self.attr = self.attr & !(3 << 5) | u32::from(dpl & 3) << 5;
    }
    /// Requested privilege level of the selector.
    pub fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
    /// P bit.
    pub fn present(&self) -> bool {
        self.attr & Self::P != 0
    }
    /// D/B bit.
    pub fn db(&self) -> bool {
        self.attr & Self::DB != 0
    }
    /// L bit.
    pub fn long(&self) -> bool {
        self.attr & Self::L != 0
    }
    /// Whether the register may not be used for an access.
    pub fn unusable(&self) -> bool {
        self.attr & Self::UNUSABLE != 0
    }
    /// A code segment (S set, type bit 3 set).
    pub fn is_code(&self) -> bool {
        self.attr & (Self::S | 8) == Self::S | 8
    }
    /// What a load gives in real and virtual-8086 mode: base = selector × 16; other parts stay in
    /// real mode (unreal mode depends on it).
    pub fn load_real(&mut self, selector: u16) {
        self.selector = selector;
        self.base = u64::from(selector) << 4;
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
    /// Keeps the size a multiple of 8.
    pub reserved: [u16; 3],
}

/// MSRs the processor itself acts on or keeps (SDM Vol. 4). Those that belong to the machine (APIC,
/// kvmclock, …) are the [`crate::Machine`]'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_var: [u64; 16],
    pub debugctl: u64,
    pub last_branch_from: u64,
    pub last_branch_to: u64,
    pub last_int_from: u64,
    pub last_int_to: u64,
    pub smbase: u64,
    pub spec_ctrl: u64,
    pub xss: u64,
    pub umwait_control: u64,
    pub power_ctl: u64,
    pub perf_capabilities: u64,
    pub feature_control: u64,
    pub ucode_rev: u64,
    pub arch_capabilities: u64,
    pub platform_info: u64,
    pub tsc_adjust: u64,
    /// AMD: HWCR, SYSCFG, DE_CFG, VIRT_SPEC_CTRL and the like, kept as written.
    pub hwcr: u64,
    pub virt_spec_ctrl: u64,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            // SDM Vol. 3, 12.12.4: the PAT's value at reset.
            pat: 0x0007_0406_0007_0406,
            // Fast strings; no branch trace store, no PEBS.
            misc_enable: 0x1801,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_var: [0; 16],
            debugctl: 0,
            last_branch_from: 0,
            last_branch_to: 0,
            last_int_from: 0,
            last_int_to: 0,
            smbase: 0x30000,
            spec_ctrl: 0,
            xss: 0,
            umwait_control: 0,
            power_ctl: 0,
            perf_capabilities: 0,
            feature_control: 0,
            ucode_rev: 0x1_0000_0000,
            arch_capabilities: crate::msr::ARCH_CAPABILITIES,
            platform_info: 0,
            tsc_adjust: 0,
            // TscFreqSel: the TSC counts at the P0 frequency.
            hwcr: 1 << 24,
            virt_spec_ctrl: 0,
        }
    }
}

/// Bytes of a standard-format XSAVE area with x87, SSE, AVX, (MPX gap,) AVX-512 and PKRU.
pub const XSAVE_BYTES: usize = 2816;

/// The registers that XSAVE saves, laid out like a standard-format XSAVE area of Intel's (SDM Vol. 1, 13.4):
/// legacy region 0-511, header 512-575, AVX at 576, opmask at 1088, ZMM_Hi256 at 1152, Hi16_ZMM at 1664,
/// PKRU at 2688. In memory the components are where the host has them ([`crate::cpuid::components`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; XSAVE_BYTES]);

impl Default for XsaveArea {
    /// The state after reset or FNINIT with SSE at its initial configuration.
    fn default() -> Self {
        let mut a = Self([0; XSAVE_BYTES]);
        a.reset();
        a
    }
}

impl XsaveArea {
    /// Offset of the XMM registers in the legacy region.
    pub const XMM: usize = 160;
    /// Offset of MXCSR.
    pub const MXCSR: usize = 24;
    /// Offset of XSTATE_BV.
    pub const XSTATE_BV: usize = 512;
    /// Offset of the upper halves of the YMM registers.
    pub const YMM_HI: usize = 576;
    /// Offset of k0-k7.
    pub const OPMASK: usize = 1088;
    /// Offset of the upper halves of ZMM0-15.
    pub const ZMM_HI: usize = 1152;
    /// Offset of ZMM16-31.
    pub const HI16_ZMM: usize = 1664;
    /// Offset of PKRU.
    pub const PKRU: usize = 2688;

    /// Puts every component in its initial configuration (FCW 0x37F: after FNINIT; reset's own
    /// 0x40 is what [`CpuState::reset`] sets).
    pub fn reset(&mut self) {
        self.0 = [0; XSAVE_BYTES];
        self.set_u16(0, 0x37f);
        self.set_u32(Self::MXCSR, 0x1f80);
    }
    /// The 16 bits at a byte offset.
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }
    /// Sets the 16 bits at a byte offset.
    pub fn set_u16(&mut self, at: usize, v: u16) {
        self.0[at..at + 2].copy_from_slice(&v.to_le_bytes());
    }
    /// The 32 bits at a byte offset.
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap_or_default())
    }
    /// Sets the 32 bits at a byte offset.
    pub fn set_u32(&mut self, at: usize, v: u32) {
        self.0[at..at + 4].copy_from_slice(&v.to_le_bytes());
    }
    /// The 64 bits at a byte offset.
    pub fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap_or_default())
    }
    /// Sets the 64 bits at a byte offset.
    pub fn set_u64(&mut self, at: usize, v: u64) {
        self.0[at..at + 8].copy_from_slice(&v.to_le_bytes());
    }
    /// PKRU.
    pub fn pkru(&self) -> u32 {
        self.u32(Self::PKRU)
    }
}

/// Everything a processor is between two instructions.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct CpuState {
    /// General registers and RIP.
    pub regs: Regs,
    /// RFLAGS; always materialised.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS; 6 and 7 are the flat segments of 64-bit and flat 32-bit code (base
    /// 0, no checks; 7 where a fault would be #SS) and always stay zero.
    pub seg: [Segment; 8],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: Table,
    /// IDTR.
    pub idtr: Table,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3 as last loaded (without bit 63).
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The four page-directory-pointer entries that PAE paging loads with CR3 (SDM Vol. 3, 4.4.1).
    pub pdptr: [u64; 4],
    /// XCR0.
    pub xcr0: u64,
    /// DR0-DR3.
    pub db: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// MSRs.
    pub msr: Msrs,
    /// Guest TSC = (host TSC × ratio >> 48) + offset.
    pub tsc_offset: u64,
    /// See `tsc_offset`.
    pub tsc_ratio: u64,
    /// What the host's TSC is taken to show, where time is counted and not the host's
    /// ([`crate::Machine::count_time`]).
    pub host_tsc: Option<u64>,
    /// Events pending, injected and masked.
    pub events: Events,
    /// x87, SSE, AVX, … in the standard XSAVE format; the registers themselves, not a copy.
    pub xsave: XsaveArea,
}

impl Default for CpuState {
    fn default() -> Self {
        Self::new()
    }
}

impl CpuState {
    /// The state after RESET (SDM Vol. 3, table 10-1).
    pub fn new() -> Self {
        let mut s = Self {
            regs: Regs::default(),
            rflags: rflags::FIXED,
            seg: [Segment::default(); 8],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: Table::default(),
            idtr: Table::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            pdptr: [0; 4],
            xcr0: 1,
            db: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            msr: Msrs::default(),
            tsc_offset: 0,
            tsc_ratio: 1 << 48,
            host_tsc: None,
            events: Events::default(),
            xsave: XsaveArea::default(),
        };
        s.reset_common();
        s.cr0 = cr0::CD | cr0::NW | cr0::ET;
        s.xsave.set_u16(0, 0x40);
        s
    }

    /// INIT (SDM Vol. 3, table 10-1): like RESET, but FPU/SSE state, CR0.CD/NW, TSC, MSRs other
    /// than EFER and the TSC are kept.
    pub fn init(&mut self) {
        let keep = self.cr0 & (cr0::CD | cr0::NW);
        self.reset_common();
        self.cr0 = cr0::ET | keep;
    }

    fn reset_common(&mut self) {
        self.regs = Regs::default();
        // Family/model/stepping in EDX; the kvm crate overrides it from CPUID leaf 1.
        self.regs[reg::RDX] = 0x600;
        self.regs[reg::RIP] = 0xfff0;
        self.rflags = rflags::FIXED;
        let data = Segment {
            limit: 0xffff,
            attr: 0x93,
            ..Default::default()
        };
        for s in 0..6 {
            self.seg[s] = data;
        }
        self.seg[usize::from(seg::CS)] = Segment {
            base: 0xffff_0000,
            selector: 0xf000,
            attr: 0x9b,
            ..data
        };
        self.ldtr = Segment {
            limit: 0xffff,
            attr: 0x82,
            ..Default::default()
        };
        self.tr = Segment {
            limit: 0xffff,
            attr: 0x8b,
            ..Default::default()
        };
        self.gdtr = Table {
            base: 0,
            limit: 0xffff,
            ..Default::default()
        };
        self.idtr = self.gdtr;
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.msr.efer = 0;
        self.db = [0; 4];
        self.dr6 = 0xffff_0ff0;
        self.dr7 = 0x400;
        self.events = Events {
            nmi_pending: 0,
            ..Events::default()
        };
    }

    /// RIP.
    #[inline(always)]
    pub fn rip(&self) -> u64 {
        self.regs[reg::RIP]
    }
    /// Sets RIP.
    #[inline(always)]
    pub fn set_rip(&mut self, rip: u64) {
        self.regs[reg::RIP] = rip;
    }
    /// Current privilege level: the DPL of SS, which every mode keeps equal to it (as VMX does).
    #[inline(always)]
    pub fn cpl(&self) -> u8 {
        self.seg[usize::from(seg::SS)].dpl()
    }
    /// CR0.PE.
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }
    /// RFLAGS.VM.
    pub fn virtual_8086(&self) -> bool {
        self.rflags & rflags::VM != 0
    }
    /// EFER.LMA.
    pub fn long_mode(&self) -> bool {
        self.msr.efer & efer::LMA != 0
    }
    /// Real mode (not virtual-8086).
    pub fn real_mode(&self) -> bool {
        !self.protected()
    }
    /// 64-bit code: long mode with CS.L.
    pub fn code64(&self) -> bool {
        self.long_mode() && self.seg[usize::from(seg::CS)].long()
    }
    /// The time-stamp counter now.
    pub fn tsc(&self) -> u64 {
        let host = self.host_tsc.unwrap_or_else(crate::cpu::host_tsc);
        let scaled = (u128::from(host) * u128::from(self.tsc_ratio)) >> 48;
        (scaled as u64).wrapping_add(self.tsc_offset)
    }
    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        (self.rflags >> 12 & 3) as u8
    }
    /// Replaces the six status flags.
    #[inline(always)]
    pub fn set_status(&mut self, flags: u64) {
        self.rflags = self.rflags & !rflags::STATUS | flags & rflags::STATUS;
    }
}
