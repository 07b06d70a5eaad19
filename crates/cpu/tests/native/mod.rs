//! The host processor as an oracle: runs one instruction with given registers, flags and memory, at
//! the same addresses as the guest under test, and says what became of them.

use std::sync::{Mutex, MutexGuard, OnceLock};

use iced_x86::code_asm::{
    CodeAssembler, qword_ptr, r8, r9, r10, r11, r12, r13, r14, r15, rax, rbp, rbx, rcx, rdi, rdx,
    rsi, rsp,
};

/// Where the instruction is.
pub const CODE: u64 = 0x18_0000;
/// Where branches may go: a landing at each multiple of [`LANDING_STEP`] behind [`CODE`].
pub const LANDINGS: u64 = CODE + 0x40;
/// Bytes between landings.
pub const LANDING_STEP: u64 = 0x20;
/// How many landings there are.
pub const LANDING_COUNT: u64 = 8;
/// Memory the instruction may touch; the pages before and behind are not there.
pub const DATA: u64 = 0x14_0000;
/// Bytes of it.
pub const DATA_BYTES: usize = 0x4000;

const CONTEXT: u64 = 0x17_0000;
const STUB: u64 = 0x16_0000;
const FLAGS_IN: u64 = CONTEXT + 0x80;
const REGS_OUT: u64 = CONTEXT + 0x100;
const FLAGS_OUT: u64 = CONTEXT + 0x180;
const HOST_RSP: u64 = CONTEXT + 0x200;
const LANDED: u64 = CONTEXT + 0x208;

/// Registers and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// RAX to R15.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub flags: u64,
}

/// How the instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// RIP behind it.
    At(u64),
    /// A signal: SIGFPE, SIGILL, SIGSEGV, SIGBUS.
    Signal(i32),
}

/// The oracle; one user at a time.
pub struct Host {
    epilogue: u64,
}

static SIGNAL: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(0);
static EPILOGUE: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// The oracle, made on first use.
pub fn host() -> MutexGuard<'static, Host> {
    static HOST: OnceLock<Mutex<Host>> = OnceLock::new();
    HOST.get_or_init(|| Mutex::new(Host::new()))
        .lock()
        .unwrap_or_else(|e| e.into_inner())
}

fn map(at: u64, bytes: usize, executable: bool) {
    let x = if executable { libc::PROT_EXEC } else { 0 };
    // SAFETY: a new mapping at an address that must be free.
    let p = unsafe {
        libc::mmap(
            at as *mut _,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE | x,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    assert_eq!(p as u64, at, "address {at:#x} is taken");
}

fn poke(at: u64, bytes: &[u8]) {
    // SAFETY: callers write into the mappings made above.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) }
}

fn peek(at: u64) -> u64 {
    // SAFETY: callers read from the mappings made above.
    unsafe { (at as *const u64).read() }
}

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the interrupted context.
    let gregs = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = gregs[libc::REG_RIP as usize] as u64;
    if !(CODE..CODE + 0x1000).contains(&rip) {
        std::process::abort();
    }
    SIGNAL.store(signal, std::sync::atomic::Ordering::SeqCst);
    gregs[libc::REG_RIP as usize] = EPILOGUE.load(std::sync::atomic::Ordering::SeqCst) as i64;
}

impl Host {
    fn new() -> Self {
        map(DATA, DATA_BYTES, false);
        map(CONTEXT, 0x1000, false);
        map(STUB, 0x1000, true);
        map(CODE, 0x1000, true);
        let mut a = CodeAssembler::new(64).unwrap();
        let epilogue = (|| {
            let saved = [rbx, rbp, r12, r13, r14, r15];
            let gprs = [
                rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rsp,
            ];
            let slot = |r| match r {
                15 => 4,
                4.. => r + 1,
                _ => r,
            };
            for r in saved {
                a.push(r)?;
            }
            a.pushfq()?;
            a.mov(qword_ptr(HOST_RSP), rsp)?;
            a.push(qword_ptr(FLAGS_IN))?;
            a.popfq()?;
            for (n, r) in gprs.into_iter().enumerate() {
                a.mov(r, qword_ptr(CONTEXT + 8 * slot(n as u64)))?;
            }
            a.jmp(CODE)?;
            let mut epilogue = a.create_label();
            a.set_label(&mut epilogue)?;
            for (n, r) in gprs.into_iter().enumerate() {
                a.mov(qword_ptr(REGS_OUT + 8 * slot(n as u64)), r)?;
            }
            a.mov(rsp, qword_ptr(HOST_RSP))?;
            a.pushfq()?;
            a.pop(qword_ptr(FLAGS_OUT))?;
            a.popfq()?;
            for r in saved.into_iter().rev() {
                a.pop(r)?;
            }
            a.ret()?;
            Ok::<_, iced_x86::IcedError>(epilogue)
        })()
        .unwrap();
        let code = a
            .assemble_options(
                STUB,
                iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS,
            )
            .unwrap();
        poke(STUB, &code.inner.code_buffer);
        let epilogue = code.label_ip(&epilogue).unwrap();
        EPILOGUE.store(epilogue, std::sync::atomic::Ordering::SeqCst);
        // SAFETY: installs a handler of the right type, on the alternate stack that Rust gives
        // every thread.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for signal in [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS] {
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
        let host = Self { epilogue };
        for n in 0..LANDING_COUNT {
            host.land(LANDINGS + n * LANDING_STEP);
        }
        host
    }

    /// Puts code that ends the run at an address.
    fn land(&self, at: u64) {
        let mut a = CodeAssembler::new(64).unwrap();
        a.mov(qword_ptr(LANDED), at as i32).unwrap();
        a.jmp(self.epilogue).unwrap();
        poke(at, &a.assemble(at).unwrap());
    }

    /// Puts the instruction in place.
    pub fn put(&mut self, code: &[u8]) {
        poke(CODE, code);
        self.land(CODE + code.len() as u64);
    }

    /// Writes the instruction's memory.
    pub fn set_data(&mut self, at: u64, bytes: &[u8]) {
        assert!(at >= DATA && at + bytes.len() as u64 <= DATA + DATA_BYTES as u64);
        poke(at, bytes);
    }

    /// The instruction's memory.
    pub fn data(&self) -> &[u8] {
        // SAFETY: mapped in `new`, and only this object's methods write it.
        unsafe { std::slice::from_raw_parts(DATA as *const u8, DATA_BYTES) }
    }

    /// Runs the instruction.
    pub fn run(&mut self, before: &Registers) -> (Registers, End) {
        for (n, v) in (0..).zip(before.gpr) {
            poke(CONTEXT + 8 * n, &v.to_le_bytes());
        }
        poke(FLAGS_IN, &before.flags.to_le_bytes());
        SIGNAL.store(0, std::sync::atomic::Ordering::SeqCst);
        // SAFETY: the stub saves and restores what the calling convention asks for; the instruction
        // is one that only touches registers and memory, and faults come back by `on_signal`.
        unsafe { std::mem::transmute::<u64, extern "C" fn()>(STUB)() };
        let mut after = Registers {
            flags: peek(FLAGS_OUT),
            ..Registers::default()
        };
        for (n, v) in (0..).zip(&mut after.gpr) {
            *v = peek(REGS_OUT + 8 * n);
        }
        let end = match SIGNAL.load(std::sync::atomic::Ordering::SeqCst) {
            0 => End::At(peek(LANDED)),
            signal => End::Signal(signal),
        };
        (after, end)
    }
}
