//! The order of commits reaches the clients, whatever order ids were drawn in, and whatever way the rows took. The
//! database worker is stopped while the transactions end, so that it finds all of them at once: it cannot go by the
//! order in which it happens to see them.

mod common;

use common::{Cluster, Socket, eventually, shared, signal_to};
use postgres::Client;
use serde_json::{Value, json};
use std::time::Duration;

const ODOO_TABLE: &str = "CREATE TABLE public.bus_bus (id serial PRIMARY KEY, create_uid int, write_uid int,
     channel varchar, message varchar, create_date timestamp, write_date timestamp)";

/// A database, a client that hears channel `news`, and the worker's process.
struct Scene {
    sql: Client,
    socket: Socket,
    worker: i32,
}

fn scene(cluster: &Cluster, name: &str, before: &str) -> Scene {
    let mut sql = cluster.database_with(name, before);
    let mut socket = cluster.subscriber(&mut sql, json!(["news"]), 0);
    socket.only(&mut sql, "news");
    let worker = worker(&mut sql);
    Scene { sql, socket, worker }
}

fn worker(sql: &mut Client) -> i32 {
    let text = "SELECT pid FROM imbus_stat_bus WHERE datname = current_database()";
    sql.query_one(text, &[]).unwrap().get(0)
}

fn send(sql: &mut Client, text: &str) {
    sql.execute("SELECT bus_sendone('news', 't', to_jsonb($1::text))", &[&text]).unwrap();
}

/// A row as Odoo's ORM writes it.
fn insert(database: &str, table: &str, text: &str) -> String {
    format!(
        r#"INSERT INTO {table} (create_uid, channel, message, create_date) VALUES (2, '["{database}","news"]',
           '{{"type":"t","payload":"{text}"}}', now() AT TIME ZONE 'UTC')"#
    )
}

impl Scene {
    /// Does something while the worker sleeps; then these payloads must have come, in this order, and nothing else.
    fn in_order(&mut self, act: impl FnOnce(&mut Client), expected: &[&str]) {
        signal_to(self.worker, libc::SIGSTOP);
        act(&mut self.sql);
        signal_to(self.worker, libc::SIGCONT);
        let got: Vec<Value> = expected.iter().map(|_| self.socket.payload()).collect();
        assert_eq!(got, expected.iter().map(|text| json!(text)).collect::<Vec<_>>());
        self.socket.only(&mut self.sql, "news");
    }
}

#[test]
fn a_low_id_that_commits_late_comes_late() {
    let cluster = shared();
    let mut scene = scene(&cluster, "low_late", "");
    let (mut first, mut second) = (cluster.connect("low_late"), cluster.connect("low_late"));
    let act = |sql: &mut Client| {
        first.batch_execute("BEGIN").unwrap();
        send(&mut first, "drawn first");
        second.batch_execute("BEGIN").unwrap();
        send(&mut second, "drawn second");
        send(sql, "drawn third");
        second.batch_execute("COMMIT").unwrap();
        send(&mut first, "drawn last");
        first.batch_execute("COMMIT").unwrap();
        send(sql, "after");
    };
    scene.in_order(act, &["drawn third", "drawn second", "drawn first", "drawn last", "after"]);
}

#[test]
fn each_kind_of_insert_takes_its_place() {
    let cluster = shared();
    let mut scene = scene(&cluster, "kinds", "");
    let mut first = cluster.connect("kinds");
    let act = |sql: &mut Client| {
        first.batch_execute(&format!("BEGIN; {}", insert("kinds", "imbus_bus", "by INSERT"))).unwrap();
        let mut copy = sql.copy_in("COPY imbus_bus (channel, message) FROM STDIN").unwrap();
        let row = "[\"kinds\",\"news\"]\t{\"type\":\"t\",\"payload\":\"by COPY\"}\n";
        std::io::Write::write_all(&mut copy, row.as_bytes()).unwrap();
        copy.finish().unwrap();
        let many = r#"SELECT bus_sendmany('[["news", "t", "by bus_sendmany"], ["news", "t", "again"]]')"#;
        sql.batch_execute(many).unwrap();
        first.batch_execute("COMMIT").unwrap();
        sql.batch_execute(&format!(
            "SET session_replication_role = replica; {}",
            insert("kinds", "imbus_bus", "by a replica")
        ))
        .unwrap();
        sql.batch_execute("RESET session_replication_role").unwrap();
        send(sql, "by bus_sendone");
    };
    scene.in_order(act, &["by COPY", "by bus_sendmany", "again", "by INSERT", "by a replica", "by bus_sendone"]);
}

#[test]
fn what_savepoints_kept_comes_with_its_transaction_in_the_order_of_sending() {
    let cluster = shared();
    let mut scene = scene(&cluster, "savepoints", "");
    let mut first = cluster.connect("savepoints");
    let act = |sql: &mut Client| {
        first.batch_execute("BEGIN").unwrap();
        for (sql_before, text) in [
            ("SELECT", "a"),
            ("SAVEPOINT s", "b"),
            ("SAVEPOINT t", "never"),
            ("ROLLBACK TO t; SAVEPOINT u", "c"),
            ("RELEASE u", "d"),
            ("SAVEPOINT v", "never"),
            ("SAVEPOINT w", "never"),
            ("RELEASE w; ROLLBACK TO v; RELEASE v; RELEASE s", "e"),
        ] {
            first.batch_execute(sql_before).unwrap();
            send(&mut first, text);
        }
        send(sql, "meanwhile");
        first.batch_execute("COMMIT").unwrap();
    };
    scene.in_order(act, &["meanwhile", "a", "b", "c", "d", "e"]);
}

#[test]
fn a_prepared_transaction_comes_when_it_is_committed() {
    let cluster = Cluster::start_with(&["max_prepared_transactions = 10"]);
    let mut scene = scene(&cluster, "two_phase", "");
    let mut first = cluster.connect("two_phase");
    let mut other = cluster.connect("two_phase");
    let act = |sql: &mut Client| {
        first.batch_execute("BEGIN").unwrap();
        send(&mut first, "prepared");
        first.batch_execute("SAVEPOINT s").unwrap();
        send(&mut first, "prepared in a savepoint");
        first.batch_execute("SAVEPOINT t").unwrap();
        send(&mut first, "never");
        first.batch_execute("ROLLBACK TO t; PREPARE TRANSACTION 'kept'; BEGIN").unwrap();
        send(&mut first, "never");
        first.batch_execute("PREPARE TRANSACTION 'dropped'").unwrap();
        send(sql, "before");
        other.batch_execute("COMMIT PREPARED 'kept'").unwrap();
        send(sql, "after");
        other.batch_execute("ROLLBACK PREPARED 'dropped'").unwrap();
    };
    scene.in_order(act, &["before", "prepared", "prepared in a savepoint", "after"]);
}

#[test]
fn a_prepared_transaction_survives_a_restart_and_a_reconnect_with_a_later_id() {
    let cluster = Cluster::start_with(&["max_prepared_transactions = 10"]);
    let Scene { mut sql, mut socket, .. } = scene(&cluster, "two_phase", "");
    let mut first = cluster.connect("two_phase");
    first.batch_execute("BEGIN").unwrap();
    send(&mut first, "prepared");
    first.batch_execute("PREPARE TRANSACTION 'kept'").unwrap();
    send(&mut sql, "later");
    let last = socket.next();
    assert_eq!(last["message"]["payload"], json!("later"));
    let last = last["id"].as_i64().unwrap();
    drop((sql, socket, first));
    cluster.pg_ctl(&["-w", "-m", "immediate", "restart"]);
    cluster.wait_served("two_phase");
    let mut sql = cluster.connect("two_phase");
    sql.batch_execute("COMMIT PREPARED 'kept'").unwrap();
    let mut socket = cluster.socket(&mut sql, json!(["news"]));
    socket.subscribe(json!(["news"]), last);
    // What came shortly before may come again across a restart.
    eventually("the prepared row comes", || socket.payload() == json!("prepared"));
}

#[test]
fn an_id_drawn_in_an_earlier_transaction_comes_when_it_is_used() {
    let cluster = shared();
    let mut scene = scene(&cluster, "drawn_early", "");
    let id: i64 = scene.sql.query_one("SELECT nextval('imbus_bus_id_seq')", &[]).unwrap().get(0);
    send(&mut scene.sql, "later id");
    assert_eq!(scene.socket.payload(), json!("later id"));
    eventually("nobody is waited for", || {
        let text = "SELECT gaps = 0 FROM imbus_stat_bus WHERE datname = current_database()";
        scene.sql.query_one(text, &[]).unwrap().get(0)
    });
    let row = insert("drawn_early", "imbus_bus", "early id").replace("(create_uid", "(id, create_uid");
    scene.sql.batch_execute(&row.replace("(2,", &format!("({id}, 2,"))).unwrap();
    assert_eq!(scene.socket.payload(), json!("early id"));
}

#[test]
fn an_id_beyond_the_sequence_hides_nothing() {
    let cluster = shared();
    let mut scene = scene(&cluster, "beyond", "");
    let row = insert("beyond", "imbus_bus", "made up").replace("(create_uid", "(id, create_uid");
    scene.sql.batch_execute(&row.replace("(2,", "(1000000000000, 2,")).unwrap();
    assert_eq!(scene.socket.payload(), json!("made up"));
    send(&mut scene.sql, "by the ring");
    assert_eq!(scene.socket.payload(), json!("by the ring"));
    scene.sql.batch_execute("ALTER TABLE imbus_bus DISABLE TRIGGER ALL").unwrap();
    scene.sql.batch_execute(&insert("beyond", "imbus_bus", "by the look-out")).unwrap();
    assert_eq!(scene.socket.payload(), json!("by the look-out"));
    scene.socket.only(&mut scene.sql, "news");
}

#[test]
fn a_transaction_too_long_for_the_ring_comes_whole() {
    let cluster = shared();
    let mut scene = scene(&cluster, "too_long", "");
    let count = 40_000;
    let rows = format!(
        r#"INSERT INTO imbus_bus (id, channel, message) SELECT 1000 + 2 * n, '["too_long","news"]',
           '{{"type":"t","payload":' || n || '}}' FROM generate_series(1, {count}) n;
           SELECT setval('imbus_bus_id_seq', 1000 + 2 * {count})"#
    );
    scene.sql.batch_execute(&rows).unwrap();
    let got: Vec<i64> = (0..count).map(|_| scene.socket.payload().as_i64().unwrap()).collect();
    assert_eq!(got, (1..=count).collect::<Vec<_>>());
    scene.socket.only(&mut scene.sql, "news");
}

#[test]
fn commits_that_overrun_the_ring_all_come() {
    let cluster = shared();
    let mut scene = scene(&cluster, "overrun", "");
    let count = 140_000;
    let commits = format!(
        r#"DO $$ BEGIN FOR n IN 1..{count} LOOP
             INSERT INTO imbus_bus (channel, message)
             VALUES ('["overrun","' || CASE WHEN n % 1000 = 0 THEN 'news' ELSE 'other' END || '"]', '{{"type":"t","payload":' || n || '}}');
             COMMIT;
           END LOOP; END $$"#
    );
    signal_to(scene.worker, libc::SIGSTOP);
    scene.sql.batch_execute(&commits).unwrap();
    signal_to(scene.worker, libc::SIGCONT);
    let got: Vec<i64> = (0..count / 1000).map(|_| scene.socket.payload().as_i64().unwrap()).collect();
    assert_eq!(got, (1..=count / 1000).map(|n| n * 1000).collect::<Vec<_>>());
    scene.socket.only(&mut scene.sql, "news");
}

#[test]
fn a_sequence_that_starts_again_hides_nothing() {
    let cluster = shared();
    let mut scene = scene(&cluster, "again", "");
    for round in 0..3 {
        for n in 0..3 {
            send(&mut scene.sql, &format!("{round} {n}"));
            assert_eq!(scene.socket.payload(), json!(format!("{round} {n}")));
        }
        scene.sql.batch_execute("TRUNCATE imbus_bus RESTART IDENTITY").unwrap();
    }
    scene.sql.batch_execute("ALTER TABLE imbus_bus DISABLE TRIGGER ALL").unwrap();
    scene.sql.batch_execute(&insert("again", "imbus_bus", "by the look-out")).unwrap();
    assert_eq!(scene.socket.payload(), json!("by the look-out"));
}

#[test]
fn a_reconnect_goes_by_the_last_frame_not_by_the_greatest_id() {
    let cluster = shared();
    let Scene { mut sql, mut socket, .. } = scene(&cluster, "last_frame", "");
    let mut first = cluster.connect("last_frame");
    first.batch_execute("BEGIN").unwrap();
    send(&mut first, "low");
    send(&mut sql, "high");
    assert_eq!(socket.payload(), json!("high"));
    first.batch_execute("COMMIT").unwrap();
    let low = socket.next();
    assert_eq!(low["message"]["payload"], json!("low"));
    drop(socket);
    send(&mut sql, "next");
    let mut again = cluster.socket(&mut sql, json!(["news"]));
    again.subscribe(json!(["news"]), low["id"].as_i64().unwrap());
    assert_eq!(again.payload(), json!("next"), "what came before the last frame is not repeated");
    again.only(&mut sql, "news");
}

#[test]
fn a_long_report_beside_keeps_no_gap_open() {
    let cluster = shared();
    let mut scene = scene(&cluster, "report", "");
    let mut report = cluster.connect("report");
    report.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM imbus_bus").unwrap();
    scene.sql.batch_execute("BEGIN; SELECT bus_sendone('news', 't', '1'); ROLLBACK").unwrap();
    send(&mut scene.sql, "after");
    assert_eq!(scene.socket.payload(), json!("after"));
    eventually("nobody is waited for", || {
        let text = "SELECT gaps = 0 FROM imbus_stat_bus WHERE datname = current_database()";
        scene.sql.query_one(text, &[]).unwrap().get(0)
    });
    report.batch_execute("COMMIT").unwrap();
}

#[test]
fn odoos_rows_keep_the_order_of_commits_too() {
    let cluster = shared();
    let mut scene = scene(&cluster, "odoo_order", ODOO_TABLE);
    eventually("the trigger is attached", || {
        let text = "SELECT count(*) = 1 FROM pg_trigger WHERE tgrelid = 'public.bus_bus'::regclass AND tgisinternal";
        scene.sql.query_one(text, &[]).unwrap().get(0)
    });
    let mut first = cluster.connect("odoo_order");
    let act = |sql: &mut Client| {
        first.batch_execute(&format!("BEGIN; {}", insert("odoo_order", "bus_bus", "late"))).unwrap();
        sql.batch_execute(&insert("odoo_order", "bus_bus", "early")).unwrap();
        send(sql, "by imbus");
        first.batch_execute("COMMIT").unwrap();
        sql.batch_execute(&insert("odoo_order", "bus_bus", "last")).unwrap();
    };
    scene.in_order(act, &["early", "by imbus", "late", "last"]);
    assert!(scene.socket.try_next(Duration::from_millis(1)).is_none());
}
