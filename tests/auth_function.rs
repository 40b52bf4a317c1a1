//! `imbus.auth = 'token, function'`, and the plain endpoints, against a real server.

mod common;

use common::*;
use postgres::Client;
use serde_json::{Value, json};

/// One cluster for all tests of this file.
fn shared() -> Shared {
    shared_with(&["imbus.auth = 'token, function'"])
}

/// A database with a function that lets the bearer of cookie `who` into `of <who>` and what it asks for, but not nobody.
fn database(name: &str) -> Client {
    let mut sql = shared().database(name);
    sql.batch_execute(
        "CREATE ROLE keeper_of_NAME;
         CREATE TABLE visitors (name text PRIMARY KEY); ALTER TABLE visitors OWNER TO keeper_of_NAME;
         INSERT INTO visitors VALUES ('ann'), ('bob');
         CREATE FUNCTION public.may_subscribe(headers jsonb, channels jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
         DECLARE who text := substring(headers->>'cookie' FROM 'who=(\\w+)');
         BEGIN
             IF who = 'sleeper' THEN PERFORM pg_sleep(30); END IF;
             IF who = 'failure' THEN RAISE EXCEPTION 'it went wrong'; END IF;
             IF who = 'nonsense' THEN RETURN '7'; END IF;
             IF who = 'setter' THEN SET ROLE postgres; END IF;
             IF NOT EXISTS (SELECT FROM public.visitors WHERE name = who) THEN RETURN NULL; END IF;
             RETURN jsonb_build_object('subject', who || ' for ' || current_user || ' in ' || current_setting('search_path'),
                                       'channels', channels || jsonb_build_array('of ' || who));
         END $$;
         ALTER FUNCTION public.may_subscribe OWNER TO keeper_of_NAME;
         ALTER DATABASE NAME SET imbus.auth_function = 'public.may_subscribe';"
            .replace("NAME", name)
            .as_str(),
    )
    .unwrap();
    sql
}

fn visitor(sql: &mut Client, database: &str, who: &str) -> Socket {
    let port = shared().ws_port(sql);
    let cookie = format!("who={who}");
    Socket::open_path(port, &format!("/websocket?version=18.0-7&db={database}"), &[("Cookie", &cookie)]).unwrap()
}

fn publish(sql: &mut Client, channel: &str, payload: &str) {
    sql.execute("SELECT bus_sendone($1::text, 't', to_jsonb($2::text))", &[&channel, &payload]).unwrap();
}

/// Says something on the visitor's own channel until it is heard.
fn heard(sql: &mut Client, socket: &mut Socket, who: &str) {
    publish(sql, &format!("of {who}"), who);
    assert_eq!(socket.payload(), json!(who));
}

/// The answer to a call: its status and its result.
fn call(port: u16, path: &str, cookie: &str, params: Value) -> (u16, Value) {
    let body = json!({"jsonrpc": "2.0", "method": "call", "id": 1, "params": params}).to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nCookie: {cookie}\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    let answer = exchange(port, format!("{head}{body}").as_bytes());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let mut value: Value = serde_json::from_str(body).unwrap_or_default();
    (status(&answer), value["result"].take())
}

#[test]
fn the_function_decides_and_runs_as_its_owner() {
    let mut sql = database("decides");
    let mut socket = visitor(&mut sql, "decides", "ann");
    socket.subscribe(json!(["news"]), 0);
    heard(&mut sql, &mut socket, "ann");
    publish(&mut sql, "news", "for all");
    assert_eq!(socket.payload(), json!("for all"));
    let subject: String =
        sql.query_one("SELECT subject FROM imbus_stat_connections WHERE datname = 'decides'", &[]).unwrap().get(0);
    assert_eq!(subject, "ann for keeper_of_decides in pg_catalog, pg_temp");
}

#[test]
fn who_is_refused_is_closed_4401() {
    let mut sql = database("refuses");
    for who in ["eve", ""] {
        let mut socket = visitor(&mut sql, "refuses", who);
        socket.subscribe(json!(["news"]), 0);
        assert_eq!(socket.ended(), Ended::Close(4401, "refused".to_owned()));
    }
    let mut socket = visitor(&mut sql, "nowhere", "ann");
    assert!(matches!(socket.ended(), Ended::Close(4401, _)));
}

#[test]
fn a_function_that_fails_or_takes_too_long_harms_only_who_asked() {
    let mut sql = database("fails");
    let mut other = visitor(&mut sql, "fails", "bob");
    other.subscribe(json!([]), 0);
    heard(&mut sql, &mut other, "bob");
    for who in ["failure", "nonsense", "setter", "sleeper"] {
        let mut socket = visitor(&mut sql, "fails", who);
        socket.subscribe(json!(["news"]), 0);
        assert!(matches!(socket.ended(), Ended::Close(1013, _)), "{who}");
        heard(&mut sql, &mut other, "bob");
    }
}

#[test]
fn without_a_function_nobody_is_let_in_and_a_wrong_one_is_an_error() {
    let mut sql = database("without");
    sql.batch_execute("ALTER DATABASE without RESET imbus.auth_function").unwrap();
    let mut socket = visitor(&mut sql, "without", "ann");
    socket.subscribe(json!(["news"]), 0);
    assert_eq!(socket.ended(), Ended::Close(4401, "refused".to_owned()));
    for wrong in ["public.nothing", "pg_catalog.jsonb_concat", "public.may_subscribe(jsonb)", "drop table"] {
        sql.batch_execute(&format!("ALTER DATABASE without SET imbus.auth_function = '{wrong}'")).unwrap();
        let mut socket = visitor(&mut sql, "without", "ann");
        socket.subscribe(json!(["news"]), 0);
        let Ended::Close(code, _) = socket.ended() else { panic!("{wrong}") };
        assert!(code == 1013 || wrong == "pg_catalog.jsonb_concat", "{wrong} {code}");
    }
    // Without a schema it is looked for beside the extension.
    sql.batch_execute("ALTER DATABASE without SET imbus.auth_function = 'may_subscribe'").unwrap();
    let mut socket = visitor(&mut sql, "without", "ann");
    socket.subscribe(json!([]), 0);
    heard(&mut sql, &mut socket, "ann");
}

#[test]
fn only_a_superuser_names_the_function() {
    let mut sql = database("names");
    sql.batch_execute("CREATE ROLE tenant LOGIN; ALTER DATABASE names OWNER TO tenant; SET ROLE tenant").unwrap();
    let error = sql.batch_execute("ALTER DATABASE names SET imbus.auth_function = 'public.mine'").unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42501");
}

#[test]
fn requests_are_asked_for_too() {
    let mut sql = database("requests");
    let port = shared().ws_port(&mut sql);
    publish(&mut sql, "news", "one");
    let (status, found) =
        call(port, "/longpolling/poll?db=requests", "who=ann", json!({"channels": ["news"], "last": 0}));
    assert_eq!((status, &found[0]["message"]), (200, &json!({"type": "t", "payload": "one"})));
    let last = found[0]["id"].as_i64().unwrap();
    let missed = |last: i64| {
        call(port, "/bus/has_missed_notifications?db=requests", "who=ann", json!({"last_notification_id": last}))
    };
    assert_eq!(missed(last), (200, json!(false)));
    assert_eq!(missed(last + 1000), (200, json!(true)));
    let poll = std::thread::spawn(move || {
        call(port, "/longpolling/poll?db=requests", "who=ann", json!({"channels": ["news"], "last": last}))
    });
    // Whether the poll waits already or not: it gets the next one.
    publish(&mut sql, "news", "two");
    let (status, found) = poll.join().unwrap();
    assert_eq!((status, &found[0]["message"]["payload"]), (200, &json!("two")));
    let peek = json!({"channels": ["news"], "last": last, "is_first_poll": true});
    let (_, found) = call(port, "/websocket/peek_notifications?db=requests", "who=bob", peek);
    assert_eq!(found["channels"], json!([["requests", "news"], ["requests", "of bob"]]));
    assert_eq!(found["notifications"][0]["message"]["payload"], json!("two"));
    let (_, info) = call(port, "/bus/get_autovacuum_info?db=requests", "who=ann", json!({}));
    let next = info["nextcall"].as_str().unwrap();
    let soon: bool = sql
        .query_one("SELECT $1::text::timestamp - now() AT TIME ZONE 'UTC' BETWEEN '-1 s' AND '61 s'", &[&next])
        .unwrap()
        .get(0);
    assert!(soon, "{info}");
    assert_eq!(call(port, "/longpolling/poll?db=requests", "who=eve", json!({"channels": ["news"], "last": 0})).0, 401);
}
