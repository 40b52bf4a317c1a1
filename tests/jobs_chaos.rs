//! Whatever is killed, cut or restarted while jobs run: each takes effect exactly once where effect and end are one
//! commit, at least once elsewhere, with late answers refused; none is stuck. What was enqueued and what took effect are
//! compared. IMBUS_JOBS and IMBUS_BLOWS set how many (`make soak`), IMBUS_SEED repeats a run's choices.

mod common;
mod odoo_runner;

#[path = "jobs_chaos/blows.rs"]
mod blows;
#[path = "jobs_chaos/enqueuers.rs"]
mod enqueuers;
#[path = "jobs_chaos/outside.rs"]
mod outside;
#[path = "jobs_chaos/stage.rs"]
mod stage;
#[path = "jobs_chaos/wire.rs"]
mod wire;

use blows::{Blow, strike, terminate};
use common::{Cluster, eventually};
use enqueuers::BATCH;
use odoo_runner::{Does, OdooRunner};
use outside::{Ledger, Runner, Stop};
use postgres::Client;
use stage::{Random, all_end, are_given_back, have_ended, number, offenders, reach};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use wire::{Mode, Wire};

#[test]
fn jobs_for_functions_take_effect_exactly_once_whatever_is_killed() {
    let cluster = Cluster::start();
    let database = "jx_functions";
    cluster.database(database).batch_execute(enqueuers::SETUP).unwrap();
    let (mut random, blows) = (Random::new(0), stage::blows());
    let share = stage::jobs().div_ceil(blows * BATCH);
    let all = share * blows * BATCH;
    std::thread::scope(|scope| {
        let (give, batches) = crossbeam_channel::unbounded();
        for role in ["postgres", "ann", "postgres", "ann"] {
            let (cluster, batches) = (&cluster, batches.clone());
            scope.spawn(move || enqueuers::enqueue(cluster, database, role, &batches));
        }
        // Share by share, each with a blow in its midst, so that none strikes when all is over.
        for (number, blow) in blows::series(blows, &mut random).into_iter().enumerate() {
            let (first, half, end) = (number * share, number * share + share.div_ceil(2), (number + 1) * share);
            (first..half).for_each(|batch| give.send(batch).unwrap());
            have_ended(&cluster, database, (number * 100 + 10 + random.below(30)) * share * BATCH / 100);
            println!("{blow:?}");
            // It shall find some who enqueue.
            (half..end).for_each(|batch| give.send(batch).unwrap());
            strike(&cluster, database, blow);
        }
    });
    let mut sql = all_end(&cluster, database);
    compare_functions(&mut sql, all as i64);
    println!("deaths {}", number(&mut sql, "SELECT sum(deaths) FROM ir_async"));
}

/// What was enqueued against what became of it.
fn compare_functions(sql: &mut Client, all: i64) {
    sql.batch_execute("CREATE INDEX ON effect (n); ANALYZE effect").unwrap();
    assert_eq!(number(sql, "SELECT count(*) FROM ir_async WHERE (args ->> 0)::int BETWEEN 1 AND 2147483647"), all);
    assert_eq!(number(sql, "SELECT count(DISTINCT args) FROM ir_async"), all, "each was enqueued once");
    assert_eq!(number(sql, "SELECT count(*) FROM ir_async"), all, "none that was rolled back is there");
    let n = "(args ->> 0)::int";
    let once = format!("(SELECT count(*) FROM effect e WHERE e.n = {n}) <> 1");
    assert_eq!(offenders(sql, &once), None, "each took effect once");
    assert_eq!(number(sql, "SELECT count(*) FROM effect"), all, "nothing else took effect");
    let ended = format!(
        "CASE WHEN {n} % 2 = 0 THEN state <> 'succeeded' OR payload <> jsonb_build_object('result', {n})
              ELSE state <> 'done' END"
    );
    assert_eq!(offenders(sql, &ended), None, "each ended as it should");
    let attempts = format!("attempts <> CASE WHEN {n} % 100 = 3 THEN 3 ELSE 1 END");
    assert_eq!(offenders(sql, &attempts), None, "no death counts as an attempt");
    let told = "SELECT (message::jsonb #>> '{payload,id}')::bigint FROM imbus_bus
                 WHERE message::jsonb #>> '{payload,state}' IN ('succeeded', 'done')";
    assert_eq!(number(sql, &format!("SELECT count(*) FROM ({told}) s")), all / 5, "each end is told once");
    assert_eq!(number(sql, &format!("SELECT count(*) FROM ({told} INTERSECT {told}) s")), all / 5);
}

#[test]
fn runners_outside_that_are_killed_lose_nothing_and_late_answers_are_refused() {
    let cluster = Cluster::start_with(&["imbus.queues = 'out:0'"]);
    let database = "jx_outside";
    let mut sql = cluster.database(database);
    sql.batch_execute("CREATE TABLE effect (n int)").unwrap();
    let (all, blows) = (stage::jobs() / 10 * 2, stage::blows() / 4 * 3);
    let fill =
        "SELECT count(ir_async_call('work', jsonb_build_array(n), queue => 'out')) FROM generate_series(1, $1::int) n";
    sql.query_one(fill, &[&(all as i32)]).unwrap();
    let (ledger, stop) = (Ledger::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let runner = Runner { cluster: &cluster, database, ledger: &ledger, stop: &stop };
        let stops = Stop(&stop);
        for part in 0..4 {
            let runner = Runner { ..runner };
            scope.spawn(move || runner.run(Random::new(part)));
        }
        for blow in 0..blows {
            have_ended(&cluster, database, (blow + 1) * all / (blows + 2));
            match blow % 6 {
                2 => strike(&cluster, database, Blow::TerminateWorker),
                4 => strike(&cluster, database, Blow::RestartImmediately),
                5 => strike(&cluster, database, Blow::KillServer),
                _ => terminate(&cluster, database, "application_name = 'runner'", 2),
            }
        }
        all_end(&cluster, database);
        drop(stops);
    });
    compare_outside(&mut reach(&cluster, database), &ledger, all as i64);
}

fn compare_outside(sql: &mut Client, ledger: &Ledger, all: i64) {
    assert_eq!(offenders(sql, "state <> 'done'"), None, "all ended well");
    assert_eq!(number(sql, "SELECT count(*) FROM ir_async"), all);
    assert_eq!(number(sql, "SELECT count(*) FROM effect"), all / 2, "even jobs took effect once");
    assert_eq!(number(sql, "SELECT count(DISTINCT n) FROM effect WHERE n % 2 = 0"), all / 2);
    let effects = ledger.effects.lock().unwrap();
    assert_eq!(effects.len() as i64, all - all / 2, "odd jobs took effect at least once");
    let rows = sql.query("SELECT id, deaths FROM ir_async", &[]).unwrap();
    for (id, deaths) in rows.iter().map(|row| (row.get::<_, i64>(0), i64::from(row.get::<_, i32>(1)))) {
        let times = effects.get(&id).copied().unwrap_or(0);
        assert!(times <= deaths + 1, "job {id} took effect {times} times and was given back {deaths} times");
    }
    let accepted = ledger.accepted.lock().unwrap();
    assert!(accepted.values().all(|times| *times == 1), "no answer is accepted twice");
    assert!(ledger.refused.load(Ordering::SeqCst) > 0);
    assert_eq!(offenders(sql, "payload::text LIKE '%late%' OR errors::text LIKE '%late%'"), None);
    assert_eq!(number(sql, "SELECT count(*) FROM imbus_progress"), 0, "nothing late was heard");
    println!("effects {}, refused {:?}", effects.values().sum::<i64>(), ledger.refused);
}

#[test]
fn an_odoo_that_goes_and_comes_loses_no_job() {
    let odoo = OdooRunner::start();
    let wire = Wire::to(odoo.port);
    let url = format!("imbus.odoo_url = 'http://127.0.0.1:{}'", wire.port);
    let cluster = Cluster::start_with(&[&url, "imbus.odoo_jobs = 4"]);
    let database = "jx_odoo";
    let mut sql = cluster.database(database);
    sql.batch_execute("CREATE TABLE effect (id bigint)").unwrap();
    odoo.settle_with("WITH e AS (INSERT INTO effect VALUES ($1)) SELECT ir_async_finish($1, $2, to_jsonb($3::text))");
    odoo.connect(cluster.connect(database));
    let blows = stage::blows();
    let share = stage::jobs().div_ceil(20 * blows);
    for blow in 0..blows {
        have_ended(&cluster, database, (blow * share).saturating_sub(share / 4));
        disturb(&cluster, database, &odoo, &wire, (blow, share));
    }
    let mut sql = all_end(&cluster, database);
    eventually("late answers are refused", || odoo.refused() > 0);
    compare_odoo(&mut sql, &odoo, (blows * share) as i64);
}

/// One of the things that may come between imbus and Odoo, while there is a new share of jobs.
fn disturb(cluster: &Cluster, database: &str, odoo: &OdooRunner, wire: &Wire, (number, share): (usize, usize)) {
    let kind = number % 8;
    match kind {
        1 => wire.lose(Mode::LoseRequests),
        3 => wire.lose(Mode::LoseAnswers),
        5 => {
            // Jobs that follow others in their calls would hold all places, and no call would come.
            have_ended(cluster, database, number * share);
            odoo.hold();
        }
        _ => {}
    }
    odoo.does("write", if kind == 5 { Does::Wait } else { Does::Finish });
    let before = odoo.calls().len();
    let fill = "SELECT count(ir_async_call('write', model => 'res.partner', res_ids => '{1}'))
                  FROM generate_series(1, $1::int)";
    reach(cluster, database).query_one(fill, &[&(share as i32)]).unwrap();
    match kind {
        0 => {
            odoo.stop();
            odoo.come_back();
        }
        1 | 3 => wire.heal(),
        2 => strike(cluster, database, Blow::TerminateGateway),
        4 => strike(cluster, database, Blow::TerminateWorker),
        5 => reset_under_way(cluster, database, odoo, wire, before),
        6 => {
            strike(cluster, database, Blow::RestartFast);
            odoo.connect(reach(cluster, database));
        }
        _ => wire.reset(),
    }
}

/// Resets the connections of jobs that Odoo holds, and lets it end them when they are not its own any more.
fn reset_under_way(cluster: &Cluster, database: &str, odoo: &OdooRunner, wire: &Wire, before: usize) {
    odoo.wait("some are under way", |calls| calls.len() > before);
    let under_way = odoo.calls().split_off(before);
    wire.reset();
    let tokens: Vec<String> = under_way.iter().map(|call| call.body["token"].as_str().unwrap().to_owned()).collect();
    are_given_back(cluster, database, &tokens);
    odoo.does("write", Does::Finish);
    odoo.let_go();
}

fn compare_odoo(sql: &mut Client, odoo: &OdooRunner, all: i64) {
    sql.batch_execute("CREATE INDEX ON effect (id); ANALYZE effect").unwrap();
    assert_eq!(offenders(sql, "state <> 'succeeded' OR attempts <> 1"), None, "all ended well");
    assert_eq!(number(sql, "SELECT count(*) FROM ir_async"), all);
    assert_eq!(offenders(sql, "(SELECT count(*) FROM effect e WHERE e.id = j.id) <> 1"), None, "each took effect once");
    assert_eq!(number(sql, "SELECT count(*) FROM effect"), all, "nothing else took effect");
    let calls = odoo.calls();
    let tokens: HashSet<String> = calls.iter().map(|call| call.body["token"].to_string()).collect();
    assert_eq!(tokens.len(), calls.len(), "each call has a token of its own");
    println!("calls {}, deaths {}", calls.len(), number(sql, "SELECT sum(deaths) FROM ir_async"));
}
