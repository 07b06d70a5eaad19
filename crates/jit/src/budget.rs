//! How much code the translators of one VM may keep, all together.
//!
//! Each processor has a code cache of its own, so that translated code is found, linked and dropped
//! without a lock. What they share is the limit: a processor may fill an even part of it. When one is
//! added, the parts become smaller, and those that hold more give all of theirs back the next time
//! their run loops come round; until then the new one gets what is left. So the limit holds at any
//! moment, whatever the number of processors.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The limit of a VM.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    members: AtomicUsize,
    /// Even part of one member.
    share: AtomicUsize,
    taken: AtomicUsize,
}

impl Budget {
    /// A budget of `limit` bytes of code.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            members: AtomicUsize::new(0),
            share: AtomicUsize::new(limit),
            taken: AtomicUsize::new(0),
        })
    }
    /// The limit in bytes.
    pub fn limit(&self) -> usize {
        self.limit
    }
    /// Bytes in use now.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
    fn set_members(&self, members: usize) {
        self.share
            .store(self.limit / members.max(1), Ordering::Relaxed);
    }
}

/// One processor's part of a [`Budget`].
#[derive(Debug)]
pub struct Account {
    budget: Arc<Budget>,
    held: usize,
}

impl Account {
    /// One more processor.
    pub fn open(budget: &Arc<Budget>) -> Self {
        let members = budget.members.fetch_add(1, Ordering::Relaxed) + 1;
        budget.set_members(members);
        Self {
            budget: budget.clone(),
            held: 0,
        }
    }
    fn share(&self) -> usize {
        self.budget.share.load(Ordering::Relaxed)
    }
    /// Takes `n` bytes, if this processor's part and the limit allow it.
    pub fn take(&mut self, n: usize) -> bool {
        if self.held.saturating_add(n) > self.share() {
            return false;
        }
        let limit = self.budget.limit;
        let taken = self
            .budget
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                taken.checked_add(n).filter(|sum| *sum <= limit)
            });
        self.held += if taken.is_ok() { n } else { 0 };
        taken.is_ok()
    }
    /// Whether its part is large enough to hold `n` bytes.
    pub fn could_take(&self, n: usize) -> bool {
        n <= self.share()
    }
    /// Gives back all but `keep` bytes.
    pub fn keep(&mut self, keep: usize) {
        let back = self.held.saturating_sub(keep);
        self.budget.taken.fetch_sub(back, Ordering::Relaxed);
        self.held -= back;
    }
    /// Whether this processor holds more than its part: another has come.
    pub fn is_over(&self) -> bool {
        self.held > self.share()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.keep(0);
        let members = self.budget.members.fetch_sub(1, Ordering::Relaxed) - 1;
        self.budget.set_members(members);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_when_processors_come_and_go() {
        let budget = Budget::new(1000);
        let mut one = Account::open(&budget);
        assert!(one.take(900));
        assert!(!one.take(101));
        let mut two = Account::open(&budget);
        assert!(one.is_over());
        assert!(!two.take(101), "the first holds the rest still");
        assert!(two.take(100));
        one.keep(10);
        assert!(!one.is_over());
        assert!(two.take(400));
        assert!(!two.take(1), "an even part");
        assert_eq!(budget.taken(), 510);
        drop(one);
        assert!(two.take(500));
        assert_eq!(budget.taken(), 1000);
        drop(two);
        assert_eq!(budget.taken(), 0);
    }
}
