//! What one dispatch of a database worker brought, shared by all reactors. Each frame is encoded once, by the first
//! reactor that has somebody to send it to, and not at all when nobody listens.

use super::asked;
use super::deflate::{self, Agreement};
use crate::core::notification::Notification;
use crate::core::protocol::{self, Frame};
use std::ops::Range;
use std::sync::OnceLock;

/// One dispatch.
pub struct Batch {
    /// OID of the database the link belongs to.
    pub database: u32,
    /// When the oldest of it was committed, in microseconds since 1970; 0 where nobody knows.
    pub committed: i64,
    notifications: Vec<Notification>,
    runs: Vec<(Range<usize>, Encoded)>,
}

/// A frame, and the same compressed where that is worth while; each made by whoever wants it first.
#[derive(Default)]
struct Encoded {
    frame: OnceLock<Frame>,
    twin: OnceLock<Option<Frame>>,
    /// For requests, see [`asked::entries`].
    entries: OnceLock<Frame>,
}

/// Notifications of one channel that share a frame.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub notifications: &'a [Notification],
    encoded: &'a Encoded,
}

impl Batch {
    /// Notifications of one database (its OID), in delivery order, the oldest committed then.
    pub fn new(database: u32, notifications: Vec<Notification>, committed: i64) -> Batch {
        let runs = protocol::runs(&notifications, true).into_iter().map(|run| (run, Encoded::default())).collect();
        Batch { database, committed, notifications, runs }
    }

    /// The runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = Run<'_>> {
        self.runs.iter().map(|(range, encoded)| {
            let notifications = self.notifications.get(range.clone()).unwrap_or_default();
            Run { notifications, encoded }
        })
    }
}

impl Run<'_> {
    /// The frame.
    pub fn frame(&self) -> &Frame {
        self.encoded.frame.get_or_init(|| protocol::notifications_frame(self.notifications))
    }

    /// The same for requests that wait, in the database of this name.
    pub fn entries(&self, database: &str) -> Frame {
        self.encoded.entries.get_or_init(|| asked::entries(self.notifications, database)).clone()
    }

    /// The frame for a client with which this was agreed: compressed where that is worth while and it can read it.
    pub fn frame_for(&self, agreement: Option<Agreement>) -> &Frame {
        let frame = self.frame();
        match agreement {
            Some(agreement) if agreement.takes(frame) => {
                self.encoded.twin.get_or_init(|| deflate::twin(frame)).as_ref().unwrap_or(frame)
            }
            _ => frame,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::channel::Channel;
    use std::sync::Arc;

    fn batch(text: &str) -> Batch {
        let message = format!("\"{text}\"").into();
        Batch::new(1, vec![Notification { id: 1, channel: Channel::plain("a").unwrap(), message }], 0)
    }

    fn agreement(offer: &str) -> Option<Agreement> {
        Agreement::accept([offer].into_iter())
    }

    #[test]
    fn a_frame_is_made_and_compressed_once_for_all() {
        let batch = batch(&"a long message, ".repeat(1000));
        let run = batch.runs().next().unwrap();
        let wide = agreement("permessage-deflate; server_max_window_bits=15");
        assert!(run.encoded.twin.get().is_none());
        assert!(Arc::ptr_eq(run.frame_for(None), run.frame()));
        assert!(run.encoded.twin.get().is_none(), "nobody has wanted it");
        let twin = run.frame_for(wide).clone();
        assert!(twin.len() < run.frame().len() / 10);
        let again = batch.runs().next().unwrap();
        assert!(Arc::ptr_eq(again.frame_for(agreement("permessage-deflate")), &twin));
        assert!(Arc::ptr_eq(again.frame_for(agreement("permessage-deflate; server_max_window_bits=9")), run.frame()));
    }

    #[test]
    fn a_short_frame_stays_as_it_is() {
        let batch = batch("short");
        let run = batch.runs().next().unwrap();
        assert!(Arc::ptr_eq(run.frame_for(agreement("permessage-deflate")), run.frame()));
    }
}
