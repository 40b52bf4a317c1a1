//! What attackers do to those who mean well: a calm phase, then an attack on the gateway or, as control, the same attack
//! on the bare writer, which takes the processors away as much but cannot harm by anything else. Prints one line of
//! `key=value`.

mod attack;
mod kind;
mod probe;
mod report;
mod sample;
mod visit;

use attack::Attack;
use kind::Kind;
use lexopt::prelude::*;
use std::error::Error;
use std::net::SocketAddr;
use std::time::Duration;

pub use report::report;

/// How one visit goes.
#[derive(Clone, Debug)]
pub struct Options {
    pub attack: Kind,
    /// Where the gateway's websockets are, and path and query of the upgrade.
    pub address: SocketAddr,
    pub path: String,
    /// The gateway's process and the database worker's.
    pub pid: u32,
    pub worker: u32,
    /// How to publish through SQL.
    pub publish: String,
    pub subscribers: usize,
    pub calm: Duration,
    pub seconds: Duration,
    /// The bare writer to attack in place of the gateway: websockets, control port, process.
    pub control: Option<(SocketAddr, String, u32)>,
}

/// `fanout hostile --attack KIND --address HOST:PORT --path PATH --pid PID --worker PID --publish CONNINFO
/// [--control HOST:PORT HOST:PORT PID] …`; the line that tells of it.
///
/// # Errors
/// A well-behaved client is closed or misses something; the system's; wrong arguments.
pub fn hostile(parser: &mut lexopt::Parser) -> Result<String, Box<dyn Error>> {
    let mut options = Options {
        attack: Kind::Burst,
        address: ([127, 0, 0, 1], 0).into(),
        path: "/websocket".to_owned(),
        pid: 0,
        worker: 0,
        publish: String::new(),
        subscribers: 500,
        calm: Duration::from_secs(5),
        seconds: Duration::from_secs(10),
        control: None,
    };
    while let Some(arg) = parser.next()? {
        match arg {
            Long("attack") => options.attack = parser.value()?.parse()?,
            Long("address") => options.address = parser.value()?.parse()?,
            Long("path") => options.path = parser.value()?.string()?,
            Long("pid") => options.pid = parser.value()?.parse()?,
            Long("worker") => options.worker = parser.value()?.parse()?,
            Long("publish") => options.publish = parser.value()?.string()?,
            Long("subscribers") => options.subscribers = parser.value()?.parse()?,
            Long("calm") => options.calm = Duration::from_secs_f64(parser.value()?.parse()?),
            Long("seconds") => options.seconds = Duration::from_secs_f64(parser.value()?.parse()?),
            Long("control") => {
                let websockets = parser.value()?.parse()?;
                options.control = Some((websockets, parser.value()?.string()?, parser.value()?.parse()?));
            }
            _ => return Err(arg.unexpected().into()),
        }
    }
    visit::visit(&options)
}

/// `fanout attack …`, which [`hostile`] starts.
///
/// # Errors
/// The system's; wrong arguments.
pub fn attack(parser: &mut lexopt::Parser) -> Result<String, Box<dyn Error>> {
    let mut attack = Attack {
        kind: Kind::Burst,
        address: ([127, 0, 0, 1], 0).into(),
        path: String::new(),
        seconds: Duration::ZERO,
        peers: 0,
        first: 0,
        broadcast: String::new(),
        flood: String::new(),
        last: 0,
        publish: String::new(),
        control: None,
    };
    while let Some(arg) = parser.next()? {
        match arg {
            Long("kind") => attack.kind = parser.value()?.parse()?,
            Long("address") => attack.address = parser.value()?.parse()?,
            Long("path") => attack.path = parser.value()?.string()?,
            Long("seconds") => attack.seconds = Duration::from_secs_f64(parser.value()?.parse()?),
            Long("peers") => attack.peers = parser.value()?.parse()?,
            Long("first") => attack.first = parser.value()?.parse()?,
            Long("broadcast") => attack.broadcast = parser.value()?.string()?,
            Long("flood") => attack.flood = parser.value()?.string()?,
            Long("last") => attack.last = parser.value()?.parse()?,
            Long("publish") => attack.publish = parser.value()?.string()?,
            Long("control") => attack.control = Some(parser.value()?.string()?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    attack::attack(&attack)
}
