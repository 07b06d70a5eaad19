//! The host processor as an oracle: runs one instruction with given registers, flags and memory, at
//! the same addresses as the guest under test, and says what became of them.

pub mod compare;

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use iced_x86::code_asm::{
    CodeAssembler, ds, eax, es, qword_ptr, r8, r9, r10, r11, r12, r13, r14, r15, rax, rbp, rbx,
    rcx, rdi, rdx, rsi, rsp,
};
use iced_x86::{BlockEncoderOptions, IcedError};

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
const STUB32: u64 = STUB + 0x800;
const FLAGS_IN: u64 = CONTEXT + 0x80;
const REGS_OUT: u64 = CONTEXT + 0x100;
const FLAGS_OUT: u64 = CONTEXT + 0x180;
const HOST_RSP: u64 = CONTEXT + 0x200;
const LANDED: u64 = CONTEXT + 0x208;
const FAR_POINTER: u64 = CONTEXT + 0x210;

/// Linux's selectors for user programs.
const USER_CS: u16 = 0x33;
const USER32_CS: u16 = 0x23;
const USER_DS: u16 = 0x2b;

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
    bits: u32,
}

static SIGNAL: AtomicI32 = AtomicI32::new(0);
static EPILOGUE: AtomicU64 = AtomicU64::new(0);

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

/// Code that enters 64-bit and 32-bit code at [`CODE`], and the address that leaves it again.
fn write_stubs() -> Result<u64, IcedError> {
    let saved = [rbx, rbp, r12, r13, r14, r15];
    // RSP last: its slot is the fifth.
    let gprs = [
        (0, rax),
        (1, rcx),
        (2, rdx),
        (3, rbx),
        (5, rbp),
        (6, rsi),
        (7, rdi),
        (8, r8),
        (9, r9),
        (10, r10),
        (11, r11),
        (12, r12),
        (13, r13),
        (14, r14),
        (15, r15),
        (4, rsp),
    ];
    let enter = |a: &mut CodeAssembler| {
        for r in saved {
            a.push(r)?;
        }
        a.pushfq()?;
        a.mov(qword_ptr(HOST_RSP), rsp)?;
        a.push(qword_ptr(FLAGS_IN))?;
        a.popfq()?;
        for (n, r) in gprs {
            a.mov(r, qword_ptr(CONTEXT + 8 * n))?;
        }
        Ok::<_, IcedError>(())
    };
    let mut a = CodeAssembler::new(64)?;
    enter(&mut a)?;
    a.jmp(CODE)?;
    let mut epilogue = a.create_label();
    a.set_label(&mut epilogue)?;
    for (n, r) in gprs {
        a.mov(qword_ptr(REGS_OUT + 8 * n), r)?;
    }
    a.mov(rsp, qword_ptr(HOST_RSP))?;
    a.pushfq()?;
    a.pop(qword_ptr(FLAGS_OUT))?;
    a.popfq()?;
    for r in saved.into_iter().rev() {
        a.pop(r)?;
    }
    a.ret()?;
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let code = a.assemble_options(STUB, options)?;
    poke(STUB, &code.inner.code_buffer);

    // 32-bit code needs data segments, which 64-bit processes start without.
    let mut b = CodeAssembler::new(64)?;
    b.mov(eax, i32::from(USER_DS))?;
    b.mov(ds, eax)?;
    b.mov(es, eax)?;
    enter(&mut b)?;
    // jmp far [FAR_POINTER]
    let mut jump = vec![0xff, 0x2c, 0x25];
    jump.extend((FAR_POINTER as u32).to_le_bytes());
    let mut code32 = b.assemble(STUB32)?;
    code32.extend(jump);
    poke(STUB32, &code32);
    poke(FAR_POINTER, &(CODE as u32).to_le_bytes());
    poke(FAR_POINTER + 4, &USER32_CS.to_le_bytes());
    code.label_ip(&epilogue)
}

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the interrupted context.
    let gregs = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = gregs[libc::REG_RIP as usize] as u64;
    if !(CODE..CODE + 0x1000).contains(&rip) {
        std::process::abort();
    }
    SIGNAL.store(signal, Ordering::SeqCst);
    gregs[libc::REG_RIP as usize] = EPILOGUE.load(Ordering::SeqCst) as i64;
    let selectors = &mut gregs[libc::REG_CSGSFS as usize];
    *selectors = *selectors & !0xffff | i64::from(USER_CS);
}

impl Host {
    fn new() -> Self {
        map(DATA, DATA_BYTES, false);
        map(CONTEXT, 0x1000, false);
        map(STUB, 0x1000, true);
        map(CODE, 0x1000, true);
        let epilogue = write_stubs().unwrap();
        EPILOGUE.store(epilogue, Ordering::SeqCst);
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
        let mut host = Self { epilogue, bits: 0 };
        host.set_bits(64);
        host
    }

    /// Chooses 64-bit or 32-bit code.
    pub fn set_bits(&mut self, bits: u32) {
        if self.bits != bits {
            self.bits = bits;
            for n in 0..LANDING_COUNT {
                self.land(LANDINGS + n * LANDING_STEP);
            }
        }
    }

    /// Puts code that ends the run at an address.
    fn land(&self, at: u64) {
        if self.bits == 64 {
            let mut a = CodeAssembler::new(64).unwrap();
            a.mov(qword_ptr(LANDED), at as i32).unwrap();
            a.jmp(self.epilogue).unwrap();
            poke(at, &a.assemble(at).unwrap());
        } else {
            // mov dword [LANDED], at; jmp far USER_CS:epilogue
            let mut code = vec![0xc7, 0x05];
            code.extend((LANDED as u32).to_le_bytes());
            code.extend((at as u32).to_le_bytes());
            code.push(0xea);
            code.extend((self.epilogue as u32).to_le_bytes());
            code.extend(USER_CS.to_le_bytes());
            poke(at, &code);
        }
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
        SIGNAL.store(0, Ordering::SeqCst);
        let stub = if self.bits == 64 { STUB } else { STUB32 };
        // SAFETY: the stub saves and restores what the calling convention asks for; the instruction
        // is one that only touches registers and memory, and faults come back by `on_signal`.
        unsafe { std::mem::transmute::<u64, extern "C" fn()>(stub)() };
        let mut after = Registers {
            flags: peek(FLAGS_OUT),
            ..Registers::default()
        };
        for (n, v) in (0..).zip(&mut after.gpr) {
            *v = peek(REGS_OUT + 8 * n);
        }
        let end = match SIGNAL.load(Ordering::SeqCst) {
            0 => End::At(peek(LANDED)),
            signal => End::Signal(signal),
        };
        (after, end)
    }
}
