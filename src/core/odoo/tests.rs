use super::*;

fn result(channels: &str) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":1,"result":{{"channels":{channels},"notifications":[]}}}}"#)
}

#[test]
fn the_answer_says_the_database_the_channels_and_who_it_is() {
    let channels = r#"[["odoo18", "foo"], ["odoo18", "discuss.channel", 7, "members"], ["odoo18", "mail.guest", 9],
        ["odoo18", "res.partner", 8, "presence"], ["odoo18", "broadcast"], ["odoo18", "res.partner", 3]]"#;
    let Ok(Answer::Known(known)) = answer(&result(channels)) else { panic!() };
    assert_eq!(known.database, "odoo18");
    assert_eq!(known.granted.subject.as_deref(), Some("res.partner(3)"));
    assert!(known.is_user());
    let texts: Vec<&str> = known.granted.channels.iter().map(Channel::as_str).collect();
    assert_eq!(texts[1], r#"["discuss.channel",7,"members"]"#);
    assert_eq!(texts.len(), 6);
    let Ok(Answer::Known(public)) = answer(&result(r#"[["d","broadcast"],["d","mail.guest",4]]"#)) else { panic!() };
    assert_eq!(public.granted.subject.as_deref(), Some("mail.guest(4)"));
    assert!(!public.is_user());
}

#[test]
fn a_channel_nothing_can_be_published_on_does_no_harm() {
    let Ok(Answer::Known(known)) = answer(&result(r#"[["d","broadcast"],["d",null],["d","x",{}]]"#)) else { panic!() };
    assert_eq!(known.granted.channels.len(), 1);
}

#[test]
fn an_ended_session_a_refusal_and_a_fault_are_told_apart() {
    let error = |code: i32, name: &str| {
        format!(
            r#"{{"jsonrpc":"2.0","id":1,"error":{{"code":{code},"message":"m","data":{{"name":"{name}","message":"x"}}}}}}"#
        )
    };
    assert_eq!(answer(&error(100, "odoo.http.SessionExpiredException")), Ok(Answer::Expired));
    assert_eq!(
        answer(&error(200, "odoo.exceptions.AccessError")),
        Ok(Answer::Refused("odoo.exceptions.AccessError: x".into()))
    );
    assert!(answer(&error(200, "psycopg2.OperationalError")).is_err());
}

#[test]
fn what_no_odoo_says_is_an_error() {
    let bad = [
        "",
        "<html>",
        "[]",
        "{}",
        "null",
        r#"{"result":[]}"#,
        r#"{"result":{"channels":"x"}}"#,
        r#"{"result":{"channels":[]}}"#,
        r#"{"result":{"channels":["a"]}}"#,
        r#"{"result":{"channels":[[]]}}"#,
        r#"{"result":{"channels":[["a","x"],["b","x"]]}}"#,
        r#"{"result":{"channels":[["","x"]]}}"#,
        r#"{"error":"x"}"#,
    ];
    for body in bad {
        assert!(answer(body).is_err(), "{body}");
    }
    assert!(answer(&"<b>".repeat(1000)).unwrap_err().len() < 1000);
}

#[test]
fn calls_are_json() {
    let text = peek(r#"["a","b"]"#, 7, true);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["params"], serde_json::json!({"channels": ["a", "b"], "last": 7, "is_first_poll": true}));
}

#[test]
fn names_and_urls_are_checked() {
    assert!(are_names(r#"["a", "b"]"#) && are_names("[]"));
    assert!(!are_names(r#"["a", ["b"]]"#) && !are_names(r#""a""#) && !are_names("[1]") && !are_names("x"));
    for good in ["http://127.0.0.1:8069", "http://odoo", "http://[::1]:8069/prefix"] {
        assert!(is_url(good), "{good}");
    }
    for bad in [
        "",
        "https://odoo",
        "odoo:8069",
        "http://",
        "http:///x",
        "http://a b",
        "http://a?b",
        "http://:80",
        "http://u@h",
    ] {
        assert!(!is_url(bad), "{bad}");
    }
}
