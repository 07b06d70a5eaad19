//! Changing the signal mask by rt_sigreturn(2): a signal frame is made up that resumes right here
//! with another mask (Linux: `arch/x86/kernel/signal_64.c`). Unlike rt_sigprocmask, which a VMM's seccomp filter may
//! forbid on a vCPU thread, rt_sigreturn is allowed wherever signals are handled at all.

use std::arch::naked_asm;
use std::ffi::c_void;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, Ordering};

use super::masks;
use crate::sys::KernelSigset;

/// `uc_flags`: floating-point state follows in the XSAVE format. Ours never has any.
const UC_FP_XSTATE: u64 = 1;
/// RFLAGS with only IF and the bit that is always 1.
const RFLAGS: u64 = 0x202;

/// Whether the program may use protection keys (CPUID.(7,0):ECX.OSPKE): rt_sigreturn resets PKRU.
static PROTECTION_KEYS: AtomicBool = AtomicBool::new(false);

/// Asks the processor once; CPUID is slow in virtual machines.
pub fn detect_protection_keys() {
    let ospke = std::arch::x86_64::__cpuid_count(7, 0).ecx & 1 << 4 != 0;
    PROTECTION_KEYS.store(ospke, Ordering::Relaxed);
}

/// What rt_sigreturn needs of a frame that the kernel made on this thread.
#[derive(Clone, Copy)]
pub struct Interrupted {
    flags: u64,
    segments: i64,
    stack: libc::stack_t,
    /// The signal mask before the signal.
    pub mask: KernelSigset,
}

impl Interrupted {
    /// None yet.
    pub const NONE: Self = Self {
        flags: 0,
        segments: 0,
        stack: libc::stack_t {
            ss_sp: std::ptr::null_mut(),
            ss_flags: 0,
            ss_size: 0,
        },
        mask: 0,
    };

    /// Reads a frame.
    pub fn of(frame: &libc::ucontext_t) -> Self {
        Self {
            flags: frame.uc_flags,
            segments: frame.uc_mcontext.gregs[libc::REG_CSGSFS as usize],
            stack: frame.uc_stack,
            mask: masks::kernel_mask(&frame.uc_sigmask),
        }
    }
}

/// A frame to return from, and the registers that the kernel resets on the way.
#[repr(C)]
pub struct Resume {
    context: libc::ucontext_t,
    mxcsr: u32,
    x87_control: u16,
    has_pkru: u16,
    pkru: u32,
}

impl Resume {
    /// A frame that resumes in [`Resume::resume`], under `mask`.
    pub fn new(interrupted: &Interrupted, mask: KernelSigset) -> Self {
        // SAFETY: all-zero bytes are a valid ucontext_t.
        let mut context: libc::ucontext_t = unsafe { std::mem::zeroed() };
        context.uc_flags = interrupted.flags & !UC_FP_XSTATE;
        context.uc_stack = interrupted.stack;
        context.uc_mcontext.gregs[libc::REG_CSGSFS as usize] = interrupted.segments;
        masks::set_kernel_mask(&mut context.uc_sigmask, mask);
        Self {
            context,
            mxcsr: 0,
            x87_control: 0,
            has_pkru: PROTECTION_KEYS.load(Ordering::Relaxed).into(),
            pkru: 0,
        }
    }

    /// The ucontext_t that a signal handler gets to see, and may change.
    pub fn context(&mut self) -> *mut c_void {
        (&raw mut self.context).cast()
    }

    /// Resumes: returns to the caller under the frame's mask, after the handlers of signals that
    /// this lets through.
    ///
    /// # Safety
    /// The frame must have been made from an [`Interrupted`] of this thread.
    pub unsafe fn resume(&mut self) {
        // SAFETY: a frame of this thread, and nothing else refers to it.
        unsafe { sigreturn_here(self) }
    }
}

const fn register(index: i32) -> usize {
    offset_of!(Resume, context)
        + offset_of!(libc::ucontext_t, uc_mcontext)
        + offset_of!(libc::mcontext_t, gregs)
        + 8 * index as usize
}

/// Fills in where to resume (label 2, with the registers a C function preserves) and executes
/// rt_sigreturn, which finds the ucontext at RSP. MXCSR, the x87 control word and PKRU come back
/// reset and are loaded again.
#[unsafe(naked)]
unsafe extern "C" fn sigreturn_here(frame: *mut Resume) {
    naked_asm!(
        "mov [rdi + {rbx}], rbx",
        "mov [rdi + {rbp}], rbp",
        "mov [rdi + {r12}], r12",
        "mov [rdi + {r13}], r13",
        "mov [rdi + {r14}], r14",
        "mov [rdi + {r15}], r15",
        "mov [rdi + {rdi}], rdi",
        "mov [rdi + {rsp}], rsp",
        "lea rax, [rip + 2f]",
        "mov [rdi + {rip}], rax",
        "mov qword ptr [rdi + {rflags}], {flags}",
        "stmxcsr [rdi + {mxcsr}]",
        "fnstcw [rdi + {x87}]",
        "cmp word ptr [rdi + {has_pkru}], 0",
        "je 3f",
        "xor ecx, ecx",
        "rdpkru",
        "mov [rdi + {pkru}], eax",
        "3:",
        "mov rsp, rdi",
        "mov eax, {sigreturn}",
        "syscall",
        "2:",
        "cmp word ptr [rdi + {has_pkru}], 0",
        "je 4f",
        "mov eax, [rdi + {pkru}]",
        "xor ecx, ecx",
        "xor edx, edx",
        "wrpkru",
        "4:",
        "ldmxcsr [rdi + {mxcsr}]",
        "fldcw [rdi + {x87}]",
        "ret",
        rbx = const register(libc::REG_RBX),
        rbp = const register(libc::REG_RBP),
        r12 = const register(libc::REG_R12),
        r13 = const register(libc::REG_R13),
        r14 = const register(libc::REG_R14),
        r15 = const register(libc::REG_R15),
        rdi = const register(libc::REG_RDI),
        rsp = const register(libc::REG_RSP),
        rip = const register(libc::REG_RIP),
        rflags = const register(libc::REG_EFL),
        flags = const RFLAGS,
        mxcsr = const offset_of!(Resume, mxcsr),
        x87 = const offset_of!(Resume, x87_control),
        has_pkru = const offset_of!(Resume, has_pkru),
        pkru = const offset_of!(Resume, pkru),
        sigreturn = const libc::SYS_rt_sigreturn,
    )
}
