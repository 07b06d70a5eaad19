//! The interrupt message: what IPIs, I/O APIC entries and MSIs all become before they reach a local
//! APIC. SDM volume 3, "Interrupt Command Register" and "Message Signalled Interrupts".

/// Delivery mode, encoded alike in the ICR, the LVT, I/O APIC entries and MSI data (bits 10:8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    /// Reserved by the architecture (once Remote Read); KVM un-halts a vCPU with it.
    RemoteRead,
    Nmi,
    Init,
    Startup,
    ExtInt,
}

impl DeliveryMode {
    /// From the low three bits.
    pub fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::RemoteRead,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            _ => Self::ExtInt,
        }
    }
}

/// Destination shorthand of the ICR (bits 19:18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shorthand {
    None,
    ToSelf,
    AllIncludingSelf,
    AllExcludingSelf,
}

/// One message on its way to local APICs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupt {
    pub vector: u8,
    pub mode: DeliveryMode,
    pub shorthand: Shorthand,
    /// Message destination address, meaningless with a shorthand.
    pub dest: u32,
    /// `dest` is logical (else physical).
    pub logical: bool,
    pub level_triggered: bool,
    /// Level: asserted (ICR bit 14). De-assertions do nothing.
    pub assert: bool,
    /// MSI address bit 3: deliver to one of the destinations.
    pub redirection_hint: bool,
}

impl Interrupt {
    /// What a write to the ICR sends. `dest` is the destination field, already of the mode's width.
    pub fn from_icr(icr: u32, dest: u32) -> Self {
        Self {
            vector: icr as u8,
            mode: DeliveryMode::from_bits(icr >> 8),
            shorthand: match icr >> 18 & 3 {
                0 => Shorthand::None,
                1 => Shorthand::ToSelf,
                2 => Shorthand::AllIncludingSelf,
                _ => Shorthand::AllExcludingSelf,
            },
            dest,
            logical: icr & 1 << 11 != 0,
            level_triggered: icr & 1 << 15 != 0,
            assert: icr & 1 << 14 != 0,
            redirection_hint: false,
        }
    }

    /// What a write of `data` to `address` means to local APICs. With 32-bit ids (KVM_CAP_X2APIC_API)
    /// the upper half of the address carries destination bits 31:8.
    pub fn from_msi(address: u64, data: u32, ids_32bit: bool) -> Self {
        let mut dest = (address >> 12) as u32 & 0xff;
        if ids_32bit {
            dest |= (address >> 32) as u32 & 0xffff_ff00;
        }
        Self {
            vector: data as u8,
            mode: DeliveryMode::from_bits(data >> 8),
            shorthand: Shorthand::None,
            dest,
            logical: address & 1 << 2 != 0,
            level_triggered: data & 1 << 15 != 0,
            assert: true,
            redirection_hint: address & 1 << 3 != 0,
        }
    }

    /// Whether only one of the destinations gets it.
    pub fn is_lowest_priority(&self) -> bool {
        self.mode == DeliveryMode::LowestPriority || self.redirection_hint
    }
}
