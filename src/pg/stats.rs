//! What the views `imbus_stat_*` read. Live state: without the workers they say 55000.

use super::datum::Text;
use super::report::{Outcome, not_preloaded};
use super::shared::{self, DatabaseState, Shared};
use super::worker;
use crate::core::link::{Command, Decoder, Event, SOCKET_PATH, VERSION, encode};
use pgrx::datum::TimestampWithTimeZone;
use pgrx::iter::TableIterator;
use pgrx::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long the gateway may take to list its connections.
const PATIENCE: Duration = Duration::from_secs(2);

fn live(what: &str) -> Outcome<&'static Shared> {
    shared::get().ok_or_else(|| not_preloaded(what))
}

fn count(counter: &AtomicU64) -> i64 {
    i64::try_from(counter.load(Ordering::Relaxed)).unwrap_or(i64::MAX)
}

/// `imbus_gateway_state()`: one row, see view `imbus_stat_gateway`.
#[pg_extern]
#[allow(clippy::type_complexity)]
fn imbus_gateway_state() -> Outcome<
    TableIterator<
        'static,
        (
            name!(pid, Option<i32>),
            name!(port, Option<i32>),
            name!(started_at, Option<TimestampWithTimeZone>),
            name!(databases, i64),
            name!(databases_waiting, i64),
            name!(connections, i64),
            name!(connections_total, i64),
            name!(rejected, i64),
            name!(messages_received, i64),
            name!(notifications_sent, i64),
            name!(bytes_sent, i64),
            name!(slow_consumers, i64),
        ),
    >,
> {
    let shared = live("imbus_stat_gateway")?;
    let pid = Some(shared.gateway.pid()).filter(|pid| *pid != 0);
    let port = i32::try_from(shared.port.load(Ordering::Acquire)).ok().filter(|port| *port != 0);
    let started = Some(shared.started.load(Ordering::Acquire)).filter(|at| *at != 0 && pid.is_some());
    let served = shared.databases().filter(|slot| slot.state() == DatabaseState::Running).count();
    let counters = &shared.counters;
    Ok(TableIterator::once((
        pid,
        port,
        started.and_then(|at| TimestampWithTimeZone::try_from(at).ok()),
        i64::try_from(served).unwrap_or(0),
        count(&shared.starved),
        count(&counters.connections_open),
        count(&counters.connections_total),
        count(&counters.handshakes_rejected),
        count(&counters.messages_received),
        count(&counters.notifications_sent),
        count(&counters.bytes_sent),
        count(&counters.slow_consumers),
    )))
}

/// `imbus_bus_state()`: one row a served database (of the current one alone for others than pg_monitor), see view
/// `imbus_stat_bus`.
#[pg_extern]
#[allow(clippy::type_complexity)]
fn imbus_bus_state() -> Outcome<
    TableIterator<
        'static,
        (
            name!(datid, pg_sys::Oid),
            name!(pid, Option<i32>),
            name!(position, i64),
            name!(gaps, i64),
            name!(dispatched, i64),
            name!(skipped, i64),
            name!(notify_splits, i64),
        ),
    >,
> {
    let shared = live("imbus_stat_bus")?;
    let (own, all) = (worker::database_oid(), worker::is_monitor());
    let rows: Vec<_> = shared
        .databases()
        .filter(|slot| (all || slot.oid() == own) && slot.state() != DatabaseState::Absent)
        .map(|slot| {
            (
                pg_sys::Oid::from(slot.oid()),
                Some(slot.process.pid()).filter(|pid| *pid != 0),
                slot.position.load(Ordering::Relaxed),
                count(&slot.gaps),
                count(&slot.dispatched),
                count(&slot.skipped),
                count(&shared.notify_splits),
            )
        })
        .collect();
    Ok(TableIterator::new(rows))
}

/// `imbus_connections()`: one row a client connection of the current database (of all for pg_monitor), see view
/// `imbus_stat_connections`. Asks the gateway; no row while it is away.
#[pg_extern]
#[allow(clippy::type_complexity)]
fn imbus_connections() -> Outcome<
    TableIterator<
        'static,
        (
            name!(id, i64),
            name!(datid, pg_sys::Oid),
            name!(address, String),
            name!(user_agent, String),
            name!(subject, Option<String>),
            name!(channels, i64),
            name!(sent, i64),
            name!(queued, i64),
            name!(age_ms, i64),
        ),
    >,
> {
    live("imbus_stat_connections")?;
    let database = (!worker::is_monitor()).then(worker::database_oid);
    let list = match ask(&Event::Inspect { version: VERSION, database }) {
        Some(Command::Connections(list)) => list,
        _ => Vec::new(),
    };
    Ok(TableIterator::new(list.into_iter().map(|connection| {
        (
            connection.id,
            pg_sys::Oid::from(connection.database),
            connection.address,
            connection.user_agent,
            connection.subject,
            connection.channels,
            connection.sent,
            connection.queued,
            connection.age_ms,
        )
    })))
}

/// `imbus_disconnect(id, reason)`: ends a connection of the current database (of any for pg_signal_backend) with close
/// code 1013, so that its client comes back later. Whether it was there; NULL when the gateway does not answer.
/// Errors: 55000 without shared_preload_libraries.
#[pg_extern]
fn imbus_disconnect(id: Option<i64>, reason: default!(Option<Text>, "NULL")) -> Outcome<Option<bool>> {
    live("imbus_disconnect()")?;
    let Some(id) = id else { return Ok(None) };
    let database = (!worker::may_signal()).then(worker::database_oid);
    let reason = reason.map_or_else(|| "disconnected by the administrator".to_owned(), |text| text.0);
    let event = Event::Disconnect { version: VERSION, database, id, reason };
    Ok(match ask(&event) {
        Some(Command::Disconnected(found)) => Some(found),
        _ => None,
    })
}

/// Asks the gateway over a link of its own.
fn ask(question: &Event) -> Option<Command> {
    let mut stream = UnixStream::connect(SOCKET_PATH).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(&encode(question)?).ok()?;
    let mut decoder = Decoder::default();
    let mut chunk = [0; 16 << 10];
    loop {
        if let Some(answer) = decoder.next().ok()? {
            return Some(answer);
        }
        match stream.read(&mut chunk).ok()? {
            0 => return None,
            n => decoder.feed(chunk.get(..n)?),
        }
    }
}
