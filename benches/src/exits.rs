//! The cost of an exit: real-mode guests that do nothing but leave, in a loop, through `KVM_RUN` of the
//! Rust API. One line for each kind: nanoseconds for one turn of the loop.

use std::time::Instant;

use anykvm::{Kvm, VcpuExit, VcpuFd, VmFd};
use anykvm_abi::kvm_userspace_memory_region;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const CODE: u64 = 0x1000;
const MEMORY: usize = 0x2000;
const WARM_UP: u32 = 10_000;
/// Short rounds and many of them: some are not interrupted even on a busy host.
const TURNS: u32 = 5_000;
const ROUNDS: u32 = 500;

/// A loop of one exit: its name and its code.
const LOOPS: &[(&str, &[u8])] = &[
    // out 0x10, al; jmp back
    ("out to a port", &[0xe6, 0x10, 0xeb, 0xfc]),
    // in al, 0x10; jmp back
    ("in from a port", &[0xe4, 0x10, 0xeb, 0xfc]),
    // mov [0x8000], al; jmp back: past the end of memory
    ("store to MMIO", &[0xa2, 0x00, 0x80, 0xeb, 0xfb]),
    // mov al, [0x8000]; jmp back
    ("load from MMIO", &[0xa0, 0x00, 0x80, 0xeb, 0xfb]),
];

fn main() {
    println!("{:<16} {:>10}", "exit", "ns");
    for (name, code) in LOOPS {
        println!("{name:<16} {:>10.1}", measure(code));
    }
}

/// Nanoseconds for one exit, in the fastest round.
fn measure(code: &[u8]) -> f64 {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
        .expect("a few pages of memory");
    memory
        .write_slice(code, GuestAddress(CODE))
        .expect("the code fits");
    let kvm = Kvm::new().expect("software KVM can always be opened");
    let vm = kvm.create_vm().expect("a VM");
    register(&vm, &memory);
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    let mut sregs = vcpu.get_sregs().expect("special registers");
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).expect("real mode");
    let mut regs = vcpu.get_regs().expect("registers");
    regs.rip = CODE;
    regs.rflags = 2;
    vcpu.set_regs(&regs).expect("an entry");

    run(&mut vcpu, WARM_UP);
    (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            run(&mut vcpu, TURNS);
            start.elapsed().as_secs_f64() * 1e9 / f64::from(TURNS)
        })
        .fold(f64::INFINITY, f64::min)
}

fn run(vcpu: &mut VcpuFd, turns: u32) {
    for _ in 0..turns {
        match vcpu.run().expect("KVM_RUN") {
            VcpuExit::IoOut(0x10, [_]) | VcpuExit::MmioWrite(0x8000, [_]) => {}
            VcpuExit::IoIn(0x10, [byte]) | VcpuExit::MmioRead(0x8000, [byte]) => *byte = 0,
            exit => panic!("unexpected exit {exit:?}"),
        }
    }
}

fn register(vm: &VmFd, memory: &GuestMemoryMmap<()>) {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory
            .get_host_address(GuestAddress(0))
            .expect("memory starts at 0") as u64,
    };
    // SAFETY: the mapping outlives the VM, which `measure` drops first, and is reached through volatile
    // accesses only.
    unsafe { vm.set_user_memory_region(region) }.expect("a memory slot");
}
