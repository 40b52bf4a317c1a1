//! One connection as the hub knows it: on which channels it is and in which state, what it had of those it left, and
//! how far it is sure. Knows nothing of the other connections.

use super::Moment;

/// What was sent longer ago than this is behind the connection's position, in milliseconds (Odoo's 10 s, ODOO_BUS §4).
const SETTLED: Moment = 10_000;

/// Channels that a connection left and that are remembered, should it come back to them (a chat opened, closed and
/// opened again). Beyond this the position moves up instead, see [`Session::forget_left`].
pub const LEFT_MAX: usize = 256;

/// Late notifications remembered for a channel that was left; more than a few are hardly ever seen.
pub const LATE_MAX: usize = 64;

/// One connection: its subscriptions in the order of their entries, and its position.
pub struct Session {
    /// OID of its database.
    pub database: u32,
    pub subscriptions: Vec<Subscription>,
    pub reach: Reach,
    /// Notifications sent.
    pub sent: i64,
}

/// One connection on one channel.
pub struct Subscription {
    /// The hub's number for the channel.
    pub entry: u32,
    state: u32,
    /// Set when the connection was on this channel before, or on its way to it.
    pub past: Option<Box<Past>>,
}

/// How a connection stands to a channel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Sent everything as it comes.
    Live,
    /// Waits for the last page of the answer to this request; until then only the pages are sent, as they contain it
    /// all.
    Recovering(Ticket),
    /// No longer subscribed.
    Left,
}

/// The hub's number for a request under way, from 2 on.
pub type Ticket = u32;

/// What is remembered of a channel that a connection left.
#[derive(Default)]
pub struct Past {
    /// Set when it was live there.
    pub before: Option<Before>,
    /// The id after which a replay was broken off.
    pub after: Option<i64>,
}

/// What a connection had got of a channel when it left: nothing above `high`, and none of `late`.
pub struct Before {
    high: i64,
    late: Vec<i64>,
}

impl Before {
    /// Everything dispatched so far was sent, none of it above `high`.
    pub fn new(high: i64) -> Before {
        Before { high, late: Vec::new() }
    }

    /// Whether the connection has not had this id yet.
    pub fn owes(&self, id: i64) -> bool {
        id > self.high || self.late.contains(&id)
    }

    /// Something was dispatched and not sent.
    pub fn missed(&mut self, id: i64) {
        if id > self.high {
            return;
        }
        self.late.push(id);
        if self.late.len() > LATE_MAX {
            // Rather twice than never.
            self.high = self.late.iter().min().map_or(0, |lowest| lowest.saturating_sub(1));
            self.late.clear();
        }
    }
}

/// How far a connection is sure: Odoo's L and H (ODOO_BUS §4), where H is kept as two generations of maxima, so that an
/// id is behind the position 10 to 20 s after it was sent.
#[derive(Default)]
pub struct Reach {
    /// Odoo's L.
    pub last: i64,
    /// The greatest id sent.
    pub high: i64,
    newer: i64,
    older: i64,
    since: Moment,
}

impl Reach {
    /// An id was sent.
    pub fn sent(&mut self, id: i64, now: Moment) {
        self.roll(now);
        self.newer = self.newer.max(id);
        self.high = self.high.max(id);
    }

    /// Moves the position past what has settled.
    pub fn roll(&mut self, now: Moment) {
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

impl Subscription {
    /// How the connection stands to the channel. A million of them are kept: one number, 0 and 1 are no tickets.
    pub fn state(&self) -> State {
        match self.state {
            0 => State::Live,
            1 => State::Left,
            ticket => State::Recovering(ticket),
        }
    }

    /// From now on it stands so.
    pub fn set(&mut self, state: State) {
        self.state = match state {
            State::Live => 0,
            State::Left => 1,
            State::Recovering(ticket) => ticket.max(2),
        };
    }

    /// The request it waits for.
    pub fn ticket(&self) -> Option<Ticket> {
        match self.state() {
            State::Recovering(ticket) => Some(ticket),
            State::Live | State::Left => None,
        }
    }

    /// What the connection had of the channel when it left.
    pub fn before(&mut self) -> Option<&mut Before> {
        self.past.as_mut().and_then(|past| past.before.as_mut())
    }

    fn has_left(&self) -> bool {
        self.state() == State::Left
    }
}

impl Session {
    /// The subscription of an entry.
    pub fn find(&mut self, entry: u32) -> Option<&mut Subscription> {
        let at = self.place(entry).ok()?;
        self.subscriptions.get_mut(at)
    }

    /// How many channels it is subscribed to.
    pub fn subscribed(&self) -> usize {
        self.subscriptions.iter().filter(|subscription| !subscription.has_left()).count()
    }

    /// None when it is subscribed to an entry; otherwise where its replay was broken off, if it was.
    pub fn absent(&self, entry: u32) -> Option<Option<i64>> {
        match self.place(entry).ok().and_then(|at| self.subscriptions.get(at)) {
            Some(found) if found.has_left() => Some(found.past.as_ref().and_then(|past| past.after)),
            Some(_) => None,
            None => Some(None),
        }
    }

    /// Subscribes to an entry that it is not subscribed to. True when nothing was remembered of it.
    pub fn await_recovery(&mut self, entry: u32, ticket: Ticket) -> bool {
        let state = State::Recovering(ticket);
        match self.place(entry) {
            Ok(found) => {
                if let Some(subscription) = self.subscriptions.get_mut(found) {
                    subscription.set(state);
                }
                false
            }
            Err(place) => {
                let mut subscription = Subscription { entry, state: 0, past: None };
                subscription.set(state);
                self.subscriptions.insert(place, subscription);
                true
            }
        }
    }

    /// Bounds what is remembered of channels that were left: the position moves up to what was sent, so that coming
    /// back to one of them still repeats nothing. Returns the entries that were given up.
    pub fn forget_left(&mut self) -> Vec<u32> {
        let left: Vec<u32> = self.subscriptions.iter().filter(|found| found.has_left()).map(|s| s.entry).collect();
        if left.len() <= LEFT_MAX {
            return Vec::new();
        }
        self.reach.last = self.reach.last.max(self.reach.high);
        self.subscriptions.retain(|subscription| !subscription.has_left());
        left
    }

    /// Where the subscription of an entry is, or would be.
    fn place(&self, entry: u32) -> Result<usize, usize> {
        self.subscriptions.binary_search_by_key(&entry, |subscription| subscription.entry)
    }
}
