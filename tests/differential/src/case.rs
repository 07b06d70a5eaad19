//! A case: some instructions, the registers and memory they begin with; and an outcome: what they
//! leave behind and how they ended. Both mean the same for every engine.

use anykvm_cpu::events::vector as v;
use anykvm_cpu::state::rflags;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Where code is: two pages, read and execute, full of INT3 but for the case's own bytes. Nothing is
/// mapped behind them.
pub const CODE: u64 = 0x1000_0000;
/// Pages of code.
pub const CODE_PAGES: usize = 2;
/// Where data is: two pages to read and write and one to read only, with nothing mapped around them.
pub const DATA: u64 = 0x2000_0000;
/// Pages of data.
pub const DATA_PAGES: usize = 3;
/// Pages of data that may be written.
pub const WRITABLE_PAGES: usize = 2;
/// Bytes of data.
pub const DATA_BYTES: usize = DATA_PAGES * PAGE;
/// Longest code of a case.
pub const MAX_CODE: usize = 1024;

/// Selectors of user code and data as Linux defines them for 64-bit programs, and so for every
/// engine.
pub mod selector {
    /// 32-bit code.
    pub const CODE32: u16 = 0x23;
    /// Data and stack.
    pub const DATA: u16 = 0x2b;
    /// 64-bit code.
    pub const CODE64: u16 = 0x33;
}

/// The registers of user mode.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct State {
    /// By register number.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// FS.base.
    pub fs_base: u64,
    /// GS.base.
    pub gs_base: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// x87 tag word, one bit a physical register (FXSAVE's form).
    pub ftw: u16,
    /// Keeps what follows aligned.
    pub reserved: u16,
    /// MXCSR.
    pub mxcsr: u32,
    /// ST0 to ST7, 10 bytes each.
    pub st: [[u8; 16]; 8],
    /// Vector registers.
    pub zmm: [[u8; 64]; 32],
    /// Opmask registers.
    pub k: [u64; 8],
}

impl State {
    /// What a case's text leaves out: everything zero, the x87 and SSE state of FNINIT, the stack in
    /// the middle of the data.
    pub fn new(bits: u32) -> Self {
        let mut gpr = [0; 16];
        gpr[4] = DATA + PAGE as u64;
        let code = if bits == 64 {
            selector::CODE64
        } else {
            selector::CODE32
        };
        let data = selector::DATA;
        Self {
            gpr,
            rip: CODE,
            rflags: rflags::FIXED | rflags::IF,
            fs_base: 0,
            gs_base: 0,
            selectors: [data, code, data, data, 0, 0],
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            reserved: 0,
            mxcsr: 0x1f80,
            st: [[0; 16]; 8],
            zmm: [[0; 64]; 32],
            k: [0; 8],
        }
    }
}

/// Bytes of data memory that differ from [`pattern`] at the beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Linear address; all bytes are inside the data pages.
    pub at: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Instructions and what they begin with.
#[derive(Clone, PartialEq, Eq)]
pub struct Case {
    /// 64 or 32.
    pub bits: u32,
    /// The code, at `state.rip`.
    pub code: Vec<u8>,
    /// Registers.
    pub state: State,
    /// Memory.
    pub patches: Vec<Patch>,
}

impl Case {
    /// The addresses of the case's own code.
    pub fn code_range(&self) -> std::ops::Range<u64> {
        self.state.rip..self.state.rip + self.code.len() as u64
    }
}

/// The data that every case begins with, patches apart.
pub fn pattern() -> Vec<u8> {
    let word = |n: u64| {
        let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ z >> 27
    };
    (0..DATA_BYTES as u64 / 8)
        .flat_map(|n| word(n + 1).to_le_bytes())
        .collect()
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// At an INT3 that is not part of its code; RIP is there.
    Landed,
    /// An exception; RIP is what its handler would return to.
    Exception {
        /// Its vector.
        vector: u8,
        /// Its error code, if it has one.
        error: Option<u32>,
        /// CR2, for page faults.
        cr2: Option<u64>,
    },
    /// It did not end in reasonable time.
    Endless,
    /// It made a system call, which no engine carries out.
    SystemCall,
    /// The engine itself failed.
    Failed(String),
}

impl End {
    /// From what the processor reports about an exception. `rip` is moved back to the INT3 if it
    /// was a landing.
    pub fn of_exception(case: &Case, rip: &mut u64, vector: u8, error: u32, cr2: u64) -> Self {
        if vector == v::BP && !case.code_range().contains(&rip.wrapping_sub(1)) {
            *rip -= 1;
            return End::Landed;
        }
        let has_error = matches!(
            vector,
            v::DF | v::TS | v::NP | v::SS | v::GP | v::PF | v::AC
        );
        End::Exception {
            vector,
            error: has_error.then_some(error),
            cr2: (vector == v::PF).then_some(cr2),
        }
    }
}

/// What a case left behind.
#[derive(Clone)]
pub struct Outcome {
    /// Registers.
    pub state: State,
    /// How it ended.
    pub end: End,
    /// The data pages that changed: number and contents.
    pub pages: Vec<(usize, Vec<u8>)>,
    /// What else this project's processor has: words of the whole XSAVE area and of the system
    /// state that code can change. The host's are not known.
    pub rest: Option<Box<[u64]>>,
}

impl Outcome {
    /// Whether all is the same that both have.
    pub fn same(&self, other: &Self) -> bool {
        self.state == other.state
            && self.end == other.end
            && self.pages == other.pages
            && match (&self.rest, &other.rest) {
                (Some(a), Some(b)) => a == b,
                _ => true,
            }
    }
}

/// Something that runs cases.
pub trait Engine {
    /// Its name in reports.
    fn name(&self) -> &str;
    /// Begins to run cases, possibly in the background.
    fn start(&mut self, cases: &[Case]);
    /// The outcomes of the cases that were started last, in their order.
    fn finish(&mut self, cases: &[Case]) -> Vec<Outcome>;

    /// Runs cases.
    fn run(&mut self, cases: &[Case]) -> Vec<Outcome> {
        self.start(cases);
        self.finish(cases)
    }
}
