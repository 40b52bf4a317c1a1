//! What is known of one database: its link, how far it was seen, the replays and answers its clients wait for. Decides which
//! of them may ask for a page now, and what is asked again of the next worker when a link was lost. Says nothing itself.

use crate::core::channel::Channel;
use crate::core::hub::Recovery;
use crate::core::link::{Command, Question};
use crate::core::position::Position;
use crate::net::replays::Ask;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

/// Pages that one database works on at once (SPEC section 11).
const AT_ONCE: usize = 4;

/// Pages that may be on their way in all, with those that nobody waits for any more. Their answers still come, so
/// without an end to them clients that come and go could fill the link with work for nobody.
const AHEAD: usize = 4 * AT_ONCE;

/// Queries that one database works on at once.
const QUERIES: usize = 2;

/// One database.
#[derive(Default)]
pub struct Desk {
    /// The place of its link.
    pub link: Option<usize>,
    /// After the last dispatch that was seen.
    pub position: Option<Position>,
    replays: HashMap<u64, Replay>,
    /// Requests that wait for a place, by their tickets: in the order in which they asked.
    line: BTreeMap<u64, u64>,
    /// Tickets given out.
    tickets: u64,
    /// How many replays wait for a page that is said to the worker.
    asked: usize,
    /// Requests that were given up while their page was on its way.
    forgotten: HashSet<u64>,
    queries: HashMap<u64, Query>,
    /// Queries that wait for a place.
    unasked: VecDeque<u64>,
}

/// What a connection of one of the reactors wants to know.
struct Query {
    reactor: usize,
    question: Question,
}

/// A replay to a connection of one of the reactors, until its last page.
struct Replay {
    reactor: usize,
    channels: Vec<Channel>,
    /// The id of the last notification passed on, at first what the client said: where the next worker begins.
    last: i64,
    /// Whether the worker at the other end of the link knows of it.
    begun: bool,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// In the line, with this ticket.
    Waiting(u64),
    /// Its page is on its way; the ticket is for the case that it gets lost.
    Asked(u64),
    /// Its connection has a page to take in.
    Parked,
}

impl Desk {
    /// A connection of a reactor asks for a page.
    pub fn ask(&mut self, reactor: usize, ask: Ask) {
        self.tickets += 1;
        let ticket = self.tickets;
        let request = match ask {
            Ask::Recover(Recovery { request, channels, last }) => {
                let replay = Replay { reactor, channels, last, begun: false, stage: Stage::Parked };
                self.replays.insert(request, replay);
                request
            }
            Ask::More(request) => request,
        };
        let Some(replay) = self.replays.get_mut(&request).filter(|replay| replay.stage == Stage::Parked) else {
            return;
        };
        replay.stage = Stage::Waiting(ticket);
        self.line.insert(ticket, request);
    }

    /// A connection of a reactor wants to know something.
    pub fn query(&mut self, reactor: usize, query: u64, question: Question) {
        self.queries.insert(query, Query { reactor, question });
        self.unasked.push_back(query);
    }

    /// The answer to a query has come. Returns the reactor it goes to.
    pub fn told(&mut self, query: u64) -> Option<usize> {
        self.queries.remove(&query).map(|query| query.reactor)
    }

    /// Nobody waits for the answer to this query any more. One that is being worked on keeps its place until then.
    pub fn drop_query(&mut self, query: u64) {
        if let Some(at) = self.unasked.iter().position(|waiting| *waiting == query) {
            self.unasked.remove(at);
            self.queries.remove(&query);
        }
    }

    /// The next question or page to ask the worker for, if there is a place; it counts as asked for.
    pub fn next(&mut self) -> Option<Command> {
        self.next_query().or_else(|| self.next_page())
    }

    fn next_query(&mut self) -> Option<Command> {
        if self.queries.len() - self.unasked.len() >= QUERIES {
            return None;
        }
        let query = self.unasked.pop_front()?;
        let question = self.queries.get(&query)?.question.clone();
        Some(Command::Query { query, question })
    }

    fn next_page(&mut self) -> Option<Command> {
        if self.asked >= AT_ONCE || self.asked + self.forgotten.len() >= AHEAD {
            return None;
        }
        let (ticket, request) = self.line.pop_first()?;
        let replay = self.replays.get_mut(&request)?;
        replay.stage = Stage::Asked(ticket);
        self.asked += 1;
        if std::mem::replace(&mut replay.begun, true) {
            return Some(Command::More { request });
        }
        Some(Command::Recover { request, channels: replay.channels.clone(), last: replay.last })
    }

    /// A page has come, asked for or not; `last` is the id of its last notification. Returns the reactor it goes to,
    /// None when nobody waits for it.
    pub fn answered(&mut self, request: u64, last: Option<i64>, more: bool) -> Option<usize> {
        let Some(replay) = self.replays.get_mut(&request).filter(|replay| replay.begun) else {
            self.forgotten.remove(&request);
            return None;
        };
        match std::mem::replace(&mut replay.stage, Stage::Parked) {
            Stage::Waiting(ticket) => drop(self.line.remove(&ticket)),
            Stage::Asked(_) => self.asked = self.asked.saturating_sub(1),
            Stage::Parked => {}
        }
        replay.last = last.unwrap_or(replay.last);
        let reactor = replay.reactor;
        if !more {
            self.replays.remove(&request);
        }
        Some(reactor)
    }

    /// Nobody waits for this replay any more. True when the worker is to be told.
    pub fn forget(&mut self, request: u64) -> bool {
        let Some(replay) = self.replays.remove(&request) else { return false };
        match replay.stage {
            Stage::Waiting(ticket) => drop(self.line.remove(&ticket)),
            Stage::Asked(_) => {
                self.asked = self.asked.saturating_sub(1);
                self.forgotten.insert(request);
            }
            Stage::Parked => {}
        }
        replay.begun
    }

    /// The link is lost, and with it every page on its way: they are asked for again in their old order.
    pub fn lose(&mut self) {
        self.link = None;
        self.asked = 0;
        self.forgotten.clear();
        self.unasked = self.queries.keys().copied().collect();
        self.unasked.make_contiguous().sort_unstable();
        for (request, replay) in &mut self.replays {
            replay.begun = false;
            if let Stage::Asked(ticket) = replay.stage {
                replay.stage = Stage::Waiting(ticket);
                self.line.insert(ticket, *request);
            }
        }
    }

    /// Whether there is nothing to be kept.
    pub fn is_empty(&self) -> bool {
        self.link.is_none() && self.position.is_none() && self.replays.is_empty() && self.queries.is_empty()
    }
}

#[cfg(test)]
mod tests;
