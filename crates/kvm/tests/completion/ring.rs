//! What devices in the kernel take of an access: coalesced zones and ioeventfds beside memory that is user space's.

use anykvm::{IoEventAddress, NoDatamatch, TranslationMode};
use iced_x86::code_asm::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::cases::{A, RBX, RCX, RDI, case};
use crate::check::{play, start};
use crate::machine::{Event, GM, GN, GO, M, Machine, N};

const MODES: [TranslationMode; 2] = [TranslationMode::Off, TranslationMode::Always];

/// The entries of the ring: address and data.
fn ring(m: &Machine) -> Vec<(u64, Vec<u8>)> {
    let anykvm::Object::Vm(vm) = m.vm.object() else {
        unreachable!()
    };
    let page = anykvm_cpu::memory::mapping::Mapping::new(vm.coalesced_ring_fd(), 0, 4096).unwrap();
    let entries = (0..page.read::<u32>(4) as usize).map(|i| {
        let at = 8 + i * 24;
        let mut data = vec![0; page.read::<u32>(at + 8) as usize];
        page.read_bytes(at + 16, &mut data);
        (page.read(at), data)
    });
    entries.collect()
}

#[test]
fn a_coalesced_write_is_no_exit() {
    for mode in MODES {
        let c = case("mov m, eax", |a| a.mov(dword_ptr(rbx), eax)).with(RBX, M);
        let m = start(&c, mode);
        m.vm.register_coalesced_mmio(IoEventAddress::Mmio(GM), 0x1000)
            .unwrap();
        assert_eq!(m.run(), Event::Halt);
        assert_eq!(ring(&m), [(GM, A.to_le_bytes()[..4].to_vec())]);
        assert_eq!(m.regs()[16], c.next() + 1);
    }
}

/// Reads of a zone are exits, and so its write-back is behind the answer.
#[test]
fn a_read_modify_write_of_a_zone() {
    for mode in MODES {
        let c = case("add m, 1", |a| a.add(dword_ptr(rbx), 1))
            .with(RBX, M)
            .read(GM, &[1, 0, 0, 0]);
        let m = start(&c, mode);
        m.vm.register_coalesced_mmio(IoEventAddress::Mmio(GM), 0x1000)
            .unwrap();
        play(&m, &c, 0, 1);
        assert_eq!(ring(&m), []);
        m.set_immediate_exit(true);
        assert!(Machine::interrupted(&m.run()));
        assert_eq!(ring(&m), [(GM, vec![2, 0, 0, 0])]);
        assert_eq!(m.regs()[16], c.next());
    }
}

/// Each page's piece goes its own way; within one, what follows a piece that is user space's is user
/// space's, so that the order is kept.
#[test]
fn pieces_of_an_access() {
    for mode in MODES {
        // Two pages, the second a zone.
        let c = case("mov m, rax", |a| a.mov(qword_ptr(rbx), rax))
            .with(RBX, N + 0xffe)
            .write(GN + 0xffe, &A.to_le_bytes()[..2]);
        let m = start(&c, mode);
        m.vm.register_coalesced_mmio(IoEventAddress::Mmio(GO), 0x1000)
            .unwrap();
        play(&m, &c, 0, 1);
        assert_eq!(ring(&m), [(GO, A.to_le_bytes()[2..].to_vec())]);
        assert_eq!(m.run(), Event::Halt);
        // One page, whose upper half is a zone: not for the second piece of an operand that begins below it.
        let low = 0x1000_0001_1000_0000u64.to_le_bytes();
        let high = 0x1000_0003_1000_0002u64.to_le_bytes();
        let store = case("movups m, xmm0", |a| a.movups(xmmword_ptr(rbx), xmm0));
        let c = store
            .clone()
            .with(RBX, M + 0x7f8)
            .write(GM + 0x7f8, &low)
            .write(GM + 0x800, &high);
        let m = start(&c, mode);
        m.vm.register_coalesced_mmio(IoEventAddress::Mmio(GM + 0x800), 0x800)
            .unwrap();
        play(&m, &c, 0, 2);
        assert_eq!(m.run(), Event::Halt);
        assert_eq!(ring(&m), []);
        // The lower half is: the first piece is taken, the second not.
        let c = store.with(RBX, M + 0x7f8).write(GM + 0x800, &high);
        let m = start(&c, mode);
        m.vm.register_coalesced_mmio(IoEventAddress::Mmio(GM), 0x800)
            .unwrap();
        play(&m, &c, 0, 1);
        assert_eq!(ring(&m), [(GM + 0x7f8, low.to_vec())]);
        assert_eq!(m.run(), Event::Halt);
    }
}

/// A full ring makes the next write an exit; those before it are in the ring.
#[test]
fn strings_into_a_zone() {
    for mode in MODES {
        let c = case("rep stosb", |a| a.rep().stosb())
            .with(RDI, M)
            .with(RCX, 200)
            .write(GM + 169, &[0x88]);
        let m = start(&c, mode);
        m.vm.register_coalesced_mmio(IoEventAddress::Mmio(GM), 0x1000)
            .unwrap();
        play(&m, &c, 0, 1);
        assert_eq!(ring(&m).len(), 169);
        assert_eq!(m.regs()[RCX], 30);
        assert_eq!(m.regs()[RDI], M + 170);
    }
}

#[test]
fn an_ioeventfd_takes_what_matches() {
    for mode in MODES {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        // add takes the read to user space, and the write signals.
        let c = case("add m, 1", |a| a.add(dword_ptr(rbx), 1))
            .with(RBX, M)
            .read(GM, &[4, 0, 0, 0]);
        let m = start(&c, mode);
        m.vm.register_ioevent(&event, &IoEventAddress::Mmio(GM), 5u32)
            .unwrap();
        play(&m, &c, 0, 1);
        assert!(event.read().is_err());
        assert_eq!(m.run(), Event::Halt);
        assert_eq!(event.read().unwrap(), 1);
        // A push, and one item of many.
        let c = case("rep movsd", |a| a.rep().movsd())
            .with(4, crate::machine::DATA)
            .with(RDI, M - 4)
            .with(RCX, 3)
            .write(GM + 4, &[0; 4]);
        let m = start(&c, mode);
        m.vm.register_ioevent(&event, &IoEventAddress::Mmio(GM), NoDatamatch)
            .unwrap();
        play(&m, &c, 0, 1);
        assert_eq!(event.read().unwrap(), 1);
        assert_eq!(m.run(), Event::Halt);
    }
}
