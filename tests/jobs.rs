//! Jobs run once, as the role that enqueued them and no more than that role, whatever ends the processes around them.

mod common;

use common::{Cluster, eventually, kill_9, recovered, refusal, shared};
use postgres::Client;
use serde_json::{Value, json};

/// A role that may log in and enqueue here.
fn role(sql: &mut Client, name: &str) {
    sql.batch_execute(&format!(
        "CREATE ROLE {name} LOGIN;
         GRANT EXECUTE ON FUNCTION ir_async_call, ir_async_call_notify, ir_async_status, ir_async_complete TO {name}"
    ))
    .unwrap();
}

/// The only value of a query, which answers jsonb.
fn value(sql: &mut Client, query: &str) -> Value {
    let text: String = sql.query_one(&format!("SELECT ({query})::text"), &[]).unwrap().get(0);
    serde_json::from_str(&text).unwrap()
}

/// The number that a query answers.
fn number(sql: &mut Client, query: &str) -> i64 {
    sql.query_one(&format!("SELECT ({query})::bigint"), &[]).unwrap().get(0)
}

/// Enqueues; the id.
fn call(sql: &mut Client, arguments: &str) -> i64 {
    number(sql, &format!("ir_async_call({arguments})"))
}

fn status(sql: &mut Client, id: i64) -> Value {
    value(sql, &format!("ir_async_status({id})"))
}

fn state(sql: &mut Client, id: i64) -> String {
    status(sql, id)["state"].as_str().unwrap().to_owned()
}

/// Waits until the job has ended: its status.
fn ended(sql: &mut Client, id: i64) -> Value {
    let mut found = Value::Null;
    eventually(&format!("job {id} has ended"), || {
        found = status(sql, id);
        !matches!(found["state"].as_str(), Some("created" | "processing"))
    });
    found
}

/// Waits until the job has ended well: its result.
fn result(sql: &mut Client, id: i64) -> Value {
    let found = ended(sql, id);
    assert_eq!(found["state"], "succeeded", "{found}");
    found["payload"]["result"].clone()
}

/// Waits until the job has failed: the code of its error.
fn failure(sql: &mut Client, id: i64) -> Value {
    let found = ended(sql, id);
    assert_eq!(found["state"], "failed", "{found}");
    found["payload"]["error"]["code"].clone()
}

/// Holds up the jobs that call `pass()` until it is opened.
struct Gate(Client);

impl Gate {
    fn close(cluster: &Cluster, database: &str) -> Gate {
        let mut client = cluster.connect(database);
        client
            .batch_execute(
                "CREATE OR REPLACE FUNCTION pass() RETURNS void LANGUAGE sql AS 'SELECT pg_advisory_xact_lock(1)';
                 SELECT pg_advisory_lock(1)",
            )
            .unwrap();
        Gate(client)
    }

    fn open(mut self) {
        self.0.batch_execute("SELECT pg_advisory_unlock(1)").unwrap();
    }
}

/// Waits until a runner of the database stands at the gate, another one than `but`: its process id.
fn runner_at_gate(sql: &mut Client, but: i32) -> i32 {
    let mut pid = None;
    eventually("a runner stands at the gate", || {
        pid = sql
            .query_opt(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'imbus job ' || current_database()
                    AND datname = current_database() AND wait_event = 'advisory' AND pid <> $1",
                &[&but],
            )
            .unwrap()
            .map(|row| row.get(0));
        pid.is_some()
    });
    pid.unwrap()
}

// ---------------------------------------------------------------------------------------------------------------------
// States and notifications

#[test]
fn a_client_hears_each_state_of_a_job_in_order() {
    let cluster = shared();
    let mut sql = cluster.database("j_states");
    sql.batch_execute("CREATE FUNCTION add(a int, b int) RETURNS int LANGUAGE sql AS 'SELECT a + b'").unwrap();
    let mut socket = cluster.subscriber(&mut sql, json!([["res.partner", 7]]), 0);
    let id = number(&mut sql, "ir_async_call_notify('Add up', 'add', '[2]', '{\"b\": 3}', '[\"res.partner\", 7]')");
    for (state, payload) in [("created", Value::Null), ("processing", Value::Null), ("succeeded", json!({"result": 5}))]
    {
        let message = socket.next()["message"].clone();
        let expected = json!({"id": id, "name": "Add up", "state": state, "payload": payload});
        assert_eq!(message, json!({"type": "ir.async", "payload": expected}));
    }
    sql.execute("SELECT ir_async_complete($1)", &[&id]).unwrap();
    let done = socket.payload();
    assert_eq!((&done["id"], &done["name"], &done["state"]), (&json!(id), &json!("Add up"), &json!("done")));
    assert_eq!(state(&mut sql, id), "done");
}

#[test]
fn a_job_without_a_result_ends_done() {
    let cluster = shared();
    let mut sql = cluster.database("j_void");
    sql.batch_execute(
        "CREATE FUNCTION nothing() RETURNS void LANGUAGE sql AS '';
         CREATE FUNCTION unknown() RETURNS int LANGUAGE sql AS 'SELECT NULL::int'",
    )
    .unwrap();
    let mut socket = cluster.subscriber(&mut sql, json!(["jobs"]), 0);
    for function in ["nothing", "unknown"] {
        let id = number(&mut sql, &format!("ir_async_call_notify(NULL, '{function}', '[]', '{{}}', '\"jobs\"')"));
        for state in ["created", "processing", "done"] {
            assert_eq!(socket.payload(), json!({"id": id, "name": null, "state": state, "payload": null}));
        }
    }
}

#[test]
fn a_failing_job_leaves_nothing_but_its_error() {
    let cluster = shared();
    let mut sql = cluster.database("j_fail");
    sql.batch_execute(
        "CREATE TABLE effect (n int);
         CREATE FUNCTION fail() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO effect VALUES (1);
             PERFORM bus_sendone('jobs', 'effect', '1');
             RAISE EXCEPTION 'no way' USING ERRCODE = '22012', DETAIL = 'a detail', HINT = 'a hint';
         END $$",
    )
    .unwrap();
    let mut socket = cluster.subscriber(&mut sql, json!(["jobs"]), 0);
    let id = number(&mut sql, "ir_async_call_notify('F', 'fail', '[]', '{}', '\"jobs\"')");
    let error = json!({"code": "22012", "message": "no way", "data": {"detail": "a detail", "hint": "a hint"}});
    for (state, payload) in [("created", Value::Null), ("processing", Value::Null), ("failed", json!({"error": error}))]
    {
        assert_eq!(socket.payload(), json!({"id": id, "name": "F", "state": state, "payload": payload}));
    }
    let found = status(&mut sql, id);
    assert_eq!((&found["state"], &found["payload"]), (&json!("failed"), &json!({"error": error})));
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 0);
}

#[test]
fn a_job_that_cannot_commit_fails() {
    let cluster = shared();
    let mut sql = cluster.database("j_deferred");
    sql.batch_execute(
        "CREATE TABLE parent (id int PRIMARY KEY);
         CREATE TABLE effect (n int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
         CREATE FUNCTION orphan() RETURNS int LANGUAGE sql AS 'INSERT INTO effect VALUES (1) RETURNING n'",
    )
    .unwrap();
    let mut socket = cluster.subscriber(&mut sql, json!(["jobs"]), 0);
    let id = number(&mut sql, "ir_async_call_notify('O', 'orphan', '[]', '{}', '\"jobs\"')");
    assert_eq!(failure(&mut sql, id), "23503");
    let states: Vec<Value> = (0..3).map(|_| socket.payload()["state"].clone()).collect();
    assert_eq!(states, ["created", "processing", "failed"]);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rights

#[test]
fn a_job_runs_as_the_role_that_enqueued_it() {
    let cluster = shared();
    let mut sql = cluster.database("j_role");
    role(&mut sql, "j_role_ann");
    sql.batch_execute(
        "CREATE FUNCTION who() RETURNS text[] LANGUAGE sql AS
             'SELECT ARRAY[session_user, current_user]::text[] || pg_has_role(''postgres'', ''member'')::text'",
    )
    .unwrap();
    let id = call(&mut cluster.connect_as("j_role", "j_role_ann"), "'who'");
    assert_eq!(result(&mut sql, id), json!(["j_role_ann", "j_role_ann", "false"]));
}

#[test]
fn a_job_cannot_become_another_role() {
    let cluster = shared();
    let mut sql = cluster.database("j_escape");
    role(&mut sql, "j_escape_ann");
    sql.batch_execute(
        "CREATE TABLE treasure (n int);
         CREATE FUNCTION escape(attempt text) RETURNS jsonb LANGUAGE plpgsql AS $$
         DECLARE refused text; read text;
         BEGIN
             BEGIN EXECUTE attempt; EXCEPTION WHEN OTHERS THEN refused := SQLSTATE; END;
             BEGIN PERFORM FROM treasure; EXCEPTION WHEN OTHERS THEN read := SQLSTATE; END;
             RETURN jsonb_build_array(current_user, session_user, current_setting('is_superuser'), read, refused);
         END $$",
    )
    .unwrap();
    let mut ann = cluster.connect_as("j_escape", "j_escape_ann");
    for (attempt, refused) in [
        ("SELECT", None),
        ("RESET ROLE", None),
        ("SET ROLE NONE", None),
        ("RESET SESSION AUTHORIZATION", None),
        ("SET SESSION AUTHORIZATION DEFAULT", None),
        ("SET SESSION AUTHORIZATION postgres", Some("42501")),
        ("SET ROLE postgres", Some("42501")),
    ] {
        let id = call(&mut ann, &format!("'escape', '[\"{attempt}\"]'"));
        let expected = json!(["j_escape_ann", "j_escape_ann", "off", "42501", refused]);
        assert_eq!(result(&mut sql, id), expected, "{attempt}");
    }
}

#[test]
fn a_job_cannot_read_what_its_role_cannot() {
    let cluster = shared();
    let mut sql = cluster.database("j_read");
    role(&mut sql, "j_read_ann");
    sql.batch_execute(
        "CREATE TABLE treasure (n int);
         CREATE FUNCTION peek() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM treasure'",
    )
    .unwrap();
    let id = call(&mut cluster.connect_as("j_read", "j_read_ann"), "'peek'");
    assert_eq!(failure(&mut sql, id), "42501");
    let id = call(&mut sql, "'peek'");
    assert_eq!(result(&mut sql, id), json!(0));
}

#[test]
fn a_security_definer_function_enqueues_as_its_owner() {
    let cluster = shared();
    let mut sql = cluster.database("j_definer");
    role(&mut sql, "j_definer_bob");
    sql.batch_execute(
        "CREATE ROLE j_definer_ann LOGIN;
         CREATE FUNCTION who() RETURNS text[] LANGUAGE sql AS 'SELECT ARRAY[session_user, current_user]::text[]';
         CREATE FUNCTION enqueue() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS 'SELECT ir_async_call(''who'')';
         ALTER FUNCTION enqueue() OWNER TO j_definer_bob",
    )
    .unwrap();
    let id = number(&mut cluster.connect_as("j_definer", "j_definer_ann"), "enqueue()");
    assert_eq!(result(&mut sql, id), json!(["j_definer_bob", "j_definer_bob"]));
}

#[test]
fn execute_revoked_after_enqueue_fails_the_job() {
    let cluster = shared();
    let mut sql = cluster.database("j_revoke");
    role(&mut sql, "j_revoke_ann");
    sql.batch_execute("CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'").unwrap();
    let gate = Gate::close(&cluster, "j_revoke");
    let first = call(&mut sql, "'pass'");
    let mut ann = cluster.connect_as("j_revoke", "j_revoke_ann");
    let id = call(&mut ann, &format!("'one', depends_on => ARRAY[{first}]"));
    sql.batch_execute("REVOKE EXECUTE ON FUNCTION one() FROM PUBLIC").unwrap();
    gate.open();
    assert_eq!(failure(&mut sql, id), "42501");
}

#[test]
fn a_role_that_lost_login_fails_its_job_with_the_reason() {
    let cluster = shared();
    let mut sql = cluster.database("j_nologin");
    role(&mut sql, "j_nologin_ann");
    sql.batch_execute("CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'").unwrap();
    let gate = Gate::close(&cluster, "j_nologin");
    let first = call(&mut sql, "'pass'");
    let mut ann = cluster.connect_as("j_nologin", "j_nologin_ann");
    let id = call(&mut ann, &format!("'one', depends_on => ARRAY[{first}]"));
    sql.batch_execute("ALTER ROLE j_nologin_ann NOLOGIN").unwrap();
    gate.open();
    let error = ended(&mut sql, id)["payload"]["error"].clone();
    assert_eq!(error["code"], "runner_failed", "{error}");
    assert!(error["message"].as_str().unwrap().contains("not permitted to log in"), "{error}");
    assert_eq!(state(&mut sql, id), "failed");
}

#[test]
fn a_role_that_lost_connect_fails_its_job_with_the_reason() {
    let cluster = shared();
    let mut sql = cluster.database("j_noconnect");
    role(&mut sql, "j_noconnect_ann");
    let gate = Gate::close(&cluster, "j_noconnect");
    let first = call(&mut sql, "'pass'");
    let mut ann = cluster.connect_as("j_noconnect", "j_noconnect_ann");
    let id = call(&mut ann, &format!("'now', depends_on => ARRAY[{first}]"));
    sql.batch_execute("REVOKE CONNECT ON DATABASE j_noconnect FROM PUBLIC").unwrap();
    gate.open();
    let error = ended(&mut sql, id)["payload"]["error"].clone();
    assert_eq!(error["code"], "runner_failed", "{error}");
    assert!(error["message"].as_str().unwrap().contains("permission denied for database"), "{error}");
}

#[test]
fn a_role_that_was_dropped_fails_its_job() {
    let cluster = shared();
    let mut sql = cluster.database("j_norole");
    role(&mut sql, "j_norole_ann");
    let gate = Gate::close(&cluster, "j_norole");
    let first = call(&mut sql, "'pass'");
    let mut ann = cluster.connect_as("j_norole", "j_norole_ann");
    let id = call(&mut ann, &format!("'now', depends_on => ARRAY[{first}]"));
    drop(ann);
    sql.batch_execute("DROP OWNED BY j_norole_ann; DROP ROLE j_norole_ann").unwrap();
    gate.open();
    let error = ended(&mut sql, id)["payload"]["error"].clone();
    assert_eq!(error["code"], "runner_failed", "{error}");
    assert!(error["message"].as_str().unwrap().contains("does not exist"), "{error}");
}

#[test]
fn a_function_dropped_after_enqueue_fails_the_job() {
    let cluster = shared();
    let mut sql = cluster.database("j_dropped");
    sql.batch_execute("CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'").unwrap();
    let gate = Gate::close(&cluster, "j_dropped");
    let first = call(&mut sql, "'pass'");
    let id = call(&mut sql, &format!("'one', depends_on => ARRAY[{first}]"));
    sql.batch_execute("DROP FUNCTION one()").unwrap();
    gate.open();
    assert_eq!(failure(&mut sql, id), "42883");
}

#[test]
fn a_role_that_cannot_log_in_cannot_enqueue() {
    let cluster = shared();
    let mut sql = cluster.database("j_group");
    role(&mut sql, "j_group_ann");
    sql.batch_execute("ALTER ROLE j_group_ann NOLOGIN; SET ROLE j_group_ann").unwrap();
    assert_eq!(refusal(sql.query("SELECT ir_async_call('now')", &[])), "42501");
    assert_eq!(refusal(sql.query("SELECT ir_async_call_notify('n', 'now', '[]', '{}', '\"jobs\"')", &[])), "42501");
}

#[test]
fn a_role_that_cannot_connect_cannot_enqueue() {
    let cluster = shared();
    let mut sql = cluster.database("j_connect");
    role(&mut sql, "j_connect_ann");
    sql.batch_execute("REVOKE CONNECT ON DATABASE j_connect FROM PUBLIC; SET ROLE j_connect_ann").unwrap();
    assert_eq!(refusal(sql.query("SELECT ir_async_call('now')", &[])), "42501");
}

#[test]
fn a_role_without_execute_on_the_target_cannot_enqueue_it() {
    let cluster = shared();
    let mut sql = cluster.database("j_execute");
    role(&mut sql, "j_execute_ann");
    sql.batch_execute(
        "CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'; REVOKE EXECUTE ON FUNCTION one() FROM PUBLIC",
    )
    .unwrap();
    let mut ann = cluster.connect_as("j_execute", "j_execute_ann");
    assert_eq!(refusal(ann.query("SELECT ir_async_call('one')", &[])), "42501");
    sql.batch_execute("GRANT EXECUTE ON FUNCTION one() TO j_execute_ann").unwrap();
    let id = call(&mut ann, "'one'");
    assert_eq!(result(&mut sql, id), json!(1));
}

#[test]
fn an_unknown_function_cannot_be_enqueued() {
    let cluster = shared();
    let mut sql = cluster.database("j_unknown");
    assert_eq!(refusal(sql.query("SELECT ir_async_call('no_such_function')", &[])), "42883");
    assert_eq!(refusal(sql.query("SELECT ir_async_call('no_such_schema.f')", &[])), "42883");
    assert_eq!(number(&mut sql, "SELECT count(*) FROM ir_async"), 0);
}

#[test]
fn only_the_jobs_own_role_completes_it() {
    let cluster = shared();
    let mut sql = cluster.database("j_complete");
    role(&mut sql, "j_complete_ann");
    role(&mut sql, "j_complete_bob");
    sql.batch_execute("CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'").unwrap();
    let mut ann = cluster.connect_as("j_complete", "j_complete_ann");
    let mut bob = cluster.connect_as("j_complete", "j_complete_bob");
    let id = call(&mut ann, "'one'");
    ended(&mut sql, id);
    assert_eq!(refusal(bob.query("SELECT ir_async_complete($1)", &[&id])), "42501");
    assert_eq!(state(&mut sql, id), "succeeded");
    assert!(ann.query_one("SELECT ir_async_complete($1)", &[&id]).unwrap().get::<_, bool>(0));
    assert_eq!(state(&mut sql, id), "done");
}

#[test]
fn a_role_cannot_see_anothers_job() {
    let cluster = shared();
    let mut sql = cluster.database("j_see");
    role(&mut sql, "j_see_ann");
    role(&mut sql, "j_see_bob");
    let mut ann = cluster.connect_as("j_see", "j_see_ann");
    let mut bob = cluster.connect_as("j_see", "j_see_bob");
    let id = call(&mut ann, "'pg_backend_pid'");
    assert_eq!(status(&mut ann, id)["id"], json!(id));
    let seen: Option<String> = bob.query_one("SELECT ir_async_status($1)::text", &[&id]).unwrap().get(0);
    assert_eq!(seen, None);
    assert_eq!(refusal(bob.query("SELECT * FROM ir_async", &[])), "42501");
}

#[test]
fn an_inserted_job_runs_as_the_role_that_inserted_it() {
    let cluster = shared();
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE ROLE j_insert_owner LOGIN").unwrap();
    sql.batch_execute("CREATE DATABASE j_insert OWNER j_insert_owner").unwrap();
    let mut owner = cluster.connect_as("j_insert", "j_insert_owner");
    owner
        .batch_execute(
            "CREATE EXTENSION imbus;
             CREATE FUNCTION who() RETURNS text[] LANGUAGE sql AS 'SELECT ARRAY[session_user, current_user]::text[]'",
        )
        .unwrap();
    cluster.wait_served("j_insert");
    let id: i64 = owner
        .query_one("INSERT INTO ir_async (method, role) VALUES ('public.who()', 'postgres'::regrole) RETURNING id", &[])
        .unwrap()
        .get(0);
    assert_eq!(result(&mut owner, id), json!(["j_insert_owner", "j_insert_owner"]));
}

#[test]
fn a_job_has_the_search_path_of_its_enqueueing() {
    let cluster = shared();
    let mut sql = cluster.database("j_path");
    sql.batch_execute(
        "CREATE SCHEMA a; CREATE TABLE a.t AS SELECT 'a' AS v;
         CREATE SCHEMA b; CREATE TABLE b.t AS SELECT 'b' AS v;
         CREATE FUNCTION public.read() RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN (SELECT v FROM t); END';
         ALTER DATABASE j_path SET search_path = pg_catalog",
    )
    .unwrap();
    sql.batch_execute("SET search_path = a, public").unwrap();
    let first = call(&mut sql, "'read'");
    sql.batch_execute("SET search_path = b, public").unwrap();
    let second = call(&mut sql, "'read'");
    assert_eq!(result(&mut sql, first), json!("a"));
    assert_eq!(result(&mut sql, second), json!("b"));
}

// ---------------------------------------------------------------------------------------------------------------------
// When a job runs

#[test]
fn a_job_that_was_rolled_back_never_runs() {
    let cluster = shared();
    let mut sql = cluster.database("j_rollback");
    sql.batch_execute(
        "CREATE TABLE effect (n int);
         CREATE FUNCTION note(n int) RETURNS void LANGUAGE sql AS 'INSERT INTO effect VALUES (n)'",
    )
    .unwrap();
    sql.batch_execute("BEGIN; SELECT ir_async_call('note', '[1]'); ROLLBACK").unwrap();
    sql.batch_execute("BEGIN; SAVEPOINT s; SELECT ir_async_call('note', '[2]'); ROLLBACK TO s").unwrap();
    sql.batch_execute("SELECT ir_async_call('note', '[3]'); COMMIT").unwrap();
    let last = call(&mut sql, "'note', '[4]'");
    assert_eq!(ended(&mut sql, last)["state"], "done");
    eventually("nothing waits", || number(&mut sql, "SELECT count(*) FROM ir_async WHERE state <> 'done'") == 0);
    assert_eq!(value(&mut sql, "SELECT jsonb_agg(n ORDER BY n) FROM effect"), json!([3, 4]));
}

#[test]
fn an_unfinished_job_of_the_same_identity_is_returned_instead() {
    let cluster = shared();
    let mut sql = cluster.database("j_identity");
    let gate = Gate::close(&cluster, "j_identity");
    let first = call(&mut sql, "'pass', identity_key => 'k'");
    assert_eq!(call(&mut sql, "'pass', identity_key => 'k'"), first);
    runner_at_gate(&mut sql, 0);
    assert_eq!(call(&mut sql, "'pass', identity_key => 'k'"), first);
    let other = call(&mut sql, "'pass', identity_key => 'l'");
    assert_ne!(other, first);
    gate.open();
    ended(&mut sql, first);
    ended(&mut sql, other);
    assert!(call(&mut sql, "'pass', identity_key => 'k'") > other, "the key is free when its job has ended");
    assert_eq!(number(&mut sql, "SELECT count(*) FROM ir_async"), 3);
}

#[test]
fn a_smaller_priority_runs_first() {
    let cluster = Cluster::start_with(&["imbus.job_workers = 1"]);
    let mut sql = cluster.database("demo");
    sql.batch_execute(
        "CREATE TABLE effect (at bigserial, n int);
         CREATE FUNCTION note(n int) RETURNS void LANGUAGE sql AS 'INSERT INTO effect (n) VALUES (n)'",
    )
    .unwrap();
    let gate = Gate::close(&cluster, "demo");
    call(&mut sql, "'pass'");
    runner_at_gate(&mut sql, 0);
    for (n, priority) in [(4, 20), (5, 30), (2, 10), (3, 10), (1, -1)] {
        call(&mut sql, &format!("'note', '[{n}]', priority => {priority}"));
    }
    gate.open();
    eventually("all have run", || number(&mut sql, "SELECT count(*) FROM effect") == 5);
    assert_eq!(value(&mut sql, "SELECT jsonb_agg(n ORDER BY at) FROM effect"), json!([1, 2, 3, 4, 5]));
}

#[test]
fn a_smaller_priority_of_another_role_runs_first() {
    let cluster = Cluster::start_with(&["imbus.job_workers = 1"]);
    let mut sql = cluster.database("demo");
    role(&mut sql, "ann");
    sql.batch_execute(
        "CREATE TABLE effect (at bigserial, n int);
         CREATE FUNCTION note(n int) RETURNS void LANGUAGE sql SECURITY DEFINER AS 'INSERT INTO effect (n) VALUES (n)'",
    )
    .unwrap();
    let gate = Gate::close(&cluster, "demo");
    call(&mut sql, "'pass'");
    runner_at_gate(&mut sql, 0);
    for n in 2..30 {
        call(&mut sql, &format!("'note', '[{n}]', priority => 10"));
    }
    call(&mut cluster.connect_as("demo", "ann"), "'note', '[1]', priority => 1");
    // The worker looks at runners before it looks at Odoo, where nobody answers: it has asked the runner to make room.
    call(&mut sql, "'note', model => 'res.partner'");
    eventually("the worker has looked", || cluster.log().contains("could not have Odoo run jobs"));
    gate.open();
    eventually("all have run", || number(&mut sql, "SELECT count(*) FROM effect") == 29);
    assert_eq!(number(&mut sql, "SELECT n FROM effect ORDER BY at LIMIT 1"), 1);
}

#[test]
fn a_trigger_put_on_the_table_fires_in_a_session_with_an_older_snapshot_and_ever_after() {
    let cluster = shared();
    let mut sql = cluster.database("j_trigger");
    sql.batch_execute(
        "CREATE TABLE fired ();
         CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN INSERT INTO public.fired DEFAULT VALUES; RETURN NEW; END $$",
    )
    .unwrap();
    let mut other = cluster.connect("j_trigger");
    let enqueued = |other: &mut Client| _ = call(other, "'pg_catalog.now', run_at => now() + interval '1 day'");
    enqueued(&mut other);
    other.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM fired").unwrap();
    sql.batch_execute("CREATE TRIGGER fire BEFORE INSERT ON ir_async FOR EACH ROW EXECUTE FUNCTION fire()").unwrap();
    enqueued(&mut other);
    other.batch_execute("COMMIT").unwrap();
    assert_eq!(number(&mut sql, "SELECT count(*) FROM fired"), 1);
    enqueued(&mut other);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM fired"), 2);
}

#[test]
fn an_index_of_the_administrators_own_is_right_whatever_it_is_made_of() {
    let cluster = shared();
    let mut sql = cluster.database("j_own_index");
    let on_each = |sql: &mut Client, statements: &str| {
        let run = format!("DO $$ BEGIN FOR n IN 1..3 LOOP EXECUTE format({statements}, n); END LOOP; END $$");
        sql.batch_execute(&run).unwrap();
    };
    let enqueue = |sql: &mut Client| {
        for _ in 0..10 {
            call(sql, "'noop', run_at => now() + interval '1 hour'");
        }
    };
    let found = |sql: &mut Client| {
        number(sql, "SELECT count(*) FROM ir_async WHERE ending(method) = 'public.noop() 1' AND ending(method) > ''")
    };
    sql.batch_execute(
        "CREATE FUNCTION noop() RETURNS void LANGUAGE sql AS '';
         CREATE FUNCTION ending(method text) RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT method || ' 1' $$;
         SET enable_seqscan = off",
    )
    .unwrap();
    // Put in line, and kept compiled.
    let of_columns = "'CREATE INDEX ON ir_async_%1$s (ending(method)) WHERE ending(method) > '''''";
    on_each(&mut sql, of_columns);
    enqueue(&mut sql);
    assert_eq!((found(&mut sql), number(&mut sql, "SELECT count(*) FROM ONLY ir_async")), (10, 0));
    // Compiled, this one would look for what went with the statement before.
    let of_the_row = "'CREATE FUNCTION whole(job ir_async_%1$s) RETURNS text IMMUTABLE LANGUAGE plpgsql
                           AS ''BEGIN RETURN job.method || job.priority; END'';
                       CREATE INDEX ON ir_async_%1$s (whole(ir_async_%1$s))'";
    on_each(&mut sql, of_the_row);
    enqueue(&mut sql);
    assert_eq!(found(&mut sql), 20);
    let through_it = "SELECT count(*) FROM ir_async_1 j WHERE whole(j) = 'public.noop()10'";
    assert_eq!(number(&mut sql, through_it), 10);
    assert_eq!(number(&mut sql, "SELECT count(*) FROM ONLY ir_async"), 10);
}

#[test]
fn a_database_of_another_encoding_keeps_its_words() {
    let cluster = shared();
    let create = "CREATE DATABASE j_latin1 ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0";
    cluster.connect("postgres").batch_execute(create).unwrap();
    // What the client sends and reads is UTF-8, what is stored is not.
    let mut sql = cluster.connect("j_latin1");
    sql.batch_execute(
        "CREATE EXTENSION imbus;
         CREATE FUNCTION thanks(who text) RETURNS text LANGUAGE sql AS $$ SELECT 'schönen Dank, ' || who $$",
    )
    .unwrap();
    cluster.wait_served("j_latin1");
    let id = call(&mut sql, r#"'thanks', '["Æsa"]', description => 'Größe', queue => 'früh'"#);
    assert_eq!(result(&mut sql, id), "schönen Dank, Æsa");
    let found = status(&mut sql, id);
    assert_eq!((&found["name"], &found["queue"]), (&json!("Größe"), &json!("früh")));
    assert_eq!(number(&mut sql, "SELECT octet_length(name) FROM ir_async"), 5);
}

#[test]
fn a_job_waits_for_those_it_depends_on() {
    let cluster = shared();
    let mut sql = cluster.database("j_depends");
    sql.batch_execute(
        "CREATE TABLE effect (at bigserial, n int);
         CREATE FUNCTION note(n int) RETURNS void LANGUAGE sql AS 'INSERT INTO effect (n) VALUES (n)';
         CREATE FUNCTION fail() RETURNS int LANGUAGE sql AS 'SELECT 1 / 0'",
    )
    .unwrap();
    let gate = Gate::close(&cluster, "j_depends");
    let first = call(&mut sql, "'pass'");
    let failing = call(&mut sql, "'fail'");
    let second = call(&mut sql, &format!("'note', '[2]', depends_on => ARRAY[{first}], priority => 0"));
    let third = call(&mut sql, &format!("'note', '[3]', depends_on => ARRAY[{first}, {second}], priority => 0"));
    let never = call(&mut sql, &format!("'note', '[4]', depends_on => ARRAY[{failing}], priority => 0"));
    let free = call(&mut sql, "'note', '[1]'");
    ended(&mut sql, free);
    ended(&mut sql, failing);
    assert_eq!(state(&mut sql, second), "created");
    gate.open();
    assert_eq!(ended(&mut sql, third)["state"], "done");
    assert_eq!(value(&mut sql, "SELECT jsonb_agg(n ORDER BY at) FROM effect"), json!([1, 2, 3]));
    assert_eq!(state(&mut sql, never), "created");
}

#[test]
fn a_chain_of_jobs_goes_on_however_many_wait_behind_it() {
    let cluster = shared();
    let mut sql = cluster.database("j_chain");
    sql.batch_execute(
        "CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1';
         CREATE TABLE never AS SELECT ir_async_call('one', run_at => now() + interval '1 day') AS id;
         CREATE TABLE first AS SELECT ir_async_call('one', run_at => now() + interval '1 day') AS id;
         CREATE TABLE last AS SELECT id FROM first;
         DO $$ BEGIN
             FOR n IN 1..40 LOOP
                 UPDATE last SET id = ir_async_call('one', depends_on => ARRAY[id]);
             END LOOP;
         END $$;
         SELECT ir_async_call('one', depends_on => ARRAY[id]) FROM never, generate_series(1, 2500)",
    )
    .unwrap();
    sql.batch_execute("UPDATE ir_async SET run_at = now() WHERE id = (SELECT id FROM first)").unwrap();
    let last = number(&mut sql, "(SELECT id FROM last)");
    assert_eq!(ended(&mut sql, last)["state"], "succeeded");
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async WHERE NOT ready)"), 2500);
}

/// Each end frees one, and they end faster than the worker looks.
#[test]
fn a_thousand_jobs_that_each_wait_for_another_all_run() {
    let cluster = shared();
    let mut sql = cluster.database("j_pairs");
    sql.batch_execute(
        "CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1';
         CREATE TABLE pairs AS SELECT ir_async_call('one', run_at => now() + interval '1 day') AS id FROM generate_series(1, 1000);
         CREATE TABLE none AS SELECT ir_async_call('one', depends_on => ARRAY[id]) AS id FROM pairs;
         SELECT ir_async_cancel(id) FROM none;
         CREATE TABLE second AS SELECT ir_async_call('one', depends_on => ARRAY[id]) AS id FROM pairs;
         CREATE TABLE all_of AS SELECT ir_async_call('one', depends_on => array_agg(id)) AS id FROM second;
         UPDATE ir_async SET run_at = now() WHERE id IN (SELECT id FROM pairs)",
    )
    .unwrap();
    let last = number(&mut sql, "(SELECT id FROM all_of)");
    assert_eq!(ended(&mut sql, last)["state"], "succeeded");
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async WHERE state = 'succeeded')"), 2001);
    let order = "SELECT count(*) FROM ir_async s JOIN ir_async f ON f.id = ANY (s.depends_on) WHERE s.claimed_at < f.finished_at";
    assert_eq!(number(&mut sql, &format!("({order})")), 0);
}

#[test]
fn who_changes_a_job_that_its_snapshot_does_not_have_is_told_to_try_again() {
    let cluster = shared();
    let mut sql = cluster.database("j_unseen");
    let mut other = cluster.connect("j_unseen");
    other.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM pg_class").unwrap();
    let id = call(&mut sql, "'pg_catalog.now', run_at => now() + interval '1 day'");
    assert_eq!(refusal(other.query("SELECT ir_async_cancel($1)", &[&id])), "40001");
    other.batch_execute("ROLLBACK").unwrap();
    assert!(other.query_one("SELECT ir_async_cancel($1)", &[&id]).unwrap().get::<_, bool>(0));
    assert_eq!(refusal(other.query("SELECT ir_async_cancel($1)", &[&(id + 1000)])), "42704");
}

#[test]
fn a_job_never_runs_for_want_of_what_it_depends_on() {
    let cluster = shared();
    let mut sql = cluster.database("j_wants");
    sql.batch_execute("CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'").unwrap();
    let missing = sql.query("SELECT ir_async_call('one', depends_on => '{999999}')", &[]);
    assert_eq!(refusal(missing), "22023");
    // Cancelled, and older than what is kept.
    let cancelled = call(&mut sql, "'one', run_at => now() + interval '1 day'");
    let unneeded = call(&mut sql, "'one', run_at => now() + interval '1 day'");
    let widow = call(&mut sql, &format!("'one', depends_on => ARRAY[{cancelled}]"));
    // Failed and discarded; who waited for it has been cancelled, and may be brought back.
    sql.batch_execute("CREATE FUNCTION fail() RETURNS int LANGUAGE sql AS 'SELECT 1 / 0'").unwrap();
    let discarded = call(&mut sql, "'fail'");
    ended(&mut sql, discarded);
    let given_up = call(&mut sql, &format!("'one', depends_on => ARRAY[{discarded}]"));
    sql.execute("SELECT ir_async_cancel($1)", &[&given_up]).unwrap();
    for id in [cancelled, unneeded, discarded] {
        sql.execute("SELECT ir_async_cancel($1)", &[&id]).unwrap();
        sql.execute("UPDATE ir_async SET finished_at = now() - interval '1 year' WHERE id = $1", &[&id]).unwrap();
    }
    // Of a transaction that goes on, which has begun later, too.
    let mut early = sql.transaction().unwrap();
    early.execute("SELECT pg_current_xact_id()", &[]).unwrap();
    let mut other = cluster.connect("j_wants");
    let mut open = other.transaction().unwrap();
    let first: i64 = open.query_one("SELECT ir_async_call('one')", &[]).unwrap().get(0);
    let second = "SELECT ir_async_call('one', depends_on => ARRAY[$1::bigint])";
    let second: i64 = early.query_one(second, &[&first]).unwrap().get(0);
    early.commit().unwrap();
    // Of one that was rolled back.
    let mut third = cluster.connect("j_wants");
    let mut gone = third.transaction().unwrap();
    let never: i64 = gone.query_one("SELECT ir_async_call('one')", &[]).unwrap().get(0);
    gone.rollback().unwrap();
    let free = call(&mut sql, &format!("'one', depends_on => ARRAY[{never}]"));
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    let is_there = format!("SELECT count(*) FROM ir_async WHERE id = {unneeded}");
    eventually("what nobody depends on is deleted", || number(&mut sql, &is_there) == 0);
    sql.execute("SELECT ir_async_retry($1)", &[&given_up]).unwrap();
    let next = call(&mut sql, "'one'");
    ended(&mut sql, next);
    assert_eq!([widow, second, given_up].map(|id| state(&mut sql, id)), ["created", "created", "created"]);
    open.commit().unwrap();
    for id in [first, second, free] {
        assert_eq!(ended(&mut sql, id)["state"], "succeeded");
    }
    let order = format!(
        "SELECT (SELECT finished_at FROM ir_async WHERE id = {first}) <= (SELECT claimed_at FROM ir_async WHERE id = {second})"
    );
    assert!(sql.query_one(&order, &[]).unwrap().get::<_, bool>(0));
    assert_eq!([widow, given_up].map(|id| state(&mut sql, id)), ["created", "created"]);
}

#[test]
fn a_job_waits_for_its_time() {
    let cluster = shared();
    let mut sql = cluster.database("j_time");
    sql.batch_execute(
        "CREATE FUNCTION at() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT pg_catalog.clock_timestamp()'",
    )
    .unwrap();
    let far = call(&mut sql, "'at', run_at => now() + interval '1 hour', priority => 0");
    let near = call(&mut sql, "'at', run_at => clock_timestamp() + interval '300 ms', priority => 0");
    result(&mut sql, near);
    let late = format!(
        "SELECT CASE WHEN (payload ->> 'result')::timestamptz >= run_at THEN 1 END FROM ir_async WHERE id = {near}"
    );
    assert_eq!(number(&mut sql, &late), 1);
    assert_eq!(state(&mut sql, far), "created");
}

#[test]
fn a_failed_attempt_is_made_again() {
    let cluster = shared();
    let mut sql = cluster.database("j_retry");
    sql.batch_execute(
        "CREATE SEQUENCE tries; CREATE TABLE effect (n int);
         CREATE FUNCTION third_time() RETURNS bigint LANGUAGE plpgsql AS $$
         DECLARE n bigint := nextval('tries');
         BEGIN
             INSERT INTO effect VALUES (n);
             IF n < 3 THEN RAISE EXCEPTION 'not yet'; END IF;
             RETURN n;
         END $$",
    )
    .unwrap();
    let id = call(&mut sql, "'third_time', max_attempts => 3, retry_delay => '10 ms'");
    assert_eq!(result(&mut sql, id), json!(3));
    let found = status(&mut sql, id);
    assert_eq!((&found["attempts"], &found["deaths"]), (&json!(3), &json!(0)));
    assert_eq!(value(&mut sql, "SELECT jsonb_agg(n) FROM effect"), json!([3]));
}

#[test]
fn a_job_that_fails_each_time_fails_after_its_last_attempt() {
    let cluster = shared();
    let mut sql = cluster.database("j_give_up");
    sql.batch_execute("CREATE FUNCTION fail() RETURNS int LANGUAGE sql AS 'SELECT 1 / 0'").unwrap();
    let id = call(&mut sql, "'fail', max_attempts => 2, retry_delay => '10 ms'");
    assert_eq!(failure(&mut sql, id), "22012");
    assert_eq!(status(&mut sql, id)["attempts"], json!(2));
}

#[test]
fn three_hundred_jobs_of_four_roles_in_two_databases_each_run_once() {
    let cluster = shared();
    let mut first = cluster.database("j_many_1");
    let mut second = cluster.database("j_many_2");
    let roles = ["j_many_a", "j_many_b", "j_many_c", "j_many_d"];
    for name in roles {
        first.batch_execute(&format!("CREATE ROLE {name} LOGIN")).unwrap();
    }
    for sql in [&mut first, &mut second] {
        sql.batch_execute(&format!(
            "CREATE TABLE effect (n int, who text);
             CREATE FUNCTION note(n int) RETURNS void LANGUAGE sql AS 'INSERT INTO effect VALUES (n, session_user)';
             GRANT INSERT ON effect TO {0}; GRANT EXECUTE ON FUNCTION ir_async_call TO {0}",
            roles.join(", ")
        ))
        .unwrap();
    }
    for database in ["j_many_1", "j_many_2"] {
        let mut clients = roles.map(|name| cluster.connect_as(database, name));
        for n in 0..150_usize {
            call(&mut clients[n % roles.len()], &format!("'note', '[{n}]'"));
        }
    }
    for sql in [&mut first, &mut second] {
        eventually("all jobs have ended", || {
            number(sql, "SELECT count(*) FROM ir_async WHERE state = 'done' AND attempts = 1 AND deaths = 0") == 150
        });
        let good = "SELECT count(*) FROM effect WHERE who = 'j_many_' || substr('abcd', n % 4 + 1, 1)";
        assert_eq!(number(sql, good), 150);
        assert_eq!(number(sql, "SELECT count(DISTINCT n) FROM effect"), 150);
    }
}

#[test]
fn a_database_full_of_jobs_keeps_no_other_from_its_turn() {
    let cluster = Cluster::start_with(&["imbus.job_workers = 1"]);
    let (mut busy, mut other) = (cluster.database("j_busy"), cluster.database("j_other"));
    for sql in [&mut busy, &mut other] {
        sql.batch_execute("CREATE FUNCTION nap() RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(0.02)'").unwrap();
    }
    busy.batch_execute("SELECT ir_async_call('nap') FROM generate_series(1, 3000)").unwrap();
    let waiting = "SELECT count(*) FROM ir_async WHERE state = 'created'";
    eventually("the runner is at it", || number(&mut busy, waiting) < 2990);
    let id = call(&mut other, "'nap'");
    ended(&mut other, id);
    assert!(number(&mut busy, waiting) > 100, "it did not have to wait for all of them");
    eventually("the runner is back", || {
        let before = number(&mut busy, waiting);
        std::thread::sleep(std::time::Duration::from_millis(300));
        number(&mut busy, waiting) < before
    });
}

#[test]
fn a_job_leaves_nothing_to_the_next_one_in_its_session() {
    let cluster = shared();
    let mut sql = cluster.database("j_reset");
    role(&mut sql, "j_reset_ann");
    sql.batch_execute(
        "CREATE FUNCTION soil() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
             SET work_mem = '65kB';
             PERFORM set_config('imbus_test.left', 'x', false);
             CREATE TEMPORARY TABLE left_over (n int);
             EXECUTE 'PREPARE left_over AS SELECT 1';
             PERFORM pg_advisory_lock(4711);
             RETURN pg_backend_pid();
         END $$;
         CREATE FUNCTION look() RETURNS jsonb LANGUAGE sql AS $$
             SELECT jsonb_build_object('pid', pg_backend_pid(),
                 'setting', current_setting('work_mem') = '65kB',
                 'own setting', COALESCE(current_setting('imbus_test.left', true), '') <> '',
                 'table', to_regclass('pg_temp.left_over') IS NOT NULL,
                 'statement', EXISTS (SELECT FROM pg_prepared_statements WHERE name = 'left_over'),
                 'lock', EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())) $$",
    )
    .unwrap();
    let mut ann = cluster.connect_as("j_reset", "j_reset_ann");
    let mut found = Value::Null;
    // Another runner may take the second job: until it is the same one.
    eventually("a runner takes both jobs", || {
        let soil = call(&mut ann, "'soil'");
        let soiled = result(&mut sql, soil);
        let look = call(&mut ann, "'look'");
        found = result(&mut sql, look);
        found["pid"] == soiled
    });
    let left: Vec<&String> = found.as_object().unwrap().iter().filter(|(_, v)| **v == true).map(|(k, _)| k).collect();
    assert!(left.is_empty(), "{found}");
}

// ---------------------------------------------------------------------------------------------------------------------
// What dies while a job runs

/// A function whose effect would show twice if two runs of it were committed.
const EFFECT: &str = "CREATE TABLE effect (n int);
     CREATE FUNCTION work() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
         INSERT INTO effect VALUES (1); PERFORM pass(); RETURN 1; END $$";

#[test]
fn a_job_survives_the_termination_of_its_runner() {
    let cluster = shared();
    let mut sql = cluster.database("j_killed");
    sql.batch_execute(EFFECT).unwrap();
    let gate = Gate::close(&cluster, "j_killed");
    let mut socket = cluster.subscriber(&mut sql, json!(["jobs"]), 0);
    let id = number(&mut sql, "ir_async_call_notify('W', 'work', '[]', '{}', '\"jobs\"')");
    let pid = runner_at_gate(&mut sql, 0);
    sql.execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
    runner_at_gate(&mut sql, pid);
    gate.open();
    let states: Vec<Value> = (0..5).map(|_| socket.payload()["state"].clone()).collect();
    assert_eq!(states, ["created", "processing", "created", "processing", "succeeded"]);
    let found = status(&mut sql, id);
    assert_eq!((&found["attempts"], &found["deaths"]), (&json!(1), &json!(1)));
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 1);
}

#[test]
fn a_job_that_kills_its_runners_fails_after_the_fifth() {
    let cluster = shared();
    let mut sql = cluster.database("j_deadly");
    sql.batch_execute(
        "CREATE SEQUENCE runs;
         CREATE FUNCTION die() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
             PERFORM nextval('runs'); PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(60); RETURN 1;
         END $$",
    )
    .unwrap();
    let id = call(&mut sql, "'die'");
    assert_eq!(failure(&mut sql, id), "runner_died");
    assert_eq!(status(&mut sql, id)["deaths"], json!(5));
    assert_eq!(number(&mut sql, "SELECT last_value FROM runs"), 5);
}

#[test]
fn a_job_survives_the_termination_of_the_database_worker() {
    let cluster = shared();
    let mut sql = cluster.database("j_worker");
    sql.batch_execute(EFFECT).unwrap();
    let gate = Gate::close(&cluster, "j_worker");
    let id = call(&mut sql, "'work'");
    let runner = runner_at_gate(&mut sql, 0);
    let worker = "SELECT pid FROM imbus_stat_bus WHERE datname = current_database()";
    let pid = number(&mut sql, worker);
    sql.execute("SELECT pg_terminate_backend($1)", &[&i32::try_from(pid).unwrap()]).unwrap();
    eventually("the worker is back", || {
        let now = sql.query_opt(worker, &[]).unwrap().and_then(|row| row.get::<_, Option<i32>>(0));
        now.is_some_and(|now| i64::from(now) != pid)
    });
    // The worker that is back has looked at the jobs when another one has run.
    let other = call(&mut sql, "'pg_backend_pid'");
    assert_ne!(result(&mut sql, other), json!(runner));
    gate.open();
    assert_eq!(result(&mut sql, id), json!(1));
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 1);
    assert_eq!(status(&mut sql, id)["deaths"], json!(0));
}

#[test]
fn a_job_survives_the_crash_of_the_server() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    // The gate is a row: a lock would be gone with the crash.
    sql.batch_execute(
        "CREATE TABLE effect (n int); CREATE TABLE gate (n int); CREATE SEQUENCE runs;
         CREATE FUNCTION work() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO effect VALUES (1);
             PERFORM nextval('runs');
             WHILE NOT EXISTS (SELECT FROM gate) LOOP PERFORM pg_sleep(0.01); END LOOP;
             RETURN pg_backend_pid();
         END $$",
    )
    .unwrap();
    let id = call(&mut sql, "'work'");
    let at_work = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'imbus job demo' AND wait_event = 'PgSleep'";
    // It sleeps ever again for a moment: whoever looks twice may see it once.
    let mut pid = 0;
    eventually("the job runs", || {
        let row = sql.query_opt(at_work, &[]).unwrap();
        pid = row.as_ref().map_or(0, |row| row.get(0));
        row.is_some()
    });
    kill_9(pid);
    eventually("the server has noticed", || sql.simple_query("SELECT 1").is_err());
    let mut sql = recovered(&cluster, "demo");
    eventually("the job runs again", || sql.query_opt(at_work, &[]).unwrap().is_some());
    assert_eq!(state(&mut sql, id), "processing");
    sql.batch_execute("INSERT INTO gate VALUES (1)").unwrap();
    assert_ne!(result(&mut sql, id), json!(pid));
    assert_eq!(number(&mut sql, "SELECT count(*) FROM effect"), 1);
    assert_eq!(status(&mut sql, id)["attempts"], json!(1));
}
