//! Answers to what only the database knows, on behalf of single clients.

use super::Database;
use crate::core::granted::Granted;
use crate::core::link::{Answer, Event, Question};
use crate::pg::authenticate;
use crate::pg::bus;
use crate::pg::jobs;
use crate::pg::transaction::{self, Failure};
use crate::pg::worker;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Between two warnings about what clients were not answered.
const SELDOM: Duration = Duration::from_secs(60);

impl Database {
    /// Answers a query.
    pub(super) fn answer(&mut self, query: u64, question: Question) {
        worker::report_activity(Some("answering a client"));
        let answer = self.find_out(question).unwrap_or_else(|failure| {
            self.complain_seldom(format!("imbus could not answer a client of database \"{}\": {failure}", self.name));
            Answer::Failed
        });
        self.send(&Event::Answered { query, answer });
    }

    /// Warns, but not so often that those who ask could fill the log.
    fn complain_seldom(&mut self, text: String) {
        if self.complained_at.is_none_or(|at| at.elapsed() > SELDOM) {
            self.complained_at = Some(Instant::now());
            pgrx::warning!("{text}");
        }
    }

    fn find_out(&mut self, question: Question) -> Result<Answer, Failure> {
        match question {
            Question::Missed { last } => transaction::run(|| bus::table()?.has(last)).map(|has| Answer::Missed(!has)),
            Question::Vacuum => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let next = now + self.next_prune.saturating_duration_since(Instant::now());
                let micros = |time: std::time::Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
                Ok(Answer::Vacuum { last: self.pruned.map(micros), next: micros(next) })
            }
            Question::Jobs => transaction::run(jobs::summary).map(Answer::Jobs),
            Question::Authenticate { headers, channels } => {
                let told = authenticate::ask(&headers, &channels)?;
                let granted = told.map(|text| Granted::parse(&text, &self.name)).transpose();
                Ok(match granted {
                    Ok(granted) => Answer::Authenticated(granted),
                    Err(reason) => {
                        self.complain_seldom(format!(
                            "imbus.auth_function of database \"{}\" is wrong: {reason}",
                            self.name
                        ));
                        Answer::Failed
                    }
                })
            }
        }
    }
}
