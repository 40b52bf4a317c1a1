//! Who hears what: the subscriptions of one reactor's connections, by database and channel, and how far each connection
//! is sure, so that a notification reaches a socket once. Decides who is sent a notification and what must be
//! recovered; knows no sockets, no frames and no clock. Connections are numbers that the reactor gives out.

use super::channel::Channel;
use super::notification::Notification;
use std::collections::HashMap;
use std::sync::Arc;

/// The reactor's number for a connection; free for another one after [`Hub::close`].
pub type Slot = u32;

/// Milliseconds of a clock that never goes back; only differences matter.
pub type Moment = u64;

/// What was sent longer ago than this is behind the connection's position, in milliseconds (Odoo's 10 s, ODOO_BUS §4).
const SETTLED: Moment = 10_000;

/// Channels that a connection left and that are remembered, should it come back to them (a chat opened, closed and
/// opened again). Beyond this the position moves up instead, see [`Session::forget_left`].
const LEFT_MAX: usize = 256;

/// Late notifications remembered for a channel that was left; more than a few are never seen.
const LATE_MAX: usize = 64;

/// What a database worker is asked to replay to one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The channels that are new on this socket.
    pub channels: Vec<Channel>,
    /// The position of the connection, 0 for none.
    pub last: i64,
}

/// The subscriptions of one reactor.
#[derive(Default)]
pub struct Hub {
    channels: Vec<Entry>,
    free: Vec<u32>,
    index: HashMap<u32, HashMap<Arc<Channel>, u32>>,
    sessions: Vec<Option<Session>>,
    requests: HashMap<u64, Slot>,
}

/// One channel of one database and its connections.
struct Entry {
    database: u32,
    channel: Arc<Channel>,
    /// Sent everything as it comes.
    live: Vec<Slot>,
    /// Waiting for a recovery, or gone from the channel and remembered.
    silent: Vec<Slot>,
}

/// One connection: its subscriptions in the order of their entries, and its position.
struct Session {
    database: u32,
    subscriptions: Vec<Subscription>,
    reach: Reach,
    sent: i64,
}

/// One connection on one channel.
struct Subscription {
    entry: u32,
    state: State,
    /// Set when the connection was on this channel before.
    before: Option<Box<Before>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Live,
    /// Waits for the answer to this request; until then nothing is sent, as the answer contains it.
    Recovering(u64),
    /// No longer subscribed.
    Left,
}

/// What a connection had got of a channel when it left: nothing above `high`, and none of `late`.
struct Before {
    high: i64,
    late: Vec<i64>,
}

impl Before {
    fn owes(&self, id: i64) -> bool {
        id > self.high || self.late.contains(&id)
    }

    fn missed(&mut self, id: i64) {
        if id <= self.high && self.late.len() < LATE_MAX {
            self.late.push(id);
        }
    }
}

/// How far a connection is sure: Odoo's L and H (ODOO_BUS §4), where H is kept as two generations of maxima, so that an
/// id is behind the position 10 to 20 s after it was sent.
#[derive(Default)]
struct Reach {
    /// Odoo's L.
    last: i64,
    /// The greatest id sent.
    high: i64,
    newer: i64,
    older: i64,
    since: Moment,
}

impl Reach {
    fn sent(&mut self, id: i64, now: Moment) {
        self.roll(now);
        self.newer = self.newer.max(id);
        self.high = self.high.max(id);
    }

    /// Moves the position past what has settled.
    fn roll(&mut self, now: Moment) {
        let age = now.saturating_sub(self.since);
        if age < SETTLED {
            return;
        }
        self.last = self.last.max(self.older);
        self.older = std::mem::take(&mut self.newer);
        if age >= 2 * SETTLED {
            self.last = self.last.max(std::mem::take(&mut self.older));
        }
        self.since = now;
    }
}

impl Session {
    fn find(&mut self, entry: u32) -> Option<&mut Subscription> {
        let at = self.subscriptions.binary_search_by_key(&entry, |subscription| subscription.entry).ok()?;
        self.subscriptions.get_mut(at)
    }

    /// Bounds what is remembered of channels that were left: the position moves up to what was sent, so that coming
    /// back to one of them still repeats nothing. Returns the entries that were given up.
    fn forget_left(&mut self) -> Vec<u32> {
        let left = |subscription: &Subscription| subscription.state == State::Left;
        if self.subscriptions.iter().filter(|subscription| left(subscription)).count() <= LEFT_MAX {
            return Vec::new();
        }
        self.reach.last = self.reach.last.max(self.reach.high);
        let entries = self.subscriptions.iter().filter(|subscription| left(subscription)).map(|s| s.entry).collect();
        self.subscriptions.retain(|subscription| !left(subscription));
        entries
    }
}

impl Hub {
    /// Takes in a connection of a database (its OID), subscribed to nothing yet.
    pub fn open(&mut self, slot: Slot, database: u32) {
        self.close(slot);
        let at = slot as usize;
        if self.sessions.len() <= at {
            self.sessions.resize_with(at + 1, || None);
        }
        if let Some(place) = self.sessions.get_mut(at) {
            *place = Some(Session { database, subscriptions: Vec::new(), reach: Reach::default(), sent: 0 });
        }
    }

    /// Forgets a connection. Returns its requests that are still unanswered, so that nobody works for them.
    pub fn close(&mut self, slot: Slot) -> Vec<u64> {
        let Some(session) = self.sessions.get_mut(slot as usize).and_then(Option::take) else { return Vec::new() };
        let mut requests = Vec::new();
        for subscription in session.subscriptions {
            self.withdraw(slot, subscription.entry, subscription.state);
            if let State::Recovering(request) = subscription.state
                && self.requests.remove(&request).is_some()
            {
                requests.push(request);
            }
        }
        requests
    }

    /// Replaces a connection's channels. `last` is what the client says it has (ids), used only while the connection
    /// has no position of its own, as in Odoo. Channels that are new on this connection stay silent until
    /// [`Hub::recovered`] is called with `request`; None when there are none.
    pub fn subscribe(
        &mut self,
        slot: Slot,
        channels: Vec<Channel>,
        last: i64,
        request: u64,
        now: Moment,
    ) -> Option<Recovery> {
        let database = self.session(slot)?.database;
        let mut wanted: Vec<u32> = channels.into_iter().map(|channel| self.entry(database, channel)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        self.leave(slot, &wanted);
        let session = self.session(slot)?;
        session.reach.roll(now);
        if session.reach.last == 0 {
            session.reach.last = last;
        }
        let last = session.reach.last;
        let channels: Vec<Channel> = wanted.iter().filter_map(|entry| self.join(slot, *entry, request)).collect();
        for entry in self.session(slot)?.forget_left() {
            self.withdraw(slot, entry, State::Left);
        }
        if channels.is_empty() {
            return None;
        }
        self.requests.insert(request, slot);
        Some(Recovery { channels, last })
    }

    /// Notifications of one channel, just committed, with ascending ids: puts the connections that are to be sent them
    /// into `receivers` (in place of what was there).
    pub fn dispatch(&mut self, database: u32, notifications: &[Notification], now: Moment, receivers: &mut Vec<Slot>) {
        receivers.clear();
        let Some((first, last)) = notifications.first().zip(notifications.last()) else { return };
        let Some(at) = self.index.get(&database).and_then(|index| index.get(&first.channel)) else { return };
        let Some(entry) = self.channels.get(*at as usize) else { return };
        for slot in &entry.live {
            if let Some(session) = self.sessions.get_mut(*slot as usize).and_then(Option::as_mut) {
                session.reach.sent(last.id, now);
                session.sent += notifications.len() as i64;
                receivers.push(*slot);
            }
        }
        for slot in &entry.silent {
            let session = self.sessions.get_mut(*slot as usize).and_then(Option::as_mut);
            let before = session.and_then(|session| session.find(*at)).and_then(|found| found.before.as_mut());
            if let Some(before) = before {
                notifications.iter().for_each(|notification| before.missed(notification.id));
            }
        }
    }

    /// The answer to a request: makes its channels live and returns the connection with what of the answer it is to be
    /// sent, in the answer's order. None when the connection is gone.
    pub fn recovered(
        &mut self,
        request: u64,
        notifications: Vec<Notification>,
        now: Moment,
    ) -> Option<(Slot, Vec<Notification>)> {
        let slot = self.requests.remove(&request)?;
        let session = self.sessions.get_mut(slot as usize)?.as_mut()?;
        let index = self.index.get(&session.database);
        let mut owed = notifications;
        owed.retain(|notification| {
            let entry = index.and_then(|index| index.get(&notification.channel));
            let subscription = entry.and_then(|entry| session.find(*entry));
            subscription.is_some_and(|subscription| {
                subscription.state == State::Recovering(request)
                    && subscription.before.as_ref().is_none_or(|before| before.owes(notification.id))
            })
        });
        for notification in &owed {
            session.reach.sent(notification.id, now);
        }
        session.sent += owed.len() as i64;
        for subscription in &mut session.subscriptions {
            if subscription.state == State::Recovering(request) {
                subscription.state = State::Live;
                subscription.before = None;
                if let Some(entry) = self.channels.get_mut(subscription.entry as usize) {
                    remove(&mut entry.silent, slot);
                    entry.live.push(slot);
                }
            }
        }
        Some((slot, owed))
    }

    /// The database of a connection (its OID); None when the hub does not know it.
    pub fn database(&self, slot: Slot) -> Option<u32> {
        self.sessions.get(slot as usize)?.as_ref().map(|session| session.database)
    }

    /// How many channels a connection is subscribed to.
    pub fn subscribed(&self, slot: Slot) -> usize {
        let session = self.sessions.get(slot as usize).and_then(Option::as_ref);
        session.map_or(0, |session| session.subscriptions.iter().filter(|s| s.state != State::Left).count())
    }

    /// How many notifications a connection was sent.
    pub fn sent(&self, slot: Slot) -> i64 {
        self.sessions.get(slot as usize).and_then(Option::as_ref).map_or(0, |session| session.sent)
    }

    fn session(&mut self, slot: Slot) -> Option<&mut Session> {
        self.sessions.get_mut(slot as usize)?.as_mut()
    }

    /// The entry of a channel, a new one if nobody had it.
    fn entry(&mut self, database: u32, channel: Channel) -> u32 {
        let index = self.index.entry(database).or_default();
        if let Some(at) = index.get(&channel) {
            return *at;
        }
        let channel = Arc::new(channel);
        let entry = Entry { database, channel: channel.clone(), live: Vec::new(), silent: Vec::new() };
        let at = match self.free.pop() {
            Some(at) => at,
            None => self.channels.len() as u32,
        };
        match self.channels.get_mut(at as usize) {
            Some(place) => *place = entry,
            None => self.channels.push(entry),
        }
        index.insert(channel, at);
        at
    }

    /// Puts a connection on a channel, silent until `request` is answered. None when it was there already.
    fn join(&mut self, slot: Slot, at: u32, request: u64) -> Option<Channel> {
        let state = State::Recovering(request);
        let subscriptions = &mut self.session(slot)?.subscriptions;
        match subscriptions.binary_search_by_key(&at, |subscription| subscription.entry) {
            Ok(found) => {
                let subscription = subscriptions.get_mut(found)?;
                if subscription.state != State::Left {
                    return None;
                }
                subscription.state = state;
                Some(self.channels.get(at as usize)?.channel.as_ref().clone())
            }
            Err(place) => {
                subscriptions.insert(place, Subscription { entry: at, state, before: None });
                let entry = self.channels.get_mut(at as usize)?;
                entry.silent.push(slot);
                Some(entry.channel.as_ref().clone())
            }
        }
    }

    /// Takes a connection off every channel that is not wanted any more (`wanted` ascends). What was live is
    /// remembered; of what never came to be live nothing was sent, so it is as if it had not been asked for.
    fn leave(&mut self, slot: Slot, wanted: &[u32]) {
        let Some(session) = self.sessions.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        let mut gone = Vec::new();
        let high = session.reach.high;
        for subscription in &mut session.subscriptions {
            if wanted.binary_search(&subscription.entry).is_ok() {
                continue;
            }
            match subscription.state {
                State::Live => {
                    subscription.before = Some(Box::new(Before { high, late: Vec::new() }));
                    if let Some(entry) = self.channels.get_mut(subscription.entry as usize) {
                        remove(&mut entry.live, slot);
                        entry.silent.push(slot);
                    }
                    subscription.state = State::Left;
                }
                State::Recovering(_) if subscription.before.is_some() => subscription.state = State::Left,
                State::Recovering(_) => gone.push(subscription.entry),
                State::Left => {}
            }
        }
        session.subscriptions.retain(|subscription| gone.binary_search(&subscription.entry).is_err());
        for entry in gone {
            self.withdraw(slot, entry, State::Left);
        }
    }

    /// Takes a connection off an entry's lists and drops the entry when nobody is left.
    fn withdraw(&mut self, slot: Slot, at: u32, state: State) {
        let Some(entry) = self.channels.get_mut(at as usize) else { return };
        remove(if state == State::Live { &mut entry.live } else { &mut entry.silent }, slot);
        if entry.live.is_empty() && entry.silent.is_empty() {
            if let Some(index) = self.index.get_mut(&entry.database) {
                index.remove(&entry.channel);
                if index.is_empty() {
                    self.index.remove(&entry.database);
                }
            }
            self.free.push(at);
        }
    }
}

fn remove(slots: &mut Vec<Slot>, slot: Slot) {
    if let Some(at) = slots.iter().position(|found| *found == slot) {
        slots.swap_remove(at);
    }
    if slots.is_empty() {
        // Most channels have one connection only; what it does not need adds up.
        *slots = Vec::new();
    }
}

#[cfg(test)]
mod tests;
