//! Jobs that Odoo runs: claimed here, called by the gateway, settled by Odoo itself through SQL. No transaction is open
//! here meanwhile; a claim ends with the call. Short jobs share a call and a token: Odoo runs them one after another, each
//! in a transaction of its own, in the order of their claim.

use super::dispatcher::give_back;
use super::guc;
use super::jobs::{self, Asked, Claimed, Failed, Room, Token};
use super::report::Outcome;
use super::shared::Shared;
use super::transaction::{self, Failure};
use crate::core::job::Lane;
use crate::core::link::{Called, Event};
use crate::core::pace::Pace;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How soon one that found no place for a job tries again; who ends a job says so at once.
const NO_PLACE: Duration = Duration::from_millis(200);
/// How long Odoo is left alone that was not reached, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// How long jobs that share a call may take together, and how many they may be.
const COMPANY: (Duration, usize) = (Duration::from_millis(100), 100);
/// After this time those that were not begun are given back: they do not wait for the one that takes so long.
const STALLED: Duration = Duration::from_millis(200);
/// Shown as the job's `worker`.
const WORKER: &str = "Odoo";

/// Claimed jobs that Odoo was called for.
struct Batch {
    token: Token,
    /// In the order in which Odoo runs them.
    ids: Vec<i64>,
    began: Instant,
    /// No job waits in it for another any more: there is but one, or the others have been given back.
    is_single: bool,
    /// How many were given back.
    given_back: usize,
}

impl Batch {
    /// Those that are still processed, in order.
    fn left(&self) -> Outcome<Vec<i64>> {
        let left = jobs::left(&self.token)?;
        Ok(self.ids.iter().copied().filter(|id| left.contains(id)).collect())
    }
}

/// The jobs of one database that Odoo works on.
pub struct OdooJobs {
    shared: &'static Shared,
    database: u32,
    calls: HashMap<u64, Batch>,
    next_call: u64,
    pace: Pace,
    /// A call was broken off: a front that takes calls for an Odoo that is down breaks off all of them, and no job is to die of
    /// that. So Odoo is asked whether it is there before the next job.
    is_doubtful: bool,
    /// That question, on its way.
    probe: Option<u64>,
    /// Odoo was not reached: not before this time, and how long the last pause was.
    pause: Option<(Instant, Duration)>,
    complaint: String,
}

impl OdooJobs {
    /// None yet. What an earlier worker has claimed is found as orphans.
    pub fn new(shared: &'static Shared, database: u32) -> OdooJobs {
        OdooJobs {
            shared,
            database,
            calls: HashMap::new(),
            next_call: 0,
            pace: Pace::new(COMPANY.0, COMPANY.1),
            is_doubtful: false,
            probe: None,
            pause: None,
            complaint: String::new(),
        }
    }

    /// Whether Odoo works on this job by this token.
    pub fn has(&self, claimed: &Claimed) -> bool {
        self.calls.values().any(|mine| mine.token == claimed.token && mine.ids.contains(&claimed.id))
    }

    /// Claims jobs of these lanes, while Odoo has places: the calls to be made. With them comes when to look again.
    pub fn serve(&mut self, lanes: &[Lane]) -> (Vec<Event>, Option<Instant>) {
        self.give_back_stalled();
        let (calls, again) = self.call(lanes);
        let stalling = self.calls.values().filter(|batch| !batch.is_single).map(|batch| batch.began + STALLED);
        (calls, stalling.chain(again).min())
    }

    fn call(&mut self, lanes: &[Lane]) -> (Vec<Event>, Option<Instant>) {
        let mut calls = Vec::new();
        self.shared.want_odoo(self.database, !lanes.is_empty());
        if let Some((until, _)) = self.pause.filter(|(until, _)| *until > Instant::now() && !lanes.is_empty()) {
            return (calls, Some(until));
        }
        if lanes.is_empty() {
            return (calls, None);
        }
        if self.is_doubtful {
            if self.probe.is_none() {
                self.next_call += 1;
                self.probe = Some(self.next_call);
                calls.push(Event::Call { call: self.next_call, id: 0, token: String::new() });
            }
            return (calls, None);
        }
        loop {
            // One call tells whether Odoo is back.
            let is_probing = self.pause.is_some() && !self.calls.is_empty();
            if is_probing || !self.shared.enter_odoo(self.database, guc::odoo_jobs()) {
                return (calls, Some(Instant::now() + NO_PLACE));
            }
            // One that is doubtful takes but one job with it.
            let size = if self.pause.is_some() { 1 } else { self.pace.size() };
            // With itself.
            let places = guc::odoo_jobs().saturating_sub(self.shared.odoo_calls()).saturating_add(1);
            match transaction::run(|| claim(lanes, size, usize::try_from(places).unwrap_or(1))) {
                Ok(Some(batch)) => {
                    self.next_call += 1;
                    let (call, id) = (self.next_call, batch.ids.first().copied().unwrap_or(0));
                    calls.push(Event::Call { call, id, token: batch.token.clone() });
                    self.calls.insert(call, batch);
                }
                Ok(None) => {
                    self.shared.leave_odoo(self.database);
                    return (calls, None);
                }
                Err(failure) => {
                    self.shared.leave_odoo(self.database);
                    pgrx::warning!("imbus could not claim a job for Odoo: {failure}");
                    return (calls, Some(Instant::now() + NO_PLACE));
                }
            }
        }
    }

    /// A call has ended.
    pub fn called(&mut self, call: u64, outcome: &Called) {
        if self.probe == Some(call) {
            return self.probed(outcome);
        }
        let Some(batch) = self.calls.remove(&call) else { return };
        self.shared.leave_odoo(self.database);
        match outcome {
            Called::Settled | Called::Lost | Called::Died(_) => self.is_there(),
            Called::Refused(reason) => self.rest(reason),
            Called::Broken(_) => self.is_doubtful = true,
            Called::Alive => self.rest("it does not take the job for one"),
        }
        // Odoo has settled jobs in its own transactions; where it has not, the rows are as they were.
        let left = match transaction::run(|| batch.left()) {
            Ok(left) => left,
            Err(failure) => return pgrx::warning!("imbus could not look what Odoo has done: {failure}"),
        };
        let done = batch.ids.len().saturating_sub(left.len() + batch.given_back);
        if done > 0 {
            self.pace.record(done, batch.began.elapsed());
        }
        if let Some(first) = left.first() {
            let is_begun = match outcome {
                Called::Refused(_) | Called::Alive => false,
                Called::Died(_) | Called::Broken(_) => true,
                Called::Settled | Called::Lost => Some(first) == batch.ids.first(),
            };
            give_back_all(&batch, &left, is_begun);
        }
    }

    /// Gives back jobs that wait for another one in their call.
    fn give_back_stalled(&mut self) {
        let is_stalled = |batch: &&mut Batch| !batch.is_single && batch.began.elapsed() >= STALLED;
        for batch in self.calls.values_mut().filter(is_stalled) {
            let given_back = transaction::run(|| match batch.left()?.as_slice() {
                [at_work, _, ..] => jobs::give_back_others(&batch.token, *at_work),
                _ => Ok(0),
            });
            batch.is_single = true;
            match given_back {
                Ok(count) => batch.given_back = count,
                Err(failure) => pgrx::debug1!("imbus could not give back jobs: {failure}"),
            }
        }
    }

    /// Whether Odoo is there.
    fn probed(&mut self, outcome: &Called) {
        self.probe = None;
        match outcome {
            Called::Refused(reason) | Called::Broken(reason) => self.rest(reason),
            Called::Settled | Called::Lost | Called::Died(_) | Called::Alive => self.is_there(),
        }
    }

    fn is_there(&mut self) {
        (self.is_doubtful, self.pause) = (false, None);
        self.complaint.clear();
    }

    /// Leaves Odoo alone for a while, longer each time.
    fn rest(&mut self, reason: &str) {
        let length = self.pause.map_or(PAUSE.0, |(_, last)| (last * 2).min(PAUSE.1));
        self.pause = Some((Instant::now() + length, length));
        if self.complaint != reason {
            reason.clone_into(&mut self.complaint);
            pgrx::ereport!(
                pgrx::PgLogLevel::WARNING,
                pgrx::PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE,
                format!("could not have Odoo run jobs: {reason}"),
                "They wait. Check imbus.odoo_url, that Odoo runs, and that it has the add-on imbus."
            );
        }
    }

    /// A job has taken longer than it may: that attempt has failed. Odoo may still work on it, and will find it lost.
    pub fn time_out(&self, claimed: &Claimed) {
        let failure = Failure {
            code: "timeout".to_owned(),
            message: "the job took longer than its timeout".to_owned(),
            detail: None,
            hint: None,
        };
        let failed =
            transaction::run(|| transaction::with_lock_timeout(|| jobs::fail(claimed, &Failed::from(&failure))));
        if let Err(failure) = failed {
            // It is just being settled, or the next look finds it again.
            pgrx::debug1!("imbus could not end job {}: {failure}", claimed.id);
        }
    }

    /// Nobody will hear how the calls end: their jobs are given back, whose tokens keep off what Odoo may still do.
    pub fn give_back_all(&mut self) {
        self.probe = None;
        for (_, batch) in self.calls.drain() {
            self.shared.leave_odoo(self.database);
            give_back_all(&batch, &batch.ids, false);
        }
    }
}

/// Gives back those of a batch that are left; the first was at work, and has died if that `counts`.
fn give_back_all(batch: &Batch, left: &[i64], counts: bool) {
    let Some(first) = left.first() else { return };
    if left.len() > 1
        && let Err(failure) = transaction::run(|| jobs::give_back_others(&batch.token, *first))
    {
        pgrx::warning!("imbus could not give back jobs: {failure}");
    }
    give_back(&Claimed { id: *first, token: batch.token.clone(), place: None }, counts);
}

/// Claims the first jobs of the first lane that has some, up to `size`, and no more than one place's share of them.
fn claim(lanes: &[Lane], size: usize, places: usize) -> Outcome<Option<Batch>> {
    if !jobs::lock_limits()? {
        return Ok(None);
    }
    let room = Room::now()?;
    for lane in lanes.iter().filter(|lane| room.of(&lane.queue) != Some(0)) {
        // Jobs that are counted are claimed one by one: those that only wait for their turn would count too.
        let size = if room.of(&lane.queue).is_some() { 1 } else { size };
        let locked = jobs::lock_first(lane, i64::try_from(size).unwrap_or(1), None, Asked::Place)?;
        let share = if locked.len() < size { locked.len().div_ceil(places) } else { size };
        let company = jobs::company(locked.get(..share).unwrap_or_default());
        if !company.is_empty() {
            let token = jobs::new_token()?;
            jobs::take(&Vec::from_iter(company), &token, Some(WORKER))?;
            let ids: Vec<i64> = company.iter().map(|job| job.id).collect();
            return Ok(Some(Batch { token, is_single: ids.len() == 1, ids, given_back: 0, began: Instant::now() }));
        }
    }
    Ok(None)
}
