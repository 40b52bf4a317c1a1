//! What the threads of a run share: its clock, how far it is, and what was met on the way.

use super::common::PATIENCE;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scene {
    /// Writers write, clients come and go.
    Play,
    /// Writers have ended; clients stay connected.
    Settle,
    /// The first markers are on their way, then the second.
    FirstMarkers,
    LastMarkers,
}

/// One run.
pub struct Stage {
    begun: Instant,
    scene: Mutex<Scene>,
    changed: Condvar,
    /// Messages committed so far, and up to how many writers may go on.
    pub written: AtomicU64,
    pub allowed: AtomicU64,
    transactions: AtomicU32,
    /// Clients that have done what the scene asks of them.
    pub ready: AtomicUsize,
    /// A chaos act is under way or was: errors of connections are none of ours.
    pub chaos: AtomicBool,
    complaints: Mutex<Vec<String>>,
    absences: Mutex<Vec<Absence>>,
}

/// A database's worker was ended, its gateway not: from when until it served again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absence {
    pub database: u8,
    pub from: u64,
    pub to: u64,
}

impl Stage {
    /// A run in its first scene.
    pub fn new() -> Stage {
        Stage {
            begun: Instant::now(),
            scene: Mutex::new(Scene::Play),
            changed: Condvar::new(),
            written: AtomicU64::new(0),
            allowed: AtomicU64::new(0),
            transactions: AtomicU32::new(0),
            ready: AtomicUsize::new(0),
            chaos: AtomicBool::new(false),
            complaints: Mutex::new(Vec::new()),
            absences: Mutex::new(Vec::new()),
        }
    }

    /// Nanoseconds since the run began.
    pub fn now(&self) -> u64 {
        self.begun.elapsed().as_nanos() as u64
    }

    /// A number for a new transaction.
    pub fn transaction(&self) -> u32 {
        self.transactions.fetch_add(1, Ordering::Relaxed)
    }

    /// Where the run is.
    pub fn scene(&self) -> Scene {
        *self.scene.lock().unwrap()
    }

    /// Goes on to the next scene.
    pub fn set_scene(&self, scene: Scene) {
        self.ready.store(0, Ordering::SeqCst);
        *self.scene.lock().unwrap() = scene;
        self.changed.notify_all();
    }

    /// Waits until the scene is over, at most so long: how a transaction stays open and a client away.
    pub fn linger(&self, scene: Scene, longest: Duration) {
        let guard = self.scene.lock().unwrap();
        drop(self.changed.wait_timeout_while(guard, longest, |now| *now == scene).unwrap());
    }

    /// Waits until the condition holds; false when it does not in time.
    pub fn wait(&self, longest: Duration, mut condition: impl FnMut() -> bool) -> bool {
        let until = Instant::now() + longest;
        while !condition() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Waits until so much is written; panics when nothing is for long.
    pub fn wait_written(&self, enough: u64) {
        let written = || self.written.load(Ordering::SeqCst);
        while written() < enough {
            let before = written();
            assert!(
                self.wait(PATIENCE * 4, || written() != before),
                "nobody writes; met so far: {:?}",
                self.complaints()
            );
        }
    }

    /// A worker was away.
    pub fn absent(&self, absence: Absence) {
        self.absences.lock().unwrap().push(absence);
    }

    /// All such times.
    pub fn absences(&self) -> Vec<Absence> {
        self.absences.lock().unwrap().clone()
    }

    /// Something that must not happen.
    pub fn complain(&self, words: String) {
        self.complaints.lock().unwrap().push(words);
    }

    /// All of that.
    pub fn complaints(&self) -> Vec<String> {
        self.complaints.lock().unwrap().clone()
    }
}
