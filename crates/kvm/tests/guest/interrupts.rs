//! Interrupts that reach a halted guest.

use std::time::Duration;

use anykvm::bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MP_STATE_INIT_RECEIVED, KvmIrqRouting,
    kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_msi,
};
use anykvm::{CountedTime, Errno, Kvm, VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Guest;

/// Where the interrupt handlers are.
const HANDLER: usize = 0x2000;

impl Guest {
    /// A handler for this vector that writes it to port 0xe9, then this code, then IRET.
    fn handler(&self, vector: u8, code: &[u8]) {
        let at = HANDLER + usize::from(vector) * 64;
        self.ram.write(usize::from(vector) * 4, at as u32);
        let mut handler = vec![0x50, 0xb0, vector, 0xe6, 0xe9]; // push ax; mov al, VECTOR; out 0xe9, al
        handler.extend_from_slice(code);
        handler.extend_from_slice(&[0x58, 0xcf]); // pop ax; iret
        self.ram.write_bytes(at, &handler);
    }
}

/// The PIC pair as a PC sets it up, vectors from 0x20, only these inputs of the master open.
fn set_up_pic(open: u8) -> Vec<u8> {
    let writes = [
        (0x20u8, 0x11u8),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, !open),
    ];
    writes
        .iter()
        .flat_map(|(port, value)| [0xb0, *value, 0xe6, *port])
        .collect()
}

/// sti; again: hlt; jmp again
const WAIT: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfd];
/// out 0xe8, al: the controllers are set up.
const READY: [u8; 2] = [0xe6, 0xe8];
/// mov al, 0x20; out 0x20, al
const PIC_EOI: [u8; 4] = [0xb0, 0x20, 0xe6, 0x20];

fn until_ready(vcpu: &mut VcpuFd) {
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0xe8, _)));
}

/// Runs until a handler reports, and returns its vector.
fn vector(vcpu: &mut VcpuFd) -> u8 {
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0xe9, [vector]) => *vector,
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn irqfd_wakes_a_halted_vcpu() {
    let guest = Guest::new();
    guest.vm.create_irq_chip().unwrap();
    guest.handler(0x23, &PIC_EOI);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.vm.register_irqfd(&event, 3).unwrap();
    let mut vcpu = guest.vcpu(&[set_up_pic(1 << 3), READY.to_vec(), WAIT.to_vec()].concat());
    until_ready(&mut vcpu);
    for _ in 0..20 {
        let event = event.try_clone().unwrap();
        let signaller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2));
            event.write(1).unwrap();
        });
        assert_eq!(vector(&mut vcpu), 0x23);
        signaller.join().unwrap();
    }
}

/// A level-triggered line stays up through EOIs until the device, told by the resample eventfd, is
/// content: as often as it signals again the guest is interrupted again.
#[test]
fn resample_interrupts_as_long_as_the_device_wants() {
    let guest = Guest::new();
    guest.vm.create_irq_chip().unwrap();
    guest.handler(0x23, &PIC_EOI);
    let (event, resample) = (
        EventFd::new(EFD_NONBLOCK).unwrap(),
        EventFd::new(0).unwrap(),
    );
    guest
        .vm
        .register_irqfd_with_resample(&event, &resample, 3)
        .unwrap();
    let level = [0xba, 0xd0, 0x04, 0xb0, 0x08, 0xee]; // mov dx, 0x4d0; mov al, 8; out dx, al
    let code = [&set_up_pic(1 << 3)[..], &level, &READY, &WAIT].concat();
    let mut vcpu = guest.vcpu(&code);
    until_ready(&mut vcpu);
    let device = std::thread::spawn(move || {
        event.write(1).unwrap();
        for _ in 0..10 {
            assert_eq!(resample.read().unwrap(), 1);
            event.write(1).unwrap();
        }
    });
    for _ in 0..11 {
        assert_eq!(vector(&mut vcpu), 0x23);
    }
    device.join().unwrap();
}

#[test]
fn the_pit_interrupts() {
    let guest = Guest::new();
    guest.vm.create_irq_chip().unwrap();
    guest.vm.create_pit2(Default::default()).unwrap();
    guest.handler(0x20, &PIC_EOI);
    // Channel 0, rate generator, 11932 counts: 10 ms.
    let pit = [
        0xb0, 0x34, 0xe6, 0x43, 0xb0, 0x9c, 0xe6, 0x40, 0xb0, 0x2e, 0xe6, 0x40,
    ];
    let mut vcpu = guest.vcpu(&[set_up_pic(1), pit.to_vec(), WAIT.to_vec()].concat());
    let start = std::time::Instant::now();
    for _ in 0..10 {
        assert_eq!(vector(&mut vcpu), 0x20);
    }
    assert!(
        start.elapsed() >= Duration::from_millis(90),
        "{:?}",
        start.elapsed()
    );
}

/// Split irqchip: an MSI goes straight to the local APIC.
#[test]
fn msi_with_a_split_irqchip() {
    let guest = Guest::new();
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [24, 0, 0, 0],
        ..Default::default()
    };
    guest.vm.enable_cap(&split).unwrap();
    // mov dword [0xb0], 0: EOI, DS being the APIC page.
    guest.handler(0x41, &[0x66, 0xc7, 0x06, 0xb0, 0x00, 0, 0, 0, 0]);
    let enable = [0x66, 0xc7, 0x06, 0xf0, 0x00, 0xff, 0x01, 0, 0]; // mov dword [0xf0], 0x1ff: SVR
    let mut vcpu = guest.vcpu(&[&enable[..], &READY, &WAIT].concat());
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.ds.base = 0xfee0_0000;
    vcpu.set_sregs(&sregs).unwrap();
    until_ready(&mut vcpu);
    let msi = kvm_msi {
        address_lo: 0xfee0_0000,
        data: 0x41,
        ..Default::default()
    };
    for _ in 0..3 {
        assert_eq!(guest.vm.signal_msi(msi), Ok(1));
        assert_eq!(vector(&mut vcpu), 0x41);
    }
}

/// The exit that tells of an EOI comes before anything else ends KVM_RUN: behind an EOI nothing that a VMM can
/// save says that it has not heard of it.
#[test]
fn an_ioapic_eoi_is_told_before_a_run_ends() {
    const LEVEL: u32 = 1 << 15 | 1 << 14;
    let time = CountedTime {
        start_ns: 0,
        ns_per_instruction: 1,
    };
    let vm = Kvm::new().unwrap().create_vm_with_counted_time(time);
    let guest = Guest::of(vm.unwrap(), 0);
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [24, 0, 0, 0],
        ..Default::default()
    };
    guest.vm.enable_cap(&split).unwrap();
    let route = kvm_irq_routing_entry {
        gsi: 3,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: 0xfee0_0000,
                data: LEVEL | 0x41,
                ..Default::default()
            },
        },
        ..Default::default()
    };
    let routes = KvmIrqRouting::from_entries(&[route]).unwrap();
    guest.vm.set_gsi_routing(&routes).unwrap();
    guest.handler(0x41, &[0x66, 0xc7, 0x06, 0xb0, 0x00, 0, 0, 0, 0]);
    let enable = [0x66, 0xc7, 0x06, 0xf0, 0x00, 0xff, 0x01, 0, 0];
    let mut vcpu = guest.vcpu(&[&enable[..], &WAIT].concat());
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.ds.base = 0xfee0_0000;
    vcpu.set_sregs(&sregs).unwrap();
    let (mut told, mut done) = (0, 0);
    let mut served = false;
    for _ in 0..200 {
        match vcpu.run_counted(1, u64::MAX) {
            Ok(VcpuExit::IoapicEoi(0x41)) => told += 1,
            Ok(VcpuExit::IoOut(0xe9, _)) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => guest.vm.set_irq_line(3, true).unwrap(),
            other => panic!("{other:?}"),
        }
        let lapic = vcpu.get_lapic().unwrap();
        let serves = lapic.regs[0x120] & 2 != 0;
        done += u32::from(served && !serves);
        served = serves;
        assert_eq!(told, done);
    }
    assert!(told > 2);
}

/// INIT forgets an NMI that came before it, whether somebody has looked at the vCPU meanwhile or not.
#[test]
fn init_forgets_an_earlier_nmi() {
    for looked_at in [true, false] {
        let guest = Guest::new();
        guest.vm.create_irq_chip().unwrap();
        let mut ap = guest.vm.create_vcpu(1).unwrap();
        ap.nmi().unwrap();
        if looked_at {
            assert_eq!(ap.get_vcpu_events().unwrap().nmi.pending, 1);
        }
        let init = kvm_msi {
            address_lo: 0xfee0_1000,
            data: 0x500,
            ..Default::default()
        };
        assert_eq!(guest.vm.signal_msi(init), Ok(1));
        assert_eq!(ap.run().unwrap_err(), Errno::EAGAIN);
        let state = ap.get_mp_state().unwrap().mp_state;
        assert_eq!(state, KVM_MP_STATE_INIT_RECEIVED);
        assert_eq!(ap.get_vcpu_events().unwrap().nmi.pending, 0);
    }
}
