//! An interrupt line of a device: an eventfd that KVM turns into an edge on a GSI (KVM_IRQFD).

use std::io;

use anykvm::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::error::BootError;

/// A line into the IOAPIC.
pub struct InterruptLine(EventFd);

impl InterruptLine {
    /// A line to `gsi`.
    pub fn new(vm: &VmFd, gsi: u32) -> Result<Self, BootError> {
        let line = Self::unconnected().map_err(BootError::host("cannot create an eventfd"))?;
        vm.register_irqfd(&line.0, gsi)
            .map_err(BootError::host("cannot register an irqfd"))?;
        Ok(line)
    }

    /// A line that leads nowhere yet.
    pub fn unconnected() -> io::Result<Self> {
        EventFd::new(EFD_CLOEXEC).map(Self)
    }

    /// One edge.
    pub fn raise(&self) -> io::Result<()> {
        self.0.write(1)
    }

    /// The edges raised so far on an unconnected line.
    #[cfg(test)]
    pub fn edges(&self) -> u64 {
        self.raise().unwrap();
        self.0.read().unwrap() - 1
    }
}

impl vm_superio::Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.raise()
    }
}
