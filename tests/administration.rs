//! Living with an administrator while clients are connected: restores, fail-over, restarts under load, Odoo's database
//! manager, extensions and bus tables that come and go; and what the owner of a database must not be able to do.

mod common;

use common::{Cluster, Follower, ODOO_TABLE, Socket, eventually, free_port, publish, shared, token, within};
use postgres::Client;
use serde_json::json;
use std::collections::HashSet;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// "found without configuration within 10 s"; the same for the move-over (SPEC sections 3 and 7).
const FOUND: Duration = Duration::from_secs(10);
/// "it is back within 5 s" (SPEC section 10).
const BACK: Duration = Duration::from_secs(5);

/// A role that is no superuser, and its database with the extension, which it has installed itself after `before`.
fn owned(cluster: &Cluster, name: &str, before: &str) -> Client {
    let mut sql = cluster.connect("postgres");
    sql.batch_execute(&format!("CREATE ROLE {name} LOGIN CREATEDB")).unwrap();
    sql.batch_execute(&format!("CREATE DATABASE {name} OWNER {name}")).unwrap();
    let mut owner = cluster.connect_as(name, name);
    owner.batch_execute(before).unwrap();
    owner.batch_execute("CREATE EXTENSION imbus").unwrap();
    served(cluster, name);
    owner
}

/// The database gets its worker as soon as the contract says.
fn served(cluster: &Cluster, database: &str) {
    let mut sql = cluster.connect(database);
    let asked = "SELECT 1 FROM imbus_stat_gateway g, imbus_stat_bus b
                  WHERE g.port IS NOT NULL AND b.pid IS NOT NULL AND b.datname = current_database()";
    within(FOUND, &format!("database {database} is served"), || {
        sql.query_opt(asked, &[]).is_ok_and(|row| row.is_some())
    });
}

fn number(sql: &mut Client, query: &str) -> i64 {
    sql.query_one(query, &[]).unwrap().get(0)
}

fn yes(sql: &mut Client, query: &str) -> bool {
    sql.query_one(query, &[]).unwrap().get(0)
}

/// The process of this type that is not `but`, if there is one. Asked as superuser.
fn process(sql: &mut Client, backend_type: &str, but: i32) -> Option<i32> {
    let text = "SELECT pid FROM pg_stat_activity WHERE backend_type = $1 AND pid <> $2";
    sql.query_opt(text, &[&backend_type, &but]).unwrap().map(|row| row.get(0))
}

/// Enqueues a job that does not end by itself, waits until it runs, and one that waits for its time.
fn jobs_that_wait(sql: &mut Client) {
    sql.batch_execute(
        "CREATE FUNCTION endless() RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(3600)';
         SELECT ir_async_call('endless'), ir_async_call('now', run_at => now() + interval '1 day')",
    )
    .unwrap();
    job_runs(sql);
}

fn job_runs(sql: &mut Client) {
    eventually("the job runs", || yes(sql, "SELECT EXISTS (SELECT FROM ir_async WHERE state = 'processing')"));
}

/// Clients of a database: one that follows, and some that only sit there.
fn clients(cluster: &Cluster, sql: &mut Client) -> (Follower, Vec<Socket>) {
    let idle = (0..5).map(|_| cluster.subscriber(sql, json!(["news"]), 0)).collect();
    (Follower::open(cluster, sql, json!(["news"]), 0), idle)
}

// ---------------------------------------------------------------------------------------------------------------------
// Dump and restore

/// Dumps a database in which messages were published, drops it, and restores it under its name: once as superuser, once
/// as its owner. Clients come back with what they had.
fn restored(name: &str, format: &str, odoo: bool) {
    let cluster = shared();
    let mut owner = owned(&cluster, name, if odoo { ODOO_TABLE } else { "" });
    let ids: Vec<i64> = ["one", "two", "three"].map(|payload| publish(&mut owner, "news", payload)).into();
    let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
    reader.reads(&["three"]);
    drop((owner, reader));
    let file = cluster.dir.join(format!("{name}.dump")).display().to_string();
    let port = cluster.port.to_string();
    let run = |program: &str, role: &str, arguments: &[&str]| {
        cluster.run(program, &[&["-h", "127.0.0.1", "-p", &port, "-U", role][..], arguments].concat())
    };
    run("pg_dump", name, &["-F", format, "-f", &file, name]);
    let text = if format == "p" { std::fs::read_to_string(&file).unwrap() } else { pg_restore_text(&cluster, &file) };
    assert!(!text.contains("TRIGGER") && !text.contains("imbus_bus_inserted"), "a trigger in the dump: {text}");
    for role in ["postgres", name] {
        let mut sql = cluster.connect_as("postgres", name);
        sql.batch_execute(&format!("DROP DATABASE {name}")).unwrap();
        sql.batch_execute(&format!("CREATE DATABASE {name} OWNER {name}")).unwrap();
        match format {
            "p" => run("psql", role, &["-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", &file, name]),
            _ => run("pg_restore", role, &["--exit-on-error", "-d", name, &file]),
        };
        served(&cluster, name);
        goes_on(&cluster, name, &ids, odoo);
    }
}

fn pg_restore_text(cluster: &Cluster, file: &str) -> String {
    cluster.run("pg_restore", &["-f", "-", file])
}

/// In a restored database the old rows are there for clients that come back, and new ones come above them.
fn goes_on(cluster: &Cluster, name: &str, ids: &[i64], odoo: bool) {
    let mut owner = cluster.connect_as(name, name);
    let table = if odoo { "bus_bus" } else { "imbus_bus" };
    assert_eq!(number(&mut owner, &format!("SELECT count(*) FROM {table}")), 3);
    let mut reader = Follower::open(cluster, &mut owner, json!(["news"]), ids[0]);
    reader.reads(&["two", "three"]);
    let id = publish(&mut owner, "news", "four");
    assert!(id > ids[2], "{id} after {ids:?}");
    reader.reads(&["four"]);
    // What was delivered shortly before may come twice (SPEC section 6), but not behind what is new.
    assert_eq!(reader.payloads().last().map(String::as_str), Some("four"));
    assert_eq!(number(&mut owner, &format!("SELECT max(id)::bigint FROM {table}")), id);
    drop(owner);
}

#[test]
fn a_plain_dump_goes_on_where_it_was() {
    restored("a_plain", "p", false);
}

#[test]
fn a_custom_dump_goes_on_where_it_was() {
    restored("a_custom", "c", false);
}

#[test]
fn a_plain_dump_of_odoo_goes_on_where_it_was() {
    restored("a_plain_odoo", "p", true);
}

#[test]
fn a_custom_dump_of_odoo_goes_on_where_it_was() {
    restored("a_custom_odoo", "c", true);
}

#[test]
fn the_owner_of_a_copy_uses_it() {
    let cluster = shared();
    drop(owned(&cluster, "a_given", ""));
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE ROLE a_heir LOGIN").unwrap();
    sql.batch_execute("CREATE DATABASE a_taken TEMPLATE a_given OWNER a_heir").unwrap();
    served(&cluster, "a_taken");
    let mut heir = cluster.connect_as("a_taken", "a_heir");
    publish(&mut heir, "news", "mine");
    Follower::open(&cluster, &mut heir, json!(["news"]), 0).reads(&["mine"]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Servers that stop, die and are promoted

/// A standby of the cluster, streaming.
fn standby_of(cluster: &Cluster) -> Cluster {
    let standby = Cluster { dir: cluster.dir.join("standby"), port: free_port() };
    let (data, port) = (standby.dir.join("data").display().to_string(), cluster.port.to_string());
    cluster.run(
        "pg_basebackup",
        &["-h", "127.0.0.1", "-p", &port, "-U", "postgres", "-R", "-D", &data, "-X", "stream", "-c", "fast", "-N"],
    );
    let mut conf = std::fs::OpenOptions::new().append(true).open(standby.dir.join("data/postgresql.conf")).unwrap();
    write!(conf, "port = {}\nunix_socket_directories = ''\n", standby.port).unwrap();
    standby.pg_ctl(&["-w", "start"]);
    standby
}

#[test]
fn a_client_of_a_promoted_standby_gets_what_it_missed() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let standby = standby_of(&cluster);
    let mut there = standby.connect("demo");
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'imbus%'";
    let mut late = cluster.connect("demo");
    late.batch_execute("BEGIN").unwrap();
    publish(&mut late, "news", "late");
    let mut reader = Follower::open(&cluster, &mut sql, json!(["news"]), 0);
    publish(&mut sql, "news", "early");
    reader.reads(&["early"]);
    reader.drop_connection();
    late.batch_execute("COMMIT").unwrap();
    publish(&mut sql, "news", "missed");
    let here: String = sql.query_one("SELECT pg_current_wal_lsn()::text", &[]).unwrap().get(0);
    let replayed = format!("SELECT COALESCE(pg_last_wal_replay_lsn() >= '{here}'::pg_lsn, false)");
    eventually("the standby has it all", || yes(&mut there, &replayed));
    assert_eq!(number(&mut there, workers), 0, "nothing is served in recovery");
    let refused = there.query("SELECT bus_sendone('news', 'test', '1')", &[]).expect_err("refused");
    let polled = there.query_one("SELECT count(*) FROM bus_poll('[\"news\"]', 0)", &[]).map(|row| row.get::<_, i64>(0));
    drop((sql, late));
    cluster.pg_ctl(&["-m", "immediate", "stop"]);
    assert!(yes(&mut there, "SELECT pg_promote(true, 60)"));
    served(&standby, "demo");
    let mut reader = reader.moved_to(standby.ws_port(&mut there));
    reader.reads(&["missed", "late"]);
    publish(&mut there, "news", "later");
    reader.reads(&["later"]);
    // Asked while it was in recovery.
    assert_eq!(refused.code().map(|code| code.code()), Some("25006"), "{refused:?}");
    assert_eq!(polled.map_err(|error| error.to_string()), Ok(3));
}

#[test]
fn looking_takes_no_transaction_number() {
    let cluster = shared();
    let mut sql = cluster.database("a_looking");
    publish(&mut sql, "news", "seen");
    for look in ["bus_last_id()", "bus_poll('[\"news\"]', 0)", "bus_has_missed_notifications(1)", "ir_async_status(1)"]
    {
        let mut transaction = sql.transaction().unwrap();
        transaction.query(&format!("SELECT {look}"), &[]).unwrap();
        let number = "SELECT pg_current_xact_id_if_assigned()::text";
        let number: Option<String> = transaction.query_one(number, &[]).unwrap().get(0);
        assert_eq!(number, None, "{look} only looks");
    }
}

/// Writes numbered messages until told to stop, each again until the server says that it is committed. Every few are
/// held open for a moment, so that ids are not committed in their order. Returns what was committed.
fn write_through_restarts(cluster: &Cluster, name: &str, held: bool, stop: &AtomicBool) -> Vec<String> {
    let (mut sql, mut committed) = (None, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let payload = format!("{name} {}", committed.len());
        let client: &mut Client = match &mut sql {
            Some(client) => client,
            None => match cluster.try_connect("demo", "postgres") {
                Ok(client) => sql.insert(client),
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
            },
        };
        let hold = if held { "SELECT pg_sleep(0.1)" } else { "SELECT pg_sleep(0.002)" };
        let batch = format!("BEGIN; SELECT bus_sendone('news', 'test', '\"{payload}\"'); {hold}; COMMIT");
        match client.batch_execute(&batch) {
            Ok(()) => committed.push(payload),
            Err(_) => sql = None,
        }
    }
    committed
}

#[test]
fn nothing_committed_is_lost_in_immediate_restarts_under_load() {
    let cluster = Cluster::start_with(&[&format!("imbus.port = {}", free_port())]);
    let mut sql = cluster.database("demo");
    let mut reader = Follower::open(&cluster, &mut sql, json!(["news"]), 0);
    drop(sql);
    let stop = AtomicBool::new(false);
    let committed: Vec<String> = std::thread::scope(|scope| {
        let (cluster, stop) = (&cluster, &stop);
        let writers = [("a", false), ("b", true), ("c", true)]
            .map(|(name, held)| scope.spawn(move || write_through_restarts(cluster, name, held, stop)));
        // Should the reader give up, the writers must too.
        let _stop = Stop(stop);
        for _ in 0..2 {
            let before = reader.found.len();
            reader.until("messages come", |reader| reader.found.len() > before + 200);
            cluster.pg_ctl(&["-m", "immediate", "-w", "restart"]);
        }
        let before = reader.found.len();
        reader.until("messages come again", |reader| reader.found.len() > before + 100);
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect()
    });
    let came = reader.try_until(|reader| all_came(reader, &committed));
    let payloads = reader.payloads();
    let lost: Vec<&String> = committed.iter().filter(|payload| !payloads.contains(payload)).collect();
    assert!(came, "lost {} of {}: {lost:?}", lost.len(), committed.len());
}

fn all_came(reader: &Follower, committed: &[String]) -> bool {
    let came: HashSet<String> = reader.payloads().into_iter().collect();
    committed.iter().all(|payload| came.contains(payload))
}

/// Tells the writers to stop, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_fast_stop_is_prompt_with_clients_jobs_and_an_open_transaction() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    jobs_that_wait(&mut sql);
    let (_reader, _idle) = clients(&cluster, &mut sql);
    sql.batch_execute("BEGIN").unwrap();
    publish(&mut sql, "news", "open");
    cluster.pg_ctl(&["-m", "fast", "-t", "10", "-w", "stop"]);
}

#[test]
fn a_smart_stop_is_prompt_once_sql_clients_are_gone() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    jobs_that_wait(&mut sql);
    let (_reader, _idle) = clients(&cluster, &mut sql);
    cluster.pg_ctl(&["-m", "smart", "-W", "stop"]);
    publish(&mut sql, "news", "a session goes on");
    drop(sql);
    within(Duration::from_secs(10), "the server has stopped", || !cluster.dir.join("data/postmaster.pid").exists());
}

#[test]
fn each_worker_that_is_terminated_is_back_and_clients_lose_nothing() {
    let cluster = Cluster::start_with(&[&format!("imbus.port = {}", free_port())]);
    let mut sql = cluster.database("demo");
    jobs_that_wait(&mut sql);
    let mut reader = Follower::open(&cluster, &mut sql, json!(["news"]), 0);
    let mut late = cluster.connect("demo");
    for (at, kind) in ["imbus database demo", "imbus job demo", "imbus gateway"].into_iter().enumerate() {
        late.batch_execute("BEGIN").unwrap();
        publish(&mut late, "news", &format!("late {at}"));
        publish(&mut sql, "news", &format!("before {at}"));
        reader.reads(&[&format!("before {at}")]);
        let pid = process(&mut sql, kind, 0).unwrap();
        assert!(yes(&mut sql, &format!("SELECT pg_terminate_backend({pid})")));
        publish(&mut sql, "news", &format!("meanwhile {at}"));
        within(BACK, &format!("there is another {kind}"), || process(&mut sql, kind, pid).is_some());
        late.batch_execute("COMMIT").unwrap();
        publish(&mut sql, "news", &format!("after {at}"));
        reader.reads(&[&format!("late {at}"), &format!("meanwhile {at}"), &format!("after {at}")]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Databases that are copied, renamed and dropped

/// What Odoo's database manager does first: it terminates all sessions of the database, and goes on when it cannot.
fn terminate_all(cluster: &Cluster, manager: &mut Client, database: &str) {
    cluster.left_by_superusers(database);
    let text = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()";
    assert!(!manager.query(text, &[&database]).unwrap().is_empty(), "there were sessions to terminate");
}

#[test]
fn odoos_manager_copies_and_drops_again_and_again_with_clients_and_jobs() {
    let cluster = shared();
    let mut inside = owned(&cluster, "a_managed", ODOO_TABLE);
    jobs_that_wait(&mut inside);
    let (mut reader, _idle) = clients(&cluster, &mut inside);
    let mut manager = cluster.connect_as("postgres", "a_managed");
    for round in 0..3 {
        publish(&mut inside, "news", &format!("before {round}"));
        terminate_all(&cluster, &mut manager, "a_managed");
        manager.batch_execute("CREATE DATABASE a_managed_copy ENCODING 'unicode' TEMPLATE a_managed").unwrap();
        served(&cluster, "a_managed_copy");
        served(&cluster, "a_managed");
        inside = cluster.connect_as("a_managed", "a_managed");
        publish(&mut inside, "news", &format!("after {round}"));
        reader.reads(&[&format!("before {round}"), &format!("after {round}")]);
        job_runs(&mut inside);
        terminate_all(&cluster, &mut manager, "a_managed_copy");
        manager.batch_execute("DROP DATABASE a_managed_copy").unwrap();
    }
    terminate_all(&cluster, &mut manager, "a_managed");
    manager.batch_execute("DROP DATABASE a_managed").unwrap();
}

#[test]
fn a_renamed_database_keeps_its_jobs_and_serves_new_clients() {
    let cluster = shared();
    let mut inside = owned(&cluster, "a_old", "");
    jobs_that_wait(&mut inside);
    let (_reader, _idle) = clients(&cluster, &mut inside);
    drop(inside);
    let mut manager = cluster.connect_as("postgres", "a_old");
    manager.batch_execute("ALTER DATABASE a_old RENAME TO a_new").unwrap();
    served(&cluster, "a_new");
    let mut inside = cluster.connect_as("a_new", "a_old");
    let mut reader = Follower::open(&cluster, &mut inside, json!(["news"]), 0);
    publish(&mut inside, "news", "renamed");
    reader.reads(&["renamed"]);
    job_runs(&mut inside);
    assert_eq!(number(&mut inside, "SELECT count(*) FROM ir_async WHERE state IN ('created', 'processing')"), 2);
    drop(inside);
    manager.batch_execute("DROP DATABASE a_new").unwrap();
}

#[test]
fn a_session_that_holds_one_database_often_leaves_the_others_free() {
    // Its own cluster: when this fails, no database of the whole cluster can be dropped meanwhile.
    let cluster = Cluster::start();
    let mut holder = owned(&cluster, "a_holder", "");
    drop(owned(&cluster, "a_free", ""));
    holder.batch_execute("BEGIN").unwrap();
    for _ in 0..40 {
        holder.batch_execute("SAVEPOINT s; DROP EXTENSION imbus; ROLLBACK TO s").unwrap();
    }
    let mut manager = cluster.connect_as("postgres", "a_free");
    manager.batch_execute("CREATE DATABASE a_free_copy TEMPLATE a_free").unwrap();
    holder.batch_execute("ROLLBACK").unwrap();
    served(&cluster, "a_holder");
}

// ---------------------------------------------------------------------------------------------------------------------
// Extensions and bus tables that come and go

/// What still ties Odoo's table to imbus: triggers, and objects that a function or the extension depends upon.
const TIES: &str = "SELECT (SELECT count(*) FROM pg_trigger WHERE tgrelid = 'bus_bus'::regclass)
     + (SELECT count(*) FROM pg_depend WHERE classid = 'pg_trigger'::regclass
           AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.oid = objid))
     + (SELECT count(*) FROM pg_depend d WHERE d.refclassid = 'pg_class'::regclass
           AND d.refobjid = 'bus_bus'::regclass AND d.classid = 'pg_proc'::regclass)
     + (SELECT count(*) FROM pg_proc WHERE proname LIKE 'imbus%' OR probin LIKE '%imbus%')";

#[test]
fn the_extension_goes_without_a_trace_on_odoos_table_and_comes_back() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_again", ODOO_TABLE);
    let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
    publish(&mut owner, "news", "before");
    reader.reads(&["before"]);
    // This session has the table's triggers in its cache.
    let mut writer = cluster.connect_as("a_again", "a_again");
    let insert = r#"INSERT INTO bus_bus (channel, message, create_date) VALUES
        ('["a_again","news"]', '{"type":"t","payload":"without"}', now() AT TIME ZONE 'UTC')"#;
    writer.batch_execute(&insert.replace("without", "by hand")).unwrap();
    reader.reads(&["by hand"]);
    owner.batch_execute("DROP EXTENSION imbus").unwrap();
    assert_eq!(number(&mut owner, TIES), 0);
    writer.batch_execute(insert).unwrap();
    assert_eq!(number(&mut owner, "SELECT count(*) FROM bus_bus"), 3);
    owner.batch_execute("CREATE EXTENSION imbus").unwrap();
    served(&cluster, "a_again");
    publish(&mut owner, "news", "again");
    reader.reads(&["without", "again"]);
}

/// The table in which a row with this payload stands; empty when there is none.
fn table_of(sql: &mut Client, id: i64) -> String {
    let text = "SELECT COALESCE((SELECT tableoid::regclass::text FROM bus_bus WHERE id = $1), '')";
    sql.query_one(text, &[&i32::try_from(id).unwrap()]).unwrap().get(0)
}

/// Waits until the move-over has brought this row.
fn moved(sql: &mut Client, id: i64) {
    within(FOUND, "Odoo's table has taken over with the old rows", || table_of(sql, id) == "bus_bus");
}

#[test]
fn odoos_table_takes_over_without_a_loss() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_moved", "");
    let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
    let mut old: Vec<i64> = (0..20).map(|n| publish(&mut owner, "news", &format!("before {n}"))).collect();
    // An id given out and rolled back counts too.
    owner.batch_execute("BEGIN").unwrap();
    let drawn = publish(&mut owner, "news", "never");
    owner.batch_execute("ROLLBACK").unwrap();
    let mut late = cluster.connect_as("a_moved", "a_moved");
    late.batch_execute("BEGIN").unwrap();
    old.push(publish(&mut late, "news", "late"));
    owner.batch_execute(ODOO_TABLE).unwrap();
    let mut during = Vec::new();
    within(FOUND, "Odoo's table has taken over with the old rows", || {
        let payload = format!("during {}", during.len());
        during.push(publish(&mut owner, "news", &payload));
        table_of(&mut owner, old[19]) == "bus_bus"
    });
    late.batch_execute("COMMIT").unwrap();
    let after = publish(&mut owner, "news", "after");
    assert!(after > drawn && old.iter().chain(&during).all(|id| *id < after), "{after}: {old:?} {drawn} {during:?}");
    assert!(during.is_sorted(), "{during:?}");
    assert_eq!(table_of(&mut owner, after), "bus_bus");
    for id in &old[..20] {
        assert_eq!(table_of(&mut owner, *id), "bus_bus", "row {id} was copied");
    }
    let mut all: Vec<String> = (0..20).map(|n| format!("before {n}")).collect();
    all.extend((0..during.len()).map(|n| format!("during {n}")));
    all.extend(["late", "after"].map(String::from));
    let came = reader.try_until(|reader| all_came(reader, &all));
    let got = reader.payloads();
    let missing: Vec<&String> = all.iter().filter(|payload| !got.contains(payload)).collect();
    assert!(came, "missing {missing:?} of {old:?} {during:?} {after}: {got:?}");
    assert_eq!(got.len(), all.len(), "once each: {got:?}");
    let mut back = Follower::open(&cluster, &mut owner, json!(["news"]), old[4]);
    back.until("all since has come", |back| all_came(back, &all[5..]));
    assert!(!back.has("never"));
}

/// Neither is what the worker has not seen yet when the table appears.
#[test]
fn what_waits_for_the_worker_when_odoos_table_appears_is_delivered() {
    let cluster = shared();
    for round in 0..6 {
        let name = format!("a_stopped{round}");
        let mut owner = owned(&cluster, &name, "");
        let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
        publish(&mut owner, "news", "first");
        reader.reads(&["first"]);
        let query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'imbus database ' || current_database()";
        let pid: i32 = cluster.connect(&name).query_one(query, &[]).unwrap().get(0);
        common::signal_to(pid, libc::SIGSTOP);
        let mut all: Vec<String> = (0..20).map(|n| format!("before {n}")).collect();
        for payload in &all {
            publish(&mut owner, "news", payload);
        }
        let mut late = cluster.connect_as(&name, &name);
        late.batch_execute("BEGIN").unwrap();
        publish(&mut late, "news", "late");
        owner.batch_execute(ODOO_TABLE).unwrap();
        if round % 2 == 1 {
            publish(&mut owner, "news", "during");
            all.push("during".to_owned());
        }
        common::signal_to(pid, libc::SIGCONT);
        if round >= 2 {
            publish(&mut owner, "news", "after");
            all.push("after".to_owned());
        }
        late.batch_execute("COMMIT").unwrap();
        all.push("late".to_owned());
        let came = reader.try_until(|reader| all_came(reader, &all));
        let got = reader.payloads();
        let missing: Vec<&String> = all.iter().filter(|payload| !got.contains(payload)).collect();
        assert!(came, "round {round}: {missing:?}");
        assert_eq!(got.len(), all.len() + 1, "once each: {got:?}");
    }
}

/// Nor what somebody is owed who comes back at that very moment.
#[test]
fn who_comes_back_when_odoos_table_appears_gets_what_lay_in_the_old_one() {
    let cluster = shared();
    for round in 0..8 {
        let name = format!("a_back{round}");
        let mut owner = owned(&cluster, &name, "");
        let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
        let all: Vec<String> = (0..20).map(|n| format!("before {n}")).collect();
        let first = publish(&mut owner, "news", "first");
        for payload in &all {
            publish(&mut owner, "news", payload);
        }
        reader.until("all is dispatched", |reader| all_came(reader, &all));
        let query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'imbus database ' || current_database()";
        let pid: i32 = cluster.connect(&name).query_one(query, &[]).unwrap().get(0);
        common::signal_to(pid, libc::SIGSTOP);
        owner.batch_execute(ODOO_TABLE).unwrap();
        let last = if round % 2 == 0 { 0 } else { first };
        let mut back = Follower::open(&cluster, &mut owner, json!(["news"]), last);
        common::signal_to(pid, libc::SIGCONT);
        let came = back.try_until(|back| all_came(back, &all));
        let got = back.payloads();
        let missing: Vec<&String> = all.iter().filter(|payload| !got.contains(payload)).collect();
        assert!(came, "round {round}: {missing:?}");
    }
}

#[test]
fn what_odoo_writes_at_once_into_its_new_table_is_delivered() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_eager", "");
    let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
    let id = publish(&mut owner, "news", "before");
    reader.reads(&["before"]);
    owner
        .batch_execute(&format!(
            r#"BEGIN; {ODOO_TABLE};
               INSERT INTO bus_bus (channel, message, create_date, write_date) VALUES ('["a_eager","news"]',
                      '{{"type":"t","payload":"with the table"}}', now() AT TIME ZONE 'UTC', now() AT TIME ZONE 'UTC');
               COMMIT"#
        ))
        .unwrap();
    reader.reads(&["with the table"]);
    let after = publish(&mut owner, "news", "after");
    assert!(after > id, "{after} after {id}");
    reader.reads(&["after"]);
}

#[test]
fn a_client_that_was_away_during_the_move_over_gets_what_it_missed() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_away", "");
    let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
    publish(&mut owner, "news", "seen");
    reader.reads(&["seen"]);
    reader.drop_connection();
    let missed = publish(&mut owner, "news", "missed");
    owner.batch_execute(ODOO_TABLE).unwrap();
    moved(&mut owner, missed);
    publish(&mut owner, "news", "after");
    reader.reads(&["missed", "after"]);
    assert_eq!(reader.payloads(), ["seen", "missed", "after"], "{:?}", reader.found);
}

/// Nor does a session with an older snapshot go on publishing into the table that was in force by that.
#[test]
fn odoos_table_takes_over_in_a_session_with_an_older_snapshot_too() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_older", "");
    let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
    let mut other = cluster.connect_as("a_older", "a_older");
    publish(&mut other, "news", "before");
    other.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM pg_class").unwrap();
    owner.batch_execute(ODOO_TABLE).unwrap();
    // It may not have heard of the table so far.
    publish(&mut other, "news", "first");
    let second = publish(&mut other, "news", "second");
    assert_eq!(table_of(&mut other, second), "bus_bus");
    other.batch_execute("COMMIT").unwrap();
    let third = publish(&mut other, "news", "third");
    assert_eq!(table_of(&mut other, third), "bus_bus");
    reader.reads(&["before", "first", "second", "third"]);
}

#[test]
fn a_bus_table_that_is_renamed_away_leaves_imbus_its_own() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_away_table", ODOO_TABLE);
    let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
    publish(&mut owner, "news", "before");
    reader.reads(&["before"]);
    owner.batch_execute("ALTER TABLE bus_bus RENAME TO elsewhere").unwrap();
    publish(&mut owner, "news", "after");
    reader.reads(&["after"]);
}

// ---------------------------------------------------------------------------------------------------------------------
// What the owner of a database cannot do

fn is_superuser(sql: &mut Client, role: &str) -> bool {
    yes(sql, &format!("SELECT rolsuper FROM pg_roles WHERE rolname = '{role}'"))
}

/// Functions that make their owner a superuser wherever a superuser runs them.
fn trap(role: &str) -> String {
    format!(
        "CREATE FUNCTION public.seize() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
             EXECUTE 'ALTER ROLE {role} SUPERUSER';
         EXCEPTION WHEN OTHERS THEN NULL;
         END $$;
         CREATE FUNCTION public.seize_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             PERFORM public.seize(); RETURN NEW;
         END $$;"
    )
}

#[test]
fn a_hostile_bus_table_is_not_adopted() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_hostile", "");
    let mut sql = cluster.connect("a_hostile");
    sql.batch_execute("CREATE ROLE a_foreign LOGIN; GRANT CREATE ON SCHEMA public TO a_foreign").unwrap();
    let mut foreign = cluster.connect_as("a_hostile", "a_foreign");
    let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
    let columns = "create_uid int, write_uid int, channel varchar, message varchar, create_date timestamp, \
                   write_date timestamp";
    let cases = [
        (true, ODOO_TABLE.to_owned(), "TABLE"),
        (false, "CREATE VIEW public.bus_bus AS SELECT * FROM imbus_bus".to_owned(), "VIEW"),
        (false, format!("CREATE TABLE public.bus_bus (id serial, {columns}) PARTITION BY RANGE (id)"), "TABLE"),
        (false, "CREATE TABLE public.bus_bus (id serial, channel varchar, message varchar)".to_owned(), "TABLE"),
        (
            false,
            format!(
                "DROP DOMAIN IF EXISTS text_of_mine;
                 CREATE DOMAIN text_of_mine AS varchar;
                 CREATE TABLE public.bus_bus (id serial, {})",
                columns.replace("message varchar", "message text_of_mine")
            ),
            "TABLE",
        ),
        (false, format!("CREATE TABLE public.bus_bus (id text, {columns})"), "TABLE"),
    ];
    for (at, (is_foreign, create, kind)) in cases.iter().enumerate() {
        let who = if *is_foreign { &mut foreign } else { &mut owner };
        who.batch_execute(create).unwrap_or_else(|error| panic!("{create}: {error}"));
        let id = publish(&mut owner, "news", &format!("case {at}"));
        let mut other = cluster.connect_as("a_hostile", "a_hostile");
        let other_id = publish(&mut other, "news", &format!("other {at}"));
        reader.reads(&[&format!("case {at}"), &format!("other {at}")]);
        let own = format!("SELECT count(*) FROM imbus_bus WHERE id IN ({id}, {other_id})");
        assert_eq!(number(&mut owner, &own), 2, "{create}");
        owner.batch_execute(&format!("DROP {kind} public.bus_bus")).unwrap();
    }
}

#[test]
fn triggers_on_the_bus_table_run_as_its_owner() {
    let cluster = shared();
    let before = format!(
        "{ODOO_TABLE};
         {} CREATE TRIGGER t BEFORE INSERT OR UPDATE ON bus_bus FOR EACH ROW EXECUTE FUNCTION seize_row();
         CREATE TABLE seen (who name); GRANT ALL ON seen TO PUBLIC;
         CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             PERFORM public.seize(); INSERT INTO public.seen VALUES (current_user); RETURN NULL;
         END $$;
         CREATE TRIGGER s AFTER INSERT OR DELETE ON bus_bus FOR EACH STATEMENT EXECUTE FUNCTION see()",
        trap("a_trigger")
    );
    let mut owner = owned(&cluster, "a_trigger", &before);
    let mut sql = cluster.connect("a_trigger");
    publish(&mut sql, "news", "by a superuser");
    let mut reader = Follower::open(&cluster, &mut owner, json!(["news"]), 0);
    reader.reads(&["by a superuser"]);
    sql.batch_execute("SELECT bus_gc('0')").unwrap();
    let seen = "SELECT count(*) FILTER (WHERE who <> 'a_trigger') * 1000 + count(*) FROM seen";
    assert_eq!(number(&mut owner, seen), 2, "an insert and a delete, both as the owner");
    assert!(!is_superuser(&mut sql, "a_trigger"));
}

#[test]
fn the_move_over_runs_nothing_of_the_owners_as_superuser() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_copier", &trap("a_copier"));
    let id = publish(&mut owner, "news", "before");
    owner
        .batch_execute(&format!(
            "BEGIN; {ODOO_TABLE};
             CREATE TRIGGER t BEFORE INSERT ON bus_bus FOR EACH ROW EXECUTE FUNCTION seize_row();
             CREATE CONSTRAINT TRIGGER d AFTER INSERT ON bus_bus DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION seize_row();
             ALTER TABLE bus_bus ENABLE ALWAYS TRIGGER t;
             ALTER TABLE bus_bus ENABLE ALWAYS TRIGGER d;
             COMMIT"
        ))
        .unwrap();
    // The deferred trigger may keep it from moving; once it is gone the rows come.
    let mut sql = cluster.connect("a_copier");
    eventually("the worker has looked at the table", || {
        let looked = "SELECT COALESCE(seq_scan, 0) + COALESCE(idx_scan, 0) + n_tup_ins > 0 FROM pg_stat_user_tables
                       WHERE relname = 'bus_bus'";
        yes(&mut sql, looked) || cluster.log().contains("database \"a_copier\": cannot fire deferred trigger")
    });
    owner.batch_execute("DROP TRIGGER d ON bus_bus").unwrap();
    moved(&mut owner, id);
    assert!(!is_superuser(&mut sql, "a_copier"));
}

#[test]
fn operators_of_the_owners_are_not_used_when_the_extension_is_created() {
    let cluster = shared();
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE ROLE a_operator LOGIN").unwrap();
    sql.batch_execute("CREATE DATABASE a_operator OWNER a_operator").unwrap();
    let mut owner = cluster.connect_as("a_operator", "a_operator");
    owner.batch_execute(&trap("a_operator")).unwrap();
    // Those that an index or a constraint could take must be immutable to be taken; they could change their mind later.
    for (operator, left, right, returns, volatile) in [
        ("=", "oid", "regclass", "bool", "VOLATILE"),
        ("<>", "oid", "regtype", "bool", "VOLATILE"),
        ("=", "varchar", "varchar", "bool", "IMMUTABLE"),
        ("/", "bigint", "numeric", "numeric", "IMMUTABLE"),
    ] {
        owner
            .batch_execute(&format!(
                "CREATE FUNCTION public.op({left}, {right}) RETURNS {returns} LANGUAGE plpgsql {volatile} AS $$ BEGIN
                     PERFORM public.seize(); RETURN NULL; END $$;
                 CREATE OPERATOR public.{operator} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = public.op)"
            ))
            .unwrap();
    }
    owner.batch_execute("CREATE EXTENSION imbus").unwrap();
    let used = "SELECT count(*) FROM pg_depend d JOIN pg_operator o ON o.oid = d.refobjid
                 WHERE d.refclassid = 'pg_operator'::regclass AND o.oprnamespace = 'public'::regnamespace";
    assert_eq!(number(&mut cluster.connect("a_operator"), used), 0, "no object of the extension uses them");
    assert!(!is_superuser(&mut sql, "a_operator"));
}

#[test]
fn a_relation_that_its_owner_has_added_to_the_extension_is_not_read_as_superuser() {
    let cluster = shared();
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE ROLE a_member LOGIN").unwrap();
    sql.batch_execute("CREATE DATABASE a_member OWNER a_member").unwrap();
    let mut owner = cluster.connect_as("a_member", "a_member");
    owner.batch_execute("CREATE SCHEMA s; CREATE EXTENSION imbus SCHEMA s").unwrap();
    owner.batch_execute(&trap("a_member")).unwrap();
    let columns = "SELECT string_agg(format('NULL::%s AS %I', format_type(atttypid, atttypmod), attname), ', ')
                     FROM pg_attribute WHERE attrelid = 's.ir_async'::regclass AND attnum > 0";
    let columns = owner.query_one(columns, &[]).unwrap().get::<_, String>(0).replace("NULL::bigint AS id,", "n AS id,");
    // The name is looked up, then its table is waited for; when that comes, the name is looked up once more (RangeVarGetRelid).
    let mut holder = cluster.connect("a_member");
    let mut held = holder.transaction().unwrap();
    held.batch_execute("LOCK TABLE s.ir_async").unwrap();
    let mut session = cluster.connect_as("a_member", "a_member");
    let status = std::thread::spawn(move || session.query("SELECT s.ir_async_status(1)", &[]));
    eventually("it waits", || {
        yes(
            &mut sql,
            "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%status(1)%'",
        )
    });
    owner
        .batch_execute(&format!(
            "SET lock_timeout = '20s';
             BEGIN; ALTER SCHEMA s RENAME TO s2; CREATE SCHEMA s;
             CREATE FUNCTION public.seize_id() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN
                 PERFORM public.seize(); RETURN 1; END $$;
             CREATE VIEW s.ir_async AS SELECT {columns} FROM generate_series(1, public.seize_id()) n;
             CREATE VIEW s.imbus_progress AS SELECT job_id, percent, message, at FROM s2.imbus_progress;
             ALTER EXTENSION imbus ADD VIEW s.ir_async; ALTER EXTENSION imbus ADD VIEW s.imbus_progress; COMMIT",
        ))
        .unwrap();
    held.rollback().unwrap();
    let result = status.join().unwrap();
    assert!(!is_superuser(&mut sql, "a_member"));
    assert_eq!(common::refusal(result), "42501", "by its analysis");
}

#[test]
fn a_relation_that_takes_the_bus_tables_name_is_not_read_as_superuser() {
    let cluster = shared();
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE ROLE a_swap LOGIN").unwrap();
    sql.batch_execute("CREATE DATABASE a_swap OWNER a_swap").unwrap();
    let mut owner = cluster.connect_as("a_swap", "a_swap");
    owner.batch_execute("CREATE SCHEMA s; CREATE EXTENSION imbus SCHEMA s; SET search_path = s, public").unwrap();
    cluster.connect("postgres").batch_execute("ALTER DATABASE a_swap SET search_path = s, s2, public").unwrap();
    served(&cluster, "a_swap");
    publish(&mut owner, "news", "before");
    owner.batch_execute(&trap("a_swap")).unwrap();
    // Whether the owner may rename the schema is not promised; what happens then is.
    let renamed = owner.batch_execute(
        "BEGIN; ALTER SCHEMA s RENAME TO s2; CREATE SCHEMA s;
         CREATE FUNCTION public.seize_id(id bigint) RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN
             PERFORM public.seize(); RETURN id; END $$;
         CREATE VIEW s.imbus_bus AS SELECT public.seize_id(n) AS id, NULL::int AS create_uid, NULL::int AS write_uid,
                ''::varchar AS channel, ''::varchar AS message, now()::timestamp AS create_date,
                now()::timestamp AS write_date, '1'::xid AS xmin FROM generate_series(1, 10::bigint) n;
         CREATE VIEW s.imbus_bus_id_seq AS SELECT public.seize_id(1000) AS last_value, true AS is_called;
         COMMIT",
    );
    let schema = if renamed.is_ok() { "s2" } else { "s" };
    owner.batch_execute("ROLLBACK").unwrap();
    // The next statements of the same session: they may fail.
    for statement in ["bus_sendone('news', 'test', '1')", "bus_last_id()", "bus_poll('[\"news\"]', 1)", "bus_gc()"] {
        let _ = owner.batch_execute(&format!("SELECT {schema}.{statement}"));
    }
    assert!(!is_superuser(&mut sql, "a_swap"), "by a statement of the session");
    // Those of the worker: every 4 s and 5 s it looks at the tables by itself.
    let worker = process(&mut sql, "imbus database a_swap", 0).unwrap();
    let looked = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND query_start > $2::text::timestamptz";
    let now: String = sql.query_one("SELECT (clock_timestamp() + interval '6 s')::text", &[]).unwrap().get(0);
    eventually("the worker has looked again", || {
        sql.query_one(looked, &[&worker, &now]).unwrap().get::<_, i64>(0) > 0
            || process(&mut sql, "imbus database a_swap", worker).is_some()
    });
    assert!(!is_superuser(&mut sql, "a_swap"));
}

#[test]
fn a_job_smuggled_in_by_a_trigger_on_the_bus_table_has_its_writers_role() {
    let cluster = shared();
    let before = format!(
        "{ODOO_TABLE};
         {} CREATE FUNCTION smuggle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NOT EXISTS (SELECT FROM public.ir_async WHERE name = 'smuggled') THEN
                 INSERT INTO public.ir_async (name, method, role) VALUES ('smuggled', 'public.seize()', 10);
             END IF;
             RETURN NEW;
         END $$;
         CREATE TRIGGER t AFTER INSERT ON bus_bus FOR EACH ROW EXECUTE FUNCTION smuggle()",
        trap("a_smuggler")
    );
    let mut owner = owned(&cluster, "a_smuggler", &before);
    owner.batch_execute("SELECT ir_async_call('now', notify => '\"news\"')").unwrap();
    let mut sql = cluster.connect("a_smuggler");
    eventually("the smuggled job has ended", || {
        yes(&mut sql, "SELECT finished_at IS NOT NULL FROM ir_async WHERE name = 'smuggled'")
    });
    let role: String =
        sql.query_one("SELECT role::regrole::text FROM ir_async WHERE name = 'smuggled'", &[]).unwrap().get(0);
    assert_eq!(role, "a_smuggler");
    assert!(!is_superuser(&mut sql, "a_smuggler"));
}

#[test]
fn a_job_that_comes_by_replication_does_not_choose_its_role() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_replica", "");
    let mut sql = cluster.connect("a_replica");
    sql.batch_execute(
        "SET session_replication_role = replica;
         INSERT INTO ir_async (name, method, role) VALUES ('replicated', 'pg_catalog.now()', 'a_replica'::regrole)",
    )
    .unwrap();
    let state: String =
        owner.query_one("SELECT state::text FROM ir_async WHERE name = 'replicated'", &[]).unwrap().get(0);
    assert_eq!(state, "failed", "inserted by a superuser: whose job it was is not known");
}

#[test]
fn a_token_of_a_dropped_database_opens_no_other() {
    let cluster = shared();
    let mut owner = owned(&cluster, "a_reused", "");
    let old = token(&mut owner, &json!(["*"]));
    let port = cluster.ws_port(&mut owner);
    drop(owner);
    let mut manager = cluster.connect_as("postgres", "a_reused");
    manager.batch_execute("DROP DATABASE a_reused").unwrap();
    manager.batch_execute("CREATE DATABASE a_reused").unwrap();
    let mut owner = cluster.connect_as("a_reused", "a_reused");
    owner.batch_execute("CREATE EXTENSION imbus").unwrap();
    cluster.wait_served("a_reused");
    let mut socket = Socket::open(port, &old);
    assert!(matches!(socket.ended(), common::Ended::Close(4401, _)));
}

/// A version made up for the test: the script does nothing that the next one would undo.
#[test]
fn an_update_of_the_extension_disturbs_nobody() {
    let folder = std::path::PathBuf::from(common::pg_config("--sharedir")).join("extension");
    let script = folder.join("imbus--0.1.0--0.1.0+test.sql");
    std::fs::write(&script, "COMMENT ON FUNCTION @extschema@.imbus_version() IS 'updated';\n").unwrap();
    let cluster = shared();
    let mut sql = cluster.database("updated");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    let mut open = cluster.connect("updated");
    let mut transaction = open.transaction().unwrap();
    transaction.execute("SELECT bus_sendone('broadcast', 't', '\"begun before\"')", &[]).unwrap();
    let updated = sql.batch_execute("ALTER EXTENSION imbus UPDATE TO '0.1.0+test'");
    let _ = std::fs::remove_file(&script);
    updated.unwrap();
    transaction.commit().unwrap();
    assert_eq!(socket.payload(), json!("begun before"));
    sql.execute("SELECT bus_sendone('broadcast', 't', '\"after\"')", &[]).unwrap();
    assert_eq!(socket.payload(), json!("after"));
    let version: String =
        sql.query_one("SELECT extversion FROM pg_extension WHERE extname = 'imbus'", &[]).unwrap().get(0);
    assert_eq!(version, "0.1.0+test");
}
