//! What the live page and `/metrics` show of a database: facts, ready to be sent over a link.

use serde::{Deserialize, Serialize};

/// The jobs of one queue, by state; each number is exact up to a bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    pub queue: String,
    /// `created`: waiting for their time, a retry, a dependency or a runner.
    pub waiting: i64,
    pub processing: i64,
    pub succeeded: i64,
    pub failed: i64,
    pub done: i64,
}

/// A job that has failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedJob {
    pub id: i64,
    /// Its description, or what it called.
    pub name: String,
    /// The error's first line.
    pub error: String,
    /// When, in milliseconds since 1970.
    pub at: i64,
}

/// The jobs of one database.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jobs {
    pub queues: Vec<Queue>,
    /// The newest ones.
    pub failed: Vec<FailedJob>,
}

/// A database with the extension, or that may have it, as the processes' shared memory knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    pub oid: u32,
    /// `running`, or `starting`.
    pub state: &'static str,
    /// Its worker, 0 when there is none.
    pub pid: i32,
    /// The greatest id dispatched.
    pub position: i64,
    /// Ranges of ids that are waited for.
    pub gaps: u64,
    /// Notifications dispatched.
    pub dispatched: u64,
}
