//! What was written: each transaction with the instants of its commit and its messages in the order of sending. Instants
//! are nanoseconds of one monotonic clock. One byte a message here, eight more for its id once the table was read.

/// A transaction's number, unique in a run.
pub type Txn = u32;

/// An instant that never comes.
pub const NEVER: u64 = u64::MAX;

/// A message: its transaction and its place there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub txn: Txn,
    pub seq: u32,
}

/// Set beside a message's channel when a savepoint took it back.
const TAKEN_BACK: u8 = 0x80;
/// Set when its id was drawn in an earlier transaction.
const DRAWN_BEFORE: u8 = 0x40;

/// One message of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent(u8);

impl Sent {
    /// A message on the channel with this number (below 64).
    pub fn on(channel: u8) -> Sent {
        assert!(channel < DRAWN_BEFORE);
        Sent(channel)
    }

    /// The number of its channel.
    pub fn channel(self) -> u8 {
        self.0 & !(TAKEN_BACK | DRAWN_BEFORE)
    }

    /// Whether it is part of what its transaction commits.
    pub fn is_kept(self) -> bool {
        self.0 & TAKEN_BACK == 0
    }

    /// Whether its id was drawn in an earlier transaction.
    pub fn is_drawn_before(self) -> bool {
        self.0 & DRAWN_BEFORE != 0
    }

    /// Its id was drawn in an earlier transaction.
    pub fn draw_before(&mut self) {
        self.0 |= DRAWN_BEFORE;
    }

    /// Its savepoint was rolled back.
    pub fn take_back(&mut self) {
        self.0 |= TAKEN_BACK;
    }
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Committed,
    RolledBack,
    /// The server went down under the commit: the table knows.
    Unknown,
}

/// One transaction.
#[derive(Clone, Debug)]
pub struct Entry {
    pub txn: Txn,
    pub database: u8,
    pub outcome: Outcome,
    /// The commit was not issued before this.
    pub issued: u64,
    /// The commit had returned by then; [`NEVER`] when no answer came.
    pub returned: u64,
    pub sent: Box<[Sent]>,
    /// Whether another session committed it.
    pub is_prepared: bool,
    /// What it did, for reports.
    pub how: &'static str,
}

/// A row as the table has it after the end.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub key: Key,
    pub channel: u8,
    pub id: i64,
}

/// All transactions of a run.
pub struct Ledger {
    entries: Vec<Entry>,
    /// Where the messages of each transaction begin in `ids`.
    starts: Vec<usize>,
    /// The id of each message, 0 where the table has none.
    ids: Vec<i64>,
    /// Whether the ids of a transaction ascend in the order of sending.
    ascending: Vec<bool>,
}

impl Ledger {
    /// The ledger of these transactions, and of the rows each database's table has in the end. Unknown outcomes are
    /// settled by the table; where it contradicts a known one, or has rows that nobody wrote, that is said.
    pub fn new(mut entries: Vec<Entry>, tables: Vec<Vec<Row>>) -> (Ledger, Vec<String>) {
        entries.sort_by_key(|entry| entry.txn);
        let mut starts = vec![0];
        for (n, entry) in entries.iter().enumerate() {
            assert_eq!(entry.txn as usize, n, "transactions are numbered without holes");
            starts.push(starts[n] + entry.sent.len());
        }
        let ids = vec![0; starts[entries.len()]];
        let mut ledger = Ledger { entries, starts, ids, ascending: Vec::new() };
        let mut complaints = Vec::new();
        for (database, rows) in tables.into_iter().enumerate() {
            rows.iter().for_each(|row| ledger.enter(database, row, &mut complaints));
        }
        ledger.settle(&mut complaints);
        (ledger, complaints)
    }

    fn enter(&mut self, database: usize, row: &Row, complaints: &mut Vec<String>) {
        let sent = self.entry(row.key.txn).filter(|entry| usize::from(entry.database) == database);
        let sent = sent.and_then(|entry| entry.sent.get(row.key.seq as usize));
        match sent {
            Some(sent) if sent.is_kept() && sent.channel() == row.channel => {
                let at = self.index(row.key);
                if self.ids[at] != 0 {
                    complaints.push(format!("the table of database {database} has {row:?} twice"));
                }
                self.ids[at] = row.id;
            }
            _ => complaints.push(format!("the table of database {database} has {row:?}, which nobody wrote")),
        }
    }

    fn settle(&mut self, complaints: &mut Vec<String>) {
        for entry in &mut self.entries {
            let ids = &self.ids[self.starts[entry.txn as usize]..self.starts[entry.txn as usize + 1]];
            let kept = entry.sent.iter().filter(|sent| sent.is_kept()).count();
            let found = ids.iter().filter(|id| **id != 0).count();
            if entry.outcome == Outcome::Unknown {
                entry.outcome = if found == 0 { Outcome::RolledBack } else { Outcome::Committed };
            }
            let expected = if entry.outcome == Outcome::Committed { kept } else { 0 };
            if found != expected {
                let (txn, how) = (entry.txn, entry.how);
                complaints
                    .push(format!("transaction {txn} ({how}) should have {expected} rows, the table has {found}"));
            }
            self.ascending.push(ids.iter().filter(|id| **id != 0).is_sorted());
        }
    }

    /// How many messages were sent, those taken back included.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// All transactions, by number.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// One transaction.
    pub fn entry(&self, txn: Txn) -> Option<&Entry> {
        self.entries.get(txn as usize)
    }

    /// A message's place among all.
    pub fn index(&self, key: Key) -> usize {
        self.starts[key.txn as usize] + key.seq as usize
    }

    /// A message's id in the table, 0 when it has none.
    pub fn id(&self, key: Key) -> i64 {
        self.ids[self.index(key)]
    }

    /// Whether the transaction used its ids in ascending order.
    pub fn is_ascending(&self, txn: Txn) -> bool {
        self.ascending[txn as usize]
    }

    /// The messages that a transaction committed.
    pub fn committed<'a>(&self, entry: &'a Entry) -> impl Iterator<Item = (Key, u8)> + use<'a> {
        let sent = if entry.outcome == Outcome::Committed { &entry.sent[..] } else { &[] };
        let keys = sent.iter().enumerate().filter(|(_, sent)| sent.is_kept());
        keys.map(|(seq, sent)| (Key { txn: entry.txn, seq: seq as u32 }, sent.channel()))
    }

    /// A message as it stands in a report.
    pub fn describe(&self, key: Key) -> String {
        let Some(entry) = self.entry(key.txn) else { return format!("{key:?}, of no transaction") };
        let (seq, of) = (key.seq, entry.sent.len());
        let Some(sent) = entry.sent.get(seq as usize) else { return format!("{key:?}, of no message") };
        format!(
            "id {} (message {seq} of {of} in transaction {}, channel {} of database {}{}; {}, {:?}; commit issued {}, \
             returned {}{})",
            self.id(key),
            key.txn,
            sent.channel(),
            entry.database,
            if sent.is_kept() { "" } else { ", taken back by a savepoint" },
            entry.how,
            entry.outcome,
            instant(entry.issued),
            instant(entry.returned),
            if sent.is_drawn_before() { "; id drawn in an earlier transaction" } else { "" },
        )
    }
}

/// An instant in seconds.
pub fn instant(at: u64) -> String {
    if at == NEVER { "never".to_owned() } else { format!("{:.6}", at as f64 / 1e9) }
}
