//! What a reactor is told by the main thread and by the others: settings, databases, the stop, and who is connected.

use super::{Reactor, STOP_WAIT};
use crate::core::hub::Slot;
use crate::core::link;
use crate::core::protocol::{Close, CloseCode};
use crate::core::settings::{Database, Settings};
use crate::net::auth::Authority;
use crate::net::bridge::{Note, ToNet};
use std::sync::Arc;

/// Notes handled in one turn.
const NOTES: usize = 256;

impl Reactor {
    /// Tells reactor 0.
    pub(super) fn tell_front(&self, note: Note) {
        if let Some(front) = self.peers.first() {
            front.tell(note);
        }
    }

    /// Takes a turn's worth of notes.
    pub(super) fn read_notes(&mut self) {
        for _ in 0..NOTES {
            let Ok(note) = self.notes.try_recv() else { return };
            self.note(note);
        }
    }

    /// Does what a note says.
    pub(super) fn note(&mut self, note: Note) {
        match note {
            Note::Net(ToNet::Settings(settings)) => self.set_settings(settings),
            Note::Net(ToNet::Databases(databases)) => self.set_databases(databases),
            Note::Net(ToNet::Stop) => self.stop(),
            Note::Accepted { tcp, address, refused } => self.accepted(tcp, address, refused),
            Note::Batch(batch) => self.deliver(&batch),
            Note::Recovered { request, notifications, more } => self.recovered(request, notifications, more),
            Note::Inspect { inquiry, database } => {
                let connections = self.inspect(database);
                self.tell_front(Note::Inspected { inquiry, connections });
            }
            Note::Inspected { inquiry, connections } => {
                if let Some(front) = &mut self.front {
                    front.inquired(inquiry, connections);
                }
            }
            Note::Ask { database, reactor, ask } => {
                if let Some(front) = &mut self.front {
                    front.links.ask(database, reactor, ask);
                }
            }
            Note::Odoo(said) => self.at_desk(said),
            Note::JobCalled { link, call, outcome } => {
                if let Some(front) = &mut self.front {
                    front.links.say(link, &link::Command::Called { call, outcome });
                }
            }
            Note::OdooSaid { query, outcome } => self.odoo_said(query, *outcome),
            Note::Part { ids, close } => self.part(&ids, &close),
            Note::WantSurvey => self.survey(),
            Note::Survey { number } => {
                let gauges = self.gauges();
                self.tell_front(Note::Surveyed { number, gauges });
            }
            Note::Surveyed { number, gauges } => self.surveyed(number, gauges),
            Note::Snapshot(snapshot) => self.show(&snapshot),
            Note::Disconnect { inquiry, id, database, reason } => {
                let found = self.disconnect(id, database, &reason);
                self.tell_front(Note::Disconnected { inquiry, found });
            }
            Note::Disconnected { inquiry, found } => {
                if let Some(front) = &mut self.front {
                    front.disconnected(inquiry, found);
                }
            }
            Note::Answered { query, answer } => self.told(query, answer),
            Note::Query { database, reactor, query, question } => {
                if let Some(front) = &mut self.front {
                    front.links.query(database, reactor, query, question);
                }
            }
            Note::DropQuery { database, query } => {
                if let Some(front) = &mut self.front {
                    front.links.drop_query(database, query);
                }
            }
            Note::Forget { database, request } => {
                if let Some(front) = &mut self.front {
                    front.links.forget(database, request);
                }
            }
        }
    }

    /// New settings. A changed secret ends every connection that came in under the old one.
    pub(super) fn set_settings(&mut self, settings: Arc<Settings>) {
        let same_secret = settings.token_secret == self.env.settings.token_secret;
        self.env.settings = settings;
        for slot in self.open_slots() {
            if !same_secret && self.has_token(slot) {
                self.close(slot, &Close::new(CloseCode::Unauthorized, "the token's secret was changed"));
            }
            self.mark(slot);
        }
        if !same_secret {
            let close = Close::new(CloseCode::Unauthorized, "the token's secret was changed");
            self.watchers.clone().into_iter().for_each(|slot| self.close(slot, &close));
        }
    }

    /// The databases that are served now; connections of others are closed.
    pub(super) fn set_databases(&mut self, databases: Arc<Vec<Database>>) {
        if let Some(front) = &mut self.front {
            front.links.keep(&databases);
            front.surveys.keep(|oid| databases.iter().any(|database| database.oid == oid));
        }
        self.env.databases = databases;
        for slot in self.open_slots() {
            let database = self.hub.database(slot);
            if !self.env.databases.iter().any(|served| Some(served.oid) == database) {
                self.close(slot, &Close::new(CloseCode::GoingAway, "the database is no longer served"));
            }
        }
    }

    /// Whether a connection came in by a token.
    fn has_token(&mut self, slot: Slot) -> bool {
        let Some(connection) = self.get(slot) else { return false };
        let websocket = connection.websocket().map(|websocket| &websocket.admission);
        let is_token = |authority: &Authority| matches!(authority, Authority::Token(_));
        match websocket {
            Some(admission) => is_token(&admission.authority),
            None => connection.waiting().is_some_and(|waiting| is_token(&waiting.admission.authority)),
        }
    }

    /// The connections with an open websocket, and the requests that wait for notifications.
    pub(super) fn open_slots(&self) -> Vec<Slot> {
        let open = |slot: &Slot| self.hub.database(*slot).is_some();
        (0..self.connections.len() as Slot).filter(open).collect()
    }

    /// Closes the doors and every connection; the loop ends when they are gone, or in 1 s.
    pub(super) fn stop(&mut self) {
        if self.stop_at.is_some() {
            return;
        }
        self.stop_at = Some(self.env.now + STOP_WAIT);
        if let Some(front) = &mut self.front {
            front.close();
        }
        for slot in 0..self.connections.len() as Slot {
            if self.get(slot).is_some_and(|connection| connection.websocket().is_some()) {
                self.close(slot, &Close::new(CloseCode::GoingAway, ""));
            } else if self.get(slot).is_some_and(|connection| !connection.is_closing()) {
                self.remove(slot);
            }
        }
    }

    /// The open websockets of a database, or of all.
    pub(super) fn inspect(&self, database: Option<u32>) -> Vec<link::Connection> {
        let mut found = Vec::new();
        for (slot, connection) in (0..).zip(&self.connections) {
            let Some(connection) = connection else { continue };
            let Some(websocket) = connection.websocket() else { continue };
            let authority = &websocket.admission.authority;
            if authority.is_client() && database.is_none_or(|database| database == authority.database()) {
                found.extend(self.describe(slot, connection));
            }
        }
        found
    }
}
