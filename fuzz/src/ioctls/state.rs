//! Everything that can be read of a VM and its vCPUs, but for what moves by itself.

use anykvm::bindings::ioctl::*;
use anykvm::bindings::{KVM_CAP_XSAVE2, kvm_msr_entry};
use anykvm::{ObjectKind, UserMemory};

use super::door::Handle;
use super::memory::Arena;

/// What was read: whose, by which ioctl, the bytes.
pub struct State(Vec<(usize, &'static str, Vec<u8>)>);

/// Structures that a vCPU is read by.
const VCPU: &[u32] = &[
    KVM_GET_MP_STATE,
    KVM_GET_REGS,
    KVM_GET_SREGS2,
    KVM_GET_FPU,
    KVM_GET_XCRS,
    KVM_GET_DEBUGREGS,
    KVM_GET_VCPU_EVENTS,
];
/// Of the local APIC, what does not count down.
const LAPIC: std::ops::Range<usize> = 0x20..0x380;
/// MSRs that stay as they are: APIC base, SYSENTER, PAT, EFER, SYSCALL, KVM's own.
const MSRS: &[u32] = &[
    0x1b,
    0x174,
    0x175,
    0x176,
    0x277,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0102,
    0x4b56_4d01,
    0x4b56_4d02,
    0x4b56_4d03,
    0x4b56_4d04,
    0x4b56_4d05,
    0x4b56_4d06,
];

/// The size of a request's argument.
pub fn size(request: u32) -> usize {
    (request >> 16) as usize & 0x3fff
}

impl State {
    pub fn read(handles: &[Handle], arena: &Arena) -> Self {
        let mut state = Self(Vec::new());
        let xsave = handles[0].number(KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2.into(), arena);
        for (i, handle) in handles.iter().enumerate() {
            match handle.kind() {
                ObjectKind::Vcpu => {
                    state.read_vcpu(i, handle, arena, xsave.unwrap_or(4096) as usize)
                }
                ObjectKind::Vm => state.read_vm(i, handle, arena),
                _ => {}
            }
        }
        state
    }

    fn push(&mut self, whose: usize, name: &'static str, bytes: Vec<u8>) {
        self.0.push((whose, name, bytes));
    }

    /// What a request fills; nothing if it is refused.
    fn fetch(handle: &Handle, arena: &Arena, request: u32, len: usize) -> Vec<u8> {
        let at = arena.room(len);
        let mut bytes = vec![0; len];
        match handle.number(request, at, arena) {
            Ok(_) => arena.read(at, &mut bytes).expect("room"),
            Err(_) => bytes.clear(),
        }
        bytes
    }

    fn read_vcpu(&mut self, i: usize, handle: &Handle, arena: &Arena, xsave: usize) {
        for request in VCPU {
            let bytes = Self::fetch(handle, arena, *request, size(*request));
            self.push(i, name(*request).unwrap_or("?"), bytes);
        }
        self.push(
            i,
            "KVM_GET_XSAVE2",
            Self::fetch(handle, arena, KVM_GET_XSAVE2, xsave),
        );
        let lapic = Self::fetch(handle, arena, KVM_GET_LAPIC, size(KVM_GET_LAPIC));
        let still = lapic.get(LAPIC).unwrap_or(&[]).to_vec();
        self.push(i, "KVM_GET_LAPIC", still);
        let khz = handle.number(KVM_GET_TSC_KHZ, 0, arena).unwrap_or(-1);
        self.push(i, "KVM_GET_TSC_KHZ", khz.to_ne_bytes().to_vec());

        let entry = size_of::<kvm_msr_entry>();
        let at = arena.room(8 + MSRS.len() * entry);
        let mut bytes = vec![0; 8 + MSRS.len() * entry];
        bytes[0] = MSRS.len() as u8;
        for (n, msr) in MSRS.iter().enumerate() {
            bytes[8 + n * entry..][..4].copy_from_slice(&msr.to_ne_bytes());
        }
        arena.write(at, &bytes).expect("room");
        // Whatever there is of them: the number comes back.
        let n = handle.number(KVM_GET_MSRS, at, arena).unwrap_or(-1);
        arena.read(at, &mut bytes).expect("room");
        bytes.extend(n.to_ne_bytes());
        self.push(i, "KVM_GET_MSRS", bytes);

        let room = arena.room(8 + 256 * 40);
        arena.write(room, &256u64.to_ne_bytes()).expect("room");
        let mut bytes = vec![0; 8 + 256 * 40];
        if handle.number(KVM_GET_CPUID2, room, arena).is_ok() {
            arena.read(room, &mut bytes).expect("room");
            let count = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
            bytes.truncate(8 + count * 40);
            self.push(i, "KVM_GET_CPUID2", bytes);
        }
    }

    fn read_vm(&mut self, i: usize, handle: &Handle, arena: &Arena) {
        let khz = handle.number(KVM_GET_TSC_KHZ, 0, arena).unwrap_or(-1);
        let pages = handle.number(KVM_GET_NR_MMU_PAGES, 0, arena).unwrap_or(-1);
        self.push(
            i,
            "numbers",
            [khz.to_ne_bytes(), pages.to_ne_bytes()].concat(),
        );
        let with_pit = !Self::fetch(handle, arena, KVM_GET_PIT2, size(KVM_GET_PIT2)).is_empty();
        for chip in 0..3u64 {
            let at = arena.room(size(KVM_GET_IRQCHIP));
            arena.write(at, &chip.to_ne_bytes()).expect("room");
            let mut bytes = vec![0; size(KVM_GET_IRQCHIP)];
            // A PIT that runs raises interrupts.
            if !with_pit && handle.number(KVM_GET_IRQCHIP, at, arena).is_ok() {
                arena.read(at, &mut bytes).expect("room");
                self.push(i, "KVM_GET_IRQCHIP", bytes);
            }
        }
        let Some(vm) = handle.vm() else {
            return;
        };
        let mut slots = Vec::new();
        for space in 0..2 {
            for slot in vm.memory().map(space).slots() {
                slots.extend([slot.gpa, slot.size, slot.host(), slot.readonly.into()]);
            }
        }
        let bytes = slots.iter().flat_map(|n| n.to_ne_bytes()).collect();
        self.push(i, "memory slots", bytes);
    }

    /// What is not the same.
    pub fn difference(&self, other: &Self) -> Option<String> {
        for (a, b) in self.0.iter().zip(&other.0) {
            if a != b {
                let at = a.2.iter().zip(&b.2).position(|(x, y)| x != y);
                return Some(format!(
                    "what {} of descriptor {} reads, at {at:?}",
                    a.1, a.0
                ));
            }
        }
        (self.0.len() != other.0.len()).then(|| "what can be read".to_owned())
    }
}
