//! Reactor 0's other work: what comes in on the links, and who comes in at the doors.

use super::Reactor;
use crate::net::bridge::{LogLevel, Note, ToMain};
use crate::net::counters::{Counters, Rejection};
use crate::net::links::LinkEvent;
use crate::net::odoo::Said;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;

/// Accepted at one door in one turn.
const ACCEPTS: usize = 128;

/// Connections over the limit that are still told so (503); beyond them a connection is dropped unheard.
const REFUSALS: usize = 128;

impl Reactor {
    /// Reactor 0's other work: doors and links.
    pub(super) fn front_turn(&mut self) {
        let Some(front) = &mut self.front else { return };
        let (port, events) = front.turn(&self.peers, self.env.now, &mut self.main);
        let knocked = front.take_knocked();
        if let Some(port) = port {
            self.main.tell(ToMain::Listening { port });
        }
        events.into_iter().for_each(|event| self.link_event(event));
        knocked.into_iter().for_each(|place| self.accept(place));
    }

    /// Passes on what came in on a link.
    pub(super) fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up(database) => self.main.tell(ToMain::LinkUp { database }),
            LinkEvent::Down(database) => self.main.tell(ToMain::LinkDown { database }),
            LinkEvent::Emit(payloads) => self.main.tell(ToMain::Emit { payloads }),
            LinkEvent::Complaint(text) => self.main.log(LogLevel::Warning, text, None),
            LinkEvent::Batch(batch) => {
                self.peers.iter().skip(1).for_each(|peer| peer.tell(Note::Batch(batch.clone())));
                self.deliver(&batch);
            }
            LinkEvent::Recovered { reactor: 0, request, notifications, more } => {
                self.recovered(request, notifications, more);
            }
            LinkEvent::Recovered { reactor, request, notifications, more } => {
                if let Some(peer) = self.peers.get(reactor) {
                    peer.tell(Note::Recovered { request, notifications, more });
                }
            }
            LinkEvent::Answered { reactor: 0, query, answer } => self.told(query, answer),
            LinkEvent::Answered { reactor, query, answer } => {
                if let Some(peer) = self.peers.get(reactor) {
                    peer.tell(Note::Answered { query, answer });
                }
            }
            LinkEvent::Call { link, database, call, id, token } => {
                self.at_desk(Said::Job { link, database, call, id, token });
            }
            LinkEvent::Disconnect { link, id, database, reason } => self.end_connection(link, id, database, reason),
            LinkEvent::Inspect { link, database } => {
                let own = self.inspect(database);
                let Some(front) = &mut self.front else { return };
                let inquiry = front.inquire(link, self.peers.len());
                front.inquired(inquiry, own);
                self.peers.iter().skip(1).for_each(|peer| peer.tell(Note::Inspect { inquiry, database }));
            }
        }
    }

    /// Takes in who waits at a door and hands them out to the reactors in turn.
    pub(super) fn accept(&mut self, place: usize) {
        for _ in 0..ACCEPTS {
            let Some(front) = &mut self.front else { return };
            let Some((tcp, address)) = front.listeners.accept(place, self.env.now, &mut self.main) else { return };
            let open = self.env.counters.sockets_open.fetch_add(1, Ordering::Relaxed);
            let excess = usize::try_from(open).unwrap_or(usize::MAX).saturating_sub(self.env.settings.max_connections);
            let refused = open as usize >= self.env.settings.max_connections;
            if excess > REFUSALS {
                self.env.counters.reject(Rejection::TooManyConnections);
                Counters::less(&self.env.counters.sockets_open);
                continue;
            }
            let address = SocketAddr::new(address.ip().to_canonical(), address.port());
            self.next = (self.next + 1) % self.peers.len().max(1);
            match self.peers.get(self.next) {
                Some(peer) if self.next != self.index => peer.tell(Note::Accepted { tcp, address, refused }),
                _ => self.accepted(tcp, address, refused),
            }
        }
        if let Some(front) = &mut self.front {
            front.knock(place);
        }
    }
}
