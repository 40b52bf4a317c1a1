//! What the administrator sees: `/metrics`, the live page, who may look, and ending a connection.

mod common;

use common::*;
use postgres::Client;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// The samples of `/metrics`, by name with labels.
fn metrics(port: u16) -> BTreeMap<String, f64> {
    let answer = get(port, "/metrics", &[]);
    assert_eq!(status(&answer), 200, "{answer}");
    assert!(answer.contains("Content-Type: text/plain; version=0.0.4"), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let mut families = 0;
    let mut samples = BTreeMap::new();
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            families += usize::from(comment.starts_with("TYPE "));
            assert!(comment.starts_with("TYPE imbus_") || comment.starts_with("HELP imbus_"), "{line}");
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(samples.insert(name.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
    }
    assert!(families > 15, "{body}");
    samples
}

fn get(port: u16, path: &str, headers: &[&str]) -> String {
    let host = format!("Host: localhost:{port}");
    let host = if headers.iter().any(|line| line.starts_with("Host")) { String::new() } else { format!("{host}\r\n") };
    let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    exchange(port, format!("GET {path} HTTP/1.1\r\n{host}{lines}Connection: close\r\n\r\n").as_bytes())
}

/// Looks until it is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn admin_token(sql: &mut Client) -> String {
    sql.query_one("SELECT bus_token('[]', admin => true)", &[]).unwrap().get(0)
}

/// The next message of the live page's websocket.
fn feed(socket: &mut Socket) -> Value {
    loop {
        match socket.ws.read() {
            Ok(tungstenite::Message::Text(text)) => return serde_json::from_str(&text).unwrap(),
            other => drop(other.unwrap()),
        }
    }
}

#[test]
fn what_was_sent_is_what_is_counted() {
    let cluster = Cluster::start_with(&[]);
    let mut sql = cluster.database("counted");
    let port = cluster.ws_port(&mut sql);
    let mut sockets: Vec<Socket> = (0..5).map(|_| cluster.subscriber(&mut sql, json!(["news", "other"]), 0)).collect();
    let mut before = metrics(port);
    // A survey leaves out who is too busy to answer.
    until("all are counted", || {
        before = metrics(port);
        let counts = |name: &str| before.get(&format!(r#"imbus_{name}{{database="counted"}}"#)).copied();
        (counts("connections"), counts("subscriptions")) == (Some(5.0), Some(10.0))
    });
    assert_eq!(before[r#"imbus_database_workers{state="running"}"#], 1.0);
    for number in 0..20 {
        sql.execute("SELECT bus_sendone('news', 't', to_jsonb($1::int))", &[&number]).unwrap();
    }
    for socket in &mut sockets {
        for number in 0..20 {
            assert_eq!(socket.payload(), json!(number));
        }
    }
    let sent = |all: &BTreeMap<String, f64>| all["imbus_notifications_sent_total"];
    until("all is counted", || sent(&metrics(port)) - sent(&before) == 100.0);
    let after = metrics(port);
    let grown = |name: &str| after[name] - before[name];
    assert_eq!(grown("imbus_commit_to_send_seconds_count"), 100.0);
    assert_eq!(after[r#"imbus_commit_to_send_seconds_bucket{le="+Inf"}"#], after["imbus_commit_to_send_seconds_count"]);
    assert!(after["imbus_commit_to_send_seconds_sum"] > 0.0 && after["imbus_commit_to_send_seconds_sum"] < 1000.0);
    assert!(grown("imbus_sent_bytes_total") > 100.0 * 20.0 && grown("imbus_received_bytes_total") > 0.0);
    assert_eq!(grown(r#"imbus_dispatched_total{database="counted"}"#), 20.0);
    assert!(status(&exchange(port, b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")) == 200);
}

#[test]
fn every_refusal_is_counted_under_its_reason() {
    let cluster = Cluster::start_with(&["imbus.max_connections = 10", "imbus.rate_limit_burst = 5"]);
    let mut sql = cluster.database("refused");
    let port = cluster.ws_port(&mut sql);
    let refused = |reason: &str| metrics(port)[&format!("imbus_rejections_total{{reason=\"{reason}\"}}")];
    let narrow: String = sql.query_one("SELECT bus_token('[\"mine\"]')", &[]).unwrap().get(0);

    let mut socket = Socket::open(port, "nonsense");
    assert!(matches!(socket.ended(), Ended::Close(4401, _)));
    assert_eq!(refused("unauthorized"), 1.0);

    let mut socket = Socket::open(port, &narrow);
    socket.subscribe(json!(["not mine"]), 0);
    assert!(matches!(socket.ended(), Ended::Close(4403, _)));
    assert_eq!(refused("forbidden"), 1.0);

    let mut socket = Socket::open(port, &narrow);
    for _ in 0..40 {
        if socket.ws.send(tungstenite::Message::text("{}")).is_err() {
            break;
        }
    }
    assert!(matches!(socket.ended(), Ended::Close(1013, _) | Ended::Dropped));
    until("the rate is counted", || refused("rate") == 1.0);

    get(port, "/nowhere", &[]);
    assert_eq!(refused("bad_request"), 1.0);
    let evil = ["Origin: https://evil.example", "Upgrade: websocket", "Sec-WebSocket-Version: 13"];
    let evil = [&evil[..], &["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Connection: Upgrade"]].concat();
    assert_eq!(status(&get(port, "/websocket?version=18.0-7", &evil)), 403);
    assert_eq!(refused("origin"), 1.0);
    let long = format!("X-Long: {}", "x".repeat(9000));
    assert_eq!(status(&get(port, "/websocket/health", &[&long])), 431);
    assert_eq!(refused("head_too_long"), 1.0);
    let post = b"POST /longpolling/poll HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n";
    assert_eq!(status(&exchange(port, post)), 413);
    assert_eq!(refused("body_too_long"), 1.0);

    // Some of those before are still open on this side.
    let open = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let many: Vec<TcpStream> = (0..10).map(|_| open()).collect();
    until("it is full", || status(&get(port, "/websocket/health", &[])) == 503);
    drop(many);
    until("there is room again", || status(&get(port, "/websocket/health", &[])) == 200);
    assert!(refused("too_many_connections") >= 1.0);
}

#[test]
fn only_this_machine_without_a_proxy_or_an_administrators_token_may_look() {
    let cluster = shared();
    let mut sql = cluster.database("looking");
    let port = cluster.ws_port(&mut sql);
    let admin = format!("Authorization: Bearer {}", admin_token(&mut sql));
    let plain: String = sql.query_one("SELECT bus_token('[\"*\"]')", &[]).unwrap().get(0);
    let plain = format!("Authorization: Bearer {plain}");
    for path in ["/metrics", "/imbus", "/imbus/live"] {
        let good = if path == "/imbus/live" { 400 } else { 200 };
        assert_eq!(status(&get(port, path, &[])), good, "{path}");
        assert_eq!(status(&get(port, path, &["Host: 127.0.0.1"])), good, "{path}");
        for line in [
            "X-Forwarded-For: 10.0.0.1",
            "X-Forwarded-Proto: https",
            "X-Real-IP: 127.0.0.1",
            "Forwarded: for=127.0.0.1",
            "Host: evil.example",
        ] {
            assert_eq!(status(&get(port, path, &[line])), 403, "{path} {line}");
            assert_eq!(status(&get(port, path, &[line, &admin])), good, "{path} {line}");
        }
        assert_eq!(status(&get(port, path, &[&plain])), 401, "{path}");
        assert_eq!(status(&get(port, path, &["Authorization: Bearer x"])), 401, "{path}");
    }
    let page = get(port, "/imbus", &[]);
    assert!(page.contains("Content-Security-Policy: default-src 'none'") && page.contains("<title>imbus"), "{page}");
}

#[test]
fn the_live_page_is_fed_with_everything() {
    let cluster = shared();
    let mut sql = cluster.database("fed");
    let port = cluster.ws_port(&mut sql);
    let _socket = cluster.subscriber(&mut sql, json!(["news"]), 0);
    sql.batch_execute(
        "CREATE FUNCTION fails() RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'for the page'; END $$;
         SELECT ir_async_call('public.fails'), ir_async_call('pg_catalog.pg_sleep', '[0]')",
    )
    .unwrap();
    let failed = "SELECT count(*) FROM ir_async WHERE state = 'failed'";
    until("the job has failed", || sql.query_one(failed, &[]).unwrap().get::<_, i64>(0) == 1);
    let mut page = Socket::open_path(port, "/imbus/live", &[]).unwrap();
    let start = Instant::now();
    let state = loop {
        let state = feed(&mut page);
        let knows = |job: &Value| job["database"] == "fed" && job["error"] == "for the page";
        if state["failed_jobs"].as_array().unwrap().iter().any(knows) {
            break state;
        }
        assert!(start.elapsed() < PATIENCE, "{state}");
    };
    assert_eq!(state["version"], env!("CARGO_PKG_VERSION"));
    for field in [
        "connections",
        "subscriptions",
        "sockets",
        "queued_bytes",
        "connections_total",
        "notifications_sent_total",
        "frames_sent_total",
        "messages_received_total",
        "bytes_sent_total",
        "bytes_received_total",
        "slow_consumers_total",
        "replays_total",
    ] {
        assert!(state["gateway"][field].is_u64(), "{field}: {state}");
    }
    assert!(state["gateway"]["rejected"]["slow"].is_u64());
    let bounds = state["latency"]["le_ms"].as_array().unwrap().len();
    assert_eq!(state["latency"]["counts"].as_array().unwrap().len(), bounds + 1);
    let database = state["databases"].as_array().unwrap().iter().find(|one| one["name"] == "fed").unwrap();
    assert_eq!((&database["state"], &database["connections"]), (&json!("running"), &json!(1)));
    let queue = state["queues"].as_array().unwrap().iter().find(|one| one["database"] == "fed").unwrap();
    assert_eq!((&queue["queue"], &queue["failed"]), (&json!("default"), &json!(1)));
    let next = feed(&mut page);
    assert!(next["now"].as_i64() > state["now"].as_i64());
}

#[test]
fn a_connection_can_be_ended_by_who_may() {
    let cluster = shared();
    let (mut sql, mut other) = (cluster.database("ending"), cluster.database("ending_other"));
    let mut socket = cluster.subscriber(&mut sql, json!(["news"]), 0);
    let id: i64 = sql.query_one("SELECT id FROM imbus_stat_connections WHERE datname = 'ending'", &[]).unwrap().get(0);
    let end = |sql: &mut Client, id: i64| -> Option<bool> {
        sql.query_one("SELECT imbus_disconnect($1, 'go away')", &[&id]).unwrap().get(0)
    };
    other
        .batch_execute("CREATE ROLE ender; GRANT EXECUTE ON FUNCTION imbus_disconnect TO ender; SET ROLE ender")
        .unwrap();
    assert_eq!(end(&mut other, id), Some(false), "a connection of another database");
    other.batch_execute("RESET ROLE; GRANT pg_signal_backend TO ender; SET ROLE ender").unwrap();
    assert_eq!(end(&mut other, id + 1000), Some(false));
    assert_eq!(end(&mut other, id), Some(true));
    assert_eq!(socket.ended(), Ended::Close(1013, "go away".to_owned()));
    sql.batch_execute("CREATE ROLE nobody; SET ROLE nobody").unwrap();
    let error = sql.query_one("SELECT imbus_disconnect(1)", &[]).unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42501");
}
