//! What other threads want of a running processor (Linux: `Documentation/virt/kvm/vcpu-requests.rst`).
//!
//! A bit is set by anybody; the processor's own thread looks at the word at every block boundary,
//! takes the bits it handles itself and returns [`crate::Exit::Request`] for the others.

use std::sync::atomic::{AtomicU32, Ordering};

/// Flush the TLB (`KVM_REQ_TLB_FLUSH`). Handled by the processor.
pub const TLB_FLUSH: u32 = 1 << 0;
/// The memory map changed (or dirty logging was cleared). Handled by the processor.
pub const MEMSLOTS: u32 = 1 << 1;
/// An interrupt, NMI or SMI may be deliverable (`KVM_REQ_EVENT`). Handled by the processor.
pub const EVENT: u32 = 1 << 2;
/// Leave the run loop with EINTR: a signal, or `immediate_exit`.
pub const KICK: u32 = 1 << 3;
/// INIT or SIPI wait in the local APIC, or another thing the owner must do outside the processor.
pub const OWNER: u32 = 1 << 4;
/// Let go of the processor for a moment (`KVM_REQ_UNBLOCK`-like pause; the owner waits).
pub const PAUSE: u32 = 1 << 5;
/// A page got its first code: drop fast write entries. Handled by the processor.
pub const CODE_PAGE: u32 = 1 << 6;

/// The bits that end [`crate::Cpu::run`].
pub const EXITS: u32 = KICK | OWNER | PAUSE;

/// The requests word of one processor.
#[derive(Debug)]
pub struct Requests {
    bits: AtomicU32,
    /// Not zero while `bits` is zero. Translated code looks at this one: JRCXZ tests for zero without
    /// touching the flags. It may be zero for a moment longer than `bits` is not.
    go: AtomicU32,
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            bits: AtomicU32::new(0),
            go: AtomicU32::new(1),
        }
    }
}

impl Requests {
    /// Sets bits; returns those that were set before.
    #[inline]
    pub fn set(&self, bits: u32) -> u32 {
        let before = self.bits.fetch_or(bits, Ordering::SeqCst);
        self.go.store(0, Ordering::SeqCst);
        before
    }
    /// Clears bits; returns those of them that were set.
    #[inline]
    pub fn take(&self, bits: u32) -> u32 {
        let before = self.bits.fetch_and(!bits, Ordering::SeqCst);
        // A bit set meanwhile is seen here, or its setter clears the word behind this store.
        self.go.store(1, Ordering::SeqCst);
        if self.bits.load(Ordering::SeqCst) != 0 {
            self.go.store(0, Ordering::SeqCst);
        }
        before & bits
    }
    /// All bits now.
    #[inline(always)]
    pub fn pending(&self) -> u32 {
        self.bits.load(Ordering::Relaxed)
    }
    /// Makes `go` agree with the bits again, should a setter have been slow.
    pub fn rearm(&self) {
        if self.pending() == 0 && self.go.load(Ordering::Relaxed) == 0 {
            self.take(0);
        }
    }
    /// Zero if requests are pending.
    pub fn go(&self) -> &AtomicU32 {
        &self.go
    }
    /// The word itself, to sleep on as a futex.
    pub fn word(&self) -> &AtomicU32 {
        &self.bits
    }
}
