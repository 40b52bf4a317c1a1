//! Clients' messages: what is understood means the same when it is written anew. The first line is the database.

use imbus::core::channel::Channel;
use imbus::core::protocol::{self, Message};

/// What a subscribe comes to.
fn subscribed(text: &str, database: &str, arrays: bool) -> Result<(Vec<Channel>, i64), String> {
    match protocol::parse(text)? {
        Message::Subscribe { channels, last } => Ok((protocol::channels(&channels, database, arrays)?, last)),
        Message::Other => Err("another message".to_owned()),
    }
}

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (database, text) = text.split_once('\n').unwrap_or(("demo", text));
    let _ = protocol::is_supported(text);
    let full = subscribed(text, database, true);
    let narrow = subscribed(text, database, false);
    assert!(narrow.is_err() || narrow == full, "arrays only add to what is understood");
    let Ok((channels, last)) = full else { return };
    assert!(last >= 0);
    let names: Vec<String> = channels.iter().map(|channel| channel.stored(database)).collect();
    let again = format!(r#"{{"event_name":"subscribe","data":{{"channels":[{}],"last":{last}}}}}"#, names.join(","));
    assert_eq!(subscribed(&again, database, true), Ok((channels, last)));
}
