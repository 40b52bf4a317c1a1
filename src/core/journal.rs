//! What was dispatched lately, in the order of its dispatch: the answer to clients that come back. Ids are looked up in
//! it, rows are read from the table. Knows nothing of positions but that one stands at each chunk's beginning.

use super::position::Position;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

/// Dispatches remembered at least (a reconnect is a matter of seconds; 131,072 last a minute at 2,000 notifications a
/// second and cost 6 MiB with their index).
pub const KEPT: usize = if cfg!(test) { 64 } else { 1 << 17 };

/// Dispatches remembered at most, where a replay needs them: a slow one that is under way, or one of the last 50 s.
pub const KEPT_MAX: usize = if cfg!(test) { 256 } else { 1 << 20 };

/// Dispatches that share a remembered position, and are forgotten together.
const CHUNK: u64 = if cfg!(test) { 8 } else { 4096 };

/// One dispatched row: enough to know it again, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The row's id.
    pub id: i64,
    /// The transaction that wrote it: tells a row from a later one of the same id (TRUNCATE … RESTART IDENTITY).
    pub xmin: u32,
    /// [`super::channel::Channel::fingerprint`] of its channel, 0 when the row was no notification.
    pub channel: u32,
}

/// Spreads ids, which nobody chooses to collide but for themselves: a multiplication (Knuth's) instead of SipHash.
#[derive(Clone, Copy, Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_i64(i64::from(*byte)));
    }

    fn write_u32(&mut self, channel: u32) {
        self.write_i64(i64::from(channel));
    }

    fn write_i64(&mut self, id: i64) {
        let mixed = (self.0 ^ id as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// An entry as it is kept: with the number after that of the entry before it of the same channel, 0 for none.
#[derive(Clone, Copy, Debug)]
struct Kept {
    entry: Entry,
    previous: u64,
}

/// The journal. Entries are numbered from 0 on in the life of a worker.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    start: u64,
    entries: VecDeque<Kept>,
    /// The number of the latest entry of each id.
    index: HashMap<i64, u64, BuildHasherDefault<IdHasher>>,
    /// The number of the latest entry of each channel.
    channels: HashMap<u32, u64, BuildHasherDefault<IdHasher>>,
    /// Positions before the entries of these numbers, ascending; the first is the beginning's.
    chunks: VecDeque<(u64, Position)>,
    /// Entries before this one may have been dispatched by an earlier worker too, in another order.
    exact: u64,
}

impl Journal {
    /// An empty journal; what `position` covers was dispatched before it begins.
    pub fn new(position: Position) -> Journal {
        Journal { chunks: VecDeque::from([(0, position)]), ..Journal::default() }
    }

    /// The number of the first entry that is remembered.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// What was dispatched so far was not known to be new: clients may have had it in another order.
    pub fn begin_exact(&mut self) {
        self.exact = self.end();
    }

    /// The number of the entry that stands for a client's position: all entries before it reached the client, if it
    /// was to have them.
    pub fn place(&self, last: i64) -> Option<u64> {
        self.find(last).filter(|at| *at >= self.exact)
    }

    /// The number of the next entry.
    pub fn end(&self) -> u64 {
        self.start + self.entries.len() as u64
    }

    /// Whether this very row was dispatched.
    pub fn holds(&self, id: i64, xmin: u32) -> bool {
        self.find(id).is_some_and(|at| self.entry(at).is_some_and(|entry| entry.xmin == xmin))
    }

    /// The number of the latest entry of an id.
    pub fn find(&self, id: i64) -> Option<u64> {
        self.index.get(&id).copied()
    }

    /// What was dispatched before the first entry that is remembered.
    pub fn base(&self) -> Option<&Position> {
        self.chunks.front().map(|(_, position)| position)
    }

    /// The entries of these numbers that are remembered, with their numbers.
    pub fn slice(&self, numbers: Range<u64>) -> impl Iterator<Item = (u64, Entry)> + '_ {
        let place = |number: u64| (number.clamp(self.start, self.end()) - self.start) as usize;
        let (from, to) = (place(numbers.start), place(numbers.end).max(place(numbers.start)));
        (self.start + from as u64..).zip(self.entries.range(from..to).map(|kept| kept.entry))
    }

    /// The entries of these channels from this number on, in order, with their numbers; None when there are more than
    /// `limit`. The work is one step for each of them, however long the journal is.
    pub fn of_channels(&self, channels: &HashSet<u32>, from: u64, limit: usize) -> Option<Vec<(u64, Entry)>> {
        let mut found = Vec::new();
        for channel in channels {
            let mut next = self.channels.get(channel).copied();
            while let Some(number) = next.filter(|number| *number >= from.max(self.start)) {
                let kept = self.kept(number)?;
                if found.len() >= limit {
                    return None;
                }
                found.push((number, kept.entry));
                next = kept.previous.checked_sub(1);
            }
        }
        found.sort_unstable_by_key(|(number, _)| *number);
        Some(found)
    }

    /// Adds what is dispatched now; `position` is the one before it. `needed` is the first entry that a replay still
    /// reads.
    pub fn extend(
        &mut self,
        entries: impl IntoIterator<Item = Entry>,
        position: impl FnOnce() -> Position,
        needed: impl FnOnce() -> u64,
    ) {
        if self.chunks.back().is_none_or(|(at, _)| self.end() >= at + CHUNK) {
            self.chunks.push_back((self.end(), position()));
        }
        for entry in entries {
            let number = self.end();
            self.index.insert(entry.id, number);
            let previous = self.channels.insert(entry.channel, number).map_or(0, |previous| previous + 1);
            self.entries.push_back(Kept { entry, previous });
        }
        if self.entries.len() > KEPT + CHUNK as usize {
            self.trim(needed());
        }
    }

    /// Forgets the entries from this number on: nobody has seen them.
    pub fn truncate(&mut self, end: u64) {
        while self.end() > end.max(self.start) {
            let Some(Kept { entry, previous }) = self.entries.pop_back() else { break };
            if self.index.get(&entry.id) == Some(&self.end()) {
                self.index.remove(&entry.id);
            }
            match previous.checked_sub(1).filter(|previous| *previous >= self.start) {
                Some(previous) => self.channels.insert(entry.channel, previous),
                None => self.channels.remove(&entry.channel),
            };
        }
        self.exact = self.exact.min(self.end());
        while self.chunks.len() > 1 && self.chunks.back().is_some_and(|(at, _)| *at > self.end()) {
            self.chunks.pop_back();
        }
    }

    fn entry(&self, number: u64) -> Option<Entry> {
        self.kept(number).map(|kept| kept.entry)
    }

    fn kept(&self, number: u64) -> Option<&Kept> {
        self.entries.get(usize::try_from(number.checked_sub(self.start)?).ok()?)
    }

    /// Forgets the oldest chunks.
    fn trim(&mut self, needed: u64) {
        while let Some((next, _)) = self.chunks.get(1) {
            let rest = (self.end() - next) as usize;
            if rest < KEPT || (*next > needed && rest < KEPT_MAX) {
                return;
            }
            for number in self.start..*next {
                let Some(Kept { entry, .. }) = self.entries.pop_front() else { break };
                if self.index.get(&entry.id) == Some(&number) {
                    self.index.remove(&entry.id);
                }
                if self.channels.get(&entry.channel) == Some(&number) {
                    self.channels.remove(&entry.channel);
                }
            }
            self.start = *next;
            self.chunks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: i64) -> Entry {
        Entry { id, xmin: 1, channel: 0 }
    }

    fn add(journal: &mut Journal, ids: std::ops::RangeInclusive<i64>, needed: u64) {
        for id in ids {
            journal.extend([entry(id)], || Position { high: id - 1, ..Position::default() }, || needed);
        }
    }

    fn ids(journal: &Journal, numbers: Range<u64>) -> Vec<i64> {
        journal.slice(numbers).map(|(_, entry)| entry.id).collect()
    }

    #[test]
    fn a_row_is_known_by_its_id_and_its_transaction() {
        let mut journal = Journal::new(Position::default());
        add(&mut journal, 5..=7, 0);
        assert!(journal.holds(6, 1) && !journal.holds(6, 2) && !journal.holds(8, 1));
        journal.extend([Entry { id: 6, xmin: 2, channel: 0 }], Position::default, || 0);
        assert!(journal.holds(6, 2) && !journal.holds(6, 1));
        assert_eq!(journal.find(6), Some(3));
        assert_eq!(ids(&journal, 1..9), [6, 7, 6]);
        assert_eq!(ids(&journal, 9..12), Vec::<i64>::new());
    }

    #[test]
    fn what_nobody_has_seen_is_forgotten() {
        let mut journal = Journal::new(Position::default());
        add(&mut journal, 1..=CHUNK as i64 + 10, 0);
        journal.truncate(3);
        assert_eq!(journal.end(), 3);
        assert!(journal.holds(3, 1) && !journal.holds(4, 1));
        add(&mut journal, 4..=4, 0);
        assert_eq!(journal.find(4), Some(3));
        assert_eq!(journal.base().unwrap().high, 0);
    }

    #[test]
    fn the_oldest_go_chunk_by_chunk_with_their_position() {
        let mut journal = Journal::new(Position::default());
        let count = KEPT as i64 + 3 * CHUNK as i64;
        add(&mut journal, 1..=count, u64::MAX);
        assert!(journal.entries.len() <= KEPT + CHUNK as usize && journal.entries.len() >= KEPT);
        assert_eq!(journal.index.len(), journal.entries.len());
        let (_, first) = journal.slice(0..u64::MAX).next().unwrap();
        assert_eq!(journal.base().unwrap().high, first.id - 1);
        assert!(!journal.holds(first.id - 1, 1) && journal.holds(count, 1));
    }

    #[test]
    fn the_entries_of_a_channel_are_found_by_it_however_the_journal_changed() {
        let mut journal = Journal::new(Position::default());
        let channel = |id: i64| (id % 3) as u32;
        let mine = |journal: &Journal, from: u64, limit: usize| -> Option<Vec<i64>> {
            let found = journal.of_channels(&[1, 7].into(), from, limit)?;
            Some(found.into_iter().map(|(_, entry)| entry.id).collect())
        };
        let by_hand = |journal: &Journal, from: u64| -> Vec<i64> {
            journal.slice(from..u64::MAX).filter(|(_, entry)| entry.channel == 1).map(|(_, entry)| entry.id).collect()
        };
        for id in 1..=3 * KEPT as i64 {
            journal.extend([Entry { id, xmin: 1, channel: channel(id) }], Position::default, || u64::MAX);
            if id % 31 == 0 {
                journal.truncate(journal.end() - 7);
            }
            let from = journal.end().saturating_sub(20);
            assert_eq!(mine(&journal, from, 20), Some(by_hand(&journal, from)));
        }
        assert!(journal.start() > 0 && journal.channels.len() <= 3);
        assert_eq!(mine(&journal, 0, KEPT_MAX), Some(by_hand(&journal, 0)));
        assert_eq!(mine(&journal, 0, by_hand(&journal, 0).len() - 1), None);
        journal.truncate(0);
        assert!(journal.channels.is_empty() && journal.index.is_empty());
    }

    #[test]
    fn what_a_replay_needs_stays_within_limits() {
        let mut journal = Journal::new(Position::default());
        add(&mut journal, 1..=2 * KEPT as i64, 7);
        assert_eq!(journal.start(), 0);
        add(&mut journal, 1..=KEPT_MAX as i64, 7);
        assert!(journal.start() > 7);
    }
}
