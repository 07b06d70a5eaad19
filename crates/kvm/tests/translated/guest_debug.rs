//! KVM_SET_GUEST_DEBUG (KVM API, 4.87) in all its modes: where each exit is, and what it says.

use anykvm::bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug,
    kvm_regs,
};
use anykvm::{Errno, Translation, TranslationMode, VcpuExit, VcpuFd};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::{CODE, DATA, END, Machine, assemble};

const STEP: u32 = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
const SOFTWARE: u32 = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
const HARDWARE: u32 = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
/// The bits of DR6 that are 1 unless something happened, and BS.
const DR6: u64 = 0xffff_0ff0;
const BS: u64 = 0x4000;
const DB: u32 = 1;
const BP: u32 = 3;
/// Handlers: of #DB, of #BP, of NMI and vector 0x30.
const HANDLER: u64 = 0x2_0000;

/// What a debug exit says: exception, PC, DR6, DR7.
type Seen = (u32, u64, u64, u64);

struct Guest {
    machine: Machine,
    vcpu: VcpuFd,
    /// Where each instruction of the code is.
    at: Vec<u64>,
}

impl Guest {
    /// At the beginning of this code. Handlers are one IRETQ.
    fn new(
        mode: TranslationMode,
        build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Self {
        let code = assemble(&build);
        let machine = Machine::new(&code);
        let how = Translation {
            mode,
            cache: Translation::MIN_CACHE,
            ..Translation::default()
        };
        machine.vm.set_translation(how).unwrap();
        for vector in [1, 2, 3, 6, 0x30] {
            machine.handler(vector, HANDLER + vector * 16);
            machine
                .ram
                .write_bytes((HANDLER + vector * 16) as usize, &[0x48, 0xcf]);
        }
        let vcpu = machine.vcpu(0);
        let decoder = iced_x86::Decoder::with_ip(64, &code, CODE, 0);
        let at = decoder.into_iter().map(|insn| insn.ip()).collect();
        Self { machine, vcpu, at }
    }

    fn debug(&self, control: u32, registers: [u64; 8]) -> Result<(), Errno> {
        let mut d = kvm_guest_debug {
            control,
            ..Default::default()
        };
        d.arch.debugreg = registers;
        self.vcpu.set_guest_debug(&d)
    }

    fn regs(&self) -> kvm_regs {
        self.vcpu.get_regs().unwrap()
    }

    /// The next debug exit; `None` at the end of the code.
    fn next(&mut self) -> Option<Seen> {
        match self.vcpu.run().unwrap() {
            VcpuExit::Debug(d) => {
                let seen = (d.exception, d.pc, d.dr6, d.dr7);
                assert_eq!(self.regs().rip, seen.1, "PC is where the guest is");
                Some(seen)
            }
            VcpuExit::IoOut(END, _) => None,
            other => panic!("{other:?}"),
        }
    }

    /// The PCs of single steps until the end.
    fn steps(&mut self) -> Vec<u64> {
        self.debug(STEP, [0; 8]).unwrap();
        let mut list = Vec::new();
        while let Some(seen) = self.next() {
            assert_eq!((seen.0, seen.2, seen.3), (DB, DR6 | BS, 0x400));
            list.push(seen.1);
        }
        list
    }

    /// Past the breakpoint in front of which the guest is.
    fn pass(&self) {
        let mut regs = self.regs();
        regs.rflags |= 1 << 16;
        self.vcpu.set_regs(&regs).unwrap();
    }
}

fn both(f: impl Fn(TranslationMode)) {
    f(TranslationMode::Off);
    f(TranslationMode::Always);
}

fn end(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(i32::from(END), al)
}

/// Each instruction is a step: STI and MOV SS, each turn of a repeated instruction, a string of port output; and no
/// step shows in the flags.
#[test]
fn steps_of_instructions() {
    both(|mode| {
        let mut g = Guest::new(mode, |a| {
            a.nop()?;
            a.mov(eax, ss)?;
            a.mov(ss, eax)?;
            a.sti()?;
            a.cli()?;
            a.mov(ecx, 3)?;
            a.mov(edi, DATA as u32)?;
            a.rep().stosb()?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.mov(edx, DATA as u32)?;
            a.mov(dword_ptr(rdx), 5)?;
            end(a)
        });
        let at = g.at.clone();
        // The repeated instruction has three steps.
        let mut wanted = at[1..8].to_vec();
        wanted.extend([at[7], at[7]]);
        wanted.extend(&at[8..]);
        assert_eq!(g.steps(), wanted, "{mode:?}");
        assert_eq!(g.regs().rbx & 0x100, 0, "TF");
        assert_eq!(g.machine.ram.read::<u32>(DATA as usize), 5);
    });
}

/// Exceptions and software interrupts lead to their handlers, whose first instruction is the next step; and back.
#[test]
fn steps_into_handlers() {
    both(|mode| {
        let mut g = Guest::new(mode, |a| {
            a.int3()?;
            a.int(0x30)?;
            a.nop()?;
            end(a)
        });
        let at = g.at.clone();
        let wanted = [HANDLER + 3 * 16, at[1], HANDLER + 0x30 * 16, at[2], at[3]];
        assert_eq!(g.steps(), wanted, "{mode:?}");
        // A fault is delivered before its handler's first instruction.
        let mut g = Guest::new(mode, |a| {
            a.ud2()?;
            end(a)
        });
        let skip = [0x48, 0x83, 0x04, 0x24, 2, 0x48, 0xcf]; // add qword [rsp], 2; iretq
        let handler = HANDLER + 6 * 16;
        g.machine.ram.write_bytes(handler as usize, &skip);
        let at = g.at.clone();
        assert_eq!(g.steps(), [handler, handler + 5, at[1]], "{mode:?}");
    });
}

/// An access that leaves for the VMM: its exit comes first, the step when it has completed.
#[test]
fn steps_of_port_access() {
    both(|mode| {
        let mut g = Guest::new(mode, |a| {
            a.in_(al, 0x10)?;
            a.out(0x10, al)?;
            end(a)
        });
        let at = g.at.clone();
        g.debug(STEP, [0; 8]).unwrap();
        match g.vcpu.run().unwrap() {
            VcpuExit::IoIn(0x10, data) => data[0] = 7,
            other => panic!("{other:?}"),
        }
        assert_eq!(g.next().unwrap().1, at[1]);
        assert!(matches!(g.vcpu.run().unwrap(), VcpuExit::IoOut(0x10, [7])));
        assert_eq!(g.next().unwrap().1, at[2]);
        assert_eq!(g.next(), None);
    });
}

#[test]
fn software_breakpoints() {
    both(|mode| {
        let build = |a: &mut CodeAssembler| {
            a.inc(ebx)?;
            a.int3()?;
            a.inc(ebx)?;
            end(a)
        };
        let mut g = Guest::new(mode, build);
        let at = g.at.clone();
        g.debug(SOFTWARE, [0; 8]).unwrap();
        let seen = g.next().unwrap();
        assert_eq!((seen.0, seen.1), (BP, at[1]));
        assert_eq!(g.regs().rbx, 1);
        // It is there until somebody moves RIP.
        assert_eq!(g.next().unwrap().1, at[1]);
        let mut regs = g.regs();
        regs.rip = at[2];
        g.vcpu.set_regs(&regs).unwrap();
        assert_eq!(g.next(), None);
        assert_eq!(g.regs().rbx, 2);
        // Without the flag, or without ENABLE, it is the guest's.
        for control in [0, KVM_GUESTDBG_USE_SW_BP, KVM_GUESTDBG_ENABLE] {
            let mut g = Guest::new(mode, build);
            g.debug(control, [0; 8]).unwrap();
            assert_eq!(g.next(), None, "{control:#x}");
        }
    });
}

#[test]
fn hardware_breakpoints() {
    both(|mode| {
        let mut g = Guest::new(mode, |a| {
            a.nop()?;
            a.mov(byte_ptr(DATA), al)?;
            a.mov(al, byte_ptr(DATA))?;
            a.mov(al, byte_ptr(DATA + 8))?;
            a.mov(byte_ptr(DATA + 8), al)?;
            a.in_(al, 0x60)?;
            end(a)
        });
        let at = g.at.clone();
        let mut sregs = g.vcpu.get_sregs().unwrap();
        sregs.cr4 |= 8;
        g.vcpu.set_sregs(&sregs).unwrap();
        // DR0: the NOP. DR1: writes at DATA. DR2: accesses at DATA + 8. DR3: port 60h.
        let armed = 0x400 | 0b1010_1010 | 1 << 20 | 3 << 24 | 2 << 28;
        let control = [at[0], DATA, DATA + 8, 0x60, 0, 0, 0, armed];
        g.debug(HARDWARE, control).unwrap();
        assert_eq!(g.next(), Some((DB, at[0], DR6 | 1, armed)));
        g.pass();
        assert_eq!(g.next(), Some((DB, at[2], DR6 | 2, armed)));
        assert_eq!(g.next(), Some((DB, at[4], DR6 | 4, armed)));
        assert_eq!(g.next(), Some((DB, at[5], DR6 | 4, armed)));
        match g.vcpu.run().unwrap() {
            VcpuExit::IoIn(0x60, data) => data[0] = 0,
            other => panic!("{other:?}"),
        }
        assert_eq!(g.next(), Some((DB, at[6], DR6 | 8, armed)));
        assert_eq!(g.next(), None);
        // The guest's own registers saw nothing of it.
        let own = g.vcpu.get_debug_regs().unwrap();
        assert_eq!((own.db, own.dr6, own.dr7), ([0; 4], DR6, 0x400));
        // Both at once: a step onto a breakpoint says what it was.
        let mut g = Guest::new(mode, |a| {
            a.mov(byte_ptr(DATA), al)?;
            end(a)
        });
        g.debug(STEP | HARDWARE, control).unwrap();
        let at = g.at.clone();
        let armed = control[7];
        assert_eq!(g.next(), Some((DB, at[0], DR6 | 1, armed)));
        g.pass();
        assert_eq!(g.next(), Some((DB, at[1], DR6 | BS | 2, armed)));
    });
}

/// While the debugger's are in force the guest's debug registers read as it wrote them and match nothing; then
/// they are in force again.
#[test]
fn debug_registers_of_the_guest() {
    both(|mode| {
        let build = |a: &mut CodeAssembler| {
            a.mov(eax, DATA as u32)?;
            a.mov(dr0, rax)?;
            a.mov(eax, 0x1_0402)?; // DR0, writes of one byte
            a.mov(dr7, rax)?;
            a.mov(byte_ptr(DATA), al)?;
            a.mov(rbx, dr0)?;
            a.mov(rcx, dr7)?;
            a.out(0x10, al)?;
            a.mov(byte_ptr(DATA), al)?;
            end(a)
        };
        let mut g = Guest::new(mode, build);
        let at = g.at.clone();
        // inc r15; iretq
        g.machine
            .ram
            .write_bytes((HANDLER + 16) as usize, &[0x49, 0xff, 0xc7, 0x48, 0xcf]);
        g.debug(HARDWARE, [DATA + 8, 0, 0, 0, 0, 0, 0, 0x1_0402])
            .unwrap();
        assert!(matches!(g.vcpu.run().unwrap(), VcpuExit::IoOut(0x10, _)));
        let regs = g.regs();
        assert_eq!((regs.rbx, regs.rcx, regs.r15), (DATA, 0x1_0402, 0));
        g.debug(0, [0; 8]).unwrap();
        assert_eq!(g.next(), None);
        assert_eq!(g.regs().r15, 1, "the guest's own handler");
        assert_eq!(g.vcpu.get_debug_regs().unwrap().dr6, DR6 | 1);
        // Under a debugger that steps they are in force, and what they hit is the debugger's, too.
        let mut g = Guest::new(mode, build);
        g.debug(STEP, [0; 8]).unwrap();
        let mut hits = Vec::new();
        loop {
            match g.vcpu.run().unwrap() {
                VcpuExit::Debug(d) if d.dr6 & 15 != 0 => hits.push((d.pc, d.dr6, d.dr7)),
                VcpuExit::Debug(_) | VcpuExit::IoOut(0x10, _) => {}
                VcpuExit::IoOut(END, _) => break,
                other => panic!("{other:?}"),
            }
        }
        let hit = DR6 | BS | 1;
        assert_eq!(hits, [(at[5], hit, 0x1_0402), (at[9], hit, 0x1_0402)]);
    });
}

/// A guest that steps itself (TF) under a debugger's breakpoints: KVM shows every #DB to the debugger, who gives
/// it back.
#[test]
fn traps_of_the_guest() {
    both(|mode| {
        let mut g = Guest::new(mode, |a| {
            a.pushfq()?;
            a.or(dword_ptr(rsp), 0x100)?;
            a.popfq()?;
            a.nop()?;
            end(a)
        });
        let at = g.at.clone();
        g.debug(HARDWARE, [DATA, 0, 0, 0, 0, 0, 0, 0x1_0402])
            .unwrap();
        assert_eq!(g.next(), Some((DB, at[4], DR6 | BS, 0x1_0402)));
        let mut regs = g.regs();
        assert_eq!(regs.rflags & 0x100, 0x100);
        regs.rflags &= !0x100;
        g.vcpu.set_regs(&regs).unwrap();
        assert_eq!(g.next(), None);
    });
}

/// DR7.GD of the debugger's: MOV DR is shown in front of it, as often as it is tried.
#[test]
fn general_detect() {
    both(|mode| {
        let mut g = Guest::new(mode, |a| {
            a.mov(rax, dr0)?;
            end(a)
        });
        let (at, armed) = (g.at.clone(), 0x2400);
        g.debug(HARDWARE, [0, 0, 0, 0, 0, 0, 0, armed]).unwrap();
        let seen = Some((DB, at[0], DR6 | 0x2000, armed));
        assert_eq!(g.next(), seen);
        // Nothing waits to be completed.
        g.vcpu.set_kvm_immediate_exit(1);
        assert!(matches!(g.vcpu.run(), Err(Errno::EINTR)));
        g.vcpu.set_kvm_immediate_exit(0);
        assert_eq!(g.next(), seen);
        g.debug(0, [0; 8]).unwrap();
        assert_eq!(g.next(), None);
    });
}

#[test]
fn injected_exceptions() {
    both(|mode| {
        let build = |a: &mut CodeAssembler| {
            a.nop()?;
            end(a)
        };
        for (control, vector) in [(KVM_GUESTDBG_INJECT_DB, 1), (KVM_GUESTDBG_INJECT_BP, 3)] {
            let mut g = Guest::new(mode, build);
            // inc r15; iretq
            let handler = HANDLER + vector * 16;
            g.machine
                .ram
                .write_bytes(handler as usize, &[0x49, 0xff, 0xc7, 0x48, 0xcf]);
            g.debug(control, [0; 8]).unwrap();
            // Until it is delivered there is room for no other.
            assert_eq!(g.debug(control, [0; 8]), Err(Errno::EBUSY));
            assert_eq!(g.next(), None);
            assert_eq!(g.regs().r15, 1);
            assert_eq!(g.vcpu.get_debug_regs().unwrap().dr6, DR6);
            // With stepping: the handler is what comes first.
            let mut g = Guest::new(mode, build);
            g.debug(STEP | control, [0; 8]).unwrap();
            assert_eq!(g.next(), Some((DB, handler, DR6 | BS, 0x400)));
        }
        let g = Guest::new(mode, build);
        let mut events = g.vcpu.get_vcpu_events().unwrap();
        events.exception.injected = 1;
        events.exception.nr = 6;
        g.vcpu.set_vcpu_events(&events).unwrap();
        let inject = KVM_GUESTDBG_INJECT_DB;
        assert_eq!(g.debug(inject | STEP, [0; 8]), Err(Errno::EBUSY));
    });
}

/// With BLOCKIRQ an NMI waits, stepping or not; it comes when the flag is gone.
#[test]
fn blocked_interrupts() {
    both(|mode| {
        let mut g = Guest::new(mode, |a| {
            a.sti()?;
            a.nop()?;
            a.nop()?;
            a.out(0x10, al)?;
            end(a)
        });
        // inc r15; iretq
        g.machine
            .ram
            .write_bytes((HANDLER + 32) as usize, &[0x49, 0xff, 0xc7, 0x48, 0xcf]);
        let at = g.at.clone();
        g.vcpu.nmi().unwrap();
        g.debug(STEP | KVM_GUESTDBG_BLOCKIRQ, [0; 8]).unwrap();
        for pc in &at[1..4] {
            assert_eq!(g.next().unwrap().1, *pc);
        }
        g.debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_BLOCKIRQ, [0; 8])
            .unwrap();
        assert!(matches!(g.vcpu.run().unwrap(), VcpuExit::IoOut(0x10, _)));
        assert_eq!(g.regs().r15, 0);
        assert_eq!(g.vcpu.get_vcpu_events().unwrap().nmi.pending, 1);
        // Without it the NMI's delivery is a step.
        g.debug(STEP, [0; 8]).unwrap();
        assert_eq!(g.next().unwrap().1, at[4], "the OUT completes");
        assert_eq!(g.next().unwrap().1, HANDLER + 32);
        g.debug(0, [0; 8]).unwrap();
        assert_eq!(g.next(), None);
        assert_eq!(g.regs().r15, 1);
    });
}

#[test]
fn unknown_bits() {
    let g = Guest::new(TranslationMode::Off, end);
    assert_eq!(g.debug(1 << 31 | STEP, [0; 8]), Err(Errno::EINVAL));
}
