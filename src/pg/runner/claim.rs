//! Which jobs a runner takes next: the first ones of the first lane of its role, as many as its pace says.

use super::company::Done;
use crate::core::job::Lane;
use crate::core::pace::Pace;
use crate::core::span::{self, Place, Span};
use crate::pg::jobs::{self, Asked, Locked, Mark, Room, Token, Work};
use crate::pg::report::Outcome;
use crate::pg::session;
use crate::pg::shared::{self, DatabaseSlot, RunnerSlot, Shared};
use crate::pg::transaction;
use crate::pg::wake;
use crate::pg::{casualties, guc};
use pgrx::pg_sys;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long jobs that share a transaction may take together before it is committed: nobody notices the delay, and the
/// costs of a commit are spread over many.
pub const BUDGET: Duration = Duration::from_millis(20);

/// Jobs claimed at once, at most.
const MOST: usize = 512;

/// How soon a runner looks again that others kept from looking: they counted jobs.
const KEPT_OFF: Duration = Duration::from_millis(100);

/// What a look at all lanes leaves to work, in times of what it took.
const SPARING: u32 = 20;

/// A look that takes longer is a dear one: it passes many entries of jobs that are done, which stay as long as the oldest
/// transaction anywhere.
const DEAR: Duration = Duration::from_millis(5);

/// What a dear look that found nothing but what it took leaves to work, in times of what it took, and at most. Looks of idle
/// runners after each job kept both processors busy while jobs came one by one.
const REST: (u32, Duration) = (10, Duration::from_secs(1));

/// How long a runner goes on whose place others wait for, if their jobs do not come before its own: less than this was hardly worth its start.
const TERM: Duration = Duration::from_millis(50);

/// Claimed jobs, in their order.
pub struct Batch {
    pub token: Token,
    /// The table that they were claimed in.
    pub place: pg_sys::Oid,
    pub works: Vec<Work>,
}

impl Batch {
    /// Claims jobs of one table that this transaction has locked.
    pub fn claim(slot: &RunnerSlot, company: &[&Locked]) -> Outcome<Batch> {
        let token = jobs::new_token()?;
        // Before the commit, so that no job that a runner has is taken for an orphan.
        slot.set_job(company.first().map_or(0, |job| job.id), Some(&token));
        let works = jobs::take(company, &token, None)?;
        Ok(Batch { token, place: company.first().map_or(pg_sys::InvalidOid, |job| job.place), works })
    }
}

/// What a claim has come to.
pub enum Turn {
    /// Jobs that are to be run.
    Claimed(Batch),
    /// Jobs that were run and ended in the transaction that has locked them.
    Done(Done),
}

impl Turn {
    /// How many jobs it means.
    pub fn jobs(&self) -> usize {
        match self {
            Turn::Claimed(batch) => batch.works.len(),
            Turn::Done(done) => done.shared.begun,
        }
    }

    /// Whether no more of them could be done in one go.
    pub fn is_cut(&self) -> bool {
        matches!(self, Turn::Done(done) if done.is_cut)
    }

    /// What they have taken so far.
    pub fn took(&self) -> Duration {
        match self {
            Turn::Claimed(_) => Duration::ZERO,
            Turn::Done(done) => done.shared.took,
        }
    }
}

/// The claims of one runner.
pub struct Claims {
    slot: &'static RunnerSlot,
    /// The slot's number.
    place: usize,
    role: u32,
    pub pace: Pace,
    /// Where the last claim ended. It goes on there without a look at the other lanes while that would cost too much.
    ended: Option<(Lane, Mark)>,
    /// Where the last claim began.
    from: Place,
    next_look: Instant,
    /// Until then it does not look: it takes what it is offered, or what comes where the last claim ended.
    rests_until: Instant,
    /// The database's count of news before the last look, which found nothing.
    quiet: Option<u64>,
    /// The last claim has looked at all lanes.
    has_looked: bool,
    /// Its first look is behind it, which finds out how to look.
    is_warm: bool,
    /// Others kept it from looking.
    is_kept_off: bool,
    /// The jobs of the queue that it has found are counted.
    is_counted: bool,
    /// It is said to wait for a job.
    pub lingers: bool,
    began: Instant,
}

impl Claims {
    /// None made yet.
    pub fn new(slot: &'static RunnerSlot, place: usize, role: u32) -> Claims {
        Claims {
            slot,
            place,
            role,
            pace: Pace::new(BUDGET, MOST),
            ended: None,
            from: Place::default(),
            next_look: Instant::now(),
            rests_until: Instant::now(),
            quiet: None,
            has_looked: false,
            is_warm: false,
            is_kept_off: false,
            is_counted: false,
            lingers: false,
            began: Instant::now(),
        }
    }

    /// Claims the next jobs, and runs short ones. None when there are none that can run, or when the runner is to leave.
    pub fn next(&mut self) -> Option<Turn> {
        let is_over = || self.slot.leave_at_once.load(Ordering::Acquire) || self.began.elapsed() >= TERM;
        if self.slot.leave.load(Ordering::Acquire) != 0 && is_over() {
            return None;
        }
        self.slot.rests.store(self.is_resting(), Ordering::SeqCst);
        let news = self.news();
        if news.is_some() && news == self.quiet {
            return None;
        }
        self.quiet = None;
        let turn = self.run(Claims::find, true);
        // Nothing is known of what it could not look at.
        if turn.is_none() && self.has_looked {
            self.quiet = news;
        }
        turn
    }

    /// Claims the job that the runner was woken for, or runs it. None when it was not woken for one, or when somebody else has it.
    pub fn offered(&mut self) -> Option<Turn> {
        let id = Some(self.slot.offer.swap(0, Ordering::SeqCst)).filter(|id| *id != 0)?;
        // Where jobs are counted, a look counts.
        if !guc::queues().is_empty() {
            self.quiet = None;
            return None;
        }
        let find = |claims: &mut Claims| {
            claims.is_counted = false;
            Ok(Vec::from_iter(jobs::lock_offered(id, claims.role, claims.asked())?))
        };
        self.run(find, false)
    }

    /// How long to wait before the next look: not long when others kept it from looking, or when it rests.
    pub fn patience(&self) -> Duration {
        match self.rests_until.saturating_duration_since(Instant::now()) {
            _ if self.is_kept_off => KEPT_OFF,
            Duration::ZERO => Duration::MAX,
            rest => rest,
        }
    }

    /// Until then it does not look at all lanes.
    pub fn rest_until(&mut self, until: Instant) {
        self.rests_until = until;
        self.slot.rests.store(self.is_resting(), Ordering::SeqCst);
    }

    /// It looks next, whatever it knows: settings have changed, or nothing has come of what it found.
    pub fn forget(&mut self) {
        self.ended = None;
        self.slot.set_span(Span::default());
        self.quiet = None;
        self.rest_until(Instant::now());
    }

    fn is_resting(&self) -> bool {
        Instant::now() < self.rests_until
    }

    /// How much news there has been of jobs in this database.
    fn news(&self) -> Option<u64> {
        let database = self.slot.database.load(Ordering::Acquire);
        shared::get().and_then(|shared| shared.database(database)).map(DatabaseSlot::news)
    }

    /// Claims the first of the jobs that `find` has locked, or runs and ends them; `is_next`: where it goes on then.
    fn run(&mut self, find: impl FnOnce(&mut Claims) -> Outcome<Vec<Locked>>, is_next: bool) -> Option<Turn> {
        let mut done = None;
        let claimed = transaction::run(|| {
            let locked = find(self)?;
            let company = jobs::company(&locked);
            if company.is_empty() {
                return Ok(None);
            }
            if is_next {
                self.say(company.last());
            }
            let (batch, count) = if self.goes_at_once(company) {
                jobs::unlock_limits()?;
                if std::mem::take(&mut self.lingers) {
                    // Nobody is to count on it while it runs them.
                    super::wait_no_more(self.slot, self.slot.database.load(Ordering::Acquire), !is_next);
                }
                let done = done.insert(Done::new(company));
                done.run(self.slot, self.place, company)?;
                done.is_cut = done.shared.begun < company.len() || !session::can_go_on();
                if done.shared.begun < locked.len() {
                    // Those who found them locked look again.
                    wake::enqueued();
                }
                (None, done.shared.begun)
            } else {
                (Some(Batch::claim(self.slot, &Vec::from_iter(company))?), company.len())
            };
            // It goes on behind the last one that it has claimed.
            let last = count.checked_sub(1).and_then(|last| company.get(last)).filter(|_| is_next);
            if let (Some((_, mark)), Some(last)) = (&mut self.ended, last) {
                *mark = last.mark();
            }
            if count < company.len() {
                self.say(last);
            }
            Ok(batch)
        });
        if let Some(done) = &mut done {
            done.end(self.slot, self.place, &claimed);
        }
        session::be_unstoppable();
        if claimed.is_err() {
            self.forget();
            (self.has_looked, self.is_kept_off) = (false, false);
            if done.is_some() {
                super::tell_others(self.slot.database.load(Ordering::Acquire));
            }
        }
        match (done, claimed) {
            (Some(done), _) => Some(Turn::Done(done)),
            (None, Ok(batch)) => batch.map(Turn::Claimed),
            (None, Err(failure)) => {
                self.slot.clear_job();
                pgrx::warning!("imbus could not claim a job: {failure}");
                None
            }
        }
    }

    /// Says to the others that it has claimed jobs up to this one.
    fn say(&self, last: Option<&Locked>) {
        let span = match (&self.ended, last) {
            (Some((lane, _)), Some(last)) => Span { lane: lane.number(), from: self.from, to: last.mark().place() },
            _ => Span::default(),
        };
        self.slot.set_span(span);
    }

    /// Where to go on in a lane: past what others have claimed there. A look at all lanes finds what they give back.
    fn behind(&self, lane: &Lane, mark: &Mark) -> Outcome<Mark> {
        let database = self.slot.database.load(Ordering::Acquire);
        let is_here = |slot: &&RunnerSlot| slot.database.load(Ordering::Acquire) == database;
        let runners = shared::get().into_iter().flat_map(Shared::runners).map(|(_, slot)| slot);
        let spans: Vec<Span> = runners.filter(is_here).filter_map(RunnerSlot::span).collect();
        Mark::at(span::behind(lane.number(), mark.place(), &spans))
    }

    /// Whether jobs are run and ended in the transaction that has locked them: they are short, as the last ones were, and nobody
    /// sees that they were never `processing`.
    fn goes_at_once(&self, company: &[Locked]) -> bool {
        self.asked() == Asked::Work && !self.is_counted && company.iter().all(Locked::may_skip_a_state)
    }

    /// What is read of jobs as they are locked.
    fn asked(&self) -> Asked {
        match self.pace.size() > 1 && session::can_share() && casualties::are_noticed() {
            true => Asked::Work,
            false => Asked::Place,
        }
    }

    /// Locks the next jobs of a lane.
    fn find(&mut self) -> Outcome<Vec<Locked>> {
        self.has_looked = false;
        self.is_counted = false;
        self.is_kept_off = !jobs::lock_limits()?;
        if self.is_kept_off {
            return Ok(Vec::new());
        }
        match self.go_on()? {
            locked if !locked.is_empty() => Ok(locked),
            nothing if self.is_resting() => Ok(nothing),
            _ => self.look(),
        }
    }

    /// Goes on in the same lane.
    fn go_on(&mut self) -> Outcome<Vec<Locked>> {
        if Instant::now() >= self.next_look {
            return Ok(Vec::new());
        }
        let Some((lane, mark)) = self.ended.take() else { return Ok(Vec::new()) };
        let mark = self.behind(&lane, &mark)?;
        self.from = mark.place();
        let locked = jobs::lock_first(&lane, self.size(), Some(&mark), self.asked())?;
        if !locked.is_empty() || self.is_resting() {
            self.ended = Some((lane, mark));
        }
        Ok(locked)
    }

    /// Looks at all lanes, and rests if that was dear and has found nothing but what it took.
    fn look(&mut self) -> Outcome<Vec<Locked>> {
        let began = Instant::now();
        let (locked, is_all) = self.look_at_all(began)?;
        if began.elapsed() > DEAR && is_all && self.is_warm {
            let (times, most) = REST;
            self.rest_until(Instant::now() + (began.elapsed() * times).min(most));
        }
        self.is_warm = true;
        Ok(locked)
    }

    /// Looks at all lanes, and locks the first jobs of the first one that has some. Whether nothing is left for another look: no other
    /// lane has jobs that are due, and this one can be gone on in.
    fn look_at_all(&mut self, began: Instant) -> Outcome<(Vec<Locked>, bool)> {
        self.ended = None;
        self.has_looked = true;
        let room = Room::now()?;
        let lanes = jobs::lanes(None)?;
        let mut lanes = lanes.into_iter().filter(|lane| lane.is_due() && !lane.is_odoo && lane.role == self.role);
        while let Some(lane) = lanes.next() {
            let room = room.of(&lane.queue);
            if room == Some(0) {
                continue;
            }
            // Jobs that are counted are claimed one by one: those that only wait for their turn would count too.
            let size = if room.is_some() { 1 } else { self.size() };
            let mark = Mark::first(&lane)?;
            let locked = jobs::lock_first(&lane, size, Some(&mark), self.asked())?;
            self.from = mark.place();
            if let Some(first) = locked.first() {
                self.is_counted = room.is_some();
                let is_all = room.is_none() && lanes.next().is_none();
                self.ended = room.is_none().then(|| (lane, first.mark()));
                self.next_look = Instant::now() + began.elapsed() * SPARING;
                return Ok((locked, is_all));
            }
        }
        Ok((Vec::new(), true))
    }

    fn size(&self) -> i64 {
        if session::can_share() { i64::try_from(self.pace.size()).unwrap_or(1) } else { 1 }
    }
}
