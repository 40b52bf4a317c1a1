//! What one client saw, in the order in which it came.

use super::ledger::{Key, NEVER};

/// A message that came: 24 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Receipt {
    pub id: i64,
    pub key: Key,
    /// When, in milliseconds.
    pub at: u32,
}

/// One connection of a client.
#[derive(Clone, Debug)]
pub struct Visit {
    /// Its first receipt.
    pub first: usize,
    /// What it said it had.
    pub last: i64,
    /// Whether that was the greatest id it had ever received.
    pub last_was_greatest: bool,
    /// By then its subscription stood and its first frame, if any, had come: what is committed later comes live.
    pub live_from: u64,
}

/// All that one client saw.
pub struct Story {
    pub name: String,
    pub database: u8,
    /// The channels it is subscribed to, by number.
    pub channels: Vec<u8>,
    /// What is committed from here on is owed to it: its first subscription was known to stand.
    pub owed_from: u64,
    pub visits: Vec<Visit>,
    pub receipts: Vec<Receipt>,
    /// What was wrong in itself: a frame whose ids descend, a message nobody sent, the last markers missing.
    pub complaints: Vec<String>,
}

impl Story {
    /// A client that has seen nothing yet.
    pub fn new(name: String, database: u8, channels: Vec<u8>) -> Story {
        let (visits, receipts, complaints) = (Vec::new(), Vec::new(), Vec::new());
        Story { name, database, channels, owed_from: NEVER, visits, receipts, complaints }
    }

    /// The receipts of each connection, and where they begin.
    pub fn by_visit(&self) -> impl Iterator<Item = (&Visit, usize, &[Receipt])> {
        let ends = self.visits.iter().skip(1).map(|visit| visit.first).chain([self.receipts.len()]);
        self.visits.iter().zip(ends).map(|(visit, end)| (visit, visit.first, &self.receipts[visit.first..end]))
    }

    /// What came around a receipt, for reports.
    pub fn around(&self, at: usize) -> String {
        let from = at.saturating_sub(4);
        let seen = self.receipts.iter().enumerate().skip(from).take(9);
        let words = seen.map(|(n, receipt)| {
            let (mark, visit) = (if n == at { ">" } else { "" }, if self.begins(n) { "| " } else { "" });
            format!("{visit}{mark}{}={}.{}@{}ms", receipt.id, receipt.key.txn, receipt.key.seq, receipt.at)
        });
        words.collect::<Vec<_>>().join(" ")
    }

    fn begins(&self, at: usize) -> bool {
        self.visits.binary_search_by_key(&at, |visit| visit.first).is_ok()
    }
}
