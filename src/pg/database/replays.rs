//! Answers to clients that come back, page by page, each when the gateway asks for it.

use super::Database;
use super::adoption::CHANGED;
use super::reading::notification;
use crate::core::channel::Channel;
use crate::core::link::Event;
use crate::core::notification::Notification;
use crate::core::replay::{PAGE, Replay, Step};
use crate::pg::bus::{RawRow, Scope};
use crate::pg::transaction::{self, Failure};
use crate::pg::worker;
use std::collections::{HashSet, VecDeque};
use std::sync::atomic::Ordering;

/// Bytes of messages in one page; the rows of one step may go over it. A page waits in the gateway for a client that may
/// never read it, so it is no longer than it takes to keep a socket busy until the next one.
const PAGE_BYTES: usize = 256 * 1024;
/// Bytes of messages in one message of the link (core::link::FRAME_MAX, with ample room for one more row).
const PART: usize = 1 << 28;
/// Rows read in the first step, whatever their length. Later ones read more or less, by how long the messages were, and no
/// more than fit in a page.
const FIRST_ROWS: usize = 4;
/// Steps made for one page, however little they find: others are waiting, and so is what is committed meanwhile.
const STEPS: usize = 4;

/// An answer under way.
pub struct Answer {
    channels: HashSet<Channel>,
    replay: Replay,
    /// The last id the client was sent, at first the one it said.
    last: i64,
    /// Rows that the journal has named and that are not read yet.
    named: VecDeque<i64>,
    /// Rows to read in the next step.
    rows: usize,
}

impl Answer {
    /// The journal's first entry that it may still need.
    pub fn needs(&self) -> u64 {
        self.replay.needs()
    }

    /// What a step has read says how much the next one should.
    fn learn(&mut self, rows: &[RawRow]) {
        let bytes: usize = rows.iter().map(|row| row.message.as_ref().map_or(0, String::len)).sum();
        if bytes > PAGE_BYTES / 2 {
            self.rows = (self.rows / 2).max(1);
        } else if bytes < PAGE_BYTES / 8 {
            self.rows = (self.rows * 4).min(PAGE);
        }
    }
}

impl Database {
    /// Begins an answer. Rows not dispatched yet come to the client as to everybody.
    pub(super) fn recover(&mut self, request: u64, channels: Vec<Channel>, last: i64) {
        self.dispatch();
        self.bring_over();
        // Without a position there is nothing to answer by: break the link, the gateway asks again.
        let Some(replay) = self.plan(&channels, last) else { return self.hang_up() };
        let (channels, named) = (channels.into_iter().collect(), VecDeque::new());
        self.replays.insert(request, Answer { channels, replay, last, named, rows: FIRST_ROWS });
        self.go_on(request);
    }

    fn plan<'a>(&self, channels: impl IntoIterator<Item = &'a Channel>, last: i64) -> Option<Replay> {
        let tracker = self.tracker.as_ref()?;
        let fingerprints = channels.into_iter().map(Channel::fingerprint).collect();
        Some(Replay::new(tracker, &self.history, last, fingerprints, worker::now()))
    }

    /// Sends the next page of an answer.
    pub(super) fn go_on(&mut self, request: u64) {
        if self.slot.wake.swap(false, Ordering::AcqRel) {
            self.dispatch();
        }
        let Some(mut answer) = self.replays.remove(&request) else { return };
        worker::report_activity(Some("replaying notifications"));
        match self.page(&mut answer) {
            Ok((notifications, more)) => {
                if more {
                    self.replays.insert(request, answer);
                }
                self.send_page(request, notifications, more);
            }
            Err(failure) if failure.message == CHANGED && self.follow().is_ok() => self.hang_up(),
            Err(failure) => {
                pgrx::warning!("imbus could not replay the bus of database \"{}\": {failure}", self.name);
                // The client is better served by a new attempt than by a silent hole: break the link, ask again.
                self.hang_up();
            }
        }
    }

    /// Sends a page; one of giants in parts, as a message of the link has its limit. Only those: the gateway takes each
    /// part for an answer, and may ask for a next page after each.
    fn send_page(&mut self, request: u64, notifications: Vec<Notification>, more: bool) {
        let (mut part, mut bytes) = (Vec::new(), 0);
        for notification in notifications {
            if bytes >= PART {
                bytes = 0;
                let notifications = std::mem::take(&mut part);
                self.send(&Event::Recovered { request, notifications, more: true });
            }
            bytes += notification.message.len();
            part.push(notification);
        }
        self.send(&Event::Recovered { request, notifications: part, more });
    }

    /// The next page, and whether there is more to come.
    fn page(&self, answer: &mut Answer) -> Result<(Vec<Notification>, bool), Failure> {
        let (mut found, mut bytes) = (Vec::new(), 0);
        for _ in 0..STEPS {
            let Some(rows) = self.next_rows(answer)? else { return Ok((found, false)) };
            for row in rows {
                let Some(bus) = &self.bus else { continue };
                let Ok(notification) = notification(row, bus) else { continue };
                if answer.channels.contains(&notification.channel) {
                    bytes += notification.message.len();
                    answer.last = notification.id;
                    found.push(notification);
                }
            }
            if found.len() >= PAGE || bytes >= PAGE_BYTES {
                break;
            }
        }
        Ok((found, true))
    }

    /// The rows of one step; None at the end.
    fn next_rows(&self, answer: &mut Answer) -> Result<Option<Vec<RawRow>>, Failure> {
        let Some(tracker) = &self.tracker else { return Ok(None) };
        let scope = if answer.replay.recent { Scope::Recent } else { Scope::All };
        if !answer.named.is_empty() {
            return self.named_rows(answer, scope).map(Some);
        }
        match answer.replay.next(tracker) {
            Step::Done => Ok(None),
            Step::Lost => {
                if let Some(replay) = self.plan(&answer.channels, answer.last) {
                    answer.replay = replay;
                }
                Ok(Some(Vec::new()))
            }
            Step::Among(ids) => {
                answer.named = ids.into();
                self.named_rows(answer, scope).map(Some)
            }
            Step::Within(ranges) => {
                let mut rows = transaction::run(|| self.same_table()?.within(&ranges, scope))?;
                answer.learn(&rows);
                rows.retain(|row| answer.replay.owes_from_table(tracker, row.id));
                answer.replay.scanned(tracker, None);
                Ok(Some(rows))
            }
            Step::Above(id) => {
                let mut limit = answer.rows;
                let mut rows = transaction::run(|| {
                    let bus = self.same_table()?;
                    if limit > FIRST_ROWS {
                        limit = bus.fitting_above(id, limit as i64, PAGE_BYTES, scope)?.unwrap_or(limit);
                    }
                    bus.above(id, limit as i64, scope)
                })?;
                let end = rows.last().map(|row| row.id).filter(|_| rows.len() == limit);
                answer.learn(&rows);
                rows.retain(|row| answer.replay.owes_from_table(tracker, row.id));
                answer.replay.scanned(tracker, end);
                Ok(Some(rows))
            }
        }
    }

    /// The next of the rows that the journal has named.
    fn named_rows(&self, answer: &mut Answer, scope: Scope) -> Result<Vec<RawRow>, Failure> {
        let count = answer.rows.min(answer.named.len());
        if count == 0 {
            return Ok(Vec::new());
        }
        let ids: Vec<i64> = answer.named.iter().take(count).copied().collect();
        let (count, rows) = transaction::run(|| {
            let bus = self.same_table()?;
            let fitting = if count > FIRST_ROWS { bus.fitting(&ids, PAGE_BYTES)? } else { None };
            let count = fitting.unwrap_or(count);
            Ok((count, bus.among(ids.get(..count).unwrap_or_default(), scope)?))
        })?;
        answer.named.drain(..count);
        answer.learn(&rows);
        Ok(rows)
    }
}
