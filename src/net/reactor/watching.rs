//! Those who look at the gateway itself: `/metrics`, the live page, and who ends a connection.

use super::Reactor;
use crate::core::hub::Slot;
use crate::core::link;
use crate::core::link::Question;
use crate::core::protocol::{Close, CloseCode};
use crate::net::asked::Wish;
use crate::net::bridge::Note;
use crate::net::connection::Connection;
use crate::net::links::LinkId;
use crate::net::outbound::Kind;
use crate::net::status::{Gauges, Snapshot};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Between two messages to the live page, in milliseconds.
const EVERY: u64 = 1_000;

impl Reactor {
    /// The page's websocket is open.
    pub(super) fn watch(&mut self, slot: Slot) {
        self.watchers.push(slot);
        self.want_survey();
    }

    /// Has reactor 0 gather the state.
    pub(super) fn want_survey(&mut self) {
        self.next_survey = self.env.now + EVERY;
        if self.front.is_some() {
            self.survey();
        } else {
            self.tell_front(Note::WantSurvey);
        }
    }

    /// Once a second while somebody watches.
    pub(super) fn watch_time(&mut self) {
        if !self.watchers.is_empty() && self.env.now >= self.next_survey {
            self.want_survey();
        }
        self.finish_survey();
    }

    /// When to look at the time again.
    pub(super) fn watch_deadline(&self) -> Option<u64> {
        let next = (!self.watchers.is_empty()).then_some(self.next_survey);
        let survey = self.front.as_ref().and_then(|front| front.surveys.deadline());
        next.into_iter().chain(survey).min()
    }

    /// Reactor 0 begins to gather.
    pub(super) fn survey(&mut self) {
        let (reactors, now) = (self.peers.len(), self.env.now);
        let Some(front) = &mut self.front else { return };
        let Some(begun) = front.surveys.begin(reactors, now) else { return };
        if begun.ask_jobs {
            for database in self.env.databases.iter() {
                let query = self.numbers.request.fetch_add(1, Ordering::Relaxed);
                if front.links.is_up(database.oid) {
                    front.surveys.asked(query, database.oid);
                    front.links.query(database.oid, 0, query, Question::Jobs);
                }
            }
        }
        let number = begun.number;
        self.peers.iter().skip(1).for_each(|peer| peer.tell(Note::Survey { number }));
        let own = self.gauges();
        self.surveyed(number, own);
    }

    /// One reactor's figures have come to reactor 0.
    pub(super) fn surveyed(&mut self, number: u64, gauges: Gauges) {
        if let Some(front) = &mut self.front {
            front.surveys.add(number, gauges);
        }
        self.finish_survey();
    }

    /// Tells all reactors the state when it is gathered.
    pub(super) fn finish_survey(&mut self) {
        let Some(front) = &mut self.front else { return };
        let Some((gauges, jobs, again)) = front.surveys.finish(self.env.now) else { return };
        let names = self.env.databases.iter().map(|database| (database.oid, database.name.clone())).collect();
        let databases = (self.census)();
        let time = (self.env.unix_ms, self.env.now);
        let snapshot = Arc::new(Snapshot::new(time, gauges, databases, names, jobs));
        self.peers.iter().skip(1).for_each(|peer| peer.tell(Note::Snapshot(snapshot.clone())));
        self.show(&snapshot);
        if again {
            self.survey();
        }
    }

    /// This reactor's figures.
    pub(super) fn gauges(&self) -> Gauges {
        let mut gauges = Gauges::default();
        for (slot, connection) in (0..).zip(&self.connections) {
            let Some(connection) = connection else { continue };
            gauges.queued += connection.socket.out.len() as u64;
            let Some(database) = self.hub.database(slot).filter(|_| connection.counted) else { continue };
            let sum = gauges.databases.entry(database).or_default();
            *sum = (sum.0 + 1, sum.1 + self.hub.subscribed(slot) as u64);
            if !connection.socket.out.is_empty() {
                let slow = self.describe(slot, connection);
                let one = Gauges { slow: slow.into_iter().collect(), ..Gauges::default() };
                gauges.add(one);
            }
        }
        gauges
    }

    /// Answers those who asked for the state, and sends it to those who watch.
    pub(super) fn show(&mut self, snapshot: &Snapshot) {
        for slot in std::mem::take(&mut self.measuring) {
            let is_it = self.get(slot).and_then(Connection::waiting).is_some_and(|w| w.wish == Wish::Metrics);
            if is_it {
                let text = snapshot.metrics(&self.env.counters);
                self.finish(slot, |waiting| waiting.answer_text(text));
            }
        }
        for slot in self.watchers.clone() {
            let frame = snapshot.frame(&self.env.counters);
            let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { continue };
            // One that does not keep up misses some.
            if connection.socket.out.is_empty() {
                let _ = connection.send(frame, Kind::Live, &self.env);
            }
            self.mark(slot);
        }
    }

    /// One open websocket, for the administrator.
    pub(super) fn describe(&self, slot: Slot, connection: &Connection) -> Option<link::Connection> {
        let admission = &connection.websocket()?.admission;
        Some(link::Connection {
            id: connection.id,
            address: connection.address.to_string(),
            user_agent: admission.user_agent.to_string(),
            subject: admission.authority.subject().map(str::to_owned),
            database: admission.authority.database(),
            channels: self.hub.subscribed(slot) as i64,
            sent: self.hub.sent(slot),
            queued: connection.socket.out.len() as i64,
            age_ms: self.env.now.saturating_sub(connection.accepted) as i64,
        })
    }

    /// Somebody wants a connection ended: all reactors look for it.
    pub(super) fn end_connection(&mut self, link: LinkId, id: i64, database: Option<u32>, reason: String) {
        let reactors = self.peers.len();
        let Some(front) = &mut self.front else { return };
        let inquiry = front.inquire(link, reactors);
        let note = |reason: &str| Note::Disconnect { inquiry, id, database, reason: reason.to_owned() };
        self.peers.iter().skip(1).for_each(|peer| peer.tell(note(&reason)));
        let found = self.disconnect(id, database, &reason);
        if let Some(front) = &mut self.front {
            front.disconnected(inquiry, found);
        }
    }

    /// Ends a connection of this reactor, if it has it. The client may come back later.
    pub(super) fn disconnect(&mut self, id: i64, database: Option<u32>, reason: &str) -> bool {
        let is_it = |connection: &Connection| {
            connection.id == id
                && connection.websocket().is_some_and(|websocket| {
                    let of = websocket.admission.authority.database();
                    database.is_none_or(|database| database == of)
                })
        };
        let place = self.connections.iter().position(|connection| connection.as_deref().is_some_and(is_it));
        let Some(slot) = place.map(|place| place as Slot) else { return false };
        if let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) {
            connection.disconnect(&Close::new(CloseCode::TryLater, reason), &self.env);
        }
        self.leave(slot);
        self.mark(slot);
        true
    }
}
