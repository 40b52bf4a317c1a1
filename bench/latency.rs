//! Commit to receipt: publishes at a fixed rate and prints how long after each commit had returned a websocket client
//! had the notification, with idle clients beside. Or, with `--idle N`, opens N idle clients and keeps them.
//!
//! `latency --url URL --idle N` · `latency --url URL --sql CONNINFO [--rate 1000] [--seconds 20]`

use lexopt::prelude::*;
use serde_json::Value;
use std::net::TcpStream;
use std::time::{Duration, Instant};
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket};

struct Options {
    url: String,
    idle: usize,
    sql: Option<String>,
    rate: u32,
    seconds: u32,
}

fn options() -> Result<Options, lexopt::Error> {
    let mut options = Options { url: String::new(), idle: 0, sql: None, rate: 1000, seconds: 20 };
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("url") => options.url = parser.value()?.string()?,
            Long("idle") => options.idle = parser.value()?.parse()?,
            Long("sql") => options.sql = Some(parser.value()?.string()?),
            Long("rate") => options.rate = parser.value()?.parse()?,
            Long("seconds") => options.seconds = parser.value()?.parse()?,
            _ => return Err(arg.unexpected()),
        }
    }
    Ok(options)
}

/// Opens a websocket and subscribes.
fn open(url: &str, channel: &str) -> WebSocket<TcpStream> {
    let mut request = url.into_client_request().expect("a ws:// address");
    let host = request.uri().authority().expect("a host").to_string();
    request.headers_mut().insert("Origin", format!("http://{host}").parse().expect("a host"));
    let stream = TcpStream::connect(&host).expect("connect");
    stream.set_nodelay(true).expect("nodelay");
    let (mut socket, _) = tungstenite::client(request, stream).expect("handshake");
    let subscribe = format!(r#"{{"event_name":"subscribe","data":{{"channels":["{channel}"],"last":0}}}}"#);
    socket.send(Message::text(subscribe)).expect("subscribe");
    socket
}

fn idle(options: &Options) -> ! {
    let mut sockets: Vec<_> = (0..options.idle).map(|_| open(&options.url, "idle")).collect();
    eprintln!("{} idle sockets are open", sockets.len());
    sockets.iter().for_each(|socket| socket.get_ref().set_nonblocking(true).expect("nonblocking"));
    loop {
        std::thread::sleep(Duration::from_secs(5));
        for socket in &mut sockets {
            // Answers pings.
            while socket.read().is_ok() {}
        }
    }
}

/// Receives until the last number has come: when each came.
fn receive(mut socket: WebSocket<TcpStream>, count: usize) -> Vec<Option<Instant>> {
    let mut times = vec![None; count];
    let mut missing = count;
    while missing > 0 {
        let Message::Text(text) = socket.read().expect("read") else { continue };
        let now = Instant::now();
        let frame: Value = serde_json::from_str(&text).expect("JSON");
        for entry in frame.as_array().expect("an array") {
            let number = entry["message"]["payload"].as_u64().and_then(|number| usize::try_from(number).ok());
            if let Some(time) = number.and_then(|number| times.get_mut(number)) {
                missing -= usize::from(time.is_none());
                *time = Some(now);
            }
        }
    }
    times
}

fn main() {
    let options = options().expect("usage: see the head of bench/latency.rs");
    let Some(conninfo) = &options.sql else { idle(&options) };
    let count = (options.rate * options.seconds) as usize;
    let socket = open(&options.url, "latency");
    std::thread::sleep(Duration::from_millis(300));
    let receiver = std::thread::spawn(move || receive(socket, count));
    let mut sql = postgres::Client::connect(conninfo, postgres::NoTls).expect("connect");
    let send = sql.prepare("SELECT bus_sendone('latency', 't', to_jsonb($1::bigint))").expect("prepare");
    let start = Instant::now();
    let mut commits = Vec::with_capacity(count);
    for number in 0..count {
        // The schedule is fixed beforehand: a late one is not forgiven. A receipt before the commit returned counts as 0.
        let due = start + Duration::from_secs(1) * number as u32 / options.rate;
        while Instant::now() < due {
            std::thread::sleep((due - Instant::now()).min(Duration::from_micros(200)));
        }
        sql.query(&send, &[&(number as i64)]).expect("publish");
        commits.push((due, Instant::now()));
    }
    let rate = count as f64 / start.elapsed().as_secs_f64();
    let times = receiver.join().expect("receiver");
    let since = |from: fn(&(Instant, Instant)) -> Instant| {
        let mut all: Vec<f64> = times
            .iter()
            .zip(&commits)
            .map(|(time, commit)| {
                time.map_or(f64::NAN, |time| time.saturating_duration_since(from(commit)).as_secs_f64() * 1e3)
            })
            .collect();
        all.sort_by(f64::total_cmp);
        all
    };
    println!(
        "| {} messages at {rate:.0}/s (asked for: {}) | p50 | p90 | p99 | p99.9 | max (ms) |",
        count, options.rate
    );
    println!("|---|---|---|---|---|---|");
    for (name, all) in
        [("commit returned → receipt", since(|c| c.1)), ("due by the schedule → receipt", since(|c| c.0))]
    {
        let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize];
        println!("| {name} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |", at(0.5), at(0.9), at(0.99), at(0.999), at(1.0));
    }
}
