//! Runners outside, which lose their sessions and answer late.

use super::common::Cluster;
use super::stage::{Random, are_given_back, reach_with};
use postgres::{Client, Error};
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// What they have done.
#[derive(Default)]
pub struct Ledger {
    /// Effects outside of the database, by job.
    pub effects: Mutex<HashMap<i64, i64>>,
    /// Answers that were accepted, by job.
    pub accepted: Mutex<HashMap<i64, i64>>,
    pub refused: AtomicUsize,
}

/// A claimed job.
struct Claim {
    id: i64,
    token: String,
    n: i32,
}

/// One runner; the others have the same ledger.
pub struct Runner<'a> {
    pub cluster: &'a Cluster,
    pub database: &'a str,
    pub ledger: &'a Ledger,
    pub stop: &'a AtomicBool,
}

/// What only late answers say.
const LATE: [&str; 3] = [
    "SELECT ir_async_finish($1, $2, '\"late\"')",
    "SELECT ir_async_fail($1, $2, '\"late\"')",
    "SELECT ir_async_progress($1, $2, 99, 'late')",
];

impl Runner<'_> {
    fn session(&self) -> Client {
        reach_with(self.cluster, self.database, "SET application_name = 'runner'")
    }

    /// Claims, works and answers until told to stop. Now and then it loses its session with what it has claimed.
    pub fn run(&self, mut random: Random) {
        let mut client = self.session();
        while !self.stop.load(Ordering::SeqCst) {
            let Ok((claims, deaths)) = claim(&mut client, 1 + random.below(20) as i32) else {
                client = self.session();
                continue;
            };
            if claims.is_empty() {
                std::thread::sleep(Duration::from_millis(5));
            } else if deaths < 2 && random.below(10) == 0 {
                // Others may yet be the death of these jobs: it does not come to five.
                self.lose_session(&mut client, &mut random);
                self.answer_too_late(&claims);
            } else {
                let lost_at = if deaths < 2 && random.below(10) == 0 { random.below(claims.len()) } else { usize::MAX };
                self.answer_all(&mut client, &claims, lost_at);
            }
        }
    }

    fn lose_session(&self, client: &mut Client, random: &mut Random) {
        if random.below(2) == 0 {
            let _ = client.simple_query("SELECT pg_terminate_backend(pg_backend_pid())");
        }
        *client = self.session();
    }

    /// Answers, from some job on in another session, whether or not the claims have been given back by then.
    fn answer_all(&self, client: &mut Client, claims: &[Claim], lost_at: usize) {
        for (place, claim) in claims.iter().enumerate() {
            if place == lost_at {
                *client = self.session();
            }
            match self.answer(client, claim) {
                Ok(true) => *self.ledger.accepted.lock().unwrap().entry(claim.id).or_default() += 1,
                Ok(false) => drop(self.ledger.refused.fetch_add(1, Ordering::SeqCst)),
                Err(_) => *client = self.session(),
            }
        }
    }

    /// Even jobs take effect in the transaction that ends them, odd ones in the world outside before. False if refused.
    fn answer(&self, client: &mut Client, claim: &Claim) -> Result<bool, Error> {
        let mut transaction = client.transaction()?;
        if claim.n % 2 == 0 {
            transaction.execute("INSERT INTO effect VALUES ($1)", &[&claim.n])?;
        } else {
            *self.ledger.effects.lock().unwrap().entry(claim.id).or_default() += 1;
        }
        match transaction.execute("SELECT ir_async_finish($1, $2, NULL)", &[&claim.id, &claim.token]) {
            Ok(_) => transaction.commit().map(|()| true),
            Err(error) if is_refusal(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Once the claims are given back, nothing that is said with their tokens is heard.
    fn answer_too_late(&self, claims: &[Claim]) {
        let tokens: Vec<String> = claims.iter().map(|claim| claim.token.clone()).collect();
        are_given_back(self.cluster, self.database, &tokens);
        let mut client = self.session();
        for (claim, answer) in claims.iter().zip(LATE.iter().cycle()) {
            loop {
                match client.execute(*answer, &[&claim.id, &claim.token]) {
                    Ok(_) => panic!("heard of job {} although it was given back: {answer}", claim.id),
                    Err(error) if is_refusal(&error) => break,
                    Err(_) => client = self.session(),
                }
            }
            self.ledger.refused.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn is_refusal(error: &Error) -> bool {
    error.code().is_some_and(|code| code.code() == "55000")
}

/// Claims some; with them the most deaths that one of them has seen.
fn claim(client: &mut Client, most: i32) -> Result<(Vec<Claim>, i32), Error> {
    let rows = client.query("SELECT id, token, (args ->> 0)::int FROM ir_async_claim('out', $1, 'r')", &[&most])?;
    let claims: Vec<Claim> =
        rows.iter().map(|row| Claim { id: row.get(0), token: row.get(1), n: row.get(2) }).collect();
    let ids: Vec<i64> = claims.iter().map(|claim| claim.id).collect();
    let deaths = client.query_one("SELECT COALESCE(max(deaths), 0) FROM ir_async WHERE id = ANY($1)", &[&ids])?;
    Ok((claims, deaths.get(0)))
}

/// Has the runners stop, also when the test has failed.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
