//! Requests and their arguments: structures near good ones, boundary numbers, bad pointers.

use std::os::fd::AsRawFd;

use anykvm::bindings::ioctl::*;
use anykvm::bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_userspace_memory_region,
};
use anykvm::{CAPABILITIES, IOCTLS, ObjectKind, UserMemory};

use super::Tape;
use super::door::Handle;
use super::memory::{Arena, RAM};
use super::state::size;

/// KVM_CAP_SPLIT_IRQCHIP with 24 pins.
pub fn split_irqchip() -> kvm_enable_cap {
    kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [24, 0, 0, 0],
        ..Default::default()
    }
}

/// A slot of all the RAM.
pub fn ram(arena: &Arena, logged: bool) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        flags: if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        memory_size: RAM as u64,
        userspace_addr: arena.ram.address(),
        ..Default::default()
    }
}

/// Mostly an ioctl of this kind of descriptor, sometimes another's, or none.
pub fn request(tape: &mut Tape, kind: ObjectKind) -> u32 {
    let own: Vec<_> = IOCTLS.iter().filter(|row| row.on == kind).collect();
    match tape.byte() {
        0..8 => IOCTLS[tape.below(IOCTLS.len())].request,
        8 => tape.number() as u32,
        9 if !own.is_empty() => own[tape.below(own.len())].request ^ 1 << (tape.byte() & 31),
        _ if own.is_empty() => IOCTLS[tape.below(IOCTLS.len())].request,
        _ => own[tape.below(own.len())].request,
    }
}

/// A word of a structure. Most are 0 or small, since most others are refused at once.
fn word(tape: &mut Tape, arena: &Arena) -> u64 {
    const EDGES: [u64; 16] = [
        1,
        0x7f,
        0xff,
        0x100,
        0xfff,
        0x1000,
        0xffff,
        0x10_0000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        0x7fff_ffff_ffff_f000,
        0x8000_0000_0000_0000,
        0xffff_ffff_ffff_f000,
        u64::MAX,
    ];
    match tape.byte() {
        0..140 => 0,
        140..190 => u64::from(tape.byte() & 0x1f),
        190..205 => u64::from(tape.byte()) << 12,
        205..230 => EDGES[tape.below(EDGES.len())],
        230..240 => pointer(tape, arena, 64),
        _ => tape.number(),
    }
}

/// Where an argument may be: good, misaligned, at the end of a page, read-only, nowhere.
fn pointer(tape: &mut Tape, arena: &Arena, len: usize) -> u64 {
    match tape.byte() {
        0..210 => arena.room(len),
        210..220 => arena.room(len + 8) + u64::from(tape.byte() & 7),
        220..228 => arena.end() - len as u64,
        228..236 => arena.end().wrapping_sub(tape.below(len + 1) as u64),
        236..242 => arena.read_only(),
        242..248 => arena.end() + u64::from(tape.byte()),
        248..252 => u64::MAX - u64::from(tape.byte()),
        _ => u64::from(tape.byte()) << 4,
    }
}

/// The call that reads what this one sets.
fn getter(request: u32) -> Option<u32> {
    Some(match request {
        KVM_SET_REGS => KVM_GET_REGS,
        KVM_SET_SREGS => KVM_GET_SREGS,
        KVM_SET_SREGS2 => KVM_GET_SREGS2,
        KVM_SET_FPU => KVM_GET_FPU,
        KVM_SET_XSAVE => KVM_GET_XSAVE,
        KVM_SET_XCRS => KVM_GET_XCRS,
        KVM_SET_DEBUGREGS => KVM_GET_DEBUGREGS,
        KVM_SET_VCPU_EVENTS => KVM_GET_VCPU_EVENTS,
        KVM_SET_MP_STATE => KVM_GET_MP_STATE,
        KVM_SET_LAPIC => KVM_GET_LAPIC,
        KVM_SET_CPUID2 => KVM_GET_CPUID2,
        KVM_SET_NESTED_STATE => KVM_GET_NESTED_STATE,
        KVM_SET_IRQCHIP => KVM_GET_IRQCHIP,
        KVM_SET_PIT => KVM_GET_PIT,
        KVM_SET_PIT2 => KVM_GET_PIT2,
        KVM_SET_CLOCK => KVM_GET_CLOCK,
        _ => return None,
    })
}

/// Bytes behind a structure that ends with a list: of an entry.
fn entry(request: u32) -> Option<usize> {
    Some(match request {
        KVM_GET_MSRS | KVM_SET_MSRS => 16,
        KVM_SET_CPUID => 24,
        KVM_SET_CPUID2 | KVM_GET_CPUID2 | KVM_GET_SUPPORTED_CPUID | KVM_GET_EMULATED_CPUID => 40,
        KVM_SET_GSI_ROUTING => 48,
        KVM_GET_MSR_INDEX_LIST | KVM_GET_MSR_FEATURE_INDEX_LIST => 4,
        KVM_SET_SIGNAL_MASK => 8,
        _ => return None,
    })
}

/// The argument of one call.
pub struct Argument(pub u64);

impl Argument {
    pub fn new(tape: &mut Tape, request: u32, handle: &Handle, arena: &Arena) -> Self {
        let len = size(request);
        if len == 0 || tape.byte() == 0 {
            return Self(word(tape, arena));
        }
        let list = entry(request).map_or(0, |entry| entry * (1 + tape.below(4)));
        let len = len + list;
        let at = pointer(tape, arena, len.max(256));
        let mut bytes = vec![0; len];
        let got = getter(request).filter(|_| tape.byte() & 3 != 0);
        match got {
            Some(getter) => Self::change_what_there_is(tape, getter, handle, arena, &mut bytes),
            None => {
                for chunk in bytes.chunks_mut(8) {
                    let word = word(tape, arena).to_le_bytes();
                    let len = chunk.len();
                    chunk.copy_from_slice(&word[..len]);
                }
            }
        }
        if list != 0 && got.is_none() {
            const COUNTS: [u32; 8] = [0, 1, 2, 3, 255, 256, 257, u32::MAX];
            bytes[..4].copy_from_slice(&COUNTS[tape.below(COUNTS.len())].to_ne_bytes());
        }
        adapt(tape, request, arena, &mut bytes);
        // Where the pointer is bad, so is this.
        let _ = arena.write(at, &bytes);
        Self(at)
    }

    /// What can be read now, with a few words changed.
    fn change_what_there_is(
        tape: &mut Tape,
        getter: u32,
        handle: &Handle,
        arena: &Arena,
        bytes: &mut [u8],
    ) {
        let room = size(getter).max(8 + 256 * 40);
        let from = arena.room(room);
        let header = match getter {
            KVM_GET_CPUID2 => 256,
            KVM_GET_NESTED_STATE => 4096 << 32,
            _ => u64::from(tape.byte() & 3),
        };
        arena.write(from, &header.to_ne_bytes()).expect("room");
        if handle.number(getter, from, arena).is_ok() {
            arena.read(from, bytes).expect("room");
        }
        for _ in 0..tape.byte() & 3 {
            let at = tape.below(bytes.len());
            let word = word(tape, arena).to_le_bytes();
            let n = word.len().min(bytes.len() - at);
            bytes[at..at + n].copy_from_slice(&word[..n]);
        }
    }
}

/// Makes some words likely ones; and memory that the guest is given must be memory that it may destroy.
fn adapt(tape: &mut Tape, request: u32, arena: &Arena, bytes: &mut [u8]) {
    let mut put = |at: usize, value: u64, len: usize| {
        if let Some(to) = bytes.get_mut(at..at + len) {
            to.copy_from_slice(&value.to_le_bytes()[..len]);
        }
    };
    match request {
        KVM_ENABLE_CAP => {
            let row = &CAPABILITIES[tape.below(CAPABILITIES.len())];
            put(0, row.nr.into(), 4);
        }
        KVM_GET_MSRS | KVM_SET_MSRS => {
            const SOME: [u32; 12] = [
                0x10,
                0x1b,
                0x3b,
                0x277,
                0x6e0,
                0x830,
                0xc000_0080,
                0xc000_0082,
                0x4b56_4d01,
                0x4b56_4d02,
                0x4b56_4d03,
                0x4b56_4d04,
            ];
            put(8, SOME[tape.below(SOME.len())].into(), 4);
            // An address with its enable bit, now and then.
            if tape.byte() & 3 == 0 {
                put(16, u64::from(tape.byte()) << 10 | 1, 8);
            }
        }
        KVM_SET_USER_MEMORY_REGION | KVM_SET_USER_MEMORY_REGION2 => {
            let pages = RAM / 4096;
            let (first, count) = (tape.below(pages), tape.below(pages));
            let count = count.min(pages - first);
            let mut address = arena.ram.address() + first as u64 * 4096;
            let mut size = count as u64 * 4096;
            match tape.byte() & 15 {
                // Refused, whatever it leads to.
                0 => address += 1,
                1 => address = !0xfff,
                2 => size += 8,
                _ => {}
            }
            put(16, size, 8);
            put(24, address, 8);
        }
        // Memory of the VM's own, not too much of it.
        KVM_SET_MEMORY_REGION => {
            let pages = tape.below(64) as u64;
            put(16, pages << 12 | u64::from(tape.byte() & 15 == 0), 8);
        }
        KVM_CREATE_DEVICE if tape.byte() & 3 != 0 => put(0, 4, 4),
        KVM_SET_SIGNAL_MASK if tape.byte() & 3 != 0 => put(0, 8, 4),
        KVM_IRQFD | KVM_IOEVENTFD => {
            let fd = |tape: &mut Tape| match tape.byte() & 7 {
                0 => u64::MAX,
                1 => tape.number(),
                n => arena.eventfds[usize::from(n) & 1].as_raw_fd() as u64,
            };
            let fds = [fd(tape), fd(tape)];
            if request == KVM_IRQFD {
                put(0, fds[0], 4);
                put(12, fds[1], 4);
            } else {
                put(16, [0u64, 1, 2, 4, 8, 3][tape.below(6)], 4);
                put(20, fds[0], 4);
            }
        }
        KVM_GET_DIRTY_LOG | KVM_CLEAR_DIRTY_LOG => {
            let at = size(request) - 8;
            let bitmap = pointer(tape, arena, 64);
            put(at, bitmap, 8);
            if tape.byte() & 1 == 0 {
                put(0, 64 << 32, 8);
                put(8, 0, at - 8);
            }
        }
        KVM_X86_SET_MSR_FILTER => {
            let bitmap = pointer(tape, arena, 64);
            put(24, bitmap, 8);
        }
        KVM_XEN_HVM_CONFIG => {
            let blobs = [pointer(tape, arena, 4096), pointer(tape, arena, 4096)];
            put(8, blobs[0], 8);
            put(16, blobs[1], 8);
        }
        _ => {}
    }
}
