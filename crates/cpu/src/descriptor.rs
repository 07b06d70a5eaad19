//! Segment and gate descriptors, and how selectors find them (SDM Vol. 3, 3.4 and 3.5).

use crate::cpu::Cpu;
use crate::events::vector;
use crate::exit::Stop;
use crate::state::{Segment, Table};

/// Types of system descriptors (SDM Vol. 3, table 3-2).
pub mod system_type {
    #![allow(missing_docs)]
    pub const TSS16_AVAILABLE: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS_AVAILABLE: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
}

/// The selector without its RPL: what error codes hold (SDM Vol. 3, 6.13).
pub fn selector_error(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// Whether a selector is null.
pub fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// A descriptor as it stands in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The selector it was found by.
    pub selector: u16,
    /// Linear address of its first byte.
    pub address: u64,
    /// Its 8 bytes.
    pub low: u64,
    /// The second 8 bytes of 16-byte descriptors (long mode); otherwise 0.
    pub high: u64,
}

impl Descriptor {
    /// The type field.
    pub fn kind(&self) -> u8 {
        (self.low >> 40 & 15) as u8
    }
    /// A system descriptor or gate (S clear).
    pub fn is_system(&self) -> bool {
        self.low >> 44 & 1 == 0
    }
    /// Type of a system descriptor; `None` for code and data.
    pub fn system_kind(&self) -> Option<u8> {
        self.is_system().then(|| self.kind())
    }
    /// A code segment.
    pub fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }
    /// A data segment.
    pub fn is_data(&self) -> bool {
        !self.is_system() && self.kind() & 8 == 0
    }
    /// A conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    /// Data, or code that may be read.
    pub fn is_readable(&self) -> bool {
        self.is_data() || self.is_code() && self.kind() & 2 != 0
    }
    /// Data that may be written.
    pub fn is_writable(&self) -> bool {
        self.is_data() && self.kind() & 2 != 0
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.low >> 45 & 3) as u8
    }
    /// P bit.
    pub fn present(&self) -> bool {
        self.low >> 47 & 1 != 0
    }
    /// L bit.
    pub fn long(&self) -> bool {
        self.low >> 53 & 1 != 0
    }
    /// D/B bit.
    pub fn db(&self) -> bool {
        self.low >> 54 & 1 != 0
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let raw = (self.low & 0xffff | self.low >> 32 & 0xf_0000) as u32;
        if self.low >> 55 & 1 != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }
    /// Base address; 64 bits for 16-byte descriptors.
    pub fn base(&self) -> u64 {
        self.low >> 16 & 0xff_ffff | self.low >> 32 & 0xff00_0000 | self.high << 32
    }
    /// The second dword as LAR shows it before masking.
    pub fn access_rights(&self) -> u32 {
        (self.low >> 32) as u32
    }
    /// Gate: offset of 32 bits.
    pub fn gate_offset(&self) -> u32 {
        (self.low & 0xffff | self.low >> 32 & 0xffff_0000) as u32
    }
    /// Gate of 16 bytes: offset of 64 bits.
    pub fn gate_offset64(&self) -> u64 {
        u64::from(self.gate_offset()) | self.high << 32
    }
    /// Gate: target selector.
    pub fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }
    /// What a segment register holds after it was loaded with this descriptor.
    pub fn segment(&self) -> Segment {
        Segment {
            base: self.base(),
            limit: self.limit(),
            attr: self.access_rights() >> 8 & 0xf0ff,
            selector: self.selector,
            ..Segment::default()
        }
    }
}

impl Cpu {
    /// The descriptor table a selector indexes: its base and its limit. `None` if it is the LDT and
    /// there is none.
    fn descriptor_table(&self, selector: u16) -> Option<(u64, u32)> {
        if selector & 4 == 0 {
            let Table { base, limit, .. } = self.state.gdtr;
            Some((base, limit.into()))
        } else if self.state.ldtr.unusable() {
            None
        } else {
            Some((self.state.ldtr.base, self.state.ldtr.limit))
        }
    }

    /// Linear address of the descriptor that a selector names, `size` bytes of it inside the table.
    fn descriptor_address(&self, selector: u16, size: u32) -> Option<u64> {
        let (base, limit) = self.descriptor_table(selector)?;
        let offset = u32::from(selector & 0xfff8);
        (offset + (size - 1) <= limit)
            .then(|| self.system_address(base.wrapping_add(offset.into())))
    }

    /// A linear address of a system structure: 64 bits in long mode, else 32.
    pub(crate) fn system_address(&self, address: u64) -> u64 {
        if self.state.long_mode() {
            address
        } else {
            address & 0xffff_ffff
        }
    }

    /// Reads the descriptor a selector names; `None` if it is outside its table. Null selectors are
    /// the caller's business.
    pub(crate) fn find_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Ok(None);
        };
        let low = self.read_system::<u64>(address)?;
        Ok(Some(Descriptor {
            selector,
            address,
            low,
            high: 0,
        }))
    }

    /// Reads the descriptor a selector names; outside its table: `vector`(selector).
    pub(crate) fn fetch_descriptor(
        &mut self,
        selector: u16,
        vector: u8,
    ) -> Result<Descriptor, Stop> {
        match self.find_descriptor(selector)? {
            Some(d) => Ok(d),
            None => Err(self.raise_error(vector, selector_error(selector))),
        }
    }

    /// Reads the upper half of a 16-byte descriptor (system segments and call gates in long mode);
    /// outside the table, or with a type in the upper half: `vector`(selector).
    pub(crate) fn fetch_upper_half(&mut self, d: &mut Descriptor, vector: u8) -> Result<(), Stop> {
        if self.descriptor_address(d.selector, 16).is_none() {
            return Err(self.raise_error(vector, selector_error(d.selector)));
        }
        d.high = self.read_system::<u64>(d.address.wrapping_add(8))?;
        if d.high >> 40 & 0x1f != 0 {
            return Err(self.raise_error(vector, selector_error(d.selector)));
        }
        d.high &= 0xffff_ffff;
        Ok(())
    }

    /// Sets the accessed bit of a code or data descriptor in its table, if it is not set yet.
    pub(crate) fn set_accessed(&mut self, d: &mut Descriptor) -> Result<(), Stop> {
        if d.kind() & 1 == 0 {
            d.low |= 1 << 40;
            self.set_bits_system(d.address.wrapping_add(5), 1)?;
        }
        Ok(())
    }

    /// Sets the busy bit of a TSS descriptor; #GP(selector) if another processor has been faster.
    pub(crate) fn set_busy(&mut self, d: &mut Descriptor) -> Result<(), Stop> {
        d.low |= 2 << 40;
        if self.set_bits_system(d.address.wrapping_add(5), 2)? & 2 != 0 {
            return Err(self.raise_error(vector::GP, selector_error(d.selector)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_code_descriptor() {
        // Base 0x12345678, limit 0xabcde in pages, 32-bit conforming readable code, DPL 2.
        let low = 0x12ca_de34_5678_bcde_u64 & !(0xff << 40) | 0xde << 40;
        let d = Descriptor {
            selector: 0x1b,
            address: 0,
            low,
            high: 0,
        };
        assert_eq!(d.base(), 0x1234_5678);
        assert_eq!(d.limit(), 0xabcd_efff);
        assert!(d.is_code() && d.is_conforming() && d.is_readable() && d.present() && d.db());
        assert_eq!(d.dpl(), 2);
        assert_eq!(d.segment().attr, 0xc0de);
        assert_eq!(selector_error(0x1b), 0x18);
    }
}
