//! Short jobs share a transaction: each in a savepoint of its own, and whatever may have failed because of its company is run again
//! alone, so that nothing of the others' is to be seen in how a job ends. Where nobody sees that they skip `processing`, they are
//! locked, run and ended in one transaction; others are claimed before.

use super::claim::{BUDGET, Batch, Turn};
use super::{QUERY_CANCELED, call, work};
use crate::pg::casualties;
use crate::pg::jobs::{self, Claimed, Failed, Locked, Token, Work};
use crate::pg::limit::Limit;
use crate::pg::report::{Outcome, internal};
use crate::pg::session;
use crate::pg::shared::RunnerSlot;
use crate::pg::transaction::{self, Failure};
use crate::pg::worker;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long jobs that share a transaction may take together before the one at work is stopped, to be run alone, in
/// milliseconds: the others' results do not wait for it.
const COMPANY: i64 = 100;

const UNIQUE_VIOLATION: &str = "23505";
const EXCLUSION_VIOLATION: &str = "23P01";

/// What has become of jobs that share a transaction, by their places among them.
#[derive(Default)]
pub struct Together {
    /// So many were begun.
    pub begun: usize,
    results: Vec<(usize, Option<String>)>,
    failures: Vec<(usize, Failed)>,
    /// To be run alone: they failed in company, or with it.
    failed: Vec<usize>,
    /// To be run alone: it took so long that it was stopped.
    slow: Option<usize>,
    /// How long they took, with their ends.
    pub took: Duration,
}

impl Together {
    /// Calls the functions of jobs, one after another, until their time is over.
    fn call<'a>(&mut self, works: impl Iterator<Item = &'a Work>, begin: impl Fn(i64)) {
        session::be_stoppable();
        let began = Instant::now();
        let limit = Limit::set(COMPANY);
        for (place, work) in works.enumerate() {
            if place > 0 && (began.elapsed() >= BUDGET || !session::can_go_on()) {
                break;
            }
            self.begun = place + 1;
            begin(work.id);
            transaction::restart_clock();
            let called = transaction::in_savepoint(|| call(work));
            // Also of one that was stopped: it is run again.
            session::clear();
            match called {
                Ok(result) => self.results.push((place, result)),
                Err(failure) if failure.code == QUERY_CANCELED => {
                    self.slow = Some(place);
                    break;
                }
                Err(failure) if is_its_own(&failure) => self.failures.push((place, Failed::from(&failure))),
                Err(failure) => {
                    pgrx::debug1!("imbus runs job {} again, alone: {failure}", work.id);
                    self.failed.push(place);
                }
            }
        }
        drop(limit);
    }

    /// After the transaction. What was not committed is to be run again.
    fn end<T>(&mut self, outcome: &Result<T, Failure>) {
        session::be_unstoppable();
        Limit::lift();
        worker::report_activity(None);
        session::after_transaction();
        if let Err(failure) = outcome {
            pgrx::debug1!("imbus runs jobs one by one that could not be ended together: {failure}");
            self.failed = (0..self.begun).filter(|place| self.slow != Some(*place)).collect();
        }
    }
}

/// Whether a job would have failed so alone, too: of data, of a constraint, or because its function says so. It may have seen what
/// those before it did, which is committed with its failure, or not at all. But what may not be there twice may be the number of
/// the transaction that it shares.
fn is_its_own(failure: &Failure) -> bool {
    let is_twice = matches!(failure.code.as_str(), UNIQUE_VIOLATION | EXCLUSION_VIOLATION);
    !is_twice && ["22", "23", "P0"].iter().any(|class| failure.code.starts_with(class))
}

/// Jobs that were locked, and run as far as that went.
pub struct Done {
    /// No more could be done in one go.
    pub is_cut: bool,
    pub shared: Together,
    ids: Vec<i64>,
    /// Claimed, to be run alone.
    claimed: Option<Batch>,
}

impl Done {
    /// Nothing was done yet of jobs that this transaction has locked.
    pub fn new(jobs: &[Locked]) -> Done {
        Done { is_cut: false, shared: Together::default(), ids: jobs.iter().map(|job| job.id).collect(), claimed: None }
    }

    /// Runs and ends them; `place` is the runner's. Errors: whatever the ends raise, after which the transaction must be rolled back.
    pub fn run(&mut self, slot: &RunnerSlot, place: usize, jobs: &[Locked]) -> Outcome<()> {
        let began = Instant::now();
        let now = TimestampWithTimeZone::try_from(worker::now()).map_err(internal)?;
        let database = slot.database.load(Ordering::Acquire);
        slot.set_job(0, None);
        slot.holds.store(u32::try_from(jobs.len()).unwrap_or(u32::MAX), Ordering::SeqCst);
        let begin = |id| {
            slot.begin(id);
            casualties::at_work(place, database, id);
        };
        let shared = &mut self.shared;
        shared.call(jobs.iter().filter_map(|job| job.work.as_ref()), begin);
        let job = |at: usize| jobs.get(at).ok_or_else(|| internal("a job that was not locked"));
        let results = shared.results.drain(..).map(|(at, result)| Ok((job(at)?, result)));
        let results = results.collect::<Outcome<Vec<_>>>()?;
        let failures = shared.failures.drain(..).map(|(at, failed)| Ok((job(at)?, failed)));
        let failures = failures.collect::<Outcome<Vec<_>>>()?;
        transaction::with_lock_timeout(|| {
            let mut are_as_they_were = jobs::succeed_at_once(&results, now)?;
            for (job, failed) in &failures {
                are_as_they_were &= jobs::fail_at_once(job, failed, now)?;
            }
            if are_as_they_were { Ok(()) } else { Err(internal("a job in company has changed")) }
        })?;
        let again = shared.failed.iter().chain(&shared.slow).map(|at| job(*at)).collect::<Outcome<Vec<_>>>()?;
        if !again.is_empty() {
            self.claimed = Some(Batch::claim(slot, &again)?);
        }
        shared.took = began.elapsed();
        Ok(())
    }

    /// After the transaction.
    pub fn end<T>(&mut self, slot: &RunnerSlot, place: usize, outcome: &Result<T, Failure>) {
        self.shared.end(outcome);
        slot.holds.store(0, Ordering::SeqCst);
        casualties::at_rest(place);
        if outcome.is_err() {
            self.claimed = None;
        }
    }
}

/// Runs what is left of a runner's turn.
pub fn go_on(slot: &RunnerSlot, turn: Turn) {
    match turn {
        Turn::Claimed(batch) => run(slot, &batch),
        Turn::Done(done) => {
            // Until here the jobs of a transaction that has failed are anybody's.
            let again =
                || done.shared.failed.iter().chain(&done.shared.slow).filter_map(|at| done.ids.get(*at).copied());
            match done.claimed {
                Some(batch) => run_each(slot, &batch),
                None => run_again(slot, again().collect()),
            }
        }
    }
}

/// Runs what was claimed: in company as far as that goes, the rest alone. Of those that may take long only one is kept, so
/// that none waits for another while other runners have nothing to do.
fn run(slot: &RunnerSlot, batch: &Batch) {
    let Batch { token, place, works } = batch;
    let (mut left, mut failed, mut slow) = (&works[..], Vec::new(), Vec::new());
    // A wish to stop a job would be forgotten with the next one.
    while left.len() > 1 && slow.is_empty() && session::can_share() && slot.cancelled().is_none() {
        let shared = run_together(slot, token, *place, left);
        let id = |at: &usize| left.get(*at).map(|work| work.id);
        failed.extend(shared.failed.iter().filter_map(id));
        slow.extend(shared.slow.iter().filter_map(id));
        left = left.get(shared.begun..).unwrap_or_default();
    }
    let alone = |id| run_alone(slot, &Claimed { id, token: token.clone(), place: Some(*place) });
    // Whom somebody wants to stop comes first: the mark is for the job in the slot.
    if let Some(place) = slow.iter().position(|id| Some(*id) == slot.cancelled()) {
        alone(slow.swap_remove(place));
    }
    failed.into_iter().for_each(alone);
    let mut others = slow.into_iter().chain(left.iter().map(|work| work.id));
    let Some(last) = others.next() else { return };
    if others.next().is_some() {
        give_back(token, last);
    }
    alone(last);
}

fn run_alone(slot: &RunnerSlot, claimed: &Claimed) {
    session::be_unstoppable();
    slot.begin(claimed.id);
    work(claimed);
    session::reset();
}

fn give_back(token: &Token, but: i64) {
    if let Err(failure) = transaction::run(|| jobs::give_back_others(token, but)) {
        pgrx::warning!("imbus could not give back jobs: {failure}");
    }
    session::be_unstoppable();
}

/// Runs claimed jobs in one transaction, as far as their time goes.
fn run_together(slot: &RunnerSlot, token: &Token, place: pg_sys::Oid, works: &[Work]) -> Together {
    let mut shared = Together::default();
    let outcome = transaction::run(|| {
        shared.call(works.iter(), |id| slot.begin(id));
        let id = |at: usize| works.get(at).map_or(0, |work| work.id);
        let results: Vec<_> = shared.results.drain(..).map(|(at, result)| (id(at), result)).collect();
        // Somebody who has locked one of the rows must not keep the others.
        transaction::with_lock_timeout(|| {
            if !results.is_empty() && !jobs::succeed_all(place, token, &results)? {
                return Err(jobs::given_up(results.first().map_or(0, |(id, _)| *id)));
            }
            for (at, failed) in &shared.failures {
                let claimed = Claimed { id: id(*at), token: token.clone(), place: Some(place) };
                if !jobs::fail(&claimed, failed)? {
                    return Err(jobs::given_up(claimed.id));
                }
            }
            Ok(())
        })
    });
    shared.end(&outcome);
    shared
}

/// Runs claimed jobs, each alone.
fn run_each(slot: &RunnerSlot, batch: &Batch) {
    let Batch { token, place, works } = batch;
    works.iter().for_each(|work| run_alone(slot, &Claimed { id: work.id, token: token.clone(), place: Some(*place) }));
}

/// Claims these jobs, as far as nobody else has, and runs each alone.
fn run_again(slot: &RunnerSlot, mut ids: Vec<i64>) {
    while !ids.is_empty() {
        let Some(batch) = claim_again(slot, &ids) else { return };
        run_each(slot, &batch);
        ids.retain(|id| !batch.works.iter().any(|work| work.id == *id));
    }
}

/// Claims the first of these jobs that may be claimed together; None when there are none any more.
fn claim_again(slot: &RunnerSlot, ids: &[i64]) -> Option<Batch> {
    let claimed = transaction::run(|| {
        let locked = jobs::lock_again(ids, Some(slot.role.load(Ordering::Acquire)))?;
        let company: Vec<&Locked> = jobs::company(&locked).iter().collect();
        if company.is_empty() { Ok(None) } else { Batch::claim(slot, &company).map(Some) }
    });
    session::be_unstoppable();
    claimed.unwrap_or_else(|failure| {
        slot.clear_job();
        pgrx::warning!("imbus could not claim a job: {failure}");
        None
    })
}
