//! Odoo as the authority (`imbus.auth = 'odoo'`): reactor 0's desk for all reactors. Decides which calls are made and
//! when, and what their answers mean for whom. The calls themselves are made by the threads of [`pool`].

mod pool;
mod watched;

use super::bridge::{LogLevel, MainLine, Note, Peer};
use super::counters::Counters;
use super::links::LinkId;
use super::visitor::{Handovers, Visitor};
use crate::core::hub::Moment;
use crate::core::line::Line;
use crate::core::link::Called;
use crate::core::odoo::{self, Answer};
use crate::core::protocol::{Close, CloseCode};
use crate::core::settings::{Database, Settings};
use crate::core::visitors::{User, Visitors};
use pool::{Call, Fault, Pool, Reply};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Between two complaints about Odoo in the log, in milliseconds.
const COMPLAINT: Moment = 60_000;

/// Hosts of which it is remembered which database they mean.
const HOSTS_MAX: usize = 1_000;

/// The part of the time in which a session may be checked again: after each check, this many times as long as it took is
/// left to others.
const SPARING: Moment = 3;

const PEEK: &str = "/websocket/peek_notifications";
/// Where presence is told.
pub const PRESENCE: &str = "/websocket/update_bus_presence";
/// Where a job is run, by the add-on.
const RUN: &str = "/imbus/async/run";
/// Where the end of a websocket is told.
pub const CLOSED: &str = "/websocket/on_closed";

/// Who waits for an answer: a reactor and the number of its query.
type Waiter = (usize, u64);

/// What the desk is told.
pub enum Said {
    /// Who is it, and what may it have? Answered by [`Note::OdooSaid`].
    Ask { reactor: usize, query: u64, visitor: Box<Visitor>, question: Question },
    /// Nobody waits for that answer any more.
    Drop { reactor: usize, query: u64 },
    /// A socket was let in as this user.
    Here { id: i64, visitor: Box<Visitor>, user: Option<User> },
    /// It has closed.
    Gone { id: i64 },
    /// What a client says of its presence, a JSON object.
    Presence { visitor: Box<Visitor>, data: String },
    /// A call has come back.
    Called { ticket: u64, result: Result<Arc<Reply>, Fault> },
    /// The worker of a database has claimed a job for Odoo. Answered by [`Note::JobCalled`].
    Job { link: LinkId, database: u32, call: u64, id: i64, token: String },
}

/// What Odoo is asked.
#[derive(Clone, Debug)]
pub enum Question {
    /// What a subscription to these channels (a JSON array of names) comes to; `last` is what the client has. `is_first`
    /// is Odoo's is_first_poll: without it a session that has not subscribed before, or not any more, has ended.
    Channels { channels: String, last: i64, is_first: bool },
    /// What Odoo answers to this body at this path.
    Forward { path: &'static str, body: String },
}

/// What came of a question.
#[derive(Clone, Debug)]
pub enum Outcome {
    Known(Box<Granted>),
    /// Odoo's own answer.
    Forwarded {
        body: String,
        set_cookies: Vec<String>,
    },
    Expired,
    /// To be ignored, and why.
    Refused(String),
    /// Not now, and why.
    Unavailable(String),
}

/// A session that Odoo knows.
#[derive(Clone, Debug)]
pub struct Granted {
    pub database: Database,
    pub granted: crate::core::granted::Granted,
    pub is_user: bool,
    /// Cookies that Odoo set.
    pub set_cookies: Vec<String>,
}

/// A call in the line.
#[derive(Clone)]
enum Errand {
    Ask { visitor: Visitor, question: Question },
    Check { visitor: Visitor },
    Tell { visitor: Visitor, path: &'static str, body: String },
}

/// The desk.
pub struct Odoo {
    line: Line<Errand, Waiter>,
    pool: Pool,
    peers: Vec<Peer>,
    visitors: Visitors<Visitor>,
    handovers: Arc<Handovers>,
    /// Which database a host means, for the guess how far its ids are.
    hosts: HashMap<Box<str>, u32>,
    /// The earliest next check.
    spare_until: Moment,
    /// Calls made outside of the line: checks, and when they began.
    checks: HashMap<u64, (Visitor, Moment)>,
    next_check: u64,
    /// The threads that wait for jobs, and whose jobs these are.
    runners: Pool,
    jobs: HashMap<u64, (LinkId, u64)>,
    next_job: u64,
    complained: Option<Moment>,
}

/// What the desk works with in a turn.
pub struct Room<'a> {
    pub settings: &'a Settings,
    pub databases: &'a [Database],
    pub counters: &'a Counters,
    pub main: &'a mut MainLine,
    pub now: Moment,
    /// The greatest id of a database, as far as it is known.
    pub greatest: &'a dyn Fn(u32) -> i64,
}

/// Sessions that are checked at once: one whose check hangs does not keep the others in.
const CHECKS_AT_ONCE: usize = 2;

/// Tickets of checks, which stand in no line, have this bit.
const CHECKS: u64 = 1 << 63;
/// Tickets of jobs have this one.
const JOBS: u64 = 1 << 62;

impl Odoo {
    /// A desk for these reactors, the first of which is its own.
    pub fn new(peers: Vec<Peer>, front: Peer, handovers: Arc<Handovers>) -> Odoo {
        Odoo {
            line: Line::default(),
            pool: Pool::for_questions(front.clone()),
            peers,
            visitors: Visitors::default(),
            handovers,
            hosts: HashMap::new(),
            spare_until: 0,
            checks: HashMap::new(),
            next_check: 0,
            runners: Pool::for_jobs(front),
            jobs: HashMap::new(),
            next_job: 0,
            complained: None,
        }
    }

    /// Takes in what is said.
    pub fn said(&mut self, said: Said, room: &mut Room) {
        match said {
            Said::Ask { reactor, query, visitor, question } => {
                let key = match &question {
                    // A stranger gets a session of its own.
                    Question::Channels { channels, is_first, .. } if visitor.session().is_some() => {
                        format!("{is_first} {}\n{channels}", visitor.key)
                    }
                    // Each is its own.
                    _ => format!("{reactor} {query}"),
                };
                let errand = Errand::Ask { visitor: *visitor, question };
                self.line.ask(key.into(), errand, (reactor, query), room.now);
            }
            Said::Drop { reactor, query } => self.line.leave(&(reactor, query)),
            Said::Here { id, visitor, user } => {
                if let Some(user) = &user {
                    self.line.untell(&closing(user));
                }
                let recheck = super::millis(room.settings.session_recheck);
                let key = visitor.key.clone();
                self.visitors.here(id, &key, *visitor, user, room.now, recheck);
            }
            Said::Gone { id } => self.visitors.gone(id, room.now),
            Said::Presence { visitor, data } => {
                let errand = Errand::Tell { visitor: (*visitor).clone(), path: PRESENCE, body: odoo::call(&data) };
                self.line.tell(visitor.key, errand, room.now);
            }
            Said::Called { ticket, result } if ticket & JOBS != 0 => self.job_called(ticket, result),
            Said::Called { ticket, result } => self.called(ticket, result, room),
            Said::Job { link, database, call, id, token } => self.run(link, database, call, (id, &token), room),
        }
    }

    /// Does what time asks for and makes the calls that may be made. Returns when to turn next.
    pub fn turn(&mut self, room: &mut Room) -> Option<Moment> {
        for (user, visitor) in self.visitors.left(room.now) {
            let errand = Errand::Tell { visitor, path: CLOSED, body: odoo::call("{}") };
            self.line.tell(closing(&user), errand, room.now);
        }
        let outcome = Outcome::Unavailable("Odoo does not answer".to_owned());
        self.line.overdue(room.now).into_iter().for_each(|waiter| self.tell(waiter, &outcome));
        let limit = room.settings.odoo_concurrency.max(1);
        while let Some((ticket, errand)) = self.line.next(limit.saturating_sub(self.checks.len())) {
            self.call(ticket, &errand, room);
        }
        self.check_session(limit, room);
        room.counters.odoo_waiting.store(self.line.waiting() as u64, Ordering::Relaxed);
        room.counters.odoo_sessions.store(self.visitors.sessions() as u64, Ordering::Relaxed);
        // Where others wait, the time for it comes when a call comes back.
        let is_free = self.may_check(limit);
        let check = self.visitors.next_check().filter(|_| is_free).map(|at| at.max(self.spare_until));
        [self.visitors.next_left(), self.line.deadline(), check].into_iter().flatten().min()
    }

    /// Checks one session that is due, while nobody waits.
    fn check_session(&mut self, limit: usize, room: &mut Room) {
        if !self.may_check(limit) || room.now < self.spare_until {
            return;
        }
        let Some((_, visitor)) = self.visitors.check(room.now) else { return };
        self.next_check += 1;
        let ticket = CHECKS | self.next_check;
        self.checks.insert(ticket, (visitor.clone(), room.now));
        self.call(ticket, &Errand::Check { visitor }, room);
    }

    fn may_check(&self, limit: usize) -> bool {
        let under_way = self.line.under_way() + self.checks.len();
        self.checks.len() < CHECKS_AT_ONCE && self.line.waiting() == 0 && under_way < limit
    }

    fn call(&mut self, ticket: u64, errand: &Errand, room: &mut Room) {
        let (visitor, path, body) = match errand {
            Errand::Ask { visitor, question: Question::Channels { channels, last, is_first } } => {
                let known = self.greatest(&visitor.host, room);
                (visitor, PEEK, odoo::peek(channels, known.max(*last), *is_first))
            }
            Errand::Ask { visitor, question: Question::Forward { path, body } } => (visitor, *path, body.clone()),
            Errand::Check { visitor } => {
                let known = self.greatest(&visitor.host, room);
                (visitor, PEEK, odoo::peek("[]", known, false))
            }
            Errand::Tell { visitor, path, body } => (visitor, *path, body.clone()),
        };
        let mut headers = visitor.headers.to_vec();
        headers.push(("Host", visitor.host.to_string()));
        if !visitor.cookies().is_empty() {
            headers.push(("Cookie", visitor.cookies().to_owned()));
        }
        let url = format!("{}{path}", room.settings.odoo_url.trim_end_matches('/'));
        let under_way = self.line.under_way() + self.checks.len();
        Counters::add(&room.counters.odoo_calls, 1);
        self.pool.call(Call { ticket, url, headers, body }, under_way);
    }

    /// The greatest id of the database that a host means; of all databases while it is not known which (an id that is
    /// beyond its own counts as 0 with Odoo: the last 50 s).
    fn greatest(&self, host: &str, room: &Room) -> i64 {
        let all = || room.databases.iter().map(|database| (room.greatest)(database.oid)).max().unwrap_or_default();
        self.hosts.get(host).map_or_else(all, |database| (room.greatest)(*database))
    }

    /// A call has come back.
    fn called(&mut self, ticket: u64, result: Result<Arc<Reply>, Fault>, room: &mut Room) {
        if result.is_err() {
            Counters::add(&room.counters.odoo_failures, 1);
        }
        if ticket & CHECKS != 0 {
            return self.checked(ticket, result, room);
        }
        let is_ok = result.as_ref().is_ok_and(|reply| reply.status == 200);
        let Some((errand, waiters)) = self.line.done(ticket, is_ok, room.now) else { return };
        match errand {
            Errand::Ask { visitor, question: Question::Channels { .. } } => {
                let outcome = self.outcome(&visitor, result, room);
                waiters.into_iter().for_each(|waiter| self.tell(waiter, &outcome));
            }
            Errand::Ask { question: Question::Forward { .. }, .. } => {
                let outcome = match result {
                    Ok(reply) if reply.status == 200 => {
                        Outcome::Forwarded { body: reply.body.clone(), set_cookies: reply.set_cookies.clone() }
                    }
                    Ok(reply) => Outcome::Unavailable(format!("Odoo answers {}", reply.status)),
                    Err(fault) => Outcome::Unavailable(fault.reason),
                };
                waiters.into_iter().for_each(|waiter| self.tell(waiter, &outcome));
            }
            Errand::Tell { visitor, .. } => {
                if let Ok(reply) = result
                    && visitor.session().is_some()
                    && visitor.is_renewed_by(&reply.set_cookies)
                    && !self.visitors.users(&visitor.key).is_empty()
                {
                    self.hand_over(&visitor, &reply.set_cookies, room);
                }
            }
            Errand::Check { .. } => {}
        }
    }

    /// Has Odoo run a job. How many at once is the database workers' to say, which claim them.
    fn run(&mut self, link: LinkId, database: u32, call: u64, (id, token): (i64, &str), room: &mut Room) {
        let Some(database) = room.databases.iter().find(|known| known.oid == database) else {
            let outcome = Called::Refused("the database is not known yet".to_owned());
            return self.tell_link(link, call, outcome);
        };
        self.next_job += 1;
        let ticket = JOBS | self.next_job;
        self.jobs.insert(ticket, (link, call));
        let url = format!("{}{RUN}", room.settings.odoo_url.trim_end_matches('/'));
        let body = serde_json::json!({ "db": database.name, "id": id, "token": token }).to_string();
        // Odoo 19 goes by this header where a host may mean several databases.
        let headers = vec![("X-Odoo-Database", database.name.clone())];
        Counters::add(&room.counters.odoo_jobs, 1);
        self.runners.call(Call { ticket, url, headers, body }, self.jobs.len());
    }

    /// Odoo has run a job, or has not.
    fn job_called(&mut self, ticket: u64, result: Result<Arc<Reply>, Fault>) {
        let Some((link, call)) = self.jobs.remove(&ticket) else { return };
        let outcome = match result {
            Ok(reply) => odoo::ran(reply.status),
            Err(fault) if fault.is_begun => Called::Broken(fault.reason),
            Err(fault) => Called::Refused(fault.reason),
        };
        self.tell_link(link, call, outcome);
    }

    fn tell_link(&self, link: LinkId, call: u64, outcome: Called) {
        if let Some(front) = self.peers.first() {
            front.tell(Note::JobCalled { link, call, outcome });
        }
    }

    /// A session has been checked again.
    fn checked(&mut self, ticket: u64, result: Result<Arc<Reply>, Fault>, room: &mut Room) {
        let Some((visitor, began)) = self.checks.remove(&ticket) else { return };
        // One that had no answer has cost Odoo little.
        if result.is_ok() {
            self.spare_until = room.now.saturating_add(SPARING * room.now.saturating_sub(began));
        }
        let users = self.visitors.users(&visitor.key);
        let is_over = match self.outcome(&visitor, result, room) {
            Outcome::Known(known) => {
                let subject = known.granted.subject.as_deref().unwrap_or_default();
                let user: User = (known.database.oid, subject.into());
                users.iter().any(|other| *other != user)
            }
            Outcome::Expired => true,
            Outcome::Refused(_) | Outcome::Unavailable(_) | Outcome::Forwarded { .. } => false,
        };
        if is_over {
            return self.part(&visitor, &Close::new(CloseCode::SessionExpired, "SESSION_EXPIRED"));
        }
        let recheck = super::millis(room.settings.session_recheck);
        if recheck > 0 {
            self.visitors.checked(&visitor.key, room.now.saturating_add(recheck));
        }
    }

    /// What Odoo's answer about a visitor comes to.
    fn outcome(&mut self, visitor: &Visitor, result: Result<Arc<Reply>, Fault>, room: &mut Room) -> Outcome {
        let reply = match result {
            Ok(reply) if reply.status == 200 => reply,
            Ok(reply) => return self.unavailable(&format!("it answers with status {}", reply.status), room),
            Err(fault) => return self.unavailable(&fault.reason, room),
        };
        let known = match odoo::answer(&reply.body) {
            Ok(Answer::Known(known)) => known,
            Ok(Answer::Expired) => return Outcome::Expired,
            Ok(Answer::Refused(reason)) => return Outcome::Refused(reason),
            Err(reason) => return self.unavailable(&format!("its answer is not understood: {reason}"), room),
        };
        let Some(database) = room.databases.iter().find(|database| database.name == known.database) else {
            return self.unavailable(&format!("its database \"{}\" has no extension imbus", known.database), room);
        };
        if self.hosts.len() >= HOSTS_MAX {
            self.hosts.clear();
        }
        self.hosts.insert(visitor.host.clone(), database.oid);
        let (is_user, set_cookies) = (known.is_user(), reply.set_cookies.clone());
        if is_user && visitor.session().is_some() && visitor.is_renewed_by(&set_cookies) {
            self.hand_over(visitor, &set_cookies, room);
        }
        Outcome::Known(Box::new(Granted { database: database.clone(), granted: known.granted, is_user, set_cookies }))
    }

    fn unavailable(&mut self, reason: &str, room: &mut Room) -> Outcome {
        if self.complained.is_none_or(|at| room.now >= at.saturating_add(COMPLAINT)) {
            self.complained = Some(room.now);
            let text = format!("could not ask Odoo at \"{}\": {reason}", room.settings.odoo_url);
            let hint = "Clients are told to come back later. Check imbus.odoo_url, and that Odoo runs.";
            room.main.log(LogLevel::Warning, text, Some(hint));
        }
        Outcome::Unavailable("Odoo cannot be asked now".to_owned())
    }

    /// Odoo has given a user's session a new id, which only we know: its sockets come back at once, and learn of it.
    fn hand_over(&mut self, visitor: &Visitor, set_cookies: &[String], room: &mut Room) {
        self.handovers.add(visitor, set_cookies, room.now);
        self.part(visitor, &Close::new(CloseCode::KeepAlive, ""));
    }

    /// Closes the sockets of a session.
    fn part(&self, visitor: &Visitor, close: &Close) {
        let ids: Arc<[i64]> = self.visitors.sockets(&visitor.key).into();
        if !ids.is_empty() {
            self.peers.iter().for_each(|peer| peer.tell(Note::Part { ids: ids.clone(), close: close.clone() }));
        }
    }

    fn tell(&self, (reactor, query): Waiter, outcome: &Outcome) {
        if let Some(peer) = self.peers.get(reactor) {
            peer.tell(Note::OdooSaid { query, outcome: Box::new(outcome.clone()) });
        }
    }
}

/// The key of the call that tells that a user has left.
fn closing((database, subject): &User) -> Arc<str> {
    format!("{database} {subject}").into()
}
