//! Many clients of `imbus.auth = 'odoo'` against a real server: Odoo sees few calls at once, and nobody loses anything.

mod common;
mod fake_odoo;

use common::*;
use fake_odoo::{Answer, CLOSED, Odoo, PEEK};
use postgres::Client;
use serde_json::json;

const CROWD: usize = 1_000;

/// Sockets of this many users, `s0` to `sN`, each of its own session.
fn crowd(cluster: &Cluster, sql: &mut Client, count: usize, last: i64) -> Vec<Socket> {
    let port = cluster.ws_port(sql);
    let open = |at: usize| {
        let cookie = format!("session_id=s{at}");
        Socket::open_path(port, "/websocket?version=19.0-2", &[("Cookie", &cookie)]).unwrap()
    };
    let mut sockets: Vec<Socket> = (0..count).map(open).collect();
    sockets.iter_mut().for_each(|socket| socket.subscribe(json!([]), last));
    sockets
}

fn start(odoo: &Odoo, more: &[&str]) -> (Cluster, Client) {
    let url = format!("imbus.odoo_url = 'http://127.0.0.1:{}'", odoo.port);
    let lines = [&["imbus.auth = 'token, odoo'", url.as_str()], more].concat();
    let cluster = Cluster::start_with(&lines);
    let sql = cluster.database_with("one", ODOO_TABLE);
    (0..CROWD).for_each(|at| odoo.answer(&format!("s{at}"), Answer::Known("one", 1 + at as u32, "")));
    (cluster, sql)
}

fn until_subscribed(sql: &mut Client, count: usize) {
    let query = "SELECT count(*) FROM imbus_stat_connections WHERE subject LIKE 'res.partner(%' AND channels > 0";
    eventually(&format!("{count} are subscribed"), || {
        sql.query_one(query, &[]).unwrap().get::<_, i64>(0) == count as i64
    });
}

#[test]
fn a_thousand_come_back_after_a_restart_and_hear_what_they_missed() {
    let odoo = Odoo::start();
    let (cluster, mut sql) = start(&odoo, &[]);
    let mut sockets = crowd(&cluster, &mut sql, CROWD, 0);
    until_subscribed(&mut sql, CROWD);
    assert_eq!(odoo.count(PEEK), CROWD);
    let last = publish(&mut sql, "broadcast", "before");
    sockets.iter_mut().for_each(|socket| assert_eq!(socket.payload(), json!("before")));
    drop(sql);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    sockets.iter_mut().for_each(|socket| assert_eq!(socket.ended(), Ended::Close(1001, String::new())));
    let mut sql = recovered(&cluster, "one");
    for payload in ["one", "two", "three"] {
        publish(&mut sql, "broadcast", payload);
    }
    sql.batch_execute(
        "SELECT bus_sendone(jsonb_build_array('res.partner', n), 't', to_jsonb(n)) FROM generate_series(1, 1000) n",
    )
    .unwrap();
    let mut sockets = crowd(&cluster, &mut sql, CROWD, last);
    for (at, socket) in sockets.iter_mut().enumerate() {
        let heard: Vec<_> = (0..4).map(|_| socket.payload()).collect();
        assert_eq!(heard, [json!("one"), json!("two"), json!("three"), json!(at + 1)]);
    }
    // And nothing twice: the next is the next.
    publish(&mut sql, "broadcast", "after");
    sockets.iter_mut().for_each(|socket| assert_eq!(socket.payload(), json!("after")));
    assert_eq!(odoo.count(PEEK), 2 * CROWD, "a call each");
    assert!(odoo.with(|state| state.most) <= 8);
    assert!(odoo.with(|state| state.accepted) <= 200, "connections are kept: {}", odoo.with(|state| state.accepted));
    assert_eq!(odoo.count(CLOSED), 0);
}

#[test]
fn the_limit_of_calls_at_once_holds_and_is_reloaded() {
    let odoo = Odoo::start();
    let (cluster, mut sql) = start(&odoo, &["imbus.odoo_concurrency = 2"]);
    odoo.with(|state| state.held = true);
    let _sockets = crowd(&cluster, &mut sql, 200, 0);
    odoo.wait("two at once", |state| state.under_way == 2);
    sql.batch_execute("ALTER SYSTEM SET imbus.odoo_concurrency = 5").unwrap();
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    odoo.wait("five at once", |state| state.under_way == 5);
    odoo.with(|state| state.held = false);
    until_subscribed(&mut sql, 200);
    assert_eq!(odoo.with(|state| state.most), 5);
    assert_eq!(odoo.count(PEEK), 200);
}

#[test]
fn all_are_let_in_in_the_end_though_odoo_is_down_when_they_come() {
    let odoo = Odoo::start();
    let (cluster, mut sql) = start(&odoo, &[]);
    odoo.stop();
    let mut sockets = crowd(&cluster, &mut sql, 200, 0);
    sockets.iter_mut().for_each(|socket| assert!(matches!(socket.ended(), Ended::Close(1013, _))));
    odoo.come_back();
    let mut sockets = crowd(&cluster, &mut sql, 200, 0);
    until_subscribed(&mut sql, 200);
    publish(&mut sql, "broadcast", "to all");
    sockets.iter_mut().for_each(|socket| assert_eq!(socket.payload(), json!("to all")));
}
