//! The dispatcher in the database worker: finds runners for the jobs that can run, has Odoo run its own (`odoo_jobs`), and
//! notices at once when a runner is gone.

use super::jobs::{self, Asked, Claimed, Failed, Room};
use super::launch::{self, Handle, Launch};
use super::odoo_jobs::OdooJobs;
use super::rotation::Turns;
use super::shared::{RunnerSlot, RunnerState, Shared};
use super::transaction::{self, Failure};
use super::{casualties, guc, worker};
use crate::core::job::{self, Lane};
use crate::core::link::{Called, Event};
use pgrx::prelude::*;
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The look-out for jobs nobody announced (prepared transactions, restored rows).
pub const LOOKOUT: Duration = Duration::from_secs(5);
/// How soon a dispatcher that found no place tries again.
const NO_PLACE: Duration = Duration::from_millis(200);
/// A runner registered this long ago that has not come up is counted as lost (microseconds).
const STARTING_MAX: i64 = 10_000_000;
/// Starts runners for waiting jobs and cleans up after them; part of the database worker.
pub struct Dispatcher {
    shared: &'static Shared,
    database: u32,
    handles: HashMap<usize, Handle>,
    odoo: OdooJobs,
    turns: Turns,
    /// When this worker began, in microseconds since 2000.
    began: i64,
    next: Instant,
    /// When to look for orphans even if nobody says that there are some.
    next_rescue: Instant,
    /// How many ends of jobs it has heard of (`Ends`).
    ends: u64,
    /// The look at all blocked jobs that goes on.
    round: Option<Round>,
    /// When another one begins, and whether it is to do so as soon as that has ended.
    next_round: Instant,
    is_round_due: bool,
    /// There may be blocked jobs, but for those that have come since.
    are_blocked: bool,
    /// A look at the lanes is not taken before: each leaves others many times what it took.
    next_look: Instant,
}

/// A look at all blocked jobs, in turns.
#[derive(Clone, Copy)]
struct Round {
    /// The last one it has looked at.
    after: i64,
    /// There was one that stays so.
    are_blocked: bool,
    began: Instant,
}

/// What a turn of it may take.
const RELEASING: Duration = Duration::from_millis(20);

/// What a look at the lanes leaves to others, in times of what it took: it passes entries of jobs that are done, which
/// stay as long as the oldest transaction anywhere.
const SPARING: u32 = 4;

impl Dispatcher {
    /// A dispatcher for the database this worker is connected to.
    pub fn new(shared: &'static Shared, database: u32) -> Dispatcher {
        let now = Instant::now();
        Dispatcher {
            shared,
            database,
            handles: HashMap::new(),
            odoo: OdooJobs::new(shared, database),
            turns: Turns::new(),
            began: worker::now(),
            next: now,
            next_rescue: now,
            ends: 0,
            round: None,
            next_round: now,
            is_round_due: true,
            are_blocked: true,
            next_look: now,
        }
    }

    /// When to look again even if nobody wakes it.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// Whether that time has come.
    pub fn due(&self) -> bool {
        Instant::now() >= self.next
    }

    /// Cleans up after runners that have ended, then finds runners for the jobs that can run. Returns the calls to be made
    /// of Odoo; none unless there `is_line` to it.
    pub fn dispatch(&mut self, is_line: bool) -> Vec<Event> {
        self.next = Instant::now() + LOOKOUT;
        // Before the look: whoever commits after it goes by the same number.
        self.shared.database(self.database).into_iter().for_each(|slot| slot.set_places(guc::job_workers()));
        if self.reap() {
            // A runner has left for the sake of another database: that one takes the place first.
            self.next = Instant::now() + NO_PLACE;
            return Vec::new();
        }
        let orphans =
            self.shared.database(self.database).is_some_and(|slot| slot.orphans.swap(false, Ordering::AcqRel));
        if orphans || Instant::now() >= self.next_rescue {
            self.next_rescue = Instant::now() + LOOKOUT;
            self.rescue();
        }
        self.look_by(self.next_rescue);
        self.count_casualties();
        if self.mine().filter(|(_, slot)| slot.cancel_again()).count() > 0 {
            self.look_by(Instant::now() + NO_PLACE);
        }
        let again = self.shared.database(self.database).and_then(|slot| self.turns.go_on(slot));
        again.into_iter().for_each(|at| self.look_by(at));
        if Instant::now() < self.next_look {
            self.look_by(self.next_look);
            return Vec::new();
        }
        let mut began = Instant::now();
        let mut took = Duration::ZERO;
        let looked = transaction::run(|| {
            // Jobs that are let go are run after that is written; what a crash undoes of it is done again.
            transaction::set_local(c"synchronous_commit", c"off");
            self.release()?;
            if self.round.is_none() {
                // Who waits for an end does not wait for the next look.
                began = Instant::now();
            }
            let waiting = self.waiting();
            took = began.elapsed();
            waiting
        });
        let waiting = match looked {
            Ok(waiting) => waiting,
            Err(failure) => {
                // Nothing of it has happened.
                (self.round, self.is_round_due) = (None, true);
                pgrx::warning!("imbus could not look for jobs: {failure}");
                return Vec::new();
            }
        };
        self.next_look = Instant::now() + took * SPARING;
        for place in 0..waiting.roles.len() {
            self.serve_role(&waiting.roles, place);
        }
        if waiting.is_limited {
            // Whoever counts and claims keeps others from it.
            self.look_by(Instant::now() + NO_PLACE);
        }
        if let Some(seconds) = waiting.next_start {
            self.look_by(Instant::now() + Duration::from_secs_f64(seconds.clamp(0.001, 3600.0)));
        }
        if !is_line {
            return Vec::new();
        }
        let (calls, again) = self.odoo.serve(&waiting.odoo);
        again.into_iter().for_each(|at| self.look_by(at));
        calls
    }

    /// A call of Odoo has ended.
    pub fn called(&mut self, call: u64, outcome: &Called) {
        self.odoo.called(call, outcome);
        self.next = Instant::now();
    }

    /// The line to Odoo is cut: what it works on is given back.
    pub fn lost_line(&mut self) {
        self.odoo.give_back_all();
    }

    fn look_by(&mut self, at: Instant) {
        self.next = self.next.min(at);
    }

    /// Lets blocked jobs wait in their lanes whose dependencies have ended: those that waited for what has just ended; and from time
    /// to time, or when others have come, all, as many at once as there is time for.
    fn release(&mut self) -> super::report::Outcome<()> {
        let Some(slot) = self.shared.database(self.database) else { return Ok(()) };
        if !guc::queues().is_empty() {
            slot.await_ends(true);
        }
        let (ended, read) = slot.ends.since(self.ends);
        self.ends = read;
        let is_enough = match ended {
            _ if !self.are_blocked => true,
            Some(ended) if ended.is_empty() => true,
            Some(ended) => jobs::release_after(ended)?,
            None => false,
        };
        if slot.blocked.swap(false, Ordering::SeqCst) || !is_enough {
            // The one that goes on has passed some already.
            self.is_round_due = true;
        }
        let now = Instant::now();
        if self.round.is_none() && (self.is_round_due || now >= self.next_round) {
            self.is_round_due = false;
            self.round = Some(Round { after: 0, are_blocked: false, began: now });
            self.are_blocked = true;
            // Before the look: of an end that it does not see any more this worker hears.
            slot.await_ends(true);
        }
        while let Some(round) = self.round {
            if now.elapsed() >= RELEASING {
                self.look_by(Instant::now());
                return Ok(());
            }
            let blocked = jobs::release(round.after)?;
            let are_blocked = round.are_blocked || blocked.are_there;
            self.round = blocked.next.map(|after| Round { after, are_blocked, ..round });
            if self.round.is_none() {
                // Nobody says when the last transaction has ended that may know of what is not there.
                let sparing = (round.began.elapsed() * SPARING).clamp(NO_PLACE, LOOKOUT);
                self.next_round = Instant::now() + if blocked.are_unsure { sparing } else { LOOKOUT };
                self.are_blocked = are_blocked;
                if !are_blocked && guc::queues().is_empty() {
                    slot.await_ends(false);
                }
            }
        }
        if self.is_round_due {
            self.look_by(Instant::now());
        }
        self.look_by(self.next_round);
        Ok(())
    }

    /// Looks at the lanes. What runners have locked seems to wait.
    fn waiting(&self) -> super::report::Outcome<Waiting> {
        let mut held: HashMap<u32, i64> = HashMap::new();
        for (_, slot) in self.mine() {
            *held.entry(slot.role.load(Ordering::Acquire)).or_default() += i64::from(slot.holds.load(Ordering::SeqCst));
        }
        let lanes = jobs::lanes(None)?;
        let room = Room::now()?;
        let next_start = job::next_start(&lanes);
        let is_open = |lane: &Lane| lane.is_due() && room.of(&lane.queue) != Some(0);
        let is_limited = !lanes.is_empty() && !guc::queues().is_empty();
        let (odoo, functions): (Vec<Lane>, Vec<Lane>) =
            lanes.into_iter().filter(is_open).partition(|lane| lane.is_odoo);
        let most = i64::try_from(guc::job_workers()).unwrap_or(1);
        let mut roles: Vec<Wanting> = Vec::new();
        for lane in &functions {
            let count = match room.of(&lane.queue) {
                Some(room) => jobs::count_due(lane, i64::try_from(room).unwrap_or(most).min(most))?,
                None => {
                    let held = held.entry(lane.role).or_default();
                    let due = jobs::count_due(lane, most + *held)?;
                    let count = (due - *held).max(0);
                    *held = (*held - due).max(0);
                    count.min(most)
                }
            };
            match roles.iter_mut().find(|other| other.role == lane.role) {
                Some(other) => other.count += count,
                None => roles.push(Wanting { role: lane.role, count, priority: lane.priority }),
            }
        }
        Ok(Waiting { roles, odoo, next_start, is_limited })
    }

    fn mine(&self) -> impl Iterator<Item = (usize, &'static RunnerSlot)> {
        let database = self.database;
        self.shared.runners().filter(move |(_, slot)| {
            slot.database.load(Ordering::Acquire) == database && slot.state() != RunnerState::Free
        })
    }

    /// Wakes idle runners of the role at this place, and starts more while jobs are left and places are free.
    fn serve_role(&mut self, roles: &[Wanting], place: usize) {
        let Some(&Wanting { role, count, .. }) = roles.get(place) else { return };
        // Nobody may have said so: it was restored, prepared, or was not due.
        self.shared.database(self.database).into_iter().for_each(|slot| slot.add_news());
        // Whoever holds all of them may have looked again before others were let go.
        let mut left = count.max(1);
        let of_role = || self.mine().map(|(_, slot)| slot).filter(|slot| slot.role.load(Ordering::Acquire) == role);
        for slot in of_role().filter(|slot| slot.state() == RunnerState::Running) {
            // One that is not waiting has been woken for another job, or is at work.
            if left > 0 && slot.leave.load(Ordering::Acquire) == 0 && slot.is_waiting.swap(false, Ordering::SeqCst) {
                slot.process.wake();
                left -= 1;
            }
        }
        if count == 0 {
            return;
        }
        // They look once they have done the job that they were launched for.
        left -= i64::try_from(of_role().filter(|slot| slot.state() == RunnerState::Reserved).count()).unwrap_or(0);
        while left > 0 {
            let Some((index, slot)) = self.shared.reserve_runner(guc::job_workers()) else {
                self.ask_to_leave(roles, place);
                self.next = self.next.min(Instant::now() + NO_PLACE);
                return;
            };
            if !self.launch(index, slot, role) {
                return;
            }
            left -= 1;
        }
    }

    /// Has a runner of another role or database leave after its job, an idle one if there is one: no role keeps its
    /// places while jobs that come before its own wait, and databases take turns.
    fn ask_to_leave(&self, roles: &[Wanting], place: usize) {
        let Some(&Wanting { role, priority, .. }) = roles.get(place) else { return };
        let before: Vec<u32> = roles.iter().take(place).map(|other| other.role).collect();
        let others = || {
            self.shared.runners().map(|(_, slot)| slot).filter(|slot| {
                let (theirs, here) = (slot.role.load(Ordering::Acquire), self.is_mine(slot));
                slot.state() == RunnerState::Running && !(here && (theirs == role || before.contains(&theirs)))
            })
        };
        if others().any(|slot| slot.leave.load(Ordering::Acquire) == self.database) {
            return;
        }
        let chosen = others().find(|slot| slot.job().is_none()).or_else(|| others().next());
        if let Some(slot) = chosen {
            let theirs = slot.role.load(Ordering::Acquire);
            let rival = roles.iter().find(|other| other.role == theirs && self.is_mine(slot));
            slot.leave_at_once.store(rival.is_some_and(|rival| rival.priority > priority), Ordering::Release);
            slot.leave.store(self.database, Ordering::Release);
            slot.process.wake();
        }
    }

    fn is_mine(&self, slot: &RunnerSlot) -> bool {
        slot.database.load(Ordering::Acquire) == self.database
    }

    /// Claims a job, which counts the attempt, and launches a runner with it. False when there was nothing to do or no
    /// worker to be had.
    fn launch(&mut self, index: usize, slot: &'static RunnerSlot, role: u32) -> bool {
        let claimed = match transaction::run(|| claim_one(role)) {
            Ok(Some(claimed)) => claimed,
            Ok(None) => {
                slot.set_state(RunnerState::Free);
                return false;
            }
            Err(failure) => {
                slot.set_state(RunnerState::Free);
                pgrx::warning!("imbus could not claim a job: {failure}");
                return false;
            }
        };
        slot.database.store(self.database, Ordering::Release);
        slot.role.store(role, Ordering::Release);
        slot.set_job(claimed.id, Some(&claimed.token));
        let name = transaction::run(|| Ok(super::bus::table()?.database)).unwrap_or_default();
        let launch =
            Launch { name: &format!("imbus job {name}"), function: "imbus_runner_main", argument: index as u64 };
        match launch::start(&launch) {
            Ok(Some(handle)) => {
                self.handles.insert(index, handle);
                true
            }
            _ => {
                warn_no_slot(&name);
                slot.clear_job();
                slot.set_state(RunnerState::Free);
                give_back(&claimed, false);
                self.next = self.next.min(Instant::now() + Duration::from_secs(1));
                false
            }
        }
    }

    /// Frees the places of runners that have ended and settles the jobs that ended with them. Whether a place was given
    /// up for another database.
    fn reap(&mut self) -> bool {
        let mut given_up = false;
        for (index, slot) in self.mine().collect::<Vec<_>>() {
            // Launched by an earlier life of this worker and never come up.
            let lost = slot.state() == RunnerState::Reserved
                && !self.handles.contains_key(&index)
                && slot.process.pid() == 0
                && worker::now().saturating_sub(slot.since.load(Ordering::Relaxed)) > STARTING_MAX;
            let gone = slot.state() == RunnerState::Exited
                || lost
                || self.handles.get(&index).is_some_and(|handle| handle.is_stopped());
            if !gone {
                continue;
            }
            self.handles.remove(&index);
            let is_held = slot.held.load(Ordering::Acquire);
            if let Some((id, token)) = slot.claim() {
                let claimed = Claimed { id, token, place: None };
                settle(&claimed, &slot.message(), !is_held);
                give_back_others(&claimed);
            } else if let Some(id) = slot.job().filter(|_| !is_held) {
                casualties::add(self.database, id);
            }
            let wanted_by = slot.leave.load(Ordering::Acquire);
            casualties::at_rest(index);
            slot.free();
            if wanted_by != 0 && wanted_by != self.database {
                self.shared.wake_jobs(wanted_by);
                given_up = true;
            }
        }
        given_up
    }

    /// Counts the deaths of runners with jobs that they had not claimed.
    fn count_casualties(&mut self) {
        for id in casualties::of(self.database) {
            match transaction::run(|| jobs::died_unclaimed(id)) {
                Ok(true) => casualties::settle(self.database, id),
                Ok(false) => self.look_by(Instant::now() + NO_PLACE),
                Err(failure) => {
                    casualties::settle(self.database, id);
                    pgrx::warning!("imbus could not count the death of a runner in job {id}: {failure}");
                }
            }
        }
    }

    /// Gives back jobs that are `processing` without a runner: theirs died with the server, or they were restored from
    /// a dump. A runner enters its job in its slot before its claim commits, so none at work is taken for an orphan.
    fn rescue(&self) {
        let orphans = match transaction::run(|| jobs::processing(self.began)) {
            Ok(orphans) => orphans,
            Err(failure) => return pgrx::warning!("imbus could not look for abandoned jobs: {failure}"),
        };
        let alive: Vec<String> = self.mine().filter_map(|(_, slot)| slot.claim()).map(|(_, token)| token).collect();
        let mut call = None;
        for orphan in orphans.iter().filter(|orphan| !alive.contains(&orphan.claimed.token)) {
            // Of those that shared a call of Odoo's, the first was at work.
            let has_waited = call.replace(&orphan.claimed.token) == Some(&orphan.claimed.token) && orphan.is_odoo;
            if orphan.is_odoo && self.odoo.has(&orphan.claimed) {
                if orphan.is_overdue {
                    self.odoo.time_out(&orphan.claimed);
                }
                continue;
            }
            let is_outside = orphan.session.is_some_and(|session| self.shared.has_session(session));
            if !is_outside || orphan.is_overdue {
                // A runner that ends is settled at once; others are left by accident. A server that went down with a job may
                // have done so because of it.
                give_back(&orphan.claimed, !has_waited && (orphan.is_old || orphan.session.is_some()));
            }
        }
    }
}

/// A role with jobs for functions: with how many runners they could do, and the priority of the first.
struct Wanting {
    role: u32,
    count: i64,
    priority: i32,
}

/// What waits: roles with jobs for functions, in the order of their first ones; lanes of jobs for Odoo.
struct Waiting {
    roles: Vec<Wanting>,
    odoo: Vec<Lane>,
    next_start: Option<f64>,
    is_limited: bool,
}

/// Claims the first job for a function of a role.
fn claim_one(role: u32) -> super::report::Outcome<Option<Claimed>> {
    if !jobs::lock_limits()? {
        return Ok(None);
    }
    let room = Room::now()?;
    for lane in jobs::lanes(None)?.iter().filter(|lane| lane.is_due() && !lane.is_odoo && lane.role == role) {
        if room.of(&lane.queue) == Some(0) {
            continue;
        }
        let locked = jobs::lock_first(lane, 1, None, Asked::Place)?;
        if let Some(first) = locked.first() {
            let token = jobs::new_token()?;
            jobs::take(&[first], &token, None)?;
            return Ok(Some(Claimed { id: first.id, token, place: Some(first.place) }));
        }
    }
    Ok(None)
}

/// What a runner that has ended had claimed besides the job it was at.
fn give_back_others(claimed: &Claimed) {
    if let Err(failure) = transaction::run(|| jobs::give_back_others(&claimed.token, claimed.id)) {
        pgrx::warning!("imbus could not give back jobs: {failure}");
    }
}

/// A job whose runner ended: it could not connect (PostgreSQL's message), or it died.
fn settle(claimed: &Claimed, message: &str, counts: bool) {
    if message.is_empty() {
        return give_back(claimed, counts);
    }
    let failure = Failure {
        code: "runner_failed".to_owned(),
        message: message.to_owned(),
        detail: None,
        hint: Some("The job runs in a session of the role that enqueued it.".to_owned()),
    };
    if let Err(failure) = transaction::run(|| jobs::fail(claimed, &Failed::from(&failure))) {
        pgrx::warning!("imbus could not record the failure of job {}: {failure}", claimed.id);
    }
}

/// Gives a job back whose runner is gone; `counts` where that may be the job's fault.
pub fn give_back(claimed: &Claimed, counts: bool) {
    if let Err(failure) = transaction::run(|| match counts {
        true => jobs::runner_died(claimed),
        false => jobs::give_back_one(claimed),
    }) {
        pgrx::warning!("imbus could not give back job {}: {failure}", claimed.id);
    }
}

fn warn_no_slot(database: &str) {
    thread_local! { static WARNED: Cell<bool> = const { Cell::new(false) } }
    if !WARNED.replace(true) {
        pgrx::ereport!(
            PgLogLevel::WARNING,
            PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            format!("no background worker is free for the jobs of database \"{database}\""),
            "Increase max_worker_processes (8 + databases + imbus.job_workers) and restart PostgreSQL."
        );
    }
}
