//! The ring in which committed transactions leave what they have written, in the order of their commits. Many writers
//! (backends, right after their commit: they cannot fail, allocate, lock or wait) and several readers, each of which
//! reads everything with a cursor of its own. Writers never wait for readers: one that is lapped is told so.
//!
//! The guarantee: if `append(a)` has returned before `append(b)` begins, a reader is given `a` before `b`. A reader is
//! given each entry at most once and never a torn one.
//!
//! Why it holds: `append` reserves its indexes with one fetch_add on `head`, so `a` has lower indexes than `b`, and a
//! reader goes by index. An entry reserved but not yet written is passed over and asked for again (a hole): its writer
//! has not returned, so nothing that a reader was given in the meantime had to come after it. Each cell is a seqlock:
//! its stamp says for which index it is being written or written. The writer's release fence after the stamp's odd value
//! and the reader's acquire fence before it looks at the stamp again make sure that a reader that saw anything of a later
//! lap's data sees its stamp too; the release store of the even stamp, with the reader's acquire load of it, that the
//! data it belongs to is complete.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A word of shared memory: std's atomic, or a model checker's.
pub trait Word {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    fn fetch_add(&self, value: u64, order: Ordering) -> u64;
    /// The value before, `Ok` when it was `current` and is `new` now.
    ///
    /// # Errors
    /// It was another one.
    fn compare_exchange(&self, current: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64>;
    fn fence(order: Ordering);
}

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        AtomicU64::load(self, order)
    }

    fn store(&self, value: u64, order: Ordering) {
        AtomicU64::store(self, value, order);
    }

    fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        AtomicU64::fetch_add(self, value, order)
    }

    fn compare_exchange(&self, current: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64> {
        AtomicU64::compare_exchange(self, current, new, success, failure)
    }

    fn fence(order: Ordering) {
        fence(order);
    }
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The ids `first..=last` were inserted by a transaction that has committed; its last range.
    Committed = 1,
    /// The same, and more of the same transaction follows.
    Part = 2,
    /// Ids were inserted by a transaction that was prepared; see [`Entry::prepared`].
    Prepared = 3,
    /// The prepared transaction with the number `first` has been committed, or one too long for the ring; so many as
    /// `last` says of its savepoints follow.
    Finished = 4,
    /// A transaction wrote more ranges than fit: the table has them.
    Overflow = 5,
}

impl Kind {
    fn of(number: u64) -> Option<Kind> {
        let kinds = [Kind::Committed, Kind::Part, Kind::Prepared, Kind::Finished, Kind::Overflow];
        kinds.into_iter().find(|kind| *kind as u64 == number)
    }
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// OID of the database it is about.
    pub database: u32,
    pub kind: Kind,
    pub first: i64,
    pub last: i64,
}

impl Entry {
    /// The ids `first..=last` were inserted by the transaction of this number, which was prepared: in the second word
    /// their count less one, and the number above it. Of a range beyond 2^32 ids the rest is left to the table.
    pub fn prepared(database: u32, (first, last): (i64, i64), number: u32) -> Entry {
        let more = last.saturating_sub(first).clamp(0, i64::from(u32::MAX));
        Entry { database, kind: Kind::Prepared, first, last: i64::from(number as i32) << 32 | more }
    }

    /// The ids and the number of [`Entry::prepared`].
    pub fn promise(&self) -> Option<((i64, i64), u32)> {
        let more = self.last & i64::from(u32::MAX);
        let range = (self.first, self.first.saturating_add(more));
        (self.kind == Kind::Prepared).then_some((range, (self.last >> 32) as u32))
    }
}

/// A place for an entry. All zero: empty.
#[repr(C)]
pub struct Cell<W> {
    /// 2i+1 while it is written for index i, 2i+2 when it is.
    stamp: W,
    /// The database, and the kind above it.
    tag: W,
    first: W,
    last: W,
}

/// The ring; `N` is a power of two. Zeroed memory is an empty ring.
#[repr(C)]
pub struct Ring<W, const N: usize> {
    /// The index of the next entry.
    head: W,
    cells: [Cell<W>; N],
}

fn being_written(index: u64) -> u64 {
    index.wrapping_mul(2) + 1
}

fn written(index: u64) -> u64 {
    index.wrapping_mul(2) + 2
}

/// What a reader finds at an index.
enum Found {
    Entry(Entry),
    /// Not written yet.
    Hole,
    /// Written over, or never to be read.
    Lost,
}

impl<W: Word, const N: usize> Ring<W, N> {
    const POWER_OF_TWO: () = assert!(N.is_power_of_two());

    /// The index of the next entry: what has a lower one was appended, or is being so.
    pub fn head(&self) -> u64 {
        self.head.load(Ordering::Acquire)
    }

    /// Appends entries of one database in this order; more than a quarter of the ring as one [`Kind::Overflow`]. Takes
    /// no memory and never waits. An entry whose place is still being written by somebody who has slept for a whole lap
    /// is given up: readers are told.
    pub fn append(&self, entries: impl ExactSizeIterator<Item = Entry>) {
        let () = Self::POWER_OF_TWO;
        let count = entries.len();
        if count > N / 4 {
            let overflow = |entry: Entry| Entry { kind: Kind::Overflow, ..entry };
            self.append_all(1, entries.take(1).map(overflow));
        } else if count > 0 {
            self.append_all(count as u64, entries);
        }
    }

    fn append_all(&self, count: u64, entries: impl Iterator<Item = Entry>) {
        // AcqRel: what this process did before, its commit above all, is done for whoever reads the new head.
        let first = self.head.fetch_add(count, Ordering::AcqRel);
        for (index, entry) in (first..first + count).zip(entries) {
            self.write(index, entry);
        }
    }

    fn cell(&self, index: u64) -> Option<&Cell<W>> {
        self.cells.get(index as usize & (N - 1))
    }

    fn write(&self, index: u64, entry: Entry) {
        let Some(cell) = self.cell(index) else { return };
        let seen = cell.stamp.load(Ordering::Relaxed);
        let is_free = seen % 2 == 0 && seen < being_written(index);
        let claim =
            |seen| cell.stamp.compare_exchange(seen, being_written(index), Ordering::Acquire, Ordering::Relaxed);
        if !is_free || claim(seen).is_err() {
            return;
        }
        W::fence(Ordering::Release);
        let kind = (entry.kind as u64) << 32;
        cell.tag.store(kind | u64::from(entry.database), Ordering::Relaxed);
        cell.first.store(entry.first as u64, Ordering::Relaxed);
        cell.last.store(entry.last as u64, Ordering::Relaxed);
        cell.stamp.store(written(index), Ordering::Release);
    }

    fn find(&self, index: u64) -> Found {
        let Some(cell) = self.cell(index) else { return Found::Lost };
        let stamp = cell.stamp.load(Ordering::Acquire);
        if stamp != written(index) {
            return if stamp < written(index) { Found::Hole } else { Found::Lost };
        }
        let (tag, first, last) =
            (cell.tag.load(Ordering::Relaxed), cell.first.load(Ordering::Relaxed), cell.last.load(Ordering::Relaxed));
        W::fence(Ordering::Acquire);
        if cell.stamp.load(Ordering::Relaxed) != stamp {
            return Found::Lost;
        }
        match Kind::of(tag >> 32) {
            Some(kind) => Found::Entry(Entry { database: tag as u32, kind, first: first as i64, last: last as i64 }),
            None => Found::Lost,
        }
    }
}

/// How far one reader is.
#[derive(Clone, Debug, Default)]
pub struct Reader {
    cursor: u64,
    /// Indexes below the cursor that were not written yet, ascending.
    holes: Vec<u64>,
}

impl Reader {
    /// Begins at an index.
    pub fn new(cursor: u64) -> Reader {
        Reader { cursor, holes: Vec::new() }
    }

    /// The lowest index not yet read, holes included.
    pub fn position(&self) -> u64 {
        self.holes.first().copied().unwrap_or(self.cursor)
    }

    /// The index of what was appended last when it read.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Reads what was appended up to now: `each` is given the index and the entry, filled holes first, then by index.
    /// False when some entries were overwritten before they were read, or may have been.
    pub fn read<W: Word, const N: usize>(&mut self, ring: &Ring<W, N>, mut each: impl FnMut(u64, Entry)) -> bool {
        let head = ring.head();
        let mut whole = self.cursor <= head;
        self.cursor = self.cursor.min(head);
        // Whatever lies further back has been overwritten, or is about to be.
        let oldest = head.saturating_sub(N as u64);
        let from = self.cursor.max(oldest);
        whole &= from == self.cursor && self.holes.first().is_none_or(|index| *index >= oldest);
        let old: Vec<u64> = self.holes.drain(..).filter(|index| (oldest..from).contains(index)).collect();
        let new: Range<u64> = from..head;
        let mut found = Vec::new();
        // Backwards: who has written one entry has written those before it, of the same append too.
        for index in old.into_iter().chain(new).rev() {
            match ring.find(index) {
                Found::Entry(entry) => found.push((index, entry)),
                Found::Hole => self.holes.push(index),
                Found::Lost => whole = false,
            }
        }
        self.holes.reverse();
        found.into_iter().rev().for_each(|(index, entry)| each(index, entry));
        self.cursor = head;
        whole
    }
}

#[cfg(test)]
mod tests;
