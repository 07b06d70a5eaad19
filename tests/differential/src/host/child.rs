//! The child process: runs cases on the processor itself.
//!
//! A signal frame is the door in both directions. Every case ends with a signal (INT3 if nothing
//! goes wrong), whose frame holds all registers as the case left them; the handler copies them out,
//! writes the next case's registers into the same frame and returns: SIGRETURN loads them and jumps
//! to its code. What the frame does not hold (FS.base, GS.base, data segment registers) the handler
//! sets itself.
//!
//! The handler runs with the case's FS.base, so nothing here may use thread-local storage; and with
//! what it left in RFLAGS, so the first thing it does is to load its own.

use super::shared::{Shared, ended};
use crate::case::{
    CODE, CODE_PAGES, DATA, DATA_BYTES, DATA_PAGES, PAGE, State, WRITABLE_PAGES, pattern, selector,
};
use crate::layout::Layout;
use std::arch::{asm, global_asm};
use std::sync::atomic::Ordering::Relaxed;

/// Bytes of the extended state that are kept of the world outside cases.
const MAX_XSTATE: usize = 8192;
const INT3: u8 = 0xcc;
/// Offset of `struct _fpx_sw_bytes` in the legacy region, which says how large the frame's area is.
const SW_BYTES: usize = 464;
/// `uc_flags`: extended state, SS is in the frame and to be taken as it is.
const UC_FLAGS: u64 = 7;
/// Milliseconds of user time after which a case is looked at; at the second look it is endless.
const TICK_MS: i64 = 20;

/// Everything the handler works on.
struct Child {
    shared: *mut Shared,
    layout: Layout,
    /// Where the code pages can be written.
    code: *mut u8,
    /// Where the last code was put, and its length.
    last_code: (usize, usize),
    /// Data as it is before patches.
    pristine: Vec<u8>,
    /// Data as the current case began with it.
    initial: Vec<u8>,
    /// Pages of `initial` that differ from `pristine`.
    patched: u32,
    /// A case is running.
    running: bool,
    /// Cases begun.
    begun: u64,
    /// The same at the last tick.
    ticked: u64,
    outside: Outside,
}

/// The registers of the child's own code while cases run.
struct Outside {
    registers: [i64; 23],
    fs_base: u64,
    gs_base: u64,
    xstate: Box<[u8; MAX_XSTATE]>,
}

static mut CHILD: *mut Child = std::ptr::null_mut();

unsafe extern "C" {
    fn anykvm_differential_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut u8);
    fn anykvm_differential_tick(signal: i32, info: *mut libc::siginfo_t, context: *mut u8);
}

// The flags a case left (AC, NT, ID) must not act in the handler.
global_asm!(
    ".globl anykvm_differential_signal",
    "anykvm_differential_signal:",
    "push 0x2",
    "popfq",
    "jmp {signal}",
    ".globl anykvm_differential_tick",
    "anykvm_differential_tick:",
    "push 0x2",
    "popfq",
    "jmp {tick}",
    signal = sym on_signal,
    tick = sym on_tick,
);

/// Runs batches for ever: reads a byte for each from one descriptor, answers on the other.
///
/// # Safety
///
/// In a new process that does nothing else; `shared` is the memory its parent has, too.
pub unsafe fn serve(shared: *mut Shared, layout: Layout, commands: i32, answers: i32) -> ! {
    // SAFETY: this process has one thread and ends here.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let code = map_windows();
        let pristine = pattern();
        let mut child = Child {
            shared,
            layout,
            code,
            last_code: (0, CODE_PAGES * PAGE),
            initial: pristine.clone(),
            pristine,
            patched: 0,
            running: false,
            begun: 0,
            ticked: 0,
            outside: Outside {
                registers: [0; 23],
                fs_base: 0,
                gs_base: 0,
                xstate: Box::new([0; MAX_XSTATE]),
            },
        };
        std::slice::from_raw_parts_mut(DATA as *mut u8, WRITABLE_PAGES * PAGE)
            .copy_from_slice(&child.pristine[..WRITABLE_PAGES * PAGE]);
        CHILD = &raw mut child;
        install_handlers();
        refuse_system_calls();
        loop {
            let mut byte = 0u8;
            if libc::read(commands, (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(0);
            }
            let first = (*shared).first.load(Relaxed);
            if first < (*shared).end.load(Relaxed) {
                (*shared).current.store(first, Relaxed);
                asm!("int3");
            }
            if libc::write(answers, (&raw const byte).cast(), 1) != 1 {
                libc::_exit(0);
            }
        }
    }
}

/// Ends the child with a message: what is missing cannot be done without.
fn give_up(what: &str) -> ! {
    eprintln!(
        "anykvm-differential: {what}: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: ends the process.
    unsafe { libc::_exit(101) }
}

/// Maps code and data where cases expect them; where the code can be written.
unsafe fn map_windows() -> *mut u8 {
    // SAFETY: new mappings, at addresses that must be free.
    unsafe {
        let fd = libc::memfd_create(c"code".as_ptr(), 0);
        if fd < 0 || libc::ftruncate(fd, (CODE_PAGES * PAGE) as i64) != 0 {
            give_up("memory for code");
        }
        let map = |at: u64, pages: usize, prot: i32, flags: i32, fd: i32| {
            let p = libc::mmap(at as *mut _, pages * PAGE, prot, flags, fd, 0);
            if p == libc::MAP_FAILED || at != 0 && p as u64 != at {
                give_up("a mapping at a fixed address");
            }
            p.cast::<u8>()
        };
        let (r, w, x) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        let fixed = libc::MAP_FIXED_NOREPLACE;
        map(CODE, CODE_PAGES, r | x, libc::MAP_SHARED | fixed, fd);
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
        let data = map(DATA, DATA_PAGES, r | w, anonymous, -1);
        std::slice::from_raw_parts_mut(data, DATA_BYTES).copy_from_slice(&pattern());
        let behind = data.add(WRITABLE_PAGES * PAGE);
        let rest = (DATA_PAGES - WRITABLE_PAGES) * PAGE;
        if libc::mprotect(behind.cast(), rest, r) != 0 {
            give_up("read-only memory");
        }
        let code = map(0, CODE_PAGES, r | w, libc::MAP_SHARED, fd);
        std::slice::from_raw_parts_mut(code, CODE_PAGES * PAGE).fill(INT3);
        code
    }
}

unsafe fn install_handlers() {
    const STACK: usize = 256 << 10;
    // SAFETY: the handler has the right type and a stack of its own.
    unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let stack = libc::stack_t {
            ss_sp: libc::mmap(std::ptr::null_mut(), STACK, prot, flags, -1, 0),
            ss_flags: 0,
            ss_size: STACK,
        };
        if libc::sigaltstack(&stack, std::ptr::null_mut()) != 0 {
            give_up("a stack for signals");
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = anykvm_differential_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaddset(&mut action.sa_mask, libc::SIGVTALRM);
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGSYS,
        ] {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
        action.sa_sigaction = anykvm_differential_tick as *const () as usize;
        libc::sigaction(libc::SIGVTALRM, &action, std::ptr::null_mut());
        let every = libc::timeval {
            tv_sec: 0,
            tv_usec: TICK_MS * 1000,
        };
        let timer = libc::itimerval {
            it_interval: every,
            it_value: every,
        };
        if libc::syscall(libc::SYS_setitimer, 1, &timer, 0) != 0 {
            give_up("a timer");
        }
    }
}

/// From now on every system call but those of [`serve`] and the return from signals is SIGSYS.
unsafe fn refuse_system_calls() {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let allowed = [
        libc::SYS_rt_sigreturn,
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_exit_group,
    ];
    let mut filter = vec![
        step(LOAD, 4, 0, 0),
        step(EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        step(RETURN, libc::SECCOMP_RET_TRAP, 0, 0),
        step(LOAD, 0, 0, 0),
    ];
    for (n, call) in allowed.iter().enumerate() {
        filter.push(step(EQUAL, *call as u32, (allowed.len() - n) as u8, 0));
    }
    filter.push(step(RETURN, libc::SECCOMP_RET_TRAP, 0, 0));
    filter.push(step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0));
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program is valid for the call.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0
        {
            give_up("a filter of system calls");
        }
    }
}

/// The registers of a signal frame that are no vector registers.
unsafe fn frame<'a>(context: *mut u8) -> (&'a mut libc::ucontext_t, &'a mut [u8]) {
    // SAFETY: the kernel passes a frame, and says in it how large its extended state is.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let area = context.uc_mcontext.fpregs.cast::<u8>();
        let size = area.add(SW_BYTES + 16).cast::<u32>().read_unaligned();
        let area = std::slice::from_raw_parts_mut(area, (size as usize).min(MAX_XSTATE));
        (context, area)
    }
}

extern "C" fn on_tick(_: i32, _: *mut libc::siginfo_t, context: *mut u8) {
    // SAFETY: this process has one thread, and this signal is blocked while the other handler runs.
    unsafe {
        let child = &mut *CHILD;
        if !child.running || child.ticked != child.begun {
            child.ticked = child.begun;
            return;
        }
        finish(child, context, ended::ENDLESS);
        go_on(child, context);
    }
}

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut u8) {
    // SAFETY: as in `on_tick`; all signals that lead here come from the case itself.
    unsafe {
        let child = &mut *CHILD;
        if child.running {
            let ended = if signal == libc::SIGSYS {
                ended::SYSTEM_CALL
            } else {
                ended::EXCEPTION
            };
            finish(child, context, ended);
            go_on(child, context);
            return;
        }
        // The INT3 of `serve`: what is outside is kept.
        let (context, area) = frame(context);
        let o = &mut child.outside;
        o.registers = context.uc_mcontext.gregs;
        o.xstate[..area.len()].copy_from_slice(area);
        asm!("rdfsbase {}", out(reg) o.fs_base);
        asm!("rdgsbase {}", out(reg) o.gs_base);
        child.running = true;
        begin(child, context, area);
    }
}

/// The next case, or what is outside.
unsafe fn go_on(child: &mut Child, context: *mut u8) {
    // SAFETY: called by the handlers only.
    unsafe {
        let (context, area) = frame(context);
        let shared = &*child.shared;
        let next = shared.current.load(Relaxed) + 1;
        shared.current.store(next, Relaxed);
        if next < shared.end.load(Relaxed) {
            begin(child, context, area);
            return;
        }
        child.running = false;
        let o = &child.outside;
        context.uc_mcontext.gregs = o.registers;
        context.uc_flags = UC_FLAGS;
        area.copy_from_slice(&o.xstate[..area.len()]);
        asm!("wrfsbase {}", in(reg) o.fs_base);
        asm!("wrgsbase {}", in(reg) o.gs_base);
    }
}

const GREGS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Makes memory and registers those of the current case.
unsafe fn begin(child: &mut Child, context: &mut libc::ucontext_t, area: &mut [u8]) {
    // SAFETY: the windows are mapped, and cases lie inside them.
    unsafe {
        child.begun += 1;
        let n = (*child.shared).current.load(Relaxed) as usize;
        let slot = &(*child.shared).slots[n];
        let s: &State = &slot.before;

        let (at, len) = child.last_code;
        child.code.add(at).write_bytes(INT3, len);
        let at = (s.rip.wrapping_sub(CODE) as usize).min(CODE_PAGES * PAGE);
        let len = (slot.code_len as usize).min(CODE_PAGES * PAGE - at);
        child
            .code
            .add(at)
            .copy_from_nonoverlapping(slot.code.as_ptr(), len);
        child.last_code = (at, len);

        let initial = &mut child.initial;
        let mut patched = 0;
        slot.for_each_patch(|at, bytes| {
            let at = at.wrapping_sub(DATA) as usize;
            if let Some(part) = initial.get_mut(at..at + bytes.len()) {
                part.copy_from_slice(bytes);
                patched |= 1 << (at / PAGE) | 1 << ((at + bytes.len().max(1) - 1) / PAGE);
            }
        });
        // The read-only page keeps its pattern: the parent puts no patches there.
        for n in (0..WRITABLE_PAGES).filter(|n| patched >> n & 1 != 0) {
            page(n).copy_from_slice(&child.initial[n * PAGE..(n + 1) * PAGE]);
        }
        child.patched = patched;

        let m = &mut context.uc_mcontext;
        for (value, greg) in s.gpr.iter().zip(GREGS) {
            m.gregs[greg as usize] = *value as i64;
        }
        m.gregs[libc::REG_RIP as usize] = s.rip as i64;
        m.gregs[libc::REG_EFL as usize] = s.rflags as i64;
        let [_, cs, ss, ..] = s.selectors.map(i64::from);
        m.gregs[libc::REG_CSGSFS as usize] = cs | ss << 48;
        context.uc_flags = UC_FLAGS;
        child.layout.store(s, area);
        let [es, _, _, ds, fs, gs] = s.selectors;
        asm!("mov es, {:x}", "mov ds, {:x}", "mov fs, {:x}", "mov gs, {:x}",
            in(reg) es, in(reg) ds, in(reg) fs, in(reg) gs);
        asm!("wrfsbase {}", in(reg) s.fs_base);
        asm!("wrgsbase {}", in(reg) s.gs_base);
    }
}

/// ES, DS, FS and GS.
fn data_selectors() -> [u16; 4] {
    let (es, ds, fs, gs): (u16, u16, u16, u16);
    // SAFETY: reads registers.
    unsafe {
        asm!("mov {:x}, es", "mov {:x}, ds", "mov {:x}, fs", "mov {:x}, gs",
            out(reg) es, out(reg) ds, out(reg) fs, out(reg) gs);
    }
    [es, ds, fs, gs]
}

unsafe fn page(n: usize) -> &'static mut [u8] {
    // SAFETY: the data pages are mapped and nothing else refers to them.
    unsafe { std::slice::from_raw_parts_mut((DATA as *mut u8).add(n * PAGE), PAGE) }
}

/// Copies out what the current case left, and restores the data.
unsafe fn finish(child: &mut Child, context: *mut u8, ended: u32) {
    // SAFETY: called by the handlers only.
    unsafe {
        let (context, area) = frame(context);
        let n = (*child.shared).current.load(Relaxed) as usize;
        let slot = &mut (*child.shared).slots[n];
        let s = &mut slot.after;
        let g = &context.uc_mcontext.gregs;
        for (value, greg) in s.gpr.iter_mut().zip(GREGS) {
            *value = g[greg as usize] as u64;
        }
        s.rip = g[libc::REG_RIP as usize] as u64;
        s.rflags = g[libc::REG_EFL as usize] as u64;
        let [es, ds, fs, gs] = data_selectors();
        let csgsfs = g[libc::REG_CSGSFS as usize];
        s.selectors = [es, csgsfs as u16, (csgsfs >> 48) as u16, ds, fs, gs];
        asm!("rdfsbase {}", out(reg) s.fs_base);
        asm!("rdgsbase {}", out(reg) s.gs_base);
        child.layout.load(s, area);
        slot.ended = ended;
        slot.vector = g[libc::REG_TRAPNO as usize] as u32;
        slot.error = g[libc::REG_ERR as usize] as u32;
        slot.cr2 = g[libc::REG_CR2 as usize] as u64;
        slot.changed = 0;
        for n in 0..DATA_PAGES {
            let all = n * PAGE..(n + 1) * PAGE;
            let now = page(n);
            let changed = *now != child.initial[all.clone()];
            if changed {
                slot.changed |= 1 << n;
                slot.pages[n].copy_from_slice(now);
            }
            let patched = child.patched >> n & 1 != 0;
            if patched {
                child.initial[all.clone()].copy_from_slice(&child.pristine[all.clone()]);
            }
            if (changed || patched) && n < WRITABLE_PAGES {
                now.copy_from_slice(&child.pristine[all]);
            }
        }
        asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) selector::DATA);
    }
}
