//! The tables in which jobs wait and run, by turns. Each job leaves dead rows in its table, which PostgreSQL keeps as long as
//! the oldest transaction anywhere may see them. So one table fills; when most of it is dead, the next one does, what lives
//! in the first ends or is moved out, and the whole is truncated, dead rows and all (as PgQ does with its event tables).
//! Knows no table and no clock.

use std::time::{Duration, Instant};

/// A table of this size in bytes is left alone: to change tables costs more than its dead rows do.
const SIZE_MIN: u64 = 16 << 20;
/// Of the jobs that live in a table so many have ended when it is looked at again, at least.
const LEAST: f64 = 0.25;
/// How long what waits in a table that is left is given to be run there, before it is moved.
const GRACE: Duration = Duration::from_secs(3);
/// How soon a table is tried again that somebody has locked, or that has a job in it whose runner must find it there; twice as
/// late each time, up to so many times: each try holds others up.
const AGAIN: (Duration, u32) = (Duration::from_secs(1), 5);
/// The same for one that is about to be empty, or that some transaction may still look into that began before it was.
const SOON: Duration = Duration::from_millis(200);

/// Where a table stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Fills, or could.
    Ready,
    /// Since then no new job comes into it.
    Leaving(Instant),
    /// Nothing lives in it since then.
    Empty(Instant),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Move jobs that live in this table out of it; or only, at first, see whether there are any.
    Move { table: usize, is_due: bool },
    /// Truncate this table, which is empty since then.
    Truncate(usize, Instant),
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Some were moved, more may be left.
    Some,
    /// Nothing lives in the table, or no dead row is left there.
    All,
    /// Nothing could be done: somebody has locked the table, or a runner needs its job where it is.
    Nothing,
    /// Some job is left to end there, or some transaction may still look into it.
    TooSoon,
}

/// All tables of one database.
#[derive(Debug)]
pub struct Rotation {
    /// With when each is to be looked at next.
    tables: Vec<(Phase, Instant)>,
    filling: usize,
    /// How often nothing could be done with each, since something could.
    failures: Vec<u32>,
    /// At this size of the table that fills it is to be seen how much of it lives; or when so many jobs have ended.
    threshold: u64,
    ends: u64,
    /// Its size when that was last seen.
    looked_at: u64,
}

/// How full a table is.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    /// In bytes: of the whole, and of the jobs that live in it.
    pub size: u64,
    pub live: u64,
    /// How many these are.
    pub jobs: u64,
    /// How many jobs of the database have ended before, counted from whenever.
    pub ended: u64,
}

impl Rotation {
    /// Of so many tables, of which nothing is known but which one fills.
    pub fn new(count: usize, filling: usize, now: Instant) -> Rotation {
        let phase = |table| if table == filling { Phase::Ready } else { Phase::Leaving(now) };
        let tables = (0..count).map(|table| (phase(table), now)).collect();
        Rotation { tables, filling, failures: vec![0; count], threshold: SIZE_MIN, ends: u64::MAX, looked_at: 0 }
    }

    /// The table that fills is of this size in bytes, and so many jobs have ended: whether it is to be seen how much of it lives.
    pub fn notice(&mut self, size: u64, ended: u64) -> bool {
        if size < self.looked_at / 2 {
            // Somebody has truncated it: what lived in it then is no measure any more.
            self.forget();
        }
        (size >= self.threshold || ended >= self.ends) && self.ready().is_some()
    }

    /// Nothing is known of the table that fills.
    fn forget(&mut self) {
        (self.threshold, self.ends, self.looked_at) = (SIZE_MIN, u64::MAX, 0);
    }

    /// A table that could fill instead.
    fn ready(&self) -> Option<usize> {
        let is_ready =
            |(table, (phase, _)): (usize, &(Phase, Instant))| table != self.filling && *phase == Phase::Ready;
        self.tables.iter().enumerate().position(is_ready)
    }

    /// So full is the table that fills. Which one is to fill from now on, if another.
    pub fn look(&mut self, measure: Measure, now: Instant) -> Option<usize> {
        let next = self.ready()?;
        let Measure { size, live, jobs, ended } = measure;
        self.looked_at = size;
        if live > size / 2 {
            // Not before as much is dead as lives: whatever lives may have to be moved. So many must have ended by then; but each
            // look reads them all.
            self.threshold = size.max(live.saturating_mul(2));
            let share = (live - size / 2) as f64 / live as f64;
            self.ends = ended.saturating_add((jobs as f64 * share.max(LEAST)).ceil() as u64);
            return None;
        }
        if let Some(table) = self.tables.get_mut(self.filling) {
            *table = (Phase::Leaving(now), now + SOON);
        }
        self.filling = next;
        self.forget();
        Some(next)
    }

    /// What is to be done now.
    pub fn steps(&self, now: Instant) -> Vec<Step> {
        let due = self.tables.iter().enumerate().filter(|(_, (_, at))| *at <= now);
        let step = |(table, (phase, _)): (usize, &(Phase, Instant))| match phase {
            Phase::Ready => None,
            Phase::Leaving(since) => Some(Step::Move { table, is_due: now >= *since + GRACE }),
            Phase::Empty(since) => Some(Step::Truncate(table, *since)),
        };
        due.filter_map(step).collect()
    }

    /// A step was done, or could not be.
    pub fn record(&mut self, step: Step, done: Done, now: Instant) {
        let (Step::Move { table, .. } | Step::Truncate(table, _)) = step;
        let (Some(place), Some(failures)) = (self.tables.get_mut(table), self.failures.get_mut(table)) else { return };
        let phase = match (step, done) {
            (Step::Move { .. }, Done::All) => Phase::Empty(now),
            (Step::Truncate(..), Done::All) => Phase::Ready,
            // Somebody has put a job in who did not know yet.
            (Step::Truncate(..), Done::Some) => Phase::Leaving(now),
            _ => place.0,
        };
        let (again, most) = AGAIN;
        let pause = match done {
            Done::Some | Done::All => Duration::ZERO,
            Done::Nothing => again * 2_u32.pow((*failures).min(most)),
            Done::TooSoon => SOON,
        };
        *failures = if done == Done::Nothing { *failures + 1 } else { 0 };
        *place = (phase, now + pause);
    }

    /// When to look again at the tables that are to become ready; None when all are.
    pub fn next(&self) -> Option<Instant> {
        self.tables.iter().filter(|(phase, _)| *phase != Phase::Ready).map(|(_, at)| *at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: u64 = 2 * SIZE_MIN;

    /// Of a table of this size, of which so much lives, in jobs of 1000 bytes; none has ended.
    fn full(size: u64, live: u64) -> Measure {
        Measure { size, live, jobs: live / 1000, ended: 0 }
    }

    fn moving(table: usize, is_due: bool) -> Step {
        Step::Move { table, is_due }
    }

    /// Three tables that are all ready, of which the first fills.
    fn ready(now: Instant) -> Rotation {
        let mut rotation = Rotation::new(3, 0, now);
        for _ in 0..2 {
            for step in rotation.steps(now) {
                rotation.record(step, Done::All, now);
            }
        }
        assert_eq!(rotation.next(), None);
        rotation
    }

    #[test]
    fn a_table_of_which_most_is_dead_is_left_emptied_and_truncated() {
        let now = Instant::now();
        let mut rotation = ready(now);
        assert!(!rotation.notice(SIZE_MIN - 1, 0));
        assert!(rotation.notice(FULL, 0));
        assert_eq!(rotation.look(full(FULL, 0), now), Some(1));
        assert_eq!(rotation.steps(now), []);
        let soon = now + SOON;
        assert_eq!(rotation.steps(soon), [moving(0, false)]);
        rotation.record(moving(0, false), Done::TooSoon, soon);
        assert_eq!(rotation.next(), Some(soon + SOON));
        let late = now + GRACE;
        assert_eq!(rotation.steps(late), [moving(0, true)]);
        rotation.record(moving(0, true), Done::Some, late);
        assert_eq!(rotation.steps(late), [moving(0, true)]);
        rotation.record(moving(0, true), Done::All, late);
        assert_eq!(rotation.steps(late), [Step::Truncate(0, late)]);
        rotation.record(Step::Truncate(0, late), Done::All, late);
        assert_eq!((rotation.steps(late), rotation.next()), (vec![], None));
    }

    #[test]
    fn a_table_of_which_much_lives_fills_on_until_as_much_is_dead() {
        let now = Instant::now();
        let mut rotation = ready(now);
        assert_eq!(rotation.look(full(FULL, FULL - 1000), now), None);
        assert!(!rotation.notice(FULL, 0));
        assert!(rotation.notice(2 * FULL, 0));
        assert_eq!(rotation.look(full(2 * FULL, FULL), now), Some(1));
        assert!(rotation.notice(FULL, 0));
    }

    #[test]
    fn or_until_as_many_of_its_jobs_have_ended() {
        let now = Instant::now();
        let mut rotation = ready(now);
        assert_eq!(rotation.look(Measure { size: 20_000_000, live: 20_000_000, jobs: 1000, ended: 70 }, now), None);
        assert!(!rotation.notice(20_000_000, 569));
        assert!(rotation.notice(20_000_000, 570));
        // Others have come: not after each of the few that are missing.
        assert_eq!(rotation.look(Measure { size: 20_000_000, live: 10_020_000, jobs: 501, ended: 570 }, now), None);
        assert!(!rotation.notice(20_000_000, 695));
        assert!(rotation.notice(20_000_000, 696));
        assert_eq!(rotation.look(Measure { size: 20_000_000, live: 7_500_000, jobs: 375, ended: 696 }, now), Some(1));
        assert!(!rotation.notice(SIZE_MIN - 1, 10_000));
    }

    #[test]
    fn a_table_that_somebody_has_truncated_is_measured_anew() {
        let now = Instant::now();
        let mut rotation = ready(now);
        assert_eq!(rotation.look(full(10 * FULL, 9 * FULL), now), None);
        assert!(!rotation.notice(17 * FULL, 0));
        assert!(!rotation.notice(0, 0));
        assert!(rotation.notice(FULL, 0));
        assert_eq!(rotation.look(full(FULL, 0), now), Some(1));
    }

    #[test]
    fn a_table_that_somebody_holds_is_passed_over_and_tried_again() {
        let now = Instant::now();
        let mut rotation = ready(now);
        assert_eq!(rotation.look(full(FULL, 0), now), Some(1));
        let late = now + GRACE;
        rotation.record(moving(0, true), Done::Nothing, late);
        assert_eq!(rotation.next(), Some(late + AGAIN.0));
        // By turns: what is held stays, the others go on.
        for (from, to) in [(1, 2), (2, 1), (1, 2)] {
            assert_eq!(rotation.look(full(FULL, 0), late), Some(to));
            rotation.record(moving(from, false), Done::All, late);
            rotation.record(Step::Truncate(from, late), Done::All, late);
        }
        assert_eq!(rotation.look(full(FULL, 0), late), Some(1));
        rotation.record(moving(2, false), Done::Nothing, late);
        // None is left to change to.
        assert!(!rotation.notice(FULL, 0));
        assert_eq!(rotation.look(full(FULL, 0), late), None);
        assert_eq!(rotation.steps(late + AGAIN.0), [moving(0, true), moving(2, false)]);
        // Ever later: each try holds others up.
        rotation.record(moving(2, false), Done::Nothing, late);
        assert_eq!(rotation.steps(late + AGAIN.0), [moving(0, true)]);
        assert_eq!(rotation.steps(late + 2 * AGAIN.0), [moving(0, true), moving(2, false)]);
    }

    #[test]
    fn what_lives_in_an_empty_table_after_all_is_moved_first() {
        let now = Instant::now();
        let mut rotation = ready(now);
        rotation.look(full(FULL, 0), now);
        rotation.record(moving(0, false), Done::All, now);
        rotation.record(Step::Truncate(0, now), Done::TooSoon, now);
        assert_eq!(rotation.steps(now), []);
        assert_eq!(rotation.steps(now + SOON), [Step::Truncate(0, now)]);
        rotation.record(Step::Truncate(0, now), Done::Some, now + SOON);
        assert_eq!(rotation.steps(now + SOON), [moving(0, false)]);
    }

    #[test]
    fn nothing_is_known_of_tables_at_the_start() {
        let now = Instant::now();
        let rotation = Rotation::new(3, 2, now);
        assert_eq!(rotation.steps(now), [moving(0, false), moving(1, false)]);
        assert_eq!(rotation.next(), Some(now));
    }
}
