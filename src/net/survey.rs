//! How the state of the whole gateway is gathered: reactor 0 asks all reactors and all databases, and goes without those
//! that do not answer in time. What the databases say is asked for seldom and kept.

use super::status::Gauges;
use crate::core::hub::Moment;
use crate::core::status::Jobs;
use std::collections::BTreeMap;

/// How long an answer is waited for, in milliseconds.
const PATIENCE: Moment = 300;

/// Between two questions to a database about its jobs, in milliseconds.
const JOBS_EVERY: Moment = 5_000;

/// The surveys of reactor 0.
#[derive(Default)]
pub struct Surveys {
    number: u64,
    running: Option<Running>,
    /// Somebody asked while one was running: its figures may be older than the question.
    again: bool,
    jobs: BTreeMap<u32, Jobs>,
    /// Queries about jobs under way, and the databases they went to.
    asked: BTreeMap<u64, u32>,
    next_jobs: Moment,
}

struct Running {
    gauges: Gauges,
    missing: usize,
    /// Databases that have not answered.
    silent: usize,
    give_up: Moment,
}

/// What a survey begins with.
pub struct Begun {
    /// Its number, for the reactors' answers.
    pub number: u64,
    /// Whether the databases are to be asked about their jobs.
    pub ask_jobs: bool,
}

impl Surveys {
    /// Begins a survey of so many reactors, unless one is running.
    pub fn begin(&mut self, reactors: usize, now: Moment) -> Option<Begun> {
        if self.running.is_some() {
            self.again = true;
            return None;
        }
        self.number += 1;
        self.running =
            Some(Running { gauges: Gauges::default(), missing: reactors, silent: 0, give_up: now + PATIENCE });
        let ask_jobs = now >= self.next_jobs;
        if ask_jobs {
            self.next_jobs = now + JOBS_EVERY;
            self.asked.clear();
        }
        Some(Begun { number: self.number, ask_jobs })
    }

    /// A database was asked about its jobs by this query.
    pub fn asked(&mut self, query: u64, database: u32) {
        self.asked.insert(query, database);
        if let Some(running) = &mut self.running {
            running.silent += 1;
        }
    }

    /// A database has answered, or says that it cannot. False when the query was none of a survey's.
    pub fn told(&mut self, query: u64, jobs: Option<Jobs>) -> bool {
        let Some(database) = self.asked.remove(&query) else { return false };
        match jobs {
            Some(jobs) => self.jobs.insert(database, jobs),
            None => self.jobs.remove(&database),
        };
        if let Some(running) = &mut self.running {
            running.silent = running.silent.saturating_sub(1);
        }
        true
    }

    /// A reactor has answered.
    pub fn add(&mut self, number: u64, gauges: Gauges) {
        if let Some(running) = self.running.as_mut().filter(|_| number == self.number) {
            running.gauges.add(gauges);
            running.missing = running.missing.saturating_sub(1);
        }
    }

    /// What was gathered, when all have answered or have had their time: and whether another survey is to begin.
    pub fn finish(&mut self, now: Moment) -> Option<(Gauges, BTreeMap<u32, Jobs>, bool)> {
        let is_done = |running: &mut Running| running.missing == 0 && running.silent == 0 || now >= running.give_up;
        let running = self.running.take_if(is_done)?;
        Some((running.gauges, self.jobs.clone(), std::mem::take(&mut self.again)))
    }

    /// When to call [`Surveys::finish`] at the latest.
    pub fn deadline(&self) -> Option<Moment> {
        self.running.as_ref().map(|running| running.give_up)
    }

    /// These databases are served; what is known of others is forgotten.
    pub fn keep(&mut self, is_served: impl Fn(u32) -> bool) {
        self.jobs.retain(|database, _| is_served(*database));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_survey_waits_for_all_and_gives_up_on_the_silent() {
        let mut surveys = Surveys::default();
        let begun = surveys.begin(2, 0).unwrap();
        assert!(begun.ask_jobs && surveys.begin(2, 0).is_none());
        surveys.asked(7, 5);
        surveys.add(begun.number, Gauges { queued: 1, ..Gauges::default() });
        surveys.add(begun.number, Gauges { queued: 2, ..Gauges::default() });
        surveys.add(begun.number + 1, Gauges { queued: 4, ..Gauges::default() });
        assert!(surveys.finish(PATIENCE - 1).is_none());
        assert!(surveys.told(7, Some(Jobs::default())) && !surveys.told(7, None));
        let (gauges, jobs, again) = surveys.finish(1).unwrap();
        assert_eq!((gauges.queued, jobs.len(), again), (3, 1, true));
        let begun = surveys.begin(2, 2).unwrap();
        assert!(!begun.ask_jobs);
        assert!(surveys.finish(3).is_none());
        let (_, jobs, again) = surveys.finish(2 + PATIENCE).unwrap();
        assert_eq!((jobs.len(), again), (1, false));
    }
}
