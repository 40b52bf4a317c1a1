//! What goes over the wire.

use super::*;

fn notification(id: i64, name: &str, message: &str) -> Notification {
    Notification { id, channel: Channel::plain(name).unwrap(), message: message.into() }
}

fn subscribe(channels: &str, last: &str) -> String {
    format!(r#"{{"event_name":"subscribe","data":{{"channels":{channels},"last":{last}}}}}"#)
}

#[test]
fn a_frame_holds_ids_and_messages() {
    let frame = notifications_frame(&[notification(1, "a", "{}"), notification(-12, "a", r#"{"type":"é"}"#)]);
    let text = r#"[{"id":1,"message":{}},{"id":-12,"message":{"type":"é"}}]"#;
    assert_eq!(&frame[..2], [0x81, text.len() as u8]);
    assert_eq!(&frame[2..], text.as_bytes());
}

#[test]
fn lengths_take_one_three_or_nine_bytes() {
    for (length, head) in [(125, 2), (126, 4), (0xffff, 4), (0x10000, 10)] {
        let frame = notifications_frame(&[notification(1, "a", &"x".repeat(length - 21))]);
        assert_eq!(frame.len(), head + length);
        let said = match frame[1] {
            126 => u16::from_be_bytes([frame[2], frame[3]]).into(),
            127 => u64::from_be_bytes(frame[2..10].try_into().unwrap()),
            short => short.into(),
        };
        assert_eq!(said, length as u64);
    }
}

#[test]
fn a_descent_or_another_channel_begins_a_new_frame() {
    let ids = |ids: &[i64]| ids.iter().map(|id| notification(*id, "a", "{}")).collect::<Vec<_>>();
    assert_eq!(runs(&ids(&[1, 2, 5, 3, 4, 4]), true), [0..3, 3..5, 5..6]);
    assert!(runs(&[], true).is_empty());
    let mixed = [notification(1, "a", "{}"), notification(2, "b", "{}"), notification(3, "b", "{}")];
    assert_eq!(runs(&mixed, true), [0..1, 1..3]);
    assert_eq!(runs(&mixed, false).len(), 1);
}

#[test]
fn long_messages_do_not_share_a_frame() {
    let long = "x".repeat(FRAME_TEXT / 2);
    let three: Vec<_> = (1..=3).map(|id| notification(id, "a", &long)).collect();
    assert_eq!(runs(&three, true), [0..2, 2..3]);
}

#[test]
fn a_reason_is_cut_between_characters() {
    let close = Close::new(CloseCode::Forbidden, "é".repeat(100));
    assert_eq!(close.reason().len(), 122);
    assert_eq!(close.frame()[..4], [0x88, 124, 0x11, 0x33]);
}

/// What a subscribe comes to.
fn subscribed(text: &str, arrays: bool) -> Result<(Vec<Channel>, i64), String> {
    match parse(text)? {
        Message::Subscribe { channels, last } => Ok((super::channels(&channels, "db", arrays)?, last)),
        Message::Other | Message::Presence { .. } => panic!("another message"),
    }
}

#[test]
fn subscribes_name_strings_and_record_channels() {
    let all = subscribed(&subscribe(r#"["broadcast",["res.partner",42],["db","x"]]"#, "7"), true).unwrap();
    let names = ["\"broadcast\"", "[\"res.partner\",42]", "\"x\""];
    assert_eq!(all, (names.map(|name| Channel::from_json(name, "db").unwrap()).to_vec(), 7));
    assert!(subscribed(&subscribe(r#"[["res.partner",42]]"#, "0"), false).is_err());
    assert_eq!(subscribed(&subscribe("[]", "0"), true), Ok((Vec::new(), 0)));
}

#[test]
fn other_events_are_no_error() {
    let presence = r#"{"event_name":"update_presence","data":{"inactivity_period":0,"im_status_ids_by_model":{}}}"#;
    let data = r#"{"inactivity_period":0,"im_status_ids_by_model":{}}"#.to_owned();
    assert_eq!(parse(presence), Ok(Message::Presence { data }));
    assert!(parse(r#"{"event_name":"update_presence","data":[1]}"#).is_err());
    assert!(parse(r#"{"event_name":"update_presence"}"#).is_err());
    assert_eq!(parse(r#"{"event_name":"x"}"#), Ok(Message::Other));
}

#[test]
fn bad_messages_are_refused() {
    let texts =
        ["", "nonsense", "[]", "1", "{}", r#"{"event_name":7}"#, r#"{"event_name":"subscribe"}"#, r#"["subscribe"]"#];
    let data = [("[1]", "0"), ("[\"\"]", "0"), ("\"a\"", "0"), ("{}", "0"), ("[\"a\"]", "-1"), ("[\"a\"]", "1.0")];
    let more = [("[\"a\"]", "\"1\""), ("[\"a\"]", "9223372036854775808"), ("[\"a\"]", "null"), ("[null]", "0")];
    let texts = texts.map(str::to_owned).into_iter();
    for text in texts.chain(data.into_iter().chain(more).map(|(channels, last)| subscribe(channels, last))) {
        assert!(parse(&text).is_err() || subscribed(&text, true).is_err(), "{text}");
    }
    assert!(parse(r#"{"event_name":"subscribe","data":{"channels":["a"]}}"#).is_err());
}

#[test]
fn versions_from_18_0_2_on_are_served() {
    for version in ["18.0-2", "18.0-7", "18.1-1", "saas~18.2-1", "19.0-1", "19.0-10"] {
        assert!(is_supported(version), "{version}");
    }
    for version in ["", "18.0-1", "17.0-3", "18.0", "18-2", "18.0-2x", "18.0-", "18.0-+2", "x18.0-2", "18.0-2-1"] {
        assert!(!is_supported(version), "{version}");
    }
}
