//! The cost of an exit: real-mode guests that do nothing but leave, in a loop, through `KVM_RUN` of the
//! Rust API. One line for each kind: nanoseconds for one turn of the loop. Then the same for a guest that
//! wants to know its stolen time, and for its KVM_RUN after the monitor has kept it waiting.

use std::time::{Duration, Instant};

use anykvm::{Kvm, VcpuExit, VcpuFd, VmFd};
use anykvm_abi::{MSR_KVM_STEAL_TIME, Msrs, kvm_msr_entry, kvm_userspace_memory_region};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const CODE: u64 = 0x1000;
const MEMORY: usize = 0x2000;
const STEAL_TIME: u64 = 0x1800;
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

/// A pause after which KVM_RUN waits to be told what was stolen meanwhile.
const PAUSE: Duration = Duration::from_micros(300);
const PAUSES: u32 = 200;

fn main() {
    println!("{:<32} {:>10}", "exit", "ns");
    for (name, code) in LOOPS {
        let fastest = with_vcpu(code, false, fastest_turn);
        println!("{name:<32} {fastest:>10.1}");
    }
    let (name, code) = LOOPS[0];
    let fastest = with_vcpu(code, true, fastest_turn);
    println!("{:<32} {fastest:>10.1}", format!("{name}, stolen time"));
    let fastest = with_vcpu(code, true, fastest_after_pause);
    println!("{:<32} {fastest:>10.1}", "  after 0.3 ms in the monitor");
}

/// Makes a guest of this code, which may want to know its stolen time.
fn with_vcpu(code: &[u8], steal_time: bool, measure: fn(&mut VcpuFd) -> f64) -> f64 {
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
    if steal_time {
        let msrs = Msrs::from_entries(&[kvm_msr_entry {
            index: MSR_KVM_STEAL_TIME,
            data: STEAL_TIME | 1,
            ..Default::default()
        }]);
        let set = vcpu.set_msrs(&msrs.expect("one MSR"));
        assert_eq!(set, Ok(1), "the host counts run delay");
    }
    run(&mut vcpu, WARM_UP);
    measure(&mut vcpu)
}

/// Nanoseconds for one exit, in the fastest round.
fn fastest_turn(vcpu: &mut VcpuFd) -> f64 {
    (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            run(vcpu, TURNS);
            start.elapsed().as_secs_f64() * 1e9 / f64::from(TURNS)
        })
        .fold(f64::INFINITY, f64::min)
}

/// Nanoseconds for the exit that follows a pause.
fn fastest_after_pause(vcpu: &mut VcpuFd) -> f64 {
    (0..PAUSES)
        .map(|_| {
            let pause = Instant::now();
            while pause.elapsed() < PAUSE {
                std::hint::spin_loop();
            }
            let start = Instant::now();
            run(vcpu, 1);
            start.elapsed().as_secs_f64() * 1e9
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
    // SAFETY: the mapping outlives the VM, which `with_vcpu` drops first, and is reached through volatile
    // accesses only.
    unsafe { vm.set_user_memory_region(region) }.expect("a memory slot");
}
