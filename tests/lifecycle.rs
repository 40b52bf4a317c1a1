//! Living with an administrator: databases that come, go and change, processes and servers that die, dumps, standbys.

mod common;

use common::{Cluster, Ended, Socket, eventually, free_port, kill_9, recovered, refusal, shared, token};
use postgres::{Client, Row};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU32, Ordering};

/// Odoo's table, as Odoo 18 makes it.
const ODOO_TABLE: &str = "CREATE TABLE public.bus_bus (id serial PRIMARY KEY, create_uid int, write_uid int,
     channel varchar, message varchar, create_date timestamp, write_date timestamp)";

/// Publishes on a plain channel; the id.
fn publish(sql: &mut Client, channel: &str, payload: &str) -> i64 {
    sql.query_one("SELECT bus_sendone($1::text, 'test', to_jsonb($2::text))", &[&channel, &payload]).unwrap().get(0)
}

/// Reads until this payload comes: all that came, this one too. After a crash some may come twice.
fn until(socket: &mut Socket, payload: &str) -> Vec<Value> {
    let mut found = Vec::new();
    loop {
        found.push(socket.payload());
        if found.last().is_some_and(|last| last == payload) {
            return found;
        }
    }
}

/// A message published now in the database reaches a client that has a new token.
fn is_served(cluster: &Cluster, database: &str) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    cluster.wait_served(database);
    let mut sql = cluster.connect(database);
    let mut socket = cluster.subscriber(&mut sql, json!(["is_served"]), 0);
    let payload = format!("served {}", NUMBER.fetch_add(1, Ordering::Relaxed));
    publish(&mut sql, "is_served", &payload);
    until(&mut socket, &payload);
}

/// The process of this type, if there is one. Asked as superuser: the type is hidden from others.
fn process(sql: &mut Client, backend_type: &str) -> Option<i32> {
    sql.query_opt("SELECT pid FROM pg_stat_activity WHERE backend_type = $1", &[&backend_type])
        .unwrap()
        .map(|row| row.get(0))
}

/// Waits for a process of this type that is not `but`.
fn process_but(sql: &mut Client, backend_type: &str, but: i32) -> i32 {
    let mut found = None;
    eventually(&format!("there is another {backend_type}"), || {
        found = process(sql, backend_type).filter(|pid| *pid != but);
        found.is_some()
    });
    found.unwrap()
}

fn gone(sql: &mut Client, backend_type: &str) {
    eventually(&format!("{backend_type} has ended"), || process(sql, backend_type).is_none());
}

/// A role that is no superuser, and its database with the extension, which it has installed itself.
fn owned(cluster: &Cluster, name: &str, attributes: &str) -> Client {
    let mut sql = cluster.connect("postgres");
    sql.batch_execute(&format!("CREATE ROLE {name} LOGIN {attributes}")).unwrap();
    sql.batch_execute(&format!("CREATE DATABASE {name} OWNER {name}")).unwrap();
    let mut owner = cluster.connect_as(name, name);
    owner.batch_execute("CREATE EXTENSION imbus").unwrap();
    cluster.wait_served(name);
    owner
}

/// Enqueues a job that does not end by itself and waits until it runs.
fn endless_job(client: &mut Client) {
    client
        .batch_execute(
            "CREATE FUNCTION endless() RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(3600)';
             SELECT ir_async_call('endless')",
        )
        .unwrap();
    eventually("the job runs", || {
        let running = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";
        client.query_opt(running, &[]).unwrap().is_some()
    });
}

/// A subscriber of channel news of database demo that has had one message: the id.
fn reader(cluster: &Cluster, sql: &mut Client) -> (Socket, i64) {
    let mut socket = cluster.subscriber(sql, json!(["news"]), 0);
    let id = publish(sql, "news", "first");
    assert_eq!(socket.next()["id"], json!(id));
    (socket, id)
}

// ---------------------------------------------------------------------------------------------------------------------
// Extensions come and go

#[test]
fn the_workers_show_their_names() {
    let cluster = shared();
    let mut sql = cluster.database("l_names");
    endless_job(&mut sql);
    let rows = sql
        .query(
            "SELECT DISTINCT backend_type FROM pg_stat_activity WHERE backend_type LIKE 'imbus%'
                AND (backend_type LIKE '% l_names' OR datname = 'postgres')
                AND backend_type <> 'imbus database postgres'", // it looks there when another test makes a database
            &[],
        )
        .unwrap();
    let names: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(names, ["imbus gateway", "imbus database l_names", "imbus job l_names"].map(String::from).into());
    drop(sql);
    cluster.connect("postgres").batch_execute("DROP DATABASE l_names").unwrap();
}

#[test]
fn a_runner_at_work_shows_its_target() {
    let cluster = shared();
    let mut sql = cluster.database("l_target");
    endless_job(&mut sql);
    let shown = "SELECT state, query FROM pg_stat_activity WHERE backend_type = 'imbus job l_target'";
    let row = sql.query_one(shown, &[]).unwrap();
    assert_eq!(row.get::<_, String>(0), "active");
    assert!(row.get::<_, String>(1).contains("endless"), "{}", row.get::<_, String>(1));
    drop(sql);
    cluster.connect("postgres").batch_execute("DROP DATABASE l_target").unwrap();
}

#[test]
fn an_extension_created_later_is_served() {
    let cluster = shared();
    cluster.connect("postgres").batch_execute("CREATE DATABASE l_later").unwrap();
    // The gateway has looked at all databases when it serves this one.
    cluster.database("l_sooner");
    let mut sql = cluster.connect("l_later");
    assert_eq!(process(&mut sql, "imbus database l_later"), None);
    sql.batch_execute("CREATE EXTENSION imbus").unwrap();
    is_served(&cluster, "l_later");
}

#[test]
fn drop_extension_ends_the_worker_and_leaves_odoos_table_alone() {
    let cluster = shared();
    let mut sql = cluster.database_with("l_dropped", ODOO_TABLE);
    publish(&mut sql, "news", "kept");
    sql.batch_execute("DROP EXTENSION imbus").unwrap();
    gone(&mut sql, "imbus database l_dropped");
    sql.batch_execute("INSERT INTO bus_bus (channel, message) VALUES ('[\"l_dropped\",\"news\"]', '{}')").unwrap();
    let kept: i64 = sql.query_one("SELECT count(*) FROM bus_bus", &[]).unwrap().get(0);
    assert_eq!(kept, 2);
    let triggers = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'bus_bus'::regclass";
    assert_eq!(sql.query_one(triggers, &[]).unwrap().get::<_, i64>(0), 0);
}

#[test]
fn an_extension_created_again_is_served_again() {
    let cluster = shared();
    let mut sql = cluster.database("l_again");
    sql.batch_execute("DROP EXTENSION imbus").unwrap();
    gone(&mut sql, "imbus database l_again");
    sql.batch_execute("CREATE EXTENSION imbus").unwrap();
    is_served(&cluster, "l_again");
    // Without a moment between them.
    sql.batch_execute("DROP EXTENSION imbus; CREATE EXTENSION imbus").unwrap();
    is_served(&cluster, "l_again");
}

#[test]
fn an_extension_in_another_schema_is_served() {
    let cluster = shared();
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE DATABASE l_schema").unwrap();
    sql.batch_execute("ALTER DATABASE l_schema SET search_path = bus, public").unwrap();
    let mut sql = cluster.connect("l_schema");
    sql.batch_execute("CREATE SCHEMA bus; CREATE EXTENSION imbus SCHEMA bus").unwrap();
    is_served(&cluster, "l_schema");
    let mut socket = cluster.subscriber(&mut sql, json!(["news"]), 0);
    sql.batch_execute("SET search_path = pg_catalog; SELECT bus.bus_sendone('news', 'test', '1')").unwrap();
    assert_eq!(socket.payload(), json!(1));
    sql.batch_execute("SELECT bus.ir_async_call_notify('j', 'now', '[]', '{}', '\"news\"')").unwrap();
    let states: Vec<Value> = (0..3).map(|_| socket.payload()["state"].clone()).collect();
    assert_eq!(states, ["created", "processing", "succeeded"]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Databases come, go and change

#[test]
fn the_owner_drops_a_served_database() {
    let cluster = shared();
    drop(owned(&cluster, "l_drop", ""));
    let mut owner = cluster.connect_as("postgres", "l_drop");
    owner.batch_execute("DROP DATABASE l_drop").unwrap();
    gone(&mut cluster.connect("postgres"), "imbus database l_drop");
}

#[test]
fn the_owner_drops_a_database_in_which_a_job_runs() {
    let cluster = shared();
    let mut inside = owned(&cluster, "l_busy", "");
    endless_job(&mut inside);
    drop(inside);
    // One of another role too, whose sessions the owner may not terminate.
    cluster.connect("l_busy").batch_execute("SELECT ir_async_call('endless')").unwrap();
    let mut sql = cluster.connect("postgres");
    eventually("both run", || {
        let runners = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'l_busy' AND wait_event = 'PgSleep'";
        sql.query_one(runners, &[]).unwrap().get::<_, i64>(0) == 2
    });
    let mut owner = cluster.connect_as("postgres", "l_busy");
    owner.batch_execute("DROP DATABASE l_busy").unwrap();
    gone(&mut sql, "imbus job l_busy");
}

/// Enqueues a job and waits until it has run.
fn runs_a_job(sql: &mut Client) {
    let job: i64 = sql.query_one("SELECT ir_async_call('now')", &[]).unwrap().get(0);
    eventually("the job has run", || {
        let state: String = sql.query_one("SELECT ir_async_status($1) ->> 'state'", &[&job]).unwrap().get(0);
        state == "succeeded"
    });
}

#[test]
fn a_dropped_database_gives_its_runners_places_back() {
    let cluster = Cluster::start_with(&["imbus.job_workers = 1"]);
    let mut other = cluster.database("other");
    let mut sql = cluster.database("demo");
    endless_job(&mut sql);
    drop(sql);
    other.batch_execute("DROP DATABASE demo").unwrap();
    runs_a_job(&mut other);
    let mut sql = cluster.database("demo");
    runs_a_job(&mut sql);
    drop(sql);
    other.batch_execute("DROP DATABASE demo").unwrap();
    runs_a_job(&mut other);
}

#[test]
fn a_dropped_extension_gives_its_runners_places_back() {
    let cluster = Cluster::start_with(&["imbus.job_workers = 1"]);
    let mut other = cluster.database("other");
    let mut sql = cluster.database("demo");
    runs_a_job(&mut sql);
    sql.batch_execute("DROP EXTENSION imbus").unwrap();
    gone(&mut sql, "imbus database demo");
    runs_a_job(&mut other);
}

#[test]
fn a_renamed_database_is_served_under_its_new_name() {
    let cluster = shared();
    let inside = owned(&cluster, "l_old", "CREATEDB");
    drop(inside);
    let mut owner = cluster.connect_as("postgres", "l_old");
    owner.batch_execute("ALTER DATABASE l_old RENAME TO l_new").unwrap();
    is_served(&cluster, "l_new");
    let mut sql = cluster.connect("postgres");
    assert_eq!(process(&mut sql, "imbus database l_old"), None);
    assert!(process(&mut sql, "imbus database l_new").is_some());
}

#[test]
fn a_token_of_the_old_name_is_refused_after_a_rename() {
    let cluster = shared();
    let mut sql = cluster.database("l_token_old");
    let old = token(&mut sql, &json!(["news"]));
    drop(sql);
    cluster.connect("postgres").batch_execute("ALTER DATABASE l_token_old RENAME TO l_token_new").unwrap();
    is_served(&cluster, "l_token_new");
    let mut sql = cluster.connect("l_token_new");
    let mut socket = Socket::open(cluster.ws_port(&mut sql), &old);
    assert!(matches!(socket.ended(), Ended::Close(4401, _)));
}

#[test]
fn a_copy_of_a_served_database_is_served() {
    let cluster = shared();
    let mut inside = owned(&cluster, "l_template", "CREATEDB");
    publish(&mut inside, "news", "copied");
    drop(inside);
    let mut owner = cluster.connect_as("postgres", "l_template");
    owner.batch_execute("CREATE DATABASE l_copy TEMPLATE l_template").unwrap();
    is_served(&cluster, "l_copy");
    is_served(&cluster, "l_template");
}

#[test]
fn a_stranger_cannot_push_the_workers_out() {
    let cluster = shared();
    let mut sql = cluster.database("l_stranger");
    sql.batch_execute("CREATE ROLE l_stranger LOGIN CREATEDB").unwrap();
    let worker = process(&mut sql, "imbus database l_stranger");
    let mut stranger = cluster.connect_as("postgres", "l_stranger");
    for command in [
        "DROP DATABASE l_stranger",
        "DROP DATABASE l_stranger WITH (FORCE)",
        "ALTER DATABASE l_stranger RENAME TO l_stolen",
        "CREATE DATABASE l_stolen TEMPLATE l_stranger",
    ] {
        assert_eq!(refusal(stranger.query(command, &[])), "42501", "{command}");
    }
    is_served(&cluster, "l_stranger");
    assert_eq!(process(&mut sql, "imbus database l_stranger"), worker);
}

#[test]
fn a_drop_that_fails_lets_the_workers_back() {
    let cluster = shared();
    let _inside = owned(&cluster, "l_failed_drop", "");
    let mut sql = cluster.connect("postgres");
    let before = process(&mut sql, "imbus database l_failed_drop").unwrap();
    let mut owner = cluster.connect_as("postgres", "l_failed_drop");
    assert_eq!(refusal(owner.query("DROP DATABASE l_failed_drop", &[])), "55006");
    is_served(&cluster, "l_failed_drop");
    assert_ne!(process(&mut sql, "imbus database l_failed_drop"), Some(before), "they had to leave");
}

#[test]
fn a_job_pushed_out_by_a_drop_that_fails_runs_again() {
    let cluster = shared();
    let mut sql = cluster.database("l_pushed");
    sql.batch_execute(
        "CREATE FUNCTION pass() RETURNS int LANGUAGE sql AS 'SELECT 1 FROM pg_advisory_xact_lock(1)';
         SELECT pg_advisory_lock(1)",
    )
    .unwrap();
    let job: i64 = sql.query_one("SELECT ir_async_call('pass')", &[]).unwrap().get(0);
    let mut at_gate = |but: i32| {
        let mut found = None;
        eventually("a runner stands at the gate", || {
            let waiting = "SELECT pid FROM pg_stat_activity WHERE datname = 'l_pushed' AND wait_event = 'advisory'";
            found = sql.query_opt(waiting, &[]).unwrap().map(|row| row.get::<_, i32>(0)).filter(|pid| *pid != but);
            found.is_some()
        });
        found.unwrap()
    };
    let before = at_gate(0);
    assert_eq!(refusal(cluster.connect("postgres").query("DROP DATABASE l_pushed", &[])), "55006");
    at_gate(before);
    sql.batch_execute("SELECT pg_advisory_unlock(1)").unwrap();
    let status = "SELECT (s ->> 'state') || ' ' || (s ->> 'attempts') || ' ' || (s ->> 'deaths')
                    FROM ir_async_status($1) s";
    let mut found = String::new();
    eventually("the job has ended", || {
        found = sql.query_one(status, &[&job]).unwrap().get(0);
        !found.starts_with("processing")
    });
    assert_eq!(found, "succeeded 1 0", "state, attempts, deaths: being pushed out is no death");
}

#[test]
fn a_served_database_moves_to_another_tablespace() {
    let cluster = shared();
    drop(cluster.database("l_moved"));
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("SET allow_in_place_tablespaces = on").unwrap();
    sql.batch_execute("CREATE TABLESPACE l_space LOCATION ''").unwrap();
    sql.batch_execute("ALTER DATABASE l_moved SET TABLESPACE l_space").unwrap();
    is_served(&cluster, "l_moved");
}

#[test]
fn odoos_database_manager_copies_renames_and_drops() {
    let cluster = shared();
    let mut inside = owned(&cluster, "l_odoo", "CREATEDB");
    inside.batch_execute(ODOO_TABLE).unwrap();
    endless_job(&mut inside);
    let mut postgres = cluster.connect_as("postgres", "l_odoo");
    // What odoo.service.db does: it terminates all sessions of the database in one statement, then goes at it.
    let mut manage = |database: &str, command: &str| {
        cluster.left_by_superusers(database);
        let terminated = postgres.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()",
            &[&database],
        );
        assert!(!terminated.unwrap().is_empty(), "there were sessions to terminate");
        postgres.batch_execute(command).unwrap();
    };
    manage("l_odoo", "CREATE DATABASE l_odoo_copy ENCODING 'unicode' TEMPLATE l_odoo");
    is_served(&cluster, "l_odoo_copy");
    is_served(&cluster, "l_odoo");
    manage("l_odoo", "ALTER DATABASE l_odoo RENAME TO l_odoo_renamed");
    is_served(&cluster, "l_odoo_renamed");
    manage("l_odoo_renamed", "DROP DATABASE l_odoo_renamed");
    manage("l_odoo_copy", "DROP DATABASE l_odoo_copy");
}

#[test]
fn a_new_owner_can_terminate_the_worker() {
    let cluster = shared();
    drop(owned(&cluster, "l_owner", ""));
    cluster
        .connect("postgres")
        .batch_execute("CREATE ROLE l_heir LOGIN; ALTER DATABASE l_owner OWNER TO l_heir")
        .unwrap();
    let mut heir = cluster.connect_as("l_owner", "l_heir");
    eventually("the new owner may terminate the worker", || {
        let all = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                    WHERE datname = 'l_owner' AND pid <> pg_backend_pid()";
        heir.query_one(all, &[]).is_ok_and(|row| row.get::<_, i64>(0) > 0)
    });
    is_served(&cluster, "l_owner");
}

// ---------------------------------------------------------------------------------------------------------------------
// Processes and servers die

#[test]
fn nothing_is_lost_when_the_gateway_is_terminated() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let (mut socket, last) = reader(&cluster, &mut sql);
    let gateway = process(&mut sql, "imbus gateway").unwrap();
    sql.execute("SELECT pg_terminate_backend($1)", &[&gateway]).unwrap();
    assert!(matches!(socket.ended(), Ended::Close(1001, _)));
    publish(&mut sql, "news", "meanwhile");
    process_but(&mut sql, "imbus gateway", gateway);
    cluster.wait_served("demo");
    let mut socket = cluster.subscriber(&mut sql, json!(["news"]), last);
    until(&mut socket, "meanwhile");
    publish(&mut sql, "news", "later");
    until(&mut socket, "later");
}

#[test]
fn a_connected_client_loses_nothing_when_the_database_worker_is_terminated() {
    let cluster = shared();
    let mut sql = cluster.database("l_worker");
    let (mut socket, _) = reader(&cluster, &mut sql);
    let worker = process(&mut sql, "imbus database l_worker").unwrap();
    sql.execute("SELECT pg_terminate_backend($1)", &[&worker]).unwrap();
    eventually("the worker has ended", || process(&mut sql, "imbus database l_worker") != Some(worker));
    publish(&mut sql, "news", "meanwhile");
    until(&mut socket, "meanwhile");
    process_but(&mut sql, "imbus database l_worker", worker);
    publish(&mut sql, "news", "later");
    until(&mut socket, "later");
}

#[test]
fn nothing_is_lost_when_the_gateway_is_killed_and_the_server_recovers() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let (mut socket, last) = reader(&cluster, &mut sql);
    let mut open = cluster.connect("demo");
    open.batch_execute("BEGIN").unwrap();
    publish(&mut open, "news", "never committed");
    publish(&mut sql, "news", "before");
    kill_9(process(&mut sql, "imbus gateway").unwrap());
    assert!(matches!(socket.ended(), Ended::Dropped | Ended::Close(..)));
    eventually("the server has noticed", || sql.simple_query("SELECT 1").is_err());
    let mut sql = recovered(&cluster, "demo");
    publish(&mut sql, "news", "after");
    let mut socket = cluster.subscriber(&mut sql, json!(["news"]), last);
    let found = until(&mut socket, "after");
    assert!(found.contains(&json!("before")), "{found:?}");
    assert!(!found.contains(&json!("never committed")), "{found:?}");
}

#[test]
fn nothing_is_lost_in_an_immediate_restart() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let (socket, last) = reader(&cluster, &mut sql);
    drop(socket);
    publish(&mut sql, "news", "before");
    cluster.pg_ctl(&["-m", "immediate", "-w", "restart"]);
    let mut sql = recovered(&cluster, "demo");
    publish(&mut sql, "news", "after");
    let mut socket = cluster.subscriber(&mut sql, json!(["news"]), last);
    let found = until(&mut socket, "after");
    assert!(found.contains(&json!("before")), "{found:?}");
}

#[test]
fn a_taken_port_is_logged_once_and_bound_when_it_is_free() {
    let holder = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = holder.local_addr().unwrap().port();
    let cluster = Cluster::start_with(&[&format!("imbus.port = {port}")]);
    cluster.connect("postgres").batch_execute("CREATE DATABASE demo").unwrap();
    let mut sql = cluster.connect("demo");
    sql.batch_execute("CREATE EXTENSION imbus").unwrap();
    publish(&mut sql, "news", "polled");
    let polled: i64 = sql.query_one("SELECT count(*) FROM bus_poll('[\"news\"]')", &[]).unwrap().get(0);
    assert_eq!(polled, 1);
    let job: i64 = sql.query_one("SELECT ir_async_call('now')", &[]).unwrap().get(0);
    eventually("the job has run", || {
        let state: String = sql.query_one("SELECT ir_async_status($1) ->> 'state'", &[&job]).unwrap().get(0);
        state == "succeeded"
    });
    let complaints = || cluster.log().matches(&format!("port {port}: ")).count();
    // It is tried again every 2 s.
    let tried = "SELECT 1 FROM imbus_stat_gateway WHERE port IS NULL AND started_at < now() - interval '5 s'";
    eventually("the gateway has tried more than once", || sql.query_opt(tried, &[]).unwrap().is_some());
    assert_eq!(complaints(), 1, "{}", cluster.log());
    drop(holder);
    is_served(&cluster, "demo");
    assert_eq!(cluster.ws_port(&mut sql), port);
    assert_eq!(complaints(), 1, "{}", cluster.log());
}

#[test]
fn a_fast_stop_says_goodbye_to_clients() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    endless_job(&mut sql);
    let (mut socket, _) = reader(&cluster, &mut sql);
    cluster.pg_ctl(&["-m", "fast", "stop"]);
    assert!(matches!(socket.ended(), Ended::Close(1001, _)));
}

#[test]
fn a_smart_stop_does_not_wait_for_workers_and_sockets() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let (mut socket, _) = reader(&cluster, &mut sql);
    drop(sql);
    cluster.pg_ctl(&["-m", "smart", "stop"]);
    assert!(matches!(socket.ended(), Ended::Close(1001, _)));
}

#[test]
fn the_tokens_secret_is_private_and_survives_a_restart() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let old = token(&mut sql, &json!(["news"]));
    let secret = cluster.dir.join("data/imbus_token_secret");
    assert_eq!(std::fs::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600);
    let before = std::fs::read(&secret).unwrap();
    cluster.pg_ctl(&["-m", "fast", "-w", "restart"]);
    assert_eq!(std::fs::read(&secret).unwrap(), before);
    cluster.wait_served("demo");
    let mut sql = cluster.connect("demo");
    let mut socket = Socket::open(cluster.ws_port(&mut sql), &old);
    socket.subscribe(json!(["news"]), 0);
    socket.sync(&mut sql);
    publish(&mut sql, "news", "hello");
    assert_eq!(socket.payload(), json!("hello"));
}

#[test]
fn a_standby_loads_the_library_and_serves_when_promoted() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    publish(&mut sql, "news", "replicated");
    let standby = Cluster { dir: cluster.dir.join("standby"), port: free_port() };
    // Made by the user that runs the server.
    let (data, port) = (standby.dir.join("data").display().to_string(), cluster.port.to_string());
    cluster.run(
        "pg_basebackup",
        &["-h", "127.0.0.1", "-p", &port, "-U", "postgres", "-R", "-D", &data, "-X", "stream", "-c", "fast", "-N"],
    );
    let mut conf = std::fs::OpenOptions::new().append(true).open(standby.dir.join("data/postgresql.conf")).unwrap();
    write!(conf, "port = {}\nunix_socket_directories = ''\n", standby.port).unwrap();
    standby.pg_ctl(&["-w", "start"]);
    let mut there = standby.connect("demo");
    assert!(there.query_one("SELECT pg_is_in_recovery()", &[]).unwrap().get::<_, bool>(0));
    assert!(!there.query_one("SELECT imbus_version()", &[]).unwrap().get::<_, String>(0).is_empty());
    let bad = ["ERROR:", "FATAL:", "PANIC:", "WARNING:"];
    let log = standby.log();
    assert!(!bad.iter().any(|level| log.contains(level)), "{log}");
    standby.pg_ctl(&["-w", "promote"]);
    is_served(&standby, "demo");
    let polled = "SELECT count(*) FROM bus_poll('[\"news\"]')";
    assert_eq!(there.query_one(polled, &[]).unwrap().get::<_, i64>(0), 1);
}

#[test]
fn rows_of_a_prepared_transaction_arrive_when_it_is_committed() {
    let cluster = Cluster::start_with(&["max_prepared_transactions = 5"]);
    let mut sql = cluster.database("demo");
    let (mut socket, _) = reader(&cluster, &mut sql);
    sql.batch_execute("BEGIN").unwrap();
    publish(&mut sql, "news", "prepared");
    sql.batch_execute("PREPARE TRANSACTION 'p1'").unwrap();
    sql.batch_execute("BEGIN").unwrap();
    publish(&mut sql, "news", "rolled back");
    sql.batch_execute("PREPARE TRANSACTION 'p2'").unwrap();
    socket.only(&mut sql, "news");
    sql.batch_execute("COMMIT PREPARED 'p1'").unwrap();
    assert_eq!(socket.payload(), json!("prepared"));
    sql.batch_execute("ROLLBACK PREPARED 'p2'").unwrap();
    socket.only(&mut sql, "news");
}

// ---------------------------------------------------------------------------------------------------------------------
// Without the workers, and rights

#[test]
fn without_preload_publishing_and_polling_work() {
    let cluster = Cluster::start_with(&["shared_preload_libraries = ''"]);
    cluster.connect("postgres").batch_execute("CREATE DATABASE demo").unwrap();
    let mut sql = cluster.connect("demo");
    sql.batch_execute("CREATE EXTENSION imbus").unwrap();
    let id = publish(&mut sql, "news", "hello");
    let row = sql.query_one("SELECT id, message::text FROM bus_poll('[\"news\"]')", &[]).unwrap();
    let message: Value = serde_json::from_str(row.get(1)).unwrap();
    assert_eq!((row.get::<_, i64>(0), &message["payload"]), (id, &json!("hello")));
}

#[test]
fn without_preload_what_needs_the_workers_says_so() {
    let cluster = Cluster::start_with(&["shared_preload_libraries = ''"]);
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE EXTENSION imbus").unwrap();
    for statement in ["SELECT bus_token('[\"news\"]')", "SELECT ir_async_call('now')"] {
        let error = sql.query(statement, &[]).expect_err("refused");
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code().code(), "55000", "{statement}");
        assert!(error.hint().is_some_and(|hint| hint.contains("shared_preload_libraries")), "{error:?}");
    }
}

#[test]
fn an_ordinary_role_uses_it_all_in_its_own_database() {
    let cluster = shared();
    let mut owner = owned(&cluster, "l_ordinary", "");
    let id = publish(&mut owner, "news", "hello");
    let polled: i64 = owner.query_one("SELECT id FROM bus_poll('[\"news\"]')", &[]).unwrap().get(0);
    assert_eq!(polled, id);
    let mut socket = cluster.subscriber(&mut owner, json!(["news", "jobs"]), 0);
    assert_eq!(socket.payload(), json!("hello"));
    owner.batch_execute("CREATE FUNCTION who() RETURNS text LANGUAGE sql AS 'SELECT session_user::text'").unwrap();
    let job: i64 =
        owner.query_one("SELECT ir_async_call_notify('j', 'who', '[]', '{}', '\"jobs\"')", &[]).unwrap().get(0);
    let last = (0..3).map(|_| socket.payload()).last().unwrap();
    let expected = json!({"id": job, "name": "j", "state": "succeeded", "payload": {"result": "l_ordinary"}});
    assert_eq!(last, expected);
    owner.batch_execute("SELECT bus_gc('0'); SELECT bus_last_id(); SELECT bus_has_missed_notifications(1)").unwrap();
    for view in ["imbus_stat_gateway", "imbus_stat_bus", "imbus_stat_connections", "imbus_stat_jobs"] {
        assert!(!owner.query(&format!("SELECT * FROM {view}"), &[]).unwrap().is_empty(), "{view}");
    }
}

#[test]
fn another_role_can_use_nothing() {
    let cluster = shared();
    let mut sql = cluster.database("l_nothing");
    sql.batch_execute("CREATE ROLE l_nothing LOGIN").unwrap();
    let mut other = cluster.connect_as("l_nothing", "l_nothing");
    let rows = other
        .query(
            "SELECT p.oid::regprocedure::text FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
               JOIN pg_proc p ON p.oid = d.objid AND d.classid = 'pg_proc'::regclass
              WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND e.extname = 'imbus'
                AND has_function_privilege(p.oid, 'EXECUTE')",
            &[],
        )
        .unwrap();
    let functions: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(functions, ["imbus_notify(text,text)", "imbus_version()"].map(String::from).into());
    let rows = other
        .query(
            "SELECT c.relname::text FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
               JOIN pg_class c ON c.oid = d.objid AND d.classid = 'pg_class'::regclass
              WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND e.extname = 'imbus'
                AND CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, 'USAGE, SELECT, UPDATE')
                    ELSE has_table_privilege(c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
                      OR has_any_column_privilege(c.oid, 'SELECT, INSERT, UPDATE, REFERENCES') END",
            &[],
        )
        .unwrap();
    let relations: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(relations, Vec::<String>::new());
    for statement in [
        "SELECT bus_sendone('news', 't', '1')",
        "SELECT bus_sendone('\"news\"'::jsonb, 't', '1')",
        "SELECT bus_sendmany('[]')",
        "SELECT bus_poll('[\"news\"]')",
        "SELECT bus_last_id()",
        "SELECT bus_has_missed_notifications(1)",
        "SELECT bus_gc()",
        "SELECT bus_token('[\"news\"]')",
        "SELECT ir_async_call('now')",
        "SELECT ir_async_call_notify('j', 'now', '[]', '{}', '\"news\"')",
        "SELECT ir_async_status(1)",
        "SELECT ir_async_complete(1)",
        "SELECT * FROM imbus_bus",
        "SELECT * FROM ir_async",
        "SELECT * FROM imbus_stat_gateway",
        "SELECT * FROM imbus_stat_bus",
        "SELECT * FROM imbus_stat_connections",
        "SELECT * FROM imbus_stat_jobs",
        "INSERT INTO imbus_bus (channel, message) VALUES ('[\"l_nothing\",\"news\"]', '{}')",
        "INSERT INTO ir_async (method, role) VALUES ('pg_catalog.now()', 10)",
        "DROP EXTENSION imbus",
    ] {
        assert_eq!(refusal(other.query(statement, &[])), "42501", "{statement}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Dump and restore

/// Rows and jobs in database `name`, with Odoo's table or without, dumped and restored by its owner.
fn dump_and_restore(name: &str, format: &str, odoo: bool) {
    let cluster = shared();
    let mut sql = cluster.connect("postgres");
    sql.batch_execute(&format!("CREATE ROLE {name} LOGIN")).unwrap();
    sql.batch_execute(&format!("CREATE DATABASE {name} OWNER {name}")).unwrap();
    sql.batch_execute(&format!("CREATE DATABASE {name}_copy OWNER {name}")).unwrap();
    let mut owner = cluster.connect_as(name, name);
    if odoo {
        owner.batch_execute(ODOO_TABLE).unwrap();
    }
    owner.batch_execute("CREATE EXTENSION imbus").unwrap();
    cluster.wait_served(name);
    publish(&mut owner, "news", "first");
    publish(&mut owner, "news", "second");
    owner
        .batch_execute(
            "CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1';
             SELECT ir_async_call('one'), ir_async_call('one', run_at => now() + interval '1 day')",
        )
        .unwrap();
    eventually("a job has ended", || {
        owner.query_opt("SELECT 1 FROM ir_async WHERE state = 'succeeded'", &[]).unwrap().is_some()
    });
    let file = cluster.dir.join(format!("{name}.dump")).display().to_string();
    let (port, copy) = (cluster.port.to_string(), format!("{name}_copy"));
    let server = ["-h", "127.0.0.1", "-p", &port, "-U", name];
    cluster.run("pg_dump", &[&server[..], &["-F", format, "-f", &file, name]].concat());
    let text = match format {
        "p" => {
            cluster.run("psql", &[&server[..], &["-X", "-v", "ON_ERROR_STOP=1", "-f", &file, &copy]].concat());
            std::fs::read_to_string(&file).unwrap()
        }
        _ => {
            cluster.run("pg_restore", &[&server[..], &["-e", "-d", &copy, &file]].concat());
            cluster.run("pg_restore", &["-f", "-", &file])
        }
    };
    assert!(!text.contains("TRIGGER"), "imbus's triggers come with the extension: {text}");

    let bus = if odoo { "bus_bus" } else { "imbus_bus" };
    let content = format!(
        "SELECT (SELECT jsonb_agg(to_jsonb(b) ORDER BY b.id) FROM {bus} b)::text,
                (SELECT jsonb_agg(to_jsonb(j) ORDER BY j.id) FROM ir_async j)::text"
    );
    let mut restored = cluster.connect_as(&copy, name);
    let columns = |row: Row| (row.get::<_, String>(0), row.get::<_, String>(1));
    let there = columns(restored.query_one(&content, &[]).unwrap());
    assert_eq!(there, columns(owner.query_one(&content, &[]).unwrap()));
    is_served(&cluster, &copy);
    let job: i64 = restored.query_one("SELECT ir_async_call('one')", &[]).unwrap().get(0);
    assert_eq!(job, 3, "the sequence goes on where it was");
    eventually("jobs run in the copy", || {
        let state: String = restored.query_one("SELECT ir_async_status($1) ->> 'state'", &[&job]).unwrap().get(0);
        state == "succeeded"
    });
}

#[test]
fn a_plain_dump_restores() {
    dump_and_restore("l_dump_plain", "p", false);
}

#[test]
fn a_custom_dump_restores() {
    dump_and_restore("l_dump_custom", "c", false);
}

#[test]
fn a_plain_dump_of_an_odoo_database_restores() {
    dump_and_restore("l_dump_plain_odoo", "p", true);
}

#[test]
fn a_custom_dump_of_an_odoo_database_restores() {
    dump_and_restore("l_dump_custom_odoo", "c", true);
}

#[test]
fn a_job_that_was_running_when_it_was_dumped_runs_in_the_copy_as_who_restores_it() {
    let cluster = shared();
    let mut owner = owned(&cluster, "l_dump_job", "");
    owner
        .batch_execute(
            "CREATE FUNCTION wait() RETURNS text LANGUAGE plpgsql AS $$ BEGIN
                 IF current_database() = 'l_dump_job' THEN PERFORM pg_sleep(3600); END IF;
                 RETURN current_database() || ' ' || session_user;
             END $$;
             SELECT ir_async_call('wait')",
        )
        .unwrap();
    eventually("the job runs", || {
        owner.query_opt("SELECT 1 FROM ir_async WHERE state = 'processing'", &[]).unwrap().is_some()
    });
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE DATABASE l_dump_job_copy OWNER l_dump_job").unwrap();
    sql.batch_execute("CREATE DATABASE l_dump_job_super").unwrap();
    let file = cluster.dir.join("l_dump_job.dump").display().to_string();
    let port = cluster.port.to_string();
    let run = |program: &str, role: &str, arguments: &[&str]| {
        cluster.run(program, &[&["-h", "127.0.0.1", "-p", &port, "-U", role][..], arguments].concat());
    };
    run("pg_dump", "l_dump_job", &["-F", "c", "-f", &file, "l_dump_job"]);
    run("pg_restore", "l_dump_job", &["-e", "-d", "l_dump_job_copy", &file]);
    run("pg_restore", "postgres", &["-e", "-d", "l_dump_job_super", &file]);
    let mut copy = cluster.connect("l_dump_job_copy");
    eventually("the job has run in the copy", || {
        let payload: Option<String> = copy.query_one("SELECT payload ->> 'result' FROM ir_async", &[]).unwrap().get(0);
        payload.as_deref() == Some("l_dump_job_copy l_dump_job")
    });
    // Restored by a superuser it must not run with a superuser's rights.
    let mut copy = cluster.connect("l_dump_job_super");
    let row = copy.query_one("SELECT state, payload #>> '{error,code}' FROM ir_async", &[]).unwrap();
    assert_eq!((row.get(0), row.get(1)), ("failed", "not_enqueued"));
    drop(owner);
    sql.batch_execute("DROP DATABASE l_dump_job").unwrap();
}
