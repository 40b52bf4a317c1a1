//! One visit to a server: opens the sockets, then broadcasts one at a time, paced and saturated, and says what came of it.
//! The publisher never has more under way than the part allows, so that each part runs at the rate that is sustained.

use crate::publish::Publisher;
use crate::reader::{Reader, Shared};
use crate::{Options, process};
use std::error::Error;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// In the paced part the next message is sent when all but this share of the deliveries of those before have been received:
/// less than the half of the sockets that one of two threads has, so that both have begun to write the last message and
/// none can find two that wait; enough for a commit to take place meanwhile.
const PACED_AHEAD: f64 = 0.4;

/// Transactions under way in the saturated part.
const SATURATED_WINDOW: u64 = 4;

/// Between two broadcasts of the first part.
const PAUSE: Duration = Duration::from_millis(10);

/// Files open in a server that nobody visits: more, and it still closes the sockets of the visit before.
const FILES_IDLE: usize = 300;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A visit; the line that tells of it.
///
/// # Errors
/// The server refuses, closes a connection or loses a message.
pub fn visit(options: &Options) -> Result<String> {
    wait_for_idle(options.pid)?;
    let mut publisher = Publisher::connect(&options.server, &options.publish)?;
    let shared = Shared {
        options: options.clone(),
        begin: Instant::now(),
        last: publisher.last()?,
        publisher: std::thread::current(),
        stop: AtomicBool::new(false),
        base: AtomicU64::new(0),
        unit: AtomicU64::new(1),
        part: AtomicU64::new(0),
        is_timed: AtomicBool::new(false),
        wanted: AtomicU64::new(u64::MAX),
        failure: Mutex::new(None),
        lines: (0..options.threads).map(|_| Default::default()).collect(),
    };
    std::thread::scope(|scope| {
        for index in 0..options.threads {
            let shared = &shared;
            scope.spawn(move || {
                let result = Reader::new(shared, index).map_err(Into::into).and_then(Reader::run);
                if let Err(error) = result {
                    shared.fail(error.to_string());
                }
            });
        }
        let mut visit = Visit { shared: &shared, publisher, sent: 0, line: String::new() };
        let result = visit.parts();
        shared.stop.store(true, Ordering::Release);
        result.map(|()| visit.line)
    })
}

fn wait_for_idle(pid: u32) -> Result<()> {
    let begin = Instant::now();
    while process::files(pid) > FILES_IDLE {
        if begin.elapsed() > PATIENCE {
            return Err("the server keeps the sockets of the visit before".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

struct Visit<'a> {
    shared: &'a Shared,
    publisher: Publisher,
    /// Messages published so far.
    sent: u64,
    line: String,
}

impl Visit<'_> {
    fn parts(&mut self) -> Result<()> {
        let options = &self.shared.options;
        let _ = write!(self.line, "server={} sockets={}", options.server, options.sockets);
        self.open()?;
        if options.broadcasts > 0 {
            self.one_at_a_time()?;
        }
        self.publisher.wait_for_disk(false)?;
        if !options.paced.is_zero() {
            self.stream("paced", 1, options.paced)?;
        }
        if !options.saturated.is_zero() {
            self.stream("saturated", options.batch as u64, options.saturated)?;
        }
        if options.hold {
            eprintln!("{} sockets are open", options.sockets);
            std::io::read_to_string(std::io::stdin())?;
        }
        Ok(())
    }

    fn put(&mut self, key: &str, value: f64) {
        let _ = write!(self.line, " {key}={value:.6}");
    }

    /// Waits until something holds of the readers.
    fn wait(&self, what: &str, holds: impl Fn() -> bool) -> Result<()> {
        let begin = Instant::now();
        while !holds() {
            if let Some(failure) = self.shared.failure.lock().map_err(|_| "a reader died")?.take() {
                return Err(failure.into());
            }
            if begin.elapsed() > PATIENCE {
                return Err(format!("{what} within {PATIENCE:?}: {} of {} received", self.received(), self.sent).into());
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        Ok(())
    }

    fn received(&self) -> u64 {
        self.shared.lines.iter().map(|line| line.received.load(Ordering::Acquire)).min().unwrap_or(0)
    }

    fn wait_for(&self, number: u64) -> Result<()> {
        self.wait("everything to be received", || self.received() >= number)
    }

    fn publish(&mut self, count: u64) -> Result<()> {
        self.publisher.publish(self.sent..self.sent + count)?;
        self.sent += count;
        Ok(())
    }

    fn begin(&self, unit: u64, is_timed: bool) {
        self.shared.base.store(self.sent, Ordering::Release);
        self.shared.unit.store(unit, Ordering::Release);
        self.shared.is_timed.store(is_timed, Ordering::Release);
        self.shared.part.fetch_add(1, Ordering::Release);
    }

    /// Waits until all sockets have subscribed, and have got a broadcast that was sent when the last one had.
    fn open(&mut self) -> Result<()> {
        let (pid, sockets) = (self.shared.options.pid, self.shared.options.sockets);
        let (memory, cpu) = (process::resident(pid), process::cpu(pid));
        let opened = || self.shared.lines.iter().map(|line| line.opened.load(Ordering::Acquire)).sum::<usize>();
        self.wait("everybody to be connected", || opened() == sockets)?;
        self.publish(1)?;
        self.wait_for(1)?;
        let time = self.shared.begin.elapsed().as_secs_f64();
        // What the server frees a little later is not the connections'.
        std::thread::sleep(Duration::from_millis(200));
        self.put("connects_per_s", sockets as f64 / time);
        self.put("connect_cpu_us", (process::cpu(pid) - cpu) * 1e6 / sockets as f64);
        let memory = process::resident(pid) as f64 - memory as f64;
        self.put("connection_bytes", memory / sockets as f64);
        let channels = self.shared.options.channels;
        self.put("channels", channels as f64);
        self.put("pool", self.shared.options.pool as f64);
        Ok(())
    }

    /// Broadcasts, each when the one before has been received by everybody: commit → receipt.
    fn one_at_a_time(&mut self) -> Result<()> {
        let (base, sockets) = (self.sent, self.shared.options.sockets);
        self.begin(1, true);
        let mut commits = Vec::new();
        for _ in 0..self.shared.options.broadcasts {
            self.publish(1)?;
            commits.push(self.shared.begin.elapsed().as_nanos() as u64);
            self.wait_for(self.sent)?;
            std::thread::sleep(PAUSE);
        }
        let mut all = Vec::with_capacity(commits.len() * sockets);
        let mut last = vec![0.0f64; commits.len()];
        for line in &self.shared.lines {
            for (number, at) in line.receipts.lock().map_err(|_| "a reader died")?.drain(..) {
                let broadcast = (number - base) as usize;
                // A receipt before the commit had returned counts as 0.
                let time = at.saturating_sub(commits[broadcast]) as f64 / 1e6;
                last[broadcast] = last[broadcast].max(time);
                all.push(time);
            }
        }
        if all.len() != commits.len() * sockets {
            return Err(format!("{} receipts of {}", all.len(), commits.len() * sockets).into());
        }
        for (name, times) in [("last", &mut last), ("all", &mut all)] {
            times.sort_by(f64::total_cmp);
            for (suffix, share) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
                let at = ((times.len() - 1) as f64 * share).round() as usize;
                self.put(&format!("{name}_{suffix}_ms"), times[at]);
            }
        }
        Ok(())
    }

    /// Waits until there is room for one more transaction of the paced part (`unit` 1) or of the saturated one.
    fn wait_for_room(&self, unit: u64) -> Result<()> {
        if unit > 1 {
            return self.wait_for((self.sent + unit).saturating_sub(unit * SATURATED_WINDOW));
        }
        let sockets = self.shared.options.sockets as u64;
        let wanted = self.sent * sockets - (sockets as f64 * PACED_AHEAD) as u64;
        self.shared.wanted.store(wanted, Ordering::SeqCst);
        self.wait("room", || self.shared.deliveries() >= wanted)
    }

    /// Transactions of `unit` messages as fast as they are received.
    fn stream(&mut self, name: &str, unit: u64, duration: Duration) -> Result<()> {
        let (base, pid) = (self.sent, self.shared.options.pid);
        self.begin(unit, false);
        let reads = || self.shared.lines.iter().map(|line| line.reads.load(Ordering::Acquire)).sum::<u64>();
        let now = || (process::cpu(pid), process::cpu(std::process::id()), process::writes(pid), reads());
        let before = now();
        let begin = Instant::now();
        while begin.elapsed() < duration {
            self.publish(unit)?;
            self.wait_for_room(unit)?;
        }
        self.wait_for(self.sent)?;
        let time = begin.elapsed().as_secs_f64();
        let after = now();
        let deliveries = (self.sent - base) as f64 * self.shared.options.sockets as f64;
        self.put(&format!("{name}_per_s"), deliveries / time);
        self.put(&format!("{name}_cpu_us"), (after.0 - before.0) * 1e6 / deliveries);
        self.put(&format!("{name}_client_us"), (after.1 - before.1) * 1e6 / deliveries);
        if after.2 > before.2 {
            self.put(&format!("{name}_per_write"), deliveries / (after.2 - before.2) as f64);
        }
        self.put(&format!("{name}_per_read"), deliveries / (after.3 - before.3) as f64);
        Ok(())
    }
}
