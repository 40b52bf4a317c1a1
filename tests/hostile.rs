//! Broken and hostile input has its defined answer, and hurts nobody else.

mod common;

use common::{Cluster, Ended, PATIENCE, Socket, eventually, exchange, promptly, shared, status, token};
use postgres::Client;
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::OnceLock;
use tungstenite::Message;
use tungstenite::protocol::frame::Frame;
use tungstenite::protocol::frame::coding::{Data, OpCode};

/// The longest message a client may send (SPEC section 7).
const MEBIBYTE: usize = 1 << 20;

/// A database that these tests share, as they change nothing in it.
fn demo(cluster: &Cluster) -> Client {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| drop(cluster.database("demo")));
    cluster.connect("demo")
}

/// A connection as good as any, and a channel of its own.
fn good(cluster: &Cluster, sql: &mut Client, channel: &str) -> Socket {
    cluster.subscriber(sql, json!([channel]), 0)
}

/// Reads to the end what comes from a raw connection; panics when it does not end.
fn rest(mut stream: TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("the connection did not end")
        }
        _ => String::from_utf8_lossy(&bytes).into_owned(),
    }
}

/// A websocket that is open and has no subscription yet.
fn open(cluster: &Cluster, sql: &mut Client) -> Socket {
    cluster.socket(sql, json!(["*"]))
}

/// Shows that a connection is open and works: a good subscribe is taken and served.
fn works(socket: &mut Socket, sql: &mut Client, what: &str) {
    let channel = format!("works {}", socket.ws.get_ref().local_addr().unwrap());
    socket.subscribe(json!([channel]), 0);
    socket.sync(sql);
    sql.execute("SELECT bus_sendone($1::text, 't', '1')", &[&channel]).unwrap();
    assert_eq!(socket.payload(), json!(1), "{what}");
}

fn insert(sql: &mut Client, channel: Option<&str>, message: Option<&str>) {
    sql.execute("INSERT INTO imbus_bus (channel, message) VALUES ($1, $2)", &[&channel, &message]).unwrap();
}

fn skipped(sql: &mut Client) -> i64 {
    sql.query_one("SELECT skipped FROM imbus_stat_bus WHERE datname = current_database()", &[]).unwrap().get(0)
}

fn code(ended: Ended) -> u16 {
    match ended {
        Ended::Close(code, _) => code,
        Ended::Dropped => panic!("dropped without a close frame"),
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP

#[test]
fn garbage_instead_of_http_is_refused_and_a_good_client_beside_it_goes_on() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let mut beside = good(&cluster, &mut sql, "beside garbage");
    let noise: Vec<u8> = (0..4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8 | 0x80).collect();
    let garbage: [&[u8]; 7] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0\0\0\x08\x04\xd2\x16\x2f",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /websocket HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /websocket HTTP/1.1\r\nHost: a\r\nBad\0Name: x\r\n\r\n",
        &noise,
    ];
    for bytes in garbage {
        let answer = exchange(port, bytes);
        assert!(answer.is_empty() || status(&answer) == 400, "{:?}: {answer}", String::from_utf8_lossy(bytes));
        beside.only(&mut sql, "beside garbage");
    }
}

#[test]
fn silent_connections_disturb_nobody_and_are_given_up() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let mut silent: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    // Half of them stop in the middle of a head.
    for stream in silent.iter_mut().skip(50) {
        stream.write_all(b"GET /websocket HTTP/1.1\r\nHost: loc").unwrap();
    }
    let mut beside = good(&cluster, &mut sql, "beside silence");
    beside.only(&mut sql, "beside silence");
    for stream in silent {
        assert_eq!(status(&rest(stream)), 408);
    }
    beside.only(&mut sql, "beside silence");
}

#[test]
fn more_than_8_kib_of_headers_are_too_many() {
    let cluster = shared();
    let port = cluster.ws_port(&mut demo(&cluster));
    let request = |padding: usize| {
        let head = "GET /websocket/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Padding: ";
        format!("{head}{}\r\n\r\n", "x".repeat(padding - head.len() - 4))
    };
    assert_eq!(status(&exchange(port, request(8192).as_bytes())), 200);
    assert_eq!(status(&exchange(port, request(8193).as_bytes())), 431);
    assert_eq!(status(&exchange(port, request(100_000).as_bytes())), 431);
}

#[test]
fn an_unknown_path_is_not_found() {
    let cluster = shared();
    let port = cluster.ws_port(&mut demo(&cluster));
    for path in ["/", "/nothing", "/websocket/", "/websocket/health/x", "/../etc/passwd", "//websocket"] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        assert_eq!(status(&exchange(port, request.as_bytes())), 404, "{path}");
    }
}

#[test]
fn a_method_that_an_endpoint_does_not_take_is_refused() {
    let cluster = shared();
    let port = cluster.ws_port(&mut demo(&cluster));
    for method in ["POST", "PUT", "DELETE", "HEAD"] {
        let request =
            format!("{method} /websocket HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        let answer = exchange(port, request.as_bytes());
        assert_eq!(status(&answer), 405, "{method}");
        assert!(answer.contains("\r\nAllow: GET, OPTIONS\r\n"), "{answer}");
    }
}

#[test]
fn health_answers_get_and_head() {
    let cluster = shared();
    let port = cluster.ws_port(&mut demo(&cluster));
    let get = exchange(port, b"GET /websocket/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    let head = exchange(port, b"HEAD /websocket/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    let (headers, body) = get.split_once("\r\n\r\n").unwrap();
    assert_eq!(status(&get), 200);
    assert_eq!(serde_json::from_str::<Value>(body).unwrap(), json!({"status": "pass"}));
    assert_eq!(head, format!("{headers}\r\n\r\n"), "the same head and no body");
}

#[test]
fn a_get_of_the_websocket_without_upgrade_is_a_bad_request() {
    let cluster = shared();
    let port = cluster.ws_port(&mut demo(&cluster));
    let request = b"GET /websocket HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\nConnection: close\r\n\r\n";
    assert_eq!(status(&exchange(port, request)), 400);
}

// ---------------------------------------------------------------------------------------------------------------------
// Messages

#[test]
fn a_message_over_a_mebibyte_is_too_big() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let mut socket = open(&cluster, &mut sql);
    // The gateway may have closed before it has read all.
    let _ = socket.ws.send(Message::text(" ".repeat(MEBIBYTE + 1)));
    assert!(matches!(socket.ended(), Ended::Close(1009, _) | Ended::Dropped));
    let mut socket = open(&cluster, &mut sql);
    let frame = |op, last, length| Frame::message(vec![b' '; length], OpCode::Data(op), last);
    socket.ws.send(Message::Frame(frame(Data::Text, false, MEBIBYTE))).unwrap();
    socket.ws.send(Message::Frame(frame(Data::Continue, true, 1))).unwrap();
    assert_eq!(code(socket.ended()), 1009);
}

#[test]
fn a_message_of_exactly_a_mebibyte_is_taken() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let mut socket = open(&cluster, &mut sql);
    let message = |text: String| text.clone() + &" ".repeat(MEBIBYTE - text.len());
    socket.send(&message(json!({"event_name": "update_presence"}).to_string()));
    works(&mut socket, &mut sql, "after a message that is ignored");
    socket.send(&message(
        json!({"event_name": "subscribe", "data": {"channels": ["long one", "two"], "last": 0}}).to_string(),
    ));
    socket.sync_to(&mut sql, "= 2");
    socket.only(&mut sql, "long one");
}

#[test]
fn a_message_without_meaning_changes_nothing() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    for message in [
        "",
        "not json",
        "{",
        "null",
        "42",
        "[]",
        "{}",
        r#"{"event_name": "subscribe"}"#,
        r#"{"event_name": "subscribe", "data": null}"#,
        r#"{"event_name": "subscribe", "data": []}"#,
        r#"{"event_name": 1, "data": {"channels": ["x"], "last": 0}}"#,
        r#"{"event_name": null, "data": {"channels": ["x"], "last": 0}}"#,
        r#"{"event_name": "nothing", "data": {"channels": ["x"], "last": 0}}"#,
        r#"{"data": {"channels": ["x"], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": ["x"]}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": null, "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": "x", "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": {"x": 1}, "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [1], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": ["x", 42], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [""], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [null], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [true], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [{}], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [[]], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [[["x"]]], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [["x", ["y"]]], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [["x", null]], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": [[42, "x"]], "last": 0}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": ["x"], "last": "0"}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": ["x"], "last": null}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": ["x"], "last": 1.5}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": ["x"], "last": 1e400}}"#,
        r#"{"event_name": "subscribe", "data": {"channels": ["x"], "last": 99999999999999999999}}"#,
        &"[".repeat(100_000),
        &format!(r#"{{"event_name": "subscribe", "data": {{"channels": {}, "last": 0}}}}"#, "[".repeat(100_000)),
    ] {
        let shown: String = message.chars().take(100).collect();
        let mut socket = open(&cluster, &mut sql);
        // The same channels as before, should it be taken for a subscription.
        socket.subscribe(json!(["kept", "too"]), 0);
        socket.sync_to(&mut sql, "= 2");
        socket.send(message);
        // The answer to a ping comes after the message was dealt with.
        socket.ws.send(Message::Ping(vec![7].into())).unwrap();
        let answer = socket.ws.read();
        assert!(matches!(answer, Ok(Message::Pong(_))), "{shown}: {answer:?}");
        socket.sync_to(&mut sql, "= 2");
        works(&mut socket, &mut sql, &shown);
    }
}

#[test]
fn text_that_is_no_utf8_is_closed() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    for bytes in [&b"\xff\xfe"[..], b"{\"event_name\": \"\xc3\x28\"}", b"\xed\xa0\x80"] {
        let mut socket = open(&cluster, &mut sql);
        let frame = Frame::message(bytes.to_vec(), OpCode::Data(Data::Text), true);
        socket.ws.send(Message::Frame(frame)).unwrap();
        assert_eq!(code(socket.ended()), 1007, "{bytes:?}");
    }
}

#[test]
fn a_frame_against_the_protocol_is_closed() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let long_ping = [&b"\x89\xfe\0\x7e\0\0\0\0"[..], &[0; 126]].concat();
    for (what, bytes) in [
        ("unmasked", &b"\x81\x02{}"[..]),
        ("reserved bit", b"\xc1\x80\0\0\0\0"),
        ("unknown opcode", b"\x83\x80\0\0\0\0"),
        ("fragmented ping", b"\x09\x80\0\0\0\0"),
        ("long ping", &long_ping),
        ("continuation of nothing", b"\x80\x80\0\0\0\0"),
    ] {
        let mut socket = open(&cluster, &mut sql);
        socket.ws.get_mut().write_all(bytes).unwrap();
        let ended = socket.ended();
        assert!(matches!(ended, Ended::Close(1002, _)), "{what}: {ended:?}");
    }
}

#[test]
fn eleven_frames_at_once_are_one_too_many() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let frames = |count: usize| b"\x89\x80\0\0\0\0".repeat(count);
    let mut socket = open(&cluster, &mut sql);
    socket.ws.get_mut().write_all(&frames(9)).unwrap();
    works(&mut socket, &mut sql, "after ten frames");
    let mut socket = open(&cluster, &mut sql);
    socket.ws.get_mut().write_all(&frames(11)).unwrap();
    assert_eq!(code(socket.ended()), 1013);
}

#[test]
fn a_subscriber_that_vanishes_without_a_word_disturbs_nobody() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let gone = good(&cluster, &mut sql, "vanishing");
    let mut beside = good(&cluster, &mut sql, "vanishing");
    let address = gone.ws.get_ref().local_addr().unwrap().to_string();
    drop(gone);
    beside.only(&mut sql, "vanishing");
    eventually("the connection is forgotten", || {
        let query = "SELECT 1 FROM imbus_stat_connections WHERE address = $1";
        sql.query_opt(query, &[&address]).unwrap().is_none()
    });
    beside.only(&mut sql, "vanishing");
}

#[test]
fn a_slow_reader_is_closed_and_counted_while_another_gets_everything() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("slow");
    let mut slow = cluster.subscriber(&mut sql, json!(["big"]), 0);
    let mut quick = cluster.subscriber(&mut sql, json!(["big"]), 0);
    // More than the kernel's buffers and the queue of 1 MB take together.
    for number in 0..24 {
        let send = "SELECT bus_sendone('big', 't', jsonb_build_array($1::int, repeat('x', 1000000)))";
        sql.execute(send, &[&number]).unwrap();
        assert_eq!(quick.payload()[0], json!(number));
    }
    eventually("the slow reader is counted", || {
        let row = sql.query_one("SELECT slow_consumers FROM imbus_stat_gateway", &[]).unwrap();
        row.get::<_, i64>(0) == 1
    });
    assert!(matches!(slow.ended(), Ended::Close(1013, _) | Ended::Dropped));
    quick.only(&mut sql, "big");
}

// ---------------------------------------------------------------------------------------------------------------------
// NOTIFY and rows

/// Resident memory of a worker in bytes.
fn resident(sql: &mut Client, pid: &str) -> u64 {
    let pid: i32 = sql.query_one(pid, &[]).unwrap().get(0);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn readers_that_come_back_for_much_and_stall_cost_a_page_each() {
    // Its own, as the memory of its processes is looked at.
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let last: i64 = sql.query_one("SELECT bus_sendone('much', 't', '0')", &[]).unwrap().get(0);
    // Short ones first: that many of them may be read at once says nothing of those that follow.
    let many =
        "SELECT count(bus_sendone('much', 't', to_jsonb(repeat('x', CASE WHEN n > 400 THEN 50 * 1024 ELSE 1 END))))
                  FROM generate_series(1, 800) n";
    sql.query_one(many, &[]).unwrap();
    let mut beside = open(&cluster, &mut sql);
    works(&mut beside, &mut sql, "before");
    let memory = |sql: &mut Client| {
        let worker = "SELECT pid FROM imbus_stat_bus WHERE datname = current_database()";
        resident(sql, "SELECT pid FROM imbus_stat_gateway") + resident(sql, worker)
    };
    let before = memory(&mut sql);
    let stalled: Vec<Socket> = (0..30)
        .map(|_| {
            let mut socket = open(&cluster, &mut sql);
            socket.subscribe(json!(["much"]), last);
            socket
        })
        .collect();
    // Replays wait in line: when the last one is done, all have begun.
    let mut reader = open(&cluster, &mut sql);
    reader.subscribe(json!(["much"]), last);
    for _ in 0..800 {
        reader.payload();
    }
    works(&mut beside, &mut sql, "beside");
    let each = memory(&mut sql).saturating_sub(before) / stalled.len() as u64;
    assert!(each < MEBIBYTE as u64, "{each} bytes for each");
}

#[test]
fn malformed_notifies_are_ignored_and_logged_once() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("deaf");
    let mut socket = good(&cluster, &mut sql, "broadcast");
    let mut postgres = cluster.connect("postgres");
    // No trigger announces these rows: a NOTIFY must.
    sql.batch_execute("SET session_replication_role = replica").unwrap();
    let brackets = "[".repeat(7900);
    let malformed =
        ["not json", "{}", r#"[["db",["x"]]]"#, "[1]", "", &brackets, "[[]]", "[[1]]", "null", r#"[["\ud800"]]"#];
    let mut malformed = malformed.iter();
    promptly(|number| {
        let payload = malformed.next().unwrap();
        postgres.execute("SELECT pg_notify('imbus', $1)", &[payload]).unwrap();
        let message = json!({"type": "t", "payload": number}).to_string();
        insert(&mut sql, Some(r#"["deaf","broadcast"]"#), Some(&message));
        postgres.execute(r#"SELECT pg_notify('imbus', '[["deaf","broadcast"]]')"#, &[]).unwrap();
        assert_eq!(socket.payload(), json!(number), "after {payload:?}");
    });
    assert_eq!(cluster.log().matches("malformed NOTIFY").count(), 1, "{}", cluster.log());
}

#[test]
fn poison_rows_are_skipped_and_counted_while_the_next_arrives() {
    let cluster = shared();
    let mut sql = cluster.database("poison");
    let mut socket = good(&cluster, &mut sql, "broadcast");
    let (channel, message) = (r#"["poison","broadcast"]"#, r#"{"type":"t","payload":"poison"}"#);
    let deep = "[".repeat(100_000);
    let rows = [
        (None, None),
        (None, Some(message)),
        (Some(channel), None),
        (Some(""), Some(message)),
        (Some("broadcast"), Some(message)),
        (Some(r#""broadcast""#), Some(message)),
        (Some("{}"), Some(message)),
        (Some("[]"), Some(message)),
        (Some(r#"["poison"]"#), Some(message)),
        (Some(r#"["poison",""]"#), Some(message)),
        (Some(r#"["poison",null]"#), Some(message)),
        (Some(r#"["poison",["broadcast"]]"#), Some(message)),
        (Some(r#"["poison","broadcast""#), Some(message)),
        (Some(r#"["poison","broadcast"]]"#), Some(message)),
        (Some(r#"[null,"broadcast"]"#), Some(message)),
        (Some(r#"["Poison","broadcast"]"#), Some(message)),
        (Some(r#"["another","broadcast"]"#), Some(message)),
        (Some(deep.as_str()), Some(message)),
        (Some(channel), Some("")),
        (Some(channel), Some("poison")),
        (Some(channel), Some(r#"{"type":"t","payload":}"#)),
        (Some(channel), Some(r#"{"type":"t","payload":"poison"}]"#)),
        (Some(channel), Some(r#"{"type":"t"},{"id":1}"#)),
        (Some(channel), Some("{'type': 't'}")),
        (Some(channel), Some(r#"{"type":"t","payload":NaN}"#)),
        (Some(channel), Some(deep.as_str())),
    ];
    for (number, (channel, message)) in rows.iter().enumerate() {
        insert(&mut sql, *channel, *message);
        let shown = |text: &Option<&str>| text.map(|text| text.chars().take(50).collect::<String>());
        sql.execute("SELECT bus_sendone('broadcast', 't', '\"next\"')", &[]).unwrap();
        assert_eq!(socket.payload(), json!("next"), "{:?}", (shown(channel), shown(message)));
        assert_eq!(skipped(&mut sql), number as i64 + 1, "{:?}", (shown(channel), shown(message)));
    }
    let log = cluster.log();
    let lines = log.lines().filter(|line| line.contains("imbus skipped row") && line.contains("\"poison\"")).count();
    assert_eq!(lines, 1, "logged once");
}

#[test]
fn poison_rows_are_skipped_in_a_replay_too() {
    let cluster = shared();
    let mut sql = cluster.database("poison_replay");
    let first: i64 = sql.query_one("SELECT bus_sendone('broadcast', 't', '1')", &[]).unwrap().get(0);
    let channel = Some(r#"["poison_replay","broadcast"]"#);
    for (channel, message) in [(None, None), (channel, None), (channel, Some("poison")), (channel, Some(""))] {
        insert(&mut sql, channel, message);
    }
    for last in [0, first] {
        let mut socket = cluster.subscriber(&mut sql, json!(["broadcast"]), last);
        if last == 0 {
            assert_eq!(socket.payload(), json!(1));
        }
        sql.execute("SELECT bus_sendone('broadcast', 't', '2')", &[]).unwrap();
        assert_eq!(socket.payload(), json!(2));
        sql.batch_execute("DELETE FROM imbus_bus WHERE message LIKE '%:2}'").unwrap();
    }
}

#[test]
fn what_python_writes_and_jsonb_refuses_is_delivered_as_it_is() {
    let cluster = shared();
    let mut sql = cluster.database("python");
    let mut socket = good(&cluster, &mut sql, "broadcast");
    for message in [
        r#"{"type":"t","payload":"\ud800"}"#,
        r#"{"type":"t","payload":"\udc00\ud800 x"}"#,
        r#"{"type":"t","payload":"\u0000"}"#,
        r#"{"type": "t", "payload": {"a":1,  "a":2, "é": 1e400}}"#,
        r#"{"type":"t","payload":123456789012345678901234567890.123456789012345678901234567890}"#,
    ] {
        insert(&mut sql, Some(r#"["python","broadcast"]"#), Some(message));
        match socket.ws.read().unwrap() {
            Message::Text(frame) => assert!(frame.contains(message), "{frame}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(skipped(&mut sql), 0);
}

#[test]
fn the_token_decides_whatever_else_the_query_says() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let good = token(&mut sql, &json!(["broadcast"]));
    let path = format!("/websocket?version=18.0-7&db=postgres&token={good}&token=x&channels=[\"other\"]");
    let mut socket = Socket::open_path(port, &path.replace('"', "%22"), &[]).unwrap();
    socket.subscribe(json!(["broadcast"]), 0);
    socket.sync(&mut sql);
    socket.only(&mut sql, "broadcast");
}
