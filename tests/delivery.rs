//! What is committed reaches its subscribers, once, whoever wrote it; nothing else does.

mod common;

use common::{Cluster, PATIENCE, Socket, eventually, promptly, shared};
use postgres::Client;
use postgres::fallible_iterator::FallibleIterator;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::OnceLock;
use std::time::Duration;

/// Odoo's table, as Odoo 18 makes it.
const ODOO_TABLE: &str = "CREATE TABLE public.bus_bus (id serial PRIMARY KEY, create_uid int, write_uid int,
     channel varchar, message varchar, create_date timestamp, write_date timestamp)";

fn send(sql: &mut Client, channel: &str, payload: Value) -> i64 {
    sql.query_one("SELECT bus_sendone($1::text, 'test', $2::text::jsonb)", &[&channel, &payload.to_string()])
        .unwrap()
        .get(0)
}

/// Writes a row as Odoo's ORM does: by INSERT, with the writer's user id, telling nobody.
fn insert(sql: &mut Client, table: &str, channel: &str, message: &str) {
    sql.execute(
        &format!(
            "INSERT INTO {table} (create_uid, write_uid, channel, message, create_date, write_date)
             VALUES (2, 2, $1, $2, now() AT TIME ZONE 'UTC', now() AT TIME ZONE 'UTC')"
        ),
        &[&channel, &message],
    )
    .unwrap();
}

fn pg_notify(postgres: &mut Client, function: &str, payload: &str) {
    postgres.execute(&format!("SELECT {function}('imbus', $1)"), &[&payload]).unwrap();
}

/// A connection that hears NOTIFY imbus in database postgres, of which the first from this database has come already.
fn listener(cluster: &Cluster, sql: &mut Client, database: &str) -> Client {
    let mut listener = cluster.connect("postgres");
    listener.batch_execute("LISTEN imbus").unwrap();
    eventually("NOTIFY goes out", || {
        send(sql, "begin", json!(0));
        let payload = json!([[database, "begin"]]).to_string();
        heard(&mut listener, Duration::from_secs(1)).is_some_and(|found| found == payload)
    });
    listener
}

/// The next payload.
fn heard(listener: &mut Client, timeout: Duration) -> Option<String> {
    let mut notifications = listener.notifications();
    let next = notifications.timeout_iter(timeout).next().unwrap();
    next.map(|notification| notification.payload().to_owned())
}

/// The payloads heard that name a database, until one of them names this channel of it.
fn heard_until(listener: &mut Client, database: &str, channel: &str) -> Vec<Value> {
    let mut payloads = Vec::new();
    while let Some(payload) = heard(listener, PATIENCE) {
        let payload: Value = serde_json::from_str(&payload).unwrap();
        let channels = payload.as_array().unwrap();
        let is_begin = channels.contains(&json!([database, "begin"]));
        if channels.iter().all(|found| found[0] == database) && !is_begin {
            let is_last = channels.contains(&json!([database, channel]));
            payloads.push(payload);
            if is_last {
                return payloads;
            }
        }
    }
    panic!("nothing heard for {channel}: {payloads:?}");
}

// ---------------------------------------------------------------------------------------------------------------------
// Ways to publish

#[test]
fn bus_sendone_on_a_text_channel_reaches_its_subscriber() {
    let cluster = shared();
    let mut sql = cluster.database("by_text");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    promptly(|number| {
        send(&mut sql, "broadcast", json!({"text": "é😀", "number": number}));
        let message = json!({"type": "test", "payload": {"text": "é😀", "number": number}});
        assert_eq!(socket.next()["message"], message);
    });
}

#[test]
fn bus_sendone_on_a_jsonb_channel_reaches_its_subscriber() {
    let cluster = shared();
    let mut sql = cluster.database("by_jsonb");
    let mut socket = cluster.subscriber(&mut sql, json!([["res.partner", 42], ["discuss.channel", 7, "members"]]), 0);
    for (number, channel) in [
        (1, r#"["res.partner", 42]"#),
        (2, r#"["by_jsonb", "res.partner", 42]"#),
        (3, r#"["discuss.channel", 7.0, "members"]"#),
    ] {
        for wrong in [r#"["res.partner", 43]"#, r#"["res.partner"]"#, r#"["discuss.channel", 7]"#] {
            sql.execute("SELECT bus_sendone($1::text::jsonb, 't', '0')", &[&wrong]).unwrap();
        }
        sql.execute("SELECT bus_sendone($1::text::jsonb, 't', $2::text::jsonb)", &[&channel, &number.to_string()])
            .unwrap();
        assert_eq!(socket.payload(), json!(number), "{channel}");
    }
}

#[test]
fn bus_sendmany_keeps_its_order() {
    let cluster = shared();
    let mut sql = cluster.database("by_many");
    let mut socket = cluster.subscriber(&mut sql, json!(["a", "b", ["res.partner", 1]]), 0);
    let channels = [json!("b"), json!(["res.partner", 1]), json!("a")];
    let many: Vec<Value> = (0..300).map(|n| json!([channels[n % 3], "t", n])).collect();
    let rows = sql.query("SELECT bus_sendmany($1::text::jsonb)", &[&json!(many).to_string()]).unwrap();
    for (n, row) in rows.iter().enumerate() {
        let notification = socket.next();
        assert_eq!(notification["message"]["payload"], json!(n));
        assert_eq!(notification["id"], json!(row.get::<_, i64>(0)));
    }
    assert_eq!(rows.len(), 300);
}

#[test]
fn ids_on_the_wire_are_those_of_the_rows() {
    let cluster = shared();
    let mut sql = cluster.database("ids");
    sql.batch_execute("SELECT setval('imbus_bus_id_seq', 3000000000)").unwrap();
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    for n in 0..5 {
        let id = send(&mut sql, "broadcast", json!(n));
        assert_eq!(socket.next()["id"], json!(id));
        let row = sql.query_one("SELECT message FROM imbus_bus WHERE id = $1", &[&id]).unwrap();
        assert_eq!(row.get::<_, String>(0), format!(r#"{{"type":"test","payload":{n}}}"#));
    }
}

#[test]
fn a_plain_insert_reaches_clients() {
    let cluster = shared();
    let mut sql = cluster.database("by_insert");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    promptly(|number| {
        let message = format!(r#"{{"type":"t","payload":{number}}}"#);
        insert(&mut sql, "imbus_bus", r#"["by_insert","broadcast"]"#, &message);
        assert_eq!(socket.payload(), json!(number));
    });
}

/// Rows that no trigger announces, each announced in database postgres by this payload.
fn insert_and_notify(database: &str, function: &str, payload: &str) {
    let cluster = shared();
    let mut sql = cluster.database(database);
    let mut postgres = cluster.connect("postgres");
    static INSTALLED: OnceLock<()> = OnceLock::new();
    INSTALLED.get_or_init(|| postgres.batch_execute("CREATE EXTENSION imbus").unwrap());
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    sql.batch_execute("SET session_replication_role = replica").unwrap();
    promptly(|number| {
        let message = format!(r#"{{"type":"t","payload":{number}}}"#);
        insert(&mut sql, "imbus_bus", &format!(r#"["{database}","broadcast"]"#), &message);
        pg_notify(&mut postgres, function, payload);
        assert_eq!(socket.payload(), json!(number));
    });
}

#[test]
fn an_insert_and_pg_notify_in_database_postgres_reach_clients() {
    insert_and_notify("by_notify", "pg_notify", r#"[["by_notify","broadcast"]]"#);
}

#[test]
fn an_insert_and_imbus_notify_in_database_postgres_reach_clients() {
    insert_and_notify("by_own_notify", "imbus_notify", r#"[["by_own_notify","broadcast"]]"#);
}

#[test]
fn every_part_of_a_split_imbus_notify_is_heard() {
    // The only channel of this database comes last, so only the last part names it.
    let mut channels: Vec<Value> = (0..1000).map(|n| json!(["nobody", "res.partner", n])).collect();
    channels.push(json!(["by_split", "broadcast"]));
    let payload = serde_json::to_string(&channels).unwrap();
    assert!(payload.len() > 8000);
    insert_and_notify("by_split", "imbus_notify", &payload);
}

#[test]
fn rows_of_odoo_in_its_own_table_reach_clients() {
    let cluster = shared();
    let mut sql = cluster.database_with("odoo", ODOO_TABLE);
    let mut postgres = cluster.connect("postgres");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast", "é😀", ["res.partner", 42]]), 0);
    // Odoo 18.0 writes ASCII without spaces, later versions may write raw UTF-8 with spaces.
    let rows = [
        (r#"["odoo","broadcast"]"#, r#"{"type":"t","payload":{"text":"\u00e9\ud83d\ude00"}}"#),
        (r#"["odoo", "broadcast"]"#, r#"{"type": "t", "payload": {"text": "é😀"}}"#),
        (r#"["odoo","\u00e9\ud83d\ude00"]"#, r#"{"type":"t","payload":{"text":"\u00e9\ud83d\ude00"}}"#),
        (r#"["odoo", "é😀"]"#, r#"{"type": "t", "payload": {"text": "é😀"}}"#),
        (r#"["odoo","res.partner",42]"#, r#"{"type":"t","payload":{"text":"\u00e9\ud83d\ude00"}}"#),
        (r#"["odoo", "res.partner", 42]"#, r#"{"type": "t", "payload": {"text": "é😀"}}"#),
    ];
    let mut rows = rows.iter().cycle();
    promptly(|number| {
        let (channel, message) = rows.next().unwrap();
        insert(&mut sql, "public.bus_bus", channel, message);
        pg_notify(&mut postgres, "pg_notify", &format!("[{channel}]"));
        let notification = socket.next();
        assert_eq!(notification["message"], json!({"type": "t", "payload": {"text": "é😀"}}), "{channel} {message}");
        assert_eq!(notification["id"], json!(number + 1));
    });
}

#[test]
fn bus_sendone_publishes_through_the_table_of_odoo() {
    let cluster = shared();
    let mut sql = cluster.database_with("into_odoo", ODOO_TABLE);
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    promptly(|number| {
        let id = send(&mut sql, "broadcast", json!(number));
        assert_eq!(socket.next()["id"], json!(id));
    });
    let count: i64 = sql.query_one("SELECT count(*) FROM public.bus_bus", &[]).unwrap().get(0);
    assert_eq!(count, 10);
}

// ---------------------------------------------------------------------------------------------------------------------
// Transactions

#[test]
fn what_was_rolled_back_never_arrives() {
    let cluster = shared();
    let mut sql = cluster.database("rollback");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    let mut transaction = sql.transaction().unwrap();
    transaction.execute("SELECT bus_sendone('broadcast', 't', '\"rolled back\"')", &[]).unwrap();
    transaction.rollback().unwrap();
    socket.only(&mut sql, "broadcast");
    let mut later = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    assert_eq!(later.payload(), json!("marker"));
}

#[test]
fn what_a_rolled_back_savepoint_published_never_arrives() {
    let cluster = shared();
    let mut sql = cluster.database("savepoint");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    sql.batch_execute(
        "BEGIN;
         SELECT bus_sendone('broadcast', 't', '1');
         SAVEPOINT s; SELECT bus_sendone('broadcast', 't', '\"rolled back\"'); ROLLBACK TO s;
         SELECT bus_sendone('broadcast', 't', '2');
         SAVEPOINT s; SELECT bus_sendone('broadcast', 't', '3'); RELEASE s;
         COMMIT;
         DO $$ BEGIN
             BEGIN
                 PERFORM bus_sendone('broadcast', 't', '\"rolled back\"');
                 RAISE EXCEPTION 'undone';
             EXCEPTION WHEN OTHERS THEN
                 PERFORM bus_sendone('broadcast', 't', '4');
             END;
         END $$",
    )
    .unwrap();
    for expected in 1..=4 {
        assert_eq!(socket.payload(), json!(expected));
    }
    socket.only(&mut sql, "broadcast");
}

#[test]
fn nothing_arrives_before_its_commit() {
    let cluster = shared();
    let mut sql = cluster.database("open");
    let mut other = cluster.connect("open");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    let mut transaction = sql.transaction().unwrap();
    transaction.execute("SELECT bus_sendone('broadcast', 't', '\"committed\"')", &[]).unwrap();
    socket.only(&mut other, "broadcast");
    transaction.commit().unwrap();
    assert_eq!(socket.payload(), json!("committed"));
}

/// Database `name` where a low id was drawn, still uncommitted in the first client, and a higher one was delivered to
/// the socket.
fn low_id_open(cluster: &Cluster, name: &str) -> (Client, Client, Socket, i64, i64) {
    let mut slow = cluster.database(name);
    let mut quick = cluster.connect(name);
    let mut socket = cluster.subscriber(&mut quick, json!(["broadcast"]), 0);
    slow.batch_execute("BEGIN").unwrap();
    let low = send(&mut slow, "broadcast", json!("low"));
    let high = send(&mut quick, "broadcast", json!("high"));
    assert!(low < high);
    assert_eq!(socket.next()["id"], json!(high));
    (slow, quick, socket, low, high)
}

#[test]
fn a_low_id_committed_late_arrives_on_the_same_socket() {
    let cluster = shared();
    let (mut slow, mut quick, mut socket, low, _) = low_id_open(&cluster, "late_same");
    slow.batch_execute("COMMIT").unwrap();
    assert_eq!(socket.next()["id"], json!(low));
    socket.only(&mut quick, "broadcast");
}

#[test]
fn a_low_id_committed_before_the_reconnect_arrives_after_it() {
    let cluster = shared();
    let (mut slow, mut quick, mut witness, low, high) = low_id_open(&cluster, "late_before");
    slow.batch_execute("COMMIT").unwrap();
    assert_eq!(witness.next()["id"], json!(low));
    let mut socket = cluster.subscriber(&mut quick, json!(["broadcast"]), high);
    assert_eq!(socket.next()["id"], json!(low));
    socket.only(&mut quick, "broadcast");
}

#[test]
fn a_low_id_committed_after_the_reconnect_arrives_after_it() {
    let cluster = shared();
    let (mut slow, mut quick, _, low, high) = low_id_open(&cluster, "late_after");
    let mut socket = cluster.subscriber(&mut quick, json!(["broadcast"]), high);
    slow.batch_execute("COMMIT").unwrap();
    assert_eq!(socket.next()["id"], json!(low));
    socket.only(&mut quick, "broadcast");
}

#[test]
fn a_committed_prepared_transaction_arrives() {
    let cluster = Cluster::start_with(&["max_prepared_transactions = 4"]);
    let mut sql = cluster.database("prepared");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    sql.batch_execute("BEGIN").unwrap();
    let low = send(&mut sql, "broadcast", json!("prepared"));
    sql.batch_execute("PREPARE TRANSACTION 'one'").unwrap();
    socket.only(&mut sql, "broadcast");
    sql.batch_execute("COMMIT PREPARED 'one'").unwrap();
    assert_eq!(socket.next()["id"], json!(low));
}

// ---------------------------------------------------------------------------------------------------------------------
// Replay

#[test]
fn last_replays_what_came_after_it_once_and_live_goes_on() {
    let cluster = shared();
    let mut sql = cluster.database("replay");
    let ids: Vec<i64> = (0..5).map(|n| send(&mut sql, "broadcast", json!(n))).collect();
    send(&mut sql, "another", json!("not subscribed"));
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), ids[2]);
    assert_eq!(socket.next()["id"], json!(ids[3]));
    assert_eq!(socket.next()["id"], json!(ids[4]));
    socket.only(&mut sql, "broadcast");
    let live = send(&mut sql, "broadcast", json!("live"));
    assert_eq!(socket.next()["id"], json!(live));
}

#[test]
fn last_zero_replays_the_last_50_seconds() {
    let cluster = shared();
    let mut sql = cluster.database("recent");
    for (age, payload) in [(3600, "old"), (60, "old"), (20, "recent"), (0, "new")] {
        let message = json!({"type": "t", "payload": payload}).to_string();
        let age = f64::from(age);
        sql.execute(
            "INSERT INTO imbus_bus (channel, message, create_date)
             VALUES ('[\"recent\",\"broadcast\"]', $1, (now() AT TIME ZONE 'UTC') - make_interval(secs => $2))",
            &[&message, &age],
        )
        .unwrap();
    }
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    assert_eq!(socket.payload(), json!("recent"));
    assert_eq!(socket.payload(), json!("new"));
    socket.only(&mut sql, "broadcast");
}

#[test]
fn a_last_beyond_the_table_counts_as_none() {
    let cluster = shared();
    let mut sql = cluster.database("beyond");
    let id = send(&mut sql, "broadcast", json!(1));
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), id + 1_000_000);
    assert_eq!(socket.next()["id"], json!(id));
    socket.only(&mut sql, "broadcast");
}

#[test]
fn a_replay_of_several_pages_is_complete_and_in_order() {
    let cluster = shared();
    let mut sql = cluster.database("pages");
    let first = send(&mut sql, "broadcast", json!(0));
    sql.execute(
        "SELECT bus_sendone(CASE WHEN n % 2 = 0 THEN 'broadcast' ELSE 'another' END, 't', to_jsonb(n))
                   FROM generate_series(1, 5000) n",
        &[],
    )
    .unwrap();
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), first);
    for n in 1..=2500 {
        assert_eq!(socket.payload(), json!(2 * n));
    }
    socket.only(&mut sql, "broadcast");
}

// ---------------------------------------------------------------------------------------------------------------------
// Subscriptions and databases

#[test]
fn two_databases_never_mix() {
    let cluster = shared();
    let mut one = cluster.database("tenant_one");
    let mut two = cluster.database("tenant_two");
    let channels = json!(["broadcast", ["res.partner", 1]]);
    let mut socket_one = cluster.subscriber(&mut one, channels.clone(), 0);
    let mut socket_two = cluster.subscriber(&mut two, channels, 0);
    for (sql, payload) in [(&mut one, "\"one\""), (&mut two, "\"two\"")] {
        sql.execute("SELECT bus_sendone('broadcast', 't', $1::text::jsonb)", &[&payload]).unwrap();
        sql.execute("SELECT bus_sendone('[\"res.partner\", 1]'::jsonb, 't', $1::text::jsonb)", &[&payload]).unwrap();
    }
    for (socket, payload) in [(&mut socket_one, "one"), (&mut socket_two, "two")] {
        assert_eq!(socket.payload(), json!(payload));
        assert_eq!(socket.payload(), json!(payload));
    }
    socket_one.only(&mut one, "broadcast");
    socket_two.only(&mut two, "broadcast");
}

#[test]
fn a_row_that_names_another_database_is_never_delivered() {
    let cluster = shared();
    let mut mine = cluster.database("mine");
    let mut theirs = cluster.database("theirs");
    let channels = json!(["broadcast", ["res.partner", 1]]);
    let mut socket_mine = cluster.subscriber(&mut mine, channels.clone(), 0);
    let mut socket_theirs = cluster.subscriber(&mut theirs, channels, 0);
    let mut postgres = cluster.connect("postgres");
    for channel in [r#"["theirs","broadcast"]"#, r#"["theirs","res.partner",1]"#, r#"["nobody","broadcast"]"#] {
        insert(&mut mine, "imbus_bus", channel, r#"{"type":"t","payload":"foreign"}"#);
        pg_notify(&mut postgres, "pg_notify", &format!("[{channel}]"));
    }
    socket_mine.only(&mut mine, "broadcast");
    socket_theirs.only(&mut theirs, "broadcast");
    let skipped: i64 = mine.query_one("SELECT skipped FROM imbus_stat_bus WHERE datname = 'mine'", &[]).unwrap().get(0);
    assert_eq!(skipped, 3);
}

#[test]
fn a_second_subscribe_replaces_the_first() {
    let cluster = shared();
    let mut sql = cluster.database("resubscribe");
    let mut socket = cluster.socket(&mut sql, json!(["*"]));
    socket.subscribe(json!(["old", "kept"]), 0);
    socket.sync_to(&mut sql, "= 2");
    send(&mut sql, "old", json!(1));
    assert_eq!(socket.payload(), json!(1));
    socket.subscribe(json!(["kept", "new", "newer"]), 0);
    socket.sync_to(&mut sql, "= 3");
    send(&mut sql, "old", json!("no longer subscribed"));
    for channel in ["new", "newer", "kept"] {
        send(&mut sql, channel, json!(channel));
        assert_eq!(socket.payload(), json!(channel));
    }
    socket.only(&mut sql, "new");
}

#[test]
fn the_connection_check_of_later_clients_is_ignored() {
    let cluster = shared();
    let mut sql = cluster.database("ping_check");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), 0);
    socket.ws.send(tungstenite::Message::binary(vec![0])).unwrap();
    socket.only(&mut sql, "broadcast");
    // The subscription stands, another message is still taken.
    socket.ws.send(tungstenite::Message::binary(vec![0])).unwrap();
    socket.subscribe(json!(["broadcast"]), 0);
    socket.only(&mut sql, "broadcast");
}

#[test]
fn eight_writers_reach_twenty_sockets_once_each_and_in_one_order() {
    let cluster = shared();
    let mut sql = cluster.database("crowd");
    let mut sockets: Vec<Socket> =
        (0..20).map(|_| cluster.subscriber(&mut sql, json!(["broadcast", "also"]), 0)).collect();
    let port = cluster.port;
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            std::thread::spawn(move || {
                let target = format!("host=127.0.0.1 port={port} user=postgres dbname=crowd");
                let mut sql = Client::connect(&target, postgres::NoTls).unwrap();
                let channel = if writer % 2 == 0 { "broadcast" } else { "also" };
                for number in 0..25 {
                    send(&mut sql, channel, json!([writer, number]));
                }
            })
        })
        .collect();
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let mut orders: HashSet<Vec<String>> = HashSet::new();
    for socket in &mut sockets {
        let got: Vec<String> = (0..200).map(|_| socket.payload().to_string()).collect();
        assert_eq!(got.iter().collect::<HashSet<_>>().len(), 200, "each once");
        for writer in 0..8 {
            let own: Vec<&String> = got.iter().filter(|text| text.starts_with(&format!("[{writer},"))).collect();
            let sent: Vec<String> = (0..25).map(|number| format!("[{writer},{number}]")).collect();
            assert_eq!(own, sent.iter().collect::<Vec<_>>(), "in the order of their commits");
        }
        orders.insert(got);
    }
    assert_eq!(orders.len(), 1, "the same order for all");
    sql.execute("SELECT bus_sendone('broadcast', 'marker', '\"marker\"')", &[]).unwrap();
    for socket in &mut sockets {
        assert_eq!(socket.payload(), json!("marker"), "nothing twice");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// NOTIFY on behalf of the writers

#[test]
fn a_listener_hears_each_transaction_once_with_its_channels_deduplicated() {
    let cluster = shared();
    let mut sql = cluster.database("emit");
    let mut listener = listener(&cluster, &mut sql, "emit");
    sql.batch_execute(
        "BEGIN;
         SELECT bus_sendone('a', 't', '1'); SELECT bus_sendone('[\"res.partner\", 42]'::jsonb, 't', '2');
         SELECT bus_sendone('a', 't', '3'); SELECT bus_sendone('é', 't', '4');
         SELECT bus_sendone('[\"res.partner\", 42]'::jsonb, 't', '5');
         COMMIT",
    )
    .unwrap();
    send(&mut sql, "a", json!(6));
    send(&mut sql, "end", json!(7));
    let heard = heard_until(&mut listener, "emit", "end");
    let first = json!([["emit", "a"], ["emit", "res.partner", 42], ["emit", "é"]]);
    assert_eq!(heard, [first, json!([["emit", "a"]]), json!([["emit", "end"]])]);
}

#[test]
fn what_was_rolled_back_is_not_notified() {
    let cluster = shared();
    let mut sql = cluster.database("emit_rollback");
    let mut listener = listener(&cluster, &mut sql, "emit_rollback");
    sql.batch_execute("BEGIN; SELECT bus_sendone('gone', 't', '1'); ROLLBACK").unwrap();
    send(&mut sql, "end", json!(2));
    assert_eq!(heard_until(&mut listener, "emit_rollback", "end"), [json!([["emit_rollback", "end"]])]);
}

#[test]
fn with_emit_notify_off_no_listener_hears_anything() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("quiet");
    let mut socket = cluster.subscriber(&mut sql, json!(["probe"]), 0);
    let mut listener = listener(&cluster, &mut sql, "quiet");
    // Nothing shows when a worker has read its settings: a probe sent while off is followed by one sent while on,
    // whose NOTIFY comes later, until the first one's is missing.
    eventually("a probe is delivered without NOTIFY", || {
        set_emit(&cluster, false);
        send(&mut sql, "probe", json!("off"));
        assert_eq!(socket.payload(), json!("off"));
        set_emit(&cluster, true);
        let mut payloads = Vec::new();
        eventually("NOTIFY goes out again", || {
            send(&mut sql, "on", json!("on"));
            payloads.extend(heard(&mut listener, Duration::from_secs(1)));
            payloads.iter().any(|payload| payload.contains("\"on\""))
        });
        !payloads.iter().any(|payload| payload.contains("\"probe\""))
    });
}

/// Sets `imbus.emit_notify` and waits until the postmaster has read it.
fn set_emit(cluster: &Cluster, on: bool) {
    let mut admin = cluster.connect("postgres");
    let value = if on { "on" } else { "off" };
    admin.batch_execute(&format!("ALTER SYSTEM SET imbus.emit_notify = {value}")).unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").unwrap();
    eventually("the setting is read", || {
        cluster.connect("quiet").query_one("SHOW imbus.emit_notify", &[]).unwrap().get::<_, String>(0) == value
    });
}
