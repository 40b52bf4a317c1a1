//! How a message gets to each of the servers: through SQL and commit, or to the bare writer's control port.

use crate::scan::DIGITS;
use postgres::{Client, NoTls, Statement};
use std::error::Error;
use std::fmt::Write as _;
use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

/// Bytes of a message's payload as JSON.
const PAYLOAD: usize = 200;

/// The channel everybody is on: this visit's own, on which nothing is owed from another.
pub fn channel() -> String {
    format!("broadcast-{}", std::process::id())
}

/// One whole unmasked frame.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        length @ 0..=125 => bytes.push(length as u8),
        length @ 126..=0xffff => {
            bytes.push(126);
            bytes.extend((length as u16).to_be_bytes());
        }
        length => {
            bytes.push(127);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// The payload of message `number`: a mark, the number, filled up; without the quotes.
pub fn text(number: u64) -> String {
    let mut text = format!("~{number:0DIGITS$} ");
    while text.len() < PAYLOAD - 2 {
        text.push('x');
    }
    text
}

/// A way to publish.
pub enum Publisher {
    /// Commits `bus_sendone`.
    Imbus { client: Box<Client>, send: Statement },
    /// Commits an INSERT whose trigger notifies.
    Notify { client: Box<Client>, send: Statement },
    /// Hands frames to the bare writer.
    Bare { control: TcpStream },
}

impl Publisher {
    /// Connects.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn connect(server: &str, target: &str) -> Result<Publisher, Box<dyn Error>> {
        if server == "bare" {
            let control = TcpStream::connect(target)?;
            control.set_nodelay(true)?;
            return Ok(Publisher::Bare { control });
        }
        let mut client = Box::new(Client::connect(target, NoTls)?);
        if server == "imbus" {
            let channel = channel();
            let text = format!("SELECT bus_sendone('{channel}', 'fanout', to_jsonb(m)) FROM unnest($1::text[]) m");
            let send = client.prepare(&text)?;
            return Ok(Publisher::Imbus { client, send });
        }
        let send = client.prepare("INSERT INTO fanout_message (message) SELECT m FROM unnest($1::text[]) m")?;
        Ok(Publisher::Notify { client, send })
    }

    /// The greatest id so far: with it a client that subscribes is owed nothing.
    ///
    /// # Errors
    /// SQL's.
    pub fn last(&mut self) -> Result<i64, Box<dyn Error>> {
        match self {
            Publisher::Imbus { client, .. } => Ok(client.query_one("SELECT bus_last_id()", &[])?.get(0)),
            _ => Ok(0),
        }
    }

    /// Whether a commit waits for the disk.
    ///
    /// # Errors
    /// SQL's.
    pub fn wait_for_disk(&mut self, wait: bool) -> Result<(), Box<dyn Error>> {
        match self {
            Publisher::Imbus { client, .. } | Publisher::Notify { client, .. } => {
                client.batch_execute(&format!("SET synchronous_commit = {wait}"))?;
            }
            Publisher::Bare { .. } => {}
        }
        Ok(())
    }

    /// Publishes messages of these numbers in one transaction and waits for its commit.
    ///
    /// # Errors
    /// The server's.
    pub fn publish(&mut self, numbers: std::ops::Range<u64>) -> Result<(), Box<dyn Error>> {
        match self {
            Publisher::Imbus { client, send } => {
                let texts: Vec<String> = numbers.map(text).collect();
                client.query(send, &[&texts])?;
            }
            Publisher::Notify { client, send } => {
                let texts: Vec<String> = numbers.map(message).collect();
                client.execute(send, &[&texts])?;
            }
            Publisher::Bare { control } => {
                let frames: Vec<Vec<u8>> = numbers.map(bare_frame).collect();
                let mut record = (frames.len() as u32).to_be_bytes().to_vec();
                for frame in &frames {
                    record.extend((frame.len() as u32).to_be_bytes());
                    record.extend(frame);
                }
                control.write_all(&record)?;
            }
        }
        Ok(())
    }
}

/// The message of a notification, as imbus stores it.
fn message(number: u64) -> String {
    let mut message = String::from(r#"{"type":"fanout","payload":""#);
    let _ = write!(message, "{}\"}}", text(number));
    message
}

/// The frame imbus would send.
fn bare_frame(number: u64) -> Vec<u8> {
    frame(0x81, format!("[{{\"id\":{},\"message\":{}}}]", 10_000 + number, message(number)).as_bytes())
}

/// How often a long message is published for readers that stall, and its length in bytes.
const FLOOD_EVERY: Duration = Duration::from_millis(50);
const FLOOD: usize = 50 * 1024;

/// Publishes long messages through SQL, on a channel of its own; where the bare writer is the one that is attacked,
/// to it too, so that both ways the database does the same.
pub struct Flood {
    client: Client,
    send: Statement,
    message: String,
    control: Option<TcpStream>,
    sent: u64,
}

impl Flood {
    /// Connects.
    ///
    /// # Errors
    /// A server does not answer.
    pub fn connect(sql: &str, control: Option<&str>, channel: &str) -> Result<Flood, Box<dyn Error>> {
        let mut client = Client::connect(sql, NoTls)?;
        client.batch_execute("SET synchronous_commit = off")?;
        let send = client.prepare(&format!("SELECT bus_sendone('{channel}', 'flood', to_jsonb($1::text))"))?;
        let control = control.map(TcpStream::connect).transpose()?;
        Ok(Flood { client, send, message: "x".repeat(FLOOD), control, sent: 0 })
    }

    /// Publishes what is due since the beginning.
    ///
    /// # Errors
    /// The server's.
    pub fn go_on(&mut self, since: Duration) -> Result<(), Box<dyn Error>> {
        while FLOOD_EVERY * (self.sent as u32) < since {
            self.client.query(&self.send, &[&self.message])?;
            if let Some(control) = &mut self.control {
                let frame = frame(0x81, self.message.as_bytes());
                let mut record = 1u32.to_be_bytes().to_vec();
                record.extend((frame.len() as u32).to_be_bytes());
                record.extend(frame);
                control.write_all(&record)?;
            }
            self.sent += 1;
        }
        Ok(())
    }

    /// How many messages were published.
    pub fn sent(&self) -> u64 {
        self.sent
    }
}
