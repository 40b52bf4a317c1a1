//! The way of a notification through a reactor: from a subscription over its recovery to the frames that go out.

use super::Reactor;
use crate::core::channel::Channel;
use crate::core::hub::{Change, Slot};
use crate::core::notification::Notification;
use crate::core::protocol::{self, CHANNELS_MAX, Close, CloseCode, Frame};
use crate::net::auth::Authority;
use crate::net::batch::Batch;
use crate::net::bridge::{LogLevel, Note};
use crate::net::connection::Connection;
use crate::net::counters::Counters;
use crate::net::deflate::Agreement;
use crate::net::outbound::Kind;
use std::sync::atomic::Ordering;

impl Reactor {
    /// A websocket is open.
    pub(super) fn opened(&mut self, slot: Slot) {
        let Some(websocket) = self.get(slot).and_then(|connection| connection.websocket()) else { return };
        let database = match &websocket.admission.authority {
            Authority::Watcher { .. } => return self.watch(slot),
            authority => authority.database(),
        };
        // Of a client of Odoo's it is not known yet.
        if database != 0 {
            self.hub.open(slot, database);
        }
        if let Some(connection) = self.get(slot) {
            connection.counted = true;
        }
        Counters::add(&self.env.counters.connections_total, 1);
        Counters::add(&self.env.counters.connections_open, 1);
    }

    /// A client subscribes: checked against its proof, or asked of who knows.
    pub(super) fn subscribe(&mut self, slot: Slot, channels: String, last: i64) {
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        let Some(websocket) = connection.websocket() else { return };
        let authority = &websocket.admission.authority;
        let arrays = !matches!(authority, Authority::Odoo(_));
        let parsed = protocol::channels(&channels, authority.database_name(), arrays);
        let id = connection.id;
        let parsed = match parsed {
            Ok(parsed) => parsed,
            Err(reason) => {
                let text = format!("ignored a message of connection {id}: {reason}");
                return self.main.log(LogLevel::Debug, text, None);
            }
        };
        let Authority::Token(claims) = authority else {
            if parsed.len() > CHANNELS_MAX {
                let reason = format!("more than {CHANNELS_MAX} channels");
                return self.close(slot, &Close::new(CloseCode::TooBig, reason));
            }
            connection.subscribing = Some(Box::new((channels, last)));
            return self.ask_again(slot);
        };
        let channels = parsed;
        if let Some(channel) = channels.iter().find(|channel| !claims.allows(channel)) {
            let reason = format!("channel not allowed: {}", channel.as_str());
            return self.close(slot, &Close::new(CloseCode::Forbidden, reason));
        }
        self.join(slot, channels, last);
    }

    /// A connection is on these channels from now on; what is new to it is asked of its database.
    pub(super) fn join(&mut self, slot: Slot, channels: Vec<Channel>, last: i64) {
        let Some(database) = self.hub.database(slot) else { return };
        if channels.len() > CHANNELS_MAX {
            let reason = format!("more than {CHANNELS_MAX} channels");
            return self.close(slot, &Close::new(CloseCode::TooBig, reason));
        }
        let number = || self.numbers.request.fetch_add(1, Ordering::Relaxed);
        let Change { given_up, recoveries } = self.hub.subscribe(slot, channels, last, number, self.env.now);
        self.give_up(slot, database, given_up);
        if recoveries.is_empty() {
            return;
        }
        Counters::add(&self.env.counters.recoveries, 1);
        if let Some(connection) = self.get(slot) {
            recoveries.into_iter().for_each(|recovery| connection.replays.begin(recovery));
        }
        self.mark(slot);
    }

    /// Asks for the next page of a connection's replays when it has room for one.
    pub(super) fn replay_on(&mut self, slot: Slot) {
        let Some(connection) = self.get(slot) else { return };
        let Some(ask) = connection.replays.next(connection.socket.out.len()) else { return };
        let Some(database) = self.hub.database(slot) else { return };
        let reactor = self.index;
        match &mut self.front {
            Some(front) => front.links.ask(database, reactor, ask),
            None => self.tell_front(Note::Ask { database, reactor, ask }),
        }
    }

    /// Nobody waits for these replays of a connection any more.
    pub(super) fn give_up(&mut self, slot: Slot, database: u32, mut requests: Vec<u64>) {
        requests.sort_unstable();
        if let Some(connection) = self.get(slot) {
            connection.replays.forget(&requests);
        }
        self.release(slot);
        for request in requests {
            match &mut self.front {
                Some(front) => front.links.forget(database, request),
                None => self.tell_front(Note::Forget { database, request }),
            }
        }
    }

    /// One dispatch of a database worker goes out to whom it concerns.
    pub(super) fn deliver(&mut self, batch: &Batch) {
        let mut answerable = Vec::new();
        for run in batch.runs() {
            let mut receivers = std::mem::take(&mut self.receivers);
            self.hub.dispatch(batch.database, run.notifications, self.env.now, &mut receivers);
            let mut websockets = 0;
            for slot in &receivers {
                match self.get(*slot).and_then(Connection::waiting) {
                    None => {
                        websockets += 1;
                        let agreement = self.agreement(*slot);
                        self.send(*slot, run.frame_for(agreement));
                    }
                    Some(waiting) => {
                        if !waiting.has_found() {
                            answerable.push(*slot);
                        }
                        waiting.found(run);
                    }
                }
            }
            if websockets > 0 {
                let count = websockets * run.notifications.len();
                Counters::add(&self.env.counters.frames_sent, websockets);
                Counters::add(&self.env.counters.notifications_sent, count);
                if batch.committed > 0 {
                    self.dispatched.push((batch.committed, count));
                }
            }
            self.receivers = receivers;
        }
        answerable.into_iter().for_each(|slot| self.answer_found(slot));
    }

    /// What is agreed with a connection on compressed messages, while the setting says so.
    fn agreement(&mut self, slot: Slot) -> Option<Agreement> {
        if self.env.settings.compression { self.get(slot)?.socket.deflate } else { None }
    }

    /// Puts a live frame into a connection's queue, or closes the connection when it reads too slowly.
    pub(super) fn send(&mut self, slot: Slot, frame: &Frame) {
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        if connection.replays.is_running() {
            if connection.replays.hold(frame.clone(), self.env.settings.send_queue_max).is_err() {
                let close = Close::new(CloseCode::Restart, "more is sent than can wait for the end of a replay");
                self.close(slot, &close);
            }
            return;
        }
        let mut sent = connection.send(frame, Kind::Live, &self.env);
        if sent.is_err() && connection.flush(&self.env).is_ok() {
            // Much may be said in one turn; only what the socket does not take makes a slow consumer.
            sent = connection.send(frame, Kind::Live, &self.env);
        }
        if sent.is_err() {
            connection.close_slow(&self.env);
            self.leave(slot);
        }
        self.mark(slot);
    }

    /// A page of a replay: what of it is owed goes out. Where the connection is to say when it has taken it in, that is
    /// found out after the write at the end of this turn, or of a later one.
    pub(super) fn recovered(&mut self, request: u64, notifications: Vec<Notification>, more: bool) {
        let Some((slot, owed)) = self.hub.recovered(request, notifications, more, self.env.now) else { return };
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        if let Some(waiting) = connection.waiting() {
            waiting.found_page(&owed);
            connection.replays.answered(request, more, owed.is_empty());
            return self.page_for_request(slot, more);
        }
        for range in protocol::runs(&owed, false) {
            let run = owed.get(range).unwrap_or_default();
            let frame = protocol::notifications_frame(run);
            // A replay never makes a slow consumer.
            let _ = connection.send(&frame, Kind::Exempt, &self.env);
            Counters::add(&self.env.counters.frames_sent, 1);
        }
        connection.replays.answered(request, more, owed.is_empty());
        Counters::add(&self.env.counters.notifications_sent, owed.len());
        self.release(slot);
        self.mark(slot);
    }

    /// What was sent live during a connection's replays goes out when they have ended. It was bounded when it was held.
    fn release(&mut self, slot: Slot) {
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        for frame in connection.replays.release() {
            let _ = connection.send(&frame, Kind::Exempt, &self.env);
        }
    }
}
