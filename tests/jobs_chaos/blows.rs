//! What happens to the server.

use super::common::{Cluster, eventually, try_signal};
use super::stage::{Random, reach};

#[derive(Clone, Copy, Debug)]
pub enum Blow {
    TerminateRunner,
    KillRunner,
    TerminateWorker,
    KillWorker,
    TerminateGateway,
    /// The session of somebody who enqueues, wherever it is in its transaction.
    TerminateEnqueuer,
    RestartFast,
    RestartImmediately,
    KillServer,
}

const ALL: [Blow; 9] = [
    Blow::TerminateRunner,
    Blow::KillRunner,
    Blow::TerminateWorker,
    Blow::KillWorker,
    Blow::TerminateGateway,
    Blow::TerminateEnqueuer,
    Blow::RestartFast,
    Blow::RestartImmediately,
    Blow::KillServer,
];

/// So many blows: all kinds, then all again, each time in another order.
pub fn series(count: usize, random: &mut Random) -> Vec<Blow> {
    let mut series = Vec::new();
    while series.len() < count {
        let mut left = ALL.to_vec();
        while !left.is_empty() {
            series.push(left.swap_remove(random.below(left.len())));
        }
    }
    series.truncate(count);
    series
}

/// Strikes, and returns when the database is served again.
pub fn strike(cluster: &Cluster, database: &str, blow: Blow) {
    let worker = format!("backend_type = 'imbus database {database}'");
    match blow {
        Blow::TerminateRunner => terminate(cluster, database, RUNNER, 1),
        Blow::KillRunner => kill(cluster, database, RUNNER),
        Blow::TerminateWorker => terminate(cluster, database, &worker, 1),
        Blow::KillWorker => kill(cluster, database, &worker),
        Blow::TerminateGateway => terminate(cluster, database, "backend_type = 'imbus gateway'", 1),
        Blow::TerminateEnqueuer => terminate(cluster, database, "application_name = 'enqueuer'", 1),
        Blow::RestartFast => cluster.pg_ctl(&["-m", "fast", "-w", "restart"]),
        Blow::RestartImmediately => cluster.pg_ctl(&["-m", "immediate", "-w", "restart"]),
        Blow::KillServer => cluster.kill_server(),
    }
    eventually("the database is served", || {
        let served = "SELECT 1 FROM imbus_stat_bus WHERE datname = current_database() AND pid IS NOT NULL";
        reach(cluster, database).query_opt(served, &[]).is_ok_and(|row| row.is_some())
    });
}

const RUNNER: &str = "backend_type LIKE 'imbus job %'";

/// Processes of the server of which the condition is true, those at work first; waits until there is one.
fn processes(cluster: &Cluster, database: &str, condition: &str) -> Vec<i32> {
    let query = format!(
        "SELECT pid FROM pg_stat_activity WHERE {condition} ORDER BY state = 'active' DESC NULLS LAST, random()"
    );
    let mut pids = Vec::new();
    eventually("there is such a process", || {
        let rows = reach(cluster, database).query(&query, &[]).unwrap_or_default();
        pids = rows.iter().map(|row| row.get(0)).collect();
        !pids.is_empty()
    });
    pids
}

/// Has the server end some processes of which the condition is true.
pub fn terminate(cluster: &Cluster, database: &str, condition: &str, most: usize) {
    let pids = processes(cluster, database, condition);
    for pid in pids.iter().take(most) {
        // One may have ended by itself.
        let _ = reach(cluster, database).query_one("SELECT pg_terminate_backend($1)", &[pid]);
    }
}

/// kill -9: the whole server goes through recovery. Until it goes down it still lets sessions in. One that has just ended by itself
/// takes the signal without effect, as long as the server has not heard of its end: then another is struck.
fn kill(cluster: &Cluster, database: &str, condition: &str) {
    let mut witness = reach(cluster, database);
    let mut struck = None;
    eventually("the server goes down", || {
        let is_up = witness.simple_query("SELECT 1").is_ok();
        if is_up && struck.is_none_or(|pid| !try_signal(pid, 0)) {
            let first = processes(cluster, database, condition).first().copied();
            struck = first.filter(|pid| try_signal(*pid, libc::SIGKILL));
        }
        !is_up
    });
}
