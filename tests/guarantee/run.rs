//! A whole run: databases, clients, writers, chaos; then markers, and what everybody wrote down is compared.

use super::chaos::{Shares, direct};
use super::check::{Past, Promise, Report, check};
use super::common::{Cluster, PATIENCE, free_port};
use super::database::{Database, FIRST_MARKER, LAST_MARKER, publish};
use super::guest::{Guest, Kind};
use super::ledger::{Entry, Ledger, Outcome, Sent};
use super::plan::{CHANNELS, Habit, Random};
use super::stage::{Scene, Stage};
use super::story::Story;
use super::writer::{Ended, Quota, Writer, coordinate};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

const DATABASES: u8 = 3;
/// In each database: writers that hold their transactions open for long, others, and clients.
const LATE_WRITERS: usize = 2;
const QUICK_WRITERS: usize = 3;
const GUESTS: usize = 5;

/// Shares of a run without chaos: with the pauses between them four times the longest transaction.
const QUIET_SHARES: u64 = 8;

/// What a run is made of; see [`Sizes::from_environment`].
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub seed: u64,
    pub messages: u64,
    pub late_max: Duration,
    pub chaos: u64,
}

impl Sizes {
    /// `IMBUS_SEED`, `IMBUS_MESSAGES`, `IMBUS_LATE_MAX` (seconds), `IMBUS_CHAOS` (acts).
    pub fn from_environment() -> Sizes {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let number = |name: &str, usual: u64| {
            std::env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
        };
        Sizes {
            seed: number("IMBUS_SEED", u64::from(now.subsec_nanos())),
            messages: number("IMBUS_MESSAGES", 100_000),
            late_max: Duration::from_secs(number("IMBUS_LATE_MAX", 8)),
            chaos: number("IMBUS_CHAOS", 6),
        }
    }
}

/// One run; panics with the report when a promise was broken.
pub fn run(sizes: Sizes) {
    println!("IMBUS_SEED={} IMBUS_MESSAGES={} {sizes:?}", sizes.seed, sizes.messages);
    let port = free_port();
    let cluster = Cluster::start_with(&[
        "max_prepared_transactions = 200",
        "max_connections = 200",
        &format!("imbus.port = {port}"),
    ]);
    let databases: Vec<Database> = (0..DATABASES).map(|number| Database::create(&cluster, number)).collect();
    let stage = Stage::new();
    stage.chaos.store(sizes.chaos > 0, Ordering::SeqCst);
    let cast = Cast { cluster: &cluster, stage: &stage, databases: &databases, sizes, port };
    let (entries, stories) = std::thread::scope(|scope| cast.play(scope));
    let report = cast.compare(entries, &stories);
    print!("{report}");
    let kept = if sizes.chaos > 0 { report.is_whole() } else { report.is_clean() };
    assert!(kept, "IMBUS_SEED={} broke the guarantee:\n{report}", sizes.seed);
}

struct Cast<'a> {
    cluster: &'a Cluster,
    stage: &'a Stage,
    databases: &'a [Database],
    sizes: Sizes,
    port: u16,
}

impl<'a> Cast<'a> {
    fn play<'s>(&'s self, scope: &'s Scope<'s, '_>) -> (Vec<Entry>, Vec<Story>) {
        let _curtain = Curtain(self.stage);
        let guests = self.guests(scope);
        let early = guests.len() - self.databases.len();
        assert!(self.wait_ready(early), "the clients do not get in: {:?}", self.stage.complaints());
        let director = scope.spawn(|| self.direct());
        let writers = self.writers(scope);
        self.stage.wait_written(self.sizes.messages);
        let directed = director.join();
        self.stage.set_scene(Scene::Settle);
        let mut entries = gather(writers);
        println!("{} written by {} s", self.stage.written.load(Ordering::SeqCst), self.stage.now() / 1_000_000_000);
        // Each waits for the clients to have done their part; who does not in time says so in its story.
        self.wait_ready(guests.len());
        for (scene, kind) in [(Scene::FirstMarkers, FIRST_MARKER), (Scene::LastMarkers, LAST_MARKER)] {
            self.stage.set_scene(scene);
            self.databases.iter().for_each(|database| entries.extend(self.publish_markers(database, kind)));
            self.wait_ready(guests.len());
        }
        directed.expect("the server comes back each time");
        (entries, guests.into_iter().map(|guest| guest.join().unwrap()).collect())
    }

    fn direct(&self) {
        let _curtain = Curtain(self.stage);
        let Sizes { seed, messages, late_max, chaos } = self.sizes;
        let (count, with_acts) = if chaos == 0 { (QUIET_SHARES, false) } else { (chaos, true) };
        let shares = Shares { count, messages, with_acts, pause: late_max / 2 };
        direct(self.cluster, self.stage, self.databases, Random::new(seed, "director", 0), shares);
    }

    fn wait_ready(&self, count: usize) -> bool {
        self.stage.wait(PATIENCE * 3, || self.stage.ready.load(Ordering::SeqCst) >= count)
    }

    fn guests<'s>(&'s self, scope: &'s Scope<'s, '_>) -> Vec<ScopedJoinHandle<'s, Story>> {
        let numbers = 0..GUESTS * self.databases.len();
        let guests = numbers.map(|number| {
            let kind = match number % GUESTS {
                0 => Kind::Steady,
                1 => Kind::Late(self.sizes.messages * 3 / 10),
                _ => Kind::Roaming,
            };
            let random = Random::new(self.sizes.seed, "client", number);
            let place = (self.cluster, self.stage, &self.databases[number / GUESTS]);
            let guest = Guest::new(place, (random, kind, number, self.port));
            scope.spawn(|| guest.play())
        });
        guests.collect()
    }

    fn writers<'s>(&'s self, scope: &'s Scope<'s, '_>) -> Vec<Writers<'s>> {
        let in_each = |database: &'s Database| {
            let (sender, receiver) = mpsc::channel();
            let coordinator = scope.spawn(move || coordinate(self.cluster, self.stage, database, &receiver));
            let writers = (0..LATE_WRITERS + QUICK_WRITERS).map(|n| {
                let quick = Habit { longest: Duration::from_millis(50), held: 20 };
                let late = Habit { longest: self.sizes.late_max, held: 80 };
                let random = Random::new(self.sizes.seed, &database.name, n);
                let habit = if n < LATE_WRITERS { late } else { quick };
                let place = (self.cluster, self.stage, database);
                let quota = Quota { all: self.sizes.messages, by_shares: n >= LATE_WRITERS };
                let writer = Writer::new(place, (random, habit, quota), sender.clone());
                scope.spawn(|| writer.write())
            });
            Writers { writers: writers.collect(), coordinator }
        };
        self.databases.iter().map(in_each).collect()
    }

    /// One message on each channel, all else being over.
    fn publish_markers(&self, database: &Database, kind: &str) -> Vec<Entry> {
        let mut client = self.cluster.connect(&database.name);
        let mut markers = Vec::new();
        for channel in 0..CHANNELS {
            let txn = self.stage.transaction();
            let text = publish(&Database::target(channel), kind, &database.message(channel, txn, 0));
            let issued = self.stage.now();
            client.batch_execute(&text).unwrap();
            let (returned, database) = (self.stage.now(), database.number);
            let sent = Box::new([Sent::on(channel)]);
            let (outcome, is_prepared) = (Outcome::Committed, false);
            markers.push(Entry { txn, database, outcome, issued, returned, sent, is_prepared, how: "marker" });
        }
        markers
    }

    fn compare(&self, entries: Vec<Entry>, stories: &[Story]) -> Report {
        let tables = self.databases.iter().map(|database| database.rows(self.cluster)).collect();
        let (ledger, mut complaints) = Ledger::new(entries, tables);
        complaints.extend(self.stage.complaints());
        let past = if self.sizes.chaos > 0 { Past::Restarts(self.stage.absences()) } else { Past::Quiet };
        let mut report = check(&ledger, stories, &past);
        complaints.into_iter().for_each(|words| report.add(Promise::Conduct, || words));
        let committed = ledger.entries().iter().filter(|entry| entry.outcome == Outcome::Committed);
        let visits: usize = stories.iter().map(|story| story.visits.len()).sum();
        println!(
            "{} transactions, {} committed; {} messages sent; {} connections of {} clients; {} s; memory {}",
            ledger.entries().len(),
            committed.count(),
            ledger.len(),
            visits,
            stories.len(),
            self.stage.now() / 1_000_000_000,
            peak_memory(),
        );
        report
    }
}

/// Ends the play when its director or whoever waits for it fails: all threads are waited for.
struct Curtain<'a>(&'a Stage);

impl Drop for Curtain<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set_scene(Scene::LastMarkers);
            self.0.allowed.store(u64::MAX, Ordering::SeqCst);
        }
    }
}

struct Writers<'s> {
    writers: Vec<ScopedJoinHandle<'s, Vec<Entry>>>,
    coordinator: ScopedJoinHandle<'s, Ended>,
}

/// What all writers wrote, with what the coordinators know of prepared transactions.
fn gather(databases: Vec<Writers<'_>>) -> Vec<Entry> {
    let mut all = Vec::new();
    for Writers { writers, coordinator } in databases {
        let mut entries: Vec<Entry> = writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect();
        let ended = coordinator.join().unwrap();
        for entry in &mut entries {
            if let Some((outcome, issued, returned)) = ended.get(&entry.txn) {
                (entry.outcome, entry.issued, entry.returned) = (*outcome, *issued, *returned);
            }
        }
        all.append(&mut entries);
    }
    all
}

/// The most memory this process has had.
fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap_or("unknown").trim().to_owned()
}
