//! Who hears what: the subscriptions of one reactor's connections, by database and channel, and how far each connection
//! is sure, so that a notification reaches a socket once. Decides who is sent a notification and what must be
//! recovered; knows no sockets, no frames and no clock. Connections are numbers that the reactor gives out.

mod members;
mod session;

use super::channel::Channel;
use super::notification::Notification;
use hashbrown::HashTable;
use members::{Lists, Members};
use session::{Before, Past, Reach, Session, State, Subscription, Ticket};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

/// The reactor's number for a connection; free for another one after [`Hub::close`].
pub type Slot = u32;

/// Milliseconds of a clock that never goes back; only differences matter.
pub type Moment = u64;

/// What a database worker is asked to replay to one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// Its number, the same in every page of the answer.
    pub request: u64,
    /// The channels that are new on this socket.
    pub channels: Vec<Channel>,
    /// The position of the connection, 0 for none.
    pub last: i64,
}

/// What a new subscription makes of a connection's recoveries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Those under way that nobody waits for any more: all their channels were left.
    pub given_up: Vec<u64>,
    /// Those to begin.
    pub recoveries: Vec<Recovery>,
}

/// The subscriptions of one reactor.
#[derive(Default)]
pub struct Hub {
    channels: Vec<Entry>,
    free: Vec<u32>,
    /// By database: the places in `channels`, by channel.
    index: HashMap<u32, HashTable<u32>>,
    hasher: RandomState,
    lists: Lists,
    sessions: Vec<Option<Session>>,
    requests: HashMap<Ticket, Request>,
}

/// A recovery under way.
struct Request {
    /// Its number outside.
    number: u64,
    slot: Slot,
    /// The last id of the last page; before it where an earlier one was broken off. None: it begins at the connection's
    /// position.
    after: Option<i64>,
}

/// One channel of one database and its connections.
struct Entry {
    channel: Channel,
    database: u32,
    /// Sent everything as it comes.
    live: Members,
    /// Waiting for a recovery, or gone from the channel and remembered.
    silent: Members,
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
            self.withdraw(slot, subscription.entry, subscription.state() == State::Live);
            requests.extend(subscription.ticket().and_then(|ticket| self.requests.remove(&ticket)).map(|r| r.number));
        }
        requests
    }

    /// Replaces a connection's channels. `last` is what the client says it has (ids), used only while the connection
    /// has no position of its own, as in Odoo. Channels that are new on this connection stay silent until the last page
    /// of their recovery, see [`Hub::recovered`]; `number` gives each recovery its number. One is nearly always enough:
    /// only where a replay was broken off before, its channels go on from there.
    pub fn subscribe(
        &mut self,
        slot: Slot,
        channels: Vec<Channel>,
        last: i64,
        number: impl FnMut() -> u64,
        now: Moment,
    ) -> Change {
        let Some(database) = self.database(slot) else { return Change::default() };
        let mut wanted: Vec<u32> = channels.into_iter().map(|channel| self.entry(database, channel)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let given_up = self.leave(slot, &wanted);
        let recoveries = self.join(slot, &wanted, last, number, now).unwrap_or_default();
        let forgotten = self.session(slot).map(Session::forget_left).unwrap_or_default();
        forgotten.into_iter().for_each(|entry| self.withdraw(slot, entry, false));
        Change { given_up, recoveries }
    }

    /// Notifications of one channel, just committed, with ascending ids: puts the connections that are to be sent them
    /// into `receivers` (in place of what was there).
    pub fn dispatch(&mut self, database: u32, notifications: &[Notification], now: Moment, receivers: &mut Vec<Slot>) {
        receivers.clear();
        let Some((first, last)) = notifications.first().zip(notifications.last()) else { return };
        let Some(at) = self.find(database, &first.channel) else { return };
        let Some(entry) = self.channels.get(at as usize) else { return };
        for slot in self.lists.slots(&entry.live) {
            if let Some(session) = self.sessions.get_mut(*slot as usize).and_then(Option::as_mut) {
                session.reach.sent(last.id, now);
                session.sent += notifications.len() as i64;
                receivers.push(*slot);
            }
        }
        for slot in self.lists.slots(&entry.silent) {
            let session = self.sessions.get_mut(*slot as usize).and_then(Option::as_mut);
            if let Some(before) = session.and_then(|session| session.find(at)).and_then(Subscription::before) {
                notifications.iter().for_each(|notification| before.missed(notification.id));
            }
        }
    }

    /// A page of the answer to a request. Returns the connection with what of the page it is to be sent, in the page's
    /// order; None when nobody waits for it any more. The last page, the one without `more`, makes the channels live:
    /// until then nothing is sent on them but the pages, which contain it all.
    pub fn recovered(
        &mut self,
        request: u64,
        notifications: Vec<Notification>,
        more: bool,
        now: Moment,
    ) -> Option<(Slot, Vec<Notification>)> {
        let ticket = ticket(request);
        let Request { slot, after, .. } = self.requests.get_mut(&ticket).filter(|found| found.number == request)?;
        let slot = *slot;
        *after = notifications.last().map(|last| last.id).or(*after);
        let database = self.database(slot)?;
        let entries: Vec<Option<u32>> =
            notifications.iter().map(|notification| self.find(database, &notification.channel)).collect();
        let session = self.sessions.get_mut(slot as usize)?.as_mut()?;
        let mut owed = notifications;
        let mut entries = entries.into_iter();
        owed.retain(|notification| {
            let subscription = entries.next().flatten().and_then(|entry| session.find(entry));
            subscription.is_some_and(|subscription| {
                subscription.state() == State::Recovering(ticket)
                    && subscription.before().is_none_or(|before| before.owes(notification.id))
            })
        });
        for notification in &owed {
            session.reach.sent(notification.id, now);
        }
        session.sent += owed.len() as i64;
        if !more {
            self.make_live(slot, ticket);
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
        session.map_or(0, |session| session.subscribed())
    }

    /// How many notifications a connection was sent.
    pub fn sent(&self, slot: Slot) -> i64 {
        self.sessions.get(slot as usize).and_then(Option::as_ref).map_or(0, |session| session.sent)
    }

    fn session(&mut self, slot: Slot) -> Option<&mut Session> {
        self.sessions.get_mut(slot as usize)?.as_mut()
    }

    /// The entry of a channel that somebody has.
    fn find(&self, database: u32, channel: &Channel) -> Option<u32> {
        let is_it = |at: &u32| self.channels.get(*at as usize).is_some_and(|entry| entry.channel == *channel);
        self.index.get(&database)?.find(self.hasher.hash_one(channel), is_it).copied()
    }

    /// The entry of a channel, a new one if nobody had it.
    fn entry(&mut self, database: u32, channel: Channel) -> u32 {
        if let Some(at) = self.find(database, &channel) {
            return at;
        }
        let hash = self.hasher.hash_one(&channel);
        let entry = Entry { channel, database, live: Members::default(), silent: Members::default() };
        let at = match self.free.pop() {
            Some(at) => at,
            None => self.channels.len() as u32,
        };
        match self.channels.get_mut(at as usize) {
            Some(place) => *place = entry,
            None => self.channels.push(entry),
        }
        let (channels, hasher) = (&self.channels, &self.hasher);
        let rehash = |at: &u32| channels.get(*at as usize).map_or(0, |entry| hasher.hash_one(&entry.channel));
        self.index.entry(database).or_default().insert_unique(hash, at, rehash);
        at
    }

    /// A request is answered: its channels are sent everything as it comes from now on.
    fn make_live(&mut self, slot: Slot, ticket: Ticket) {
        self.requests.remove(&ticket);
        let Some(session) = self.sessions.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        for subscription in &mut session.subscriptions {
            if subscription.state() == State::Recovering(ticket) {
                subscription.set(State::Live);
                subscription.past = None;
                if let Some(entry) = self.channels.get_mut(subscription.entry as usize) {
                    self.lists.remove(&mut entry.silent, slot);
                    self.lists.add(&mut entry.live, slot);
                }
            }
        }
    }

    /// Puts a connection on those of these channels that it is not on, silent until they are recovered: from the
    /// connection's position, or from where an earlier replay was broken off.
    fn join(
        &mut self,
        slot: Slot,
        wanted: &[u32],
        last: i64,
        mut number: impl FnMut() -> u64,
        now: Moment,
    ) -> Option<Vec<Recovery>> {
        let session = self.sessions.get_mut(slot as usize)?.as_mut()?;
        session.reach.roll(now);
        if session.reach.last == 0 {
            session.reach.last = last;
        }
        let last = session.reach.last;
        session.subscriptions.reserve_exact(wanted.len().saturating_sub(session.subscriptions.len()));
        let mut recoveries: BTreeMap<Option<i64>, Recovery> = BTreeMap::new();
        for at in wanted {
            let Some(entry) = self.channels.get_mut(*at as usize) else { continue };
            let Some(after) = session.absent(*at) else { continue };
            let begin = || Recovery { request: number(), channels: Vec::new(), last: after.unwrap_or(last) };
            let recovery = recoveries.entry(after).or_insert_with(begin);
            recovery.channels.push(entry.channel.clone());
            if session.await_recovery(*at, ticket(recovery.request)) {
                self.lists.add(&mut entry.silent, slot);
            }
        }
        for (after, recovery) in &recoveries {
            let request = Request { number: recovery.request, slot, after: *after };
            self.requests.insert(ticket(recovery.request), request);
        }
        Some(recoveries.into_values().collect())
    }

    /// Takes a connection off every channel that is not wanted any more (`wanted` ascends). What was live is
    /// remembered, and where a replay was broken off; a channel of which nothing was sent is as if it had not been
    /// asked for. Returns the requests that nobody waits for any more.
    fn leave(&mut self, slot: Slot, wanted: &[u32]) -> Vec<u64> {
        let Some(session) = self.sessions.get_mut(slot as usize).and_then(Option::as_mut) else { return Vec::new() };
        let (mut gone, mut broken) = (Vec::new(), HashSet::new());
        let high = session.reach.high;
        for subscription in &mut session.subscriptions {
            if wanted.binary_search(&subscription.entry).is_ok() {
                continue;
            }
            match subscription.state() {
                State::Live => {
                    subscription.past = Some(Box::new(Past { before: Some(Before::new(high)), after: None }));
                    if let Some(entry) = self.channels.get_mut(subscription.entry as usize) {
                        self.lists.remove(&mut entry.live, slot);
                        self.lists.add(&mut entry.silent, slot);
                    }
                    subscription.set(State::Left);
                }
                State::Recovering(ticket) => {
                    broken.insert(ticket);
                    let after = self.requests.get(&ticket).and_then(|request| request.after);
                    if after.is_some() || subscription.before().is_some() {
                        subscription.past.get_or_insert_default().after = after;
                        subscription.set(State::Left);
                    } else {
                        gone.push(subscription.entry);
                    }
                }
                State::Left => {}
            }
        }
        session.subscriptions.retain(|subscription| gone.binary_search(&subscription.entry).is_err());
        session.subscriptions.iter().filter_map(Subscription::ticket).for_each(|ticket| {
            broken.remove(&ticket);
        });
        gone.into_iter().for_each(|entry| self.withdraw(slot, entry, false));
        broken.into_iter().filter_map(|ticket| self.requests.remove(&ticket)).map(|request| request.number).collect()
    }

    /// Takes a connection off an entry's lists and drops the entry when nobody is left.
    fn withdraw(&mut self, slot: Slot, at: u32, live: bool) {
        let Some(entry) = self.channels.get_mut(at as usize) else { return };
        self.lists.remove(if live { &mut entry.live } else { &mut entry.silent }, slot);
        if !(entry.live.is_empty() && entry.silent.is_empty()) {
            return;
        }
        let hash = self.hasher.hash_one(&entry.channel);
        if let Some(index) = self.index.get_mut(&entry.database) {
            if let Ok(found) = index.find_entry(hash, |found| *found == at) {
                found.remove();
            }
            if index.is_empty() {
                self.index.remove(&entry.database);
            }
        }
        entry.channel = Channel::default();
        self.free.push(at);
    }
}

/// A request's ticket: of numbers that differ by 2^32 no two are ever under way.
fn ticket(request: u64) -> Ticket {
    ((request % u64::from(u32::MAX - 1)) + 2) as Ticket
}

#[cfg(test)]
mod tests;
