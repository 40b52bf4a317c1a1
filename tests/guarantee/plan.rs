//! Random transactions. A plan says all that a writer will do, so that a seed says all that was tried.

use super::ledger::Sent;
use std::time::Duration;

/// Channels of each database.
pub const CHANNELS: u8 = 8;

/// A small generator (splitmix64): the same numbers on every machine.
pub struct Random(u64);

impl Random {
    /// A generator for one part of a run.
    pub fn new(seed: u64, part: &str, number: usize) -> Random {
        let text = part.bytes().fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut random = Random(text ^ (number as u64) << 32);
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number from `from` up to but not `to`.
    pub fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from).max(1)
    }

    /// True so many times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.within(0, 100) < percent
    }

    /// One of these, by weight.
    pub fn weighed<T: Copy>(&mut self, choices: &[(u64, T)]) -> T {
        let mut left = self.within(0, choices.iter().map(|(weight, _)| weight).sum());
        let found = choices.iter().find(|(weight, _)| {
            let is_it = left < *weight;
            left = left.saturating_sub(*weight);
            is_it
        });
        found.expect("the weights add up").1
    }

    /// A duration up to this.
    pub fn up_to(&mut self, longest: Duration) -> Duration {
        Duration::from_micros(self.within(0, longest.as_micros() as u64 + 1))
    }

    /// Some of the channels, at least one.
    pub fn channels(&mut self) -> Vec<u8> {
        let chosen: Vec<u8> = (0..CHANNELS).filter(|_| self.chance(40)).collect();
        if chosen.is_empty() { vec![self.within(0, u64::from(CHANNELS)) as u8] } else { chosen }
    }
}

/// How rows get into the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    SendOne,
    SendMany,
    /// As Odoo's ORM does, with `pg_notify` from another connection after the commit.
    Insert,
    Copy,
}

/// What a transaction does.
#[derive(Clone, Debug)]
pub enum Step {
    /// Messages on these channels, in this order; `early`: under ids drawn long before (Insert and Copy only).
    Send {
        way: Way,
        early: bool,
        channels: Vec<u8>,
    },
    /// Draws ids that this transaction or a later one uses.
    Draw(u32),
    Savepoint,
    /// To the savepoint at this depth, which stays.
    RollbackTo(usize),
    /// The savepoint at this depth and those in it.
    Release(usize),
    /// Stays open for a while.
    Hold(Duration),
}

/// How a transaction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// No BEGIN: a single statement.
    Auto,
    Commit,
    Rollback,
    /// Prepared, then ended from another session after a while.
    Prepared {
        commit: bool,
        after: Duration,
    },
}

/// One transaction.
#[derive(Clone, Debug)]
pub struct Plan {
    pub steps: Vec<Step>,
    pub end: End,
}

/// How a writer's transactions are made.
#[derive(Clone, Copy)]
pub struct Habit {
    /// How long they are held open at most, and how many in a hundred are.
    pub longest: Duration,
    pub held: u64,
}

impl Plan {
    /// A random transaction.
    pub fn random(random: &mut Random, habit: Habit) -> Plan {
        let size = random.weighed(&[(45, (1, 4)), (30, (4, 50)), (18, (50, 200)), (7, (500, 501))]);
        let size = random.within(size.0, size.1) as usize;
        let held = random.chance(habit.held);
        if !held && random.chance(30) {
            return Plan { steps: vec![send(random, size)], end: End::Auto };
        }
        let mut plan = Plan { steps: Vec::new(), end: end(random, habit) };
        if held {
            plan.steps.push(Step::Draw(size.min(40) as u32));
        }
        plan.body(random, size);
        if held {
            let at = random.within(0, plan.steps.len() as u64 + 1) as usize;
            plan.steps.insert(at, Step::Hold(random.up_to(habit.longest)));
        }
        plan
    }

    /// Messages in several statements, among savepoints that are rolled back, released or left as they are.
    fn body(&mut self, random: &mut Random, size: usize) {
        let (mut left, mut depth) = (size, 0);
        let savepoints = random.chance(40);
        while left > 0 {
            if savepoints && depth < 4 && random.chance(50) {
                self.steps.push(Step::Savepoint);
                depth += 1;
            }
            let now = random.within(1, left as u64 + 1) as usize;
            self.steps.push(send(random, now));
            left -= now;
            if depth > 0 && random.chance(40) {
                let at = random.within(0, depth as u64) as usize;
                let back = random.chance(50);
                self.steps.push(if back { Step::RollbackTo(at) } else { Step::Release(at) });
                depth = if back { at + 1 } else { at };
            }
            if random.chance(10) {
                self.steps.push(Step::Draw(random.within(1, 20) as u32));
            }
        }
    }

    /// What the ledger says of this plan: each message with its channel and whether savepoints left it.
    pub fn sent(&self) -> Vec<Sent> {
        let (mut sent, mut savepoints): (Vec<Sent>, Vec<usize>) = (Vec::new(), Vec::new());
        for step in &self.steps {
            match step {
                Step::Send { channels, .. } => sent.extend(channels.iter().map(|channel| Sent::on(*channel))),
                Step::Savepoint => savepoints.push(sent.len()),
                Step::RollbackTo(at) => {
                    sent[savepoints[*at]..].iter_mut().for_each(Sent::take_back);
                    savepoints.truncate(at + 1);
                }
                Step::Release(at) => savepoints.truncate(*at),
                Step::Draw(_) | Step::Hold(_) => {}
            }
        }
        sent
    }

    /// What it does, in a word or two.
    pub fn how(&self) -> &'static str {
        let back = self.steps.iter().any(|step| matches!(step, Step::RollbackTo(_)));
        match (self.end, &self.steps[..]) {
            (End::Auto, [Step::Send { way, .. }]) => match way {
                Way::SendOne => "one bus_sendone",
                Way::SendMany => "one bus_sendmany",
                Way::Insert => "one INSERT",
                Way::Copy => "one COPY",
            },
            (End::Prepared { .. }, _) if back => "prepared, with savepoints rolled back",
            (End::Prepared { .. }, _) => "prepared",
            _ if back => "transaction with savepoints rolled back",
            _ => "transaction",
        }
    }
}

fn send(random: &mut Random, size: usize) -> Step {
    let way = match size {
        // bus_sendone is a statement each.
        1..=20 => random.weighed(&[(4, Way::SendOne), (2, Way::SendMany), (2, Way::Insert), (1, Way::Copy)]),
        _ => random.weighed(&[(2, Way::SendMany), (2, Way::Insert), (1, Way::Copy)]),
    };
    let early = matches!(way, Way::Insert | Way::Copy) && random.chance(35);
    let channels = (0..size).map(|_| random.within(0, u64::from(CHANNELS)) as u8).collect();
    Step::Send { way, early, channels }
}

fn end(random: &mut Random, habit: Habit) -> End {
    let prepared = |commit| End::Prepared { commit, after: habit.longest };
    let end = random.weighed(&[(70, End::Commit), (13, End::Rollback), (13, prepared(true)), (4, prepared(false))]);
    match end {
        End::Prepared { commit, after } => End::Prepared { commit, after: random.up_to(after) },
        end => end,
    }
}
