//! The database worker's end of its link to the gateway: a non-blocking Unix socket.

use crate::core::link::{Command, Decoder, Event, SOCKET_PATH, encode};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

/// Bytes that may wait for the gateway before the worker reads no further rows.
pub const BACKLOG_MAX: usize = 8 << 20;
/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// An open link.
pub struct Link {
    stream: UnixStream,
    decoder: Decoder,
    out: Vec<u8>,
    sent: usize,
}

impl Link {
    /// Connects to the gateway. The working directory is the data directory.
    pub fn connect() -> io::Result<Link> {
        let stream = UnixStream::connect(SOCKET_PATH)?;
        stream.set_nonblocking(true)?;
        Ok(Link { stream, decoder: Decoder::default(), out: Vec::new(), sent: 0 })
    }

    /// For waiting on it.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Bytes not yet taken by the gateway.
    pub fn backlog(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Queues a message and writes what the socket takes.
    pub fn send(&mut self, event: &Event) -> io::Result<()> {
        let frame = encode(event).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "message too long"))?;
        self.out.extend_from_slice(&frame);
        self.flush()
    }

    /// Writes what the socket takes now.
    pub fn flush(&mut self) -> io::Result<()> {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.forget_sent();
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.out.shrink_to(CHUNK);
        self.sent = 0;
        Ok(())
    }

    /// A link that is never idle is never empty: what was sent goes when it is more than what waits.
    fn forget_sent(&mut self) {
        if self.sent > CHUNK.max(self.backlog()) {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Reads what has come. An error, an end or a malformed frame: the link is over.
    pub fn receive(&mut self) -> io::Result<Vec<Command>> {
        let mut chunk = vec![0; CHUNK];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.decoder.feed(chunk.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let mut commands = Vec::new();
        loop {
            match self.decoder.next() {
                Ok(Some(command)) => commands.push(command),
                Ok(None) => return Ok(commands),
                Err(_) => return Err(ErrorKind::InvalidData.into()),
            }
        }
    }
}
