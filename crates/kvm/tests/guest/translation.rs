//! Where translated code is kept, and what happens where there may be none.

use std::process::Command;
use std::time::{Duration, Instant};

use anykvm::bindings::kvm_regs;
use anykvm::{Errno, Translation, TranslationMode, VcpuExit, VcpuFd};

use crate::{CODE, Guest};

const PML4: u64 = 0x3000;
const PDPT: u64 = 0x4000;
const DIRECTORY: u64 = 0x5000;

/// A guest with this code, and a vCPU in front of it in 64-bit mode.
fn guest(mode: TranslationMode, code: &[u8]) -> (Guest, VcpuFd) {
    let how = Translation {
        mode,
        ..Translation::default()
    };
    guest_with(how, code)
}

/// The same, run in this way.
fn guest_with(how: Translation, code: &[u8]) -> (Guest, VcpuFd) {
    let guest = Guest::new();
    guest.vm.set_translation(how).unwrap();
    guest.ram.write_bytes(CODE as usize, code);
    for (at, entry) in [(PML4, PDPT | 3), (PDPT, DIRECTORY | 3), (DIRECTORY, 0x83)] {
        guest.ram.write_bytes(at as usize, &entry.to_le_bytes());
    }
    let vcpu = guest.vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr0 = 0x8000_0011;
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    sregs.cs.base = 0;
    sregs.cs.selector = 8;
    (sregs.cs.l, sregs.cs.db, sregs.cs.g) = (1, 0, 1);
    (sregs.cs.type_, sregs.cs.s) = (11, 1);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs {
        rip: CODE,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    (guest, vcpu)
}

/// inc rax; jmp back
const LOOP: &[u8] = &[0x48, 0xff, 0xc0, 0xeb, 0xfb];

#[test]
fn no_page_is_writable_and_executable() {
    let (_guest, mut vcpu) = guest(TranslationMode::Always, LOOP);
    let stats = vcpu.stats().clone();
    let kick = vcpu.kick_handle();
    std::thread::scope(|scope| {
        let runner = scope.spawn(move || vcpu.run().map(|_| ()));
        let until = Instant::now() + Duration::from_millis(100);
        while Instant::now() < until {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let rights = |line: &&str| line.split(' ').nth(1).unwrap_or_default().to_owned();
            assert!(maps.contains("anykvm-code"), "{maps}");
            for line in maps.lines() {
                let rights = rights(&line);
                assert!(!(rights.contains('w') && rights.contains('x')), "{line}");
            }
        }
        kick.kick();
        assert_eq!(runner.join().unwrap().unwrap_err().errno(), libc::EINTR);
    });
    let values = stats.values();
    let value = |name| values.iter().find(|v| v.0 == name).unwrap().1;
    assert_eq!(value("jit_blocks"), 1, "{values:?}");
    assert!(value("jit_code_bytes") > 0);
    assert!(value("engine_memory_bytes") > value("jit_code_bytes"));
}

#[test]
fn how_guest_code_runs_is_set_before_the_first_vcpu() {
    let (guest, _vcpu) = guest(TranslationMode::Off, LOOP);
    let how = Translation::default();
    assert_eq!(guest.vm.set_translation(how), Err(Errno::EBUSY));
    let other = Guest::new();
    let how = Translation {
        cache: Translation::MIN_CACHE - 1,
        ..Translation::default()
    };
    assert_eq!(other.vm.set_translation(how), Err(Errno::EINVAL));
}

const CHILD: &str = "translation::a_child_that_may_map_nothing_executable";

#[test]
fn a_host_without_executable_memory_gets_the_interpreter() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", CHILD, "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let lines = said
        .lines()
        .filter(|l| l.contains("interpreted, not translated"));
    assert_eq!(lines.count(), 1, "{said}");
    assert!(said.contains("executable memory"), "{said}");
}

#[test]
#[ignore = "run by a_host_without_executable_memory_gets_the_interpreter, in a process of its own"]
fn a_child_that_may_map_nothing_executable() {
    refuse_executable_memory();
    // mov eax, 40; add eax, 2; out 0x99, al
    let code = [0xb8, 40, 0, 0, 0, 0x83, 0xc0, 2, 0xe6, 0x99];
    for _ in 0..2 {
        let (_guest, mut vcpu) = guest(TranslationMode::Always, &code);
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x99, data) => assert_eq!(data, [42]),
            exit => panic!("{exit:?}"),
        }
        let values = vcpu.stats().values();
        assert!(values.contains(&("jit_blocks", 0)), "{values:?}");
        assert!(values.contains(&("jit_entries", 0)), "{values:?}");
    }
}

/// From now on this thread and those it starts may make no memory executable: mmap and mprotect with
/// PROT_EXEC fail with EPERM (seccomp(2)).
fn refuse_executable_memory() {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const HAS: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
    const ANSWER: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // In struct seccomp_data: the number, and the low half of the third argument.
    let mut filter = [
        op(LOAD, 0, 0, 0),
        op(EQUAL, 1, 0, libc::SYS_mmap as u32),
        op(EQUAL, 0, 2, libc::SYS_mprotect as u32),
        op(LOAD, 0, 0, 32),
        op(HAS, 1, 0, libc::PROT_EXEC as u32),
        op(ANSWER, 0, 0, libc::SECCOMP_RET_ALLOW),
        op(ANSWER, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program is valid for the call; the filter only makes mappings fail.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &program), 0);
    }
}

#[test]
fn the_hottest_blocks_are_listed_with_their_code() {
    let path = std::env::temp_dir().join(format!("anykvm-report-{}", std::process::id()));
    // mov ecx, 1000; 1: inc rax; loop 1b; out 0x99, al
    let code = [
        0xb9, 0xe8, 3, 0, 0, 0x48, 0xff, 0xc0, 0xe2, 0xfb, 0xe6, 0x99,
    ];
    let how = Translation {
        mode: TranslationMode::Always,
        report: Some(path.clone()),
        ..Translation::default()
    };
    let (_guest, mut vcpu) = guest_with(how, &code);
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x99, [0xe8]) => {}
        exit => panic!("{exit:?}"),
    }
    drop(vcpu);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let first = text.split("\n1. ").nth(1).unwrap();
    assert!(
        first.starts_with("at 0x1005: 999 times 2 instructions"),
        "{text}"
    );
    assert!(first.contains("inc %rax"), "{text}");
    assert!(first.contains(" host:\n"), "{text}");
}
