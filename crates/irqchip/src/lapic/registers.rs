//! The register page: offsets, bit fields, and the page itself as 64 atomic words. SDM volume 3,
//! "Local APIC Register Address Map".

use std::sync::atomic::{AtomicU32, Ordering};

/// Register offsets in the page; an x2APIC register's MSR is 800H plus a sixteenth of it.
pub(crate) mod offset {
    #![allow(missing_docs)]
    pub const ID: u32 = 0x020;
    pub const VERSION: u32 = 0x030;
    pub const TPR: u32 = 0x080;
    pub const APR: u32 = 0x090;
    pub const PPR: u32 = 0x0a0;
    pub const EOI: u32 = 0x0b0;
    pub const LDR: u32 = 0x0d0;
    pub const DFR: u32 = 0x0e0;
    pub const SVR: u32 = 0x0f0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const LVT_CMCI: u32 = 0x2f0;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PERFORMANCE_COUNTER: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const TIMER_INITIAL_COUNT: u32 = 0x380;
    pub const TIMER_CURRENT_COUNT: u32 = 0x390;
    pub const TIMER_DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Version register: an integrated APIC.
pub(crate) const VERSION_INTEGRATED: u32 = 0x14;
/// Version register: EOI broadcasts can be suppressed.
pub(crate) const VERSION_DIRECTED_EOI: u32 = 1 << 24;

pub(crate) const SVR_ENABLE: u32 = 1 << 8;
pub(crate) const SVR_SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
/// SVR: vector, software enable, focus checking.
pub(crate) const SVR_MASK: u32 = 0x3ff;

pub(crate) const DFR_FLAT: u32 = 0xffff_ffff;
pub(crate) const DFR_CLUSTER: u32 = 0x0fff_ffff;

/// ICR delivery status: always idle, sending takes no time.
pub(crate) const ICR_BUSY: u32 = 1 << 12;
/// ICR bits that are reserved in x2APIC mode.
pub(crate) const X2APIC_ICR_RESERVED: u64 = 0xfff0_0000 | 0x3_0000 | 1 << 13;

pub(crate) const LVT_VECTOR: u32 = 0xff;
pub(crate) const LVT_DELIVERY_MODE: u32 = 7 << 8;
pub(crate) const LVT_MASKED: u32 = 1 << 16;
pub(crate) const LVT_LEVEL: u32 = 1 << 15;
pub(crate) const LVT_MODE_NMI: u32 = 4 << 8;
pub(crate) const LVT_MODE_EXTINT: u32 = 7 << 8;

pub(crate) const TIMER_MODE_PERIODIC: u32 = 1 << 17;
pub(crate) const TIMER_MODE_TSC_DEADLINE: u32 = 2 << 17;

const LVT_COMMON: u32 = LVT_VECTOR | 1 << 12 | LVT_MASKED;
/// LINT0 and LINT1 have polarity, remote IRR and trigger mode too.
const LVT_LINT: u32 = LVT_COMMON | LVT_DELIVERY_MODE | 1 << 13 | 1 << 14 | LVT_LEVEL;

/// The local vector table, in the order of its registers (CMCI, at 2F0H, last).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum LvtEntry {
    Timer,
    Thermal,
    PerformanceCounter,
    Lint0,
    Lint1,
    Error,
    Cmci,
}

/// For each [`LvtEntry`]: its register, and the bits that can be written (the timer's mode bits
/// depend on CPUID).
pub(crate) const LVT: [(u32, u32); 7] = [
    (offset::LVT_TIMER, LVT_COMMON),
    (offset::LVT_THERMAL, LVT_COMMON | LVT_DELIVERY_MODE),
    (
        offset::LVT_PERFORMANCE_COUNTER,
        LVT_COMMON | LVT_DELIVERY_MODE,
    ),
    (offset::LVT_LINT0, LVT_LINT),
    (offset::LVT_LINT1, LVT_LINT),
    (offset::LVT_ERROR, LVT_COMMON),
    (offset::LVT_CMCI, LVT_COMMON | LVT_DELIVERY_MODE),
];

/// The 64 registers, each the first word of 16 bytes of the page.
pub(crate) struct RegisterPage([AtomicU32; 64]);

impl RegisterPage {
    pub fn new() -> Self {
        Self([const { AtomicU32::new(0) }; 64])
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        &self.0[(offset >> 4 & 63) as usize]
    }

    pub fn get(&self, offset: u32) -> u32 {
        self.word(offset).load(Ordering::Relaxed)
    }

    pub fn set(&self, offset: u32, value: u32) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    pub fn set_bits(&self, offset: u32, bits: u32) {
        self.word(offset).fetch_or(bits, Ordering::Relaxed);
    }

    /// A bit of one of the 256-bit registers (ISR, TMR, IRR).
    pub fn test_vector(&self, register: u32, vector: u8) -> bool {
        self.vector_word(register, vector).load(Ordering::Relaxed) & vector_bit(vector) != 0
    }

    /// Sets it. Sequentially consistent: whoever is told of it afterwards sees it.
    pub fn set_vector(&self, register: u32, vector: u8) {
        self.vector_word(register, vector)
            .fetch_or(vector_bit(vector), Ordering::SeqCst);
    }

    /// Clears it; true if it was set.
    pub fn clear_vector(&self, register: u32, vector: u8) -> bool {
        let bit = vector_bit(vector);
        let word = self.vector_word(register, vector);
        word.fetch_and(!bit, Ordering::SeqCst) & bit != 0
    }

    /// The highest bit set.
    pub fn highest_vector(&self, register: u32) -> Option<u8> {
        (0..8).rev().find_map(|i| {
            let bits = self.word(register + i * 16).load(Ordering::SeqCst);
            (bits != 0).then(|| (i * 32 + bits.ilog2()) as u8)
        })
    }

    fn vector_word(&self, register: u32, vector: u8) -> &AtomicU32 {
        self.word(register + u32::from(vector >> 5) * 16)
    }
}

fn vector_bit(vector: u8) -> u32 {
    1 << (vector & 31)
}
