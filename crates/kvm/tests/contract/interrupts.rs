//! Interrupt controllers, KVM_IRQ_LINE, routing, MSIs, irqfds, the PIT.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anykvm::{Errno, VmStat};
use anykvm_abi::ioctl::*;
use anykvm_abi::*;
use rustix::event::{EventfdFlags, eventfd};

use crate::support::*;

/// `kvm_irqchip` as bytes: chip id and 512 bytes of state.
type Chip = [u64; 65];

impl Fixture {
    fn split() -> Self {
        let f = Self::new();
        let cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [24, 0, 0, 0],
            ..Default::default()
        };
        assert_eq!(f.vm_with(KVM_ENABLE_CAP, &cap), Ok(0));
        f
    }
    fn line(&self, irq: u32, level: u32) -> Result<i32, Errno> {
        self.vm_with(KVM_IRQ_LINE, &[irq, level])
    }
    /// KVM_GET_IRQCHIP: the state.
    fn chip(&self, id: u64) -> Result<Chip, Errno> {
        let mut chip = [0; 65];
        chip[0] = id;
        let at = self.user.at(&chip);
        self.vm(KVM_GET_IRQCHIP, at)?;
        Ok(self.user.value(at))
    }
    /// The IRR of the master PIC.
    fn pic_irr(&self) -> u8 {
        self.chip(0).unwrap().as_bytes()[8 + 1]
    }
    fn irqfd(
        &self,
        fd: &OwnedFd,
        gsi: u32,
        flags: u32,
        resample: Option<&OwnedFd>,
    ) -> Result<i32, Errno> {
        let irqfd = kvm_irqfd {
            fd: fd.as_raw_fd() as u32,
            gsi,
            flags,
            resamplefd: resample.map_or(0, |fd| fd.as_raw_fd() as u32),
            ..Default::default()
        };
        self.vm_with(KVM_IRQFD, &irqfd)
    }
    fn injected(&self) -> u64 {
        self.inner().stats().get(VmStat::Irqfds as usize)
    }
    fn wait_injected(&self, n: u64) {
        let end = Instant::now() + Duration::from_secs(5);
        while self.injected() < n {
            assert!(Instant::now() < end, "the irqfd did not fire");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

#[test]
pub fn controllers_once_and_before_vcpus() {
    let f = Fixture::with_irqchip();
    assert_eq!(f.vm(KVM_CREATE_IRQCHIP, 0), Err(Errno::EEXIST));
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [24, 0, 0, 0],
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &split), Err(Errno::EEXIST));
    let late = Fixture::new();
    let _vcpu = late.vcpu(0).unwrap();
    assert_eq!(late.vm(KVM_CREATE_IRQCHIP, 0), Err(Errno::EINVAL));
    assert_eq!(
        Fixture::split().vm(KVM_CREATE_IRQCHIP, 0),
        Err(Errno::EEXIST)
    );
}

#[test]
pub fn without_controllers() {
    let f = Fixture::new();
    assert_eq!(f.line(0, 1), Err(Errno::ENXIO));
    assert_eq!(
        f.vm_with(KVM_IRQ_LINE_STATUS, &[0u32, 1]),
        Err(Errno::ENXIO)
    );
    assert_eq!(f.chip(0), Err(Errno::ENXIO));
    assert_eq!(f.vm_with(KVM_SET_IRQCHIP, &[0u64; 65]), Err(Errno::ENXIO));
    assert_eq!(
        f.vm_with(KVM_SET_GSI_ROUTING, &[0u32, 0]),
        Err(Errno::EINVAL)
    );
    assert_eq!(
        f.vm_with(KVM_SIGNAL_MSI, &kvm_msi::default()),
        Err(Errno::EINVAL)
    );
    assert_eq!(f.irqfd(&event(), 0, 0, None), Err(Errno::EINVAL));
    assert_eq!(
        f.vm_with(KVM_CREATE_PIT2, &kvm_pit_config::default()),
        Err(Errno::ENOENT)
    );
    assert_eq!(
        f.vm_get::<kvm_pit_state2>(KVM_GET_PIT2).unwrap_err(),
        Errno::ENXIO
    );
}

#[test]
pub fn lines_reach_the_pic() {
    let f = Fixture::with_irqchip();
    assert_eq!(f.line(5, 1), Ok(0));
    assert_eq!(f.pic_irr(), 1 << 5);
    assert_eq!(f.line(5, 0), Ok(0));
    let at = f.user.at(&[4u32, 1]);
    assert_eq!(f.vm(KVM_IRQ_LINE_STATUS, at), Ok(0));
    let [_status, level]: [u32; 2] = f.user.value(at);
    assert_eq!(level, 1);
    assert_eq!(f.pic_irr() & 1 << 4, 1 << 4);
    // A GSI without a route is ignored, not an error.
    assert_eq!(f.line(4000, 1), Ok(0));
}

#[test]
pub fn chip_state_round_trip() {
    let f = Fixture::with_irqchip();
    for id in 0..3 {
        let state = f.chip(id).unwrap();
        assert_eq!(f.vm_with(KVM_SET_IRQCHIP, &state), Ok(0));
        assert_eq!(f.chip(id).unwrap(), state);
    }
    assert_eq!(f.chip(3), Err(Errno::EINVAL));
    let mut bad = [0u64; 65];
    bad[0] = 3;
    assert_eq!(f.vm_with(KVM_SET_IRQCHIP, &bad), Err(Errno::EINVAL));
    let split = Fixture::split();
    assert_eq!(split.chip(2), Err(Errno::ENXIO));
    assert_eq!(
        split.vm_with(KVM_CREATE_PIT2, &kvm_pit_config::default()),
        Err(Errno::ENOENT)
    );
}

fn route(gsi: u32, type_: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_,
        ..Plain::zeroed()
    }
}

#[test]
pub fn routing_is_replaced_or_not() {
    let f = Fixture::with_irqchip();
    // GSI 5 alone, to pin 3 of the master PIC.
    let mut entry = route(5, KVM_IRQ_ROUTING_IRQCHIP);
    entry.u.irqchip = kvm_irq_routing_irqchip {
        irqchip: KVM_IRQCHIP_PIC_MASTER,
        pin: 3,
    };
    let set = |header: [u32; 2], entries: &[kvm_irq_routing_entry]| {
        f.vm(KVM_SET_GSI_ROUTING, f.user.array(&header, entries))
    };
    assert_eq!(set([1, 0], &[entry]), Ok(0));
    assert_eq!(f.line(5, 1), Ok(0));
    assert_eq!(f.pic_irr(), 1 << 3);
    assert_eq!(f.line(5, 0), Ok(0));
    assert_eq!(set([1, 1], &[entry]), Err(Errno::EINVAL));
    assert_eq!(set([4097, 0], &[]), Err(Errno::EINVAL));
    assert_eq!(
        set([2, 0], &[route(6, KVM_IRQ_ROUTING_IRQCHIP), route(7, 99)]),
        Err(Errno::EINVAL)
    );
    let end = f.user.end() - 8;
    anykvm::UserMemory::write(&f.user, end, [1u32, 0].as_bytes()).unwrap();
    assert_eq!(f.vm(KVM_SET_GSI_ROUTING, end), Err(Errno::EFAULT));
    // The refused ones changed nothing.
    assert_eq!(f.line(5, 1), Ok(0));
    assert_eq!(f.pic_irr() & 1 << 3, 1 << 3);
    assert_eq!(set([0, 0], &[]), Ok(0));
}

#[test]
pub fn msi() {
    for f in [Fixture::with_irqchip(), Fixture::split()] {
        let msi = kvm_msi {
            address_lo: 0xfee0_0000,
            data: 0x41,
            ..Default::default()
        };
        // Nobody there to get it.
        assert_eq!(f.vm_with(KVM_SIGNAL_MSI, &msi), Ok(0));
        assert_eq!(
            f.vm_with(KVM_SIGNAL_MSI, &kvm_msi { flags: 1, ..msi }),
            Err(Errno::EINVAL)
        );
    }
}

#[test]
pub fn irqfd_injects_until_deassigned() {
    software_only!();
    let f = Fixture::with_irqchip();
    let fd = event();
    assert_eq!(f.irqfd(&fd, 3, 0, None), Ok(0));
    signal(&fd);
    f.wait_injected(1);
    assert_eq!(f.pic_irr() & 1 << 3, 1 << 3);
    // The counter was taken.
    assert!(rustix::io::read(&fd, &mut [0; 8]).is_err());
    // The same eventfd, even by another descriptor.
    assert_eq!(
        f.irqfd(&fd.try_clone().unwrap(), 4, 0, None),
        Err(Errno::EBUSY)
    );
    // Another GSI: nothing to remove, no error.
    assert_eq!(f.irqfd(&fd, 4, KVM_IRQFD_FLAG_DEASSIGN, None), Ok(0));
    signal(&fd);
    f.wait_injected(2);
    assert_eq!(f.irqfd(&fd, 3, KVM_IRQFD_FLAG_DEASSIGN, None), Ok(0));
    signal(&fd);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(f.injected(), 2);
    assert_eq!(f.irqfd(&fd, 3, 0, None), Ok(0));
    // What was signalled before is delivered at once.
    f.wait_injected(3);
}

#[test]
pub fn irqfd_survives_the_callers_close() {
    software_only!();
    let f = Fixture::with_irqchip();
    let fd = event();
    let other = fd.try_clone().unwrap();
    assert_eq!(f.irqfd(&fd, 3, 0, None), Ok(0));
    drop(fd);
    signal(&other);
    f.wait_injected(1);
}

#[test]
pub fn irqfd_refuses() {
    let f = Fixture::with_irqchip();
    let fd = event();
    assert_eq!(f.irqfd(&fd, 3, 4, None), Err(Errno::EINVAL));
    assert_eq!(
        f.vm_with(
            KVM_IRQFD,
            &kvm_irqfd {
                fd: u32::MAX,
                ..Default::default()
            }
        ),
        Err(Errno::EBADF)
    );
    let file: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
    assert_eq!(f.irqfd(&file, 3, 0, None), Err(Errno::EINVAL));
    assert_eq!(
        f.irqfd(&fd, 3, KVM_IRQFD_FLAG_RESAMPLE, Some(&file)),
        Err(Errno::EINVAL)
    );
    let split = Fixture::split();
    assert_eq!(
        split.irqfd(&fd, 3, KVM_IRQFD_FLAG_RESAMPLE, Some(&event())),
        Err(Errno::EINVAL)
    );
    assert_eq!(split.irqfd(&fd, 3, 0, None), Ok(0));
}

#[test]
pub fn resample_lowers_and_signals_on_acknowledgement() {
    software_only!();
    let f = Fixture::with_irqchip();
    let (fd, resample) = (event(), event());
    assert_eq!(
        f.irqfd(&fd, 3, KVM_IRQFD_FLAG_RESAMPLE, Some(&resample)),
        Ok(0)
    );
    let chip = f.inner().irqchip().unwrap();
    // The PIC as a PC's firmware sets it up, IRQ 3 level-triggered.
    for (port, value) in [
        (0x20u16, 0x11u8),
        (0x21, 8),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0),
        (0x4d0, 1 << 3),
    ] {
        assert!(chip.pio_write(port, &[value]));
    }
    signal(&fd);
    f.wait_injected(1);
    assert_eq!(f.pic_irr() & 1 << 3, 1 << 3);
    assert!(rustix::io::read(&resample, &mut [0; 8]).is_err());
    // Poll command and read: acknowledge and end of interrupt in one.
    assert!(chip.pio_write(0x20, &[0x0c]));
    let mut value = [0];
    assert!(chip.pio_read(0x20, &mut value));
    let end = Instant::now() + Duration::from_secs(5);
    while rustix::io::read(&resample, &mut [0; 8]).is_err() {
        assert!(Instant::now() < end, "no resample");
        std::thread::yield_now();
    }
    assert_eq!(f.pic_irr() & 1 << 3, 0);
    assert_eq!(
        f.irqfd(
            &fd,
            3,
            KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE,
            None
        ),
        Ok(0)
    );
}

#[test]
pub fn pit() {
    let f = Fixture::with_irqchip();
    assert_eq!(
        f.vm_get::<kvm_pit_state2>(KVM_GET_PIT2).unwrap_err(),
        Errno::ENXIO
    );
    assert_eq!(
        f.vm_get::<kvm_pit_state>(KVM_GET_PIT).unwrap_err(),
        Errno::ENXIO
    );
    assert_eq!(
        f.vm_with(KVM_REINJECT_CONTROL, &kvm_reinject_control::default()),
        Err(Errno::ENXIO)
    );
    assert_eq!(
        f.vm_with(KVM_CREATE_PIT2, &kvm_pit_config::default()),
        Ok(0)
    );
    assert_eq!(
        f.vm_with(KVM_CREATE_PIT2, &kvm_pit_config::default()),
        Err(Errno::EEXIST)
    );
    assert_eq!(f.vm(KVM_CREATE_PIT, 0), Err(Errno::EEXIST));
    let mut state: kvm_pit_state2 = f.vm_get(KVM_GET_PIT2).unwrap();
    assert_eq!(state.channels[0].count, 0x10000);
    state.channels[2].count = 0x1234;
    assert_eq!(f.vm_with(KVM_SET_PIT2, &state), Ok(0));
    let old: kvm_pit_state = f.vm_get(KVM_GET_PIT).unwrap();
    assert_eq!(old.channels[2].count, 0x1234);
    assert_eq!(f.vm_with(KVM_SET_PIT, &old), Ok(0));
    let off = kvm_reinject_control {
        pit_reinject: 0,
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_REINJECT_CONTROL, &off), Ok(0));
}

#[test]
pub fn the_pit_ticks_without_a_vcpu() {
    software_only!();
    let f = Fixture::with_irqchip();
    assert_eq!(
        f.vm_with(KVM_CREATE_PIT2, &kvm_pit_config::default()),
        Ok(0)
    );
    let chip = f.inner().irqchip().unwrap();
    // Channel 0, rate generator, 1193 counts: a millisecond.
    for (port, value) in [(0x43u16, 0x34u8), (0x40, 0xa9), (0x40, 0x04)] {
        assert!(chip.pio_write(port, &[value]));
    }
    let end = Instant::now() + Duration::from_secs(5);
    while f.pic_irr() & 1 == 0 {
        assert!(Instant::now() < end, "no timer interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
pub fn the_first_form_of_the_pit() {
    let f = Fixture::with_irqchip();
    let none = f.vm_get::<kvm_pit_state>(KVM_GET_PIT).unwrap_err();
    assert_eq!(none, Errno::ENXIO);
    assert_eq!(f.vm(KVM_CREATE_PIT, 0), Ok(0));
    assert_eq!(f.vm(KVM_CREATE_PIT, 0), Err(Errno::EEXIST));
    let mut state: kvm_pit_state = f.vm_get(KVM_GET_PIT).unwrap();
    state.channels[2].mode = 3;
    assert_eq!(f.vm_with(KVM_SET_PIT, &state), Ok(0));
    let back: kvm_pit_state2 = f.vm_get(KVM_GET_PIT2).unwrap();
    assert_eq!(back.channels[2].mode, 3);
}
