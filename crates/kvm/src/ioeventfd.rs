//! ioeventfds (KVM API, section 4.59, KVM_IOEVENTFD): a guest's write to an address signals an
//! eventfd instead of leaving KVM_RUN. Matching is Linux's `ioeventfd_in_range`.

use std::sync::Arc;

use anykvm_abi::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio,
};

use crate::error::{Errno, Result};
use crate::eventfd::EventFd;
use crate::io_bus::Space;
use crate::vm::Vm;

const DATAMATCH: u32 = 1 << kvm_ioeventfd_flag_nr_datamatch;
const PIO: u32 = 1 << kvm_ioeventfd_flag_nr_pio;
const DEASSIGN: u32 = 1 << kvm_ioeventfd_flag_nr_deassign;

/// One ioeventfd.
#[derive(Debug)]
pub(crate) struct IoEventFd {
    pub address: u64,
    /// Bytes of the write; 0: any number.
    len: u32,
    /// The value written; `None`: any.
    value: Option<u64>,
    pub eventfd: EventFd,
}

impl IoEventFd {
    /// Whether a write of this data to the address is meant.
    pub fn matches(&self, data: &[u8]) -> bool {
        if self.len == 0 {
            return true;
        }
        if self.len as usize != data.len() {
            return false;
        }
        self.value
            .is_none_or(|value| value.to_le_bytes().starts_with(data))
    }

    /// Whether some write would be meant by both.
    fn collides(&self, other: &Self) -> bool {
        self.address == other.address
            && (self.len == 0
                || other.len == 0
                || (self.len == other.len
                    && (self.value.is_none()
                        || other.value.is_none()
                        || self.value == other.value)))
    }

    fn same(&self, other: &Self) -> bool {
        self.address == other.address
            && self.len == other.len
            && self.value == other.value
            && self.eventfd.same(&other.eventfd)
    }
}

impl Vm {
    /// KVM_IOEVENTFD.
    pub(crate) fn ioeventfd(&self, args: &kvm_ioeventfd) -> Result<()> {
        let space = if args.flags & PIO != 0 {
            Space::Pio
        } else {
            Space::Mmio
        };
        if args.flags & DEASSIGN != 0 {
            return self.deassign_ioeventfd(space, args);
        }
        if !matches!(args.len, 0 | 1 | 2 | 4 | 8)
            || args.addr.checked_add(args.len.into()).is_none()
            || args.flags & !(DATAMATCH | PIO | DEASSIGN) != 0
            || (args.len == 0 && args.flags & DATAMATCH != 0)
        {
            return Err(Errno::EINVAL);
        }
        let new = ioeventfd(args)?;
        self.bus.change(|table| {
            let all = &mut table.space(space).ioeventfds;
            if all.iter().any(|e| e.collides(&new)) {
                return Err(Errno::EEXIST);
            }
            let at = all.partition_point(|e| e.address <= new.address);
            all.insert(at, Arc::new(new));
            Ok(())
        })
    }

    fn deassign_ioeventfd(&self, space: Space, args: &kvm_ioeventfd) -> Result<()> {
        let old = ioeventfd(args)?;
        self.bus.change(|table| {
            let all = &mut table.space(space).ioeventfds;
            let at = all.iter().position(|e| e.same(&old)).ok_or(Errno::ENOENT)?;
            all.remove(at);
            Ok(())
        })
    }
}

fn ioeventfd(args: &kvm_ioeventfd) -> Result<IoEventFd> {
    Ok(IoEventFd {
        address: args.addr,
        len: args.len,
        value: (args.flags & DATAMATCH != 0).then_some(args.datamatch),
        eventfd: EventFd::new(args.fd)?,
    })
}
