//! The threads that talk HTTP to Odoo: one call each at a time, so that no call ever blocks a reactor.

use super::super::bridge::{Note, Peer};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use ureq::Agent;

/// How long a call may take, with its answer.
const CALL: Duration = Duration::from_secs(15);

/// The longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 4 << 20;

/// One call.
pub struct Call {
    pub ticket: u64,
    pub url: String,
    pub headers: Vec<(&'static str, String)>,
    pub body: String,
}

/// What came back.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    pub status: u16,
    pub body: String,
    /// The values of `Set-Cookie`.
    pub set_cookies: Vec<String>,
}

/// The threads; made as they are needed, never more than calls are under way at once.
pub struct Pool {
    calls: Sender<Call>,
    takers: Receiver<Call>,
    agent: Agent,
    threads: usize,
    /// Where the answers go.
    front: Peer,
}

impl Pool {
    /// No threads yet.
    pub fn new(front: Peer) -> Pool {
        let (calls, takers) = unbounded();
        let config = Agent::config_builder()
            .timeout_global(Some(CALL))
            .http_status_as_error(false)
            // A redirection leads people somewhere, not us; an environment's proxy is none between us and Odoo.
            .max_redirects(0)
            .proxy(None)
            .user_agent("")
            .max_idle_connections(64)
            .max_idle_connections_per_host(64)
            .build();
        Pool { calls, takers, agent: config.into(), threads: 0, front }
    }

    /// Makes a call. `under_way` is how many are, this one among them.
    pub fn call(&mut self, call: Call, under_way: usize) {
        if self.threads < under_way {
            let (takers, agent, front) = (self.takers.clone(), self.agent.clone(), self.front.clone());
            let name = format!("imbus odoo {}", self.threads);
            if std::thread::Builder::new().name(name).spawn(move || work(&takers, &agent, &front)).is_ok() {
                self.threads += 1;
            }
        }
        if self.threads == 0 {
            let result = Err("no thread can be had".to_owned());
            return self.front.tell(Note::Odoo(super::Said::Called { ticket: call.ticket, result }));
        }
        // Never fails: we hold a receiver.
        let _ = self.calls.send(call);
    }
}

fn work(calls: &Receiver<Call>, agent: &Agent, front: &Peer) {
    while let Ok(call) = calls.recv() {
        let ticket = call.ticket;
        let result = catch_unwind(AssertUnwindSafe(|| make(agent, call))).unwrap_or_else(|_| Err("a panic".to_owned()));
        front.tell(Note::Odoo(super::Said::Called { ticket, result: result.map(Arc::new) }));
    }
}

fn make(agent: &Agent, call: Call) -> Result<Reply, String> {
    let mut request = agent.post(&call.url).content_type("application/json");
    for (name, value) in &call.headers {
        request = request.header(*name, value);
    }
    let mut response = request.send(&call.body).map_err(|error| error.to_string())?;
    let set_cookies = response.headers().get_all("set-cookie").iter();
    let set_cookies = set_cookies.filter_map(|value| value.to_str().ok().map(str::to_owned)).collect();
    let status = response.status().as_u16();
    let body = response.body_mut().with_config().limit(ANSWER_MAX).lossy_utf8(true).read_to_string();
    Ok(Reply { status, body: body.map_err(|error| error.to_string())?, set_cookies })
}
