//! The bridge between the process's main thread, which is PostgreSQL's, and the network threads: what they say to each
//! other, and how the threads start and end. Nothing else is shared but the counters.

use super::batch::Batch;
use super::counters::Counters;
use super::links::LinkId;
use super::odoo::{Outcome, Said};
use super::reactor::{Parts, Reactor};
use super::replays::Ask;
use super::status::{Gauges, Snapshot};
use super::visitor::Handovers;
use crate::core::link::{Answer, Called, Connection, Question};
use crate::core::notification::Notification;
use crate::core::protocol::Close;
use crate::core::settings::{Database, Settings};
use crate::core::status;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded, unbounded};
use mio::net::TcpStream;
use mio::{Poll, Token, Waker};
use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Messages that may wait for the main thread.
const MAIN_MAX: usize = 1024;

/// Messages that wait in a network thread when the main thread takes none; beyond it the oldest is dropped.
const BACKLOG_MAX: usize = 65_536;

/// How long [`Net::stop`] waits for the threads.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// The token of every reactor's waker.
pub(super) const WAKER: Token = Token(0);

/// From the main thread to the network threads.
#[derive(Clone, Debug)]
pub enum ToNet {
    /// The settings after a reload.
    Settings(Arc<Settings>),
    /// All databases that have the extension.
    Databases(Arc<Vec<Database>>),
    /// Close every websocket with 1001 and end.
    Stop,
}

/// How loud a log line is, as PostgreSQL names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// DEBUG1: a client's message that is ignored.
    Debug,
    /// LOG: a step in the life of the gateway.
    Log,
    /// WARNING: service is degraded.
    Warning,
}

/// From the network threads to the main thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToMain {
    /// A line for the server's log: its text in PostgreSQL's message style, its hint in sentences.
    Log { level: LogLevel, text: String, hint: Option<String> },
    /// Payloads to NOTIFY on behalf of a database worker.
    Emit { payloads: Vec<String> },
    /// The first door opened; the real port when the setting is 0.
    Listening { port: u16 },
    /// The worker of this database (its OID) is connected.
    LinkUp { database: u32 },
    /// It is not connected any more.
    LinkDown { database: u32 },
    /// A network thread is dead, by an error or a panic: the process has to start over.
    Died { thread: String, reason: String },
}

/// What the network threads need to start.
pub struct Start {
    /// The settings; a changed copy comes by [`ToNet::Settings`].
    pub settings: Arc<Settings>,
    /// The databases known already; clients are told 1013 as long as there are none.
    pub databases: Arc<Vec<Database>>,
    /// Where database workers connect; an old socket there is removed.
    pub link_path: PathBuf,
    /// Called after each message to the main thread, from any network thread.
    pub wake_main: Box<dyn Fn() + Send + Sync>,
    /// How the databases are: called from a network thread, while somebody looks.
    pub census: Box<Census>,
}

/// Tells how the databases are, without asking anybody.
pub type Census = dyn Fn() -> Vec<status::Database> + Send + Sync;

/// The running network threads.
pub struct Net {
    peers: Vec<Peer>,
    threads: Vec<JoinHandle<()>>,
    from_threads: Receiver<ToMain>,
    /// Disconnected when the last thread has ended.
    ended: Receiver<()>,
    counters: Arc<Counters>,
}

/// What reactors tell each other and are told by the main thread. One queue per reactor: what comes in on the links is
/// passed on in order.
pub(super) enum Note {
    Net(ToNet),
    Accepted {
        tcp: TcpStream,
        address: SocketAddr,
        refused: bool,
    },
    Batch(Arc<Batch>),
    Recovered {
        request: u64,
        notifications: Vec<Notification>,
        more: bool,
    },
    /// Who is connected; the answer goes to reactor 0.
    Inspect {
        inquiry: u64,
        database: Option<u32>,
    },
    Inspected {
        inquiry: u64,
        connections: Vec<Connection>,
    },
    /// To reactor 0, for the link of a database: a connection of this reactor asks for a page of a replay.
    Ask {
        database: u32,
        reactor: usize,
        ask: Ask,
    },
    /// The answer to a query of a connection of this reactor.
    Answered {
        query: u64,
        answer: Answer,
    },
    /// To reactor 0, for the link of a database: a connection of this reactor wants to know something.
    Query {
        database: u32,
        reactor: usize,
        query: u64,
        question: Question,
    },
    /// To reactor 0's desk for Odoo.
    Odoo(Said),
    /// To reactor 0, for a link: what came of a job's call.
    JobCalled {
        link: LinkId,
        call: u64,
        outcome: Called,
    },
    /// What came of a question of a connection of this reactor.
    OdooSaid {
        query: u64,
        outcome: Box<Outcome>,
    },
    /// Close these connections if you have them.
    Part {
        ids: Arc<[i64]>,
        close: Close,
    },
    /// To reactor 0: somebody looks at the gateway itself.
    WantSurvey,
    /// Say what you have; the answer goes to reactor 0.
    Survey {
        number: u64,
    },
    Surveyed {
        number: u64,
        gauges: Gauges,
    },
    /// The state of the gateway.
    Snapshot(Arc<Snapshot>),
    /// End this connection if you have it; the answer goes to reactor 0.
    Disconnect {
        inquiry: u64,
        id: i64,
        database: Option<u32>,
        reason: String,
    },
    Disconnected {
        inquiry: u64,
        found: bool,
    },
    /// To reactor 0: nobody waits for the answer to this query any more.
    DropQuery {
        database: u32,
        query: u64,
    },
    /// To reactor 0: nobody waits for this replay any more.
    Forget {
        database: u32,
        request: u64,
    },
}

/// How to reach a reactor.
#[derive(Clone)]
pub(super) struct Peer {
    notes: Sender<Note>,
    waker: Arc<Waker>,
}

impl Peer {
    /// Puts a note into the reactor's queue. A reactor that is gone takes nothing; the process is ending then.
    pub fn tell(&self, note: Note) {
        if self.notes.send(note).is_ok() {
            let _ = self.waker.wake();
        }
    }

    /// How many notes wait.
    pub fn backlog(&self) -> usize {
        self.notes.len()
    }
}

/// Numbers that are unique over all reactors.
#[derive(Default)]
pub(super) struct Numbers {
    pub connection: AtomicI64,
    pub request: AtomicU64,
}

/// A network thread's line to the main thread. Never blocks: when the main thread takes nothing, log lines are dropped
/// and everything else waits here.
pub(super) struct MainLine {
    sender: Sender<ToMain>,
    wake: Arc<dyn Fn() + Send + Sync>,
    backlog: VecDeque<ToMain>,
}

impl MainLine {
    fn new(sender: Sender<ToMain>, wake: Arc<dyn Fn() + Send + Sync>) -> MainLine {
        MainLine { sender, wake, backlog: VecDeque::new() }
    }

    /// Says something for the log, if there is room.
    pub fn log(&mut self, level: LogLevel, text: String, hint: Option<&str>) {
        if self.backlog.is_empty() {
            let _ = self.send(ToMain::Log { level, text, hint: hint.map(str::to_owned) });
        }
    }

    /// Says something that matters.
    pub fn tell(&mut self, message: ToMain) {
        if self.backlog.len() >= BACKLOG_MAX {
            self.backlog.pop_front();
        }
        self.backlog.push_back(message);
        self.retry();
    }

    /// Says what waits.
    pub fn retry(&mut self) {
        while let Some(message) = self.backlog.pop_front() {
            if let Err(message) = self.send(message) {
                self.backlog.push_front(message);
                return;
            }
        }
    }

    /// Whether something waits for the main thread.
    pub fn is_waiting(&self) -> bool {
        !self.backlog.is_empty()
    }

    fn send(&self, message: ToMain) -> Result<(), ToMain> {
        match self.sender.try_send(message) {
            Ok(()) => (self.wake)(),
            Err(TrySendError::Full(message)) => return Err(message),
            Err(TrySendError::Disconnected(_)) => {}
        }
        Ok(())
    }
}

impl Net {
    /// Starts the threads. The caller blocks all signals around this call, so that the threads, which inherit its mask,
    /// leave them to the main thread.
    ///
    /// # Errors
    /// A poll or a thread cannot be had. A port that is taken is no error: it is logged and tried again.
    pub fn start(start: Start) -> io::Result<Net> {
        let (to_main, from_threads) = bounded(MAIN_MAX);
        let (alive, ended) = bounded(0);
        let wake: Arc<dyn Fn() + Send + Sync> = Arc::from(start.wake_main);
        let census: Arc<Census> = Arc::from(start.census);
        let handovers: Arc<Handovers> = Arc::default();
        let (counters, numbers) = (Arc::new(Counters::default()), Arc::new(Numbers::default()));
        let (mut peers, mut rooms) = (Vec::new(), Vec::new());
        for _ in 0..start.settings.io_threads.max(1) {
            let poll = Poll::new()?;
            let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
            let (notes, receiver) = unbounded();
            peers.push(Peer { notes, waker });
            rooms.push((poll, receiver));
        }
        let mut net = Net { peers: peers.clone(), threads: Vec::new(), from_threads, ended, counters };
        let clock = Instant::now();
        for (index, (poll, notes)) in rooms.into_iter().enumerate() {
            let parts = Parts {
                index,
                poll,
                notes,
                peers: peers.clone(),
                main: MainLine::new(to_main.clone(), wake.clone()),
                numbers: numbers.clone(),
                census: census.clone(),
                settings: start.settings.clone(),
                databases: start.databases.clone(),
                counters: net.counters.clone(),
                handovers: handovers.clone(),
                start: clock,
                link_path: start.link_path.clone(),
            };
            let line = MainLine::new(to_main.clone(), wake.clone());
            net.threads.push(spawn(parts, line, alive.clone())?);
        }
        Ok(net)
    }

    /// Tells all threads something.
    pub fn send(&self, message: ToNet) {
        for peer in &self.peers {
            peer.tell(Note::Net(message.clone()));
        }
    }

    /// Where the threads' messages arrive.
    pub fn receiver(&self) -> &Receiver<ToMain> {
        &self.from_threads
    }

    /// What the threads count.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Closes every websocket with 1001, writes what waits for at most 1 s, and ends the threads: within 2 s.
    pub fn stop(mut self) {
        self.send(ToNet::Stop);
        // Nothing is ever sent: the last thread to end disconnects.
        if self.ended.recv_timeout(STOP_WAIT) != Err(RecvTimeoutError::Timeout) {
            for thread in std::mem::take(&mut self.threads) {
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Net {
    /// Threads of a `start` that failed half-way, or of a `Net` that was let go, end by themselves.
    fn drop(&mut self) {
        self.send(ToNet::Stop);
    }
}

/// Starts one thread; whatever ends it but a stop is told to the main thread.
fn spawn(parts: Parts, line: MainLine, alive: Sender<()>) -> io::Result<JoinHandle<()>> {
    let name = format!("imbus net {}", parts.index);
    let thread = name.clone();
    std::thread::Builder::new().name(name).spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(|| Reactor::new(parts)?.run()));
        let reason = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(panic_text(panic.as_ref())),
        };
        if let Some(reason) = reason {
            let _ = line.sender.send_timeout(ToMain::Died { thread, reason }, STOP_WAIT);
            (line.wake)();
        }
        drop(alive);
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panic: {}", text.unwrap_or("of unknown kind"))
}
