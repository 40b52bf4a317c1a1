//! The way of a notification through a reactor: from a subscription over its recovery to the frames that go out.

use super::Reactor;
use crate::core::channel::Channel;
use crate::core::hub::Slot;
use crate::core::notification::Notification;
use crate::core::protocol::{self, CHANNELS_MAX, Close, CloseCode, Frame};
use crate::net::auth::Admission;
use crate::net::batch::Batch;
use crate::net::bridge::Note;
use crate::net::counters::Counters;
use crate::net::links::Recover;
use crate::net::outbound::Kind;
use std::sync::atomic::Ordering;

impl Reactor {
    /// A websocket is open.
    pub(super) fn opened(&mut self, slot: Slot) {
        let Some(websocket) = self.get(slot).and_then(|connection| connection.websocket()) else { return };
        let database = websocket.admission.claims.oid;
        self.hub.open(slot, database);
        Counters::add(&self.env.counters.connections_total, 1);
        Counters::add(&self.env.counters.connections_open, 1);
    }

    /// A client subscribes: checked against its proof, then what is new to it is asked of its database.
    pub(super) fn subscribe(&mut self, slot: Slot, channels: Vec<Channel>, last: i64) {
        let Some(websocket) = self.get(slot).and_then(|connection| connection.websocket()) else { return };
        let Admission { claims, .. } = &websocket.admission;
        let database = claims.oid;
        if channels.len() > CHANNELS_MAX {
            let reason = format!("more than {CHANNELS_MAX} channels");
            return self.close(slot, &Close::new(CloseCode::TooBig, reason));
        }
        if let Some(channel) = channels.iter().find(|channel| !claims.allows(channel)) {
            let reason = format!("channel not allowed: {}", channel.as_str());
            return self.close(slot, &Close::new(CloseCode::Forbidden, reason));
        }
        let request = self.numbers.request.fetch_add(1, Ordering::Relaxed);
        let Some(recovery) = self.hub.subscribe(slot, channels, last, request, self.env.now) else { return };
        Counters::add(&self.env.counters.recoveries, 1);
        let recover = Recover { reactor: self.index, request, channels: recovery.channels, last: recovery.last };
        match &mut self.front {
            Some(front) => front.links.recover(database, recover),
            None => self.tell_front(Note::Recover { database, recover }),
        }
    }

    /// One dispatch of a database worker goes out to whom it concerns.
    pub(super) fn deliver(&mut self, batch: &Batch) {
        for run in batch.runs() {
            let mut receivers = std::mem::take(&mut self.receivers);
            self.hub.dispatch(batch.database, run.notifications, self.env.now, &mut receivers);
            if !receivers.is_empty() {
                Counters::add(&self.env.counters.frames_sent, receivers.len());
                Counters::add(&self.env.counters.notifications_sent, receivers.len() * run.notifications.len());
            }
            for slot in &receivers {
                self.send(*slot, run.frame());
            }
            self.receivers = receivers;
        }
    }

    /// Puts a live frame into a connection's queue, or closes the connection when it reads too slowly.
    pub(super) fn send(&mut self, slot: Slot, frame: &Frame) {
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
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

    /// A recovery is answered: what of it is owed goes out, and its channels are live from now on.
    pub(super) fn recovered(&mut self, request: u64, notifications: Vec<Notification>) {
        let Some((slot, owed)) = self.hub.recovered(request, notifications, self.env.now) else { return };
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        for range in protocol::runs(&owed, false) {
            let run = owed.get(range).unwrap_or_default();
            let frame = protocol::notifications_frame(run);
            // A replay never makes a slow consumer.
            let _ = connection.send(&frame, Kind::Exempt, &self.env);
            Counters::add(&self.env.counters.frames_sent, 1);
        }
        Counters::add(&self.env.counters.notifications_sent, owed.len());
        self.mark(slot);
    }
}
