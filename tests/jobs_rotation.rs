//! The tables in which jobs wait and run are truncated by turns: nothing of a job is lost, and dead rows do not pile up under a
//! transaction that stays open.

mod common;

use common::{Cluster, eventually};
use postgres::{Client, IsolationLevel, Transaction};

fn number(sql: &mut impl postgres::GenericClient, query: &str) -> i64 {
    sql.query_one(&format!("SELECT ({query})::bigint"), &[]).unwrap().get(0)
}

/// A cluster, and a database with a function that does nothing and one that notes what it is called with.
fn cluster(database: &str) -> (Cluster, Client) {
    let cluster = Cluster::start_with(&["imbus.queues = 'out:0'", "shared_buffers = 64MB"]);
    let mut sql = cluster.database(database);
    sql.batch_execute(
        "CREATE FUNCTION nothing() RETURNS void LANGUAGE sql AS '';
         CREATE TABLE noted (n int);
         CREATE FUNCTION note(n int) RETURNS int LANGUAGE sql AS 'INSERT INTO noted VALUES (n) RETURNING n'",
    )
    .unwrap();
    (cluster, sql)
}

/// So many jobs, by which a table of jobs fills: some 200 bytes each.
fn burst(sql: &mut impl postgres::GenericClient, jobs: i32) {
    let text = "SELECT count(*) FROM ir_async_call_many((SELECT jsonb_agg(jsonb_build_object('target', 'nothing'))
                                                           FROM generate_series(1, $1)))";
    sql.query_one(text, &[&jobs]).unwrap();
}

/// How large the tables are in which jobs wait and run.
fn size(sql: &mut impl postgres::GenericClient) -> i64 {
    number(sql, "(SELECT sum(pg_relation_size(inhrelid)) FROM pg_inherits WHERE inhparent = 'ir_async'::regclass)")
}

/// The table that a job is in.
fn place(sql: &mut Client, id: i64) -> String {
    sql.query_one("SELECT tableoid::regclass::text FROM ir_async WHERE id = $1", &[&id]).unwrap().get(0)
}

fn call(sql: &mut Client, arguments: &str) -> i64 {
    number(sql, &format!("ir_async_call({arguments})"))
}

/// A transaction that has seen something, and stays open.
fn stay_open(client: &mut Client) -> Transaction<'_> {
    let mut transaction = client.build_transaction().isolation_level(IsolationLevel::RepeatableRead).start().unwrap();
    number(&mut transaction, "(SELECT count(*) FROM noted)");
    number(&mut transaction, "pg_current_xact_id()::text::bigint");
    transaction
}

const MB: i64 = 1 << 20;

#[test]
fn dead_rows_do_not_pile_up_under_a_transaction_that_stays_open() {
    let (cluster, mut sql) = cluster("rotation_dead");
    let mut other = cluster.connect("rotation_dead");
    let mut open = stay_open(&mut other);
    let done = |sql: &mut Client| {
        eventually("all is done", || {
            number(sql, "(SELECT count(*) FROM ir_async WHERE state IN ('created', 'processing'))") == 0
        });
    };
    for _ in 0..6 {
        burst(&mut sql, 50_000);
        done(&mut sql);
        // One by one, in lanes of their own too, while a look at all lanes passes many dead entries.
        for n in 0..100 {
            call(&mut sql, &format!("'note', '[0]', priority => {}, queue => 'lane ' || {}", n % 3, n % 5));
        }
        done(&mut sql);
    }
    // 300,000 jobs leave as many dead rows, of 200 bytes and more each.
    eventually("they are cleared away", || size(&mut sql) < 20 * MB);
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async WHERE state IN ('done', 'succeeded'))"), 300_600);
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async WHERE attempts <> 1 OR deaths <> 0)"), 0);
    assert_eq!(number(&mut sql, "(SELECT count(DISTINCT id) FROM ir_async)"), 300_600);
    number(&mut open, "(SELECT count(*) FROM noted)");
}

#[test]
fn what_waits_and_what_is_worked_on_outlasts_its_table() {
    let (cluster, mut sql) = cluster("rotation_live");
    sql.batch_execute("CREATE TABLE gate ()").unwrap();
    sql.batch_execute(
        "CREATE FUNCTION pass() RETURNS int LANGUAGE plpgsql AS $$
         BEGIN LOCK TABLE gate IN ACCESS SHARE MODE; RETURN 1; END $$",
    )
    .unwrap();
    let (mut keeper, mut runner) = (cluster.connect("rotation_live"), cluster.connect("rotation_live"));
    let mut gate = keeper.transaction().unwrap();
    gate.batch_execute("LOCK TABLE gate IN ACCESS EXCLUSIVE MODE").unwrap();
    let later = call(&mut sql, "'note', '[1]', run_at => now() + interval '1 hour'");
    let long = call(&mut sql, "'pass'");
    let failed = call(&mut sql, "'note', '[\"x\"]'");
    let claimed = call(&mut sql, "'note', '[2]', queue => 'out'");
    let waiting = call(&mut sql, "'note', '[3]', queue => 'out'");
    let keyed = call(&mut sql, "'note', '[4]', queue => 'out', identity_key => 'a key'");
    let blocked = call(&mut sql, &format!("'note', '[5]', depends_on => ARRAY[{keyed}, {long}]"));
    let first = place(&mut sql, later);
    for id in [claimed, waiting, keyed, blocked] {
        assert_eq!(place(&mut sql, id), first);
    }
    let token: String = runner.query_one("SELECT token FROM ir_async_claim('out')", &[]).unwrap().get(0);
    eventually("the long one runs", || {
        number(&mut sql, &format!("(SELECT count(*) FROM ir_async WHERE id = {long} AND state = 'processing')")) == 1
    });
    burst(&mut sql, 120_000);
    eventually("what waits has another table", || place(&mut sql, later) != first);
    eventually("so have the others", || {
        [waiting, long, failed, keyed, blocked].iter().all(|id| place(&mut sql, *id) != first)
            && place(&mut sql, failed) == "ir_async"
    });
    assert_eq!(place(&mut sql, claimed), first, "a runner outside works on it");
    // All of them are what they were.
    assert_eq!(call(&mut sql, "'note', '[4]', queue => 'out', identity_key => 'a key'"), keyed);
    drop(gate);
    runner.execute("SELECT ir_async_finish($1, $2, '2')", &[&claimed, &token]).unwrap();
    let ended = |sql: &mut Client, id: i64, state: &str| {
        let text = format!("(SELECT count(*) FROM ir_async WHERE id = {id} AND state = '{state}' AND deaths = 0)");
        eventually(&format!("job {id} is {state}"), || number(sql, &text) == 1);
    };
    ended(&mut sql, long, "succeeded");
    ended(&mut sql, failed, "failed");
    ended(&mut sql, claimed, "succeeded");
    assert_eq!(number(&mut sql, &format!("(SELECT attempts FROM ir_async WHERE id = {long})")), 1);
    for id in [waiting, keyed] {
        let row = runner.query_one("SELECT id, token FROM ir_async_claim('out')", &[]).unwrap();
        assert_eq!(row.get::<_, i64>(0), id);
        runner.execute("SELECT ir_async_finish($1, $2, '1')", &[&id, &row.get::<_, String>(1)]).unwrap();
    }
    ended(&mut sql, blocked, "succeeded");
    assert!(sql.query_one("SELECT ir_async_cancel($1)", &[&later]).unwrap().get::<_, bool>(0));
    // Once nobody works in it any more, the table goes.
    eventually("it is truncated", || number(&mut sql, &format!("pg_relation_size('{first}')")) == 0);
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async)"), 120_007);
}

#[test]
fn a_snapshot_from_before_sees_the_jobs_of_its_time() {
    let (cluster, mut sql) = cluster("rotation_snapshot");
    burst(&mut sql, 120_000);
    eventually("all have ended", || {
        number(&mut sql, "(SELECT count(*) FROM ir_async WHERE state IN ('created', 'processing'))") == 0
    });
    eventually("a table fills anew", || size(&mut sql) < 16 * MB);
    let id = call(&mut sql, "'note', '[1]', run_at => now() + interval '1 hour'");
    let first = place(&mut sql, id);
    let mut other = cluster.connect("rotation_snapshot");
    burst(&mut sql, 120_000);
    // Its table is left, and emptied soon. A snapshot is waited for only so long: it is made no sooner.
    eventually("another table takes the jobs", || {
        let next = call(&mut sql, "'nothing'");
        place(&mut sql, next) != first
    });
    let mut before = stay_open(&mut other);
    assert_eq!(place(&mut sql, id), first, "it has not been moved yet");
    eventually("what waits has been moved", || place(&mut sql, id) != first);
    // The worker looks ten times a second whether the table can go.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let seen = format!("(SELECT count(*) FROM ir_async WHERE id = {id} AND state = 'created')");
    let all = "(SELECT count(*) FROM ir_async)";
    assert_eq!(number(&mut before, &seen), 1, "it is seen where it was");
    assert_eq!(number(&mut before, all), number(&mut sql, all));
    drop(before);
    eventually("then its table goes", || number(&mut sql, &format!("pg_relation_size('{first}')")) == 0);
    assert_eq!(number(&mut sql, &seen), 1);
}

#[test]
fn jobs_survive_a_crash_while_their_tables_change() {
    let (cluster, mut sql) = cluster("rotation_crash");
    let jobs = 120_000;
    let text = "SELECT count(*) FROM ir_async_call_many((SELECT jsonb_agg(jsonb_build_object(
                    'target', 'note', 'args', jsonb_build_array(n))) FROM generate_series($1::int, $2::int) n))";
    for first in (1..jobs).step_by(20_000) {
        sql.query_one(text, &[&first, &(first + 19_999)]).unwrap();
        let pid: i32 =
            sql.query_one("SELECT pid FROM imbus_stat_bus WHERE datname = current_database()", &[]).unwrap().get(0);
        if first % 40_000 == 1 {
            common::kill_9(pid);
            eventually("the server has noticed", || sql.simple_query("SELECT 1").is_err());
            sql = common::recovered(&cluster, "rotation_crash");
        }
    }
    eventually("all have ended", || number(&mut sql, "(SELECT count(*) FROM ir_async WHERE finished_at IS NULL)") == 0);
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async WHERE state = 'succeeded')"), i64::from(jobs));
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM noted)"), i64::from(jobs));
    assert_eq!(number(&mut sql, "(SELECT count(DISTINCT n) FROM noted)"), i64::from(jobs));
    eventually("their tables are cleared", || size(&mut sql) < 20 * MB);
}

#[test]
fn a_schema_called_like_a_word_of_a_statement_and_a_publication_of_all_tables_stop_no_job() {
    let (cluster, mut sql) = cluster("rotation_names");
    let schema = r#""a PROGRESS, TABLE; PLACE ""CHILD"" NEXT, JOBS""#;
    let mut old = cluster.connect("rotation_names");
    let named = |session: &mut Client, schema: &str| {
        let text = format!(
            "SELECT {schema}.ir_async_call('note', '[0]', run_at => 'infinity', identity_key => {schema}.keys())"
        );
        session.batch_execute(&text).unwrap();
    };
    sql.batch_execute(
        "CREATE SEQUENCE key; CREATE FUNCTION keys() RETURNS text LANGUAGE sql AS $$ SELECT nextval('key')::text $$",
    )
    .unwrap();
    // A session that knows the table's name hears of another one, its own and somebody else's, and when it does not come to it.
    named(&mut sql, "public");
    sql.batch_execute("BEGIN; ALTER SCHEMA public RENAME TO other; SET search_path = other").unwrap();
    named(&mut sql, "other");
    sql.batch_execute("ROLLBACK").unwrap();
    named(&mut sql, "public");
    named(&mut old, "public");
    sql.batch_execute(&format!(
        "CREATE PUBLICATION everything FOR ALL TABLES; ALTER SCHEMA public RENAME TO {schema};
         ALTER DATABASE rotation_names SET search_path = {schema}"
    ))
    .unwrap();
    old.batch_execute(&format!("SET search_path = {schema}")).unwrap();
    named(&mut old, schema);
    old.batch_execute("SELECT ir_async_cancel(id) FROM ir_async").unwrap();
    let mut sql = cluster.connect("rotation_names");
    let id = call(&mut sql, "'note', '[1]'");
    let claimed = call(&mut sql, "'note', '[2]', queue => 'out', notify => '[\"jobs\"]'");
    let token: String = sql.query_one("SELECT token FROM ir_async_claim('out')", &[]).unwrap().get(0);
    sql.query_one("SELECT ir_async_progress($1, $2, 50, 'half')", &[&claimed, &token]).unwrap();
    sql.query_one("SELECT ir_async_finish($1, $2, '2')", &[&claimed, &token]).unwrap();
    for id in [id, claimed] {
        eventually("it ends", || {
            number(&mut sql, &format!("(SELECT count(*) FROM ir_async WHERE id = {id} AND state = 'succeeded')")) == 1
        });
    }
    burst(&mut sql, 120_000);
    eventually("a table is changed", || {
        number(&mut sql, "(SELECT count(*) FROM ir_async WHERE finished_at IS NULL)") == 0 && size(&mut sql) < 16 * MB
    });
}

#[test]
fn a_row_put_in_by_hand_takes_nobodys_place() {
    let (cluster, mut sql) = cluster("rotation_hand");
    sql.batch_execute("CREATE ROLE r_hand LOGIN; ALTER DATABASE rotation_hand OWNER TO r_hand").unwrap();
    let waiting = call(&mut sql, "'note', '[1]', queue => 'out'");
    let claimed = call(&mut sql, "'note', '[2]', queue => 'out', priority => 1");
    let token: String = sql.query_one("SELECT token FROM ir_async_claim('out')", &[]).unwrap().get(0);
    let mut hand = cluster.connect_as("rotation_hand", "r_hand");
    let insert = |hand: &mut Client, table: &str, id: i64, more: (&str, &str)| {
        let text = format!(
            "INSERT INTO {table} (id, method, role, queue{}) VALUES ({id}, 'public.note(integer)', 10, 'out'{}) RETURNING id",
            more.0, more.1
        );
        hand.query(&text, &[])
    };
    for table in ["ir_async", "ir_async_1", "ir_async_2", "ir_async_3"] {
        for id in [waiting, claimed] {
            assert_eq!(common::refusal(insert(&mut hand, table, id, ("", ""))), "23505", "{table}");
        }
    }
    // Nor its key while it has not ended.
    let keyed = call(&mut sql, "'note', '[4]', queue => 'out', identity_key => 'k'");
    for table in ["ir_async", "ir_async_1", "ir_async_2", "ir_async_3"] {
        assert_eq!(common::refusal(insert(&mut hand, table, 1001, (", identity_key", ", 'k'"))), "23505", "{table}");
    }
    sql.query_one("SELECT ir_async_cancel($1)", &[&keyed]).unwrap();
    insert(&mut hand, "ir_async_2", 1001, (", identity_key", ", 'k'")).unwrap();
    assert_eq!(common::refusal(insert(&mut hand, "ir_async_3", 1002, (", identity_key", ", 'k'"))), "23505");
    assert_eq!(call(&mut sql, "'note', '[5]', queue => 'out', identity_key => 'k'"), 1001);
    // What waits for others does wherever it is.
    let blocked = format!(", '{{{claimed}}}'");
    insert(&mut hand, "ir_async_2", 1002, (", depends_on", &blocked)).unwrap();
    // On one that is restored yet: before it was not known of any that was deleted.
    insert(&mut hand, "ir_async_3", 1004, (", depends_on", ", '{1005}'")).unwrap();
    let free = call(&mut sql, &format!("'nothing', depends_on => ARRAY[{keyed}]"));
    assert!(sql.query_one("SELECT ir_async_retry($1)", &[&keyed]).is_err(), "its key has another job");
    sql.query_one("SELECT ir_async_cancel($1)", &[&1001_i64]).unwrap();
    assert!(sql.query_one("SELECT ir_async_retry($1)", &[&keyed]).unwrap().get::<_, bool>(0));
    let again: (i64, String) = loop {
        let row = sql.query_one("SELECT id, token FROM ir_async_claim('out')", &[]).unwrap();
        if row.get::<_, i64>(0) == keyed {
            break (keyed, row.get(1));
        }
    };
    sql.execute("SELECT ir_async_finish($1, $2)", &[&again.0, &again.1]).unwrap();
    eventually("what waits for it is free", || {
        number(&mut sql, &format!("(SELECT count(*) FROM ir_async WHERE id = {free} AND state = 'done')")) == 1
    });
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async WHERE id IN (1002, 1004) AND NOT ready)"), 2);
    // A token that was seen in the table is nobody else's.
    insert(&mut hand, "ir_async_3", 1003, (", state, token", &format!(", 'processing', '{token}'"))).unwrap();
    let row = sql.query_one("SELECT state::text, token::text, role::regrole::text FROM ir_async WHERE id = 1003", &[]);
    let row = row.unwrap();
    assert_eq!((row.get(0), row.get::<_, Option<String>>(1), row.get(2)), ("created", None, "r_hand"));
    // Who comes first with an id that is given out later has a job of his own, and no hold on the other.
    let next = number(&mut sql, "(SELECT last_value + 1 FROM ir_async_id_seq)");
    insert(&mut hand, "ir_async", next, ("", "")).unwrap();
    assert_eq!(call(&mut sql, "'note', '[3]', queue => 'out'"), next);
    assert!(hand.query_one("SELECT ir_async_cancel($1)", &[&next]).unwrap().get::<_, bool>(0));
    let states = "SELECT string_agg(role::regrole || ' ' || state, ', ' ORDER BY state) FROM ir_async WHERE id = $1";
    let states: String = sql.query_one(states, &[&next]).unwrap().get(0);
    assert_eq!(states, "r_hand cancelled, postgres created");
}

#[test]
fn who_has_the_same_id_by_hand_is_not_given_back_dead_or_deleted_in_anothers_stead() {
    let (cluster, mut sql) = cluster("rotation_twin");
    sql.batch_execute(
        "CREATE ROLE r_twin LOGIN; ALTER DATABASE rotation_twin OWNER TO r_twin; CREATE ROLE r_one LOGIN;
         GRANT EXECUTE ON FUNCTION ir_async_call, ir_async_claim, ir_async_finish TO r_one",
    )
    .unwrap();
    let mut one = cluster.connect_as("rotation_twin", "r_one");
    let mut hand = cluster.connect_as("rotation_twin", "r_twin");
    let id = call(&mut sql, "'nothing'") + 1;
    let text = format!(
        "INSERT INTO ir_async (id, method, role, queue) VALUES ({id}, 'public.note(integer)', 10, 'out');
         GRANT EXECUTE ON FUNCTION ir_async_claim, ir_async_finish TO r_twin"
    );
    hand.batch_execute(&text).unwrap();
    assert_eq!(call(&mut one, "'note', '[1]', queue => 'out'"), id);
    let claim = |cluster: &Cluster, role: &str| {
        let mut runner = cluster.connect_as("rotation_twin", role);
        let row = runner.query_one("SELECT id, token FROM ir_async_claim('out')", &[]).unwrap();
        assert_eq!(row.get::<_, i64>(0), id);
        (runner, row.get::<_, String>(1))
    };
    let is = |sql: &mut Client, role: &str, what: &str| {
        number(sql, &format!("(SELECT count(*) FROM ir_async WHERE id = {id} AND role = '{role}'::regrole AND {what})"))
            == 1
    };
    let untouched = "state = 'processing' AND deaths = 0 AND attempts = 1 AND token IS NOT NULL";
    // Both are worked on; one runner is gone, and then the other.
    let (first, _) = claim(&cluster, "r_one");
    let (second, token) = claim(&cluster, "r_twin");
    assert!(is(&mut sql, "r_one", untouched) && is(&mut sql, "r_twin", untouched));
    drop(first);
    eventually("one is given back", || is(&mut sql, "r_one", "state = 'created' AND token IS NULL"));
    assert!(is(&mut sql, "r_twin", untouched));
    let (first, _) = claim(&cluster, "r_one");
    drop(second);
    eventually("the other is", || is(&mut sql, "r_twin", "state = 'created' AND token IS NULL"));
    assert!(is(&mut sql, "r_one", "state = 'processing'"));
    // What the one ends with, and how old it is, is not the other's.
    let (mut second, again) = claim(&cluster, "r_twin");
    assert_ne!(token, again);
    second.execute("SELECT ir_async_finish($1, $2, '2')", &[&id, &again]).unwrap();
    assert!(is(&mut sql, "r_twin", "state = 'succeeded'") && is(&mut sql, "r_one", "state = 'processing'"));
    sql.execute("UPDATE ir_async SET finished_at = now() - interval '4 days' WHERE state = 'succeeded'", &[]).unwrap();
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    eventually("it is deleted", || !is(&mut sql, "r_twin", "true"));
    assert!(is(&mut sql, "r_one", "state = 'processing'"));
    drop(first);
    eventually("and the other one is still there", || is(&mut sql, "r_one", "state = 'created'"));
}

/// So many jobs with keys of their own, each of which another one waits for.
fn keyed_burst(sql: &mut Client, name: &str, pairs: i32) {
    let text = "WITH first AS (
             SELECT * FROM ir_async_call_many((SELECT jsonb_agg(jsonb_build_object(
                 'target', 'nothing', 'identity_key', $1 || n)) FROM generate_series(1, $2) n)) f (id))
         SELECT count(*) FROM ir_async_call_many((SELECT jsonb_agg(jsonb_build_object(
                 'target', 'nothing', 'depends_on', ARRAY[id])) FROM first)) s (id)";
    sql.query_one(text, &[&name, &pairs]).unwrap();
}

#[test]
fn nor_do_those_of_jobs_with_keys_and_of_those_that_wait_for_others() {
    let (cluster, mut sql) = cluster("rotation_keyed");
    let mut other = cluster.connect("rotation_keyed");
    let mut open = stay_open(&mut other);
    for round in 0..3 {
        keyed_burst(&mut sql, &format!("{round} "), 20_000);
        eventually("all is done", || {
            number(&mut sql, "(SELECT count(*) FROM ir_async WHERE state IN ('created', 'processing'))") == 0
        });
    }
    eventually("they are cleared away", || size(&mut sql) < 20 * MB);
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async WHERE state = 'done' AND attempts = 1)"), 120_000);
    // What has ended is where nothing is truncated: its own dead rows would stay.
    eventually("it is counted", || number(&mut sql, "pg_stat_get_live_tuples('ir_async'::regclass)") > 100_000);
    assert!(number(&mut sql, "pg_stat_get_dead_tuples('ir_async'::regclass)") < 1_000);
    number(&mut open, "(SELECT count(*) FROM noted)");
}

/// Has another table take new jobs.
fn change_table(sql: &mut Client) {
    let id = call(sql, "'nothing'");
    let first = place(sql, id);
    burst(sql, 120_000);
    eventually("another table takes the jobs", || {
        let next = call(sql, "'nothing', run_at => 'infinity'");
        let is_another = place(sql, next) != first;
        sql.query_one("SELECT ir_async_cancel($1)", &[&next]).unwrap();
        is_another
    });
}

/// Has a session of its own enqueue a job with a key that stays; its id.
fn enqueue_beside(cluster: &Cluster, database: &str, key: &'static str) -> std::thread::JoinHandle<i64> {
    let mut session = cluster.connect(database);
    std::thread::spawn(move || {
        let text = "SELECT ir_async_call('nothing', queue => 'out', identity_key => $1)";
        session.query_one(text, &[&key]).unwrap().get(0)
    })
}

/// One session waits for another's transaction, and keeps nobody from moving jobs, nor from putting in other keys by hand.
fn waits(sql: &mut Client) {
    const WAITS: &str = "FROM pg_stat_activity WHERE wait_event = 'transactionid'";
    eventually("somebody waits", || number(sql, &format!("(SELECT count(*) {WAITS})")) == 1);
    let locks = format!(
        "(SELECT count(*) FROM pg_locks WHERE pid = (SELECT pid {WAITS})
             AND (locktype = 'object' OR mode = 'RowExclusiveLock' AND relation IN (SELECT inhrelid FROM pg_inherits)))"
    );
    assert_eq!(number(sql, &locks), 0);
}

#[test]
fn a_key_is_one_jobs_in_whatever_tables_it_is_asked_for() {
    let (cluster, mut sql) = cluster("rotation_twins");
    let (mut first, mut second) = (cluster.connect("rotation_twins"), cluster.connect("rotation_twins"));
    let mut third = cluster.connect("rotation_twins");
    const CALL: &str = "SELECT ir_async_call('nothing', queue => 'out', identity_key => $1)";
    let enqueue = |transaction: &mut Transaction<'_>, key: &str| {
        transaction.query_one(CALL, &[&key]).map(|row| row.get::<_, i64>(0))
    };
    // While it is not committed, in a table that does not take the jobs any more.
    let mut open = first.transaction().unwrap();
    let id = enqueue(&mut open, "k").unwrap();
    let mut undone = second.transaction().unwrap();
    enqueue(&mut undone, "undone").unwrap();
    // Of the time before it.
    let mut old = stay_open(&mut third);
    change_table(&mut sql);
    let beside = enqueue_beside(&cluster, "rotation_twins", "k");
    waits(&mut sql);
    open.commit().unwrap();
    assert_eq!(beside.join().unwrap(), id, "the other's");
    let mut read_only = first.build_transaction().read_only(true).start().unwrap();
    assert_eq!(common::refusal(read_only.query(CALL, &[&"k"])), "25006");
    drop(read_only);
    assert_eq!(common::refusal(old.query(CALL, &[&"k"])), "40001");
    drop(old);
    let beside = enqueue_beside(&cluster, "rotation_twins", "undone");
    waits(&mut sql);
    undone.rollback().unwrap();
    let own = beside.join().unwrap();
    assert_eq!(call(&mut sql, "'nothing', queue => 'out', identity_key => 'undone'"), own);
    // In one table it is no other matter.
    let mut open = first.transaction().unwrap();
    let same = enqueue(&mut open, "same").unwrap();
    let beside = enqueue_beside(&cluster, "rotation_twins", "same");
    waits(&mut sql);
    open.commit().unwrap();
    assert_eq!(beside.join().unwrap(), same);
    // One that is brought back: it comes to where the others are, beside none with its key.
    assert!(sql.query_one("SELECT ir_async_cancel($1)", &[&id]).unwrap().get::<_, bool>(0));
    let mut open = first.transaction().unwrap();
    let later = enqueue(&mut open, "k").unwrap();
    change_table(&mut sql);
    let mut session = cluster.connect("rotation_twins");
    let retry = "SELECT ir_async_retry($1)";
    let beside = std::thread::spawn(move || common::refusal(session.query(retry, &[&id])));
    waits(&mut sql);
    open.commit().unwrap();
    assert_eq!(beside.join().unwrap(), "23505");
    assert!(sql.query_one("SELECT ir_async_cancel($1)", &[&later]).unwrap().get::<_, bool>(0));
    assert!(sql.query_one(retry, &[&id]).unwrap().get::<_, bool>(0));
    assert_ne!(place(&mut sql, id), "ir_async", "it waits where the others do");
    assert_eq!(call(&mut sql, "'nothing', queue => 'out', identity_key => 'k'"), id);
}

#[test]
fn no_key_has_two_jobs_while_many_ask_for_it_and_the_tables_change() {
    let (cluster, mut sql) = cluster("rotation_storm");
    let is_over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let goes_on = {
        let is_over = std::sync::Arc::clone(&is_over);
        move || !is_over.load(std::sync::atomic::Ordering::Relaxed)
    };
    let asker = |seed: i32| {
        let (mut session, goes_on) = (cluster.connect("rotation_storm"), goes_on.clone());
        std::thread::spawn(move || {
            let (mut ids, mut deadlocks) = (std::collections::BTreeSet::new(), 0);
            let text = "SELECT ir_async_call('note', jsonb_build_array($1::int), identity_key => ($1::int % 3)::text,
                                      priority => 0)";
            for n in (0_i32..).take_while(|_| goes_on()) {
                match session.query_one(text, &[&(seed + n)]) {
                    Ok(row) => drop(ids.insert(row.get::<_, i64>(0))),
                    // Two have met while the tables changed.
                    Err(error) if error.code().is_some_and(|code| code.code() == "40P01") => deadlocks += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            (ids, deadlocks)
        })
    };
    let askers: Vec<_> = (0..4).map(asker).collect();
    let mut watcher = cluster.connect("rotation_storm");
    let watch = std::thread::spawn(move || {
        while goes_on() {
            let twins = "(SELECT count(*) FROM (SELECT FROM ir_async WHERE state IN ('created', 'processing')
                           AND identity_key IS NOT NULL GROUP BY identity_key HAVING count(*) > 1) t)";
            assert_eq!(number(&mut watcher, twins), 0);
        }
    });
    for _ in 0..2 {
        change_table(&mut sql);
    }
    is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    watch.join().unwrap();
    let asked: Vec<_> = askers.into_iter().map(|asker| asker.join().unwrap()).collect();
    let ids: std::collections::BTreeSet<i64> = asked.iter().flat_map(|(ids, _)| ids).copied().collect();
    println!("{} jobs, {} deadlocks", ids.len(), asked.iter().map(|(_, count)| count).sum::<i32>());
    eventually("all is done", || {
        number(&mut sql, "(SELECT count(*) FROM ir_async WHERE state IN ('created', 'processing'))") == 0
    });
    let noted = number(&mut sql, "(SELECT count(*) FROM noted)");
    assert_eq!(noted, i64::try_from(ids.len()).unwrap(), "each job that somebody was told of has run, once");
    assert_eq!(number(&mut sql, "(SELECT count(*) FROM ir_async WHERE identity_key IS NOT NULL)"), noted);
}

#[test]
fn who_asks_for_a_key_in_two_tables_at_once_gets_one_job() {
    const KEYS: i64 = 24;
    let (cluster, mut sql) = cluster("rotation_meeting");
    let mut hand = cluster.connect("rotation_meeting");
    let waiting = |sql: &mut Client, count: i64| {
        let text = "(SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND wait_event = 'object')";
        eventually("they wait", || number(sql, text) == count);
    };
    let askers = || {
        let ask = |key: i64| {
            let mut session = cluster.connect("rotation_meeting");
            std::thread::spawn(move || {
                let text = "SELECT ir_async_call('nothing', queue => 'out', identity_key => 'key ' || $1)";
                session.query_one(text, &[&key.to_string()]).map(|row| row.get::<_, i64>(0))
            })
        };
        (0..KEYS).map(ask).collect::<Vec<_>>()
    };
    // The tables are ready.
    change_table(&mut sql);
    // Whoever puts a job with a key in by hand has all wait who enqueue such, after they have chosen a table.
    let mut open = hand.transaction().unwrap();
    open.batch_execute(
        "SET LOCAL ROLE pg_database_owner;
         INSERT INTO ir_async_1 (id, method, role, identity_key) VALUES (-1, 'public.nothing()', 10, 'by hand')",
    )
    .unwrap();
    let mut all = askers();
    waiting(&mut sql, KEYS);
    change_table(&mut sql);
    all.extend(askers());
    waiting(&mut sql, 2 * KEYS);
    open.commit().unwrap();
    let (mut deadlocks, mut told) = (0, std::collections::BTreeMap::new());
    for (number, asker) in all.into_iter().enumerate() {
        let key = format!("key {}", i64::try_from(number).unwrap() % KEYS);
        match asker.join().unwrap() {
            Ok(id) => assert_eq!(*told.entry(key).or_insert(id), id),
            Err(error) if error.code().is_some_and(|code| code.code() == "40P01") => deadlocks += 1,
            Err(error) => panic!("{error}"),
        }
    }
    println!("{deadlocks} deadlocks");
    for (key, id) in told {
        let is_there = format!("(SELECT count(*) FROM ir_async WHERE id = {id} AND identity_key = '{key}')");
        assert_eq!(number(&mut sql, &is_there), 1);
    }
    let jobs = "(SELECT count(*) FROM ir_async WHERE state = 'created' AND identity_key LIKE 'key %')";
    assert_eq!(number(&mut sql, jobs), KEYS);
    assert_eq!(number(&mut sql, &jobs.replace("count(*)", "count(DISTINCT identity_key)")), KEYS);
}

#[test]
fn what_waits_in_any_way_is_kept_by_a_dump() {
    let (cluster, mut sql) = cluster("rotation_dump");
    sql.batch_execute("CREATE ROLE r_dump LOGIN; ALTER DATABASE rotation_dump OWNER TO r_dump").unwrap();
    sql.batch_execute("CREATE DATABASE rotation_copy OWNER r_dump").unwrap();
    let mut owner = cluster.connect_as("rotation_dump", "r_dump");
    let keyed = call(&mut owner, "'nothing', queue => 'out', identity_key => 'k'");
    let blocked = call(&mut owner, &format!("'nothing', queue => 'out', depends_on => ARRAY[{keyed}]"));
    let failed = call(&mut owner, "'nothing', queue => 'out', identity_key => 'ended'");
    owner.query_one("SELECT ir_async_cancel($1)", &[&failed]).unwrap();
    let file = cluster.dir.join("jobs.dump").display().to_string();
    let port = cluster.port.to_string();
    let run = |program: &str, role: &str, arguments: &[&str]| {
        cluster.run(program, &[&["-h", "127.0.0.1", "-p", &port, "-U", role][..], arguments].concat());
    };
    run("pg_dump", "postgres", &["-F", "c", "-f", &file, "rotation_dump"]);
    run("pg_restore", "r_dump", &["--no-owner", "-e", "-d", "rotation_copy", &file]);
    let mut copy = cluster.connect_as("rotation_copy", "r_dump");
    let states = "SELECT string_agg(id || ' ' || state || ' ' || ready, ', ' ORDER BY id) FROM ir_async";
    let states: String = copy.query_one(states, &[]).unwrap().get(0);
    assert_eq!(states, format!("{keyed} created true, {blocked} created false, {failed} cancelled true"));
    assert_eq!(call(&mut copy, "'nothing', queue => 'out', identity_key => 'k'"), keyed);
    let row = copy.query_one("SELECT id, token FROM ir_async_claim('out')", &[]).unwrap();
    assert_eq!(row.get::<_, i64>(0), keyed);
    copy.execute("SELECT ir_async_finish($1, $2)", &[&keyed, &row.get::<_, String>(1)]).unwrap();
    eventually("the other is free", || {
        number(&mut copy, &format!("(SELECT count(*) FROM ir_async WHERE id = {blocked} AND ready)")) == 1
    });
    assert!(call(&mut copy, "'nothing', queue => 'out', identity_key => 'k'") > failed);
}
