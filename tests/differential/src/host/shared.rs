//! What parent and child share: a batch of cases going one way, their outcomes coming back.

use crate::case::{Case, DATA_PAGES, End, MAX_CODE, Outcome, PAGE, State};
use std::sync::atomic::AtomicU32;

/// Cases of one batch.
pub const BATCH: usize = 64;
/// Room for a case's memory.
pub const MAX_PATCH_BYTES: usize = 8192;
/// Of which a patch takes this much beside its bytes.
pub const PATCH_HEAD: usize = 12;

/// Outcome kinds of [`Slot::ended`].
pub mod ended {
    /// By an exception.
    pub const EXCEPTION: u32 = 1;
    /// By the watchdog timer.
    pub const ENDLESS: u32 = 2;
    /// By a system call that was refused.
    pub const SYSTEM_CALL: u32 = 3;
}

/// A case and its outcome.
#[repr(C)]
pub struct Slot {
    pub before: State,
    pub code_len: u32,
    patch_len: u32,
    pub code: [u8; MAX_CODE],
    /// Address, length (4 bytes) and bytes of each.
    patches: [u8; MAX_PATCH_BYTES],

    pub after: State,
    pub ended: u32,
    pub vector: u32,
    pub error: u32,
    /// Which pages changed.
    pub changed: u32,
    pub cr2: u64,
    pub pages: [[u8; PAGE]; DATA_PAGES],
}

/// The shared memory.
#[repr(C)]
pub struct Shared {
    /// The first case to run.
    pub first: AtomicU32,
    /// The end of the cases to run.
    pub end: AtomicU32,
    /// The case that runs.
    pub current: AtomicU32,
    pub slots: [Slot; BATCH],
}

impl Slot {
    /// Puts a case in place.
    pub fn set(&mut self, case: &Case) {
        self.before = case.state;
        self.code_len = case.code.len().min(MAX_CODE) as u32;
        self.code[..self.code_len as usize].copy_from_slice(&case.code[..self.code_len as usize]);
        let mut at = 0;
        for p in &case.patches {
            let end = at + 12 + p.bytes.len();
            assert!(end <= MAX_PATCH_BYTES, "a case has too much memory");
            self.patches[at..at + 8].copy_from_slice(&p.at.to_le_bytes());
            self.patches[at + 8..at + 12].copy_from_slice(&(p.bytes.len() as u32).to_le_bytes());
            self.patches[at + 12..end].copy_from_slice(&p.bytes);
            at = end;
        }
        self.patch_len = at as u32;
    }

    /// Calls `f` with address and bytes of each patch.
    pub fn for_each_patch(&self, mut f: impl FnMut(u64, &[u8])) {
        let mut rest = &self.patches[..(self.patch_len as usize).min(MAX_PATCH_BYTES)];
        while let Some((head, more)) = rest.split_first_chunk::<12>() {
            let (at, len) = head.split_at(8);
            let at = u64::from_le_bytes(at.try_into().unwrap_or_default());
            let len = u32::from_le_bytes(len.try_into().unwrap_or_default()) as usize;
            let Some((bytes, more)) = more.split_at_checked(len) else {
                return;
            };
            f(at, bytes);
            rest = more;
        }
    }

    /// The outcome of the case it holds.
    pub fn outcome(&self, case: &Case) -> Outcome {
        let mut state = self.after;
        let end = match self.ended {
            ended::EXCEPTION => {
                let vector = self.vector as u8;
                End::of_exception(case, &mut state.rip, vector, self.error, self.cr2)
            }
            ended::ENDLESS => End::Endless,
            ended::SYSTEM_CALL => End::SystemCall,
            n => End::Failed(format!("outcome {n}")),
        };
        let changed = (0..DATA_PAGES).filter(|n| self.changed >> n & 1 != 0);
        Outcome {
            state,
            end,
            pages: changed.map(|n| (n, self.pages[n].to_vec())).collect(),
            rest: None,
        }
    }
}
