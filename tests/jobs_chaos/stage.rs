//! What the tests share: their sizes, chance, ways to a server that comes and goes.

use super::common::{Cluster, eventually};
use postgres::Client;
use std::time::{Duration, Instant};

/// Jobs for functions; the other tests take a share of it.
const JOBS: usize = 10_000;
const BLOWS: usize = 12;
/// How long all jobs may take to end once nothing disturbs them any more.
const PATIENCE: Duration = Duration::from_secs(120);

fn setting(name: &str, usual: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

pub fn jobs() -> usize {
    setting("IMBUS_JOBS", JOBS)
}

/// Each may be the death of all that runs. Five deaths would end a job, but none sees so many: before the next blow some
/// more jobs have to end, and those that have died are run first, each alone.
pub fn blows() -> usize {
    setting("IMBUS_BLOWS", BLOWS)
}

/// A small generator (xorshift64), so that a seed repeats a run.
pub struct Random(u64);

impl Random {
    /// One for a part of a run.
    pub fn new(part: u64) -> Random {
        let seed = setting("IMBUS_SEED", std::process::id() as usize) as u64;
        if part == 0 {
            println!("IMBUS_SEED={seed}");
        }
        let mut random = Random((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (part << 32) | 1);
        for _ in 0..8 {
            random.below(2);
        }
        random
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

pub fn number(sql: &mut Client, query: &str) -> i64 {
    sql.query_one(&format!("SELECT ({query})::bigint"), &[]).unwrap().get(0)
}

/// Connects, as often as it takes: the server may be on its way up.
pub fn reach(cluster: &Cluster, database: &str) -> Client {
    reach_with(cluster, database, "SELECT")
}

/// The same, with a statement that the session begins with.
pub fn reach_with(cluster: &Cluster, database: &str, first: &str) -> Client {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Ok(mut client) = cluster.try_connect(database, "postgres")
            && client.batch_execute(first).is_ok()
        {
            return client;
        }
        assert!(Instant::now() < end, "the server does not come back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until so many jobs have ended in all.
pub fn have_ended(cluster: &Cluster, database: &str, least: usize) {
    let ended = "SELECT count(*) FROM ir_async WHERE finished_at IS NOT NULL";
    eventually("some more jobs have ended", || {
        reach(cluster, database).query_one(ended, &[]).is_ok_and(|row| row.get::<_, i64>(0) >= least as i64)
    });
}

/// Waits until no claim by any of these tokens stands.
pub fn are_given_back(cluster: &Cluster, database: &str, tokens: &[String]) {
    let stand = "SELECT EXISTS (SELECT FROM ir_async WHERE token = ANY($1))";
    eventually("the claims are given back", || {
        reach(cluster, database).query_one(stand, &[&tokens]).is_ok_and(|row| !row.get::<_, bool>(0))
    });
}

/// Waits until all jobs have ended.
pub fn all_end(cluster: &Cluster, database: &str) -> Client {
    let end = Instant::now() + PATIENCE;
    let unfinished = "SELECT count(*) FROM ir_async WHERE state IN ('created', 'processing')";
    loop {
        let mut sql = reach(cluster, database);
        if sql.query_one(unfinished, &[]).is_ok_and(|row| row.get::<_, i64>(0) == 0) {
            return sql;
        }
        assert!(Instant::now() < end, "stuck: {:?}", stuck(&mut sql));
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn stuck(sql: &mut Client) -> Option<String> {
    let text = "SELECT string_agg(s::text, ' ') FROM (
                    SELECT id, state, ready, run_at, attempts, deaths, queue, token IS NOT NULL FROM ir_async
                     WHERE state IN ('created', 'processing') ORDER BY id LIMIT 20) s";
    sql.query_one(text, &[]).unwrap().get(0)
}

/// Some of the jobs of which the condition is true: nothing, it is hoped.
pub fn offenders(sql: &mut Client, condition: &str) -> Option<String> {
    let text = format!(
        "SELECT string_agg(s::text, ' ') FROM (SELECT id, args, state, payload, attempts, deaths, errors
           FROM ir_async j WHERE {condition} ORDER BY id LIMIT 10) s"
    );
    sql.query_one(&text, &[]).unwrap().get(0)
}
