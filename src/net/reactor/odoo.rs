//! Connections of which Odoo says who they are: what is asked of the desk, and what its answers do to them.

use super::{Reactor, Whom};
use crate::core::hub::Slot;
use crate::core::protocol::{Close, CloseCode};
use crate::net::asked::Wish;
use crate::net::auth::{Admission, Authority, Known, Vouched};
use crate::net::bridge::{LogLevel, Note};
use crate::net::connection::{Connection, Turn};
use crate::net::counters::{Counters, Rejection};
use crate::net::odoo::{Granted, Outcome, Question, Room, Said};
use crate::net::visitor::Visitor;
use std::sync::atomic::Ordering;

impl Reactor {
    /// Says something to the desk.
    fn tell_desk(&mut self, said: Said) {
        if self.odoo.is_some() { self.at_desk(said) } else { self.tell_front(Note::Odoo(said)) }
    }

    /// The desk takes in what is said. Only reactor 0 has one.
    pub(super) fn at_desk(&mut self, said: Said) {
        self.with_desk(|odoo, room| odoo.said(said, room));
        // Calls are made in the desk's turn.
        self.odoo_at = Some(0);
    }

    /// The desk does what time asks for.
    pub(super) fn odoo_turn(&mut self) {
        if self.odoo.is_some() {
            self.odoo_at = self.with_desk(|odoo, room| odoo.turn(room)).flatten();
        }
    }

    fn with_desk<T>(&mut self, work: impl FnOnce(&mut crate::net::odoo::Odoo, &mut Room) -> T) -> Option<T> {
        let (odoo, front) = (self.odoo.as_mut()?, self.front.as_ref()?);
        let mut room = Room {
            settings: &self.env.settings,
            databases: &self.env.databases,
            counters: &self.env.counters,
            main: &mut self.main,
            now: self.env.now,
            greatest: &|database| front.links.greatest(database),
        };
        Some(work(odoo, &mut room))
    }

    /// Asks Odoo about a connection.
    pub(super) fn ask_odoo(&mut self, slot: Slot, visitor: Box<Visitor>, question: Question) {
        let query = self.numbers.request.fetch_add(1, Ordering::Relaxed);
        let reactor = self.index;
        let Some(connection) = self.get(slot) else { return };
        connection.query = Some(query);
        if let Some(websocket) = connection.websocket_mut() {
            // It has done its part; the line is not its fault.
            websocket.let_in();
        }
        self.queries.insert(query, (slot, Whom::Odoo));
        self.tell_desk(Said::Ask { reactor, query, visitor, question });
    }

    /// Nobody waits for what Odoo says to this any more.
    pub(super) fn drop_odoo(&mut self, query: u64) {
        let reactor = self.index;
        self.tell_desk(Said::Drop { reactor, query });
    }

    /// What Odoo says of a connection.
    pub(super) fn odoo_said(&mut self, query: u64, outcome: Outcome) {
        let Some((slot, _)) = self.queries.remove(&query) else { return };
        let Some(connection) = self.get(slot).filter(|connection| connection.query == Some(query)) else { return };
        connection.query = None;
        if connection.websocket().is_some() {
            return self.said_of_websocket(slot, outcome);
        }
        if self.opens(slot) {
            return self.said_of_opening(slot, outcome);
        }
        match outcome {
            Outcome::Known(granted) => {
                let Granted { database, granted, set_cookies, .. } = *granted;
                let Some(waiting) = self.get(slot).and_then(Connection::waiting) else { return };
                waiting.vouched_for(Known { database, subject: granted.subject }, &set_cookies);
                if let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) {
                    connection.be_patient(&self.env);
                }
                self.mark(slot);
                self.allowed(slot, granted.channels);
            }
            Outcome::Forwarded { body, set_cookies } => {
                self.finish(slot, |waiting| waiting.forwarded(body, &set_cookies));
            }
            Outcome::Expired => self.finish(slot, |waiting| waiting.expired()),
            Outcome::Refused(reason) => self.finish(slot, |waiting| waiting.refuse(&reason)),
            Outcome::Unavailable(_) => self.finish(slot, |waiting| waiting.fail(503)),
        }
    }

    /// Whether a connection waits for its websocket to open.
    pub(super) fn opens(&mut self, slot: Slot) -> bool {
        self.get(slot).and_then(Connection::waiting).is_some_and(|waiting| matches!(waiting.wish, Wish::Open(_)))
    }

    /// What Odoo says of somebody without a session: the 101 brings it one.
    fn said_of_opening(&mut self, slot: Slot, outcome: Outcome) {
        match outcome {
            Outcome::Known(granted) => self.open_late(slot, Ok(()), &granted.set_cookies),
            Outcome::Expired => self.open_late(slot, Err(Close::new(CloseCode::SessionExpired, "")), &[]),
            Outcome::Refused(reason) | Outcome::Unavailable(reason) => {
                self.open_late(slot, Err(Close::new(CloseCode::TryLater, reason)), &[]);
            }
            Outcome::Forwarded { .. } => {}
        }
    }

    /// The websocket that a request waits for opens, or is closed at once.
    pub(super) fn open_late(&mut self, slot: Slot, outcome: Result<(), Close>, set_cookies: &[String]) {
        if let Err(close) = &outcome {
            Counters::add(&self.env.counters.handshakes_rejected, 1);
            Rejection::of_close(close.code).into_iter().for_each(|why| self.env.counters.reject(why));
        }
        self.drop_query(slot);
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        let turn = connection.open_late(
            |waiting| {
                let (mut admission, opening) = waiting.into_opening();
                if let Authority::Odoo(vouched) = &mut admission.authority {
                    vouched.visitor = vouched.visitor.with(set_cookies);
                }
                opening.open(outcome.map(|()| admission), set_cookies)
            },
            &self.env,
        );
        if let Turn::Opened = turn {
            self.opened(slot);
        }
        self.mark(slot);
        // What came after the request may have been read already.
        self.come_back(slot);
    }

    fn said_of_websocket(&mut self, slot: Slot, outcome: Outcome) {
        match outcome {
            Outcome::Known(granted) => self.vouched_for(slot, *granted),
            Outcome::Expired => self.close(slot, &Close::new(CloseCode::SessionExpired, "")),
            Outcome::Refused(reason) => {
                if let Some(connection) = self.connections.get(slot as usize).and_then(Option::as_ref) {
                    let text = format!("ignored a message of connection {}: {reason}", connection.id);
                    self.main.log(LogLevel::Debug, text, None);
                }
                self.ask_again(slot);
            }
            Outcome::Unavailable(reason) => self.close(slot, &Close::new(CloseCode::TryLater, reason)),
            Outcome::Forwarded { .. } => {}
        }
    }

    /// Odoo knows whose websocket it is, and its channels.
    fn vouched_for(&mut self, slot: Slot, granted: Granted) {
        let Granted { database, granted, is_user, set_cookies } = granted;
        let Some(connection) = self.get(slot) else { return };
        let (id, last) = (connection.id, connection.asked_last);
        let Some(vouched) = vouched(connection) else { return };
        let known = Known { database: database.clone(), subject: granted.subject.clone() };
        // Odoo goes on with a session that has ended as the public's, in a new one.
        if vouched.known.as_ref().is_some_and(|before| *before != known) {
            return self.close(slot, &Close::new(CloseCode::SessionExpired, ""));
        }
        if vouched.visitor.session().is_some() && vouched.visitor.is_renewed_by(&set_cookies) && is_user {
            // Its browser learns of the new id when it comes back, which it does at once.
            return self.close(slot, &Close::new(CloseCode::KeepAlive, ""));
        }
        vouched.visitor = vouched.visitor.with(&set_cookies);
        vouched.known = Some(known);
        let (visitor, presence) = (Box::new(vouched.visitor.clone()), vouched.presence.take());
        connection.here = true;
        if self.hub.database(slot).is_none() {
            self.hub.open(slot, database.oid);
        }
        let user = granted.subject.map(|subject| (database.oid, subject.into()));
        self.tell_desk(Said::Here { id, visitor: visitor.clone(), user });
        if let Some(data) = presence {
            self.tell_desk(Said::Presence { visitor, data });
        }
        self.join(slot, granted.channels, last);
        self.ask_again(slot);
    }

    /// What a client says of its user's presence, for Odoo.
    pub(super) fn present(&mut self, slot: Slot, data: String) {
        let Some(vouched) = self.get(slot).and_then(vouched) else { return };
        if vouched.known.is_none() {
            // Odoo does not know the session on a websocket yet.
            vouched.presence = Some(data);
            return;
        }
        let visitor = Box::new(vouched.visitor.clone());
        self.tell_desk(Said::Presence { visitor, data });
    }

    /// A connection is on its way out.
    pub(super) fn depart(&mut self, slot: Slot) {
        let stops = self.stop_at.is_some();
        let Some(connection) = self.get(slot) else { return };
        let id = connection.id;
        // Where all have to go, they come back at once.
        if std::mem::take(&mut connection.here) && !stops {
            self.tell_desk(Said::Gone { id });
        }
    }

    /// Closes those of these connections that are here.
    pub(super) fn part(&mut self, ids: &[i64], close: &Close) {
        for slot in 0..self.connections.len() as Slot {
            if self.get(slot).is_some_and(|connection| ids.contains(&connection.id)) {
                self.close(slot, close);
            }
        }
    }
}

/// What is known of an open websocket that Odoo vouches for.
fn vouched(connection: &mut Connection) -> Option<&mut Vouched> {
    match &mut connection.websocket_mut()?.admission {
        Admission { authority: Authority::Odoo(vouched), .. } => Some(vouched),
        _ => None,
    }
}
