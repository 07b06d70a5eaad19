//! Kicks from another thread at any moment, through the library: none is lost, none ends KVM_RUN twice, and no exit is
//! lost or comes twice. `ANYKVM_KICKS` says how many; `cargo xtask signals` gives a million.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use anykvm::{Errno, TranslationMode, VcpuExit};

use crate::Guest;

/// Loops: their name, and their code.
const LOOPS: &[(&str, &[u8])] = &[
    // inc ecx; add eax, ecx; jmp back
    ("compute", &[0x66, 0x41, 0x66, 0x01, 0xc8, 0xeb, 0xf9]),
    // hlt; jmp back, with the interrupt controllers in the kernel
    ("halted", &[0xf4, 0xeb, 0xfd]),
    // inc ecx; hlt; jmp back
    ("hlt", &[0x66, 0x41, 0xf4, 0xeb, 0xfb]),
    // inc ecx; mov eax, ecx; out 0x10, eax; jmp back
    (
        "out",
        &[0x66, 0x41, 0x66, 0x89, 0xc8, 0x66, 0xe7, 0x10, 0xeb, 0xf6],
    ),
    // inc ecx; mov [0x8000], ecx; mov eax, [0x8000]; jmp back
    (
        "mmio",
        &[
            0x66, 0x41, 0x66, 0x89, 0x0e, 0x00, 0x80, 0x66, 0xa1, 0x00, 0x80, 0xeb, 0xf3,
        ],
    ),
];

fn kicks() -> u64 {
    let given = std::env::var("ANYKVM_KICKS").ok();
    given.map_or(20_000, |n| n.parse().expect("a number in ANYKVM_KICKS"))
}

#[test]
fn none_is_lost() {
    let modes = [TranslationMode::Off, TranslationMode::Always];
    let each = kicks().div_ceil((LOOPS.len() * modes.len()) as u64);
    for (name, code) in LOOPS {
        for mode in modes {
            stress(name, code, mode, each);
        }
    }
}

fn stress(name: &str, code: &[u8], mode: TranslationMode, kicks: u64) {
    let guest = Guest::new();
    let how = anykvm::Translation {
        mode,
        ..Default::default()
    };
    guest.vm.set_translation(how).unwrap();
    if name == "halted" {
        guest.vm.create_irq_chip().unwrap();
    }
    let mut vcpu = guest.vcpu(code);
    let asked = AtomicU64::new(0);
    let (answer, answers) = mpsc::channel();
    let kick = vcpu.kick_handle();
    let (mut interrupts, mut exits, mut answered) = (0, 0, 0);
    thread::scope(|scope| {
        let asked = &asked;
        scope.spawn(move || {
            let (mut random, mut answered) = (12345u32, 0);
            for i in 1..=kicks {
                random = random.wrapping_mul(1_103_515_245).wrapping_add(12345);
                // Half of them one by one, half in crowds.
                let before = if i & 64 != 0 { 1 } else { 32.min(i) };
                while answered < i - before {
                    answered = answers.recv().unwrap();
                }
                for _ in 0..random >> (20 + i % 8) {
                    std::hint::spin_loop();
                }
                asked.store(i, Ordering::SeqCst);
                kick.kick();
            }
        });
        while answered < kicks {
            match vcpu.run() {
                Err(Errno::EINTR) => {
                    interrupts += 1;
                    assert!(interrupts <= asked.load(Ordering::SeqCst), "{name}");
                    answered = asked.load(Ordering::SeqCst);
                    // The other thread has gone when it has sent its last.
                    let _ = answer.send(answered);
                    continue;
                }
                Ok(VcpuExit::Hlt) => assert_eq!(name, "hlt"),
                Ok(VcpuExit::IoOut(0x10, data)) => {
                    assert_eq!(data, (exits as u32 + 1).to_le_bytes(), "{name}");
                }
                Ok(VcpuExit::MmioWrite(0x8000, data)) => {
                    assert_eq!(data, (exits as u32 / 2 + 1).to_le_bytes(), "{name}");
                    assert_eq!(exits % 2, 0);
                }
                Ok(VcpuExit::MmioRead(0x8000, data)) => {
                    data.copy_from_slice(&(exits as u32 / 2 + 1).to_le_bytes());
                    assert_eq!(exits % 2, 1);
                }
                other => panic!("{name}: {other:?}"),
            }
            exits += 1u64;
        }
    });
    // Completes the last exit; a kick that came behind the last EINTR may be first.
    vcpu.set_kvm_immediate_exit(1);
    assert!(matches!(vcpu.run(), Err(Errno::EINTR)));
    let regs = vcpu.get_regs().unwrap();
    let (n, sum) = (u64::from(regs.rcx as u32), regs.rax as u32);
    match name {
        "compute" => {
            let late = if regs.rip == crate::CODE + 2 { n } else { 0 };
            assert_eq!(sum, (n * (n + 1) / 2).wrapping_sub(late) as u32);
        }
        "hlt" | "out" => assert!(n - exits <= 1, "{name}: {n} counted, {exits} seen"),
        "mmio" => assert!(2 * n - exits <= 2, "{n} counted, {exits} seen"),
        _ => {}
    }
}
