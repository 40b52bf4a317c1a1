//! What one connection asks of its database: its recoveries, one after the other and a page at a time, each page only
//! when the peer has taken in what it was sent before. So what waits for a slow peer waits in the database, and however
//! many recoveries a hostile one asks for, one page is on its way. Pages of two recoveries never mix: to a client that
//! comes back with the last id of the one, the rest of the other would be lost. For the same reason what is sent live on
//! its other channels waits for their end. Knows no sockets and no links.

use crate::core::hub::Recovery;
use crate::core::protocol::Frame;
use std::collections::VecDeque;

/// A connection with less than this in its outbound queue, in bytes, is ready for a page. It is what a frame holds of
/// short messages (core::protocol): with less the socket would run dry while the worker reads the next page; more would
/// only wait in this process instead of in the table.
pub const DRAINED: usize = 64 * 1024;

/// What is asked of a database for a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Ask {
    /// The first page of a recovery.
    Recover(Recovery),
    /// The next page of this request.
    More(u64),
}

/// The recoveries of one connection that have pages to come.
#[derive(Debug, Default)]
pub struct Replays {
    /// To be asked, in this order.
    waiting: VecDeque<Ask>,
    /// Asked and unanswered.
    asked: Option<u64>,
    /// The page before added nothing to the queue: the next is asked for whatever waits there.
    was_empty: bool,
    /// Live frames that wait for the end of the recoveries, and their bytes.
    held: Vec<Frame>,
    held_bytes: usize,
}

/// More is sent live than may wait for the end of a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMuch;

impl Ask {
    fn request(&self) -> u64 {
        match self {
            Ask::Recover(recovery) => recovery.request,
            Ask::More(request) => *request,
        }
    }
}

impl Replays {
    /// A recovery is to be begun.
    pub fn begin(&mut self, recovery: Recovery) {
        self.waiting.push_back(Ask::Recover(recovery));
    }

    /// What is to be asked now, with so many bytes in the outbound queue.
    pub fn next(&mut self, queued: usize) -> Option<Ask> {
        if self.waiting.is_empty() || self.asked.is_some() || queued >= DRAINED && !self.was_empty {
            return None;
        }
        self.was_empty = false;
        let ask = self.waiting.pop_front()?;
        self.asked = Some(ask.request());
        Some(ask)
    }

    /// Whether there are pages to come.
    pub fn is_running(&self) -> bool {
        self.asked.is_some() || !self.waiting.is_empty()
    }

    /// Keeps a live frame until the recoveries have ended; at most so many bytes, but one of any size.
    ///
    /// # Errors
    /// They would be more: the client had better come back with the last id it has got.
    pub fn hold(&mut self, frame: Frame, limit: usize) -> Result<(), TooMuch> {
        if !self.held.is_empty() && self.held_bytes + frame.len() > limit {
            return Err(TooMuch);
        }
        self.held_bytes += frame.len();
        self.held.push(frame);
        Ok(())
    }

    /// The live frames that were kept, once the recoveries have ended.
    pub fn release(&mut self) -> Vec<Frame> {
        if self.is_running() {
            return Vec::new();
        }
        self.held_bytes = 0;
        std::mem::take(&mut self.held)
    }

    /// A page has come, perhaps one that was not asked for; `is_empty` when nothing of it went into the queue.
    pub fn answered(&mut self, request: u64, more: bool, is_empty: bool) {
        self.forget(&[request]);
        if !more {
            return;
        }
        self.was_empty = is_empty;
        self.waiting.push_front(Ask::More(request));
    }

    /// Nothing more is asked for these requests, which ascend.
    pub fn forget(&mut self, requests: &[u64]) {
        let is_kept = |request: u64| requests.binary_search(&request).is_err();
        self.asked = self.asked.filter(|asked| is_kept(*asked));
        self.waiting.retain(|ask| is_kept(ask.request()));
        if self.waiting.is_empty() {
            // Most connections have no further recovery.
            self.waiting = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recovery(request: u64) -> Recovery {
        Recovery { request, channels: Vec::new(), last: 0 }
    }

    #[test]
    fn one_page_at_a_time_is_asked_for_and_only_with_room_for_it() {
        let mut replays = Replays::default();
        assert_eq!(replays.next(0), None);
        replays.begin(recovery(1));
        replays.begin(recovery(2));
        assert_eq!(replays.next(DRAINED), None);
        assert_eq!(replays.next(DRAINED - 1), Some(Ask::Recover(recovery(1))));
        assert_eq!(replays.next(0), None, "one is unanswered");
        replays.answered(1, true, false);
        assert_eq!(replays.next(DRAINED), None);
        assert_eq!(replays.next(0), Some(Ask::More(1)), "the first is brought to its end");
        replays.answered(1, false, false);
        assert_eq!(replays.next(0), Some(Ask::Recover(recovery(2))));
        replays.answered(2, false, false);
        assert_eq!(replays.next(0), None);
    }

    #[test]
    fn an_empty_page_is_followed_by_the_next_at_once() {
        let mut replays = Replays::default();
        replays.begin(recovery(1));
        replays.begin(recovery(2));
        replays.next(0);
        replays.answered(1, true, true);
        assert_eq!(replays.next(DRAINED), Some(Ask::More(1)));
        replays.answered(1, true, false);
        assert_eq!(replays.next(DRAINED), None);
    }

    #[test]
    fn pages_not_asked_for_ask_for_no_more_than_one() {
        let mut replays = Replays::default();
        replays.begin(recovery(1));
        replays.next(0);
        replays.answered(1, true, false);
        replays.answered(1, true, false);
        assert_eq!(replays.next(0), Some(Ask::More(1)));
        assert_eq!(replays.next(0), None);
        replays.answered(1, false, false);
        assert_eq!((replays.next(0), replays.asked), (None, None));
    }

    #[test]
    fn live_frames_wait_for_the_end_and_are_bounded() {
        let frame = |text: &str| Frame::from(text.as_bytes());
        let mut replays = Replays::default();
        replays.begin(recovery(1));
        assert!(replays.is_running());
        assert_eq!(replays.hold(frame("a giant"), 3), Ok(()));
        assert_eq!(replays.hold(frame("b"), 3), Err(TooMuch));
        replays.next(0);
        replays.answered(1, true, false);
        assert!(replays.release().is_empty());
        replays.next(0);
        replays.answered(1, false, false);
        assert_eq!(replays.release(), [frame("a giant")]);
        assert!(!replays.is_running() && replays.release().is_empty());
    }

    #[test]
    fn what_is_forgotten_keeps_nothing_waiting() {
        let mut replays = Replays::default();
        (1..=3).for_each(|request| replays.begin(recovery(request)));
        replays.next(0);
        replays.forget(&[1, 2]);
        assert_eq!(replays.next(0), Some(Ask::Recover(recovery(3))));
    }
}
