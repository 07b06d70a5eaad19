//! Writes that do not leave KVM_RUN.

use anykvm::bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_OUT_7E_INC_RIP, Plain, kvm_coalesced_mmio,
    kvm_enable_cap,
};
use anykvm::{IoEventAddress, NoDatamatch, Object, VcpuExit};
use anykvm_cpu::memory::mapping::Mapping;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Guest;

#[test]
fn a_port_write_signals_its_eventfd_and_no_other_is_swallowed() {
    let guest = Guest::new();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    guest
        .vm
        .register_ioevent(&event, &IoEventAddress::Pio(0x510), 5u8)
        .unwrap();
    let mut vcpu = guest.vcpu(&[
        0xba, 0x10, 0x05, // mov dx, 0x510
        0xb0, 0x05, 0xee, // mov al, 5; out dx, al
        0xb0, 0x06, 0xee, // mov al, 6; out dx, al
        0xb8, 0x05, 0x00, 0xef, // mov ax, 5; out dx, ax
        0xf4, // hlt
    ]);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x510, [6])));
    assert_eq!(event.read().unwrap(), 1);
    assert!(matches!(
        vcpu.run().unwrap(),
        VcpuExit::IoOut(0x510, [5, 0])
    ));
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    assert!(event.read().is_err());
}

#[test]
fn a_memory_write_of_any_length_signals_a_wildcard() {
    let guest = Guest::new();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let at = IoEventAddress::Mmio(0x9000);
    guest.vm.register_ioevent(&event, &at, NoDatamatch).unwrap();
    let mut vcpu = guest.vcpu(&[
        0xa2, 0x00, 0x90, // mov [0x9000], al
        0xa3, 0x00, 0x90, // mov [0x9000], ax
        0x66, 0xa3, 0x00, 0x90, // mov [0x9000], eax
        0xf4, // hlt
        0xa2, 0x00, 0x90, // mov [0x9000], al
    ]);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    assert_eq!(event.read().unwrap(), 3);
    guest
        .vm
        .unregister_ioevent(&event, &at, NoDatamatch)
        .unwrap();
    assert!(matches!(
        vcpu.run().unwrap(),
        VcpuExit::MmioWrite(0x9000, [0])
    ));
    assert!(event.read().is_err());
}

/// The ring holds 169 entries; the write that finds it full is an exit.
#[test]
fn coalesced_writes_are_in_the_ring() {
    const ROOM: u32 = 169;
    let guest = Guest::new();
    guest
        .vm
        .register_coalesced_mmio(IoEventAddress::Mmio(0x9000), 0x1000)
        .unwrap();
    guest
        .vm
        .register_coalesced_mmio(IoEventAddress::Pio(0x80), 1)
        .unwrap();
    let mut vcpu = guest.vcpu(&[
        0xb0, 0x77, 0xe6, 0x80, // mov al, 0x77; out 0x80, al
        0xb9, 0xc8, 0x00, // mov cx, 200
        0x88, 0x0e, 0x04, 0x90, // again: mov [0x9004], cl
        0xe2, 0xfa, // loop again
        0xf4, // hlt
    ]);
    let Object::Vm(vm) = guest.vm.object() else {
        unreachable!()
    };
    let ring = Mapping::new(vm.coalesced_ring_fd(), 0, 4096).unwrap();
    let entry = |i: u32| {
        let mut bytes = [0; size_of::<kvm_coalesced_mmio>()];
        ring.read_bytes(8 + i as usize * bytes.len(), &mut bytes);
        kvm_coalesced_mmio::from_bytes(&bytes).unwrap()
    };
    // The first write is the port's.
    let left = 200 - (ROOM - 1) as u8;
    let VcpuExit::MmioWrite(0x9004, data) = vcpu.run().unwrap() else {
        panic!()
    };
    assert_eq!(data, [left]);
    assert_eq!([ring.read::<u32>(0), ring.read(4)], [0, ROOM]);
    let first = entry(0);
    assert_eq!((first.phys_addr, first.len, first.data[0]), (0x80, 1, 0x77));
    assert_eq!(first.as_bytes()[12..16], [1, 0, 0, 0]);
    let second = entry(1);
    assert_eq!(
        (second.phys_addr, second.len, second.data[0]),
        (0x9004, 1, 200)
    );
    assert_eq!(second.as_bytes()[12..16], [0; 4]);
    // The VMM has read them: the rest fits, past the end of the page.
    ring.write(0, ROOM);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    assert_eq!(
        ring.read::<u32>(4),
        (ROOM + u32::from(left) - 1) % (ROOM + 1)
    );
    assert_eq!(entry(ROOM).data[0], left - 1);
}

/// A VMM that scribbles over the ring's indices gets exits, nothing worse.
#[test]
fn a_broken_ring_is_not_used() {
    let guest = Guest::new();
    guest
        .vm
        .register_coalesced_mmio(IoEventAddress::Mmio(0x9000), 0x1000)
        .unwrap();
    let mut vcpu = guest.vcpu(&[0xa2, 0x00, 0x90, 0xf4]);
    let Object::Vm(vm) = guest.vm.object() else {
        unreachable!()
    };
    let ring = Mapping::new(vm.coalesced_ring_fd(), 0, 4096).unwrap();
    ring.write(4, u32::MAX);
    assert!(matches!(
        vcpu.run().unwrap(),
        VcpuExit::MmioWrite(0x9000, [0])
    ));
}

/// KVM_X86_QUIRK_OUT_7E_INC_RIP (KVM API, 7.32): RIP is past the instruction when the exit is seen; without
/// the quirk, and for every other port, when the next entry completes it.
#[test]
fn an_out_to_port_7e_has_retired_at_its_exit() {
    for (quirk, port, retired) in [
        (true, 0x7e, true),
        (false, 0x7e, false),
        (true, 0x7f, false),
    ] {
        let guest = Guest::new();
        if !quirk {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_DISABLE_QUIRKS2,
                ..Default::default()
            };
            cap.args[0] = KVM_X86_QUIRK_OUT_7E_INC_RIP.into();
            guest.vm.enable_cap(&cap).unwrap();
        }
        // mov al, 5; out port, al; mov al, 6; out port, al; hlt
        let mut vcpu = guest.vcpu(&[0xb0, 5, 0xe6, port, 0xb0, 6, 0xe6, port, 0xf4]);
        let start = vcpu.get_regs().unwrap().rip;
        for n in 0..2 {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(at, data) => assert_eq!((at, data), (port.into(), &[5 + n][..])),
                other => panic!("{other:?}"),
            }
            let out = u64::from(n) * 4 + if retired { 4 } else { 2 };
            assert_eq!(
                vcpu.get_regs().unwrap().rip,
                start + out,
                "{quirk} {port:#x}"
            );
        }
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    }
}
