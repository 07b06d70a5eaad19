//! Slots and dirty logging under a running guest.

use std::sync::mpsc;
use std::time::Duration;

use anykvm::VcpuExit;
use anykvm::bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_memory_alias};
use anykvm_cpu::memory::mapping::Mapping;

use crate::{Guest, RAM};

#[test]
fn guest_stores_are_logged_again_after_each_get() {
    let guest = Guest::with_flags(KVM_MEM_LOG_DIRTY_PAGES);
    let mut vcpu = guest.vcpu(&[
        0xa2, 0x00, 0x20, // mov [0x2000], al
        0xf4, // hlt
        0xa2, 0x01, 0x20, // mov [0x2001], al
        0xa2, 0xff, 0x3f, // mov [0x3fff], al
        0xf4, // hlt
        0xa0, 0x00, 0x20, // mov al, [0x2000]
        0xf4, // hlt
    ]);
    // The first time the page of the code is among them.
    for expected in [0b110, 0b1100, 0] {
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
        assert_eq!(guest.vm.get_dirty_log(0, RAM).unwrap(), [expected]);
    }
}

/// What is left of an instruction when it exits is done on re-entry, and logged if the log was read between.
#[test]
fn the_rest_of_an_instruction_is_logged_after_a_get() {
    let accesses: [&[u8]; 2] = [
        // in: insb
        &[0x6c],
        // mov si, 0x9000; movsb, from a device
        &[0xbe, 0x00, 0x90, 0xa4],
    ];
    for access in accesses {
        let guest = Guest::with_flags(KVM_MEM_LOG_DIRTY_PAGES);
        let mut code = vec![
            0xbf, 0x10, 0x20, // mov di, 0x2010
            0xa2, 0x00, 0x20, // mov [0x2000], al: the page has a fast entry now
        ];
        code.extend(access);
        code.push(0xf4);
        let mut vcpu = guest.vcpu(&code);
        match vcpu.run().unwrap() {
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data[0] = 0x5a,
            exit => panic!("{exit:?}"),
        }
        assert_eq!(guest.vm.get_dirty_log(0, RAM).unwrap(), [0b110]);
        assert_eq!(guest.ram.read::<u8>(0x2010), 0);
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
        assert_eq!(guest.ram.read::<u8>(0x2010), 0x5a);
        assert_eq!(guest.vm.get_dirty_log(0, RAM).unwrap(), [0b100]);
    }
}

/// Linux maps a page writable at its first use, if it may, and a page that becomes writable is dirty.
#[test]
fn the_first_use_of_a_page_counts_as_a_write() {
    let guest = Guest::with_flags(KVM_MEM_LOG_DIRTY_PAGES);
    let code = [
        0xa0, 0x00, 0x20, // mov al, [0x2000]
        0xf4, // hlt
        0xa0, 0x00, 0x20, // mov al, [0x2000]
        0xa0, 0x00, 0x30, // mov al, [0x3000]
        0xf4, // hlt
    ];
    let mut vcpu = guest.vcpu(&code);
    for expected in [0b110, 0b1000] {
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
        assert_eq!(guest.vm.get_dirty_log(0, RAM).unwrap(), [expected]);
    }
    // What was used before is only read now, wherever it is looked up again.
    let host = guest.ram.address();
    guest.slot(0, 0, 0, RAM as u64, host).unwrap();
    guest
        .slot(0, KVM_MEM_LOG_DIRTY_PAGES, 0, RAM as u64, host)
        .unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = crate::CODE;
    vcpu.set_regs(&regs).unwrap();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    assert_eq!(guest.vm.get_dirty_log(0, RAM).unwrap(), [0]);
}

/// A page that the guest can only read does not become dirty.
#[test]
fn a_readonly_page_is_never_dirty() {
    let guest = Guest::new();
    let rom = Mapping::anonymous(0x1000).unwrap();
    guest
        .slot(
            1,
            KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES,
            0x9000,
            0x1000,
            rom.address(),
        )
        .unwrap();
    let mut vcpu = guest.vcpu(&[0xa0, 0x10, 0x90, 0xf4]);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    assert_eq!(guest.vm.get_dirty_log(1, 0x1000).unwrap(), [0]);
}

#[test]
fn stores_are_logged_once_logging_is_switched_on() {
    let guest = Guest::new();
    // again: mov [0x2000], al; hlt; jmp again
    let mut vcpu = guest.vcpu(&[0xa2, 0x00, 0x20, 0xf4, 0xeb, 0xfa]);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    let host = guest.ram.address();
    guest
        .slot(0, KVM_MEM_LOG_DIRTY_PAGES, 0, RAM as u64, host)
        .unwrap();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    assert_eq!(guest.vm.get_dirty_log(0, RAM).unwrap(), [0b100]);
    guest.slot(0, 0, 0, RAM as u64, host).unwrap();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    assert!(guest.vm.get_dirty_log(0, RAM).is_err());
}

#[test]
fn a_readonly_slot_is_read_as_memory_and_written_as_a_device() {
    let guest = Guest::new();
    let rom = Mapping::anonymous(0x1000).unwrap();
    rom.write(0x10, 0x5au8);
    guest
        .slot(1, KVM_MEM_READONLY, 0x9000, 0x1000, rom.address())
        .unwrap();
    let mut vcpu = guest.vcpu(&[
        0xa0, 0x10, 0x90, // mov al, [0x9010]
        0xfe, 0xc0, // inc al
        0xa2, 0x10, 0x90, // mov [0x9010], al
        0xf4,
    ]);
    assert!(matches!(
        vcpu.run().unwrap(),
        VcpuExit::MmioWrite(0x9010, [0x5b])
    ));
    assert_eq!(rom.read::<u8>(0x10), 0x5a);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
}

/// When the ioctl has returned, the guest no longer uses the slot: the memory may go.
#[test]
fn a_slot_is_deleted_under_a_running_vcpu() {
    let guest = Guest::new();
    let ram = Mapping::anonymous(0x1000).unwrap();
    guest.slot(1, 0, 0x9000, 0x1000, ram.address()).unwrap();
    // again: mov al, [0x9000]; jmp again
    let mut vcpu = guest.vcpu(&[0xa0, 0x00, 0x90, 0xeb, 0xfb]);
    let (sender, receiver) = mpsc::channel();
    let runner = std::thread::spawn(move || {
        sender.send(()).unwrap();
        assert!(matches!(vcpu.run().unwrap(), VcpuExit::MmioRead(0x9000, _)));
    });
    receiver.recv().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    guest.slot(1, 0, 0, 0, 0).unwrap();
    drop(ram);
    runner.join().unwrap();
}

#[test]
fn a_guest_sees_through_an_alias() {
    let guest = Guest::new();
    let alias = kvm_memory_alias {
        slot: 2,
        flags: 0,
        guest_phys_addr: 0xa000,
        memory_size: 0x1000,
        target_phys_addr: 0x3000,
    };
    guest.vm.set_memory_alias(alias).unwrap();
    let mut vcpu = guest.vcpu(&[
        0xb0, 0x11, // mov al, 0x11
        0xa2, 0x20, 0xa0, // mov [0xa020], al
        0xfe, 0x06, 0x20, 0x30, // inc byte [0x3020]
        0xa0, 0x20, 0xa0, // mov al, [0xa020]
        0xe6, 0x10, // out 0x10, al
        0xf4,
    ]);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x10, [0x12])));
}

#[test]
fn statistics_count() {
    let guest = Guest::new();
    let mut vcpu = guest.vcpu(&[0x90, 0x90, 0xe6, 0x10, 0xf4]);
    while !matches!(vcpu.run().unwrap(), VcpuExit::Hlt) {}
    let stats = guest.vm.stats();
    assert_eq!(stats.instructions, 4);
    assert_eq!(stats.exits, 2);
    assert!(stats.to_string().contains("io_exits 1"), "{stats}");
}
