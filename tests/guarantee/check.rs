//! Compares what the clients saw with the ledger, promise by promise. Each check is one pass over what it looks at.

use super::ledger::{Entry, Key, Ledger, NEVER, Outcome, Txn, instant};
use super::stage::Absence;
use super::story::{Receipt, Story, Visit};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

/// The promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Promise {
    /// What was committed on a client's channels after it subscribed came to it.
    Lost,
    /// Within one connection no message came twice.
    Doubled,
    /// The same, the worker of the database having been ended during that connection.
    DoubledByWorker,
    /// Nothing came again after a reconnect that named the greatest id received, the gateway and workers being up.
    Repeated,
    /// Within a transaction the order of sending.
    WithinTransaction,
    /// The same for what was prepared, where the transaction did not use its ids in ascending order.
    WithinPrepared,
    /// What was committed before another commit was issued came first.
    AcrossTransactions,
    /// The same for what was committed before a worker that had been ended during that connection was back.
    AcrossWorker,
    /// The subscribers of a channel saw one order.
    SameForAll,
    /// Nothing of a transaction or savepoint that was rolled back.
    RolledBack,
    /// Nothing of another database or channel, each message under its own id.
    Foreign,
    /// What the writers and clients met that must not be: refused statements, bad frames, an end that did not come.
    Conduct,
}

/// How many faults of one kind are told in full.
const TOLD: usize = 5;

/// What was found.
#[derive(Default)]
pub struct Report {
    counts: HashMap<Promise, usize>,
    /// The same by database and by what the message's transaction did.
    kinds: BTreeMap<(Promise, u8, &'static str), usize>,
    told: Vec<(Promise, String)>,
    /// Messages that came again after a reconnect where that is allowed.
    pub repeats_allowed: usize,
    /// Messages under ids drawn in earlier transactions that did not come across a restart: it is not promised.
    pub not_owed: usize,
    /// What was compared: messages owed, all receipts, and those whose order among transactions was checked.
    pub owed: usize,
    pub receipts: usize,
    pub live: usize,
}

impl Report {
    /// How often this promise was broken.
    pub fn count(&self, promise: Promise) -> usize {
        self.counts.get(&promise).copied().unwrap_or(0)
    }

    /// Whether every promise was kept.
    pub fn is_clean(&self) -> bool {
        self.counts.is_empty()
    }

    /// Whether every promise was kept that holds across the end of a worker or of the server: there what was sent may be
    /// sent again, by id rather than in the order of commits, but nothing is lost and nothing comes that must not.
    pub fn is_whole(&self) -> bool {
        let again = [
            Promise::DoubledByWorker,
            Promise::WithinTransaction,
            Promise::WithinPrepared,
            Promise::AcrossTransactions,
            Promise::AcrossWorker,
            Promise::SameForAll,
        ];
        self.counts.keys().all(|promise| again.contains(promise))
    }

    /// Enters a fault with a message of this transaction.
    fn fault(&mut self, promise: Promise, entry: &Entry, words: impl FnOnce() -> String) {
        *self.kinds.entry((promise, entry.database, entry.how)).or_default() += 1;
        self.add(promise, words);
    }

    /// Enters a fault; the words are made only for the first of a kind.
    pub fn add(&mut self, promise: Promise, words: impl FnOnce() -> String) {
        let count = self.counts.entry(promise).or_default();
        *count += 1;
        if *count <= TOLD {
            self.told.push((promise, words()));
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { owed, receipts, live, repeats_allowed, not_owed, .. } = self;
        writeln!(out, "owed {owed}, received {receipts}, of them in live order {live}")?;
        writeln!(out, "allowed: {repeats_allowed} came again after reconnects, {not_owed} did not come")?;
        let mut counts: Vec<_> = self.counts.iter().collect();
        counts.sort();
        for (promise, count) in counts {
            writeln!(out, "broken: {promise:?} {count} times")?;
            for ((_, database, how), count) in self.kinds.iter().filter(|((kind, ..), _)| kind == promise) {
                writeln!(out, "    {count} in database {database}: {how}")?;
            }
            for (_, words) in self.told.iter().filter(|(told, _)| told == promise) {
                writeln!(out, "  {words}")?;
            }
        }
        Ok(())
    }
}

/// What happened to the server during a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Past {
    /// Nothing.
    Quiet,
    /// Gateway, workers or server were restarted: what came may come again, and below a client's `last` only what
    /// transactions of that time brought is owed. Workers alone were away at these times.
    Restarts(Vec<Absence>),
}

impl Past {
    /// Whether the worker was ended after this visit's first receipt and before this one; until when it was away.
    fn worker_back(&self, story: &Story, visit: &Visit, at: usize) -> Option<u64> {
        let Past::Restarts(absences) = self else { return None };
        let millis = |at: usize| story.receipts.get(at).map_or(0, |receipt| u64::from(receipt.at));
        let is_it = |absence: &&Absence| {
            let Absence { database, from, to } = absence;
            *database == story.database && to / 1_000_000 >= millis(visit.first) && from / 1_000_000 <= millis(at)
        };
        absences.iter().filter(is_it).map(|absence| absence.to).max()
    }
}

/// Compares all stories with the ledger.
pub fn check(ledger: &Ledger, stories: &[Story], past: &Past) -> Report {
    let mut report = Report::default();
    for story in stories {
        let (seen, known) = Reader { ledger, story, past, report: &mut report }.read();
        report.receipts += story.receipts.len();
        lost(ledger, story, past, &seen, &mut report);
        across(ledger, story, past, &known, &mut report);
        for words in &story.complaints {
            report.add(Promise::Conduct, || format!("{}: {words}", story.name));
        }
    }
    same_for_all(ledger, stories, &mut report);
    report
}

/// A set of messages.
struct Seen(Vec<u64>);

impl Seen {
    fn new(size: usize) -> Seen {
        Seen(vec![0; size / 64 + 1])
    }

    fn has(&self, at: usize) -> bool {
        self.0[at / 64] & 1 << (at % 64) != 0
    }

    /// Whether it is new.
    fn insert(&mut self, at: usize) -> bool {
        let is_new = !self.has(at);
        self.0[at / 64] |= 1 << (at % 64);
        is_new
    }
}

/// Reads one story from the beginning.
struct Reader<'a> {
    ledger: &'a Ledger,
    story: &'a Story,
    past: &'a Past,
    report: &'a mut Report,
}

impl<'a> Reader<'a> {
    /// What was seen at all, and for each receipt whether it was rightly there for the first time.
    fn read(mut self) -> (Seen, Vec<bool>) {
        let mut seen = Seen::new(self.ledger.len());
        let mut first_time = vec![false; self.story.receipts.len()];
        for (visit, start, receipts) in self.story.by_visit() {
            let mut in_this_visit: HashSet<usize> = HashSet::new();
            let mut places: HashMap<Txn, u32> = HashMap::new();
            for (at, receipt) in (start..).zip(receipts) {
                let Some(entry) = self.rightly(at, receipt) else { continue };
                let index = self.ledger.index(receipt.key);
                first_time[at] = seen.insert(index);
                let doubled = !in_this_visit.insert(index);
                if !first_time[at] {
                    self.again(at, visit, entry, doubled);
                }
                if !doubled {
                    self.place(at, visit, entry, &mut places);
                }
            }
        }
        (seen, first_time)
    }

    /// The transaction that rightly brought this; None when nothing may have.
    fn rightly(&mut self, at: usize, receipt: &Receipt) -> Option<&'a Entry> {
        let (ledger, story, key) = (self.ledger, self.story, receipt.key);
        let words = |what: &str| {
            let (name, seen) = (&story.name, story.around(at));
            format!("{name} received {what}: {}; around it {seen}", ledger.describe(key))
        };
        let entry = ledger.entry(key.txn).filter(|entry| entry.database == story.database);
        let found = entry.and_then(|entry| Some((entry, entry.sent.get(key.seq as usize)?)));
        let Some((entry, sent)) = found else {
            self.report.add(Promise::Foreign, || words("what its database never had"));
            return None;
        };
        if entry.outcome != Outcome::Committed || !sent.is_kept() {
            self.report.fault(Promise::RolledBack, entry, || words("what was rolled back"));
            return None;
        }
        if !story.channels.contains(&sent.channel()) || ledger.id(key) != receipt.id {
            self.report.fault(Promise::Foreign, entry, || words("another channel's message, or one under another id"));
            return None;
        }
        Some(entry)
    }

    /// A message came again.
    fn again(&mut self, at: usize, visit: &Visit, entry: &Entry, doubled: bool) {
        let (ledger, story) = (self.ledger, self.story);
        let words = |what: &str| {
            let (name, last, seen) = (&story.name, visit.last, story.around(at));
            let message = ledger.describe(story.receipts[at].key);
            format!("{name} (connected with last = {last}) received {what}: {message}; around it {seen}")
        };
        if doubled {
            let by_worker = self.past.worker_back(story, visit, at).is_some();
            let promise = if by_worker { Promise::DoubledByWorker } else { Promise::Doubled };
            self.report.fault(promise, entry, || words("twice in one connection"));
        } else if *self.past == Past::Quiet && visit.last_was_greatest {
            self.report.fault(Promise::Repeated, entry, || words("again"));
        } else {
            self.report.repeats_allowed += 1;
        }
    }

    /// The order of sending. A replay may go by id: there it binds transactions whose ids ascend.
    fn place(&mut self, at: usize, visit: &Visit, entry: &Entry, places: &mut HashMap<Txn, u32>) {
        let (ledger, story) = (self.ledger, self.story);
        let key = story.receipts[at].key;
        let is_live = entry.issued > visit.live_from;
        let before = places.insert(key.txn, key.seq).filter(|before| *before > key.seq);
        if let Some(before) = before.filter(|_| is_live || ledger.is_ascending(key.txn)) {
            let by_id = entry.is_prepared && !ledger.is_ascending(key.txn);
            let promise = if by_id { Promise::WithinPrepared } else { Promise::WithinTransaction };
            self.report.fault(promise, entry, || {
                let (name, seen, message) = (&story.name, story.around(at), ledger.describe(key));
                let live = if is_live { "live" } else { "in a replay" };
                format!("{name} received ({live}) message {before} before {message}; around it {seen}")
            });
        }
    }
}

fn lost(ledger: &Ledger, story: &Story, past: &Past, seen: &Seen, report: &mut Report) {
    let mine = |entry: &&Entry| entry.database == story.database && entry.issued > story.owed_from;
    for entry in ledger.entries().iter().filter(mine) {
        for (key, channel) in ledger.committed(entry) {
            if !story.channels.contains(&channel) {
                continue;
            }
            report.owed += 1;
            let has_come = seen.has(ledger.index(key));
            if !has_come && *past != Past::Quiet && entry.sent[key.seq as usize].is_drawn_before() {
                report.not_owed += 1;
            } else if !has_come {
                report.fault(Promise::Lost, entry, || missing(ledger, story, key, entry));
            }
        }
    }
}

/// A lost message, and what the client saw when its transaction was committed.
fn missing(ledger: &Ledger, story: &Story, key: Key, entry: &Entry) -> String {
    let millis = (entry.returned.min(entry.issued.saturating_add(1_000_000_000)) / 1_000_000) as u32;
    let at = story.receipts.partition_point(|receipt| receipt.at < millis);
    let visit = story.visits.iter().rev().find(|visit| visit.first <= at);
    let (last, live) = visit.map_or((0, NEVER), |visit| (visit.last, visit.live_from));
    let (name, message, seen) = (&story.name, ledger.describe(key), story.around(at));
    format!(
        "{name} never received {message}; it was then connected with last = {last}, live from {}; it saw {seen}",
        instant(live)
    )
}

/// Whether the order of a receipt among transactions is promised: its commit was issued after the connection stood.
fn live<'a>(ledger: &'a Ledger, visit: &Visit, receipt: &Receipt) -> Option<&'a Entry> {
    ledger.entry(receipt.key.txn).filter(|entry| entry.issued > visit.live_from)
}

/// A sweep per connection: nothing may come whose commit had returned before that of something seen was issued.
fn across(ledger: &Ledger, story: &Story, past: &Past, first_time: &[bool], report: &mut Report) {
    for (visit, start, receipts) in story.by_visit() {
        let mut latest: Option<(u64, usize)> = None;
        for (at, receipt) in (start..).zip(receipts).filter(|(at, _)| first_time[*at]) {
            let Some(entry) = live(ledger, visit, receipt) else { continue };
            report.live += 1;
            if let Some((issued, before)) = latest.filter(|(issued, _)| entry.returned < *issued) {
                let back = past.worker_back(story, visit, at);
                let by_worker = back.is_some_and(|back| entry.issued < back);
                let promise = if by_worker { Promise::AcrossWorker } else { Promise::AcrossTransactions };
                report.fault(promise, entry, || {
                    let (name, seen) = (&story.name, story.around(at));
                    let (first, second) = (story.receipts[before].key, receipt.key);
                    let late = (issued - entry.returned) as f64 / 1e6;
                    let (first, second) = (ledger.describe(first), ledger.describe(second));
                    format!("{name} received {first} before {second}, committed {late:.3} ms earlier; around it {seen}")
                });
            }
            if latest.is_none_or(|(issued, _)| entry.issued > issued) {
                latest = Some((entry.issued, at));
            }
        }
    }
}

/// The messages of each channel that a client received live, in order.
fn by_channel(ledger: &Ledger, story: &Story) -> HashMap<u8, Vec<(Key, usize)>> {
    let mut seen = Seen::new(ledger.len());
    let mut channels: HashMap<u8, Vec<(Key, usize)>> = HashMap::new();
    for (visit, start, receipts) in story.by_visit() {
        for (at, receipt) in (start..).zip(receipts) {
            let entry = live(ledger, visit, receipt).filter(|entry| entry.database == story.database);
            let sent = entry.and_then(|entry| entry.sent.get(receipt.key.seq as usize));
            if let Some(sent) = sent.filter(|_| seen.insert(ledger.index(receipt.key))) {
                channels.entry(sent.channel()).or_default().push((receipt.key, at));
            }
        }
    }
    channels
}

/// Each two subscribers of a channel are compared in what both of them received live.
fn same_for_all(ledger: &Ledger, stories: &[Story], report: &mut Report) {
    let mut databases: Vec<u8> = stories.iter().map(|story| story.database).collect();
    databases.sort_unstable();
    databases.dedup();
    let mut places = vec![0_u32; ledger.len()];
    for database in databases {
        let mine: Vec<&Story> = stories.iter().filter(|story| story.database == database).collect();
        let orders: Vec<_> = mine.iter().map(|story| by_channel(ledger, story)).collect();
        for (n, order) in orders.iter().enumerate() {
            for (channel, one) in order {
                (1..).zip(one).for_each(|(place, (key, _))| places[ledger.index(*key)] = place);
                for (m, other) in orders.iter().enumerate().skip(n + 1) {
                    let other = other.get(channel).map_or(&[][..], |other| other);
                    compare(ledger, &places, [mine[n], mine[m]], other, report);
                }
                one.iter().for_each(|(key, _)| places[ledger.index(*key)] = 0);
            }
        }
    }
}

/// Whether what came to the second client on a channel is in the order of the first one's places.
fn compare(ledger: &Ledger, places: &[u32], stories: [&Story; 2], other: &[(Key, usize)], report: &mut Report) {
    let mut before: Option<(u32, Key)> = None;
    for (key, at) in other {
        let place = places[ledger.index(*key)];
        if place == 0 {
            continue;
        }
        if let Some((_, first)) = before.filter(|(before, _)| *before > place) {
            report.fault(Promise::SameForAll, &ledger.entries()[key.txn as usize], || {
                let [one, two] = stories.map(|story| &story.name);
                let (first, second, seen) = (ledger.describe(first), ledger.describe(*key), stories[1].around(*at));
                format!("{two} received {first} before {second}, {one} the other way round; around it {seen}")
            });
        }
        before = Some((place, *key));
    }
}
