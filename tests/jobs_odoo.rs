//! Jobs on models of Odoo's: handed to Odoo by the gateway, settled by Odoo through SQL.

mod common;
mod odoo_runner;

use common::{Cluster, eventually};
use odoo_runner::{Does, OdooRunner};
use postgres::Client;
use serde_json::{Value, json};

fn value(sql: &mut Client, query: &str) -> Value {
    let text: Option<String> = sql.query_one(&format!("SELECT ({query})::text"), &[]).unwrap().get(0);
    text.map_or(Value::Null, |text| serde_json::from_str(&text).unwrap())
}

fn status(sql: &mut Client, id: i64) -> Value {
    value(sql, &format!("ir_async_status({id})"))
}

fn comes_to(sql: &mut Client, id: i64, state: &str) -> Value {
    eventually(&format!("job {id} is {state}"), || status(sql, id)["state"] == state);
    status(sql, id)
}

/// A job on a record of Odoo's.
fn enqueue(sql: &mut Client, method: &str, options: &str) -> i64 {
    let call = format!("SELECT ir_async_call('{method}', '[1]', model => 'res.partner', res_ids => '{{3}}' {options})");
    sql.query_one(&call, &[]).unwrap().get(0)
}

fn cluster(odoo: &OdooRunner, more: &[&str]) -> Cluster {
    let url = format!("imbus.odoo_url = 'http://127.0.0.1:{}'", odoo.port);
    Cluster::start_with(&[&[url.as_str()], more].concat())
}

#[test]
fn odoo_gets_the_id_and_the_token_and_settles_the_job() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &[]);
    let mut sql = cluster.database("jo_settles");
    odoo.connect(cluster.connect("jo_settles"));
    let mut socket = cluster.subscriber(&mut sql, json!(["jobs"]), 0);
    let id = enqueue(&mut sql, "write", ", description => 'Write', notify => '\"jobs\"'");
    let found = comes_to(&mut sql, id, "succeeded");
    assert_eq!(
        (&found["payload"], &found["attempts"], &found["deaths"]),
        (&json!({"result": "write"}), &json!(1), &json!(0))
    );
    assert_eq!(found["worker"], json!("Odoo"));
    let call = odoo.calls().remove(0);
    assert!(call.head.starts_with("POST /imbus/async/run HTTP/1.1\r\n"), "{}", call.head);
    assert_eq!((&call.body["db"], &call.body["id"]), (&json!("jo_settles"), &json!(id)));
    assert_eq!(call.body["token"].as_str().map(str::len), Some(32));
    assert_eq!(call.body.as_object().map(|body| body.len()), Some(3), "nothing else is told: {}", call.body);
    let states: Vec<Value> = (0..3).map(|_| socket.next()["message"]["payload"]["state"].clone()).collect();
    assert_eq!(states, [json!("created"), json!("processing"), json!("succeeded")]);
}

#[test]
fn an_odoo_that_is_down_costs_no_attempt_and_no_death() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &[]);
    let mut sql = cluster.database("jo_down");
    odoo.stop();
    let id = enqueue(&mut sql, "write", "");
    eventually("it says so", || cluster.log().contains("could not have Odoo run jobs"));
    // It is given back after that.
    eventually("it is given back", || status(&mut sql, id)["attempts"] == 0);
    let found = status(&mut sql, id);
    assert_eq!((&found["deaths"], &found["errors"]), (&json!(0), &json!([])));
    odoo.come_back();
    odoo.connect(cluster.connect("jo_down"));
    comes_to(&mut sql, id, "succeeded");
    // An answer that says the job was not begun is the same.
    odoo.does("absent", Does::Answer(404));
    let id = enqueue(&mut sql, "absent", "");
    eventually("it was asked", || odoo.count("absent") >= 2);
    assert_eq!(status(&mut sql, id)["deaths"], json!(0));
    odoo.does("absent", Does::Finish);
    assert_eq!(comes_to(&mut sql, id, "succeeded")["errors"], json!([]), "it failed in nothing");
}

#[test]
fn a_front_that_takes_calls_for_an_odoo_that_is_down_costs_no_job() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &["imbus.odoo_jobs = 2"]);
    let mut sql = cluster.database("jo_front");
    odoo.be_deaf(true);
    let jobs: Vec<i64> = (0..20).map(|_| enqueue(&mut sql, "write", "")).collect();
    eventually("it was asked again and again", || odoo.turned_away() >= 5);
    assert_eq!(value(&mut sql, "SELECT count(*) FROM ir_async WHERE state = 'failed'"), json!(0));
    let deaths = value(&mut sql, "SELECT sum(deaths) FROM ir_async").as_i64().unwrap();
    assert!(deaths <= 2, "only what was under way: {deaths}");
    odoo.connect(cluster.connect("jo_front"));
    odoo.be_deaf(false);
    for id in jobs {
        comes_to(&mut sql, id, "succeeded");
    }
}

#[test]
fn a_job_ends_with_its_connection_and_fails_after_the_fifth_death() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &[]);
    let mut sql = cluster.database("jo_dies");
    odoo.connect(cluster.connect("jo_dies"));
    odoo.does("die", Does::HangUp);
    let id = enqueue(&mut sql, "die", "");
    let found = comes_to(&mut sql, id, "failed");
    assert_eq!((&found["deaths"], &found["payload"]["error"]["code"]), (&json!(5), &json!("runner_died")));
    odoo.does("crash", Does::Answer(500));
    let id = enqueue(&mut sql, "crash", "");
    assert_eq!(comes_to(&mut sql, id, "failed")["deaths"], json!(5));
    // Settled, says Odoo, and it is not so.
    odoo.does("lie", Does::Answer(200));
    let id = enqueue(&mut sql, "lie", "");
    assert_eq!(comes_to(&mut sql, id, "failed")["deaths"], json!(5));
    let other = enqueue(&mut sql, "write", "");
    comes_to(&mut sql, other, "succeeded");
}

#[test]
fn a_late_answer_is_fenced_off_when_a_job_was_cancelled_or_has_timed_out() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &["imbus.odoo_jobs = 2"]);
    let mut sql = cluster.database("jo_late");
    odoo.connect(cluster.connect("jo_late"));
    odoo.does("wait", Does::Wait);
    let cancelled = enqueue(&mut sql, "wait", "");
    let late = enqueue(&mut sql, "wait", ", timeout => '300 ms'");
    odoo.wait("both are there", |calls| calls.len() == 2);
    assert!(sql.query_one("SELECT ir_async_cancel($1)", &[&cancelled]).unwrap().get::<_, bool>(0));
    let found = comes_to(&mut sql, late, "failed");
    assert_eq!(found["payload"]["error"]["code"], json!("timeout"));
    odoo.let_go();
    eventually("Odoo heard that neither is its own", || odoo.refused() == 2);
    assert_eq!(status(&mut sql, cancelled)["state"], json!("cancelled"));
    assert_eq!(status(&mut sql, late)["payload"]["error"]["code"], json!("timeout"));
}

#[test]
fn no_more_run_at_once_than_may_and_databases_share_the_places() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &["imbus.odoo_jobs = 2", "imbus.queues = 'one:1'"]);
    let mut first = cluster.database("jo_many_1");
    let mut second = cluster.database("jo_many_2");
    odoo.connect(cluster.connect("jo_many_1"));
    odoo.connect(cluster.connect("jo_many_2"));
    odoo.does("wait", Does::Wait);
    let jobs: Vec<i64> = (0..6).map(|_| enqueue(&mut first, "wait", "")).collect();
    odoo.wait("two are there", |calls| calls.len() == 2);
    let other = enqueue(&mut second, "write", "");
    odoo.let_go();
    comes_to(&mut second, other, "succeeded");
    for id in jobs {
        comes_to(&mut first, id, "succeeded");
    }
    assert!(odoo.most() <= 2, "{}", odoo.most());
    odoo.hold();
    for _ in 0..3 {
        enqueue(&mut first, "wait", ", queue => 'one'");
    }
    let mark = enqueue(&mut first, "write", "");
    comes_to(&mut first, mark, "succeeded");
    assert_eq!(
        value(&mut first, "SELECT count(*) FROM ir_async WHERE queue = 'one' AND state = 'processing'"),
        json!(1)
    );
    odoo.let_go();
    eventually("all have ended", || {
        value(&mut first, "SELECT count(*) FROM ir_async WHERE queue = 'one' AND state = 'succeeded'") == json!(3)
    });
}

#[test]
fn what_odoo_works_on_is_given_back_when_the_gateway_or_the_worker_ends() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &["imbus.odoo_jobs = 4"]);
    let mut sql = cluster.database("jo_ends");
    odoo.connect(cluster.connect("jo_ends"));
    odoo.does("wait", Does::Wait);
    let id = enqueue(&mut sql, "wait", "");
    for (times, backend) in [(1, "imbus gateway"), (2, "imbus database jo_ends")] {
        odoo.wait("it is there", |calls| calls.len() == times);
        let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE backend_type = $1";
        assert_eq!(sql.query_one(kill, &[&backend]).unwrap().get::<_, i64>(0), 1);
    }
    odoo.wait("it is there again", |calls| calls.len() == 3);
    let tokens: std::collections::HashSet<String> =
        odoo.calls().iter().map(|call| call.body["token"].to_string()).collect();
    assert_eq!(tokens.len(), 3, "each time another one");
    odoo.let_go();
    comes_to(&mut sql, id, "succeeded");
    eventually("the others were refused", || odoo.refused() == 2);
}

/// Enqueues jobs in one transaction, so that they come together.
fn enqueue_at_once(sql: &mut Client, methods: &[&str]) -> Vec<i64> {
    let job = |method: &&str| json!({"target": method, "args": [1], "model": "res.partner", "res_ids": [3]});
    let jobs: Value = methods.iter().map(job).collect();
    let rows = sql.query("SELECT ir_async_call_many($1::text::jsonb)", &[&jobs.to_string()]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Has so many short jobs run that those to come share calls.
fn warm_up(sql: &mut Client) {
    let jobs = enqueue_at_once(sql, &["write"; 40]);
    jobs.into_iter().for_each(|id| drop(comes_to(sql, id, "succeeded")));
}

#[test]
fn short_jobs_share_a_call_and_each_is_run_once() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &["imbus.odoo_jobs = 1"]);
    let mut sql = cluster.database("jo_company");
    odoo.connect(cluster.connect("jo_company"));
    // A machine may be so busy that the jobs of a while are not short.
    eventually("half of them share", || {
        let before = odoo.calls().len();
        let jobs = enqueue_at_once(&mut sql, &["write"; 100]);
        for id in &jobs {
            let found = comes_to(&mut sql, *id, "succeeded");
            assert_eq!((&found["attempts"], &found["deaths"], odoo.times(*id)), (&json!(1), &json!(0), 1));
        }
        odoo.calls().len() - before < jobs.len() / 2
    });
}

#[test]
fn a_job_that_dies_in_company_takes_no_other_along() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &["imbus.odoo_jobs = 1"]);
    let mut sql = cluster.database("jo_company_dies");
    odoo.connect(cluster.connect("jo_company_dies"));
    warm_up(&mut sql);
    odoo.does("die", Does::HangUp);
    let jobs = enqueue_at_once(&mut sql, &["write", "write", "die", "write", "write"]);
    for (place, id) in jobs.iter().enumerate() {
        let (state, deaths) = if place == 2 { ("failed", 5) } else { ("succeeded", 0) };
        let found = comes_to(&mut sql, *id, state);
        assert_eq!((&found["deaths"], odoo.times(*id)), (&json!(deaths), deaths.max(1)), "job {place}");
        assert_eq!(found["attempts"], json!(i32::from(place != 2)), "job {place}");
    }
}

#[test]
fn nobody_waits_for_a_slow_job_in_its_call() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &["imbus.odoo_jobs = 2"]);
    let mut sql = cluster.database("jo_company_slow");
    odoo.connect(cluster.connect("jo_company_slow"));
    warm_up(&mut sql);
    odoo.does("wait", Does::Wait);
    let jobs = enqueue_at_once(&mut sql, &["wait", "write", "write", "write", "write", "write"]);
    for id in &jobs[1..] {
        let found = comes_to(&mut sql, *id, "succeeded");
        assert_eq!((&found["attempts"], &found["deaths"], odoo.times(*id)), (&json!(1), &json!(0), 1));
    }
    assert_eq!(status(&mut sql, jobs[0])["state"], json!("processing"));
    odoo.let_go();
    comes_to(&mut sql, jobs[0], "succeeded");
}

#[test]
fn a_job_cancelled_while_it_waits_in_a_call_is_not_run() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &["imbus.odoo_jobs = 1"]);
    let mut sql = cluster.database("jo_company_cancel");
    odoo.connect(cluster.connect("jo_company_cancel"));
    warm_up(&mut sql);
    odoo.does("wait", Does::Wait);
    let jobs = enqueue_at_once(&mut sql, &["wait", "write", "write"]);
    eventually("the first is begun", || odoo.times(jobs[0]) == 1);
    assert!(sql.query_one("SELECT ir_async_cancel($1)", &[&jobs[1]]).unwrap().get::<_, bool>(0));
    odoo.let_go();
    comes_to(&mut sql, jobs[0], "succeeded");
    comes_to(&mut sql, jobs[2], "succeeded");
    assert_eq!((status(&mut sql, jobs[1])["state"].as_str(), odoo.times(jobs[1])), (Some("cancelled"), 0));
}

#[test]
fn odoo_settles_the_jobs_of_all_roles() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &[]);
    let mut sql = cluster.database("jo_roles");
    // Odoo's own role may read the table, as the owner of its database may; the job is a superuser's.
    sql.batch_execute("CREATE ROLE jo_odoo LOGIN; GRANT SELECT ON ir_async TO jo_odoo").unwrap();
    sql.batch_execute("GRANT EXECUTE ON FUNCTION ir_async_finish(bigint, text, jsonb) TO jo_odoo").unwrap();
    odoo.connect(cluster.connect_as("jo_roles", "jo_odoo"));
    let id = enqueue(&mut sql, "write", "");
    assert_eq!(comes_to(&mut sql, id, "succeeded")["deaths"], json!(0));
}

#[test]
fn what_odoo_has_begun_is_not_given_back() {
    let odoo = OdooRunner::start();
    let cluster = cluster(&odoo, &["imbus.odoo_jobs = 1"]);
    let mut sql = cluster.database("jo_company_begun");
    odoo.connect(cluster.connect("jo_company_begun"));
    odoo.does("wait", Does::Wait);
    let mut other = cluster.connect("jo_company_begun");
    let mut jobs = Vec::new();
    // On a busy machine it may have been given back before: once more, then.
    eventually("the second is begun", || {
        warm_up(&mut sql);
        odoo.hold();
        jobs = enqueue_at_once(&mut sql, &["wait", "write", "write"]);
        eventually("the first is begun", || odoo.times(jobs[0]) == 1);
        let token = odoo.calls().last().unwrap().body["token"].as_str().unwrap().to_owned();
        other.batch_execute("BEGIN").unwrap();
        let is_begun = other.query("SELECT ir_async_begin($1, $2)", &[&jobs[1], &token]).unwrap().len() == 1;
        if !is_begun {
            other.batch_execute("ROLLBACK").unwrap();
            odoo.let_go();
            jobs.iter().for_each(|id| drop(comes_to(&mut sql, *id, "succeeded")));
        }
        is_begun
    });
    comes_to(&mut sql, jobs[2], "created");
    assert_eq!(status(&mut sql, jobs[1])["state"], json!("processing"));
    other.batch_execute("ROLLBACK").unwrap();
    odoo.let_go();
    jobs.iter().for_each(|id| drop(comes_to(&mut sql, *id, "succeeded")));
    assert_eq!((odoo.times(jobs[1]), odoo.times(jobs[2])), (1, 1));
}
