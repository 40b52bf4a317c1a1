//! Clients: threads that read what comes, leave and come back as Odoo's client does, and write down what they saw.

use super::common::{Cluster, PATIENCE, Socket};
use super::database::{Body, Database, FIRST_MARKER, LAST_MARKER, LEDGER, OWN_MARKER, publish};
use super::ledger::{Key, NEVER};
use super::plan::Random;
use super::stage::{Scene, Stage};
use super::story::{Receipt, Story, Visit};
use super::writer::Session;
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tungstenite::{Error, Message};

/// What a client does all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stays connected.
    Steady,
    /// Leaves and comes back.
    Roaming,
    /// Comes when so many messages were written, then roams.
    Late(u64),
}

#[derive(Deserialize)]
struct Notification {
    id: i64,
    message: Body,
}

/// One client.
pub struct Guest<'a> {
    stage: &'a Stage,
    session: Session<'a>,
    kind: Kind,
    number: usize,
    random: Random,
    path: String,
    port: u16,
    wanted: Vec<Value>,
    socket: Option<Socket>,
    /// The last id of the last frame, and the greatest id.
    last: i64,
    greatest: i64,
    /// The connection's subscription was taken; a frame has come on it.
    stands: bool,
    framed: bool,
    own_marker: u32,
    own_markers_seen: u32,
    /// The channels whose first and last markers have come, as bits.
    markers: [u64; 2],
    story: Story,
}

impl<'a> Guest<'a> {
    /// A client of this database, with channels at random.
    pub fn new(
        (cluster, stage, database): (&'a Cluster, &'a Stage, &'a Database),
        (mut random, kind, number, port): (Random, Kind, usize, u16),
    ) -> Guest<'a> {
        let channels = random.channels();
        let mut wanted: Vec<Value> = channels.iter().map(|channel| Database::target(*channel)).collect();
        wanted.push(json!(format!("own-{number}")));
        let mut session = Session::new(cluster, stage, &database.name);
        let text = "SELECT bus_token($1::text::jsonb, '7 days')";
        let token: String = session.get().query_one(text, &[&json!(wanted).to_string()]).unwrap().get(0);
        let name = format!("client {number} ({kind:?}, database {}, channels {channels:?})", database.number);
        Guest {
            stage,
            session,
            kind,
            number,
            random,
            path: format!("/websocket?version=18.0-7&token={token}"),
            port,
            wanted,
            socket: None,
            last: 0,
            greatest: 0,
            stands: false,
            framed: false,
            own_marker: 0,
            own_markers_seen: 0,
            markers: [0; 2],
            story: Story::new(name, database.number, channels),
        }
    }

    /// Plays its part to the end.
    pub fn play(mut self) -> Story {
        if let Kind::Late(written) = self.kind {
            let is_time = || self.stage.written.load(Ordering::SeqCst) >= written;
            while !is_time() && self.stage.scene() == Scene::Play {
                self.stage.linger(Scene::Play, Duration::from_millis(50));
            }
        }
        if self.mark() {
            self.story.owed_from = self.stage.now();
        }
        if !matches!(self.kind, Kind::Late(_)) {
            self.stage.ready.fetch_add(1, Ordering::SeqCst);
        }
        while self.stage.scene() == Scene::Play {
            self.visit();
        }
        self.mark();
        self.stage.ready.fetch_add(1, Ordering::SeqCst);
        for (n, scene) in [Scene::FirstMarkers, Scene::LastMarkers].into_iter().enumerate() {
            self.until("the scene to change", |guest| guest.stage.scene() >= scene);
            let mine = self.story.channels.iter().fold(0, |bits, channel| bits | 1 << channel);
            self.until("the markers", |guest| guest.markers[n] == mine);
            self.stage.ready.fetch_add(1, Ordering::SeqCst);
        }
        self.story
    }

    /// Publishes a marker for itself and reads until it comes: what is committed from then on is owed.
    fn mark(&mut self) -> bool {
        self.until("a connection", |guest| guest.stands);
        self.own_marker += 1;
        let payload = format!("[{},255,{},{}]", self.story.database, self.number, self.own_marker);
        let text = publish(&json!(format!("own-{}", self.number)), OWN_MARKER, &payload);
        while let Err(error) = self.session.get().batch_execute(&text) {
            self.session.lose(&error);
        }
        let number = self.own_marker;
        self.until("its own marker", |guest| guest.own_markers_seen >= number)
    }

    /// Reads, coming back as it must, until the condition holds; whether it did in time.
    fn until(&mut self, what: &str, condition: impl Fn(&Guest) -> bool) -> bool {
        let until = Instant::now() + PATIENCE * 2;
        while !condition(self) {
            if Instant::now() > until {
                let (last, is_connected) = (self.last, self.stands);
                let words = format!("waited in vain for {what}; last = {last}, connected: {is_connected}");
                self.story.complaints.push(words);
                return false;
            }
            self.step();
        }
        true
    }

    /// A while connected, then away for a while or none.
    fn visit(&mut self) {
        let until = Instant::now() + self.random.up_to(Duration::from_secs(4));
        while Instant::now() < until && self.stage.scene() == Scene::Play {
            self.step();
        }
        if self.kind == Kind::Steady || self.stage.scene() != Scene::Play {
            return;
        }
        if let Some(socket) = self.socket.as_mut().filter(|_| self.random.chance(30)) {
            let _ = socket.ws.close(None);
        }
        self.leave();
        if self.random.chance(60) {
            self.stage.linger(Scene::Play, self.random.up_to(Duration::from_secs(2)));
        }
    }

    fn leave(&mut self) {
        self.socket = None;
        self.stands = false;
    }

    /// Connects, or reads a frame if one comes soon.
    fn step(&mut self) {
        if self.socket.is_none() && !self.connect() {
            std::thread::sleep(Duration::from_millis(20));
            return;
        }
        let Some(socket) = &mut self.socket else { return };
        match socket.ws.read() {
            Ok(Message::Text(frame)) => self.read(&frame),
            Ok(Message::Pong(_)) => {
                self.stands = true;
                self.stand();
            }
            Ok(Message::Close(frame)) => {
                if !self.stage.chaos.load(Ordering::SeqCst) {
                    self.story.complaints.push(format!("closed by the gateway: {frame:?}"));
                }
                self.leave();
            }
            Ok(_) => {}
            Err(Error::Io(e)) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => {
                if !self.stage.chaos.load(Ordering::SeqCst) {
                    self.story.complaints.push(format!("connection lost: {error}"));
                }
                self.leave();
            }
        }
    }

    /// Subscribes with what it has; the answer to the ping behind that says that it was taken.
    fn connect(&mut self) -> bool {
        let Ok(mut socket) = Socket::open_path(self.port, &self.path, &[]) else { return false };
        let data = json!({"channels": self.wanted, "last": self.last});
        let subscribe = json!({"event_name": "subscribe", "data": data}).to_string();
        let sent =
            socket.ws.send(Message::text(subscribe)).and_then(|()| socket.ws.send(Message::Ping(vec![1].into())));
        if sent.is_err() || socket.ws.get_ref().set_read_timeout(Some(Duration::from_millis(20))).is_err() {
            return false;
        }
        let (first, last) = (self.story.receipts.len(), self.last);
        let last_was_greatest = last == self.greatest;
        self.story.visits.push(Visit { first, last, last_was_greatest, live_from: NEVER });
        (self.stands, self.framed) = (false, false);
        self.socket = Some(socket);
        true
    }

    /// Once the subscription stands and a frame has come, the rest comes live.
    fn stand(&mut self) {
        let Some(visit) = self.story.visits.last_mut() else { return };
        if visit.live_from == NEVER && self.stands && self.framed {
            visit.live_from = self.stage.now();
        }
    }

    fn read(&mut self, frame: &str) {
        let list: Vec<Notification> = match serde_json::from_str(frame) {
            Ok(list) => list,
            Err(error) => return self.story.complaints.push(format!("{error}: {frame}")),
        };
        if !list.is_sorted_by_key(|notification| notification.id) || list.is_empty() {
            self.story.complaints.push(format!("a frame's ids do not ascend: {frame}"));
        }
        for Notification { id, message: Body { kind, payload } } in list {
            (self.last, self.greatest) = (id, self.greatest.max(id));
            let [_, channel, txn, seq] = payload;
            match kind.as_str() {
                OWN_MARKER => {
                    self.own_markers_seen = self.own_markers_seen.max(seq);
                    continue;
                }
                FIRST_MARKER => self.markers[0] |= 1 << channel,
                LAST_MARKER => self.markers[1] |= 1 << channel,
                _ => debug_assert_eq!(kind, LEDGER),
            }
            let at = (self.stage.now() / 1_000_000) as u32;
            self.story.receipts.push(Receipt { id, key: Key { txn, seq }, at });
        }
        self.framed = true;
        self.stand();
    }
}
