//! A websocket client of imbus: subscribes to channels and prints each notification as one line of JSON.
//!
//! `bus_tail --url 'ws://127.0.0.1:8072/websocket?version=18.0-7' --token TOKEN --channel broadcast
//!  [--channel '["res.partner",42]'] [--last ID] [--count N] [--timeout SECONDS]`

use lexopt::prelude::*;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::error::Error;
use std::net::TcpStream;
use std::time::{Duration, Instant};
use tungstenite::Message;
use tungstenite::client::IntoClientRequest;

struct Options {
    url: String,
    token: String,
    channels: Vec<Value>,
    last: i64,
    /// Ends after so many notifications.
    count: Option<usize>,
    /// Ends after so long, with an error when `count` was not reached.
    timeout: Option<Duration>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        url: "ws://127.0.0.1:8072/websocket?version=18.0-7".into(),
        token: std::env::var("IMBUS_TOKEN").unwrap_or_default(),
        channels: Vec::new(),
        last: 0,
        count: None,
        timeout: None,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("url") => options.url = parser.value()?.string()?,
            Long("token") => options.token = parser.value()?.string()?,
            Long("channel") => options.channels.push(channel(&parser.value()?.string()?)),
            Long("last") => options.last = parser.value()?.parse()?,
            Long("count") => options.count = Some(parser.value()?.parse()?),
            Long("timeout") => options.timeout = Some(Duration::from_secs_f64(parser.value()?.parse()?)),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

/// `["res.partner",42]` is a record's channel, anything else a plain string.
fn channel(text: &str) -> Value {
    serde_json::from_str(text).ok().filter(Value::is_array).unwrap_or_else(|| json!(text))
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let mut request = options.url.as_str().into_client_request()?;
    let host = request.uri().authority().ok_or("the url has no host")?.to_string();
    // imbus, like Odoo, asks for an Origin, and accepts its own host.
    request.headers_mut().insert("Origin", format!("http://{host}").parse()?);
    request.headers_mut().insert("Authorization", format!("Bearer {}", options.token).parse()?);
    let (mut socket, _) = tungstenite::client(request, TcpStream::connect(&host)?)?;
    let subscribe = json!({
        "event_name": "subscribe",
        "data": { "channels": options.channels, "last": options.last }
    });
    socket.send(Message::text(subscribe.to_string()))?;

    let until = options.timeout.map(|timeout| Instant::now() + timeout);
    let mut seen = 0;
    while options.count.is_none_or(|count| seen < count) {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(format!("timeout after {seen} notifications").into());
        }
        socket.get_ref().set_read_timeout(left)?;
        match socket.read() {
            Ok(Message::Text(frame)) => {
                for notification in serde_json::from_str::<Vec<&RawValue>>(&frame)? {
                    println!("{notification}");
                    seen += 1;
                }
            }
            Ok(Message::Close(Some(close))) => return Err(format!("closed: {} {}", close.code, close.reason).into()),
            Ok(Message::Close(None)) => return Err("closed".into()),
            Ok(_) => {}
            Err(tungstenite::Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    socket.close(None)?;
    Ok(())
}
