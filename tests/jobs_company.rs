//! Short jobs share transactions, and nothing of that is to be seen in how they end.

mod common;

use common::{Cluster, eventually, shared, try_signal};
use postgres::Client;

fn number(sql: &mut Client, query: &str) -> i64 {
    sql.query_one(&format!("SELECT ({query})::bigint"), &[]).unwrap().get(0)
}

/// Enqueues the calls that a query lists (`target`, `args`, and more by name), all in one transaction.
fn enqueue(sql: &mut Client, calls: &str) {
    let text =
        format!("SELECT count(*) FROM (SELECT ir_async_call_many((SELECT jsonb_agg(to_jsonb(c)) FROM ({calls}) c))) s");
    sql.query_one(&text, &[]).unwrap();
}

fn all_end(sql: &mut Client) {
    eventually("all jobs have ended", || {
        number(sql, "SELECT count(*) FROM ir_async WHERE state IN ('created', 'processing')") == 0
    });
}

/// How many jobs were ended in a transaction that ended others too.
fn in_company(sql: &mut Client) -> i64 {
    number(
        sql,
        "SELECT count(*) FROM (SELECT count(*) OVER (PARTITION BY xmin::text) AS mates FROM ir_async) s WHERE mates > 1",
    )
}

fn count(sql: &mut Client, state: &str) -> i64 {
    number(sql, &format!("SELECT count(*) FROM ir_async WHERE state = '{state}'"))
}

#[test]
fn a_job_that_fails_takes_nobody_along_and_leaves_no_trace() {
    let cluster = shared();
    let mut sql = cluster.database("jc_fails");
    sql.batch_execute(
        "CREATE TABLE effect (n int);
         CREATE FUNCTION work(n int) RETURNS int LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO effect VALUES (n);
             IF n % 10 = 3 THEN RAISE EXCEPTION 'no %', n USING ERRCODE = 'P1234', DETAIL = 'a detail'; END IF;
             RETURN n;
         END $$",
    )
    .unwrap();
    enqueue(&mut sql, "SELECT 'work' AS target, jsonb_build_array(n) AS args FROM generate_series(0, 999) n");
    all_end(&mut sql);
    assert_eq!((count(&mut sql, "succeeded"), count(&mut sql, "failed")), (900, 100));
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect WHERE n % 10 <> 3"), 900);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 900);
    let own = "SELECT count(*) FROM ir_async WHERE payload -> 'result' = args -> 0";
    assert_eq!(number(&mut sql, own), 900);
    let told = "SELECT count(*) FROM ir_async WHERE state = 'failed' AND payload #>> '{error,code}' = 'P1234'
                   AND payload #>> '{error,message}' = 'no ' || (args ->> 0) AND attempts = 1 AND deaths = 0
                   AND payload #>> '{error,data,detail}' = 'a detail' AND jsonb_array_length(errors) = 1";
    assert_eq!(number(&mut sql, told), 100);
    assert!(in_company(&mut sql) > 100);
}

#[test]
fn what_fails_of_its_own_is_tried_once_an_attempt_and_told_with_the_others() {
    let cluster = shared();
    let mut sql = cluster.database("jc_own");
    sql.batch_execute(
        "CREATE SEQUENCE tries; CREATE TABLE effect (n int UNIQUE);
         CREATE FUNCTION work(n int) RETURNS int LANGUAGE plpgsql AS $$
         BEGIN
             PERFORM nextval('tries');
             INSERT INTO effect VALUES (n);
             IF n % 4 = 1 THEN INSERT INTO effect VALUES (n); END IF;
             IF n % 4 = 2 THEN PERFORM 1 / (n % 2); END IF;
             IF n % 4 = 3 THEN RAISE 'as it says' USING DETAIL = n; END IF;
             RETURN n;
         END $$",
    )
    .unwrap();
    enqueue(&mut sql, "SELECT 'work' AS target, to_jsonb(ARRAY[n]) AS args FROM generate_series(1, 400) n");
    all_end(&mut sql);
    assert_eq!((count(&mut sql, "succeeded"), count(&mut sql, "failed")), (100, 300));
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect WHERE n % 4 = 0"), 100);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 100);
    // But for those of something twice, which may come of what jobs share.
    assert!(number(&mut sql, "SELECT last_value FROM tries") <= 500);
    let code = "(args ->> 0)::int % 4, payload #>> '{error,code}', jsonb_array_length(errors), attempts, deaths, finished_at IS NULL";
    let text = format!("SELECT string_agg(DISTINCT ({code})::text, ' ') FROM ir_async WHERE state = 'failed'");
    let codes: String = sql.query_one(&text, &[]).unwrap().get(0);
    assert_eq!(codes, "(1,23505,1,1,0,f) (2,22012,1,1,0,f) (3,P0001,1,1,0,f)");
    assert!(in_company(&mut sql) > 100);
}

#[test]
fn what_a_transaction_has_but_once_each_job_has_for_itself() {
    let cluster = shared();
    let mut sql = cluster.database("jc_history");
    sql.batch_execute(
        "CREATE TABLE history (since timestamptz DEFAULT now() PRIMARY KEY, said timestamptz DEFAULT statement_timestamp());
         CREATE FUNCTION keep() RETURNS int LANGUAGE sql AS 'INSERT INTO history DEFAULT VALUES RETURNING 1';
         CREATE TABLE ledger (transaction xid8 DEFAULT pg_current_xact_id() PRIMARY KEY);
         CREATE FUNCTION book() RETURNS int LANGUAGE sql AS 'INSERT INTO ledger DEFAULT VALUES RETURNING 1'",
    )
    .unwrap();
    enqueue(&mut sql, "SELECT 'keep' AS target FROM generate_series(1, 400)");
    all_end(&mut sql);
    assert_eq!(count(&mut sql, "succeeded"), 400);
    assert!(in_company(&mut sql) > 100);
    let right = "SELECT count(*) FROM history WHERE said = since AND since <= clock_timestamp()";
    assert_eq!(number(&mut sql, right), 400);
    enqueue(&mut sql, "SELECT 'book' AS target FROM generate_series(1, 400)");
    all_end(&mut sql);
    assert_eq!(count(&mut sql, "succeeded"), 800);
    assert_eq!(number(&mut sql, "SELECT max(attempts) FROM ir_async"), 1);
}

#[test]
fn what_a_job_leaves_in_its_session_is_not_there_for_the_next() {
    let cluster = shared();
    let mut sql = cluster.database("jc_session");
    sql.batch_execute(
        "CREATE SEQUENCE numbers;
         CREATE FUNCTION look(n int) RETURNS text LANGUAGE plpgsql AS $$
         DECLARE found text := ''; c refcursor := 'left_open';
         BEGIN
             IF current_setting('work_mem') <> '4MB' OR current_setting('my.own', true) <> '' THEN found := 'settings '; END IF;
             IF EXISTS (SELECT FROM pg_prepared_statements) THEN found := found || 'statements '; END IF;
             IF EXISTS (SELECT FROM pg_cursors WHERE name = 'left_open') THEN found := found || 'cursors '; END IF;
             IF EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND objid = 77)
                 THEN found := found || 'locks '; END IF;
             BEGIN
                 PERFORM lastval();
                 found := found || 'sequences ';
             EXCEPTION WHEN object_not_in_prerequisite_state THEN NULL;
             END;
             IF n % 2 = 0 THEN
                 PERFORM set_config('work_mem', '5MB', n % 4 = 0), set_config('my.own', 'x', false);
                 EXECUTE 'PREPARE left_prepared AS SELECT 1';
                 OPEN c FOR SELECT 1;
                 PERFORM pg_advisory_lock(77), nextval('numbers');
             END IF;
             RETURN NULLIF(found, '');
         END $$",
    )
    .unwrap();
    enqueue(&mut sql, "SELECT 'look' AS target, jsonb_build_array(n) AS args FROM generate_series(1, 600) n");
    all_end(&mut sql);
    let found = sql.query("SELECT DISTINCT payload::text FROM ir_async WHERE state <> 'done'", &[]).unwrap();
    assert!(found.is_empty(), "{:?}", found.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>());
    assert!(in_company(&mut sql) > 100);
}

#[test]
fn a_job_that_took_too_long_in_company_finds_nothing_of_itself_when_it_is_run_again() {
    let cluster = shared();
    let mut sql = cluster.database("jc_again");
    sql.batch_execute(
        "CREATE FUNCTION work(n int) RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             IF n % 300 = 200 THEN
                 IF EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND objid = 78)
                     THEN RAISE 'it is locked'; END IF;
                 EXECUTE 'PREPARE left_prepared AS SELECT 1';
                 PERFORM pg_advisory_lock(n, 78), pg_sleep(0.3);
             END IF;
         END $$",
    )
    .unwrap();
    enqueue(&mut sql, "SELECT 'work' AS target, jsonb_build_array(n) AS args FROM generate_series(1, 1200) n");
    all_end(&mut sql);
    let found = sql.query("SELECT DISTINCT payload::text FROM ir_async WHERE state <> 'done'", &[]).unwrap();
    assert!(found.is_empty(), "{:?}", found.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>());
    assert!(in_company(&mut sql) > 100);
}

#[test]
fn temporary_tables_are_gone_with_their_job() {
    let cluster = shared();
    let mut sql = cluster.database("jc_temporary");
    sql.batch_execute(
        "CREATE FUNCTION quick() RETURNS void LANGUAGE sql AS '';
         CREATE FUNCTION temporary() RETURNS int LANGUAGE plpgsql AS $$
         BEGIN
             CREATE TEMPORARY TABLE mine (n int);
             CREATE TEMPORARY TABLE dropped (n int) ON COMMIT DROP;
             INSERT INTO mine VALUES (1);
             RETURN (SELECT count(*) FROM mine);
         END $$",
    )
    .unwrap();
    let target = "CASE WHEN n % 50 = 0 THEN 'temporary' ELSE 'quick' END";
    enqueue(&mut sql, &format!("SELECT {target} AS target FROM generate_series(1, 500) n"));
    all_end(&mut sql);
    assert_eq!((count(&mut sql, "done"), count(&mut sql, "succeeded"), count(&mut sql, "failed")), (490, 10, 0));
    assert_eq!(number(&mut sql, "SELECT count(*) FROM ir_async WHERE payload = '{\"result\": 1}'"), 10);
}

#[test]
fn what_only_a_commit_refuses_fails_the_job_that_did_it() {
    let cluster = shared();
    let mut sql = cluster.database("jc_deferred");
    sql.batch_execute(
        "CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
         INSERT INTO parent SELECT n FROM generate_series(1, 400) n WHERE n % 40 <> 0;
         CREATE FUNCTION add_child(n int) RETURNS void LANGUAGE sql AS 'INSERT INTO child VALUES (n)'",
    )
    .unwrap();
    enqueue(&mut sql, "SELECT 'add_child' AS target, jsonb_build_array(n) AS args FROM generate_series(1, 400) n");
    all_end(&mut sql);
    assert_eq!((count(&mut sql, "done"), count(&mut sql, "failed")), (390, 10));
    let right = "SELECT count(*) FROM ir_async WHERE state = 'failed' AND (args ->> 0)::int % 40 = 0
                    AND payload #>> '{error,code}' = '23503'";
    assert_eq!(number(&mut sql, right), 10);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM child"), 390);
}

#[test]
fn two_runners_whose_jobs_lock_each_others_rows_fail_none() {
    let cluster = shared();
    let mut sql = cluster.database("jc_deadlock");
    sql.batch_execute(
        "CREATE TABLE counter (id int PRIMARY KEY, n int);
         INSERT INTO counter SELECT i, 0 FROM generate_series(0, 6) i;
         CREATE FUNCTION count_up(i int) RETURNS void LANGUAGE sql AS 'UPDATE counter SET n = n + 1 WHERE id = i'",
    )
    .unwrap();
    let args = "jsonb_build_array((n * 5 + n / 7) % 7)";
    enqueue(&mut sql, &format!("SELECT 'count_up' AS target, {args} AS args FROM generate_series(1, 2000) n"));
    all_end(&mut sql);
    assert_eq!((count(&mut sql, "done"), count(&mut sql, "failed")), (2000, 0));
    assert_eq!(number(&mut sql, "SELECT sum(n) FROM counter"), 2000);
}

#[test]
fn what_a_job_has_locked_for_its_transaction_stays_locked_until_its_effect_is_there() {
    let cluster = shared();
    let mut sql = cluster.database("jc_locks");
    sql.batch_execute(
        "CREATE TABLE numbered (n int);
         CREATE FUNCTION number_next() RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             PERFORM pg_advisory_xact_lock(7);
             INSERT INTO numbered SELECT COALESCE(max(n), 0) + 1 FROM numbered;
         END $$",
    )
    .unwrap();
    enqueue(&mut sql, "SELECT 'number_next' AS target, '[]'::jsonb AS args FROM generate_series(1, 2000)");
    all_end(&mut sql);
    assert_eq!((count(&mut sql, "done"), count(&mut sql, "failed")), (2000, 0));
    assert_eq!(number(&mut sql, "SELECT max(n) FROM numbered"), 2000);
    assert_eq!(number(&mut sql, "SELECT count(DISTINCT n) FROM numbered"), 2000);
    assert!(in_company(&mut sql) > 0);
}

#[test]
fn a_long_job_among_short_ones_keeps_their_results_back_for_a_moment_only() {
    let cluster = shared();
    let mut sql = cluster.database("jc_long");
    sql.batch_execute(
        "CREATE TABLE gate (id int); CREATE TABLE effect (n int);
         CREATE FUNCTION work(n int) RETURNS int LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO effect VALUES (n);
             IF n = 700 THEN LOCK TABLE gate IN ACCESS SHARE MODE; END IF;
             RETURN n;
         END $$",
    )
    .unwrap();
    let mut other = cluster.connect("jc_long");
    let mut gate = other.transaction().unwrap();
    gate.batch_execute("LOCK TABLE gate IN ACCESS EXCLUSIVE MODE").unwrap();
    enqueue(&mut sql, "SELECT 'work' AS target, jsonb_build_array(n) AS args FROM generate_series(1, 1000) n");
    eventually("all others have ended", || count(&mut sql, "succeeded") == 999);
    assert_eq!(count(&mut sql, "processing"), 1);
    // It can be stopped as any other.
    let id = number(&mut sql, "SELECT id FROM ir_async WHERE state = 'processing'");
    assert!(sql.query_one("SELECT ir_async_cancel($1)", &[&id]).unwrap().get::<_, bool>(0));
    eventually("it is cancelled", || count(&mut sql, "cancelled") == 1);
    drop(gate);
    assert_eq!(number(&mut sql, "SELECT count(DISTINCT n) FROM effect WHERE n <> 700"), 999);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 999);
}

#[test]
fn a_runner_that_dies_counts_in_the_job_it_was_at_and_the_others_go_on() {
    let cluster = Cluster::start_with(&["imbus.job_workers = 1"]);
    let mut sql = cluster.database("jc_dies");
    sql.batch_execute(
        "CREATE TABLE effect (n int);
         CREATE FUNCTION work(n int) RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO effect VALUES (n);
             IF n = 400 THEN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(60); END IF;
         END $$",
    )
    .unwrap();
    enqueue(&mut sql, "SELECT 'work' AS target, jsonb_build_array(n) AS args FROM generate_series(1, 600) n");
    all_end(&mut sql);
    assert_eq!((count(&mut sql, "done"), count(&mut sql, "failed")), (599, 1));
    assert_eq!(number(&mut sql, "SELECT sum(deaths) FROM ir_async"), 5);
    assert_eq!(number(&mut sql, "SELECT deaths FROM ir_async WHERE args -> 0 = '400'"), 5);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 599);
    assert_eq!(number(&mut sql, "SELECT max(attempts) FROM ir_async WHERE state = 'done'"), 1);
}

#[test]
fn results_and_states_are_told_of_each_job_in_company() {
    let cluster = shared();
    let mut sql = cluster.database("jc_told");
    sql.batch_execute("CREATE FUNCTION twice(n int) RETURNS int LANGUAGE sql AS 'SELECT 2 * n'").unwrap();
    let mut socket = cluster.subscriber(&mut sql, serde_json::json!(["jobs"]), 0);
    enqueue(
        &mut sql,
        "SELECT 'twice' AS target, jsonb_build_array(n) AS args, 'jobs' AS notify FROM generate_series(1, 200) n",
    );
    all_end(&mut sql);
    assert!(in_company(&mut sql) > 20);
    let mut states = std::collections::HashMap::<i64, Vec<String>>::new();
    for _ in 0..600 {
        let told = socket.payload();
        let state = match &told["payload"]["result"] {
            serde_json::Value::Null => told["state"].as_str().unwrap().to_owned(),
            result => format!("{} {result}", told["state"].as_str().unwrap()),
        };
        states.entry(told["id"].as_i64().unwrap()).or_default().push(state);
    }
    let first = *states.keys().min().unwrap();
    for (id, states) in states {
        let result = format!("succeeded {}", 2 * (id - first + 1));
        assert_eq!(states, ["created", "processing", result.as_str()]);
    }
}

#[test]
fn a_job_cancelled_in_company_has_no_effect_and_the_others_have_theirs() {
    let cluster = shared();
    let mut sql = cluster.database("jc_cancel");
    sql.batch_execute(
        "CREATE TABLE effect (n int);
         CREATE FUNCTION work(n int) RETURNS void LANGUAGE plpgsql AS $$
         BEGIN INSERT INTO effect VALUES (n); PERFORM pg_sleep(0.0005); END $$",
    )
    .unwrap();
    let mut other = cluster.connect("jc_cancel");
    // Whatever is claimed just then: at work, waiting in company, or just done. Within the server, so that it keeps pace.
    let cancelling = "DO $$
         DECLARE claimed bigint;
         BEGIN
             WHILE EXISTS (SELECT FROM ir_async WHERE state IN ('created', 'processing')) LOOP
                 FOR claimed IN SELECT id FROM ir_async WHERE state = 'processing' ORDER BY random() LIMIT 2 LOOP
                     PERFORM ir_async_cancel(claimed);
                 END LOOP;
                 COMMIT;
                 -- Those at work are not all said to be.
                 FOR claimed IN SELECT id FROM (SELECT id FROM ir_async WHERE state = 'created' ORDER BY id LIMIT 30) s
                                 ORDER BY random() LIMIT 2 LOOP
                     PERFORM ir_async_cancel(claimed);
                 END LOOP;
                 COMMIT;
             END LOOP;
         END $$";
    let mut jobs = 0;
    // Cancelling waits for a company each time: how many it catches of so many jobs is not sure.
    while jobs < 30_000 && (count(&mut sql, "cancelled") <= 10 || in_company(&mut sql) <= 20) {
        let more = format!("generate_series({jobs} + 1, {jobs} + 3000)");
        enqueue(&mut sql, &format!("SELECT 'work' AS target, jsonb_build_array(n) AS args FROM {more} n"));
        other.batch_execute(cancelling).unwrap();
        jobs += 3000;
    }
    let ends = "SELECT count(*) FROM ir_async j LEFT JOIN (SELECT n, count(*) AS times FROM effect GROUP BY n) e
                    ON to_jsonb(e.n) = j.args -> 0
                 WHERE COALESCE(e.times, 0) = CASE j.state WHEN 'done' THEN 1 WHEN 'cancelled' THEN 0 ELSE -1 END";
    assert_eq!(number(&mut sql, ends), jobs);
    let log = cluster.log();
    assert!(!log.contains("canceling statement due to user request"), "an interrupt came where no job was: {log}");
    assert!(count(&mut sql, "cancelled") > 10, "{}", count(&mut sql, "cancelled"));
    assert!(in_company(&mut sql) > 20, "{}", in_company(&mut sql));
}

#[test]
fn a_job_that_cancels_others_of_its_company_or_itself_does_so_once() {
    let cluster = Cluster::start_with(&["imbus.job_workers = 1"]);
    let mut sql = cluster.database("jc_cancels");
    sql.batch_execute(
        "CREATE TABLE effect (n int);
         CREATE FUNCTION id_of(n int) RETURNS bigint LANGUAGE sql AS 'SELECT id FROM ir_async WHERE args = jsonb_build_array(n)';
         CREATE FUNCTION work(n int) RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO effect VALUES (n);
             IF n % 50 = 10 THEN PERFORM ir_async_cancel(id_of(n + 1)); END IF;
             IF n % 50 = 30 THEN PERFORM ir_async_cancel(id_of(n)), pg_sleep(0); END IF;
         END $$",
    )
    .unwrap();
    enqueue(&mut sql, "SELECT 'work' AS target, jsonb_build_array(n) AS args FROM generate_series(1, 400) n");
    all_end(&mut sql);
    let cancelled = "SELECT count(*) FROM ir_async WHERE state = 'cancelled' AND (args ->> 0)::int % 50 IN (11, 30)";
    assert_eq!((number(&mut sql, cancelled), count(&mut sql, "done")), (16, 384));
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect WHERE n % 50 NOT IN (11, 30)"), 384);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 384);
}

#[test]
fn who_is_looked_out_for_is_processing_while_it_runs_and_others_need_not_be() {
    let cluster = shared();
    let mut sql = cluster.database("jc_watched");
    sql.batch_execute(
        "CREATE FUNCTION look(n int) RETURNS text LANGUAGE sql AS
             'SELECT format(''%s %s'', state, attempts) FROM ir_async WHERE args = jsonb_build_array(n)';
         CREATE INDEX ON ir_async (args); CREATE INDEX ON ir_async_1 (args);
         CREATE FUNCTION fail() RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$",
    )
    .unwrap();
    let look = |more: &str, first: i32| {
        let last = first + 299;
        format!("SELECT 'look' AS target, jsonb_build_array(n) AS args, {more} FROM generate_series({first}, {last}) n")
    };
    enqueue(&mut sql, &look("n AS identity_key", 1));
    enqueue(&mut sql, &look("'seen' AS description", 1001));
    enqueue(&mut sql, &look("'jobs' AS notify", 2001));
    all_end(&mut sql);
    let right = "SELECT count(*) FROM ir_async WHERE payload ->> 'result' = 'processing 1'";
    assert_eq!(number(&mut sql, right), 900);
    assert!(in_company(&mut sql) > 100);
    enqueue(&mut sql, &look("1 AS max_attempts", 3001));
    all_end(&mut sql);
    // They are ended as the others are, and leave less behind.
    let least = "SELECT count(*) FROM ir_async WHERE payload ->> 'result' = 'created 0'";
    assert!(number(&mut sql, least) > 200, "{}", number(&mut sql, least));
    let ended = "SELECT count(*) FROM ir_async WHERE state = 'succeeded' AND attempts = 1 AND token IS NULL
                    AND claimed_at BETWEEN run_at AND finished_at";
    assert_eq!(number(&mut sql, ended), 1200);
    // After its first attempt each is looked out for.
    enqueue(&mut sql, "SELECT 'fail' AS target, 2 AS max_attempts, '1 ms' AS retry_delay FROM generate_series(1, 300)");
    all_end(&mut sql);
    let failed =
        "SELECT count(*) FROM ir_async WHERE state = 'failed' AND attempts = 2 AND jsonb_array_length(errors) = 2
                     AND errors #> '{0,attempt}' = '1' AND errors #> '{1,attempt}' = '2'";
    assert_eq!(number(&mut sql, failed), 300);
}

/// Runs 600 jobs of which one runs this command of the shell whenever it is run, by which its runner dies. A server that is gone is
/// started again.
fn with_a_deadly_one(cluster: &Cluster, database: &str, command: &str) -> Client {
    let mut sql = cluster.database(database);
    sql.batch_execute(&format!(
        "CREATE TABLE effect (n int);
         CREATE FUNCTION work(n int) RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO effect VALUES (n);
             IF n = 400 THEN COPY (SELECT) TO PROGRAM 'cat > /dev/null; {command}'; PERFORM pg_sleep(60); END IF;
         END $$"
    ))
    .unwrap();
    enqueue(&mut sql, "SELECT 'work' AS target, jsonb_build_array(n) AS args FROM generate_series(1, 600) n");
    let mut postmaster = cluster.postmaster();
    eventually("all jobs have ended", || {
        if !try_signal(postmaster, 0) {
            cluster.start_after(postmaster);
            postmaster = cluster.postmaster();
        }
        let text = "SELECT count(*) FROM ir_async WHERE state IN ('created', 'processing')";
        let reached = cluster.try_connect(database, "postgres");
        reached.is_ok_and(|mut sql| sql.query_one(text, &[]).is_ok_and(|row| row.get::<_, i64>(0) == 0))
    });
    let mut sql = cluster.connect(database);
    assert_eq!((count(&mut sql, "done"), count(&mut sql, "failed")), (599, 1));
    let failed = sql
        .query("SELECT payload #>> '{error,code}', payload::text FROM ir_async WHERE args -> 0 = '400'", &[])
        .unwrap();
    assert_eq!(failed[0].get::<_, &str>(0), "runner_died", "{}", failed[0].get::<_, &str>(1));
    assert_eq!(number(&mut sql, "SELECT deaths FROM ir_async WHERE args -> 0 = '400'"), 5);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 599);
    assert_eq!(number(&mut sql, "SELECT max(attempts) FROM ir_async"), 1);
    sql
}

#[test]
fn a_job_that_brings_the_server_down_is_known_by_it_and_the_others_go_on() {
    let cluster = Cluster::start_with(&["imbus.job_workers = 1"]);
    let mut sql = with_a_deadly_one(&cluster, "jc_crash", "kill -9 $PPID");
    assert_eq!(number(&mut sql, "SELECT sum(deaths) FROM ir_async"), 5);
}

#[test]
fn so_is_one_that_kills_the_postmaster() {
    let cluster = Cluster::start_with(&["imbus.job_workers = 1"]);
    let mut sql = with_a_deadly_one(&cluster, "jc_down", "kill -9 $(head -n 1 postmaster.pid)");
    // The worker may have claimed the next one just before it noticed.
    assert!(number(&mut sql, "SELECT sum(deaths) FROM ir_async") <= 6);
}

#[test]
fn what_a_job_was_enqueued_with_is_there_when_it_has_ended_and_triggers_of_an_administrator_fire() {
    let cluster = shared();
    let mut sql = cluster.database("jc_kept");
    // Some are stored apart, some compressed.
    sql.batch_execute(
        "CREATE FUNCTION size(n int, long text, more text) RETURNS int LANGUAGE sql AS 'SELECT length(long)';
         CREATE TABLE wanted (n int, args jsonb);
         INSERT INTO wanted SELECT n, jsonb_build_array(n,
             CASE n % 3 WHEN 0 THEN repeat('x', 50 * n)
                        WHEN 1 THEN (SELECT string_agg(md5(n || ' ' || i), '') FROM generate_series(1, n) i)
                        ELSE '' END) FROM generate_series(1, 400) n",
    )
    .unwrap();
    let calls = "SELECT 'size' AS target, args, jsonb_build_object('more', n) AS kwargs, 'q' AS queue,
                        n % 2 + 1 AS max_attempts FROM wanted";
    let kept = "SELECT count(*) FROM ir_async j JOIN wanted w ON w.args = j.args
                 WHERE j.state = 'succeeded' AND j.payload = jsonb_build_object('result', length(w.args ->> 1))
                   AND j.kwargs = jsonb_build_object('more', w.n) AND j.queue = 'q' AND j.max_attempts = w.n % 2 + 1
                   AND j.search_path IS NOT NULL AND j.create_date <= j.write_date AND j.tableoid = 'ir_async'::regclass";
    enqueue(&mut sql, calls);
    all_end(&mut sql);
    assert_eq!(number(&mut sql, kept), 400);
    assert!(in_company(&mut sql) > 100);
    sql.batch_execute(
        "CREATE TABLE gone (id bigint); CREATE TABLE come (id bigint);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
         BEGIN
             IF TG_OP = 'DELETE' THEN INSERT INTO public.gone VALUES (OLD.id);
             ELSIF NEW.state = 'succeeded' THEN INSERT INTO public.come VALUES (NEW.id); END IF;
             RETURN NULL;
         END $$;
         CREATE TRIGGER note AFTER DELETE ON ir_async_1 FOR EACH ROW EXECUTE FUNCTION note()",
    )
    .unwrap();
    enqueue(&mut sql, calls);
    all_end(&mut sql);
    assert_eq!(number(&mut sql, kept), 800);
    assert_eq!(number(&mut sql, "SELECT count(DISTINCT id) FROM gone"), 400);
    sql.batch_execute(
        "DROP TRIGGER note ON ir_async_1;
         CREATE TRIGGER note AFTER INSERT ON ir_async FOR EACH ROW EXECUTE FUNCTION note()",
    )
    .unwrap();
    enqueue(&mut sql, calls);
    all_end(&mut sql);
    assert_eq!(number(&mut sql, kept), 1200);
    assert_eq!(number(&mut sql, "SELECT count(DISTINCT id) FROM come"), 400);
}

#[test]
fn short_jobs_keep_nobody_from_counting_those_of_limited_queues() {
    let cluster = Cluster::start_with(&["imbus.queues = 'few:1'"]);
    let mut sql = cluster.database("jc_limits");
    sql.batch_execute(
        "CREATE FUNCTION locks() RETURNS bigint LANGUAGE sql AS
             'SELECT NULLIF(count(*), 0) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = ''object''
                 AND mode = ''ExclusiveLock'' AND objid = ''ir_async''::regclass'",
    )
    .unwrap();
    let queue = "CASE WHEN n % 20 = 0 THEN 'few' ELSE 'many' END AS queue";
    enqueue(&mut sql, &format!("SELECT 'locks' AS target, {queue} FROM generate_series(1, 400) n"));
    all_end(&mut sql);
    assert_eq!(count(&mut sql, "done"), 400);
    assert!(in_company(&mut sql) > 100);
}

#[test]
fn whoever_puts_in_the_id_of_another_roles_job_by_hand_has_it_run_as_himself_or_not_at_all() {
    let cluster = Cluster::start_with(&["imbus.queues = 'out:0'"]);
    let mut sql = cluster.database("jc_twins");
    sql.batch_execute(
        "CREATE ROLE jc_mallory LOGIN; GRANT SELECT, INSERT ON ir_async TO jc_mallory;
         CREATE TABLE did (who text); GRANT INSERT ON did TO jc_mallory;
         CREATE FUNCTION evil() RETURNS void LANGUAGE sql AS 'INSERT INTO public.did VALUES (current_user)';
         CREATE FUNCTION nothing() RETURNS void LANGUAGE sql AS ''",
    )
    .unwrap();
    let mut mallory = cluster.connect_as("jc_twins", "jc_mallory");
    let next = number(&mut sql, "SELECT nextval('ir_async_id_seq')");
    // Where nobody runs it.
    let by_hand = "INSERT INTO ir_async (id, method, role, queue) SELECT $1::bigint + n, 'evil()', 0, 'out'
                     FROM generate_series(20, 180, 40) n";
    mallory.execute(by_hand, &[&next]).unwrap();
    enqueue(&mut sql, "SELECT 'nothing' AS target FROM generate_series(1, 200)");
    eventually("all others have ended", || {
        number(&mut sql, "SELECT count(*) FROM ir_async WHERE finished_at IS NULL AND method <> 'evil()'") == 0
    });
    assert_eq!(number(&mut sql, "SELECT count(*) FROM did"), 0);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM ir_async WHERE method = 'evil()' AND state = 'created'"), 5);
    assert_eq!((count(&mut sql, "done"), count(&mut sql, "failed")), (195, 5));
}
