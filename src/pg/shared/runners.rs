//! What stands of each runner in shared memory: which job it works on and by which token, whether it waits, whom it is to make
//! room for, and what ended it.

use super::Process;
use crate::core::span::Span;
use crate::pg::worker;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Bytes kept of the message with which a runner failed to connect.
const MESSAGE: usize = 256;

/// What a runner's slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RunnerState {
    Free = 0,
    /// Taken by a database worker that is about to register the runner.
    Reserved = 1,
    /// Connected.
    Running = 2,
    /// Ended; `job` says which job died with it, if any.
    Exited = 3,
}

/// One runner.
pub struct RunnerSlot {
    state: AtomicU32,
    pub database: AtomicU32,
    pub role: AtomicU32,
    /// The job it works on, 0 when idle.
    job: AtomicI64,
    token: [AtomicU64; 2],
    /// The job that somebody wants it to stop, 0 for none.
    cancel: AtomicI64,
    /// How often it was interrupted for that.
    interrupts: AtomicU32,
    /// It was told to leave because the database is held, so its job did not die.
    pub held: AtomicBool,
    /// When it was reserved, in microseconds since 2000.
    pub since: AtomicI64,
    /// It waits for a job, and nobody has woken it.
    pub is_waiting: AtomicBool,
    /// It does not look at all lanes for a while, unless it is woken.
    pub rests: AtomicBool,
    /// The job for which it was woken, 0 for none.
    pub offer: AtomicI64,
    /// It is to leave after its job: jobs of another role wait for its place, in the database with this OID.
    pub leave: AtomicU32,
    /// These jobs come before its own: it does not finish its term.
    pub leave_at_once: AtomicBool,
    /// How many jobs it has locked that are not claimed: they seem to wait.
    pub holds: AtomicU32,
    /// What it has claimed last of a lane. Odd while it is written.
    version: AtomicU64,
    lane: AtomicU64,
    span: [AtomicI64; 4],
    pub process: Process,
    message: [AtomicU8; MESSAGE],
}

impl Default for RunnerSlot {
    fn default() -> RunnerSlot {
        RunnerSlot {
            state: AtomicU32::new(0),
            database: AtomicU32::new(0),
            role: AtomicU32::new(0),
            job: AtomicI64::new(0),
            token: [AtomicU64::new(0), AtomicU64::new(0)],
            cancel: AtomicI64::new(0),
            interrupts: AtomicU32::new(0),
            held: AtomicBool::new(false),
            since: AtomicI64::new(0),
            is_waiting: AtomicBool::new(false),
            rests: AtomicBool::new(false),
            offer: AtomicI64::new(0),
            leave: AtomicU32::new(0),
            leave_at_once: AtomicBool::new(false),
            holds: AtomicU32::new(0),
            version: AtomicU64::new(0),
            lane: AtomicU64::new(0),
            span: [const { AtomicI64::new(0) }; 4],
            process: Process::default(),
            message: [const { AtomicU8::new(0) }; MESSAGE],
        }
    }
}

impl RunnerSlot {
    pub fn state(&self) -> RunnerState {
        match self.state.load(Ordering::Acquire) {
            1 => RunnerState::Reserved,
            2 => RunnerState::Running,
            3 => RunnerState::Exited,
            _ => RunnerState::Free,
        }
    }

    pub fn set_state(&self, state: RunnerState) {
        self.state.store(state as u32, Ordering::Release);
    }

    /// Keeps PostgreSQL's message of a failed connection for the database worker.
    pub fn set_message(&self, text: &str) {
        for (cell, byte) in self.message.iter().zip(text.bytes().chain(std::iter::repeat(0))) {
            cell.store(byte, Ordering::Relaxed);
        }
    }

    /// The message, empty when the runner had connected.
    pub fn message(&self) -> String {
        let bytes: Vec<u8> =
            self.message.iter().map(|b| b.load(Ordering::Relaxed)).take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Goes on to another job that it has claimed by the same token. A wish to stop the one before is over; one for this job
    /// stays.
    pub fn begin(&self, id: i64) {
        if self.job.swap(id, Ordering::AcqRel) != id {
            self.cancel.store(0, Ordering::Release);
        }
    }

    /// Enters the job it works on; `token` is 32 hexadecimal digits, none for one that it has not claimed.
    pub fn set_job(&self, id: i64, token: Option<&str>) {
        let token = token.unwrap_or_default();
        for (cell, digits) in self.token.iter().zip([token.get(..16), token.get(16..)]) {
            let half = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
            cell.store(half.unwrap_or(0), Ordering::Release);
        }
        self.cancel.store(0, Ordering::Release);
        self.job.store(id, Ordering::Release);
    }

    /// The job it works on; None when idle.
    pub fn job(&self) -> Option<i64> {
        Some(self.job.load(Ordering::Acquire)).filter(|id| *id != 0)
    }

    /// The job it has claimed and works on, and its token.
    pub fn claim(&self) -> Option<(i64, String)> {
        let id = self.job();
        let [high, low] = &self.token;
        let (high, low) = (high.load(Ordering::Acquire), low.load(Ordering::Acquire));
        id.filter(|_| (high, low) != (0, 0)).map(|id| (id, format!("{high:016x}{low:016x}")))
    }

    /// It has ended its job.
    pub fn clear_job(&self) {
        self.job.store(0, Ordering::Release);
        self.cancel.store(0, Ordering::Release);
    }

    /// Asks it to stop this job, if it works on it by this token.
    pub fn ask_cancel(&self, id: i64, token: &str) -> bool {
        if self.claim() != Some((id, token.to_owned())) {
            return false;
        }
        self.cancel.store(id, Ordering::Release);
        self.interrupt();
        true
    }

    /// Interrupts it again if the job it was asked to stop still runs.
    pub fn cancel_again(&self) -> bool {
        let (id, asked) = (self.job.load(Ordering::Acquire), self.cancel.load(Ordering::Acquire));
        let is_due = asked != 0 && id == asked;
        if is_due {
            self.interrupt();
        }
        is_due
    }

    fn interrupt(&self) {
        let pid = self.process.pid();
        // One that is on its way looks before it begins.
        if pid > 0 && self.state() == RunnerState::Running {
            self.interrupts.fetch_add(1, Ordering::SeqCst);
            // SAFETY: a signal to a process of this server, of the same operating system's user.
            unsafe { libc::kill(pid, libc::SIGINT) };
        }
    }

    /// How often somebody has interrupted it to stop a job.
    pub fn interrupts(&self) -> u32 {
        self.interrupts.load(Ordering::SeqCst)
    }

    /// The job that it was asked to stop.
    pub fn cancelled(&self) -> Option<i64> {
        Some(self.cancel.load(Ordering::Acquire)).filter(|id| *id != 0)
    }

    /// Says what it has claimed of a lane; nobody else does.
    pub fn set_span(&self, span: Span) {
        // Whoever had the place before may have died as it wrote.
        self.version.fetch_or(1, Ordering::SeqCst);
        self.lane.store(span.lane, Ordering::SeqCst);
        for (cell, value) in self.span.iter().zip([span.from.0, span.from.1, span.to.0, span.to.1]) {
            cell.store(value, Ordering::SeqCst);
        }
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// What it has claimed last of a lane; None also while it changes that.
    pub fn span(&self) -> Option<Span> {
        let before = self.version.load(Ordering::SeqCst);
        let lane = self.lane.load(Ordering::SeqCst);
        let [from, id, to, last] = &self.span;
        let place = |time: &AtomicI64, id: &AtomicI64| (time.load(Ordering::SeqCst), id.load(Ordering::SeqCst));
        let span = Span { lane, from: place(from, id), to: place(to, last) };
        let is_whole = before.is_multiple_of(2) && before == self.version.load(Ordering::SeqCst);
        (is_whole && lane != 0).then_some(span)
    }

    /// Gives the place back.
    pub fn free(&self) {
        self.clear_job();
        self.process.leave();
        self.database.store(0, Ordering::Release);
        self.set_state(RunnerState::Free);
    }

    /// Takes the slot, if it is free.
    pub fn reserve(&self) -> bool {
        let (free, reserved) = (RunnerState::Free as u32, RunnerState::Reserved as u32);
        let taken = self.state.compare_exchange(free, reserved, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if taken {
            self.set_span(Span::default());
            self.holds.store(0, Ordering::SeqCst);
            self.clear_job();
            self.set_message("");
            self.process.leave();
            self.since.store(worker::now(), Ordering::Relaxed);
            self.held.store(false, Ordering::Release);
            self.is_waiting.store(false, Ordering::Release);
            self.rests.store(false, Ordering::Release);
            self.offer.store(0, Ordering::Release);
            self.leave.store(0, Ordering::Release);
        }
        taken
    }
}
