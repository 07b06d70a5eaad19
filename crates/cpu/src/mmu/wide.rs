//! 16-, 32- and 64-byte operands.

use crate::cpu::Cpu;
use crate::exit::Stop;
use crate::memory::wide::{load_16, store_16};

impl Cpu {
    /// Reads 16 bytes at an offset through a segment code.
    #[inline(always)]
    pub(crate) fn read_16(&mut self, code: u8, offset: u64) -> Result<[u8; 16], Stop> {
        let linear = self.linear(code, offset, 16, false)?;
        if let Some(host) = self.tlb.read(self.tlb.set, linear, 16) {
            // SAFETY: a TLB hit is RAM of the map this processor holds.
            return Ok(unsafe { load_16(host) });
        }
        let mut v = [0; 16];
        self.read_bytes(code, offset, &mut v)?;
        Ok(v)
    }

    /// Writes 16 bytes at an offset through a segment code.
    #[inline(always)]
    pub(crate) fn write_16(&mut self, code: u8, offset: u64, v: [u8; 16]) -> Result<(), Stop> {
        let linear = self.linear(code, offset, 16, true)?;
        if let Some(host) = self.tlb.write(self.tlb.set, linear, 16) {
            // SAFETY: a TLB hit is RAM of the map this processor holds.
            unsafe { store_16(host, v) };
            return Ok(());
        }
        self.write_bytes(code, offset, &v)
    }

    /// Reads 32 bytes at an offset through a segment code.
    #[inline(always)]
    pub(crate) fn read_32(&mut self, code: u8, offset: u64) -> Result<[[u8; 16]; 2], Stop> {
        let linear = self.linear(code, offset, 32, false)?;
        if let Some(host) = self.tlb.read(self.tlb.set, linear, 32) {
            // SAFETY: as above; the hit covers all 32 bytes.
            return Ok(unsafe { [load_16(host), load_16(host + 16)] });
        }
        let mut v = [[0; 16]; 2];
        self.read_bytes(code, offset, v.as_flattened_mut())?;
        Ok(v)
    }

    /// Writes 32 bytes at an offset through a segment code.
    #[inline(always)]
    pub(crate) fn write_32(&mut self, code: u8, offset: u64, v: [[u8; 16]; 2]) -> Result<(), Stop> {
        let linear = self.linear(code, offset, 32, true)?;
        if let Some(host) = self.tlb.write(self.tlb.set, linear, 32) {
            // SAFETY: as above.
            unsafe {
                store_16(host, v[0]);
                store_16(host + 16, v[1]);
            }
            return Ok(());
        }
        self.write_bytes(code, offset, v.as_flattened())
    }

    /// Reads 64 bytes at an offset through a segment code.
    #[inline(always)]
    pub(crate) fn read_64(&mut self, code: u8, offset: u64) -> Result<[[u8; 16]; 4], Stop> {
        let linear = self.linear(code, offset, 64, false)?;
        if let Some(host) = self.tlb.read(self.tlb.set, linear, 64) {
            // SAFETY: as above; the hit covers all 64 bytes.
            return Ok(unsafe { [0, 16, 32, 48].map(|at| load_16(host + at)) });
        }
        let mut v = [[0; 16]; 4];
        self.read_bytes(code, offset, v.as_flattened_mut())?;
        Ok(v)
    }

    /// Writes 64 bytes at an offset through a segment code.
    #[inline(always)]
    pub(crate) fn write_64(&mut self, code: u8, offset: u64, v: [[u8; 16]; 4]) -> Result<(), Stop> {
        let linear = self.linear(code, offset, 64, true)?;
        if let Some(host) = self.tlb.write(self.tlb.set, linear, 64) {
            for (at, piece) in (host..).step_by(16).zip(v) {
                // SAFETY: as above.
                unsafe { store_16(at, piece) };
            }
            return Ok(());
        }
        self.write_bytes(code, offset, v.as_flattened())
    }
}
