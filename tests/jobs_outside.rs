//! Runners outside: they claim through SQL, and their claims end with their sessions.

mod common;

use common::{Cluster, eventually, kill_9, recovered, refusal, shared};
use postgres::Client;
use serde_json::{Value, json};

fn value(sql: &mut Client, query: &str) -> Value {
    let text: Option<String> = sql.query_one(&format!("SELECT ({query})::text"), &[]).unwrap().get(0);
    text.map_or(Value::Null, |text| serde_json::from_str(&text).unwrap())
}

fn number(sql: &mut Client, query: &str) -> i64 {
    sql.query_one(&format!("SELECT ({query})::bigint"), &[]).unwrap().get(0)
}

fn status(sql: &mut Client, id: i64) -> Value {
    value(sql, &format!("ir_async_status({id})"))
}

fn comes_to(sql: &mut Client, id: i64, state: &str) -> Value {
    eventually(&format!("job {id} is {state}"), || status(sql, id)["state"] == state);
    status(sql, id)
}

/// What a runner has claimed: the ids and their tokens.
fn claim(runner: &mut Client, queue: &str, count: i32) -> Vec<(i64, String)> {
    let rows = runner.query("SELECT id, token FROM ir_async_claim($1, $2, 'a runner')", &[&queue, &count]).unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

fn backend(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

/// A cluster of which the queues `out` and `other` are left to runners outside.
fn cluster() -> Cluster {
    Cluster::start_with(&["imbus.queues = 'out:0, other:0, pair:2, one:1'"])
}

/// Enqueues for runners outside, who know what `work` is.
fn enqueue(sql: &mut Client, options: &str) -> i64 {
    number(sql, &format!("ir_async_call('work', '[1, \"x\"]', '{{\"k\": true}}', queue => 'out' {options})"))
}

#[test]
fn a_runner_claims_works_and_ends() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_ends");
    let mut runner = cluster.connect("jx_ends");
    let mut socket = cluster.subscriber(&mut sql, json!(["jobs"]), 0);
    let notify = ", description => 'Work', notify => '\"jobs\"'";
    let id =
        enqueue(&mut sql, &format!("{notify}, user_id => 7, context => '{{\"lang\": \"de\"}}', timeout => '1 hour'"));
    let row = runner
        .query_one(
            "SELECT id, token, name, target, args::text, kwargs::text, user_id, context::text, attempt, timeout::text,
                    model IS NULL AND res_ids IS NULL AND su IS NULL FROM ir_async_claim('out', 5, 'a runner')",
            &[],
        )
        .unwrap();
    let text = |column: usize| row.get::<_, String>(column);
    assert_eq!((row.get::<_, i64>(0), text(2), text(3)), (id, "Work".into(), "work".into()));
    assert_eq!((text(4), text(5)), (r#"[1, "x"]"#.into(), r#"{"k": true}"#.into()));
    assert_eq!((row.get::<_, i32>(6), text(7)), (7, r#"{"lang": "de"}"#.into()));
    assert_eq!((row.get::<_, i32>(8), text(9), row.get::<_, bool>(10)), (1, "01:00:00".into(), true));
    let token = text(1);
    let found = status(&mut sql, id);
    assert_eq!(
        (&found["state"], &found["worker"], &found["attempts"]),
        (&json!("processing"), &json!("a runner"), &json!(1))
    );
    runner.execute("SELECT ir_async_progress($1, $2, 40, 'almost')", &[&id, &token]).unwrap();
    assert_eq!(status(&mut sql, id)["progress"], json!({"percent": 40, "message": "almost"}));
    runner.execute("SELECT ir_async_finish($1, $2, '{\"rows\": 3}')", &[&id, &token]).unwrap();
    let found = status(&mut sql, id);
    assert_eq!((&found["state"], &found["payload"]), (&json!("succeeded"), &json!({"result": {"rows": 3}})));
    let told: Vec<Value> = (0..4).map(|_| socket.payload()).collect();
    let states: Vec<&Value> = told.iter().map(|told| &told["state"]).collect();
    assert_eq!(states, ["created", "processing", "processing", "succeeded"]);
    assert_eq!(told[2]["progress"], json!({"percent": 40, "message": "almost"}));
    assert!(claim(&mut runner, "out", 5).is_empty());
    // Without a result it is done at once; null is none.
    for result in ["NULL", "'null'"] {
        let id = enqueue(&mut sql, "");
        let token = claim(&mut runner, "out", 1).remove(0).1;
        runner.batch_execute(&format!("SELECT ir_async_finish({id}, '{token}', {result})")).unwrap();
        assert_eq!(status(&mut sql, id)["state"], "done");
    }
}

#[test]
fn a_failure_is_tried_again_unless_that_is_of_no_use() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_fails");
    let mut runner = cluster.connect("jx_fails");
    let id = enqueue(&mut sql, ", max_attempts => 2, retry_delay => '0'");
    for (attempt, state) in [(1, "created"), (2, "failed")] {
        let token = claim(&mut runner, "out", 1).remove(0).1;
        let error = r#"{"code": 418, "message": "no tea", "data": {"debug": "Traceback: no tea"}}"#;
        runner.batch_execute(&format!("SELECT ir_async_fail({id}, '{token}', '{error}')")).unwrap();
        let found = status(&mut sql, id);
        assert_eq!((&found["state"], &found["attempts"]), (&json!(state), &json!(attempt)));
        assert_eq!(found["errors"].as_array().unwrap().len(), attempt as usize);
    }
    let error = &status(&mut sql, id)["payload"]["error"];
    assert_eq!(error, &json!({"code": 418, "message": "no tea", "data": {"debug": "Traceback: no tea"}}));
    let traceback: String = sql.query_one("SELECT traceback FROM ir_async WHERE id = $1", &[&id]).unwrap().get(0);
    assert_eq!(traceback, "Traceback: no tea");
    let id = enqueue(&mut sql, ", max_attempts => 9");
    let token = claim(&mut runner, "out", 1).remove(0).1;
    runner
        .batch_execute(&format!(
            "SELECT ir_async_fail({id}, '{token}', '{{\"message\": \"never\", \"retry\": false}}')"
        ))
        .unwrap();
    assert_eq!(status(&mut sql, id)["state"], "failed");
    let id = enqueue(&mut sql, "");
    let token = claim(&mut runner, "out", 1).remove(0).1;
    for wrong in ["'1'", "'{}'", "'[]'"] {
        let text = format!("SELECT ir_async_fail({id}, '{token}', {wrong})");
        assert_eq!(refusal(runner.query(&text, &[])), "22023");
    }
    for wrong in ["-1", "101", "'NaN'"] {
        let text = format!("SELECT ir_async_progress({id}, '{token}', {wrong})");
        assert_eq!(refusal(runner.query(&text, &[])), "22023");
    }
    for wrong in ["0", "10001"] {
        assert_eq!(refusal(runner.query(&format!("SELECT * FROM ir_async_claim('out', {wrong})"), &[])), "22023");
    }
}

#[test]
fn a_runner_that_dies_is_noticed_at_once_and_its_late_answer_refused() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_dies");
    let mut runner = cluster.connect("jx_dies");
    let first = enqueue(&mut sql, "");
    let second = enqueue(&mut sql, "");
    let claimed = claim(&mut runner, "out", 2);
    assert_eq!(claimed.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [first, second]);
    drop(runner);
    for id in [first, second] {
        let found = comes_to(&mut sql, id, "created");
        assert_eq!((&found["deaths"], &found["attempts"]), (&json!(1), &json!(0)));
    }
    let mut other = cluster.connect("jx_dies");
    let again = claim(&mut other, "out", 1).remove(0);
    assert_eq!(again.0, first);
    // Who had it before is late, with whatever it did in the same transaction.
    for answer in ["ir_async_finish($1, $2)", "ir_async_fail($1, $2, '\"no\"')", "ir_async_progress($1, $2)"] {
        assert_eq!(refusal(sql.query(&format!("SELECT {answer}"), &[&first, &claimed[0].1])), "55000", "{answer}");
    }
    // The right one may answer from another session.
    sql.execute("SELECT ir_async_finish($1, $2)", &[&first, &again.1]).unwrap();
    assert_eq!(status(&mut sql, first)["state"], "done");
    assert_eq!(refusal(sql.query("SELECT ir_async_finish($1, $2)", &[&first, &again.1])), "55000");
}

#[test]
fn claims_do_not_survive_their_servers_crash() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_crash");
    let mut runner = cluster.connect("jx_crash");
    let id = enqueue(&mut sql, "");
    let claimed = claim(&mut runner, "out", 1).remove(0);
    kill_9(backend(&mut runner));
    eventually("the server has noticed", || sql.simple_query("SELECT 1").is_err());
    let mut sql = recovered(&cluster, "jx_crash");
    comes_to(&mut sql, id, "created");
    assert_eq!(refusal(sql.query("SELECT ir_async_finish($1, $2)", &[&id, &claimed.1])), "55000");
}

#[test]
fn a_claim_that_is_rolled_back_never_was() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_rolled");
    let mut runner = cluster.connect("jx_rolled");
    let id = enqueue(&mut sql, "");
    let mut rolled = runner.transaction().unwrap();
    let claimed: i64 = rolled.query_one("SELECT id FROM ir_async_claim('out')", &[]).unwrap().get(0);
    assert_eq!(claimed, id);
    assert!(claim(&mut sql, "out", 1).is_empty());
    rolled.rollback().unwrap();
    assert_eq!(claim(&mut sql, "out", 1).len(), 1);
}

#[test]
fn a_silent_runner_loses_its_job_and_progress_keeps_it() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_silent");
    let mut runner = cluster.connect("jx_silent");
    let silent = enqueue(&mut sql, ", timeout => '300 ms'");
    let kept = enqueue(&mut sql, ", timeout => '1 hour'");
    let claimed = claim(&mut runner, "out", 2);
    comes_to(&mut sql, silent, "created");
    assert_eq!(refusal(sql.query("SELECT ir_async_finish($1, $2)", &[&silent, &claimed[0].1])), "55000");
    // As if it had been claimed two hours ago, and told of its progress just now.
    sql.execute("SELECT ir_async_progress($1, $2, 1)", &[&kept, &claimed[1].1]).unwrap();
    sql.execute("UPDATE ir_async SET claimed_at = now() - interval '2 hours' WHERE id = $1", &[&kept]).unwrap();
    let again = claim(&mut runner, "out", 1).remove(0);
    assert_eq!(again.0, silent);
    comes_to(&mut sql, silent, "created");
    assert_eq!(status(&mut sql, kept)["state"], "processing");
    sql.execute("SELECT ir_async_finish($1, $2)", &[&kept, &claimed[1].1]).unwrap();
}

#[test]
fn a_runner_has_its_own_roles_jobs_only() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_roles");
    sql.batch_execute(
        "CREATE ROLE jx_a LOGIN; CREATE ROLE jx_b LOGIN; CREATE ROLE jx_ab LOGIN IN ROLE jx_a, jx_b;
         GRANT EXECUTE ON FUNCTION ir_async_call, ir_async_claim, ir_async_finish, ir_async_status TO jx_a, jx_b",
    )
    .unwrap();
    let (mut a, mut b) = (cluster.connect_as("jx_roles", "jx_a"), cluster.connect_as("jx_roles", "jx_b"));
    let id = enqueue(&mut a, "");
    assert!(claim(&mut b, "out", 5).is_empty());
    let claimed = claim(&mut a, "out", 5);
    assert_eq!(claimed.len(), 1);
    // A token that got about is of no use to another role.
    assert_eq!(refusal(b.query("SELECT ir_async_finish($1, $2)", &[&id, &claimed[0].1])), "55000");
    let mut member = cluster.connect_as("jx_roles", "jx_ab");
    let (second, third) = (enqueue(&mut a, ""), enqueue(&mut b, ""));
    let mut ids: Vec<i64> = claim(&mut member, "out", 5).into_iter().map(|(id, _)| id).collect();
    ids.sort_unstable();
    assert_eq!(ids, [second, third]);
}

#[test]
fn a_queue_processes_no_more_than_its_limit_and_takes_a_new_one() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_limit");
    sql.batch_execute(
        "CREATE TABLE seen (at_once bigint);
         CREATE FUNCTION look() RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO seen SELECT count(*) FROM ir_async WHERE state = 'processing' AND queue = 'pair';
             PERFORM pg_sleep(0.05);
         END $$",
    )
    .unwrap();
    sql.batch_execute("SELECT ir_async_call('look', queue => 'pair') FROM generate_series(1, 40)").unwrap();
    eventually("they have ended", || number(&mut sql, "(SELECT count(*) FROM seen)") == 40);
    assert_eq!(number(&mut sql, "(SELECT max(at_once) FROM seen)"), 2);
    // Runners outside count too. The worker offers these jobs to Odoo, where nobody answers, and gives them back.
    let mut runner = cluster.connect("jx_limit");
    for _ in 0..3 {
        number(&mut sql, "ir_async_call('pg_catalog.now', queue => 'one', model => 'res.partner')");
    }
    let mut claimed = Vec::new();
    eventually("one is claimed", || {
        claimed = claim(&mut runner, "one", 5);
        !claimed.is_empty()
    });
    assert_eq!(claimed.len(), 1);
    assert!(claim(&mut runner, "one", 5).is_empty());
    sql.batch_execute("ALTER SYSTEM SET imbus.queues = 'out:0, one:2'").unwrap();
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    let mut second = Vec::new();
    eventually("the new limit is in force", || {
        second = claim(&mut runner, "one", 5);
        !second.is_empty()
    });
    assert_eq!(second.len(), 1);
    let refused = sql.batch_execute("ALTER SYSTEM SET imbus.queues = 'out'").unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "22023");
}

#[test]
fn runners_that_always_have_a_next_job_hear_of_a_new_limit() {
    // Where there are limits before, who counts keeps runners from claiming now and then.
    let cluster = Cluster::start_with(&["imbus.queues = ''"]);
    let mut sql = cluster.database("jx_busy");
    sql.batch_execute("CREATE FUNCTION nap() RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(0.05)'").unwrap();
    sql.batch_execute("SELECT ir_async_call('nap', queue => 'busy') FROM generate_series(1, 2000)").unwrap();
    let count = |sql: &mut Client, state: &str| {
        number(sql, &format!("(SELECT count(*) FROM ir_async WHERE state = '{state}')"))
    };
    eventually("several run", || count(&mut sql, "processing") > 2);
    sql.batch_execute("ALTER SYSTEM SET imbus.queues = 'busy:1'").unwrap();
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    eventually("one runs at a time", || (0..40).all(|_| count(&mut sql, "processing") <= 1));
    assert!(count(&mut sql, "created") > 0, "none was idle meanwhile");
}

#[test]
fn jobs_of_a_queue_that_is_no_longer_left_to_others_run_here() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_taken_back");
    sql.batch_execute(
        "CREATE SCHEMA theirs; CREATE FUNCTION theirs.add(a int, b int) RETURNS int LANGUAGE sql AS 'SELECT a + b';
         CREATE FUNCTION add(a text) RETURNS text LANGUAGE sql AS 'SELECT a';
         SET search_path = theirs, public",
    )
    .unwrap();
    let id = number(&mut sql, "ir_async_call('add', '[1]', '{\"b\": 2}', queue => 'out')");
    let unknown = number(&mut sql, "ir_async_call('what_they_do', queue => 'out')");
    sql.batch_execute("ALTER SYSTEM SET imbus.queues = 'one:1'").unwrap();
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    assert_eq!(comes_to(&mut sql, id, "succeeded")["payload"]["result"], 3);
    // It is not lost either.
    let found = comes_to(&mut sql, unknown, "failed");
    assert_eq!(found["payload"]["error"]["code"], "42883", "{found}");
    sql.batch_execute("ALTER SYSTEM SET imbus.queues = 'out:0'").unwrap();
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    let mut runner = cluster.connect("jx_taken_back");
    eventually("it is claimed", || {
        // Who has not heard of the settings yet may have had it fail once more.
        sql.query_one("SELECT ir_async_retry($1)", &[&unknown]).unwrap();
        !claim(&mut runner, "out", 5).is_empty()
    });
}

#[test]
fn what_anybody_can_lock_keeps_nobody_from_claiming() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_locks");
    sql.batch_execute("CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'; CREATE ROLE jx_rogue LOGIN")
        .unwrap();
    let mut rogue = cluster.connect_as("jx_locks", "jx_rogue");
    // Every advisory lock that is held while somebody counts.
    rogue.batch_execute("SELECT pg_advisory_lock(1768780402, 1)").unwrap();
    let mut runner = cluster.connect("jx_locks");
    runner.batch_execute("SET lock_timeout = '20s'").unwrap();
    let mut claiming = runner.transaction().unwrap();
    claiming.query("SELECT * FROM ir_async_claim('pair')", &[]).unwrap();
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')"), 1, "the rogue's");
    claiming.commit().unwrap();
    let id = number(&mut sql, "ir_async_call('one', queue => 'pair')");
    comes_to(&mut sql, id, "succeeded");
}

#[test]
fn jobs_that_all_have_priorities_of_their_own_are_claimed_in_their_order() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_lanes");
    let text = "SELECT count(ir_async_call('work', queue => 'out', priority => (n * 7919) % 3000,
                                           run_at => CASE WHEN n % 3 = 0 THEN now() + interval '1 day' END))
                  FROM generate_series(1, 3000) n";
    assert_eq!(sql.query_one(text, &[]).unwrap().get::<_, i64>(0), 3000);
    let mut runner = cluster.connect("jx_lanes");
    let mut seen: Vec<i64> = Vec::new();
    loop {
        let claimed = claim(&mut runner, "out", 90);
        if claimed.is_empty() {
            break;
        }
        seen.extend(claimed.iter().map(|(id, _)| id));
    }
    assert_eq!(seen.len(), 2000, "all that are due");
    let order =
        "SELECT priority FROM unnest($1::bigint[]) WITH ORDINALITY u (id, n) JOIN ir_async USING (id) ORDER BY n";
    let priorities: Vec<i32> = sql.query(order, &[&seen]).unwrap().iter().map(|row| row.get(0)).collect();
    assert!(priorities.is_sorted(), "{priorities:?}");
}

#[test]
fn while_a_job_is_worked_on_outside_no_transaction_is_open() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_idle");
    let id = enqueue(&mut sql, "");
    let mut runner = cluster.connect("jx_idle");
    let (claimed, token) = claim(&mut runner, "out", 1).remove(0);
    assert_eq!((claimed, status(&mut sql, id)["state"].as_str()), (id, Some("processing")));
    // But for what looks on for a moment.
    let open = "(SELECT count(*) FROM pg_stat_activity WHERE datname = 'jx_idle' AND pid <> pg_backend_pid()
                    AND (xact_start IS NOT NULL OR backend_xmin IS NOT NULL OR backend_xid IS NOT NULL))";
    eventually("nobody has one", || number(&mut sql, open) == 0);
    runner.execute("SELECT ir_async_finish($1, $2)", &[&id, &token]).unwrap();
    assert_eq!(status(&mut sql, id)["state"], "done");
    // Nobody is told of its end, which is recorded as any other.
    let row = "to_jsonb(j) || jsonb_build_object('ordered', claimed_at < finished_at AND write_date = finished_at AT TIME ZONE 'UTC')
                 FROM ir_async j";
    let row = value(&mut sql, &format!("SELECT {row}"));
    let seen = ["attempts", "worker", "ordered", "token", "session", "payload"].map(|column| row[column].clone());
    assert_eq!(json!(seen), json!([1, "a runner", true, null, null, null]));
}

#[test]
fn a_job_on_a_model_keeps_its_records_and_waits_for_odoo() {
    let cluster = shared();
    let mut sql = cluster.database("jx_model");
    let arguments = "'action_export', '[]', model => 'res.partner', res_ids => '{3,5}', user_id => 2, su => true";
    let id = number(&mut sql, &format!("ir_async_call({arguments})"));
    let done = number(&mut sql, "ir_async_call('pg_catalog.now')");
    comes_to(&mut sql, done, "succeeded");
    // It is offered to Odoo, where nobody answers, and given back.
    assert_eq!(comes_to(&mut sql, id, "created")["payload"], Value::Null);
    let claim = "SELECT id, target, model, res_ids::text, su FROM ir_async_claim('default')";
    let mut claimed = None;
    eventually("it is claimed", || {
        claimed = sql.query_opt(claim, &[]).unwrap();
        claimed.is_some()
    });
    let row = claimed.unwrap();
    assert_eq!(row.get::<_, i64>(0), id);
    assert_eq!((row.get::<_, String>(1), row.get::<_, String>(2)), ("action_export".into(), "res.partner".into()));
    assert_eq!((row.get::<_, String>(3), row.get::<_, bool>(4)), ("[3, 5]".into(), true));
    for lost in ["res_ids => '{1}'", "su => true", "model => ''"] {
        assert_eq!(refusal(sql.query(&format!("SELECT ir_async_call('pg_catalog.now', {lost})"), &[])), "22023");
    }
}

#[test]
fn who_cancels_a_claimed_job_takes_it_from_its_runner() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_cancel");
    let mut runner = cluster.connect("jx_cancel");
    let id = enqueue(&mut sql, "");
    let claimed = claim(&mut runner, "out", 1).remove(0);
    sql.execute("SELECT ir_async_cancel($1)", &[&id]).unwrap();
    assert_eq!(status(&mut sql, id)["state"], "cancelled");
    assert_eq!(refusal(runner.query("SELECT ir_async_progress($1, $2)", &[&id, &claimed.1])), "55000");
}

#[test]
fn a_runner_whose_job_is_cancelled_as_it_ends_it_has_done_nothing() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_beside");
    sql.batch_execute("CREATE TABLE done (job bigint)").unwrap();
    let mut other = cluster.connect("jx_beside");
    for (isolation, refused) in [("READ COMMITTED", "55000"), ("REPEATABLE READ", "40001")] {
        for committed in [true, false] {
            let mut runner = cluster.connect("jx_beside");
            let pid = backend(&mut runner);
            let id = enqueue(&mut sql, "");
            let token = claim(&mut runner, "out", 1).remove(0).1;
            runner.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}")).unwrap();
            assert_eq!(runner.query("SELECT ir_async_begin($1, $2)", &[&id, &token]).unwrap().len(), 1);
            runner.execute("INSERT INTO done VALUES ($1)", &[&id]).unwrap();
            other.batch_execute("BEGIN").unwrap();
            other.execute("SELECT ir_async_cancel($1)", &[&id]).unwrap();
            let ending = std::thread::spawn(move || {
                let ended = runner.query("SELECT ir_async_finish($1, $2, '1')", &[&id, &token]);
                runner.batch_execute(if ended.is_ok() { "COMMIT" } else { "ROLLBACK" }).unwrap();
                ended
            });
            eventually("it waits", || number(&mut sql, &format!("cardinality(pg_blocking_pids({pid}))")) == 1);
            other.batch_execute(if committed { "COMMIT" } else { "ROLLBACK" }).unwrap();
            let ended = ending.join().unwrap();
            let state = status(&mut sql, id)["state"].clone();
            let done = number(&mut sql, &format!("(SELECT count(*) FROM done WHERE job = {id})"));
            match committed {
                true => assert_eq!((refusal(ended), state, done), (refused.to_owned(), json!("cancelled"), 0)),
                false => assert_eq!((ended.unwrap().len(), state, done), (1, json!("succeeded"), 1)),
            }
        }
    }
}

#[test]
fn a_job_that_is_ended_again_after_a_savepoint_has_ended_once() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_savepoint");
    let mut runner = cluster.connect("jx_savepoint");
    // Too long to be kept in its row.
    let long = "(SELECT jsonb_agg(md5(n::text)) FROM generate_series(1, 2000) n)";
    let key = "identity_key => 'k'";
    let id = number(&mut sql, &format!("ir_async_call('work', {long}, queue => 'out', {key})"));
    let next = enqueue(&mut sql, &format!(", depends_on => '{{{id}}}'"));
    let token = claim(&mut runner, "out", 1).remove(0).1;
    let finish = format!("SELECT ir_async_finish({id}, '{token}', {long})");
    let state = format!("SELECT state FROM ir_async WHERE id = {id}");
    runner.batch_execute(&format!("BEGIN; SELECT ir_async_begin({id}, '{token}'); SAVEPOINT s; {finish}")).unwrap();
    assert_eq!(runner.query_one(&state, &[]).unwrap().get::<_, String>(0), "succeeded");
    runner.batch_execute("ROLLBACK TO s").unwrap();
    assert_eq!(runner.query_one(&state, &[]).unwrap().get::<_, String>(0), "processing");
    runner.batch_execute(&finish).unwrap();
    assert_eq!(refusal(runner.query(&finish, &[])), "55000");
    runner.batch_execute("ROLLBACK").unwrap();
    assert_eq!(status(&mut sql, id)["state"], "processing");
    runner.batch_execute(&finish).unwrap();
    let whole = format!("count(*) FROM ir_async WHERE id = {id} AND args = {long} AND payload -> 'result' = {long}");
    assert_eq!(number(&mut sql, &format!("SELECT {whole}")), 1);
    // Its key is free, and who waits for it waits no more.
    assert_ne!(number(&mut sql, &format!("ir_async_call('work', queue => 'other', {key})")), id);
    eventually("the other is claimed", || claim(&mut runner, "out", 1).iter().any(|(claimed, _)| *claimed == next));
}

#[test]
fn jobs_that_are_no_longer_where_their_runner_saw_them_are_found() {
    let cluster = cluster();
    let mut sql = cluster.database("jx_moved");
    let mut runner = cluster.connect("jx_moved");
    let ids: Vec<i64> = (0..3).map(|_| enqueue(&mut sql, "")).collect();
    assert_eq!(claim(&mut runner, "out", 3).len(), 3);
    // As those that Odoo is called for: of one token.
    sql.batch_execute("UPDATE ir_async SET token = 'shared'").unwrap();
    let place = |sql: &mut Client, id: i64| -> String {
        sql.query_one("SELECT tableoid::regclass::text FROM ir_async WHERE id = $1", &[&id]).unwrap().get(0)
    };
    let first = place(&mut sql, ids[0]);
    let elsewhere = ["ir_async_1", "ir_async_2"].into_iter().find(|name| *name != first).unwrap();
    let begin = "SELECT following FROM ir_async_begin($1, 'shared')";
    assert_eq!(runner.query_one(begin, &[&ids[0]]).unwrap().get::<_, Option<i64>>(0), Some(ids[1]));
    // As imbus moves them, and nobody else can.
    let moved = |from: &str, to: &str, id: i64| {
        format!(
            "ALTER TABLE {to} DISABLE TRIGGER ir_async_inserted;
             WITH gone AS (DELETE FROM {from} WHERE id = {id} RETURNING *) INSERT INTO {to} SELECT * FROM gone;
             ALTER TABLE {to} ENABLE ALWAYS TRIGGER ir_async_inserted"
        )
    };
    for id in &ids[1..] {
        sql.batch_execute(&moved(&first, elsewhere, *id)).unwrap();
    }
    assert_eq!(place(&mut sql, ids[1]), elsewhere);
    runner.execute("SELECT ir_async_finish($1, 'shared', '1')", &[&ids[0]]).unwrap();
    assert_eq!(runner.query_one(begin, &[&ids[1]]).unwrap().get::<_, Option<i64>>(0), Some(ids[2]));
    sql.batch_execute(&moved(elsewhere, &first, ids[1])).unwrap();
    assert_eq!(place(&mut sql, ids[1]), first);
    runner.execute("SELECT ir_async_finish($1, 'shared')", &[&ids[1]]).unwrap();
    sql.batch_execute(&moved(elsewhere, &first, ids[2])).unwrap();
    runner.query(begin, &[&ids[2]]).unwrap();
    sql.batch_execute(&moved(&first, elsewhere, ids[2])).unwrap();
    runner.execute("SELECT ir_async_fail($1, 'shared', '\"no\"')", &[&ids[2]]).unwrap();
    let states: Vec<Value> = ids.iter().map(|id| status(&mut sql, *id)["state"].clone()).collect();
    assert_eq!(states, ["succeeded", "done", "failed"]);
    assert_eq!(place(&mut sql, ids[0]), "ir_async");
    assert!(runner.query(begin, &[&ids[0]]).unwrap().is_empty());
}

/// The program in docs/runners.md.
fn program() -> String {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/runners.md")).unwrap();
    page.split("```python\n").nth(1).unwrap().split("```").next().unwrap().to_owned()
}

#[test]
fn the_runner_of_the_documentation_works() {
    let cluster = Cluster::start_with(&["imbus.queues = 'reports:0'"]);
    let mut sql = cluster.database("jx_docs");
    assert!(program().lines().count() <= 42);
    let mut socket = cluster.subscriber(&mut sql, json!(["jobs"]), 0);
    let call = |sql: &mut Client, target: &str, arguments: &str| {
        let options = "queue => 'reports', timeout => '10 minutes', notify => '\"jobs\"'";
        number(sql, &format!("ir_async_call('{target}', '{arguments}', {options})"))
    };
    let good = call(&mut sql, "monthly_report", r#"["2026-10"]"#);
    let bad = call(&mut sql, "weekly_report", "[]");
    // The interpreter that has the package of the system: scripts/setup installs both.
    let start = || {
        std::process::Command::new("/usr/bin/python3")
            .args(["-c", &program()])
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", cluster.port.to_string())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "jx_docs")
            .spawn()
            .unwrap()
    };
    let mut runner = start();
    assert_eq!(comes_to(&mut sql, good, "succeeded")["payload"]["result"], json!({"month": "2026-10", "pages": 4}));
    let failed = comes_to(&mut sql, bad, "failed");
    assert_eq!(failed["payload"]["error"]["code"], "KeyError", "{failed}");
    let told: Vec<Value> = (0..10).map(|_| socket.payload()).collect();
    let percent: Vec<&Value> = told.iter().filter_map(|told| told["progress"].get("percent")).collect();
    assert_eq!(percent, [&json!(0), &json!(25), &json!(50), &json!(75)]);
    // It is killed in the middle: another one does it. It may be done before the blow falls: once more, then.
    let mut again = 0;
    eventually("it is killed at work", || {
        again = call(&mut sql, "monthly_report", r#"["2026-11"]"#);
        eventually("it has begun", || status(&mut sql, again)["state"] != "created");
        runner.kill().unwrap();
        runner.wait().unwrap();
        eventually("its claim has ended", || status(&mut sql, again)["state"] != "processing");
        let is_back = status(&mut sql, again)["state"] == "created";
        if !is_back {
            runner = start();
        }
        is_back
    });
    assert_eq!(status(&mut sql, again)["deaths"], 1);
}
