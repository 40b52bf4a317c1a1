//! What takes somebody else's answer: requests that wait, and subscriptions whose channels are asked for. Each
//! connection waits for one answer at a time.

use super::{Reactor, Whom};
use crate::core::channel::Channel;
use crate::core::granted::Granted;
use crate::core::hub::Slot;
use crate::core::link::{Answer, Question};
use crate::core::protocol::{Close, CloseCode};
use crate::net::asked::{Said, Waiting, Wish};
use crate::net::auth::Authority;
use crate::net::bridge::Note;
use crate::net::connection::Connection;
use crate::net::counters::Counters;
use crate::net::odoo;
use std::sync::atomic::Ordering;

impl Reactor {
    /// A request waits: it is asked for what it wants, or for its channels first.
    pub(super) fn asked(&mut self, slot: Slot) {
        let Some(waiting) = self.get(slot).and_then(Connection::waiting) else { return };
        let channels = match waiting.parsed_channels() {
            Ok(channels) => channels,
            Err(reason) => return self.finish(slot, |waiting| waiting.refuse(&reason)),
        };
        match &waiting.admission.authority {
            Authority::Token(claims) => match channels {
                channels if channels.iter().all(|channel| claims.allows(channel)) => {
                    self.allowed(slot, channels);
                }
                _ => self.finish(slot, |waiting| waiting.fail(403)),
            },
            Authority::Function(asking) => {
                let headers = asking.headers.to_string();
                let question = Question::Authenticate { headers, channels: waiting.channels().to_owned() };
                let database = asking.database.oid;
                self.query(slot, database, question);
            }
            Authority::Odoo(vouched) => {
                let visitor = Box::new(vouched.visitor.clone());
                let question = waiting.for_odoo();
                self.ask_odoo(slot, visitor, question);
            }
            Authority::Watcher { .. } => {
                self.measuring.push(slot);
                self.want_survey();
            }
        }
    }

    /// A waiting request may have what it wants.
    pub(super) fn allowed(&mut self, slot: Slot, channels: Vec<Channel>) {
        let Some(waiting) = self.get(slot).and_then(Connection::waiting) else { return };
        let database = waiting.admission.authority.database();
        let last = match waiting.wish {
            Wish::Missed { last } => return self.query(slot, database, Question::Missed { last }),
            Wish::Vacuum => return self.query(slot, database, Question::Vacuum),
            Wish::Metrics | Wish::Open(_) | Wish::Forward { .. } => return,
            Wish::Notifications { .. } => waiting.subscribed(&channels),
        };
        self.hub.open(slot, database);
        self.join(slot, channels, last);
        if self.get(slot).is_some_and(|connection| !connection.replays.is_running()) {
            self.page_for_request(slot, false);
        }
    }

    /// Channels are asked for whenever a connection has subscribed and no answer is on its way.
    pub(super) fn ask_again(&mut self, slot: Slot) {
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        if connection.query.is_some() {
            return;
        }
        let Some((channels, last)) = connection.subscribing.take().map(|subscribing| *subscribing) else { return };
        connection.asked_last = last;
        let Some(websocket) = connection.websocket() else { return };
        let asking = match &websocket.admission.authority {
            Authority::Function(asking) => asking,
            Authority::Odoo(vouched) => {
                let visitor = Box::new(vouched.visitor.clone());
                return self.ask_odoo(slot, visitor, odoo::Question::Channels { channels, last, is_first: true });
            }
            _ => return,
        };
        let question = Question::Authenticate { headers: asking.headers.to_string(), channels };
        let database = asking.database.oid;
        self.query(slot, database, question);
    }

    fn query(&mut self, slot: Slot, database: u32, question: Question) {
        let query = self.numbers.request.fetch_add(1, Ordering::Relaxed);
        let Some(connection) = self.get(slot) else { return };
        connection.query = Some(query);
        self.queries.insert(query, (slot, Whom::Database(database)));
        let reactor = self.index;
        match &mut self.front {
            Some(front) => front.links.query(database, reactor, query, question),
            None => self.tell_front(Note::Query { database, reactor, query, question }),
        }
    }

    /// Nobody waits for the answer to a connection's query any more.
    pub(super) fn drop_query(&mut self, slot: Slot) {
        let Some(connection) = self.get(slot) else { return };
        let Some(query) = connection.query.take() else { return };
        let Some((_, whom)) = self.queries.remove(&query) else { return };
        let Whom::Database(database) = whom else { return self.drop_odoo(query) };
        match &mut self.front {
            Some(front) => front.links.drop_query(database, query),
            None => self.tell_front(Note::DropQuery { database, query }),
        }
    }

    /// The answer to a query has come.
    pub(super) fn told(&mut self, query: u64, answer: Answer) {
        if let Some(front) = &mut self.front {
            let jobs = if let Answer::Jobs(jobs) = &answer { Some(jobs.clone()) } else { None };
            if front.surveys.told(query, jobs) {
                return self.finish_survey();
            }
        }
        let Some((slot, _)) = self.queries.remove(&query) else { return };
        let Some(connection) = self.get(slot).filter(|connection| connection.query == Some(query)) else { return };
        connection.query = None;
        let is_websocket = connection.websocket().is_some();
        match answer {
            Answer::Authenticated(Some(granted)) if is_websocket => self.granted(slot, granted),
            Answer::Authenticated(None) if is_websocket => {
                self.close(slot, &Close::new(CloseCode::Unauthorized, "refused"));
            }
            _ if is_websocket => self.close(slot, &Close::new(CloseCode::TryLater, "channels cannot be asked for")),
            Answer::Authenticated(Some(granted)) => self.allowed(slot, granted.channels),
            Answer::Authenticated(None) => self.finish(slot, |waiting| waiting.fail(401)),
            answer => self.finish(slot, |waiting| waiting.answer(&answer)),
        }
    }

    /// The channels of a websocket are known.
    fn granted(&mut self, slot: Slot, granted: Granted) {
        let Some(connection) = self.get(slot) else { return };
        let last = connection.asked_last;
        if let Some(websocket) = connection.websocket_mut() {
            websocket.let_in();
        }
        if let Some(websocket) = connection.websocket_mut()
            && let Authority::Function(asking) = &mut websocket.admission.authority
        {
            asking.subject = granted.subject;
        }
        self.join(slot, granted.channels, last);
        self.ask_again(slot);
    }

    /// A page of what a request is owed has come: with something in it, or when it is the last for one that does not
    /// wait, the request is answered.
    pub(super) fn page_for_request(&mut self, slot: Slot, more: bool) {
        let Some(waiting) = self.get(slot).and_then(Connection::waiting) else { return };
        if waiting.has_found() || !more && !waiting.polls() {
            self.answer_found(slot);
        } else {
            self.mark(slot);
        }
    }

    /// A request is answered with what was found for it.
    pub(super) fn answer_found(&mut self, slot: Slot) {
        self.finish(slot, |waiting| waiting.answer_found());
    }

    /// A request has waited for as long as it may: a poll finds nothing, anything else failed.
    pub(super) fn waited(&mut self, slot: Slot) {
        let now = self.env.unix_ms;
        if self.opens(slot) {
            return self.open_late(slot, Err(Close::new(CloseCode::TryLater, "Odoo does not answer")), &[]);
        }
        self.finish(slot, |waiting| waiting.answer_late(now));
    }

    /// A waiting request gets its answer.
    pub(super) fn finish(&mut self, slot: Slot, answer: impl FnOnce(&Waiting) -> Said) {
        let Some(waiting) = self.get(slot).and_then(Connection::waiting) else { return };
        let said = answer(waiting);
        // Its subscription ends with the request.
        self.leave(slot);
        Counters::add(&self.env.counters.notifications_sent, said.count);
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        connection.answer(said, &self.env);
        self.mark(slot);
        // What was sent after the request may have been read already.
        self.come_back(slot);
    }
}
