//! Clients' messages: what is understood means the same when it is written anew. The first line is the database.

use imbus::core::granted::Granted;
use imbus::core::json;
use imbus::core::protocol::{self, Message};
use imbus::core::rpc::{self, Call};

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (database, text) = text.split_once('\n').unwrap_or(("demo", text));
    let _ = protocol::is_supported(text);
    if let Ok(call) = Call::parse(text.as_bytes()) {
        let again = format!(r#"{{"params":{},"id":{}}}"#, call.params, call.id);
        let again = Call::parse(again.as_bytes()).expect("the same call");
        assert_eq!((again.id, again.params), (call.id, call.params));
        assert_eq!(json::check(&rpc::result(call.id, call.params)), Ok(()));
        assert_eq!(json::check(&rpc::error(call.id, 200, text, database)), Ok(()));
    }
    if let Ok(granted) = Granted::parse(text, database) {
        let names: Vec<String> = granted.channels.iter().map(|channel| channel.stored(database)).collect();
        assert_eq!(protocol::channels(&format!("[{}]", names.join(",")), database, true), Ok(granted.channels));
    }
    let Ok(Message::Subscribe { channels, last }) = protocol::parse(text) else { return };
    assert!(last >= 0);
    let again = format!(r#"{{"event_name":"subscribe","data":{{"channels":{channels},"last":{last}}}}}"#);
    assert_eq!(protocol::parse(&again), Ok(Message::Subscribe { channels: channels.clone(), last }));
    let full = protocol::channels(&channels, database, true);
    let narrow = protocol::channels(&channels, database, false);
    assert!(narrow.is_err() || narrow == full, "arrays only add to what is understood");
    let Ok(channels) = full else { return };
    let names: Vec<String> = channels.iter().map(|channel| channel.stored(database)).collect();
    assert_eq!(protocol::channels(&format!("[{}]", names.join(",")), database, true), Ok(channels));
}
