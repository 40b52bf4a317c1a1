//! When a connection has to be looked at again. One live entry per connection; an entry that was overtaken by an
//! earlier one is skipped when it comes up.

use crate::core::hub::{Moment, Slot};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The timers of one reactor.
#[derive(Default)]
pub struct Timers {
    heap: BinaryHeap<Reverse<(Moment, Slot, i64)>>,
}

impl Timers {
    /// Sets a timer for a connection (its slot and id).
    pub fn set(&mut self, at: Moment, slot: Slot, id: i64) {
        self.heap.push(Reverse((at, slot, id)));
    }

    /// The earliest timer.
    pub fn next(&self) -> Option<Moment> {
        self.heap.peek().map(|Reverse((at, _, _))| *at)
    }

    /// Takes out a timer that is due.
    pub fn due(&mut self, now: Moment) -> Option<(Moment, Slot, i64)> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(timer)| timer)
    }
}
