//! What visitors without any proof can do to a database whose function is asked, against a real server.

mod common;

use common::*;
use postgres::Client;
use serde_json::json;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

fn shared() -> Shared {
    shared_with(&["imbus.auth = 'token, function'"])
}

fn database(name: &str, special: &str) -> Client {
    let mut sql = shared().database(name);
    let text = "CREATE ROLE keeper_of_NAME;
         CREATE TABLE public.log (what text); ALTER TABLE public.log OWNER TO keeper_of_NAME;
         CREATE FUNCTION public.may_subscribe(headers jsonb, channels jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
         BEGIN
             IF headers->>'cookie' = 'who=special' THEN SPECIAL END IF;
             RETURN jsonb_build_object('channels', channels);
         END $$;
         ALTER FUNCTION public.may_subscribe OWNER TO keeper_of_NAME;
         ALTER DATABASE NAME SET imbus.auth_function = 'public.may_subscribe';";
    sql.batch_execute(&text.replace("NAME", name).replace("SPECIAL", special)).unwrap();
    sql
}

fn visitor(sql: &mut Client, database: &str, who: &str) -> Socket {
    let port = shared().ws_port(sql);
    let cookie = format!("who={who}");
    Socket::open_path(port, &format!("/websocket?version=18.0-7&db={database}"), &[("Cookie", &cookie)]).unwrap()
}

/// Says something on a channel.
fn publish(sql: &mut Client, channel: &str) {
    sql.execute("SELECT bus_sendone($1::text, 't', to_jsonb($1::text))", &[&channel]).unwrap();
}

/// database.rs talk: all questions that have come are answered before anything is dispatched.
#[test]
fn what_is_committed_does_not_wait_for_all_questions_that_have_come() {
    let mut sql = database("starved", "PERFORM pg_sleep(1.5); RETURN NULL;");
    let mut bob = visitor(&mut sql, "starved", "bob");
    bob.subscribe(json!(["news"]), 0);
    publish(&mut sql, "news");
    bob.payload();
    let mut slow: Vec<Socket> = (0..8).map(|_| visitor(&mut sql, "starved", "special")).collect();
    slow.iter_mut().for_each(|socket| socket.subscribe(json!(["x"]), 0));
    let ended = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for mut socket in slow {
            let ended = &ended;
            scope.spawn(move || {
                socket.ended();
                ended.fetch_add(1, Ordering::SeqCst);
            });
        }
        let begun = Instant::now();
        while ended.load(Ordering::SeqCst) == 0 {
            assert!(begun.elapsed().as_secs() < 20, "the first is refused");
            std::thread::yield_now();
        }
        let before = ended.load(Ordering::SeqCst);
        let start = Instant::now();
        publish(&mut sql, "news");
        bob.payload();
        let (took, refused) = (start.elapsed(), ended.load(Ordering::SeqCst) - before);
        eprintln!("commit to receipt {took:?}, {refused} questions answered meanwhile");
        assert!(refused <= 2, "{refused} questions went before it, in {took:?}");
    });
}

/// authenticate.rs Limit: the time-out fires once.
#[test]
fn a_function_that_ignores_its_limit_is_ended_all_the_same() {
    let special =
        "BEGIN PERFORM pg_sleep(9); EXCEPTION WHEN query_canceled THEN PERFORM pg_sleep(9); END; RETURN NULL;";
    let mut sql = database("stubborn", special);
    let mut bob = visitor(&mut sql, "stubborn", "bob");
    bob.subscribe(json!(["news"]), 0);
    publish(&mut sql, "news");
    bob.payload();
    let mut slow = visitor(&mut sql, "stubborn", "special");
    slow.subscribe(json!(["x"]), 0);
    let start = Instant::now();
    let ended = slow.ended();
    eprintln!("{ended:?} after {:?}", start.elapsed());
    assert!(matches!(ended, Ended::Close(1013, _)), "{ended:?}: it ran to its own end, in {:?}", start.elapsed());
}

/// authenticate.rs: what a session keeps, the worker keeps.
#[test]
fn a_function_leaves_no_locks_with_the_worker() {
    let special = "PERFORM pg_advisory_lock(42); EXECUTE 'PREPARE left_behind AS SELECT 1'; RETURN NULL;";
    let mut sql = database("locks", special);
    let mut socket = visitor(&mut sql, "locks", "special");
    socket.subscribe(json!(["x"]), 0);
    socket.ended();
    let held: i64 = sql.query_one("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", &[]).unwrap().get(0);
    assert_eq!(held, 0);
}

/// A deferred trigger would run after the restriction has ended.
#[test]
fn a_deferred_trigger_does_not_run_as_the_worker() {
    let mut sql = database("deferred", "INSERT INTO public.log VALUES ('in'); RETURN NULL;");
    sql.batch_execute(
        "CREATE FUNCTION public.later() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN INSERT INTO public.log SELECT 'as ' || current_user WHERE NEW.what = 'in'; RETURN NULL; END $$;
         ALTER FUNCTION public.later OWNER TO keeper_of_deferred;
         CREATE CONSTRAINT TRIGGER later AFTER INSERT ON public.log DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION public.later()",
    )
    .unwrap();
    let mut socket = visitor(&mut sql, "deferred", "special");
    socket.subscribe(json!(["x"]), 0);
    eprintln!("{:?}", socket.ended());
    let said: Vec<String> = sql.query("SELECT what FROM public.log", &[]).unwrap().iter().map(|r| r.get(0)).collect();
    assert!(said.iter().all(|what| what == "in" || what == "as keeper_of_deferred"), "{said:?}");
}

/// jsonb_in refuses what JSON allows: each such message costs the server a line.
#[test]
fn visitors_do_not_fill_the_log() {
    let mut sql = database("noisy", "RETURN NULL;");
    for channels in [r#"["\u0000"]"#, r#"["\ud800"]"#, r#"["\u0000"]"#] {
        let mut socket = visitor(&mut sql, "noisy", "bob");
        socket.send(&format!(r#"{{"event_name":"subscribe","data":{{"channels":{channels},"last":0}}}}"#));
        eprintln!("{channels} {:?}", socket.ended());
    }
    let log = shared().log();
    let lines = log.lines().filter(|line| line.contains("could not answer a client of database \"noisy\"")).count();
    assert!(lines <= 1, "{lines} lines");
}
