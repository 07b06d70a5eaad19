//! Runs one instruction on the host with a given register state: the reference the processor is
//! compared with. It shares nothing with native assist: the whole XSAVE state is loaded, the
//! instruction executed as it stands, and the whole state stored.

#![allow(dead_code)] // Each test file uses its part of it.

use iced_x86::code_asm::*;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

/// Registers in and out. The memory operand's base is RSI.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Registers {
    pub xsave: [u8; 4096],
    /// By register number; RSP is not loaded.
    pub gprs: [u64; 16],
    pub flags: u64,
    host_mxcsr: u32,
    host_fcw: u32,
}

impl Registers {
    pub fn new() -> Self {
        Self {
            xsave: [0; 4096],
            gprs: [0; 16],
            flags: 0x202,
            host_mxcsr: 0,
            host_fcw: 0,
        }
    }
}

/// A page of code, rewritten for each instruction.
pub struct Runner {
    page: *mut u8,
}

const X: usize = 0;
const G: usize = 4096;
const FLAGS: usize = G + 128;
const MXCSR: usize = FLAGS + 8;
const FCW: usize = MXCSR + 4;
/// x87, SSE and AVX.
const COMPONENTS: u64 = 7;

impl Runner {
    pub fn new() -> Self {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping.
        let page = unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, prot, MapFlags::PRIVATE) };
        Self {
            page: page.unwrap().cast(),
        }
    }

    /// Executes `insn`.
    pub fn run(&mut self, insn: &[u8], registers: &mut Registers) {
        let code = wrap(insn).unwrap();
        let rw = MprotectFlags::READ | MprotectFlags::WRITE;
        let rx = MprotectFlags::READ | MprotectFlags::EXEC;
        // SAFETY: the page is this object's; the code in it keeps the System V ABI, and the caller's
        // instruction computes on registers and the memory RSI points to.
        unsafe {
            mprotect(self.page.cast(), 4096, rw).unwrap();
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.page, code.len());
            mprotect(self.page.cast(), 4096, rx).unwrap();
            let f: unsafe extern "sysv64" fn(*mut Registers) = std::mem::transmute(self.page);
            f(registers);
        }
    }
}

fn wrap(insn: &[u8]) -> Result<Vec<u8>, iced_x86::IcedError> {
    let numbered = [
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
    ];
    let mut a = CodeAssembler::new(64)?;
    for r in [rbx, rbp, r12, r13, r14, r15, rdi] {
        a.push(r)?;
    }
    a.fnstcw(word_ptr(rdi + FCW))?;
    a.stmxcsr(dword_ptr(rdi + MXCSR))?;
    a.mov(eax, COMPONENTS as u32)?;
    a.xor(edx, edx)?;
    a.xrstor64(ptr(rdi + X))?;
    a.push(qword_ptr(rdi + FLAGS))?;
    a.popfq()?;
    for (n, r) in numbered {
        a.mov(r, qword_ptr(rdi + (G + n * 8)))?;
    }
    a.mov(rdi, qword_ptr(rdi + (G + 7 * 8)))?;
    a.db(insn)?;
    a.push(rdi)?;
    a.mov(rdi, qword_ptr(rsp + 8))?;
    for (n, r) in numbered {
        a.mov(qword_ptr(rdi + (G + n * 8)), r)?;
    }
    a.pop(qword_ptr(rdi + (G + 7 * 8)))?;
    a.pushfq()?;
    a.pop(qword_ptr(rdi + FLAGS))?;
    a.mov(eax, COMPONENTS as u32)?;
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
