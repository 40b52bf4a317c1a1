//! Jobs that are cut short, brought back or enqueued many at once.

mod common;

use common::{Cluster, eventually, refusal, shared};
use postgres::Client;
use serde_json::{Value, json};

fn value(sql: &mut Client, query: &str) -> Value {
    let text: Option<String> = sql.query_one(&format!("SELECT ({query})::text"), &[]).unwrap().get(0);
    text.map_or(Value::Null, |text| serde_json::from_str(&text).unwrap())
}

fn number(sql: &mut Client, query: &str) -> i64 {
    sql.query_one(&format!("SELECT ({query})::bigint"), &[]).unwrap().get(0)
}

fn is(sql: &mut Client, query: &str) -> bool {
    sql.query_one(&format!("SELECT {query}"), &[]).unwrap().get(0)
}

fn status(sql: &mut Client, id: i64) -> Value {
    value(sql, &format!("ir_async_status({id})"))
}

fn comes_to(sql: &mut Client, id: i64, state: &str) -> Value {
    eventually(&format!("job {id} is {state}"), || status(sql, id)["state"] == state);
    status(sql, id)
}

/// A database with a function that leaves a trace and then takes as long as it likes.
fn database(cluster: &Cluster, name: &str) -> Client {
    let mut sql = cluster.database(name);
    sql.batch_execute(
        "CREATE TABLE trace (what text);
         CREATE FUNCTION slow(seconds float) RETURNS int LANGUAGE plpgsql AS $$
         BEGIN INSERT INTO trace VALUES ('slow'); PERFORM pg_sleep(seconds); RETURN 1; END $$;
         CREATE FUNCTION stubborn(seconds float) RETURNS int LANGUAGE plpgsql AS $$
         DECLARE until timestamptz := clock_timestamp() + make_interval(secs => seconds);
         BEGIN
             WHILE clock_timestamp() < until LOOP
                 BEGIN PERFORM pg_sleep(0.05); EXCEPTION WHEN query_canceled THEN NULL; END;
             END LOOP;
             PERFORM pg_sleep(60); RETURN 1;
         END $$;
         CREATE FUNCTION quick(n int DEFAULT 1) RETURNS int LANGUAGE sql AS 'SELECT n';
         CREATE FUNCTION fail() RETURNS int LANGUAGE sql AS 'SELECT 1 / 0'",
    )
    .unwrap();
    sql
}

#[test]
fn a_job_that_waits_is_cancelled_with_the_transaction() {
    let mut sql = database(&shared(), "je_waits");
    let id = number(&mut sql, "ir_async_call('slow', '[0]', run_at => now() + '1 day')");
    let mut rolled = sql.transaction().unwrap();
    assert!(rolled.query_one("SELECT ir_async_cancel($1)", &[&id]).unwrap().get::<_, bool>(0));
    rolled.rollback().unwrap();
    assert_eq!(status(&mut sql, id)["state"], "created");
    assert!(is(&mut sql, &format!("ir_async_cancel({id})")));
    let found = status(&mut sql, id);
    assert_eq!((&found["state"], found["finished_at"].is_null()), (&json!("cancelled"), false));
    assert!(!is(&mut sql, &format!("ir_async_cancel({id})")));
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM trace)"), 0);
}

#[test]
fn a_job_that_runs_is_stopped_and_its_effect_undone() {
    let cluster = shared();
    let mut sql = database(&cluster, "je_runs");
    let mut socket = cluster.subscriber(&mut sql, json!(["jobs"]), 0);
    for function in ["slow", "stubborn"] {
        let seconds = if function == "slow" { 60.0 } else { 0.3 };
        let text = format!("ir_async_call_notify('n', '{function}', '[{seconds}]', '{{}}', '\"jobs\"')");
        let id = number(&mut sql, &text);
        comes_to(&mut sql, id, "processing");
        eventually("it is at work", || {
            is(
                &mut sql,
                "EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'imbus job je_runs' AND state = 'active')",
            )
        });
        assert!(is(&mut sql, &format!("ir_async_cancel({id})")));
        let found = comes_to(&mut sql, id, "cancelled");
        assert_eq!((&found["attempts"], &found["deaths"]), (&json!(1), &json!(0)));
        let states: Vec<Value> = (0..3).map(|_| socket.payload()["state"].clone()).collect();
        assert_eq!(states, [json!("created"), json!("processing"), json!("cancelled")]);
    }
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM trace)"), 0);
    // The runner serves the next one.
    let id = number(&mut sql, "ir_async_call('quick')");
    assert_eq!(comes_to(&mut sql, id, "succeeded")["payload"]["result"], 1);
}

#[test]
fn a_timeout_ends_an_attempt_and_the_next_one_comes_later() {
    let mut sql = database(&shared(), "je_timeout");
    let arguments = "max_attempts => 2, retry_delay => '10 ms', timeout => '200 ms'";
    for (function, seconds) in [("slow", 60), ("stubborn", 0)] {
        let id = number(&mut sql, &format!("ir_async_call('{function}', '[{seconds}]', {arguments})"));
        let found = comes_to(&mut sql, id, "failed");
        assert_eq!(found["payload"]["error"]["code"], "timeout", "{found}");
        let errors = found["errors"].as_array().unwrap();
        let attempts: Vec<&Value> = errors.iter().map(|error| &error["attempt"]).collect();
        assert_eq!(attempts, [&json!(1), &json!(2)]);
        assert!(errors.iter().all(|error| error["error"]["code"] == "timeout"), "{errors:?}");
    }
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM trace)"), 0);
    let id = number(&mut sql, "ir_async_call('slow', '[0.01]', timeout => '1 minute')");
    comes_to(&mut sql, id, "succeeded");
    for bad in ["timeout => '0'", "timeout => '-1 s'", "timeout => '2 years'", "retry_delay => '-1 s'"] {
        assert_eq!(refusal(sql.query(&format!("SELECT ir_async_call('quick', {bad})"), &[])), "22023", "{bad}");
    }
}

#[test]
fn each_attempt_waits_twice_as_long_up_to_an_hour() {
    let mut sql = database(&shared(), "je_backoff");
    let id = number(&mut sql, "ir_async_call('fail', max_attempts => 30, retry_delay => '1 day')");
    eventually("it has failed once", || status(&mut sql, id)["attempts"] == 1);
    comes_to(&mut sql, id, "created");
    sql.batch_execute(
        "CREATE FUNCTION wait_of(n bigint) RETURNS float LANGUAGE sql AS
         'SELECT EXTRACT(epoch FROM run_at - write_date AT TIME ZONE ''UTC'')::float FROM ir_async WHERE id = n'",
    )
    .unwrap();
    let wait_of = |sql: &mut Client, id: i64| -> f64 { sql.query_one("SELECT wait_of($1)", &[&id]).unwrap().get(0) };
    // A delay longer than an hour stays as it is.
    let first = wait_of(&mut sql, id) / 86_400.0;
    assert!((0.9..1.3).contains(&first), "{first}");
    let id = number(&mut sql, "ir_async_call('fail', max_attempts => 3, retry_delay => '10 minutes')");
    let mut waits = Vec::new();
    for attempt in 1..3 {
        eventually("it has failed again", || {
            let found = status(&mut sql, id);
            found["attempts"] == attempt && found["state"] == "created"
        });
        waits.push(wait_of(&mut sql, id) / 600.0);
        assert_eq!(sql.execute("UPDATE ir_async SET run_at = now() WHERE id = $1", &[&id]).unwrap(), 1);
    }
    assert!((0.99..1.26).contains(&waits[0]) && (1.99..2.51).contains(&waits[1]), "{waits:?}");
}

#[test]
fn who_has_failed_or_was_cancelled_is_brought_back() {
    let mut sql = database(&shared(), "je_retry");
    let id = number(&mut sql, "ir_async_call('fail')");
    comes_to(&mut sql, id, "failed");
    sql.batch_execute("CREATE OR REPLACE FUNCTION fail() RETURNS int LANGUAGE sql AS 'SELECT 5'").unwrap();
    assert!(is(&mut sql, &format!("ir_async_retry({id})")));
    let found = comes_to(&mut sql, id, "succeeded");
    assert_eq!((&found["payload"]["result"], &found["attempts"]), (&json!(5), &json!(1)));
    assert_eq!(found["errors"].as_array().unwrap().len(), 1);
    assert_eq!(refusal(sql.query("SELECT ir_async_retry($1)", &[&id])), "55000");
    assert!(!is(&mut sql, &format!("ir_async_cancel({id})")));
    let id = number(&mut sql, "ir_async_call('quick', run_at => now() + '1 day')");
    assert!(!is(&mut sql, &format!("ir_async_retry({id})")));
    assert!(is(&mut sql, &format!("ir_async_cancel({id})")));
    assert!(is(&mut sql, &format!("ir_async_retry({id})")));
    comes_to(&mut sql, id, "succeeded");
    // Not beside another one with its identity_key.
    let later = "ir_async_call('quick', identity_key => 'one', run_at => now() + '1 day')";
    let first = number(&mut sql, later);
    assert!(is(&mut sql, &format!("ir_async_cancel({first})")));
    let second = number(&mut sql, later);
    assert_ne!(first, second);
    let error = sql.query("SELECT ir_async_retry($1)", &[&first]).unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code().code(), "23505");
    assert_eq!(error.detail(), Some(&*format!("Job {second} has the same identity_key, and has not ended.")));
    assert!(is(&mut sql, &format!("ir_async_cancel({second})")));
    assert!(is(&mut sql, &format!("ir_async_retry({first})")));
}

#[test]
fn what_has_ended_is_deleted_after_its_retention_and_what_failed_is_kept() {
    let mut sql = database(&shared(), "je_retention");
    let mut ids = [0; 6];
    for (id, target) in ids.iter_mut().zip(["quick", "quick", "fail", "slow", "slow", "quick"]) {
        let later = if target == "slow" { ", '[0]', run_at => now() + '1 day'" } else { "" };
        *id = number(&mut sql, &format!("ir_async_call('{target}'{later})"));
    }
    let [done, succeeded, failed, cancelled, waiting, young] = ids;
    for (id, state) in [(done, "succeeded"), (succeeded, "succeeded"), (young, "succeeded"), (failed, "failed")] {
        comes_to(&mut sql, id, state);
    }
    assert!(is(&mut sql, &format!("ir_async_complete({done})")));
    assert!(is(&mut sql, &format!("ir_async_cancel({cancelled})")));
    let old = [done, succeeded, failed, cancelled];
    sql.execute(
        "UPDATE ir_async SET finished_at = now() - interval '3 days 1 minute' WHERE id = ANY($1)",
        &[&&old[..]],
    )
    .unwrap();
    // It is done each minute, and when settings are read again.
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    let left = "(SELECT jsonb_agg(id ORDER BY id) FROM ir_async)";
    eventually("the old ones are deleted", || value(&mut sql, left) == json!([failed, waiting, young]));
    assert!(is(&mut sql, &format!("ir_async_retry({failed})")));
    let before = comes_to(&mut sql, failed, "failed");
    // Or discarded.
    assert!(is(&mut sql, &format!("ir_async_cancel({failed})")));
    let after = value(&mut sql, &format!("ir_async_status({failed})"));
    assert_eq!((&after["state"], &after["payload"]), (&json!("cancelled"), &before["payload"]));
    assert!(!is(&mut sql, &format!("ir_async_cancel({failed})")));
    sql.execute("UPDATE ir_async SET finished_at = now() - interval '4 days' WHERE id = $1", &[&failed]).unwrap();
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    eventually("it is deleted", || value(&mut sql, left) == json!([waiting, young]));
}

#[test]
fn only_its_own_role_ends_a_job_or_brings_it_back() {
    let cluster = shared();
    let mut sql = database(&cluster, "je_rights");
    sql.batch_execute(
        "CREATE ROLE je_stranger LOGIN; GRANT EXECUTE ON FUNCTION ir_async_cancel, ir_async_retry TO je_stranger",
    )
    .unwrap();
    let id = number(&mut sql, "ir_async_call('quick', run_at => now() + '1 day')");
    let mut stranger = cluster.connect_as("je_rights", "je_stranger");
    assert_eq!(refusal(stranger.query("SELECT ir_async_cancel($1)", &[&id])), "42501");
    assert_eq!(refusal(stranger.query("SELECT ir_async_retry($1)", &[&id])), "42501");
    assert_eq!(refusal(stranger.query("SELECT ir_async_cancel(-1)", &[])), "42704");
    let mut nobody = cluster.connect_as("je_rights", "je_stranger");
    nobody.batch_execute("SET ROLE je_stranger").unwrap();
    assert_eq!(refusal(nobody.query("SELECT ir_async_call_many('[]')", &[])), "42501");
}

#[test]
fn many_are_enqueued_in_order_or_none() {
    let mut sql = database(&shared(), "je_many");
    let jobs: Vec<Value> = (0..500).map(|n| json!({"target": "quick", "args": [n], "priority": 500 - n})).collect();
    let ids: Vec<i64> = sql
        .query("SELECT ir_async_call_many($1::text::jsonb)", &[&json!(jobs).to_string()])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(ids.len(), 500);
    assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
    for (n, id) in ids.iter().enumerate().step_by(99) {
        assert_eq!(comes_to(&mut sql, *id, "succeeded")["payload"]["result"], n);
    }
    let same = json!([{"target": "quick", "identity_key": "k", "run_at": "2100-01-01", "retry_delay": "3 s",
                       "timeout": "1 minute", "kwargs": {"n": 7}, "notify": "jobs", "description": "d"},
                      {"target": "quick", "identity_key": "k"}]);
    let rows = sql.query("SELECT ir_async_call_many($1::text::jsonb)", &[&same.to_string()]).unwrap();
    assert_eq!(rows[0].get::<_, i64>(0), rows[1].get::<_, i64>(0));
    let before = number(&mut sql, "(SELECT count(*) FROM ir_async)");
    for (bad, code) in [
        (json!([{"target": "quick"}, {"target": "nothing"}]), "42883"),
        (json!([{"target": "quick", "tagret": 1}]), "22023"),
        (json!({"target": "quick"}), "22023"),
        (json!([1]), "22023"),
        (json!([{"args": []}]), "22004"),
        (json!([{"target": "quick", "run_at": "never"}]), "22007"),
    ] {
        let result = sql.query("SELECT ir_async_call_many($1::text::jsonb)", &[&bad.to_string()]);
        assert_eq!(refusal(result), code, "{bad}");
    }
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async)"), before);
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async_call_many('[]'))"), 0);
}
