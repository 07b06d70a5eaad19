//! Runs one instruction on the host with a given register state: the reference the processor is
//! compared with. It shares nothing with native assist: the whole XSAVE state is loaded, the
//! instruction executed as it stands, and the whole state stored. A fault of the instruction ends it
//! with the state it leaves.

#![allow(dead_code)] // Each test file uses its part of it.

pub mod instances;

use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::cell::Cell;
use std::sync::{Once, OnceLock};

use anykvm_cpu::state::XsaveArea;
use iced_x86::code_asm::*;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

/// Registers in and out. The memory operand's base is RSI.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Registers {
    /// The host's XSAVE area.
    area: [u8; 4096],
    /// By register number; RSP is not loaded.
    pub gprs: [u64; 16],
    pub flags: u64,
    host_mxcsr: u32,
    host_fcw: u32,
    /// In the layout of this project's XSAVE area.
    pub xsave: [u8; 4096],
}

impl Registers {
    pub fn new() -> Self {
        Self {
            area: [0; 4096],
            gprs: [0; 16],
            flags: 0x202,
            host_mxcsr: 0,
            host_fcw: 0,
            xsave: [0; 4096],
        }
    }
}

/// Components behind the header that tests use: XCR0 bit, offset in this project's layout, size.
const EXTENDED: [(u32, usize, usize); 4] = [
    (2, XsaveArea::YMM_HI, 256),
    (5, XsaveArea::OPMASK, 64),
    (6, XsaveArea::ZMM_HI, 512),
    (7, XsaveArea::HI16_ZMM, 1024),
];

/// x87, SSE, AVX and, where the host has it enabled, AVX-512 state.
pub fn components() -> u64 {
    if std::is_x86_feature_detected!("xsave") {
        // SAFETY: the host has XSAVE, and Linux enables it.
        unsafe { host_xcr0() & 0xe7 }
    } else {
        0
    }
}

#[target_feature(enable = "xsave")]
fn host_xcr0() -> u64 {
    // SAFETY: register 0 exists wherever the instruction does.
    unsafe { _xgetbv(0) }
}

/// Rearranges an area in the standard format between the host's layout and this project's.
pub fn rearrange(from: &[u8], to: &mut [u8], to_host: bool) {
    // CPUID is slow where it is intercepted.
    static OFFSETS: OnceLock<[usize; 4]> = OnceLock::new();
    let offsets =
        OFFSETS.get_or_init(|| EXTENDED.map(|(bit, ..)| __cpuid_count(0xd, bit).ebx as usize));
    let enabled = components();
    to[..576].copy_from_slice(&from[..576]);
    for ((bit, here, size), host) in EXTENDED.into_iter().zip(*offsets) {
        if enabled >> bit & 1 == 0 {
            continue;
        }
        let (f, t) = if to_host { (here, host) } else { (host, here) };
        to[t..t + size].copy_from_slice(&from[f..f + size]);
    }
}

/// A page of code, rewritten for each instruction: [`MAGIC`], where the instruction and the code
/// behind it are, then the code.
pub struct Runner {
    page: *mut u8,
    /// The code before and behind the instruction.
    around: [Vec<u8>; 2],
}

const MAGIC: u64 = 0x7275_6e6e_6572_2121;
const START: usize = 32;
const X: usize = 0;
const G: usize = 4096;
const FLAGS: usize = G + 128;
const MXCSR: usize = FLAGS + 8;
const FCW: usize = MXCSR + 4;

thread_local! {
    static SIGNAL: Cell<i32> = const { Cell::new(0) };
}

/// Leaves the instruction if it is one under test.
extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the interrupted context; code is readable, and pages of runners
    // begin with these three words.
    unsafe {
        let gregs = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = gregs[libc::REG_RIP as usize] as u64;
        let page = (rip & !0xfff) as *const u64;
        if page.read() != MAGIC || page.add(1).read() != rip {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        SIGNAL.set(signal);
        gregs[libc::REG_RIP as usize] = page.add(2).read() as i64;
    }
}

fn catch_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
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
    });
}

impl Runner {
    pub fn new() -> Self {
        catch_signals();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping.
        let page = unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, prot, MapFlags::PRIVATE) };
        Self {
            page: page.unwrap().cast(),
            around: [enter().unwrap(), leave().unwrap()],
        }
    }

    /// Executes `insn`; the signal it raised, or 0.
    pub fn run(&mut self, insn: &[u8], registers: &mut Registers) -> i32 {
        let [enter, leave] = &self.around;
        let at = self.page as usize + START + enter.len();
        let mut page = Vec::new();
        for word in [MAGIC, at as u64, (at + insn.len()) as u64, 0] {
            page.extend(word.to_le_bytes());
        }
        for code in [enter, insn, leave] {
            page.extend(code);
        }
        let rw = MprotectFlags::READ | MprotectFlags::WRITE;
        let rx = MprotectFlags::READ | MprotectFlags::EXEC;
        let Registers { area, xsave, .. } = registers;
        rearrange(xsave, area, true);
        area[512..576].fill(0);
        area[512] = components() as u8;
        SIGNAL.set(0);
        // SAFETY: the page is this object's; the code in it keeps the System V ABI, and the caller's
        // instruction computes on registers and the memory RSI points to, or faults.
        unsafe {
            mprotect(self.page.cast(), 4096, rw).unwrap();
            std::ptr::copy_nonoverlapping(page.as_ptr(), self.page, page.len());
            mprotect(self.page.cast(), 4096, rx).unwrap();
            let f: unsafe extern "sysv64" fn(*mut Registers) =
                std::mem::transmute(self.page.add(START));
            f(registers);
        }
        let Registers { area, xsave, .. } = registers;
        rearrange(area, xsave, false);
        SIGNAL.get()
    }
}

/// General registers loaded and stored one by one, with their slots.
fn numbered() -> [(usize, AsmRegister64); 14] {
    [
        (0, rax),
        (1, rcx),
        (2, rdx),
        (3, rbx),
        (5, rbp),
        (6, rsi),
        (8, r8),
        (9, r9),
        (10, r10),
        (11, r11),
        (12, r12),
        (13, r13),
        (14, r14),
        (15, r15),
    ]
}

fn enter() -> Result<Vec<u8>, iced_x86::IcedError> {
    let numbered = numbered();
    let mut a = CodeAssembler::new(64)?;
    for r in [rbx, rbp, r12, r13, r14, r15, rdi] {
        a.push(r)?;
    }
    a.fnstcw(word_ptr(rdi + FCW))?;
    a.stmxcsr(dword_ptr(rdi + MXCSR))?;
    a.mov(eax, components() as u32)?;
    a.xor(edx, edx)?;
    a.xrstor64(ptr(rdi + X))?;
    a.push(qword_ptr(rdi + FLAGS))?;
    a.popfq()?;
    for (n, r) in numbered {
        a.mov(r, qword_ptr(rdi + (G + n * 8)))?;
    }
    a.mov(rdi, qword_ptr(rdi + (G + 7 * 8)))?;
    a.assemble(0)
}

fn leave() -> Result<Vec<u8>, iced_x86::IcedError> {
    let numbered = numbered();
    let mut a = CodeAssembler::new(64)?;
    a.push(rdi)?;
    a.mov(rdi, qword_ptr(rsp + 8))?;
    for (n, r) in numbered {
        a.mov(qword_ptr(rdi + (G + n * 8)), r)?;
    }
    a.pop(qword_ptr(rdi + (G + 7 * 8)))?;
    a.pushfq()?;
    a.pop(qword_ptr(rdi + FLAGS))?;
    a.mov(eax, components() as u32)?;
    a.xor(edx, edx)?;
    a.xsave64(ptr(rdi + X))?;
    a.fninit()?;
    a.vzeroupper()?;
    a.fldcw(word_ptr(rdi + FCW))?;
    a.ldmxcsr(dword_ptr(rdi + MXCSR))?;
    for r in [rdi, r15, r14, r13, r12, rbp, rbx] {
        a.pop(r)?;
    }
    a.ret()?;
    a.assemble(0)
}

/// A small generator of random numbers (xorshift64*), so that a failure repeats.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
    /// 8 bytes that often are interesting floating-point numbers.
    pub fn number(&mut self) -> u64 {
        const F64: [u64; 12] = [
            0,
            0x8000_0000_0000_0000,
            0x3ff0_0000_0000_0000,
            0x4000_0000_0000_0001,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0x0000_0000_0000_0001,
            0x0010_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0xc1e0_0000_0020_0000,
        ];
        const F32: [u64; 10] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            1,
            0x0080_0000,
            0x7f7f_ffff,
        ];
        match self.below(4) {
            0 => self.pick(&F64),
            1 => self.pick(&F32) | self.pick(&F32) << 32,
            2 => self.next() & 0x8fff_ffff_8fff_ffff | 0x3000_0000_3000_0000,
            _ => self.next(),
        }
    }
    /// An 80-bit number, often interesting.
    pub fn extended(&mut self) -> [u8; 10] {
        let mantissa = match self.below(4) {
            0 => 0,
            1 => 1 << 63,
            2 => self.next() | 1 << 63,
            _ => self.next(),
        };
        let exponent = match self.below(5) {
            0 => 0,
            1 => 0x7fff,
            2 => 0x3fff + self.below(64) as u16,
            3 => self.below(0x8000) as u16,
            _ => self.pick(&[1, 0x7ffe, 0x3ffe, 0x3c00]),
        };
        let mut v = [0; 10];
        v[..8].copy_from_slice(&mantissa.to_le_bytes());
        v[8..].copy_from_slice(&(exponent | (self.next() as u16 & 0x8000)).to_le_bytes());
        v
    }
}
