//! The network threads inside the gateway's process: they move bytes between sockets, links and the core's decisions.
//! They never call PostgreSQL; the main thread starts them and talks to them through [`bridge`].
//!
//! One reactor per thread, each with its own connections and its own [`crate::core::hub::Hub`]. Reactor 0 also owns the
//! doors: the TCP listeners and the links of the database workers ([`front`]). What comes in on a link is passed to all
//! reactors in the order of the link, which is what delivery rests on.

mod admin;
mod asked;
mod auth;
mod batch;
pub mod bridge;
mod connection;
pub mod counters;
mod deflate;
mod endpoints;
mod front;
mod handshake;
mod http;
mod link;
mod links;
mod listener;
mod odoo;
mod origin;
mod outbound;
mod reactor;
mod replays;
mod socket;
mod status;
mod survey;
#[cfg(feature = "testing")]
pub mod testing;
mod timers;
mod visitor;
mod websocket;

use crate::core::hub::Moment;
use crate::core::settings::{Database, Settings};
use counters::Counters;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use visitor::Handovers;

/// What a connection needs to know of the world, kept by its reactor and brought up to date once a turn.
struct Env {
    settings: Arc<Settings>,
    databases: Arc<Vec<Database>>,
    counters: Arc<Counters>,
    handovers: Arc<Handovers>,
    start: Instant,
    /// Milliseconds since the threads started.
    now: Moment,
    /// The time of day, in milliseconds since 1970.
    unix_ms: i64,
}

impl Env {
    fn new(settings: Arc<Settings>, databases: Arc<Vec<Database>>, counters: Arc<Counters>, start: Instant) -> Env {
        let handovers = Arc::default();
        let mut env = Env { settings, databases, counters, handovers, start, now: 0, unix_ms: 0 };
        env.tick();
        env
    }

    /// Reads the clocks.
    fn tick(&mut self) {
        self.now = self.elapsed();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.unix_ms = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
    }

    /// Milliseconds since the threads started, this very moment.
    fn elapsed(&self) -> Moment {
        millis(self.start.elapsed())
    }
}

/// A duration in milliseconds; durations come from settings and clocks, so the cap is never met.
fn millis(duration: Duration) -> Moment {
    Moment::try_from(duration.as_millis()).unwrap_or(Moment::MAX)
}
