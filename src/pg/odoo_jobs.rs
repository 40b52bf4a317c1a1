//! Jobs that Odoo runs: claimed here, called by the gateway, settled by Odoo itself through SQL. No transaction is open
//! here meanwhile; a claim ends with the call.

use super::dispatcher::give_back;
use super::guc;
use super::jobs::{self, Claimed, Failed, Room};
use super::report::Outcome;
use super::shared::Shared;
use super::transaction::{self, Failure};
use crate::core::job::Lane;
use crate::core::link::{Called, Event};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How soon one that found no place for a job tries again; who ends a job says so at once.
const NO_PLACE: Duration = Duration::from_millis(200);
/// How long Odoo is left alone that was not reached, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Shown as the job's `worker`.
const WORKER: &str = "Odoo";

/// The jobs of one database that Odoo works on.
pub struct OdooJobs {
    shared: &'static Shared,
    database: u32,
    calls: HashMap<u64, Claimed>,
    next_call: u64,
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
            is_doubtful: false,
            probe: None,
            pause: None,
            complaint: String::new(),
        }
    }

    /// Whether Odoo works on this job by this token.
    pub fn has(&self, claimed: &Claimed) -> bool {
        self.calls.values().any(|mine| mine.id == claimed.id && mine.token == claimed.token)
    }

    /// Claims jobs of these lanes, while Odoo has places: the calls to be made. With them comes when to look again.
    pub fn serve(&mut self, lanes: &[Lane]) -> (Vec<Event>, Option<Instant>) {
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
            match transaction::run(|| claim(lanes)) {
                Ok(Some(claimed)) => {
                    self.next_call += 1;
                    let (call, id, token) = (self.next_call, claimed.id, claimed.token.clone());
                    self.calls.insert(call, claimed);
                    calls.push(Event::Call { call, id, token });
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
        let Some(claimed) = self.calls.remove(&call) else { return };
        self.shared.leave_odoo(self.database);
        match outcome {
            Called::Settled | Called::Lost | Called::Died(_) => self.is_there(),
            Called::Refused(reason) => self.rest(reason),
            Called::Broken(_) => self.is_doubtful = true,
            Called::Alive => self.rest("it does not take the job for one"),
        }
        // Odoo has settled it in its own transaction; where it has not, the row is as it was.
        give_back(&claimed, !matches!(outcome, Called::Refused(_) | Called::Alive));
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
        for (_, claimed) in self.calls.drain() {
            self.shared.leave_odoo(self.database);
            give_back(&claimed, false);
        }
    }
}

/// Claims the first job of the first lane that has one.
fn claim(lanes: &[Lane]) -> Outcome<Option<Claimed>> {
    if !jobs::lock_limits()? {
        return Ok(None);
    }
    let room = Room::now()?;
    for lane in lanes.iter().filter(|lane| room.of(&lane.queue) != Some(0)) {
        if let Some(locked) = jobs::lock_first(lane, 1, None)?.0.first() {
            let token = jobs::new_token()?;
            jobs::take(&[locked.id], &token, Some(WORKER))?;
            return Ok(Some(Claimed { id: locked.id, token }));
        }
    }
    Ok(None)
}
