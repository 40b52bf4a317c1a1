//! The tables in which jobs wait and run, kept small: part of the database worker. `core::rotation` decides, `jobs::rotation`
//! does it; here is when, and by how much at a time.

use super::jobs::{self, Position};
use super::report::Outcome;
use super::shared::DatabaseSlot;
use super::transaction::{self, Failure};
use super::worker;
use crate::core::rotation::{Done, Measure, Rotation, Step};
use std::time::{Duration, Instant};

/// How often it is looked how full the table is that fills, at most.
const LOOK: Duration = Duration::from_millis(100);
/// What moving jobs leaves to others, in times of what it took.
const SPARING: u32 = 4;

/// The tables of one database.
pub struct Turns {
    rotation: Option<Rotation>,
    /// Where to go on in each.
    after: Vec<Option<Position>>,
    next: Instant,
}

impl Turns {
    /// Nothing is known of them yet.
    pub fn new() -> Turns {
        Turns { rotation: None, after: Vec::new(), next: Instant::now() }
    }

    /// Does what is to be done now; when to go on, None where nothing is on its way.
    pub fn go_on(&mut self, slot: &DatabaseSlot) -> Option<Instant> {
        let began = Instant::now();
        if began >= self.next {
            self.next = began + LOOK;
            if let Err(failure) = self.take_steps(slot) {
                pgrx::warning!("imbus could not clear away what jobs have left: {failure}");
                self.next = began + LOOK * 50;
            }
            self.next = self.next.max(Instant::now() + began.elapsed() * SPARING);
        }
        Some(self.rotation.as_ref()?.next()?.max(self.next))
    }

    fn take_steps(&mut self, slot: &DatabaseSlot) -> Result<(), Failure> {
        let filling = slot.filling();
        let (count, size) = transaction::run(|| Ok((jobs::tables()?, jobs::size(filling)?)))?;
        let new = || Rotation::new(count, filling, Instant::now());
        let rotation = self.rotation.get_or_insert_with(new);
        self.after.resize(count, None);
        let ended = slot.ended();
        if rotation.notice(size, ended) {
            let (live, jobs) = transaction::run(|| jobs::live(filling))?;
            let next = rotation.look(Measure { size, live, jobs, ended }, Instant::now());
            next.into_iter().for_each(|table| slot.set_filling(table));
        }
        for step in rotation.steps(Instant::now()) {
            let done = match step {
                Step::Move { table, is_due } => move_out(table, is_due, self.after.get_mut(table), slot)?,
                Step::Truncate(table, since) => {
                    let since = worker::now() - i64::try_from(since.elapsed().as_micros()).unwrap_or(i64::MAX);
                    match transaction::run(|| jobs::is_looked_into(since))? {
                        true => Done::TooSoon,
                        false => {
                            let done = without_waiting(|| jobs::truncate(table))?.unwrap_or(Done::Nothing);
                            transaction::report_statistics();
                            done
                        }
                    }
                }
            };
            rotation.record(step, done, Instant::now());
        }
        Ok(())
    }
}

fn move_out(
    table: usize,
    is_due: bool,
    after: Option<&mut Option<Position>>,
    slot: &DatabaseSlot,
) -> Result<Done, Failure> {
    let Some(after) = after else { return Ok(Done::All) };
    if !is_due {
        // What lies before it is dead.
        *after = transaction::run(|| jobs::first(table, *after))?;
        if after.is_some() {
            return Ok(Done::TooSoon);
        }
    } else if after.is_none()
        && !transaction::run(|| jobs::has_any_to_move(table))?
        && !transaction::run(|| is_empty(table))?
    {
        // Without a lock: others need not wait for what Odoo, or a runner outside, works on there.
        return Ok(Done::Nothing);
    }
    let from = *after;
    let Some((done, next)) = without_waiting(|| jobs::empty_out(table, from))? else { return Ok(Done::Nothing) };
    *after = next;
    // Whoever has just looked may have passed them.
    slot.add_news();
    Ok(done)
}

fn is_empty(table: usize) -> Outcome<bool> {
    Ok(jobs::first(table, None)?.is_none())
}

/// SQLSTATE lock_not_available.
const LOCKED: &str = "55P03";

/// Runs work in a transaction; None where somebody has locked the table.
fn without_waiting<T>(work: impl FnOnce() -> Outcome<T>) -> Result<Option<T>, Failure> {
    match transaction::run(work) {
        Ok(value) => Ok(Some(value)),
        Err(failure) if failure.code == LOCKED => Ok(None),
        Err(failure) => Err(failure),
    }
}
