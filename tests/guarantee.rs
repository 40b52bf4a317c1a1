//! The delivery guarantee, as a property: random writers, clients that come and go, and what happens to a server.
//! Afterwards a ledger of what each transaction committed is compared with what each client received.
//!
//! `IMBUS_SEED` repeats a run's transactions (what threads do meanwhile is the machine's), `IMBUS_MESSAGES`,
//! `IMBUS_LATE_MAX` and `IMBUS_CHAOS` size it; `make soak` runs it with millions.

mod common;

#[path = "guarantee/chaos.rs"]
mod chaos;
#[path = "guarantee/check.rs"]
mod check;
#[path = "guarantee/checker_tests.rs"]
mod checker_tests;
#[path = "guarantee/database.rs"]
mod database;
#[path = "guarantee/guest.rs"]
mod guest;
#[path = "guarantee/ledger.rs"]
mod ledger;
#[path = "guarantee/plan.rs"]
mod plan;
#[path = "guarantee/run.rs"]
mod run;
#[path = "guarantee/stage.rs"]
mod stage;
#[path = "guarantee/story.rs"]
mod story;
#[path = "guarantee/writer.rs"]
mod writer;

use run::{Sizes, run};
use std::sync::{Mutex, PoisonError};

/// One run at a time: each is made to fill the machine.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn what_is_committed_comes_once_and_in_order_while_clients_come_and_go() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    run(Sizes { chaos: 0, ..Sizes::from_environment() });
}

#[test]
fn nothing_committed_is_lost_when_workers_and_server_go_down() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    run(Sizes::from_environment());
}
