//! Processors of one machine that run one at a time. What one of them undoes and does again, no other may see
//! half done.

use std::sync::{Condvar, Mutex, PoisonError};

/// See the module's description.
#[derive(Debug, Default)]
pub struct Turns {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// The number the next one who comes gets.
    next: u64,
    /// Whose turn it is.
    now: u64,
}

/// Its owner's turn ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Waits until all who came before have had their turns.
    pub(crate) fn take(&self) -> Turn<'_> {
        let mut queue = self.queue();
        let mine = queue.next;
        queue.next += 1;
        while queue.now != mine {
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Turn(self)
    }
    /// Whether somebody waits for the one whose turn it is.
    pub(crate) fn waiting(&self) -> bool {
        let queue = self.queue();
        queue.next - queue.now > 1
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.queue().now += 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn one_at_a_time() {
        let (turns, inside) = (Turns::default(), AtomicU32::new(0));
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..1000 {
                        let turn = turns.take();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
        });
        assert!(!turns.waiting());
        let turn = turns.take();
        assert!(!turns.waiting());
        drop(turn);
    }
}
