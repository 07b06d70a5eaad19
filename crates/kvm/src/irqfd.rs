//! irqfds (KVM API, section 4.75, KVM_IRQFD): an eventfd whose signal is an interrupt on a GSI, with
//! or without a resample eventfd for level-triggered ones. The event thread waits for them; it keeps
//! duplicates of the descriptors, which callers close right after the ioctl.

use std::fmt;
use std::sync::{Arc, MutexGuard};

use anykvm_abi::{KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_irqfd};
use anykvm_irqchip::{IrqChip, RESAMPLE_IRQ_SOURCE_ID, USERSPACE_IRQ_SOURCE_ID};

use crate::error::{Errno, Result};
use crate::event_thread::Source;
use crate::eventfd::EventFd;
use crate::stats::{StatsFile, VmStat};
use crate::vm::Vm;

/// One irqfd.
struct Irqfd {
    eventfd: EventFd,
    gsi: u32,
    resample: Option<Arc<EventFd>>,
    chip: Arc<IrqChip>,
    stats: Arc<StatsFile>,
}

impl fmt::Debug for Irqfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Irqfd")
            .field("gsi", &self.gsi)
            .finish_non_exhaustive()
    }
}

impl Source for Irqfd {
    fn ready(&self) {
        if self.eventfd.take() == 0 {
            return;
        }
        if self.resample.is_some() {
            // Stays up until the guest acknowledges it.
            self.chip
                .set_irq(self.gsi, RESAMPLE_IRQ_SOURCE_ID, true, false);
        } else {
            self.chip.pulse(self.gsi, USERSPACE_IRQ_SOURCE_ID);
        }
        // Behind it: who sees the number finds the interrupt.
        self.stats.add(VmStat::Irqfds as usize, 1);
    }
}

/// The irqfds of a VM, with their tokens at the event thread.
#[derive(Debug, Default)]
pub(crate) struct Irqfds(Vec<(u64, Arc<Irqfd>)>);

impl Vm {
    fn lock_irqfds(&self) -> MutexGuard<'_, Irqfds> {
        self.irq.irqfds.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// KVM_IRQFD.
    pub(crate) fn irqfd(&self, args: &kvm_irqfd) -> Result<()> {
        if args.flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0 {
            return Err(Errno::EINVAL);
        }
        if args.flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
            self.deassign_irqfd(args)
        } else {
            self.assign_irqfd(args)
        }
    }

    fn assign_irqfd(&self, args: &kvm_irqfd) -> Result<()> {
        let resample = args.flags & KVM_IRQFD_FLAG_RESAMPLE != 0;
        let chip = if resample {
            self.full_chip(Errno::EINVAL)?
        } else {
            self.irq.chip().ok_or(Errno::EINVAL)?
        };
        let eventfd = EventFd::new(args.fd as i32)?;
        let resample = if resample {
            Some(Arc::new(EventFd::new(args.resamplefd as i32)?))
        } else {
            None
        };
        let mut irqfds = self.lock_irqfds();
        if irqfds
            .0
            .iter()
            .any(|(_, irqfd)| irqfd.eventfd.same(&eventfd))
        {
            return Err(Errno::EBUSY);
        }
        let irqfd = Arc::new(Irqfd {
            eventfd,
            gsi: args.gsi,
            resample,
            chip: chip.clone(),
            stats: self.stats.clone(),
        });
        if let Some(resample) = &irqfd.resample {
            self.irq.resamplers.add(args.gsi, resample.clone());
            chip.add_ack_notifier(args.gsi);
        }
        match self.events.watch(irqfd.eventfd.fd(), irqfd.clone()) {
            Ok(token) => irqfds.0.push((token, irqfd)),
            Err(e) => {
                self.forget_resampler(&irqfd);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Removing what was not there succeeds, as in Linux.
    fn deassign_irqfd(&self, args: &kvm_irqfd) -> Result<()> {
        let eventfd = EventFd::new(args.fd as i32)?;
        let mut irqfds = self.lock_irqfds();
        irqfds.0.retain(|(token, irqfd)| {
            let keep = irqfd.gsi != args.gsi || !irqfd.eventfd.same(&eventfd);
            if !keep {
                self.events.unwatch(irqfd.eventfd.fd(), *token);
                self.forget_resampler(irqfd);
            }
            keep
        });
        Ok(())
    }

    fn forget_resampler(&self, irqfd: &Irqfd) {
        if let Some(resample) = &irqfd.resample {
            self.irq.resamplers.remove(irqfd.gsi, resample);
            irqfd.chip.remove_ack_notifier(irqfd.gsi);
            irqfd
                .chip
                .set_irq(irqfd.gsi, RESAMPLE_IRQ_SOURCE_ID, false, false);
        }
    }
}
