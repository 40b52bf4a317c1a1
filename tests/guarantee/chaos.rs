//! What happens to the server meanwhile.

use super::common::{Cluster, eventually, kill_9, recovered};
use super::database::Database;
use super::plan::Random;
use super::stage::{Absence, Scene, Stage};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// One act.
#[derive(Clone, Copy, Debug)]
enum Act {
    TerminateGateway,
    TerminateWorker,
    KillGateway,
    KillWorker,
    RestartImmediately,
    RestartFast,
}

const ACTS: [Act; 6] = [
    Act::TerminateWorker,
    Act::KillGateway,
    Act::TerminateGateway,
    Act::RestartImmediately,
    Act::KillWorker,
    Act::RestartFast,
];

/// How a run is cut: into so many shares of its messages, an act in each or none, and a pause of up to this after each.
#[derive(Clone, Copy)]
pub struct Shares {
    pub count: u64,
    pub messages: u64,
    pub with_acts: bool,
    pub pause: Duration,
}

/// Lets the quick writers go on share by share: they write as fast as they can, then wait while the others' transactions
/// go on. In the middle of each share comes its act, all kinds in turn.
pub fn direct(cluster: &Cluster, stage: &Stage, databases: &[Database], mut random: Random, shares: Shares) {
    let Shares { count, messages, with_acts, pause } = shares;
    let first = random.within(0, ACTS.len() as u64);
    for n in 0..count {
        stage.allowed.store((n + 1) * messages / count, Ordering::SeqCst);
        let percent = random.within(10, 90);
        stage.wait_written((n * 100 + percent) * messages / count / 100);
        let database = &databases[random.within(0, databases.len() as u64) as usize];
        if with_acts {
            let act = ACTS[((first + n) % ACTS.len() as u64) as usize];
            println!("{:.1} s: {act:?} ({})", stage.now() as f64 / 1e9, database.name);
            let from = stage.now();
            perform(cluster, act, &database.name);
            databases.iter().for_each(|database| drop(recovered(cluster, &database.name)));
            if matches!(act, Act::TerminateWorker) {
                stage.absent(Absence { database: database.number, from, to: stage.now() });
            }
        }
        stage.linger(Scene::Play, if with_acts { random.up_to(pause) } else { pause });
    }
    stage.allowed.store(u64::MAX, Ordering::SeqCst);
}

fn perform(cluster: &Cluster, act: Act, database: &str) {
    let gateway = "SELECT pid FROM imbus_stat_gateway WHERE pid IS NOT NULL";
    let worker = "SELECT pid FROM imbus_stat_bus WHERE pid IS NOT NULL AND datname = current_database()";
    match act {
        Act::TerminateGateway => terminate(cluster, database, gateway),
        Act::TerminateWorker => terminate(cluster, database, worker),
        Act::KillGateway => kill(cluster, database, gateway),
        Act::KillWorker => kill(cluster, database, worker),
        Act::RestartImmediately => cluster.pg_ctl(&["-m", "immediate", "-w", "restart"]),
        Act::RestartFast => cluster.pg_ctl(&["-m", "fast", "-w", "restart"]),
    }
}

fn pid(cluster: &Cluster, database: &str, query: &str) -> i32 {
    let mut pid = None;
    eventually("the worker runs", || {
        pid = cluster.connect(database).query_opt(query, &[]).unwrap().map(|row| row.get(0));
        pid.is_some()
    });
    pid.unwrap()
}

fn terminate(cluster: &Cluster, database: &str, query: &str) {
    let pid = pid(cluster, database, query);
    let is_ended = cluster.connect(database).query_one("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
    assert!(is_ended.get::<_, bool>(0), "process {pid}");
}

/// Kills a worker and waits until the server has gone down with it: until then it still lets sessions in.
fn kill(cluster: &Cluster, database: &str, query: &str) {
    let pid = pid(cluster, database, query);
    let mut witness = cluster.connect(database);
    kill_9(pid);
    eventually("the server goes down", || witness.simple_query("SELECT 1").is_err());
}
