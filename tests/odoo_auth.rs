//! `imbus.auth = 'token, odoo'` against a real server, with an Odoo played by the tests.

mod common;
mod fake_odoo;

use common::*;
use fake_odoo::{Answer, CLOSED, Odoo, PEEK};
use postgres::Client;
use serde_json::json;

/// A cluster that asks this Odoo.
fn asking(odoo: &Odoo, more: &[&str]) -> Cluster {
    let url = format!("imbus.odoo_url = 'http://127.0.0.1:{}'", odoo.port);
    let lines = [&["imbus.auth = 'token, odoo'", url.as_str()], more].concat();
    Cluster::start_with(&lines)
}

fn visitor(cluster: &Cluster, sql: &mut Client, session: &str) -> Socket {
    let port = cluster.ws_port(sql);
    let cookie = format!("session_id={session}");
    Socket::open_path(port, "/websocket?version=19.0-2", &[("Cookie", &cookie)]).unwrap()
}

fn to_partner(sql: &mut Client, payload: &str) {
    sql.execute("SELECT bus_sendone('[\"res.partner\", 3]'::jsonb, 't', to_jsonb($1::text))", &[&payload]).unwrap();
}

/// Says something to the partner until the socket hears it.
fn hears(sql: &mut Client, socket: &mut Socket, payload: &str) {
    to_partner(sql, payload);
    assert_eq!(socket.payload(), json!(payload));
}

#[test]
fn two_databases_of_odoos_are_served_and_never_mix() {
    let odoo = Odoo::start();
    let cluster = asking(&odoo, &[]);
    let mut one = cluster.database_with("one", ODOO_TABLE);
    let mut two = cluster.database_with("two", ODOO_TABLE);
    odoo.answer("s1", Answer::Known("one", 3, ""));
    odoo.answer("s2", Answer::Known("two", 3, ""));
    let (mut first, mut second) = (visitor(&cluster, &mut one, "s1"), visitor(&cluster, &mut two, "s2"));
    first.subscribe(json!(["x"]), 0);
    second.subscribe(json!(["x"]), 0);
    hears(&mut one, &mut first, "in one");
    hears(&mut two, &mut second, "in two");
    hears(&mut one, &mut first, "again in one");
    let rows = one.query("SELECT subject, datname::text FROM imbus_stat_connections", &[]).unwrap();
    let rows: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(rows.contains(&("res.partner(3)".to_owned(), "one".to_owned())), "{rows:?}");
    // A token's client beside them.
    let mut third = cluster.socket(&mut one, json!(["*"]));
    third.subscribe(json!(["news"]), 0);
    third.sync(&mut one);
}

#[test]
fn a_message_said_while_the_server_is_down_for_them_is_not_lost() {
    let odoo = Odoo::start();
    let cluster = asking(&odoo, &[]);
    let mut sql = cluster.database_with("one", ODOO_TABLE);
    (0..30).for_each(|at| odoo.answer(&format!("s{at}"), Answer::Known("one", 3, "")));
    let mut sockets: Vec<Socket> = (0..30).map(|at| visitor(&cluster, &mut sql, &format!("s{at}"))).collect();
    sockets.iter_mut().for_each(|socket| socket.subscribe(json!([]), 0));
    odoo.wait("all are asked about", |state| state.calls.len() == 30 && state.under_way == 0);
    to_partner(&mut sql, "before");
    let last = sockets.iter_mut().map(|socket| socket.next()["id"].as_i64().unwrap()).max().unwrap();
    drop(sql);
    cluster.pg_ctl(&["restart", "-m", "fast"]);
    let mut sql = recovered(&cluster, "one");
    to_partner(&mut sql, "meanwhile");
    let mut sockets: Vec<Socket> = (0..30).map(|at| visitor(&cluster, &mut sql, &format!("s{at}"))).collect();
    sockets.iter_mut().for_each(|socket| socket.subscribe(json!([]), last));
    sockets.iter_mut().for_each(|socket| assert_eq!(socket.payload(), json!("meanwhile")));
    // One question a socket; one whose connection Odoo has just closed is asked once more.
    assert!((60..=62).contains(&odoo.count(PEEK)), "{}", odoo.count(PEEK));
    assert!(odoo.with(|state| state.most) <= 8);
    // A restart is no leaving.
    assert_eq!(odoo.count(CLOSED), 0);
}

#[test]
fn odoo_may_be_elsewhere_or_nowhere_for_a_while() {
    let odoo = Odoo::start();
    let cluster = asking(&odoo, &["imbus.session_recheck = 1s"]);
    let mut sql = cluster.database_with("one", ODOO_TABLE);
    odoo.answer("s", Answer::Known("one", 3, ""));
    let mut socket = visitor(&cluster, &mut sql, "s");
    socket.subscribe(json!([]), 0);
    hears(&mut sql, &mut socket, "heard");
    let point_to = |sql: &mut Client, url: &str| {
        sql.batch_execute(&format!("ALTER SYSTEM SET imbus.odoo_url = '{url}'")).unwrap();
        sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    };
    point_to(&mut sql, "http://127.0.0.1:1");
    // The reload takes a moment.
    eventually("newcomers are told to come back", || {
        let before = odoo.count(PEEK);
        let mut other = visitor(&cluster, &mut sql, "s");
        other.subscribe(json!([]), 0);
        to_partner(&mut sql, "to all");
        odoo.count(PEEK) == before && matches!(other.ended_soon(), Some(Ended::Close(1013, _)))
    });
    // Who was let in stays, whatever becomes of the checks.
    to_partner(&mut sql, "still heard");
    while socket.payload() != json!("still heard") {}
    point_to(&mut sql, &format!("http://127.0.0.1:{}/", odoo.port));
    eventually("newcomers are let in", || {
        let before = odoo.count(PEEK);
        let mut other = visitor(&cluster, &mut sql, "s");
        other.subscribe(json!([]), 0);
        other.ended_soon().is_none() && odoo.count(PEEK) > before
    });
    // Its session ends, and nobody subscribes.
    odoo.answer("s", Answer::Expired);
    assert_eq!(socket.ended(), Ended::Close(4001, "SESSION_EXPIRED".to_owned()));
    for bad in ["https://odoo.example", "nonsense", "http://", "http://a b"] {
        let refused = sql.batch_execute(&format!("ALTER SYSTEM SET imbus.odoo_url = '{bad}'"));
        assert_eq!(refused.unwrap_err().code().unwrap().code(), "22023", "{bad}");
    }
    let refused = sql.batch_execute("ALTER SYSTEM SET imbus.auth = 'odoo, nonsense'");
    assert_eq!(refused.unwrap_err().code().unwrap().code(), "22023");
}

#[test]
fn databases_with_and_without_odoo_are_served_together() {
    let odoo = Odoo::start();
    let cluster = asking(&odoo, &[]);
    let mut one = cluster.database_with("one", ODOO_TABLE);
    let mut plain = cluster.database("plain");
    odoo.answer("s", Answer::Known("one", 3, ""));
    let mut first = visitor(&cluster, &mut one, "s");
    first.subscribe(json!(["x"]), 0);
    first.sync(&mut one);
    // A token for the same record of the database that has no Odoo.
    let mut second = cluster.socket(&mut plain, json!([["res.partner", 3], "x"]));
    second.subscribe(json!([["res.partner", 3], "x"]), 0);
    second.sync(&mut plain);
    to_partner(&mut plain, "in plain");
    assert_eq!(second.payload(), json!("in plain"));
    to_partner(&mut one, "in one");
    assert_eq!(first.payload(), json!("in one"));
    first.only(&mut one, "x");
    second.only(&mut plain, "x");
    // Odoo's own rows, as its ORM writes them: one of its own database, one that names another.
    let insert = "INSERT INTO public.bus_bus (channel, message) VALUES ($1, $2)";
    let message = r#"{"type":"t","payload":"by Odoo"}"#;
    one.execute(insert, &[&r#"["plain","res.partner",3]"#, &message]).unwrap();
    one.execute(insert, &[&r#"["one","res.partner",3]"#, &message]).unwrap();
    assert_eq!(first.payload(), json!("by Odoo"));
    first.only(&mut one, "x");
    second.only(&mut plain, "x");
}

#[test]
fn a_database_that_gets_the_extension_later_is_served_from_then_on() {
    let odoo = Odoo::start();
    let cluster = asking(&odoo, &[]);
    let mut one = cluster.database_with("one", ODOO_TABLE);
    cluster.connect("postgres").batch_execute("CREATE DATABASE late").unwrap();
    let mut late = cluster.connect("late");
    late.batch_execute(ODOO_TABLE).unwrap();
    odoo.answer("s", Answer::Known("late", 3, ""));
    let mut refused = visitor(&cluster, &mut one, "s");
    refused.subscribe(json!([]), 0);
    assert!(matches!(refused.ended(), Ended::Close(1013, _)));
    late.batch_execute("CREATE EXTENSION imbus").unwrap();
    cluster.wait_served("late");
    let mut socket = visitor(&cluster, &mut one, "s");
    socket.subscribe(json!([]), 0);
    hears(&mut late, &mut socket, "served");
}
