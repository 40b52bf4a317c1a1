//! A line for a service that only so many calls may be made of at once: who waits for which call, equal calls that wait
//! are made once for all, in the order in which they were first asked for. Makes no calls itself; time is an argument.

use super::hub::Moment;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::Arc;

/// How long a call may wait while no other one succeeds, in milliseconds.
pub const PATIENCE: Moment = 30_000;

/// What is called first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rank {
    /// Somebody waits for it.
    Asked,
    /// It tells something.
    Told,
}

/// The calls that wait, and those that are under way.
pub struct Line<P, W> {
    calls: HashMap<u64, Call<P, W>>,
    waiting: [VecDeque<u64>; 2],
    /// The call that waits for a key: another one that asks for the same joins it.
    by_key: HashMap<(Rank, Arc<str>), u64>,
    under_way: HashSet<(Rank, Arc<str>)>,
    /// The calls that somebody waits for.
    of_waiter: HashMap<W, u64>,
    tickets: u64,
    /// When a call succeeded last.
    progress: Moment,
}

struct Call<P, W> {
    rank: Rank,
    key: Arc<str>,
    payload: P,
    waiters: Vec<W>,
    since: Moment,
}

impl<P, W> Default for Line<P, W> {
    fn default() -> Self {
        Line {
            calls: HashMap::new(),
            waiting: Default::default(),
            by_key: HashMap::new(),
            under_way: HashSet::new(),
            of_waiter: HashMap::new(),
            tickets: 0,
            progress: 0,
        }
    }
}

impl<P: Clone, W: Clone + Eq + Hash> Line<P, W> {
    /// Somebody waits for the answer to a call. One with the same key that waits already will do; one that is under way
    /// will not: what it answers may be older than this question.
    pub fn ask(&mut self, key: Arc<str>, payload: P, waiter: W, now: Moment) {
        let ticket = self.enter(Rank::Asked, key, payload, now);
        if let Some(call) = self.calls.get_mut(&ticket) {
            call.waiters.push(waiter.clone());
            self.of_waiter.insert(waiter, ticket);
        }
    }

    /// A call that nobody waits for. One with the same key that waits already is replaced: the last word counts.
    pub fn tell(&mut self, key: Arc<str>, payload: P, now: Moment) {
        let ticket = self.enter(Rank::Told, key, payload.clone(), now);
        if let Some(call) = self.calls.get_mut(&ticket) {
            call.payload = payload;
        }
    }

    fn enter(&mut self, rank: Rank, key: Arc<str>, payload: P, now: Moment) -> u64 {
        if let Some(ticket) = self.by_key.get(&(rank, key.clone())) {
            return *ticket;
        }
        self.tickets += 1;
        let ticket = self.tickets;
        self.by_key.insert((rank, key.clone()), ticket);
        self.calls.insert(ticket, Call { rank, key, payload, waiters: Vec::new(), since: now });
        self.queue(rank).push_back(ticket);
        ticket
    }

    fn queue(&mut self, rank: Rank) -> &mut VecDeque<u64> {
        let [asked, told] = &mut self.waiting;
        match rank {
            Rank::Asked => asked,
            Rank::Told => told,
        }
    }

    /// Somebody does not wait any more. A call that nobody waits for is not made.
    pub fn leave(&mut self, waiter: &W) {
        let Some(ticket) = self.of_waiter.remove(waiter) else { return };
        let Some(call) = self.calls.get_mut(&ticket) else { return };
        call.waiters.retain(|other| other != waiter);
        if call.waiters.is_empty() {
            self.drop_waiting(ticket);
        }
    }

    /// The call with this key is not to be told any more, if it still waits.
    pub fn untell(&mut self, key: &Arc<str>) {
        if let Some(ticket) = self.by_key.get(&(Rank::Told, key.clone())) {
            self.drop_waiting(*ticket);
        }
    }

    fn drop_waiting(&mut self, ticket: u64) {
        let Some(call) = self.calls.get(&ticket) else { return };
        let name = (call.rank, call.key.clone());
        // One under way ends by itself.
        if self.by_key.get(&name) == Some(&ticket) {
            self.by_key.remove(&name);
            self.queue(name.0).retain(|other| *other != ticket);
            self.calls.remove(&ticket);
        }
    }

    /// The next call to make, with its ticket, if fewer than `limit` are under way. Never two with the same key.
    pub fn next(&mut self, limit: usize) -> Option<(u64, P)> {
        if self.under_way.len() >= limit {
            return None;
        }
        for rank in [Rank::Asked, Rank::Told] {
            // No two that wait have the same key, so not many stand behind one under way.
            let free = |ticket: &u64| {
                let call = self.calls.get(ticket);
                call.is_some_and(|call| !self.under_way.contains(&(call.rank, call.key.clone())))
            };
            let queue = if rank == Rank::Asked { &self.waiting[0] } else { &self.waiting[1] };
            let Some(at) = queue.iter().position(free) else { continue };
            let ticket = self.queue(rank).remove(at)?;
            let call = self.calls.get(&ticket)?;
            let name = (rank, call.key.clone());
            self.by_key.remove(&name);
            self.under_way.insert(name);
            return Some((ticket, call.payload.clone()));
        }
        None
    }

    /// A call has ended, well or not. Returns what it was and who waits for its answer.
    pub fn done(&mut self, ticket: u64, well: bool, now: Moment) -> Option<(P, Vec<W>)> {
        let call = self.calls.remove(&ticket)?;
        self.under_way.remove(&(call.rank, call.key));
        if well {
            self.progress = now;
        }
        for waiter in &call.waiters {
            self.of_waiter.remove(waiter);
        }
        Some((call.payload, call.waiters))
    }

    /// Gives up what has waited for too long: who waited for it.
    pub fn overdue(&mut self, now: Moment) -> Vec<W> {
        let mut found = Vec::new();
        for rank in [Rank::Asked, Rank::Told] {
            while let Some(ticket) = self.queue(rank).front().copied() {
                let Some(call) = self.calls.get(&ticket) else { break };
                if now < call.since.max(self.progress).saturating_add(PATIENCE) {
                    break;
                }
                found.extend(call.waiters.iter().cloned());
                self.drop_waiting(ticket);
            }
        }
        for waiter in &found {
            self.of_waiter.remove(waiter);
        }
        found
    }

    /// When to look for what is overdue.
    pub fn deadline(&self) -> Option<Moment> {
        let fronts = self.waiting.iter().filter_map(|queue| self.calls.get(queue.front()?));
        fronts.map(|call| call.since.max(self.progress).saturating_add(PATIENCE)).min()
    }

    /// How many calls wait.
    pub fn waiting(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum()
    }

    /// How many calls are under way.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Arc<str> {
        text.into()
    }

    #[test]
    fn equal_calls_that_wait_are_made_once_for_all() {
        let mut line: Line<&str, u32> = Line::default();
        line.ask(key("a"), "a", 1, 0);
        line.ask(key("a"), "a", 2, 0);
        line.ask(key("b"), "b", 3, 0);
        let (first, payload) = line.next(8).unwrap();
        assert_eq!(payload, "a");
        // Under way: a new question is a new call, and waits for the end of the old one.
        line.ask(key("a"), "a again", 4, 0);
        assert_eq!(line.next(8).unwrap().1, "b");
        assert_eq!(line.next(8), None);
        assert_eq!(line.done(first, true, 1), Some(("a", vec![1, 2])));
        assert_eq!(line.next(8).unwrap().1, "a again");
    }

    #[test]
    fn no_more_than_the_limit_are_under_way() {
        let mut line: Line<u32, u32> = Line::default();
        (0..100).for_each(|n| line.ask(key(&n.to_string()), n, n, 0));
        let mut under_way: Vec<u64> = std::iter::from_fn(|| line.next(3)).map(|(ticket, _)| ticket).collect();
        assert_eq!((under_way.len(), line.waiting()), (3, 97));
        let mut order = Vec::new();
        while let Some(ticket) = under_way.pop() {
            order.extend(line.done(ticket, true, 0).unwrap().1);
            under_way.extend(std::iter::from_fn(|| line.next(3)).map(|(ticket, _)| ticket));
            assert!(line.under_way() <= 3);
        }
        assert_eq!(order.len(), 100);
    }

    #[test]
    fn who_has_left_is_not_called_for() {
        let mut line: Line<&str, u32> = Line::default();
        line.ask(key("a"), "a", 1, 0);
        line.ask(key("a"), "a", 2, 0);
        line.leave(&1);
        line.ask(key("b"), "b", 3, 0);
        line.leave(&3);
        let (ticket, _) = line.next(8).unwrap();
        assert_eq!(line.next(8), None);
        line.leave(&2);
        assert_eq!(line.done(ticket, true, 0), Some(("a", vec![])));
        assert_eq!((line.waiting(), line.under_way(), line.calls.len(), line.of_waiter.len()), (0, 0, 0, 0));
    }

    #[test]
    fn the_last_word_is_told_after_what_is_asked() {
        let mut line: Line<&str, u32> = Line::default();
        line.tell(key("s"), "away", 0);
        line.tell(key("s"), "online", 0);
        line.tell(key("t"), "gone", 0);
        line.untell(&key("t"));
        line.ask(key("s"), "ask", 1, 0);
        assert_eq!(line.next(8).unwrap().1, "ask");
        assert_eq!(line.next(8).unwrap().1, "online");
        assert_eq!(line.next(8), None);
    }

    #[test]
    fn patience_lasts_as_long_as_there_is_progress() {
        let mut line: Line<u32, u32> = Line::default();
        (0..3).for_each(|n| line.ask(key(&n.to_string()), n, n, 0));
        let (ticket, _) = line.next(1).unwrap();
        assert_eq!(line.deadline(), Some(PATIENCE));
        line.done(ticket, true, PATIENCE - 1);
        assert!(line.overdue(PATIENCE).is_empty());
        let (ticket, _) = line.next(1).unwrap();
        line.done(ticket, false, PATIENCE);
        assert_eq!(line.overdue(2 * PATIENCE - 1), [2]);
        assert_eq!((line.waiting(), line.deadline()), (0, None));
    }
}
