//! Breakpoints: which of DR0-DR3 an access hits (SDM Vol. 3, 18.2).

use crate::cpu::Cpu;

/// DR6.BD: an access to a debug register with DR7.GD.
pub const DR6_BD: u64 = 1 << 13;
/// DR6.BS: single step.
pub const DR6_BS: u64 = 1 << 14;
/// DR6.BT: the T flag of a task that was switched to.
pub const DR6_BT: u64 = 1 << 15;
/// DR6.B0-B3.
pub const DR6_BREAKPOINTS: u64 = 15;
/// DR6 bits that read as 1: reserved ones, and those whose active state is 0 and whose causes (bus
/// lock, bit 11; RTM, bit 16) this processor does not have (SDM Vol. 3, 18.2.3).
pub const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR6 bits that software may change.
pub const DR6_WRITABLE: u64 = DR6_BT | DR6_BS | DR6_BD | DR6_BREAKPOINTS;
/// DR7.GD: the next access to a debug register is a #DB.
pub const DR7_GD: u64 = 1 << 13;
/// DR7 bits that are always 1.
pub const DR7_FIXED: u64 = 0x400;
/// DR7 bits that software may change; bit 11 (RTM) is reserved without RTM (SDM Vol. 3, 18.2.4).
pub const DR7_WRITABLE: u64 = 0xffff_23ff;
/// What DR6 becomes when software loads it.
pub fn loaded_dr6(value: u64) -> u64 {
    value & DR6_WRITABLE | DR6_FIXED
}
/// What DR7 becomes when software loads it.
pub fn loaded_dr7(value: u64) -> u64 {
    value & DR7_WRITABLE | DR7_FIXED
}
/// DR7.L0-L3 and G0-G3.
const DR7_ENABLES: u64 = 0xff;
/// IA32_DEBUGCTL.LBR: branches are recorded.
pub const DEBUGCTL_LBR: u64 = 1;
/// IA32_DEBUGCTL.BTF: TF traps behind branches only.
pub const DEBUGCTL_BTF: u64 = 2;

/// What a breakpoint watches (DR7.R/Wn).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Instruction execution.
    Execute,
    /// Data reads and writes.
    Data {
        /// A write.
        write: bool,
    },
    /// Port I/O (CR4.DE).
    Io,
}

/// The DR6 bits B0-B3 of the breakpoints that watch this access. Disabled ones do not count.
pub fn hits(db: &[u64; 4], dr7: u64, watch: Watch, address: u64, size: u64) -> u64 {
    let mut bits = 0;
    for (n, at) in db.iter().enumerate() {
        if dr7 >> (n * 2) & 3 == 0 {
            continue;
        }
        let control = dr7 >> (16 + n * 4) & 15;
        let len: u64 = match control >> 2 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        let kind = match (control & 3, watch) {
            (0, Watch::Execute) => address == *at,
            (1, Watch::Data { write: true }) | (3, Watch::Data { .. }) | (2, Watch::Io) => {
                let first = at & !(len - 1);
                address.wrapping_sub(first) < len || first.wrapping_sub(address) < size
            }
            _ => false,
        };
        if kind {
            bits |= 1 << n;
        }
    }
    bits
}

impl Cpu {
    /// The breakpoints in force: the debugger's, if it has armed any, else the guest's.
    pub(crate) fn breakpoints(&self) -> (&[u64; 4], u64) {
        if self.guest_debug.hardware_breakpoints {
            (&self.guest_debug.db, self.guest_debug.dr7)
        } else {
            (&self.state.db, self.state.dr7)
        }
    }
    /// Whether any data breakpoint lies in the page of this address: it must have no fast TLB entry.
    pub(crate) fn watched(&self, linear: u64) -> bool {
        let (db, dr7) = self.breakpoints();
        dr7 & DR7_ENABLES != 0
            && db
                .iter()
                .enumerate()
                .any(|(n, at)| dr7 >> (n * 2) & 3 != 0 && (at ^ linear) >> 12 == 0)
    }
    /// Notes the data breakpoints an access hits; the run loop turns them into #DB after the
    /// instruction.
    pub(crate) fn note_data(&mut self, linear: u64, size: usize, write: bool) {
        let (db, dr7) = self.breakpoints();
        if dr7 & DR7_ENABLES != 0 {
            let bits = hits(db, dr7, Watch::Data { write }, linear, size as u64);
            if bits != 0 {
                self.debug_hits |= bits;
                self.leave = true;
            }
        }
    }
    /// Notes the I/O breakpoints an access hits.
    pub(crate) fn note_io(&mut self, port: u16, size: usize) {
        let (db, dr7) = self.breakpoints();
        if dr7 & DR7_ENABLES != 0 && self.state.cr4 & crate::state::cr4::DE != 0 {
            let bits = hits(db, dr7, Watch::Io, port.into(), size as u64);
            if bits != 0 {
                self.debug_hits |= bits;
                self.leave = true;
            }
        }
    }
    /// The DR6 bits of traps that wait for the instruction behind MOV SS (SDM Vol. 3, 6.8.3): hardware's
    /// pending debug exceptions.
    pub fn waiting_traps(&self) -> u64 {
        self.debug_hits
    }
    /// Makes these wait; they count only together with that interrupt shadow.
    pub fn set_waiting_traps(&mut self, bits: u64) {
        self.debug_hits = bits & (DR6_BREAKPOINTS | DR6_BS | DR6_BT);
    }
    /// Whether instruction breakpoints may be armed.
    pub(crate) fn breakpoints_armed(&self) -> bool {
        self.breakpoints().1 & DR7_ENABLES != 0
    }
}
