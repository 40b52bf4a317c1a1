//! The TCP doors: binds the listen addresses, again every 2 s where it fails, and accepts. Decides nothing about who
//! comes in.

use super::bridge::{LogLevel, MainLine};
use crate::core::hub::Moment;
use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use socket2::SockRef;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};

/// Between two attempts to bind, in milliseconds.
const RETRY: Moment = 2_000;

/// How long accepting pauses when no descriptor is left, in milliseconds.
const PAUSE: Moment = 1_000;

/// How long accepting must have worked before its next failure is logged, in milliseconds.
const QUIET: Moment = 60_000;

/// The doors.
pub struct Listeners {
    registry: Registry,
    /// Tokens are this and the place.
    base: usize,
    /// The port of all doors; 0 until the first has got one.
    port: u16,
    names: Vec<Name>,
    doors: Vec<(IpAddr, TcpListener)>,
    retry_at: Option<Moment>,
    paused_until: Option<Moment>,
    /// When accepting failed last.
    starved_at: Option<Moment>,
}

/// Connections that may wait to be accepted (the system's net.core.somaxconn, 4096 on Linux, is the limit in the end).
const BACKLOG: i32 = 4096;

/// What the kernel may hold for one peer and has not sent, in bytes: what waits beyond it waits in the connection's queue,
/// once for all. Of the kernel's own accord a peer on this machine that does not read has more than 3 MiB there, copied.
/// What was sent and is under way does not count, so that a long way costs no throughput.
#[cfg(target_os = "linux")]
const UNSENT: u32 = 1 << 20;

/// How long a peer may acknowledge nothing that was sent to it: as long as it may be silent when nothing is sent, by
/// `imbus.ping_interval` as it is by default and the time for an answer. The kernel's own patience is 15 minutes.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: std::time::Duration = std::time::Duration::from_secs(60);

/// One of `imbus.listen_addresses`.
struct Name {
    name: String,
    bound: bool,
    complained: bool,
}

impl Listeners {
    /// Doors for these addresses and this port, 0 for any; tokens begin at `base`. Nothing is bound yet.
    pub fn new(registry: Registry, base: usize, names: &[String], port: u16) -> Listeners {
        let names = names.iter().map(|name| Name { name: name.clone(), bound: false, complained: false }).collect();
        let doors = Vec::new();
        Listeners { registry, base, port, names, doors, retry_at: Some(0), paused_until: None, starved_at: None }
    }

    /// Closes all doors, for good.
    pub fn close(&mut self) {
        self.doors.clear();
        self.names.clear();
        self.retry_at = None;
    }

    /// Binds what is not bound, and ends a pause. Returns the port when the first door opened.
    pub fn tick(&mut self, now: Moment, main: &mut MainLine) -> Option<u16> {
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
        }
        if self.retry_at.is_none_or(|at| at > now) {
            return None;
        }
        let was_open = !self.doors.is_empty();
        for at in 0..self.names.len() {
            self.bind_name(at, main);
        }
        self.retry_at = self.names.iter().any(|name| !name.bound).then_some(now + RETRY);
        (!was_open && !self.doors.is_empty()).then_some(self.port)
    }

    /// When to call [`Listeners::tick`] next.
    pub fn deadline(&self) -> Option<Moment> {
        self.retry_at.into_iter().chain(self.paused_until).min()
    }

    /// How many doors there are.
    pub fn len(&self) -> usize {
        self.doors.len()
    }

    /// Accepts at one door. None when nobody waits there, or nobody can be let in for now.
    pub fn accept(&mut self, place: usize, now: Moment, main: &mut MainLine) -> Option<(TcpStream, SocketAddr)> {
        if self.paused_until.is_some() {
            return None;
        }
        let (_, door) = self.doors.get(place)?;
        loop {
            match door.accept() {
                Ok(accepted) => return Some(accepted),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    self.paused_until = Some(now + PAUSE);
                    let before = self.starved_at.replace(now);
                    if before.is_none_or(|before| now.saturating_sub(before) > QUIET) {
                        let text = format!("could not accept a connection: {error}");
                        let hint = "Raise the limit of open files, or lower imbus.max_connections.";
                        main.log(LogLevel::Warning, text, Some(hint));
                    }
                    return None;
                }
            }
        }
    }

    fn bind_name(&mut self, at: usize, main: &mut MainLine) {
        let Some(name) = self.names.get(at).filter(|name| !name.bound).map(|name| name.name.clone()) else { return };
        let result = addresses(&name).and_then(|addresses| self.bind_all(&addresses));
        let Some(entry) = self.names.get_mut(at) else { return };
        match result {
            Ok(()) => {
                entry.bound = true;
                main.log(LogLevel::Log, format!("listening on address \"{name}\", port {}", self.port), None);
            }
            Err(error) if !entry.complained => {
                entry.complained = true;
                let text = format!("could not listen on address \"{name}\", port {}: {error}", self.port);
                let hint = "Another process may use the port; see imbus.port and imbus.listen_addresses. \
                            This is tried again every 2 s.";
                main.log(LogLevel::Warning, text, Some(hint));
            }
            Err(_) => {}
        }
    }

    /// Binds the addresses that a name stands for, but for those this machine does not have (`::1` without IPv6).
    fn bind_all(&mut self, addresses: &[IpAddr]) -> io::Result<()> {
        let mut failed = io::Error::new(ErrorKind::AddrNotAvailable, "the name has no address");
        let mut bound = false;
        for address in addresses {
            match self.bind(*address) {
                Ok(()) => bound = true,
                Err(error) if matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::PermissionDenied) => {
                    return Err(error);
                }
                Err(error) => failed = error,
            }
        }
        if bound { Ok(()) } else { Err(failed) }
    }

    fn bind(&mut self, address: IpAddr) -> io::Result<()> {
        // Linux's `::` takes IPv4 too (ipv6(7), IPV6_V6ONLY).
        let covers =
            |open: IpAddr| open == address || open == Ipv6Addr::UNSPECIFIED && address == Ipv4Addr::UNSPECIFIED;
        if self.doors.iter().any(|(open, _)| covers(*open)) {
            return Ok(());
        }
        let mut door = TcpListener::bind(SocketAddr::new(address, self.port))?;
        // Asked for again, this time with room for a burst: a connection that finds none waits for a second.
        SockRef::from(&door).listen(BACKLOG)?;
        limit_peers(&door);
        let port = door.local_addr()?.port();
        self.registry.register(&mut door, Token(self.base + self.doors.len()), Interest::READABLE)?;
        self.port = port;
        self.doors.push((address, door));
        Ok(())
    }
}

/// Sets limits that the connections of a door inherit; without them it works too.
fn limit_peers(door: &TcpListener) {
    #[cfg(target_os = "linux")]
    {
        let door = SockRef::from(door);
        let _ = door.set_tcp_notsent_lowat(UNSENT);
        let _ = door.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    }
    #[cfg(not(target_os = "linux"))]
    let _ = door;
}

/// The addresses a name of `imbus.listen_addresses` stands for. Looking up anything but an address and `*` may take as
/// long as the system's resolver does; that is at start, or while retrying.
fn addresses(name: &str) -> io::Result<Vec<IpAddr>> {
    let name = name.trim();
    if name == "*" {
        return Ok(vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()]);
    }
    if let Ok(address) = name.parse() {
        return Ok(vec![address]);
    }
    Ok((name, 0).to_socket_addrs()?.map(|address| address.ip()).collect())
}

/// Whether accepting can go on at once: the peer is gone already, or its network (accept(2)).
fn is_passing(error: &io::Error) -> bool {
    use ErrorKind::{
        ConnectionAborted, ConnectionReset, HostUnreachable, Interrupted, NetworkDown, NetworkUnreachable,
    };
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | HostUnreachable | Interrupted | NetworkDown | NetworkUnreachable
    )
}
