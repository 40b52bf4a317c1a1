//! The threads that talk HTTP to Odoo: one call each at a time, so that no call ever blocks a reactor. Questions have a
//! time limit; a job's call lasts as long as the job, and ends with its connection.

use super::super::bridge::{Note, Peer};
use super::watched::Watched;
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::{Agent, Error};

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

/// Why there is no reply.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Odoo has, or may have, seen the call.
    pub is_begun: bool,
    pub reason: String,
}

impl Fault {
    fn before(reason: impl Into<String>) -> Fault {
        Fault { is_begun: false, reason: reason.into() }
    }
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
    /// For questions: limited in time, over connections that are kept. No threads yet.
    pub fn for_questions(front: Peer) -> Pool {
        Pool::new(front, config(Some(CALL), 64).into())
    }

    /// For jobs: as long as they take. A kept connection could end just when a job is sent on it, and nobody would know
    /// whether it was begun; so each has its own.
    pub fn for_jobs(front: Peer) -> Pool {
        Pool::new(front, Agent::with_parts(config(None, 0), Watched, DefaultResolver::default()))
    }

    fn new(front: Peer, agent: Agent) -> Pool {
        let (calls, takers) = unbounded();
        Pool { calls, takers, agent, threads: 0, front }
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
            let result = Err(Fault::before("no thread can be had"));
            return self.front.tell(Note::Odoo(super::Said::Called { ticket: call.ticket, result }));
        }
        // Never fails: we hold a receiver.
        let _ = self.calls.send(call);
    }
}

fn work(calls: &Receiver<Call>, agent: &Agent, front: &Peer) {
    while let Ok(call) = calls.recv() {
        let ticket = call.ticket;
        let result = catch_unwind(AssertUnwindSafe(|| make(agent, call)))
            .unwrap_or_else(|_| Err(Fault { is_begun: true, reason: "a panic".to_owned() }));
        front.tell(Note::Odoo(super::Said::Called { ticket, result: result.map(Arc::new) }));
    }
}

fn config(limit: Option<Duration>, idle: usize) -> ureq::config::Config {
    Agent::config_builder()
        .timeout_global(limit)
        .http_status_as_error(false)
        // A redirection leads people somewhere, not us; an environment's proxy is none between us and Odoo.
        .max_redirects(0)
        .proxy(None)
        .user_agent("")
        .max_idle_connections(idle)
        .max_idle_connections_per_host(idle)
        .build()
}

/// Whether nothing can have reached Odoo.
fn is_unreached(error: &Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotConnected};
    match error {
        Error::Io(error) => matches!(error.kind(), ConnectionRefused | NotConnected),
        Error::HostNotFound | Error::ConnectionFailed | Error::BadUri(_) => true,
        _ => false,
    }
}

fn make(agent: &Agent, call: Call) -> Result<Reply, Fault> {
    let mut request = agent.post(&call.url).content_type("application/json");
    for (name, value) in &call.headers {
        request = request.header(*name, value);
    }
    let sent = request.send(&call.body);
    let mut response = sent.map_err(|error| Fault { is_begun: !is_unreached(&error), reason: error.to_string() })?;
    let set_cookies = response.headers().get_all("set-cookie").iter();
    let set_cookies = set_cookies.filter_map(|value| value.to_str().ok().map(str::to_owned)).collect();
    let status = response.status().as_u16();
    let body = response.body_mut().with_config().limit(ANSWER_MAX).lossy_utf8(true).read_to_string();
    let body = body.map_err(|error| Fault { is_begun: true, reason: error.to_string() })?;
    Ok(Reply { status, body, set_cookies })
}
