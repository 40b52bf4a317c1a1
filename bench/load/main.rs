//! The load generator of `bench/fanout` and `bench/hostile`, and the bare writer they compare with. Prints one line of `key=value` a visit;
//! `report` makes Markdown of many such lines.
//!
//! `fanout visit --server imbus|bare|node --address HOST:PORT --pid PID --sockets N …` (see [`Options`]) ·
//! `fanout writer` · `fanout report FILE` · `fanout hostile …` (see [`hostile::Options`]) · `fanout attack …` ·
//! `fanout hostile-report FILE`

mod hostile;
mod process;
mod publish;
mod reader;
mod report;
mod scan;
mod visit;
mod writer;

use lexopt::prelude::*;
use std::net::SocketAddr;
use std::time::Duration;

/// How one visit to a server goes.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the server is called: `imbus`, `bare` or `node`.
    pub server: String,
    /// Where its websockets are.
    pub address: SocketAddr,
    /// Path and query of the upgrade.
    pub path: String,
    /// Its process, whose processor time and memory are counted.
    pub pid: u32,
    /// How to publish through SQL; for the bare writer the address of its control port.
    pub publish: String,
    pub sockets: usize,
    /// Channels each socket subscribes to, the broadcasts' included.
    pub channels: usize,
    /// Different channels that the others are drawn from; 0: every socket has its own.
    pub pool: usize,
    /// Threads that read.
    pub threads: usize,
    /// Broadcasts one at a time.
    pub broadcasts: usize,
    /// How long the paced and the saturated part last each; zero leaves them out.
    pub paced: Duration,
    pub saturated: Duration,
    /// Messages per transaction in the saturated part.
    pub batch: usize,
    /// Keeps the sockets open until standard input ends.
    pub hold: bool,
}

fn options(parser: &mut lexopt::Parser) -> Result<Options, lexopt::Error> {
    let mut options = Options {
        server: String::new(),
        address: ([127, 0, 0, 1], 0).into(),
        path: "/websocket".to_owned(),
        pid: 0,
        publish: String::new(),
        sockets: 1000,
        channels: 1,
        pool: 0,
        threads: 2,
        broadcasts: 0,
        paced: Duration::ZERO,
        saturated: Duration::ZERO,
        batch: 32,
        hold: false,
    };
    while let Some(arg) = parser.next()? {
        match arg {
            Long("server") => options.server = parser.value()?.string()?,
            Long("address") => options.address = parser.value()?.parse()?,
            Long("path") => options.path = parser.value()?.string()?,
            Long("pid") => options.pid = parser.value()?.parse()?,
            Long("publish") => options.publish = parser.value()?.string()?,
            Long("sockets") => options.sockets = parser.value()?.parse()?,
            Long("channels") => options.channels = parser.value()?.parse()?,
            Long("pool") => options.pool = parser.value()?.parse()?,
            Long("threads") => options.threads = parser.value()?.parse()?,
            Long("broadcasts") => options.broadcasts = parser.value()?.parse()?,
            Long("paced") => options.paced = Duration::from_secs_f64(parser.value()?.parse()?),
            Long("saturated") => options.saturated = Duration::from_secs_f64(parser.value()?.parse()?),
            Long("batch") => options.batch = parser.value()?.parse()?,
            Long("hold") => options.hold = true,
            _ => return Err(arg.unexpected()),
        }
    }
    Ok(options)
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut parser = lexopt::Parser::from_env();
    let Some(Value(command)) = parser.next()? else { return Err("usage: see the head of bench/load/main.rs".into()) };
    match command.to_str() {
        Some("visit") => println!("{}", visit::visit(&options(&mut parser)?)?),
        Some("hostile") => println!("{}", hostile::hostile(&mut parser)?),
        Some("attack") => println!("{}", hostile::attack(&mut parser)?),
        Some("hostile-report") => print!("{}", hostile::report(&std::fs::read_to_string(parser.value()?)?)),
        Some("writer") => writer::serve()?,
        Some("report") => {
            let file = parser.value()?;
            print!("{}", report::report(&std::fs::read_to_string(file)?));
        }
        _ => return Err("visit, writer, report, hostile, attack or hostile-report".into()),
    }
    Ok(())
}

fn main() {
    if let Err(error) = run() {
        eprintln!("fanout: {error}");
        std::process::exit(1);
    }
}
