//! What the network threads count, for the views, `/metrics` and the live page. Cumulative since the gateway started, but
//! for the two `_open` ones; read at any time by anybody.

use super::http::Response;
use crate::core::protocol::CloseCode;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a client was turned away, or an open connection ended by the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Rejection {
    /// No valid proof of who it is: 401, 4401.
    Unauthorized,
    /// A channel, or a page, that it may not have: 403, 4403.
    Forbidden,
    /// Its page is of another site: 403.
    Origin,
    /// Its websocket worker is too old: 1000, OUTDATED_VERSION.
    Version,
    /// Over `imbus.max_connections`: 503.
    TooManyConnections,
    /// Its database cannot be asked for now: 503, 1013.
    TryLater,
    /// Not HTTP as it should be: 400 and other 4xx.
    BadRequest,
    /// More than 8 KiB of headers: 431.
    HeadTooLong,
    /// More than 1 MiB of body: 413.
    BodyTooLong,
    /// The request took too long: 408.
    Timeout,
    /// Over the rate limit: 1013.
    Rate,
    /// A message over 1 MiB, or too many channels: 1009.
    TooBig,
    /// A text that is no UTF-8: 1007.
    BadText,
    /// Against RFC 6455: 1002.
    Protocol,
    /// Reads too slowly: 1013.
    Slow,
    /// Ended by `imbus_disconnect`: 1013.
    Disconnected,
}

/// All of them with their names in `/metrics`, in order.
pub const REJECTIONS: [(Rejection, &str); 16] = [
    (Rejection::Unauthorized, "unauthorized"),
    (Rejection::Forbidden, "forbidden"),
    (Rejection::Origin, "origin"),
    (Rejection::Version, "version"),
    (Rejection::TooManyConnections, "too_many_connections"),
    (Rejection::TryLater, "try_later"),
    (Rejection::BadRequest, "bad_request"),
    (Rejection::HeadTooLong, "head_too_long"),
    (Rejection::BodyTooLong, "body_too_long"),
    (Rejection::Timeout, "timeout"),
    (Rejection::Rate, "rate"),
    (Rejection::TooBig, "too_big"),
    (Rejection::BadText, "bad_text"),
    (Rejection::Protocol, "protocol"),
    (Rejection::Slow, "slow"),
    (Rejection::Disconnected, "disconnected"),
];

/// Upper bounds of the histogram of latencies, in microseconds; one more bucket has no bound.
pub const LATENCIES: [u64; 16] = [
    250, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 20_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 10_000_000,
];

/// All counters of the gateway's network side.
#[derive(Debug, Default)]
pub struct Counters {
    /// TCP connections open now, whatever they speak; what `imbus.max_connections` limits.
    pub sockets_open: AtomicU64,
    /// Websockets open now.
    pub connections_open: AtomicU64,
    /// Websockets opened.
    pub connections_total: AtomicU64,
    /// Requests for a websocket that were refused, by an HTTP error or by a close right after the upgrade.
    pub handshakes_rejected: AtomicU64,
    /// HTTP requests answered, upgrades included.
    pub requests: AtomicU64,
    /// Data messages received from clients.
    pub messages_received: AtomicU64,
    /// Bytes read from clients.
    pub bytes_received: AtomicU64,
    /// Notifications sent, counted once per receiver.
    pub notifications_sent: AtomicU64,
    /// Frames with notifications sent, counted once per receiver.
    pub frames_sent: AtomicU64,
    /// Bytes written to clients.
    pub bytes_sent: AtomicU64,
    /// Connections closed because they read too slowly.
    pub slow_consumers: AtomicU64,
    /// Open websockets closed for what the client did or was not allowed to: 1002, 1007, 1009, 1013 for its rate, 4401,
    /// 4403.
    pub closed_by_policy: AtomicU64,
    /// Subscriptions that had to be recovered.
    pub recoveries: AtomicU64,
    /// Calls made to Odoo.
    pub odoo_calls: AtomicU64,
    /// Jobs that Odoo was called for.
    pub odoo_jobs: AtomicU64,
    /// Calls of Odoo that wait in the line now.
    pub odoo_waiting: AtomicU64,
    /// Sessions of Odoo's with an open websocket now.
    pub odoo_sessions: AtomicU64,
    /// Calls of Odoo that had no answer.
    pub odoo_failures: AtomicU64,
    /// Clients turned away, by [`Rejection`].
    rejected: [AtomicU64; REJECTIONS.len()],
    /// Notifications sent, by the time from their commit until they were handed to the kernel.
    latencies: [AtomicU64; LATENCIES.len() + 1],
    /// The sum of these times, in microseconds.
    latency: AtomicU64,
}

impl Counters {
    /// Adds to one of the counters.
    pub(super) fn add(counter: &AtomicU64, number: usize) {
        counter.fetch_add(number as u64, Ordering::Relaxed);
    }

    /// Takes one off an `_open` counter.
    pub(super) fn less(counter: &AtomicU64) {
        counter.fetch_sub(1, Ordering::Relaxed);
    }

    /// A client was turned away.
    pub(super) fn reject(&self, why: Rejection) {
        if let Some(counter) = self.rejected.get(why as usize) {
            Counters::add(counter, 1);
        }
    }

    /// A request was answered like this.
    pub(super) fn answered(&self, response: &Response) {
        Counters::add(&self.requests, 1);
        if response.status >= 400 {
            self.reject(response.rejection.unwrap_or_else(|| Rejection::of_status(response.status)));
        }
    }

    /// How many clients were turned away for this.
    pub fn rejected(&self, why: Rejection) -> u64 {
        self.rejected.get(why as usize).map_or(0, |counter| counter.load(Ordering::Relaxed))
    }

    /// So many notifications were handed to the kernel this long after their commit.
    pub(super) fn took(&self, microseconds: u64, count: usize) {
        let at = LATENCIES.partition_point(|bound| *bound < microseconds);
        if let Some(bucket) = self.latencies.get(at) {
            Counters::add(bucket, count);
            Counters::add(&self.latency, (microseconds as usize).saturating_mul(count));
        }
    }

    /// The histogram of latencies: how many there were up to each bound of [`LATENCIES`] and in all, and the sum in
    /// microseconds.
    pub fn latencies(&self) -> (Vec<u64>, u64) {
        let mut total = 0;
        let counts = self.latencies.iter().map(|bucket| {
            total += bucket.load(Ordering::Relaxed);
            total
        });
        (counts.collect(), self.latency.load(Ordering::Relaxed))
    }
}

impl Rejection {
    /// What an answer with this status stands for.
    fn of_status(status: u16) -> Rejection {
        match status {
            401 => Rejection::Unauthorized,
            403 => Rejection::Forbidden,
            408 => Rejection::Timeout,
            413 => Rejection::BodyTooLong,
            431 => Rejection::HeadTooLong,
            503 => Rejection::TryLater,
            _ => Rejection::BadRequest,
        }
    }

    /// What a close with this code stands for, if it turns somebody away.
    pub(super) fn of_close(code: CloseCode) -> Option<Rejection> {
        match code {
            CloseCode::Unauthorized | CloseCode::SessionExpired => Some(Rejection::Unauthorized),
            CloseCode::Forbidden => Some(Rejection::Forbidden),
            CloseCode::Normal => Some(Rejection::Version),
            CloseCode::TryLater => Some(Rejection::TryLater),
            CloseCode::TooBig => Some(Rejection::TooBig),
            CloseCode::BadText => Some(Rejection::BadText),
            CloseCode::Protocol => Some(Rejection::Protocol),
            CloseCode::GoingAway | CloseCode::Restart | CloseCode::KeepAlive => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rejection_has_its_counter_and_name() {
        let counters = Counters::default();
        for (at, (why, _)) in REJECTIONS.iter().enumerate() {
            assert_eq!(*why as usize, at);
            counters.reject(*why);
            assert_eq!(counters.rejected(*why), 1);
        }
    }

    #[test]
    fn latencies_add_up() {
        let counters = Counters::default();
        for (microseconds, count) in [(0, 1), (250, 1), (251, 2), (10_000_001, 4)] {
            counters.took(microseconds, count);
        }
        let (counts, sum) = counters.latencies();
        assert_eq!((counts[0], counts[1], counts[15], counts[16]), (2, 4, 4, 8));
        assert_eq!(sum, 250 + 2 * 251 + 4 * 10_000_001);
    }
}
