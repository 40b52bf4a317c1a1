//! Peers that mean harm, against the gateway's network side alone: whatever they do, another client gets everything, the
//! limits answer as specified, what waits in memory is bounded, and no thread dies. A database worker is played here.

mod gateway;

use gateway::steady::Steady;
use gateway::*;
use imbus::core::channel::Channel;
use imbus::core::link::{Command, Decoder, Event, encode};
use imbus::core::notification::Notification;
use imbus::core::position::Position;
use imbus::core::protocol::CHANNELS_MAX;
use imbus::core::settings::Settings;
use imbus::net::bridge::ToMain;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tungstenite::Message;

/// How long what has a time limit of its own (10 s for a head, 15 s for a pong) may take.
const LONG: Duration = Duration::from_secs(60);

/// A database worker that answers every recovery with what it has dispatched on those channels.
struct Feeder {
    line: Arc<Mutex<Line>>,
    answering: JoinHandle<()>,
}

/// Its way to the gateway, and what went it; one lock, so that a recovery has all that was dispatched before it.
struct Line {
    stream: UnixStream,
    dispatched: Vec<(i64, Channel)>,
}

impl Line {
    fn tell(&mut self, event: &Event) {
        // A gateway that has stopped hears nothing.
        let _ = self.stream.write_all(&encode(event).unwrap());
    }

    fn recovered(&mut self, request: u64, channels: &[Channel], last: i64) {
        let owed = self.dispatched.iter().filter(|(id, channel)| *id > last && channels.contains(channel));
        let notifications = owed.map(|(id, channel)| notification(*id, channel.as_str())).collect();
        self.tell(&Event::Recovered { request, notifications, more: false });
    }
}

impl Feeder {
    fn new(worker: Worker) -> Feeder {
        let Worker { stream, mut decoder } = worker;
        stream.set_read_timeout(None).unwrap();
        let mut reading = stream.try_clone().unwrap();
        let line = Arc::new(Mutex::new(Line { stream, dispatched: Vec::new() }));
        let own = line.clone();
        let answering = std::thread::spawn(move || {
            while let Some(command) = command(&mut reading, &mut decoder) {
                if let Command::Recover { request, channels, last } = command {
                    own.lock().unwrap().recovered(request, &channels, last);
                }
            }
        });
        Feeder { line, answering }
    }

    fn dispatch(&self, notifications: &[Notification]) {
        let mut line = self.line.lock().unwrap();
        let high = notifications.iter().map(|notification| notification.id).max().unwrap_or_default();
        let position = Position { table: 1, high, ..Position::default() };
        line.dispatched.extend(notifications.iter().map(|one| (one.id, one.channel.clone())));
        line.tell(&Event::Dispatch { notifications: notifications.to_vec(), position, committed: 0 });
    }
}

fn command(stream: &mut UnixStream, decoder: &mut Decoder) -> Option<Command> {
    let mut bytes = [0; 65536];
    loop {
        if let Some(command) = decoder.next().unwrap() {
            return Some(command);
        }
        match stream.read(&mut bytes) {
            Ok(0) | Err(_) => return None,
            Ok(count) => decoder.feed(&bytes[..count]),
        }
    }
}

/// A gateway, its worker, and an innocent client on channel "w".
struct Scene {
    gateway: Gateway,
    feeder: Feeder,
    witness: Client,
    id: i64,
}

impl Scene {
    fn with(settings: Settings) -> Scene {
        let gateway = Gateway::with(settings);
        let mut worker = gateway.worker();
        let witness = gateway.subscribed(&mut worker, r#"["w"]"#);
        Scene { gateway, feeder: Feeder::new(worker), witness, id: 0 }
    }

    /// The witness gets so many notifications, each and in order.
    fn goes_on(&mut self, count: usize) {
        for _ in 0..count {
            self.tells("w");
            assert_eq!(self.witness.ids(), [self.id]);
        }
    }

    /// One notification on a channel.
    fn tells(&mut self, name: &str) {
        self.id += 1;
        self.feeder.dispatch(&[notification(self.id, name)]);
    }

    fn count(&self, counter: impl Fn(&imbus::net::counters::Counters) -> u64) -> u64 {
        counter(self.gateway.net().counters())
    }

    /// Waits until only so many sockets are open.
    fn wait_sockets(&mut self, count: u64) {
        let start = Instant::now();
        while self.count(|counters| counters.sockets_open.load(Ordering::Relaxed)) != count {
            assert!(start.elapsed() < LONG, "{count} sockets are left");
            self.goes_on(1);
        }
    }

    /// The greatest outbound queue of all connections and of all together, in bytes.
    fn queued(&self) -> (usize, usize) {
        let queues = self.gateway.inspect(None);
        let queues = queues.iter().map(|connection| usize::try_from(connection.queued).unwrap());
        queues.fold((0, 0), |(most, sum), queued| (most.max(queued), sum + queued))
    }

    /// Every thread is alive and serves, the witness has missed nothing, and the gateway ends when it is told to.
    fn ends(mut self) {
        self.goes_on(10);
        for _ in 0..4 {
            let answer = self.gateway.http("GET /websocket/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
        for message in self.gateway.net().receiver().try_iter() {
            assert!(!matches!(message, ToMain::Died { .. }), "{message:?}");
        }
        self.gateway.stop();
        self.feeder.answering.join().unwrap();
    }
}

/// A socket to the gateway that is patient.
fn tcp(gateway: &Gateway) -> Steady {
    let tcp = gateway.tcp();
    tcp.set_read_timeout(Some(LONG)).unwrap();
    tcp
}

/// What comes until the end; a reset ends it too.
fn all(tcp: &mut Steady) -> String {
    let mut bytes = Vec::new();
    match tcp.read_to_end(&mut bytes) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => String::from_utf8_lossy(&bytes).into_owned(),
    }
}

/// Writes one byte each time nothing has come for a moment, until the connection ends. Tells what came.
fn trickle(mut tcp: Steady, bytes: &[u8]) -> String {
    tcp.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let (mut came, mut buffer) = (Vec::new(), [0; 1024]);
    for byte in bytes {
        if tcp.write_all(&[*byte]).is_err() {
            break;
        }
        match tcp.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => came.extend_from_slice(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&came).into_owned()
}

/// A masked frame of a client; the mask is zero.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).ok().filter(|length| *length < 126).expect("a short frame");
    [&[first, 0x80 | length, 0, 0, 0, 0], payload].concat()
}

#[test]
fn slow_heads_and_bodies_are_ended_after_their_time_however_they_trickle() {
    let mut scene = Scene::with(settings());
    let mut halves: Vec<Steady> = (0..200).map(|_| tcp(&scene.gateway)).collect();
    for (number, half) in halves.iter_mut().enumerate() {
        let request = "POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nbody";
        half.write_all(&request.as_bytes()[..request.len().min(10 + number)]).unwrap();
    }
    let head = format!("GET /websocket/health HTTP/1.1\r\nHost: x\r\nX-Slow: {}", "x".repeat(2000));
    let body = format!("POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{}", "x".repeat(2000));
    std::thread::scope(|threads| {
        let gateway = &scene.gateway;
        let slow: Vec<_> = [&head, &body, &head, &body]
            .into_iter()
            .map(|text| {
                let mut tcp = tcp(gateway);
                let sent = text.find("\r\n\r\n").map_or(0, |end| end + 4);
                tcp.write_all(&text.as_bytes()[..sent]).unwrap();
                threads.spawn(move || trickle(tcp, &text.as_bytes()[sent..]))
            })
            .collect();
        for id in 1..=500 {
            scene.feeder.dispatch(&[notification(id, "w")]);
            assert_eq!(scene.witness.ids(), [id]);
        }
        scene.id = 500;
        for thread in slow {
            let came = thread.join().unwrap();
            assert!(came.contains("HTTP/1.1 408 "), "{came}");
        }
    });
    for half in &mut halves {
        let came = all(half);
        assert!(came.contains("HTTP/1.1 408 "), "{came}");
    }
    drop(halves);
    scene.wait_sockets(1);
    scene.ends();
}

#[test]
fn a_head_without_end_is_refused_when_it_is_too_long() {
    let mut scene = Scene::with(settings());
    let mut endless: Vec<Steady> = (0..50).map(|_| tcp(&scene.gateway)).collect();
    endless.iter_mut().for_each(|tcp| tcp.write_all(b"GET /websocket HTTP/1.1\r\n").unwrap());
    for piece in 0..17 {
        for tcp in &mut endless {
            // The last ones may come too late.
            let _ = tcp.write_all(format!("X-{piece}: {}\r\n", "x".repeat(500)).as_bytes());
        }
        scene.goes_on(5);
    }
    for tcp in &mut endless {
        let answer = all(tcp);
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    drop(endless);
    scene.wait_sockets(1);
    scene.ends();
}

#[test]
fn peers_that_vanish_or_fall_silent_are_let_go() {
    let mut scene = Scene::with(Settings { ping_interval: Duration::from_millis(50), ..settings() });
    let silent: Vec<Client> = (0..64).map(|_| scene.gateway.client()).collect();
    let ended: Vec<Client> = (0..64).map(|_| scene.gateway.client()).collect();
    for client in &ended {
        // Half of the stream stays open.
        client.socket.get_ref().shutdown(Shutdown::Write).unwrap();
    }
    for _ in 0..64 {
        let mut client = scene.gateway.client();
        client.subscribe(r#"["w"]"#, 0);
        // What is unread at the end resets the connection.
        client.socket.get_mut().write_all(&frame(0x89, b"unanswered")).unwrap();
    }
    let start = Instant::now();
    // The witness answers its pings as it reads.
    while scene.count(|counters| counters.connections_open.load(Ordering::Relaxed)) > 1 {
        assert!(start.elapsed() < LONG, "the silent are let go");
        assert!(matches!(scene.witness.socket.read().unwrap(), Message::Ping(_)));
    }
    drop((silent, ended));
    scene.wait_sockets(1);
    scene.ends();
}

#[test]
fn readers_that_stall_are_closed_and_what_waits_for_them_is_bounded() {
    const STALLED: usize = 16;
    const LIMIT: usize = 64 * 1024;
    const LONGEST: usize = 256 * 1024;
    let mut scene = Scene::with(Settings { send_queue_max: LIMIT, ..settings() });
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let mut client = scene.gateway.client();
        client.subscribe(r#"["w"]"#, 0);
        stalled.push(client);
    }
    scene.gateway.wait_until("all are subscribed", |net| {
        net.counters().recoveries.load(Ordering::Relaxed) == 1 + STALLED as u64
    });
    let filler = "x".repeat(LONGEST);
    while scene.count(|counters| counters.slow_consumers.load(Ordering::Relaxed)) < STALLED as u64 {
        scene.id += 1;
        assert!(scene.id < 1000, "the kernel's buffers are not that large");
        let message = format!(r#"{{"type":"{filler}","payload":{}}}"#, scene.id).into();
        scene.feeder.dispatch(&[Notification { id: scene.id, channel: channel("w"), message }]);
        assert_eq!(scene.witness.ids(), [scene.id]);
        let (most, sum) = scene.queued();
        assert!(most <= LIMIT + LONGEST + 1000, "{most} bytes wait for one");
        assert!(sum <= STALLED * (LIMIT + LONGEST + 1000), "{sum} bytes wait");
    }
    scene.goes_on(10);
    assert_eq!(scene.count(|counters| counters.connections_open.load(Ordering::Relaxed)), 1);
    // They never read their close: after 5 s they are gone all the same.
    scene.wait_sockets(1);
    scene.ends();
}

#[test]
fn pings_whose_answers_nobody_reads_fill_no_memory() {
    const LIMIT: usize = 64 * 1024;
    let mut scene = Scene::with(Settings { send_queue_max: LIMIT, rate_limit_burst: 0, ..settings() });
    let mut client = scene.gateway.client();
    let pings = frame(0x89, &[b'p'; 125]).repeat(500);
    for _ in 0..1000 {
        if scene.count(|counters| counters.slow_consumers.load(Ordering::Relaxed)) > 0 {
            break;
        }
        client.socket.get_mut().write_all(&pings).unwrap();
        let (most, _) = scene.queued();
        assert!(most <= LIMIT + 1000, "{most} bytes wait");
        scene.goes_on(1);
    }
    assert_eq!(scene.count(|counters| counters.slow_consumers.load(Ordering::Relaxed)), 1);
    drop(client);
    scene.wait_sockets(1);
    scene.ends();
}

/// How many sockets each side of a burst may have, at most 2,000; with few descriptors it is a smaller burst.
fn burst() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let files: usize = line.split_whitespace().nth(3).unwrap().parse().unwrap_or(usize::MAX);
    2000.min(files.saturating_sub(900) / 2).max(50)
}

#[test]
fn a_burst_of_connects_is_served_up_to_the_limit_and_told_to_come_later_beyond() {
    let (count, max) = (burst(), burst() / 2);
    let mut scene = Scene::with(Settings { max_connections: max, ..settings() });
    let request = format!(
        "GET /websocket?token={} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n\
         Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        token(DEMO, "demo"),
        port = scene.gateway.port
    );
    let mut crowd: Vec<Steady> = (0..count).map(|_| tcp(&scene.gateway)).collect();
    for tcp in &mut crowd {
        // Those far beyond the limit are dropped unheard.
        let _ = tcp.write_all(request.as_bytes());
    }
    scene.goes_on(100);
    let (mut open, mut told, mut dropped) = (0, 0, 0);
    for tcp in &mut crowd {
        let mut head = [0; 12];
        match tcp.read_exact(&mut head) {
            Ok(()) if &head == b"HTTP/1.1 101" => open += 1,
            Ok(()) => {
                let rest = all(tcp);
                assert!(&head == b"HTTP/1.1 503" && rest.contains("\r\nRetry-After: "), "{rest}");
                told += 1;
            }
            Err(_) => dropped += 1,
        }
    }
    assert_eq!(open, max - 1, "the witness is one");
    assert!(told > 0 && open + told + dropped == count, "{told} told, {dropped} dropped");
    scene.goes_on(100);
    drop(crowd);
    scene.wait_sockets(1);
    let mut late = scene.gateway.client();
    late.subscribe(r#"["late"]"#, 0);
    scene.gateway.wait_until("it is live", |net| net.counters().recoveries.load(Ordering::Relaxed) == 2);
    scene.goes_on(1);
    drop(late);
    scene.ends();
}

#[test]
fn messages_of_a_mebibyte_from_many_sides_are_heard_and_longer_ones_are_not() {
    const SIDES: usize = 32;
    let mut scene = Scene::with(settings());
    std::thread::scope(|threads| {
        let gateway = &scene.gateway;
        let loud: Vec<_> = (0..SIDES)
            .map(|side| {
                threads.spawn(move || {
                    let mut client = gateway.client();
                    for round in 0..3 {
                        let mut text = subscribe(&format!(r#"["side{side}","round{round}"]"#), 0);
                        text.push_str(&" ".repeat((1 << 20) - text.len()));
                        client.say(&text);
                    }
                    client
                })
            })
            .collect();
        let giants: Vec<_> = (0..SIDES / 4)
            .map(|_| {
                threads.spawn(move || {
                    let mut client = gateway.client();
                    let _ = client.socket.send(Message::text(" ".repeat((1 << 20) + 1)));
                    assert_eq!(client.closed().0, 1009);
                    let mut client = gateway.client();
                    let announced = [&[0x81, 0xff, 0x7f][..], &[0xff; 7], &[0; 4]].concat();
                    client.socket.get_mut().write_all(&announced).unwrap();
                    assert!(matches!(client.closed().0, 1002 | 1009));
                })
            })
            .collect();
        for id in 1..=200 {
            scene.feeder.dispatch(&[notification(id, "w")]);
            assert_eq!(scene.witness.ids(), [id]);
        }
        scene.id = 200;
        giants.into_iter().for_each(|thread| thread.join().unwrap());
        let mut loud: Vec<Client> = loud.into_iter().map(|thread| thread.join().unwrap()).collect();
        gateway.wait_until("all is heard", |net| {
            net.counters().messages_received.load(Ordering::Relaxed) == 1 + 3 * SIDES as u64
        });
        for (side, client) in loud.iter_mut().enumerate() {
            let name = format!("side{side}");
            scene.id += 1;
            scene.feeder.dispatch(&[notification(scene.id, &name)]);
            assert_eq!(client.ids(), [scene.id]);
        }
    });
    scene.wait_sockets(1);
    scene.ends();
}

#[test]
fn thousands_of_subscribes_hold_nobody_up_and_the_last_one_counts() {
    const FLOODERS: usize = 16;
    const TIMES: usize = 250;
    let mut scene = Scene::with(Settings { rate_limit_burst: 0, ..settings() });
    let mut flooders: Vec<Client> = (0..FLOODERS).map(|_| scene.gateway.client()).collect();
    for round in 0..TIMES {
        for (number, client) in flooders.iter_mut().enumerate() {
            client.subscribe(&format!(r#"["of{number}","round{round}","all",["res.partner",{round}]]"#), 0);
        }
        if round % 10 == 0 {
            scene.goes_on(1);
        }
    }
    for (number, client) in flooders.iter_mut().enumerate() {
        client.subscribe(&format!(r#"["of{number}","end"]"#), 0);
        client.socket.send(Message::Ping(Vec::new().into())).unwrap();
        // Answered when all before it was heard.
        assert!(client.socket.read().unwrap().is_pong());
    }
    for round in [0, TIMES - 1] {
        scene.tells(&format!("round{round}"));
    }
    scene.tells("all");
    for (number, client) in flooders.iter_mut().enumerate() {
        scene.id += 1;
        scene.feeder.dispatch(&[notification(scene.id, &format!("of{number}"))]);
        assert_eq!(client.ids(), [scene.id], "nothing of what was left before");
    }
    drop(flooders);
    scene.wait_sockets(1);
    scene.ends();
}

#[test]
fn too_many_subscribes_and_too_many_channels_end_the_connection() {
    let mut scene = Scene::with(Settings { rate_limit_burst: 10, ..settings() });
    let mut floods: Vec<Client> = (0..20).map(|_| scene.gateway.client()).collect();
    for client in &mut floods {
        for round in 0..11 {
            client.subscribe(&format!(r#"["round{round}"]"#), 0);
        }
    }
    for client in &mut floods {
        assert_eq!(client.closed(), (1013, String::new()));
    }
    assert_eq!(scene.count(|counters| counters.closed_by_policy.load(Ordering::Relaxed)), 20);
    let names = |count: usize| (0..count).map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(",");
    let mut many = scene.gateway.client();
    many.subscribe(&format!("[{}]", names(CHANNELS_MAX)), 0);
    many.subscribe(&format!("[{}]", names(CHANNELS_MAX + 1)), 0);
    assert_eq!(many.closed().0, 1009);
    drop((floods, many));
    scene.wait_sockets(1);
    scene.ends();
}
