//! What the threads of a run share: its clock, how far it is, and what was met on the way.

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
}

impl Stage {
    /// A run in its first scene, in which this many messages may be written.
    pub fn new(allowed: u64) -> Stage {
        Stage {
            begun: Instant::now(),
            scene: Mutex::new(Scene::Play),
            changed: Condvar::new(),
            written: AtomicU64::new(0),
            allowed: AtomicU64::new(allowed),
            transactions: AtomicU32::new(0),
            ready: AtomicUsize::new(0),
            chaos: AtomicBool::new(false),
            complaints: Mutex::new(Vec::new()),
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

    /// Something that must not happen.
    pub fn complain(&self, words: String) {
        self.complaints.lock().unwrap().push(words);
    }

    /// All of that.
    pub fn complaints(&self) -> Vec<String> {
        self.complaints.lock().unwrap().clone()
    }
}
