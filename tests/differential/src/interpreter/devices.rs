//! A machine without devices.

use anykvm_cpu::machine::{Hypercall, MsrResult};
use anykvm_cpu::{CpuState, Machine};

/// No ports, no device memory, no interrupts.
pub struct None;

impl Machine for None {
    fn pio_read(&self, _: u16, _: &mut [u8]) -> bool {
        false
    }
    fn pio_write(&self, _: u16, _: &[u8]) -> bool {
        false
    }
    fn mmio_read(&self, _: &CpuState, _: u64, _: &mut [u8]) -> bool {
        false
    }
    fn mmio_write(&self, _: &CpuState, _: u64, _: &[u8]) -> bool {
        false
    }
    fn interrupt_pending(&self) -> bool {
        false
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        Option::None
    }
    fn wants_interrupt_window(&self) -> bool {
        false
    }
    fn read_cr8(&self) -> u64 {
        0
    }
    fn write_cr8(&self, _: u64) -> bool {
        false
    }
    fn read_msr(&self, _: &CpuState, _: u32) -> MsrResult<u64> {
        MsrResult::Fault
    }
    fn write_msr(&self, _: &mut CpuState, _: u32, _: u64) -> MsrResult<()> {
        MsrResult::Fault
    }
    fn msr_filter(&self, _: u32, _: bool) -> MsrResult<()> {
        MsrResult::Done(())
    }
    fn hypercall(&self, _: &mut CpuState, _: u64, _: [u64; 5]) -> Hypercall {
        Hypercall::Done(u64::MAX)
    }
    fn take_ioapic_eoi(&self) -> Option<u8> {
        Option::None
    }
    fn collect_events(&self, _: &mut CpuState) {}
}
