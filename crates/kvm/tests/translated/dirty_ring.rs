//! Dirty rings under guests that write everywhere.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anykvm::bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_DIRTY_RING_FULL,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use anykvm::{VcpuExit, VcpuFd};
use anykvm_cpu::memory::mapping::Mapping;
use iced_x86::code_asm::*;

use crate::{END, Machine, RAM, assemble, next_random};

const PAGE: usize = 4096;
const ENTRIES: usize = 256;
/// Entries that are not kept in reserve.
const LIMIT: usize = ENTRIES - 64;
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// The VMM's side of a vCPU's ring.
struct Ring {
    entries: Mapping,
    next: usize,
}

impl Ring {
    fn of(vcpu: &VcpuFd) -> Self {
        let at = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE as u64;
        Self {
            entries: Mapping::new(vcpu.vcpu().fd(), at, ENTRIES * 16).unwrap(),
            next: 0,
        }
    }

    /// Collects what is there: numbers of pages of slot 0.
    fn harvest(&mut self) -> Vec<usize> {
        let mut pages = Vec::new();
        loop {
            let at = self.next % ENTRIES * 16;
            if self.entries.read::<u32>(at) & DIRTY == 0 {
                return pages;
            }
            std::sync::atomic::fence(Ordering::Acquire);
            assert_eq!(self.entries.read::<u32>(at + 4), 0);
            pages.push(self.entries.read::<u64>(at + 8) as usize);
            self.entries.write(at, RESET);
            self.next += 1;
        }
    }
}

fn machine(code: &[u8]) -> Machine {
    let cap = kvm_enable_cap {
        cap: KVM_CAP_DIRTY_LOG_RING,
        args: [(ENTRIES * 16) as u64, 0, 0, 0],
        ..Default::default()
    };
    Machine::with_cap(code, KVM_MEM_LOG_DIRTY_PAGES, &cap)
}

/// A store to each of many pages: the ring is full again and again, and every page is in it once.
#[test]
fn a_full_ring_ends_the_run() {
    const FIRST: usize = 0x20_0000 / PAGE;
    const COUNT: usize = 1000;
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(rsi, (FIRST * PAGE) as u64)?;
        a.mov(ecx, COUNT as i32)?;
        a.set_label(&mut top)?;
        a.mov(qword_ptr(rsi), rsi)?;
        a.add(rsi, PAGE as i32)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.out(i32::from(END), al)
    });
    let machine = machine(&code);
    let mut vcpu = machine.vcpu(0);
    let mut ring = Ring::of(&vcpu);
    let (mut all, mut full) = (Vec::new(), 0);
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => full += 1,
            VcpuExit::IoOut(END, _) => break,
            exit => panic!("{exit:?}"),
        }
        // Nothing is run until there is room.
        let rip = vcpu.get_regs().unwrap().rip;
        assert!(matches!(
            vcpu.run().unwrap(),
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)
        ));
        assert_eq!(vcpu.get_regs().unwrap().rip, rip);
        let pages = ring.harvest();
        assert!(pages.len() >= LIMIT, "{}", pages.len());
        assert!(matches!(
            vcpu.run().unwrap(),
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)
        ));
        assert_eq!(machine.vm.reset_dirty_rings(), Ok(pages.len() as u64));
        all.extend(pages);
    }
    all.extend(ring.harvest());
    assert!(full >= COUNT / ENTRIES, "{full}");
    all.retain(|page| *page >= FIRST);
    assert_eq!(all, (FIRST..FIRST + COUNT).collect::<Vec<_>>());
}

/// The same by the methods that there are for it.
#[test]
fn the_ring_is_read_by_an_iterator() {
    let code = assemble(|a| {
        a.mov(byte_ptr(0x20_0000), al)?;
        a.mov(byte_ptr(0x20_3000), al)?;
        a.out(i32::from(END), al)
    });
    let machine = machine(&code);
    let mut vcpu = machine.vcpu(0);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(END, _)));
    let all: Vec<_> = vcpu.dirty_log_ring_iter().unwrap().collect();
    assert!(all.ends_with(&[(0, 0x200), (0, 0x203)]), "{all:x?}");
    assert_eq!(vcpu.dirty_log_ring_iter().unwrap().count(), 0);
    assert_eq!(machine.vm.reset_dirty_rings(), Ok(all.len() as u64));
    assert!(Machine::new(&[]).vcpu(0).dirty_log_ring_iter().is_none());
}

/// As a live migration does with two processors: pages are collected, reset and copied while both write
/// everywhere, and once more when they have stopped.
#[test]
fn no_page_is_missed() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        // Each processor begins with another number: its stack pointer.
        a.mov(rbx, 0x9e37_79b9_7f4a_7c15u64)?;
        a.xor(rbx, rsp)?;
        a.mov(r15d, 60_000)?;
        a.set_label(&mut top)?;
        // An address among 1,500 pages, with room for 64 bytes: xorshift.
        next_random(a)?;
        a.mov(esi, ebx)?;
        a.and(esi, 0x3f_ff80)?;
        a.add(esi, 0x20_0000)?;
        a.mov(qword_ptr(rsi), rbx)?;
        a.movq(xmm1, rbx)?;
        a.movdqu(xmmword_ptr(rsi + 0xff9), xmm1)?;
        a.lock().add(qword_ptr(rsi + 0x2008), rbx)?;
        a.mov(rdi, rsi)?;
        a.mov(ecx, 5)?;
        a.rep().stosq()?;
        a.dec(r15d)?;
        a.jne(top)?;
        a.out(i32::from(END), al)
    });
    let machine = machine(&code);
    let mut vcpus = [machine.vcpu(0), machine.vcpu(1)];
    let mut rings = [Ring::of(&vcpus[0]), Ring::of(&vcpus[1])];
    let mut copied = vec![0; RAM];
    machine.ram.read_bytes(0, &mut copied);
    let ended = AtomicUsize::new(0);
    let mut collect = || {
        let pages: Vec<usize> = rings.iter_mut().flat_map(Ring::harvest).collect();
        let count = machine.vm.reset_dirty_rings().unwrap();
        assert_eq!(count, pages.len() as u64);
        for n in &pages {
            let page = &mut copied[n * PAGE..(n + 1) * PAGE];
            machine.ram.read_bytes(n * PAGE, page);
        }
        pages.len()
    };
    thread::scope(|scope| {
        for vcpu in &mut vcpus {
            scope.spawn(|| {
                loop {
                    match vcpu.run() {
                        Ok(VcpuExit::IoOut(END, _)) => break,
                        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => thread::yield_now(),
                        // So that the other thread does not wait for ever.
                        _ => break,
                    }
                }
                ended.fetch_add(1, Ordering::Release);
            });
        }
        let mut pages = 0;
        while ended.load(Ordering::Acquire) < 2 {
            pages += collect();
        }
        assert!(pages > 3000, "{pages}");
    });
    for vcpu in &vcpus {
        assert_eq!(vcpu.get_regs().unwrap().r15, 0, "{}", vcpu.dump());
    }
    while collect() > 0 {}
    for n in 0..RAM / PAGE {
        let mut page = [0; PAGE];
        machine.ram.read_bytes(n * PAGE, &mut page);
        assert!(page == copied[n * PAGE..(n + 1) * PAGE], "page {n:#x}");
    }
}
