//! `imbus.auth = 'odoo'`: who leaves, and whose session ends.

mod fake_odoo;
mod gateway;

use fake_odoo::{Answer, CLOSED, Odoo, PEEK};
use gateway::*;
use imbus::core::link::Command;
use imbus::core::settings::{AuthMethod, Settings};
use std::time::{Duration, Instant};

fn vouching(odoo: &Odoo) -> Settings {
    let auth = vec![AuthMethod::Token, AuthMethod::Odoo];
    Settings { auth, odoo_url: format!("http://127.0.0.1:{}", odoo.port), ..settings() }
}

fn visitor(gateway: &Gateway, session: &str) -> Client {
    let cookie = format!("session_id={session}");
    gateway.open("?version=18.0-7", &[("User-Agent", "browser"), ("Cookie", &cookie)])
}

/// A client of this session that is let in.
fn let_in(gateway: &Gateway, worker: &mut Worker, session: &str) -> Client {
    let mut client = visitor(gateway, session);
    client.subscribe("[]", 0);
    worker.answer(&[]);
    client
}

fn call(path: &str, lines: &str, params: &str) -> String {
    let body = format!(r#"{{"jsonrpc":"2.0","method":"call","id":9,"params":{params}}}"#);
    format!(
        "POST {path} HTTP/1.1\r\nHost: h\r\n{lines}Content-Type: application/json\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn a_session_whose_check_hangs_does_not_keep_the_ended_ones_in() {
    let odoo = Odoo::start();
    let settings = Settings { session_recheck: Duration::from_millis(200), ..vouching(&odoo) };
    let gateway = Gateway::with(settings);
    let mut worker = gateway.worker();
    odoo.answer("hangs", Answer::NeverChecked("demo", 8));
    let _hangs = let_in(&gateway, &mut worker, "hangs");
    let mut ends = let_in(&gateway, &mut worker, "ends");
    odoo.wait("the check hangs", |state| {
        state.calls.iter().any(|call| call.head.contains("=hangs") && call.params["is_first_poll"] == false)
    });
    odoo.answer("ends", Answer::Expired);
    ends.closed_with(4001, "SESSION_EXPIRED");
}

#[test]
fn many_tabs_of_a_user_are_one_who_leaves_with_the_last() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    odoo.answer("other", Answer::Known("demo", 8, ""));
    let mut tabs: Vec<Client> = (0..3).map(|_| let_in(&gateway, &mut worker, "s")).collect();
    // Subscribed again, and again, it is still one.
    for at in 0..3 {
        tabs[0].subscribe(&format!("[\"again{at}\"]"), 0);
        worker.answer(&[]);
    }
    let other = let_in(&gateway, &mut worker, "other");
    drop(tabs.pop());
    drop(tabs.pop());
    gateway.wait_until("two tabs have closed", |_| gateway.inspect(None).len() == 2);
    drop(other);
    odoo.wait("the other has left", |state| state.calls.iter().any(|call| call.path == CLOSED));
    let heads = |path: &str| -> Vec<String> {
        odoo.with(|state| state.calls.iter().filter(|call| call.path == path).map(|call| call.head.clone()).collect())
    };
    assert!(heads(CLOSED).iter().all(|head| head.contains("=other")), "{:?}", heads(CLOSED));
    drop(tabs);
    odoo.wait("the user has left", |state| state.calls.iter().filter(|call| call.path == CLOSED).count() == 2);
    assert!(heads(CLOSED)[1].contains("session_id=s\r\n"), "{:?}", heads(CLOSED));
}

#[test]
fn a_guest_is_somebody_and_watching_a_partner_is_not_being_it() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let channels = r#"[["demo","res.partner",9,"presence"],["demo","mail.guest",4],["demo","discuss.channel",7],
        ["demo","discuss.channel",7,"members"],["demo","broadcast"],["demo","res.groups",1],
        ["demo","editor_collaboration","res.partner","comment",9]]"#;
    odoo.answer("guest", Answer::Channels(channels));
    let mut tabs: Vec<Client> = (0..2).map(|_| let_in(&gateway, &mut worker, "guest")).collect();
    let subjects: Vec<_> = gateway.inspect(None).into_iter().map(|shown| shown.subject).collect();
    assert_eq!(subjects, [Some("mail.guest(4)".to_owned()), Some("mail.guest(4)".to_owned())]);
    worker.dispatch(&notifications(&[
        (1, r#"["res.partner",9]"#),
        (2, r#"["res.partner",9,"presence"]"#),
        (3, r#"["mail.guest",5]"#),
        (4, r#"["mail.guest",4]"#),
        (5, r#"["discuss.channel",7]"#),
        (6, r#"["discuss.channel",7,"members"]"#),
        (7, r#"["discuss.channel",8]"#),
        (8, r#"["res.groups",2]"#),
        (9, r#"["res.groups",1]"#),
    ]));
    // In one frame or in several.
    for tab in &mut tabs {
        let mut heard = Vec::new();
        while heard.last() != Some(&9) {
            heard.extend(tab.ids());
        }
        assert_eq!(heard, [2, 4, 5, 6, 9]);
    }
    drop(tabs);
    odoo.wait("the guest has left", |state| state.calls.iter().any(|call| call.path == CLOSED));
    assert_eq!(odoo.count(CLOSED), 1);
}

#[test]
fn a_plain_call_of_an_ended_session_says_so() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    odoo.answer("ended", Answer::Expired);
    for path in [PEEK, "/longpolling/poll"] {
        let answer = gateway.http(&call(
            path,
            "Cookie: session_id=ended\r\n",
            r#"{"channels":[],"last":0,"is_first_poll":false}"#,
        ));
        assert!(answer.contains("\"code\": 100"), "{path}: {answer}");
    }
    // Odoo down is 503 for these, and nothing hangs.
    odoo.stop();
    let answer = gateway.http(&call(PEEK, "Cookie: session_id=s\r\n", r#"{"channels":[],"last":0}"#));
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    // A token needs no Odoo.
    let mut worker = gateway.worker();
    let mut client = gateway.subscribed(&mut worker, r#"["a"]"#);
    worker.dispatch(&notifications(&[(1, "a")]));
    assert_eq!(client.ids(), [1]);
}

#[test]
fn a_plain_call_that_is_not_the_first_of_an_ended_session_says_so() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    odoo.answer("ended", Answer::Ended("demo"));
    let cookie = "Cookie: session_id=ended\r\n";
    let later = call(PEEK, cookie, r#"{"channels":[],"last":0,"is_first_poll":false}"#);
    let answer = std::thread::scope(|scope| {
        let answer = scope.spawn(|| gateway.http(&later));
        // It would be the public's otherwise.
        if let Some(Command::Recover { request, .. }) = soon(&mut worker, || answer.is_finished()) {
            worker.recovered(request, &[], false);
        }
        answer.join().unwrap()
    });
    assert!(answer.contains("\"code\": 100"), "{answer}");
}

/// What the gateway says, or nothing when it is over.
fn soon(worker: &mut Worker, is_over: impl Fn() -> bool) -> Option<Command> {
    let end = Instant::now() + PATIENCE;
    while !is_over() && Instant::now() < end {
        if let Some(command) = worker.peek() {
            return Some(command);
        }
        std::thread::yield_now();
    }
    None
}

#[test]
fn a_socket_of_a_user_whose_session_has_become_the_publics_ends() {
    let odoo = Odoo::start();
    let settings = Settings { session_recheck: Duration::from_millis(300), ..vouching(&odoo) };
    let gateway = Gateway::with(settings);
    let mut worker = gateway.worker();
    let (mut one, mut two) = (let_in(&gateway, &mut worker, "s1"), let_in(&gateway, &mut worker, "s2"));
    odoo.answer("s1", Answer::Ended("demo"));
    one.closed_with(4001, "SESSION_EXPIRED");
    // The same session with another user is not the one who came in.
    odoo.answer("s2", Answer::Known("demo", 8, ""));
    two.closed_with(4001, "SESSION_EXPIRED");
    // Nor is the same partner of another database.
    let mut three = let_in(&gateway, &mut worker, "s3");
    odoo.answer("s3", Answer::Known("other", 3, ""));
    three.closed_with(4001, "SESSION_EXPIRED");
}
