//! Whatever is killed, cut or restarted while jobs run: each takes effect exactly once where effect and end are one commit,
//! at least once elsewhere, with late answers refused; none is stuck. What was enqueued and what took effect are compared.
//! IMBUS_JOBS sets how many (`make soak`), IMBUS_SEED repeats a run.

mod common;
mod odoo_runner;

use common::{Cluster, eventually, signal_to};
use odoo_runner::OdooRunner;
use postgres::Client;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Jobs for functions; the other tests take a share of it.
const JOBS: usize = 10_000;
/// Blows, each of which may be the death of whatever runs: fewer than five on any job, since one that has seen a death is
/// run alone from then on.
const BLOWS: usize = 12;
/// How long all jobs may take to end once nothing disturbs them any more.
const PATIENCE: Duration = Duration::from_secs(120);

fn jobs() -> usize {
    std::env::var("IMBUS_JOBS").ok().and_then(|text| text.parse().ok()).unwrap_or(JOBS)
}

fn number(sql: &mut Client, query: &str) -> i64 {
    sql.query_one(&format!("SELECT ({query})::bigint"), &[]).unwrap().get(0)
}

/// A small generator (xorshift64), so that a seed repeats a run.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let seed = std::env::var("IMBUS_SEED").ok().and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) * 7919 + 1);
        println!("IMBUS_SEED={seed}");
        Random(seed)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// Connects, as often as it takes: the server may be on its way up.
fn reach(cluster: &Cluster, database: &str) -> Client {
    let end = Instant::now() + PATIENCE;
    loop {
        match cluster.try_connect(database, "postgres") {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < end, "the server does not come back: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process of the server, by what pg_stat_activity calls it.
fn process(cluster: &Cluster, database: &str, kind: &str) -> Option<i32> {
    let query = "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE $1 ORDER BY random() LIMIT 1";
    let row = reach(cluster, database).query_opt(query, &[&kind]).ok()??;
    Some(row.get(0))
}

fn terminate(cluster: &Cluster, database: &str, kind: &str) {
    let query =
        "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity WHERE backend_type LIKE $1
                  ORDER BY random() LIMIT 1) s";
    let _ = reach(cluster, database).query_one(query, &[&kind]);
}

/// One blow of the kind with this number.
fn strike(cluster: &Cluster, database: &str, kind: usize) {
    let worker = format!("imbus database {database}");
    match kind {
        0 | 4 => terminate(cluster, database, "imbus job %"),
        1 => kill(cluster, database, "imbus job %"),
        2 => terminate(cluster, database, &worker),
        3 => cluster.pg_ctl(&["-m", "immediate", "-w", "restart"]),
        5 => kill(cluster, database, &worker),
        6 => terminate(cluster, database, "imbus gateway"),
        _ => cluster.pg_ctl(&["-m", "fast", "-w", "restart"]),
    }
    // After a kill the server may answer for a moment before it goes down.
    eventually("the database is served", || {
        let served = "SELECT 1 FROM imbus_stat_bus WHERE datname = current_database() AND pid IS NOT NULL";
        reach(cluster, database).query_opt(served, &[]).is_ok_and(|row| row.is_some())
    });
}

/// kill -9: the whole server goes through recovery.
fn kill(cluster: &Cluster, database: &str, kind: &str) {
    if let Some(pid) = process(cluster, database, kind) {
        // It may have ended meanwhile.
        let _ = std::panic::catch_unwind(|| signal_to(pid, libc::SIGKILL));
    }
}

fn all_end(cluster: &Cluster, database: &str) {
    let end = Instant::now() + PATIENCE;
    let unfinished = "SELECT count(*) FROM ir_async WHERE state IN ('created', 'processing')";
    loop {
        let mut sql = reach(cluster, database);
        match sql.query_one(unfinished, &[]) {
            Ok(row) if row.get::<_, i64>(0) == 0 => return,
            _ => {}
        }
        if Instant::now() > end {
            let text = "SELECT string_agg(s::text, ' ') FROM (SELECT id, state, attempts, deaths, queue, token IS NOT NULL FROM ir_async
                         WHERE state IN ('created', 'processing') ORDER BY id LIMIT 20) s";
            let stuck: Option<String> = sql.query_one(text, &[]).unwrap().get(0);
            panic!("stuck: {stuck:?}\n{}", cluster.log());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Enqueues the jobs `from..to` in transactions of 50, whatever happens to the server: after a lost connection it looks
/// whether the last transaction was committed.
fn enqueue_all(cluster: &Cluster, database: &str, from: usize, to: usize) {
    let enqueue =
        "SELECT count(*) FROM (SELECT ir_async_call_many((SELECT jsonb_agg(jsonb_build_object('target', 'work',
                    'args', jsonb_build_array(n), 'max_attempts', 3, 'retry_delay', '10 ms') ORDER BY n)
                    FROM generate_series($1::int, $2::int) n))) s";
    let (mut sql, mut next) = (reach(cluster, database), from);
    while next < to {
        let last = (next + 49).min(to - 1);
        let is_in = match sql.query_one(enqueue, &[&(next as i32), &(last as i32)]) {
            Ok(_) => true,
            Err(_) => loop {
                sql = reach(cluster, database);
                let look = "SELECT EXISTS (SELECT FROM ir_async WHERE args = jsonb_build_array($1::int))";
                if let Ok(row) = sql.query_one(look, &[&(next as i32)]) {
                    break row.get(0);
                }
            },
        };
        if is_in {
            next = last + 1;
        }
    }
}

#[test]
fn jobs_for_functions_take_effect_exactly_once_whatever_is_killed() {
    let cluster = Cluster::start_with(&["max_worker_processes = 20"]);
    let database = "jx_functions";
    let mut sql = cluster.database(database);
    sql.batch_execute(
        "CREATE TABLE effect (n int); CREATE SEQUENCE tries;
         CREATE FUNCTION work(n int) RETURNS int LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO effect VALUES (n);
             IF n % 50 = 7 THEN PERFORM pg_sleep(0.02); END IF;
             IF n % 100 = 3 AND nextval('tries') % 3 <> 0 THEN RAISE EXCEPTION 'once more'; END IF;
             RETURN CASE WHEN n % 2 = 0 THEN n END;
         END $$",
    )
    .unwrap();
    let (all, mut random) = (jobs(), Random::new());
    std::thread::scope(|scope| {
        let enqueuers: Vec<_> = (0..4)
            .map(|part| {
                let cluster = &cluster;
                scope.spawn(move || enqueue_all(cluster, database, part * all / 4, (part + 1) * all / 4))
            })
            .collect();
        let first = random.below(8);
        for blow in 0..BLOWS {
            let done = format!(
                "SELECT count(*) FROM ir_async WHERE finished_at IS NOT NULL AND id > {}",
                blow * all / BLOWS / 4
            );
            eventually("some more jobs have ended", || {
                reach(&cluster, database).query_one(&done, &[]).is_ok_and(|row| row.get::<_, i64>(0) > 0)
            });
            strike(&cluster, database, (first + blow) % 8);
        }
        enqueuers.into_iter().for_each(|enqueuer| enqueuer.join().unwrap());
    });
    all_end(&cluster, database);
    let mut sql = reach(&cluster, database);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM ir_async"), all as i64);
    assert_eq!(number(&mut sql, "SELECT count(DISTINCT args) FROM ir_async"), all as i64);
    let died = "SELECT count(*) FROM ir_async WHERE payload #>> '{error,code}' = 'runner_died'";
    assert_eq!(number(&mut sql, died), 0);
    let once = "SELECT count(*) FROM ir_async j WHERE state IN ('succeeded', 'done')
                   AND (SELECT count(*) FROM effect e WHERE e.n = (j.args ->> 0)::int) <> 1";
    sql.batch_execute("CREATE INDEX ON effect (n)").unwrap();
    assert_eq!(number(&mut sql, once), 0, "each that ended well took effect once");
    let none = "SELECT count(*) FROM ir_async j WHERE state = 'failed'
                   AND EXISTS (SELECT FROM effect e WHERE e.n = (j.args ->> 0)::int)";
    assert_eq!(number(&mut sql, none), 0, "none that failed took effect");
    let failed = number(&mut sql, "SELECT count(*) FROM ir_async WHERE state = 'failed'");
    let unlucky =
        "SELECT count(*) FROM ir_async WHERE state = 'failed' AND attempts = 3 AND (args ->> 0)::int % 100 = 3";
    assert_eq!(number(&mut sql, unlucky), failed);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), all as i64 - failed);
    println!("deaths {}, failed {failed}", number(&mut sql, "SELECT sum(deaths) FROM ir_async"));
}

/// What runners outside have done.
#[derive(Default)]
struct Ledger {
    /// Effects outside of the database, by job.
    effects: Mutex<HashMap<i64, usize>>,
    /// Answers that were accepted, by job.
    accepted: Mutex<HashMap<i64, usize>>,
    refused: AtomicUsize,
}

/// Claims, works and answers until told to stop; now and then it drops its connection with what it has claimed.
fn run_outside(cluster: &Cluster, database: &str, ledger: &Ledger, stop: &AtomicBool, mut random: Random) {
    let mut client = reach(cluster, database);
    while !stop.load(Ordering::SeqCst) {
        let most = 1 + random.below(20) as i32;
        let Ok(rows) = client.query("SELECT id, token, args ->> 0 FROM ir_async_claim('out', $1, 'r')", &[&most])
        else {
            client = reach(cluster, database);
            continue;
        };
        if rows.is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let drop_at = if random.below(20) == 0 { random.below(most as usize) } else { usize::MAX };
        for (place, row) in rows.iter().enumerate() {
            if place == drop_at {
                // Another connection answers late for what was this one's.
                client = reach(cluster, database);
            }
            let (id, token): (i64, String) = (row.get(0), row.get(1));
            let n: String = row.get(2);
            let is_accepted = answer(&mut client, id, &token, n.parse().unwrap(), ledger);
            match is_accepted {
                Ok(true) => *ledger.accepted.lock().unwrap().entry(id).or_default() += 1,
                Ok(false) => drop(ledger.refused.fetch_add(1, Ordering::SeqCst)),
                Err(_) => client = reach(cluster, database),
            }
        }
    }
}

/// Even jobs take effect in the transaction that ends them, odd ones in the world outside before. False when refused.
fn answer(client: &mut Client, id: i64, token: &str, n: i32, ledger: &Ledger) -> Result<bool, postgres::Error> {
    let mut transaction = client.transaction()?;
    if n % 2 == 0 {
        transaction.execute("INSERT INTO effect VALUES ($1)", &[&n])?;
    } else {
        *ledger.effects.lock().unwrap().entry(id).or_default() += 1;
    }
    match transaction.execute("SELECT ir_async_finish($1, $2, NULL)", &[&id, &token]) {
        Ok(_) => transaction.commit().map(|()| true),
        Err(error) if error.code().is_some_and(|code| code.code() == "55000") => Ok(false),
        Err(error) => Err(error),
    }
}

#[test]
fn runners_outside_that_are_killed_lose_nothing_and_late_answers_are_refused() {
    let cluster = Cluster::start_with(&["imbus.queues = 'out:0'"]);
    let database = "jx_outside";
    let mut sql = cluster.database(database);
    let all = jobs() / 5;
    sql.batch_execute("CREATE TABLE effect (n int)").unwrap();
    let fill = "SELECT count(*) FROM (SELECT ir_async_call_many((SELECT jsonb_agg(jsonb_build_object('target', 'work', 'queue', 'out',
                 'args', jsonb_build_array(n))) FROM generate_series(1, $1::int) n))) s";
    sql.query_one(fill, &[&(all as i32)]).unwrap();
    let (ledger, stop) = (Ledger::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (cluster, ledger, stop) = (&cluster, &ledger, &stop);
            scope.spawn(move || run_outside(cluster, database, ledger, stop, Random::new()));
        }
        for blow in 0..8 {
            let done =
                format!("SELECT count(*) FROM ir_async WHERE finished_at IS NOT NULL AND id > {}", blow * all / 16);
            eventually("some more jobs have ended", || {
                reach(&cluster, database).query_one(&done, &[]).is_ok_and(|row| row.get::<_, i64>(0) > 0)
            });
            match blow {
                3 => cluster.pg_ctl(&["-m", "immediate", "-w", "restart"]),
                5 => terminate(&cluster, database, &format!("imbus database {database}")),
                _ => {
                    let kill = "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity
                                 WHERE query LIKE '%ir_async%' AND pid <> pg_backend_pid() LIMIT 2) s";
                    let _ = reach(&cluster, database).query_one(kill, &[]);
                }
            }
        }
        all_end(&cluster, database);
        stop.store(true, Ordering::SeqCst);
    });
    let mut sql = reach(&cluster, database);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM ir_async WHERE state = 'done'"), all as i64);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), (all / 2) as i64);
    assert_eq!(number(&mut sql, "SELECT count(DISTINCT n) FROM effect WHERE n % 2 = 0"), (all / 2) as i64);
    assert_eq!(ledger.effects.lock().unwrap().len(), all - all / 2, "each odd job took effect at least once");
    assert!(ledger.accepted.lock().unwrap().values().all(|times| *times == 1), "no answer is accepted twice");
    println!("refused {}", ledger.refused.load(Ordering::SeqCst));
}

#[test]
fn an_odoo_that_goes_and_comes_loses_no_job() {
    let odoo = OdooRunner::start();
    let url = format!("imbus.odoo_url = 'http://127.0.0.1:{}'", odoo.port);
    let cluster = Arc::new(Cluster::start_with(&[&url, "imbus.odoo_jobs = 4"]));
    let database = "jx_odoo";
    let mut sql = cluster.database(database);
    let all = jobs() / 20;
    sql.batch_execute("CREATE TABLE effect (id bigint)").unwrap();
    odoo.settle_with("WITH e AS (INSERT INTO effect VALUES ($1)) SELECT ir_async_finish($1, $2, to_jsonb($3::text))");
    odoo.connect(cluster.connect(database));
    let fill = "SELECT count(ir_async_call('write', model => 'res.partner', res_ids => '{1}')) FROM generate_series(1, $1::int)";
    sql.query_one(fill, &[&(all as i32)]).unwrap();
    let ended = |least: usize| {
        eventually("some more jobs have ended", || {
            let done = "SELECT count(*) FROM ir_async WHERE finished_at IS NOT NULL";
            reach(&cluster, database).query_one(done, &[]).is_ok_and(|row| row.get::<_, i64>(0) >= least as i64)
        });
    };
    for blow in 0..6 {
        ended(blow * all / 10);
        match blow {
            0 | 3 | 4 => {
                // Calls under way are cut off, wherever they are.
                odoo.stop();
                odoo.come_back();
            }
            1 => terminate(&cluster, database, "imbus gateway"),
            2 => terminate(&cluster, database, &format!("imbus database {database}")),
            _ => {
                cluster.pg_ctl(&["-m", "fast", "-w", "restart"]);
                odoo.connect(reach(&cluster, database));
            }
        }
    }
    all_end(&cluster, database);
    let mut sql = reach(&cluster, database);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM ir_async WHERE state = 'succeeded'"), all as i64);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), all as i64);
    assert_eq!(number(&mut sql, "SELECT count(DISTINCT id) FROM effect"), all as i64);
    let tokens: HashSet<String> = odoo.calls().iter().map(|call| call.body["token"].to_string()).collect();
    assert_eq!(tokens.len(), odoo.calls().len(), "each call has a token of its own");
}
