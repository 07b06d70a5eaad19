//! KVM_RUN end to end: small real-mode guests, their exits, and what is open between two entries.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anykvm_abi::*;
use anykvm_cpu::memory::mapping::Mapping;
use anykvm_cpu::memory::{MemoryMap, Slot};

use crate::error::Errno;
use crate::system::System;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

const RAM: u64 = 0x10000;
const CODE: u64 = 0x1000;

/// A VM with 64 KiB of RAM and this code at 0x1000.
fn vm(code: &[u8]) -> Arc<Vm> {
    let vm = System::new().unwrap().create_vm(0).unwrap();
    let ram = Arc::new(Mapping::anonymous(RAM as usize).unwrap());
    ram.write_bytes(CODE as usize, code);
    let slot = Slot::owned(0, 0, RAM, ram, 0, false, None).unwrap();
    let map = MemoryMap::new(vec![Arc::new(slot)]).unwrap();
    vm.memory().replace(0, map, None);
    vm
}

/// Its first vCPU, in real mode at the code, with flat zero-based segments.
fn vcpu_of(vm: &Arc<Vm>) -> Arc<Vcpu> {
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.sregs();
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        segment.base = 0;
        segment.selector = 0;
    }
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs {
        rip: CODE,
        rflags: 2,
        rsp: 0x8000,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    vcpu
}

fn vcpu(code: &[u8]) -> Arc<Vcpu> {
    vcpu_of(&vm(code))
}

fn reason(vcpu: &Vcpu) -> u32 {
    vcpu.machine().run().exit_reason()
}

/// Enters with immediate_exit until EINTR: completes what is open and nothing else.
fn settle(vcpu: &Vcpu) {
    vcpu.machine().run().set_immediate_exit(1);
    while vcpu.run() != Err(Errno::EINTR) {}
    vcpu.machine().run().set_immediate_exit(0);
}

#[test]
fn two_numbers_are_added_and_written_to_a_port() {
    // mov dx, 0x3f8; add al, bl; add al, '0'; out dx, al; mov al, '\n'; out dx, al; hlt
    let vcpu = vcpu(&[
        0xba, 0xf8, 0x03, 0x00, 0xd8, 0x04, b'0', 0xee, 0xb0, b'\n', 0xee, 0xf4,
    ]);
    let mut regs = vcpu.regs();
    (regs.rax, regs.rbx) = (2, 3);
    vcpu.set_regs(&regs).unwrap();
    let page = vcpu.machine().run();
    let mut out = vec![];
    loop {
        vcpu.run().unwrap();
        if reason(&vcpu) == KVM_EXIT_HLT {
            break;
        }
        assert_eq!(reason(&vcpu), KVM_EXIT_IO);
        assert_eq!(
            (page.io_direction(), page.io_size(), page.io_port()),
            (KVM_EXIT_IO_OUT as u8, 1, 0x3f8)
        );
        assert_eq!((page.io_count(), page.io_data_offset()), (1, 4096));
        let mut byte = [0];
        page.read_pio(&mut byte);
        out.push(byte[0]);
    }
    assert_eq!(out, b"5\n");
    assert_eq!(vcpu.regs().rip, CODE + 12);
    assert_eq!(
        (page.if_flag(), page.ready_for_interrupt_injection()),
        (0, 0)
    );
}

#[test]
fn port_input_completes_on_reentry() {
    // in ax, 0x40; hlt
    let vcpu = vcpu(&[0xe5, 0x40, 0xf4]);
    vcpu.run().unwrap();
    let page = vcpu.machine().run();
    assert_eq!(
        (reason(&vcpu), page.io_direction(), page.io_size()),
        (KVM_EXIT_IO, KVM_EXIT_IO_IN as u8, 2)
    );
    assert_eq!(vcpu.regs().rip, CODE, "not complete yet");
    page.write_pio(&0xbeefu16.to_le_bytes());
    settle(&vcpu);
    assert_eq!((vcpu.regs().rip, vcpu.regs().rax), (CODE + 2, 0xbeef));
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_HLT);
}

#[test]
fn moved_rip_drops_the_rest() {
    // in al, 0x40; hlt; hlt
    let vcpu = vcpu(&[0xe4, 0x40, 0xf4, 0xf4]);
    vcpu.run().unwrap();
    vcpu.machine().run().write_pio(&[0x55]);
    let mut regs = vcpu.regs();
    regs.rip = CODE + 3;
    vcpu.set_regs(&regs).unwrap();
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_HLT);
    assert_eq!((vcpu.regs().rip, vcpu.regs().rax), (CODE + 4, 0));
}

#[test]
fn mmio_store_has_retired_and_load_has_not() {
    // mov eax, [0x20000] needs a 32-bit address: a32 mov al, [disp32]; a32 mov [disp32], al; hlt
    let vcpu = vcpu(&[0x67, 0xa0, 0, 0, 2, 0, 0x67, 0xa2, 4, 0, 2, 0, 0xf4]);
    // Real mode's limit of 64 KiB would fault: unreal mode.
    let mut sregs = vcpu.sregs();
    sregs.ds.limit = u32::MAX;
    sregs.ds.g = 1;
    vcpu.set_sregs(&sregs).unwrap();
    let page = vcpu.machine().run();
    vcpu.run().unwrap();
    assert_eq!(
        (
            reason(&vcpu),
            page.mmio_phys_addr(),
            page.mmio_len(),
            page.mmio_is_write()
        ),
        (KVM_EXIT_MMIO, 0x20000, 1, 0)
    );
    assert_eq!(vcpu.regs().rip, CODE);
    page.set_mmio_data(0x77);
    vcpu.run().unwrap();
    assert_eq!(
        (reason(&vcpu), page.mmio_phys_addr(), page.mmio_is_write()),
        (KVM_EXIT_MMIO, 0x20004, 1)
    );
    assert_eq!(page.mmio_data() as u8, 0x77);
    assert_eq!(vcpu.regs().rip, CODE + 12);
    settle(&vcpu);
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_HLT);
}

#[test]
fn string_output_is_packed() {
    // mov si, 0x2000; mov cx, 3; mov dx, 0x50; cld; rep outsw; hlt
    let vcpu = vcpu(&[
        0xbe, 0, 0x20, 0xb9, 3, 0, 0xba, 0x50, 0, 0xfc, 0xf3, 0x6f, 0xf4,
    ]);
    vcpu.vm().memory().write(0x2000, b"abcdef").unwrap();
    let page = vcpu.machine().run();
    let mut out = vec![];
    loop {
        vcpu.run().unwrap();
        if reason(&vcpu) != KVM_EXIT_IO {
            break;
        }
        assert_eq!(page.io_size(), 2);
        let mut data = vec![0; 2 * page.io_count() as usize];
        page.read_pio(&mut data);
        out.extend(data);
    }
    assert_eq!(out, b"abcdef");
    assert_eq!((vcpu.regs().rcx, vcpu.regs().rsi), (0, 0x2006));
}

#[test]
fn string_input_is_packed() {
    // mov di, 0x2000; mov cx, 4; mov dx, 0x50; cld; rep insb; hlt
    let vcpu = vcpu(&[
        0xbf, 0, 0x20, 0xb9, 4, 0, 0xba, 0x50, 0, 0xfc, 0xf3, 0x6c, 0xf4,
    ]);
    let page = vcpu.machine().run();
    let mut left = &b"wxyz"[..];
    loop {
        vcpu.run().unwrap();
        if reason(&vcpu) != KVM_EXIT_IO {
            break;
        }
        let n = page.io_count() as usize;
        page.write_pio(&left[..n]);
        left = &left[n..];
    }
    let mut memory = [0; 4];
    vcpu.vm().memory().read(0x2000, &mut memory).unwrap();
    assert_eq!((&memory, left.len()), (b"wxyz", 0));
}

#[test]
fn a_kick_ends_run_once() {
    // jmp $
    let vcpu = vcpu(&[0xeb, 0xfe]);
    let handle = vcpu.kick_handle();
    handle.kick();
    assert_eq!(vcpu.run(), Err(Errno::EINTR));
    assert_eq!(reason(&vcpu), KVM_EXIT_INTR);
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        handle.kick();
    });
    let start = Instant::now();
    assert_eq!(vcpu.run(), Err(Errno::EINTR));
    assert!(start.elapsed() >= Duration::from_millis(15));
    kicker.join().unwrap();
}

#[test]
fn an_interrupt_window_opens_behind_the_shadow() {
    // sti; nop; nop; jmp $
    let vcpu = vcpu(&[0xfb, 0x90, 0x90, 0xeb, 0xfe]);
    vcpu.machine().run().set_request_interrupt_window(1);
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_IRQ_WINDOW_OPEN);
    let page = vcpu.machine().run();
    assert_eq!(
        (page.if_flag(), page.ready_for_interrupt_injection()),
        (1, 1)
    );
    assert_eq!(vcpu.regs().rip, CODE + 2);
    page.set_request_interrupt_window(0);
    // Vector 0x21's handler, at 0:0x3000, is hlt.
    vcpu.vm()
        .memory()
        .write(0x21 * 4, &[0, 0x30, 0, 0])
        .unwrap();
    vcpu.vm().memory().write(0x3000, &[0xf4]).unwrap();
    vcpu.interrupt(0x21).unwrap();
    assert_eq!(vcpu.interrupt(256), Err(Errno::EINVAL));
    vcpu.run().unwrap();
    assert_eq!((reason(&vcpu), vcpu.regs().rip), (KVM_EXIT_HLT, 0x3001));
}

#[test]
fn triple_fault_shuts_down() {
    // lidt [0x2000] with limit 0; int3
    let vcpu = vcpu(&[0x0f, 0x01, 0x1e, 0, 0x20, 0xcc]);
    let mut sregs = vcpu.sregs();
    sregs.ss.limit = 0xffff;
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_SHUTDOWN);
}

#[test]
fn single_step_reports_each_instruction() {
    // nop; nop; hlt
    let vcpu = vcpu(&[0x90, 0x90, 0xf4]);
    let mut debug = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
        ..Default::default()
    };
    vcpu.set_guest_debug(&debug).unwrap();
    let page = vcpu.machine().run();
    for n in 1..=2 {
        vcpu.run().unwrap();
        assert_eq!((reason(&vcpu), page.debug_exception()), (KVM_EXIT_DEBUG, 1));
        assert_eq!(page.debug_pc(), CODE + n);
        assert_ne!(page.debug_dr6() & 1 << 14, 0);
    }
    debug.control = 0;
    vcpu.set_guest_debug(&debug).unwrap();
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_HLT);
    debug.control = 1 << 31;
    assert_eq!(vcpu.set_guest_debug(&debug), Err(Errno::EINVAL));
}

#[test]
fn synchronised_registers_go_both_ways() {
    // inc ax; hlt
    let vcpu = vcpu(&[0x40, 0xf4]);
    let page = vcpu.machine().run();
    page.set_kvm_valid_regs(u64::from(KVM_SYNC_X86_REGS));
    let mut regs = vcpu.regs();
    regs.rax = 41;
    page.sync_write(crate::run_page::sync::REGS, &regs);
    page.set_kvm_dirty_regs(u64::from(KVM_SYNC_X86_REGS));
    vcpu.run().unwrap();
    let after: kvm_regs = page.sync_read(crate::run_page::sync::REGS);
    assert_eq!((after.rax, page.kvm_dirty_regs()), (42, 0));
    page.set_kvm_valid_regs(1 << 20);
    assert_eq!(vcpu.run(), Err(Errno::EINVAL));
}

#[test]
fn application_processors_wait_for_init_and_sipi() {
    // at 0x1000: hlt is reached by the SIPI of vector 1.
    let vm = vm(&[0xb8, 0x34, 0x12, 0xe7, 0x10, 0xf4]);
    vm.create_controllers(anykvm_irqchip::ChipMode::Full)
        .unwrap();
    let _bsp = vm.create_vcpu(0).unwrap();
    let ap = vm.create_vcpu(1).unwrap();
    assert_eq!(ap.mp_state(), KVM_MP_STATE_UNINITIALIZED);
    ap.kick_handle().kick();
    assert_eq!(ap.run(), Err(Errno::EINTR));
    use anykvm_irqchip::VcpuEvents;
    ap.requests().init();
    assert_eq!(ap.run(), Err(Errno::EAGAIN));
    assert_eq!(ap.mp_state(), KVM_MP_STATE_INIT_RECEIVED);
    let sender = {
        let ap = ap.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            ap.requests().sipi(1);
        })
    };
    ap.run().unwrap();
    assert_eq!((reason(&ap), ap.regs().rax), (KVM_EXIT_IO, 0x1234));
    assert_eq!(ap.sregs().cs.base, 0x1000);
    sender.join().unwrap();
}

/// KVM_CAP_X86_DISABLE_EXITS with HLT: user space never sees HLT, with no chip in the kernel either.
#[test]
fn hlt_does_not_exit_when_its_exits_are_disabled() {
    // sti; nop; hlt; hlt
    let vm = vm(&[0xfb, 0x90, 0xf4, 0xf4]);
    let cap = kvm_enable_cap {
        cap: KVM_CAP_X86_DISABLE_EXITS,
        args: [KVM_X86_DISABLE_EXITS_HLT.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).unwrap();
    let vcpu = vcpu_of(&vm);
    let kick = vcpu.kick_handle();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            kick.kick();
        });
        assert_eq!(vcpu.run(), Err(Errno::EINTR));
    });
    assert_eq!(vcpu.regs().rip, CODE + 3);
    // An open interrupt window ends the halt.
    vcpu.machine().run().set_request_interrupt_window(1);
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_IRQ_WINDOW_OPEN);
}

#[test]
fn halted_vcpus_wake_for_an_nmi() {
    // hlt; NMI's handler at 0:0x3000: out 0x10, al
    let vm = vm(&[0xf4, 0xeb, 0xfd]);
    vm.create_controllers(anykvm_irqchip::ChipMode::Full)
        .unwrap();
    let vcpu = vcpu_of(&vm);
    vm.memory().write(2 * 4, &[0, 0x30, 0, 0]).unwrap();
    vm.memory().write(0x3000, &[0xe6, 0x10]).unwrap();
    let sender = {
        let vcpu = vcpu.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            vcpu.nmi();
        })
    };
    vcpu.run().unwrap();
    assert_eq!((reason(&vcpu), vcpu.regs().rip), (KVM_EXIT_IO, 0x3000));
    sender.join().unwrap();
    assert_eq!(vcpu.vcpu_events().nmi.masked, 1);
}

/// mov ecx, index; mov eax, value; xor edx, edx; wrmsr
fn wrmsr(index: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xb9];
    code.extend(index.to_le_bytes());
    code.extend([0x66, 0xb8]);
    code.extend(value.to_le_bytes());
    code.extend([0x66, 0x31, 0xd2, 0x0f, 0x30]);
    code
}

#[test]
fn kvmclock_and_wall_clock_are_written_before_the_guest_goes_on() {
    let mut code = wrmsr(MSR_KVM_SYSTEM_TIME_NEW, 0x5001);
    code.extend(wrmsr(MSR_KVM_WALL_CLOCK_NEW, 0x6000));
    code.push(0xf4);
    let vcpu = vcpu(&code);
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_HLT);
    let mut info = [0; 32];
    vcpu.vm().memory().read(0x5000, &mut info).unwrap();
    let word = |at: usize| u32::from_le_bytes(info[at..at + 4].try_into().unwrap());
    assert_eq!(
        (word(0) & 1, word(0) == 0),
        (0, false),
        "a finished version"
    );
    assert_ne!(word(24), 0, "the multiplier");
    let mut wall = [0; 12];
    vcpu.vm().memory().read(0x6000, &mut wall).unwrap();
    let seconds = u64::from(u32::from_le_bytes(wall[4..8].try_into().unwrap()));
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert!(now.as_secs().abs_diff(seconds) < 60);
    // The VMM says that it stopped the guest: a flag in the page, on the next entry.
    let version = word(0);
    vcpu.kvmclock_ctrl().unwrap();
    let mut regs = vcpu.regs();
    regs.rip = CODE + code.len() as u64 - 1;
    vcpu.set_regs(&regs).unwrap();
    vcpu.run().unwrap();
    vcpu.vm().memory().read(0x5000, &mut info).unwrap();
    assert_ne!(info[29] & 2, 0);
    assert_ne!(u32::from_le_bytes(info[..4].try_into().unwrap()), version);
}

#[test]
fn hypercalls() {
    // mov eax, 1; vmcall; mov esi, eax; mov eax, 100; vmmcall; hlt
    let vcpu = vcpu(&[
        0x66, 0xb8, 1, 0, 0, 0, 0x0f, 0x01, 0xc1, 0x66, 0x89, 0xc6, 0x66, 0xb8, 100, 0, 0, 0, 0x0f,
        0x01, 0xd9, 0xf4,
    ]);
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_HLT);
    let regs = vcpu.regs();
    assert_eq!(regs.rsi, 0, "KVM_HC_VAPIC_POLL_IRQ");
    assert_eq!(regs.rax as u32, KVM_ENOSYS.wrapping_neg());
}

#[test]
fn user_space_answers_msr_accesses() {
    // mov ecx, 0xdead; rdmsr; hlt
    let vm = vm(&[0x66, 0xb9, 0xad, 0xde, 0, 0, 0x0f, 0x32, 0xf4]);
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [KVM_MSR_EXIT_REASON_UNKNOWN.into(), 0, 0, 0],
        ..Default::default()
    })
    .unwrap();
    let vcpu = vcpu_of(&vm);
    let page = vcpu.machine().run();
    vcpu.run().unwrap();
    assert_eq!(
        (reason(&vcpu), page.msr_index()),
        (KVM_EXIT_X86_RDMSR, 0xdead)
    );
    assert_eq!(page.msr_reason(), KVM_MSR_EXIT_REASON_UNKNOWN);
    page.set_msr_data(0x1_2222_3333);
    vcpu.run().unwrap();
    assert_eq!(reason(&vcpu), KVM_EXIT_HLT);
    let regs = vcpu.regs();
    assert_eq!((regs.rax, regs.rdx), (0x2222_3333, 1));
}

#[test]
fn an_instruction_that_is_not_there_is_never_skipped() {
    // getsec; hlt
    let vcpu = vcpu(&[0x0f, 0x37, 0xf4]);
    // Either #UD, whose handler at 0:0x3000 is hlt, or an emulation failure.
    vcpu.vm().memory().write(6 * 4, &[0, 0x30, 0, 0]).unwrap();
    vcpu.vm().memory().write(0x3000, &[0xf4]).unwrap();
    vcpu.run().unwrap();
    match reason(&vcpu) {
        KVM_EXIT_HLT => assert_eq!(vcpu.regs().rip, 0x3001),
        KVM_EXIT_INTERNAL_ERROR => assert_eq!(vcpu.regs().rip, CODE),
        other => panic!("exit {other}"),
    }
}

#[test]
fn an_apic_timer_ends_hlt() {
    // xAPIC: SVR = 0x1ff, LVT timer = 0x30, divide by 1, count; sti; hlt; the handler writes a port.
    let vm = vm(&[0xfb, 0xf4, 0xeb, 0xfd]);
    vm.create_controllers(anykvm_irqchip::ChipMode::Full)
        .unwrap();
    let vcpu = vcpu_of(&vm);
    vm.memory().write(0x30 * 4, &[0, 0x30, 0, 0]).unwrap();
    vm.memory().write(0x3000, &[0xe6, 0x10]).unwrap();
    let lapic = vcpu.machine().lapic().unwrap();
    let start = Instant::now();
    for (offset, value) in [
        (0xf0, 0x1ffu32),
        (0x320, 0x30),
        (0x3e0, 0xb),
        (0x380, 3_000_000),
    ] {
        assert!(lapic.mmio_write(offset, &value.to_le_bytes()));
    }
    vcpu.run().unwrap();
    assert_eq!((reason(&vcpu), vcpu.regs().rip), (KVM_EXIT_IO, 0x3000));
    assert!(start.elapsed() >= Duration::from_millis(2));
}
