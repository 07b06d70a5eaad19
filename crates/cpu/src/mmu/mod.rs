//! Linear addresses: translation with every check, and the accesses instructions make.
//!
//! The fast path is a hit in the TLB's level 1 ([`tlb`]); everything else — misses, page crossings,
//! MMIO, read-only and dirty-logged slots, pages with code, watched pages — is [`slow`]'s work.

mod flush;
mod hit;
pub(crate) mod operand;
mod ready;
pub(crate) mod slow;
pub mod tlb;
mod walk;
mod wide;

use crate::cpu::Cpu;
use crate::events::vector;
use crate::exit::{Fault, Stop};
use crate::state::{cr0, cr4, efer, rflags};
use tlb::Set;

/// What a page walk found: a 4 KiB piece and the rights of the walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Guest-physical address of the 4 KiB page.
    pub gpa: u64,
    /// User-mode pages.
    pub user: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub exec: bool,
    /// Global.
    pub global: bool,
    /// The dirty flag is set in the paging structures.
    pub dirty: bool,
    /// log2 of the size of the page this is a piece of (0 with paging off).
    pub shift: u8,
    /// Protection key.
    pub key: u8,
}

/// The kind of an access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// A write.
    pub write: bool,
    /// An instruction fetch.
    pub exec: bool,
    /// With user privilege (CPL 3 and not implicit).
    pub user: bool,
    /// A supervisor access to a table (GDT, IDT, TSS): SMAP holds whatever RFLAGS.AC is.
    pub implicit: bool,
}

/// A page fault's error code (SDM Vol. 3, 4.7), the access's own bits apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault(u32);

impl PageFault {
    const P: u32 = 1;
    const W: u32 = 2;
    const U: u32 = 4;
    const RSVD: u32 = 8;
    const I: u32 = 16;
    const PK: u32 = 32;

    /// No translation.
    pub fn not_present() -> Self {
        Self(0)
    }
    /// A reserved bit is set.
    pub fn reserved() -> Self {
        Self(Self::P | Self::RSVD)
    }
    /// Access rights, and whether a protection key denies the access too.
    fn protection(key: bool) -> Self {
        Self(Self::P | if key { Self::PK } else { 0 })
    }
}

impl Cpu {
    /// Whether the page's protection key counts (SDM Vol. 3, 4.6.2).
    pub(crate) fn keys_apply(&self, page: &Page) -> bool {
        page.user && self.state.cr4 & cr4::PKE != 0 && self.state.long_mode()
    }

    /// Whether PKRU denies a data access.
    fn key_denies(&self, page: &Page, access: Access) -> bool {
        if !self.keys_apply(page) || access.exec {
            return false;
        }
        let rights = self.state.xsave.pkru() >> (page.key * 2);
        let write = access.write && (access.user || self.state.cr0 & cr0::WP != 0);
        rights & 1 != 0 || rights & 2 != 0 && write
    }

    /// Checks the access rights of a walk (SDM Vol. 3, 4.6).
    pub(crate) fn check_rights(&self, page: &Page, access: Access) -> Result<(), PageFault> {
        let s = &self.state;
        let key_denies = self.key_denies(page, access);
        let denied = Err(PageFault::protection(key_denies));
        if access.user && !page.user {
            return denied;
        }
        if access.exec {
            if !page.exec || !access.user && page.user && s.cr4 & cr4::SMEP != 0 {
                return denied;
            }
            return Ok(());
        }
        if !access.user && page.user && s.cr4 & cr4::SMAP != 0 {
            let ac = s.rflags & rflags::AC != 0 && !access.implicit;
            if !ac {
                return denied;
            }
        }
        if access.write && !page.write && (access.user || s.cr0 & cr0::WP != 0) {
            return denied;
        }
        if key_denies { denied } else { Ok(()) }
    }

    /// The page of an access: from level 2 of the TLB or a walk.
    pub(crate) fn translate(&mut self, linear: u64, access: Access) -> Result<Page, Stop> {
        let paging = self.state.cr0 & cr0::PG != 0;
        let cached = if paging {
            self.tlb.walked(linear)
        } else {
            None
        };
        if let Some(page) = cached
            && (page.dirty || !access.write)
            && self.check_rights(&page, access).is_ok()
        {
            return Ok(page);
        }
        match self.walk(linear, access) {
            Ok(page) => {
                if paging {
                    self.tlb.remember(linear, page);
                }
                Ok(page)
            }
            Err(PageFault(mut code)) => {
                // A fault drops what is cached for the page, so that a stale entry cannot keep it
                // alive (SDM Vol. 3, 4.10.4.1).
                if cached.is_some() {
                    self.flush_tlb_page(linear);
                }
                if access.write {
                    code |= PageFault::W;
                }
                if access.user {
                    code |= PageFault::U;
                }
                let nx = self.state.msr.efer & efer::NX != 0 && self.state.cr4 & cr4::PAE != 0;
                if access.exec && (nx || self.state.cr4 & cr4::SMEP != 0) {
                    code |= PageFault::I;
                }
                Err(self.raise(Fault {
                    vector: vector::PF,
                    error_code: Some(code),
                    payload: linear,
                    trap: false,
                }))
            }
        }
    }

    /// Whether a linear address is canonical (always, outside long mode).
    #[inline]
    pub fn canonical(&self, linear: u64) -> bool {
        if !self.state.long_mode() {
            return true;
        }
        let bits = if self.state.cr4 & cr4::LA57 != 0 {
            57
        } else {
            48
        };
        let shift = 64 - bits;
        ((linear << shift) as i64 >> shift) as u64 == linear
    }

    /// The kind of the running code's data accesses.
    pub(crate) fn data_access(&self, write: bool) -> Access {
        Access {
            write,
            user: self.mode.user(),
            ..Access::default()
        }
    }

    /// Chooses the TLB set for the state's privilege, AC and alignment checking; called by
    /// [`Cpu::update_mode`].
    pub(crate) fn choose_set(&mut self) {
        let s = &self.state;
        let ac = s.rflags & rflags::AC != 0;
        self.tlb.set = if s.cpl() == 3 {
            if ac && s.cr0 & cr0::AM != 0 {
                Set::Slow
            } else {
                Set::User
            }
        } else if ac && s.cr4 & cr4::SMAP != 0 {
            Set::SupervisorAc
        } else {
            Set::Supervisor
        };
    }

    /// Translates for KVM_TRANSLATE: with supervisor rights, setting accessed flags; `None` if
    /// there is no translation.
    pub fn translate_debug(&mut self, linear: u64) -> Option<u64> {
        if self.state.cr0 & cr0::PG == 0 {
            return Some(linear);
        }
        let page = self.walk(linear, Access::default()).ok()?;
        Some(page.gpa | linear & 0xfff)
    }
}
