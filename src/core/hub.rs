//! Who hears what: the subscriptions of one reactor's connections, by database and channel, and how far each connection
//! is sure, so that a notification reaches a socket once. Decides who is sent a notification and what must be
//! recovered; knows no sockets, no frames and no clock. Connections are numbers that the reactor gives out.

mod session;

use super::channel::Channel;
use super::notification::Notification;
use session::{Before, Reach, Session, State, Subscription};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

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
    index: HashMap<u32, HashMap<Arc<Channel>, u32>>,
    sessions: Vec<Option<Session>>,
    requests: HashMap<u64, Request>,
}

/// A recovery under way.
struct Request {
    slot: Slot,
    /// The last id of the last page; before it where an earlier one was broken off. None: it begins at the connection's
    /// position.
    after: Option<i64>,
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
            self.withdraw(slot, subscription.entry, subscription.state == State::Live);
            requests.extend(subscription.request().filter(|request| self.requests.remove(request).is_some()));
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
        let Request { slot, after } = self.requests.get_mut(&request)?;
        let slot = *slot;
        *after = notifications.last().map(|last| last.id).or(*after);
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
        if !more {
            self.make_live(slot, request);
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

    /// A request is answered: its channels are sent everything as it comes from now on.
    fn make_live(&mut self, slot: Slot, request: u64) {
        self.requests.remove(&request);
        let Some(session) = self.sessions.get_mut(slot as usize).and_then(Option::as_mut) else { return };
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
        let mut recoveries: BTreeMap<Option<i64>, Recovery> = BTreeMap::new();
        for at in wanted {
            let Some(entry) = self.channels.get_mut(*at as usize) else { continue };
            let Some(after) = session.absent(*at) else { continue };
            let begin = || Recovery { request: number(), channels: Vec::new(), last: after.unwrap_or(last) };
            let recovery = recoveries.entry(after).or_insert_with(begin);
            recovery.channels.push(entry.channel.as_ref().clone());
            if session.await_recovery(*at, recovery.request) {
                entry.silent.push(slot);
            }
        }
        for (after, recovery) in &recoveries {
            self.requests.insert(recovery.request, Request { slot, after: *after });
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
            match subscription.state {
                State::Live => {
                    subscription.before = Some(Box::new(Before::new(high)));
                    if let Some(entry) = self.channels.get_mut(subscription.entry as usize) {
                        remove(&mut entry.live, slot);
                        entry.silent.push(slot);
                    }
                    subscription.state = State::Left(None);
                }
                State::Recovering(request) => {
                    broken.insert(request);
                    let after = self.requests.get(&request).and_then(|request| request.after);
                    if after.is_some() || subscription.before.is_some() {
                        subscription.state = State::Left(after);
                    } else {
                        gone.push(subscription.entry);
                    }
                }
                State::Left(_) => {}
            }
        }
        session.subscriptions.retain(|subscription| gone.binary_search(&subscription.entry).is_err());
        session.subscriptions.iter().filter_map(Subscription::request).for_each(|request| {
            broken.remove(&request);
        });
        gone.into_iter().for_each(|entry| self.withdraw(slot, entry, false));
        broken.into_iter().filter(|request| self.requests.remove(request).is_some()).collect()
    }

    /// Takes a connection off an entry's lists and drops the entry when nobody is left.
    fn withdraw(&mut self, slot: Slot, at: u32, live: bool) {
        let Some(entry) = self.channels.get_mut(at as usize) else { return };
        remove(if live { &mut entry.live } else { &mut entry.silent }, slot);
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
