//! One access through a translation of a test's own making: 4- or 5-level paging, one page, and what
//! the access leads to.

use super::Computer;
use anykvm_cpu::Exit;
use anykvm_cpu::state::{XsaveArea, cr0, cr4, efer, reg, rflags};

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const PS: u64 = 1 << 7;
pub const NX: u64 = 1 << 63;

/// The identity map of the first 2 MiB.
pub const TABLES: u64 = 0x10_0000;
/// Tables of the page under test: PDPT, PD, PT.
pub const PDPT: u64 = 0x11_0000;
pub const PD: u64 = 0x11_1000;
pub const PT: u64 = 0x11_2000;
/// Its linear address (PML4 entry 1) and its frame.
pub const LINEAR: u64 = 1 << 39;
pub const FRAME: u64 = 0x8000;
const CODE: u64 = 0x5000;

/// A kind of access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Fetch,
}

/// Everything outside the paging structures that decides about an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    pub user: bool,
    pub wp: bool,
    pub smep: bool,
    pub smap: bool,
    pub ac: bool,
    pub nxe: bool,
    pub pke: bool,
    pub pkru: u32,
}

/// CPL 0, CR0.WP and EFER.NXE set, nothing else.
pub const KERNEL: Setting = Setting {
    user: false,
    wp: true,
    smep: false,
    smap: false,
    ac: false,
    nxe: true,
    pke: false,
    pkru: 0,
};
/// The same at CPL 3.
pub const USER: Setting = Setting {
    user: true,
    ..KERNEL
};

/// The entries that translate [`LINEAR`]: flags of PML4E, PDPTE, PDE (with the addresses of the next
/// table) and the whole PTE.
pub type Entries = [u64; 4];

/// A machine with the page under test.
pub struct Paged {
    pub c: Computer,
}

impl Paged {
    pub fn new() -> Self {
        let mut c = Computer::long(4 << 20, CODE, TABLES);
        c.catch_events();
        // mov eax, [rbx]; mov [rbx], eax; jmp rbx; the target leaves by `out 0x77, al`.
        c.put(CODE, &[0x8b, 0x03, 0xe6, 0x77]);
        c.put(CODE + 0x10, &[0x89, 0x03, 0xe6, 0x77]);
        c.put(CODE + 0x20, &[0xff, 0xe3]);
        c.put(FRAME, &[0xe6, 0x77]);
        for page in [6, 0x20, 0x21] {
            c.put64(TABLES + 0x3000 + page * 8, page << 12 | 3);
        }
        Self { c }
    }

    /// Writes the four entries.
    pub fn map(&mut self, entries: Entries) {
        let [pml4e, pdpte, pde, pte] = entries;
        self.c.put64(TABLES + 8, PDPT | pml4e);
        self.c.put64(PDPT, PD | pdpte);
        self.c.put64(PD, PT | pde);
        self.c.put64(PT, pte);
    }

    /// Puts the processor into the setting.
    pub fn set(&mut self, s: Setting) {
        let mark = |on: bool, bit: u64| if on { bit } else { 0 };
        // The code's own page must pass SMEP.
        let code = CODE | P | mark(s.user, U);
        self.c.put64(TABLES + 0x3000 + CODE / 512, code);
        let state = &mut self.c.cpu.state;
        state.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | mark(s.wp, cr0::WP);
        state.cr4 =
            cr4::PAE | mark(s.smep, cr4::SMEP) | mark(s.smap, cr4::SMAP) | mark(s.pke, cr4::PKE);
        state.msr.efer = efer::LME | efer::LMA | mark(s.nxe, efer::NX);
        state.rflags = rflags::FIXED | rflags::IOPL | mark(s.ac, rflags::AC);
        state.xsave.set_u32(XsaveArea::PKRU, s.pkru);
        state.regs[reg::RSP] = 0x7000;
        let (cpl, cs, ss) = if s.user {
            (3, 0x1b, 0x23)
        } else {
            (0, 8, 0x10)
        };
        state.seg[1].selector = cs;
        state.seg[1].set_dpl(cpl);
        state.seg[2].selector = ss;
        state.seg[2].set_dpl(cpl);
        self.c.cpu.state_changed();
    }

    /// Makes the access at `linear`; `None`: it succeeds, else the page fault's error code.
    pub fn access(&mut self, kind: Kind, linear: u64) -> Option<u64> {
        let state = &mut self.c.cpu.state;
        state.regs[reg::RBX] = linear;
        state.set_rip(match kind {
            Kind::Read => CODE,
            Kind::Write => CODE + 0x10,
            Kind::Fetch => CODE + 0x20,
        });
        let at = state.rip();
        self.c.cpu.io.clear();
        match self.c.run() {
            Exit::Io { port: 0x77, .. } => None,
            Exit::Io { port: 0x99, .. } => {
                let frame = self.c.frame();
                assert_eq!(self.c.cpu.state.cr2, linear);
                assert_eq!(frame[1], if kind == Kind::Fetch { linear } else { at });
                Some(frame[0])
            }
            other => panic!("{other:?}\n{}", self.c.cpu.dump()),
        }
    }

    /// The entries, the setting and the access in one.
    pub fn try_one(&mut self, entries: Entries, kind: Kind, s: Setting) -> Option<u64> {
        self.map(entries);
        self.set(s);
        self.access(kind, LINEAR)
    }
}
