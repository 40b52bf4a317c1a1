//! One visit: opens the subscribers, publishes to them at a modest pace while all is calm and while attackers are at
//! work, and says what they noticed.

use super::probe::{Subscribers, Told, own};
use super::sample::{Peak, kernel, newcomers, rejections};
use super::{Kind, Options};
use crate::process;
use postgres::{Client, NoTls, Statement};
use std::collections::HashMap;
use std::error::Error;
use std::fmt::Write;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Between two messages to single ones; every so many-th is followed by one to all.
const PACE: Duration = Duration::from_millis(20);
const BROADCAST: u64 = 25;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at the processes.
const LOOK: Duration = Duration::from_millis(100);

/// Attackers in one process, which may not have more files open.
const PER_PROCESS: usize = 10_000;

/// Where the numbers of the attackers begin, which say where they come from.
const FIRST: usize = 40_000;

struct Visit<'a> {
    options: &'a Options,
    told: &'a Told,
    client: Client,
    send: Statement,
    broadcast: String,
    last: i64,
    /// Messages published so far.
    sent: u64,
    expected: usize,
    line: String,
}

/// Messages of a phase: when each was committed, and whether it goes to all.
type Sent = HashMap<u64, (u64, bool)>;

/// A visit; the line that tells of it.
///
/// # Errors
/// A well-behaved client is closed or misses something; the system's.
pub fn visit(options: &Options) -> Result<String> {
    let mut client = Client::connect(&options.publish, NoTls)?;
    let send = client.prepare("SELECT bus_sendone($1::text, 'probe', to_jsonb($2::text))")?;
    let last = client.query_one("SELECT bus_last_id()", &[])?.get(0);
    let broadcast = format!("probe-{}", std::process::id());
    let told = Told::new();
    let (name, target) = (options.attack.describe().0, if options.control.is_some() { "control" } else { "imbus" });
    let line = format!("attack={name} target={target}");
    std::thread::scope(|scope| {
        let (told, name) = (&told, broadcast.clone());
        scope.spawn(move || {
            let (address, path, count) = (options.address, options.path.as_str(), options.subscribers);
            let subscribers = Subscribers { address, path, count, broadcast: &name, last };
            if let Err(error) = subscribers.run(told)
                && let Ok(mut failure) = told.failure.lock()
            {
                failure.get_or_insert(error.to_string());
            }
        });
        let mut visit = Visit { options, told, client, send, broadcast, last, sent: 0, expected: 0, line };
        let result = visit.phases();
        told.stop.store(true, Ordering::Release);
        result.map(|()| visit.line)
    })
}

impl Visit<'_> {
    fn put(&mut self, key: &str, value: f64) {
        let _ = write!(self.line, " {key}={value:.3}");
    }

    fn phases(&mut self) -> Result<()> {
        let (told, count) = (self.told, self.options.subscribers);
        self.wait("everybody to subscribe", || told.opened.load(Ordering::Acquire) == count)?;
        let begin = Instant::now();
        self.publish(|| Ok(begin.elapsed() < Duration::from_secs(1)))?;
        self.settle()?;
        told.receipts.lock().map_err(|_| "a subscriber died")?.clear();
        self.calm()?;
        self.attacked()
    }

    fn wait(&self, what: &str, is_done: impl Fn() -> bool) -> Result<()> {
        let begin = Instant::now();
        while !is_done() {
            self.told.check()?;
            if begin.elapsed() > PATIENCE {
                return Err(format!("waited {PATIENCE:?} for {what}").into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until everything has come that was sent.
    fn settle(&self) -> Result<()> {
        let (told, expected) = (self.told, self.expected);
        self.wait("everything to be received", || told.count.load(Ordering::Acquire) >= expected)
    }

    /// Publishes at the pace as long as it is to go on.
    fn publish(&mut self, mut goes_on: impl FnMut() -> Result<bool>) -> Result<Sent> {
        let mut sent = Sent::new();
        let mut due = Instant::now();
        while goes_on()? {
            self.told.check()?;
            let place = self.sent as usize * 7 % self.options.subscribers;
            self.send(&own(&self.broadcast, place), false, &mut sent)?;
            if self.sent.is_multiple_of(BROADCAST) {
                self.send(&self.broadcast.clone(), true, &mut sent)?;
            }
            due += PACE;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        Ok(sent)
    }

    fn send(&mut self, channel: &str, to_all: bool, sent: &mut Sent) -> Result<()> {
        let number = self.sent;
        self.client.query(&self.send, &[&channel, &crate::publish::text(number)])?;
        sent.insert(number, (self.told.now(), to_all));
        self.sent += 1;
        self.expected += if to_all { self.options.subscribers } else { 1 };
        Ok(())
    }

    /// Commit → receipt of a phase, once everything has come.
    fn measured(&mut self, phase: &str, sent: &Sent) -> Result<()> {
        self.settle()?;
        let (mut single, mut all) = (Vec::new(), Vec::new());
        for (number, at) in self.told.receipts.lock().map_err(|_| "a subscriber died")?.drain(..) {
            let (commit, to_all) = sent.get(&number).ok_or_else(|| format!("received {number} twice"))?;
            // A receipt before the commit had returned counts as 0.
            let time = at.saturating_sub(*commit) as f64 / 1e6;
            if *to_all { all.push(time) } else { single.push(time) }
        }
        let broadcasts = sent.values().filter(|(_, to_all)| *to_all).count();
        if single.len() != sent.len() - broadcasts || all.len() != broadcasts * self.options.subscribers {
            return Err(format!("{} + {} receipts of {}", single.len(), all.len(), sent.len()).into());
        }
        self.times(&format!("{phase}_single"), single);
        self.times(&format!("{phase}_all"), all);
        Ok(())
    }

    fn times(&mut self, name: &str, mut times: Vec<f64>) {
        times.sort_by(f64::total_cmp);
        for (suffix, share) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
            let at = (times.len().saturating_sub(1) as f64 * share).round() as usize;
            self.put(&format!("{name}_{suffix}"), times.get(at).copied().unwrap_or(f64::NAN));
        }
    }

    /// Publishes while somebody comes anew again and again.
    fn phase(&mut self, phase: &str, goes_on: impl FnMut() -> Result<bool>) -> Result<()> {
        let (stop, address) = (AtomicBool::new(false), self.options.address);
        let (sent, newcomers) = std::thread::scope(|scope| {
            let newcomers = scope.spawn(|| newcomers(address, &stop));
            let sent = self.publish(goes_on);
            stop.store(true, Ordering::Release);
            (sent, newcomers.join())
        });
        self.measured(phase, &sent?)?;
        let (times, failures) = newcomers.map_err(|_| "who came anew died")?;
        self.times(&format!("{phase}_new"), times);
        self.put(&format!("{phase}_new_failed"), failures as f64);
        Ok(())
    }

    fn calm(&mut self) -> Result<()> {
        let (begin, calm) = (Instant::now(), self.options.calm);
        self.phase("calm", || Ok(begin.elapsed() < calm))
    }

    fn attacked(&mut self) -> Result<()> {
        let Options { address, pid, worker, .. } = *self.options;
        let bare = self.options.control.as_ref().map(|(_, _, pid)| *pid);
        let cpu = || (process::cpu(pid), process::cpu(worker), bare.map_or(0.0, process::cpu));
        let (counted, files) = (rejections(address)?, process::files(pid));
        self.put("before_bytes", process::resident(pid) as f64);
        self.put("before_kernel", kernel() as f64);
        let (before, mut peak, mut attackers_cpu) = (cpu(), Peak::default(), 0.0f64);
        let begin = Instant::now();
        let mut looked = begin;
        let mut attackers = self.attackers()?;
        self.phase("attack", || {
            let running = attackers.iter_mut().map(|child| Ok(child.try_wait()?.is_none()));
            let is_on = running.collect::<Result<Vec<bool>>>()?.contains(&true);
            if is_on && looked.elapsed() > LOOK {
                looked = Instant::now();
                peak.look(pid, worker);
                // Those that have ended count no more.
                attackers_cpu = attackers_cpu.max(attackers.iter().map(|child| process::cpu(child.id())).sum());
            }
            Ok(is_on)
        })?;
        let (time, after) = (begin.elapsed().as_secs_f64(), cpu());
        self.put("seconds", time);
        self.put("gateway_cpu", (after.0 - before.0) / time);
        self.put("worker_cpu", (after.1 - before.1) / time);
        self.put("control_cpu", (after.2 - before.2) / time);
        self.put("attackers_cpu", attackers_cpu / time);
        self.put("peak_bytes", peak.resident as f64);
        self.put("peak_worker", peak.worker as f64);
        self.put("before_files", files as f64);
        self.put("peak_files", peak.files as f64);
        self.put("end_files", peak.files_now as f64);
        self.put("peak_kernel", peak.kernel as f64);
        self.told_by(&mut attackers)?;
        self.aftermath(files)?;
        for (reason, count) in rejections(address)? {
            let new = count - counted.get(&reason).copied().unwrap_or_default();
            if new > 0 {
                self.put(&format!("rejected_{reason}"), new as f64);
            }
        }
        Ok(())
    }

    /// Starts the attackers.
    fn attackers(&self) -> Result<Vec<Child>> {
        let Options { attack, address, path, seconds, publish, control, .. } = self.options;
        let (name, peers) = attack.describe();
        let (address, path) =
            control.as_ref().map_or((*address, path.as_str()), |(address, ..)| (*address, "/websocket"));
        let processes = peers.div_ceil(PER_PROCESS);
        let attackers = (0..processes).map(|at| {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["attack", "--kind", name, "--path", path, "--publish", publish]);
            command.args(["--broadcast", &self.broadcast, "--flood", &format!("flood-{}", self.broadcast)]);
            command.args(["--address", &address.to_string(), "--last", &self.last.to_string()]);
            command.args([
                "--seconds",
                &seconds.as_secs_f64().to_string(),
                "--peers",
                &(peers / processes).to_string(),
            ]);
            command.args(["--first", &(FIRST + at * PER_PROCESS).to_string()]);
            if let (Kind::Stalled, Some((_, port, _))) = (attack, control) {
                command.args(["--control", port]);
            }
            Ok(command.stdout(Stdio::piped()).spawn()?)
        });
        attackers.collect()
    }

    /// What the attackers say that they did.
    fn told_by(&mut self, attackers: &mut [Child]) -> Result<()> {
        let mut sums: HashMap<String, f64> = HashMap::new();
        for child in attackers {
            let mut text = String::new();
            if let Some(out) = &mut child.stdout {
                out.read_to_string(&mut text)?;
            }
            if !child.wait()?.success() {
                return Err("an attacker failed".into());
            }
            for (key, value) in text.split_whitespace().filter_map(|pair| pair.split_once('=')) {
                *sums.entry(format!("did_{key}")).or_default() += value.parse::<f64>()?;
            }
        }
        sums.into_iter().for_each(|(key, value)| self.put(&key, value));
        Ok(())
    }

    /// Waits until the gateway has got rid of the attackers' sockets; how long that took and what memory is left.
    fn aftermath(&mut self, files: usize) -> Result<()> {
        let (begin, pid) = (Instant::now(), self.options.pid);
        self.wait("the attackers to be forgotten", || process::files(pid) <= files + 2)?;
        self.put("forgotten_s", begin.elapsed().as_secs_f64());
        // What is freed a little later.
        std::thread::sleep(Duration::from_secs(1));
        self.put("after_bytes", process::resident(pid) as f64);
        Ok(())
    }
}
