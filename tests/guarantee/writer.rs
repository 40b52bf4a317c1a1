//! Writers: threads that carry out random transactions and enter them in the ledger, and the coordinators that end what
//! they prepared.

use super::common::{Cluster, PATIENCE};
use super::database::{Database, is_lost};
use super::ledger::{Entry, NEVER, Outcome, Sent, Txn};
use super::plan::{End, Habit, Plan, Random, Step, Way};
use super::stage::{Scene, Stage};
use postgres::error::SqlState;
use postgres::{Client, Error};
use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// A session that is opened again after a loss.
pub struct Session<'a> {
    cluster: &'a Cluster,
    stage: &'a Stage,
    database: &'a str,
    client: Option<Client>,
}

impl<'a> Session<'a> {
    /// A session of this database, opened when it is used.
    pub fn new(cluster: &'a Cluster, stage: &'a Stage, database: &'a str) -> Session<'a> {
        Session { cluster, stage, database, client: None }
    }

    /// The session, which may be a new one; panics when the server does not come back.
    pub fn get(&mut self) -> &mut Client {
        if self.client.as_ref().is_none_or(|client| client.is_closed()) {
            let Session { cluster, database, client, .. } = self;
            let open = || {
                *client = cluster.try_connect(database, "postgres").ok();
                client.as_mut().is_some_and(|client| client.batch_execute("SET timezone = 'UTC'").is_ok())
            };
            assert!(self.stage.wait(PATIENCE * 2, open), "no connection to {}", self.database);
        }
        self.client.as_mut().unwrap()
    }

    /// Takes note of an error; whether the session is lost and with it the answer.
    pub fn lose(&mut self, error: &Error) -> bool {
        let lost = is_lost(error);
        if lost {
            self.client = None;
        } else if let Some(client) = &mut self.client {
            let _ = client.batch_execute("ROLLBACK");
        }
        if !lost || !self.stage.chaos.load(Ordering::SeqCst) {
            self.stage.complain(format!("{}: {error:?}", self.database));
        }
        lost
    }
}

/// A prepared transaction to be ended.
pub struct Pending {
    txn: Txn,
    commit: bool,
    due: Instant,
}

/// How a prepared transaction ended: its commit's instants.
pub type Ended = HashMap<Txn, (Outcome, u64, u64)>;

/// When a writer stops.
#[derive(Clone, Copy)]
pub struct Quota {
    /// When all writers together have written so many messages.
    pub all: u64,
    /// It also waits at the end of each share of them.
    pub by_shares: bool,
}

/// What a writer is made of.
pub struct Writer<'a> {
    pub stage: &'a Stage,
    pub database: &'a Database,
    pub session: Session<'a>,
    /// Odoo's own connection for NOTIFY.
    pub notifier: Session<'a>,
    pub habit: Habit,
    pub random: Random,
    pub pending: Sender<Pending>,
    pub quota: Quota,
    /// Ids drawn and not used yet, with the transactions that drew them.
    early: VecDeque<(i64, Txn)>,
    /// The messages of this transaction whose ids earlier ones drew.
    drawn_before: Vec<u32>,
    entries: Vec<Entry>,
}

impl<'a> Writer<'a> {
    /// A writer in this database.
    pub fn new(
        (cluster, stage, database): (&'a Cluster, &'a Stage, &'a Database),
        (random, habit, quota): (Random, Habit, Quota),
        pending: Sender<Pending>,
    ) -> Writer<'a> {
        let session = Session::new(cluster, stage, &database.name);
        let notifier = Session::new(cluster, stage, "postgres");
        let (early, drawn_before, entries) = (VecDeque::new(), Vec::new(), Vec::new());
        Writer { stage, database, session, notifier, habit, random, pending, quota, early, drawn_before, entries }
    }

    /// Writes until the quota is reached; what was written.
    pub fn write(mut self) -> Vec<Entry> {
        let stage = self.stage;
        let written = || stage.written.load(Ordering::SeqCst);
        let Quota { all, by_shares } = self.quota;
        while written() < all && stage.scene() == Scene::Play {
            let goes_on = || !by_shares || written() < stage.allowed.load(Ordering::SeqCst);
            if stage.wait(Duration::from_millis(50), goes_on) {
                let plan = Plan::random(&mut self.random, self.habit);
                self.carry_out(&plan);
            }
        }
        self.entries
    }

    fn carry_out(&mut self, plan: &Plan) {
        let (txn, mut sent) = (self.stage.transaction(), plan.sent());
        self.session.get();
        let (outcome, issued, returned) = match plan.end {
            End::Auto => self.commit(|writer| writer.step(&plan.steps[0], txn, 0).map(|_| ())),
            _ => self.transaction(plan, txn),
        };
        self.drawn_before.drain(..).for_each(|seq| sent[seq as usize].draw_before());
        if outcome != Outcome::RolledBack {
            let kept = sent.iter().filter(|sent| sent.is_kept()).count();
            self.stage.written.fetch_add(kept as u64, Ordering::SeqCst);
            self.notify(plan, &sent);
        }
        let (database, how) = (self.database.number, plan.how());
        let is_prepared = matches!(plan.end, End::Prepared { .. });
        self.entries.push(Entry { txn, database, outcome, issued, returned, sent: sent.into(), is_prepared, how });
    }

    /// The statement that commits, between its instants.
    fn commit(&mut self, act: impl FnOnce(&mut Self) -> Result<(), Error>) -> (Outcome, u64, u64) {
        let issued = self.stage.now();
        match act(self) {
            Ok(()) => (Outcome::Committed, issued, self.stage.now()),
            Err(error) if self.lose(&error) => (Outcome::Unknown, issued, NEVER),
            Err(_) => (Outcome::RolledBack, issued, self.stage.now()),
        }
    }

    fn lose(&mut self, error: &Error) -> bool {
        let lost = self.session.lose(error);
        if lost {
            // After a crash the sequence may give out again what was drawn without a commit.
            self.early.clear();
        }
        lost
    }

    fn transaction(&mut self, plan: &Plan, txn: Txn) -> (Outcome, u64, u64) {
        if let Err(error) = self.body(plan, txn) {
            self.lose(&error);
            return (Outcome::RolledBack, self.stage.now(), NEVER);
        }
        let execute = |text: String| move |writer: &mut Self| writer.session.get().batch_execute(&text);
        match plan.end {
            End::Rollback => {
                let ended = self.commit(execute("ROLLBACK".into()));
                (Outcome::RolledBack, ended.1, ended.2)
            }
            End::Prepared { commit, after } => {
                let ended = self.commit(execute(format!("PREPARE TRANSACTION 't{txn}'")));
                if ended.0 != Outcome::RolledBack {
                    let due = Instant::now() + after;
                    self.pending.send(Pending { txn, commit, due }).expect("the coordinator waits for us");
                }
                // The coordinator says more.
                let unknown = commit && ended.0 != Outcome::RolledBack;
                (if unknown { Outcome::Unknown } else { Outcome::RolledBack }, ended.1, NEVER)
            }
            End::Auto | End::Commit => self.commit(execute("COMMIT".into())),
        }
    }

    fn body(&mut self, plan: &Plan, txn: Txn) -> Result<(), Error> {
        self.session.get().batch_execute("BEGIN")?;
        let (mut seq, mut depth) = (0, 0);
        for step in &plan.steps {
            match step {
                Step::Savepoint => {
                    self.session.get().batch_execute(&format!("SAVEPOINT s{depth}"))?;
                    depth += 1;
                }
                Step::RollbackTo(at) => {
                    self.session.get().batch_execute(&format!("ROLLBACK TO s{at}"))?;
                    depth = at + 1;
                }
                Step::Release(at) => {
                    self.session.get().batch_execute(&format!("RELEASE s{at}"))?;
                    depth = *at;
                }
                other => seq = self.step(other, txn, seq)?,
            }
        }
        Ok(())
    }

    /// A step apart from savepoints; the number of the next message.
    fn step(&mut self, step: &Step, txn: Txn, seq: u32) -> Result<u32, Error> {
        match step {
            Step::Send { way, early, channels } => {
                let text = (seq..).zip(channels).map(|(seq, channel)| self.database.message(*channel, txn, seq));
                let rows: Vec<(u8, String)> = channels.iter().copied().zip(text).collect();
                self.send(*way, *early, &rows, txn, seq)?;
                Ok(seq + channels.len() as u32)
            }
            Step::Draw(count) => {
                let text = format!("SELECT nextval('{}') FROM generate_series(1, $1)", self.database.sequence);
                let rows = self.session.get().query(&text, &[&(*count as i32)])?;
                self.early.extend(rows.iter().map(|row| (row.get(0), txn)));
                Ok(seq)
            }
            Step::Hold(longest) => {
                self.stage.linger(Scene::Play, *longest);
                Ok(seq)
            }
            Step::Savepoint | Step::RollbackTo(_) | Step::Release(_) => Ok(seq),
        }
    }

    /// One statement, or several in one message: a transaction also without BEGIN.
    fn send(&mut self, way: Way, early: bool, rows: &[(u8, String)], txn: Txn, seq: u32) -> Result<(), Error> {
        let count = match way {
            Way::Copy if rows.len() > self.early.len() => 0,
            _ => rows.len().min(self.early.len()),
        };
        let early: Vec<(i64, Txn)> = self.early.drain(..if early { count } else { 0 }).collect();
        self.drawn_before.extend((seq..).zip(&early).filter(|(_, (_, by))| *by != txn).map(|(seq, _)| seq));
        let ids: Vec<i64> = early.into_iter().map(|(id, _)| id).collect();
        let database = self.database;
        let client = self.session.get();
        match way {
            Way::SendOne => client.batch_execute(&database.send_one(rows)),
            Way::SendMany => client.batch_execute(&database.send_many(rows)),
            Way::Insert => client.batch_execute(&database.insert(&ids, rows)),
            Way::Copy => copy(client, database, &ids, rows),
        }
    }

    /// What Odoo does after the commit of rows that its ORM wrote.
    fn notify(&mut self, plan: &Plan, sent: &[Sent]) {
        let inserted = |step: &Step| matches!(step, Step::Send { way: Way::Insert, .. });
        if plan.steps.iter().any(inserted) && !matches!(plan.end, End::Prepared { .. }) {
            let mut channels: Vec<u8> = sent.iter().map(|sent| sent.channel()).collect();
            channels.sort_unstable();
            channels.dedup();
            let list: Vec<String> = channels.into_iter().map(|channel| self.database.channel(channel)).collect();
            let list = format!("[{}]", list.join(","));
            if let Err(error) = self.notifier.get().execute("SELECT pg_notify('imbus', $1)", &[&list]) {
                self.notifier.lose(&error);
            }
        }
    }
}

fn copy(client: &mut Client, database: &Database, ids: &[i64], rows: &[(u8, String)]) -> Result<(), Error> {
    let (text, lines) = database.copy(ids, rows);
    let mut copy = client.copy_in(&text)?;
    // What cannot be written shows at the end.
    let _ = copy.write_all(lines.as_bytes());
    copy.finish().map(|_| ())
}

/// Ends prepared transactions of one database, each when it is due, all at once when the play is over.
pub fn coordinate(cluster: &Cluster, stage: &Stage, database: &Database, pending: &Receiver<Pending>) -> Ended {
    let mut session = Session::new(cluster, stage, &database.name);
    let (mut open, mut ended): (Vec<Pending>, Ended) = (Vec::new(), HashMap::new());
    let mut is_over = false;
    while !is_over || !open.is_empty() {
        if !is_over {
            match pending.recv_timeout(Duration::from_millis(2)) {
                Ok(one) => open.push(one),
                Err(RecvTimeoutError::Disconnected) => is_over = true,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        let now = (stage.scene() == Scene::Play).then(Instant::now);
        let (due, later) = open.into_iter().partition(|one| now.is_none_or(|now| one.due <= now));
        open = later;
        for Pending { txn, commit, .. } in due {
            ended.insert(txn, end_prepared(stage, &mut session, txn, commit));
        }
    }
    ended
}

fn end_prepared(stage: &Stage, session: &mut Session, txn: Txn, commit: bool) -> (Outcome, u64, u64) {
    let text = format!("{} PREPARED 't{txn}'", if commit { "COMMIT" } else { "ROLLBACK" });
    let mut first = None;
    loop {
        let client = session.get();
        let issued = stage.now();
        let Err(error) = client.batch_execute(&text) else {
            let outcome = if commit { Outcome::Committed } else { Outcome::RolledBack };
            return (outcome, issued, stage.now());
        };
        // Not there any more: an attempt that got no answer did it, or it was never prepared.
        if stage.chaos.load(Ordering::SeqCst) && error.code() == Some(&SqlState::UNDEFINED_OBJECT) {
            let outcome = if commit { Outcome::Unknown } else { Outcome::RolledBack };
            return (outcome, first.unwrap_or(issued), NEVER);
        }
        if !session.lose(&error) {
            return (Outcome::Unknown, issued, NEVER);
        }
        first.get_or_insert(issued);
    }
}
