//! One TCP socket as tungstenite sees it: reads come from the peer, a turn's worth at a time; writes go to the
//! connection's outbound queue, so that tungstenite's pongs and closes and our own frames have one order and the socket
//! one writer. Counts the frames that arrive, which tungstenite does not show, and inflates what is compressed.

use super::deflate::{Agreement, Fault, Inflow};
use super::outbound::{Flow, Kind, Outbound};
use crate::core::hub::Moment;
use crate::core::protocol::Frame;
use mio::net::TcpStream;
use socket2::SockRef;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

/// Read from one socket in one turn, in bytes; then the others have theirs.
const TURN: usize = 64 * 1024;

/// The socket.
pub struct Socket {
    pub tcp: TcpStream,
    pub out: Outbound,
    /// Whether the poll is asked for writability.
    pub wants_write: bool,
    /// When bytes last went out.
    pub progress: Moment,
    /// What was agreed on compressed messages.
    pub deflate: Option<Agreement>,
    limit: usize,
    budget: usize,
    cut_short: bool,
    heard: bool,
    muted: bool,
    overflow: bool,
    counter: FrameCounter,
    frames: usize,
    received: usize,
    /// Only where compressed messages may come.
    inflow: Option<Box<Inflow>>,
    /// Found in what came; what came before it is handed on first.
    found: Option<Fault>,
    fault: Option<Fault>,
}

impl Socket {
    /// A socket just accepted; it reads nothing before its first turn.
    pub fn new(tcp: TcpStream) -> Socket {
        Socket {
            tcp,
            out: Outbound::default(),
            wants_write: false,
            progress: 0,
            deflate: None,
            limit: usize::MAX,
            budget: 0,
            cut_short: false,
            heard: false,
            muted: false,
            overflow: false,
            counter: FrameCounter::default(),
            frames: 0,
            received: 0,
            inflow: None,
            found: None,
            fault: None,
        }
    }

    /// Begins a turn; `limit` is the size of the outbound queue, in bytes.
    pub fn begin_turn(&mut self, limit: usize) {
        self.limit = limit;
        self.budget = TURN;
        self.cut_short = false;
    }

    /// Whether reading stopped for want of budget: there may be more.
    pub fn is_cut_short(&self) -> bool {
        self.cut_short
    }

    /// Whether anything arrived since the last call.
    pub fn take_heard(&mut self) -> bool {
        std::mem::take(&mut self.heard)
    }

    /// How many websocket frames arrived since the last call.
    pub fn take_frames(&mut self) -> usize {
        std::mem::take(&mut self.frames)
    }

    /// How many bytes arrived since the last call.
    pub fn take_received(&mut self) -> usize {
        std::mem::take(&mut self.received)
    }

    /// From now on frames come, compressed ones too if that was agreed. `already` was read before; returned is what of
    /// it tungstenite does not get by reading.
    pub fn begin_frames(&mut self, already: Vec<u8>, deflate: Option<Agreement>) -> Vec<u8> {
        self.deflate = deflate;
        self.counter = FrameCounter::default();
        self.frames = 0;
        if deflate.is_none() {
            self.frames = self.counter.feed(&already);
            return already;
        }
        let mut inflow = Inflow::default();
        inflow.feed(&already);
        self.inflow = Some(Box::new(inflow));
        Vec::new()
    }

    /// What was wrong with what is compressed.
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// From now on what tungstenite writes is dropped: our own close frame was the last word.
    pub fn mute(&mut self) {
        self.muted = true;
    }

    /// Whether a pong found the outbound queue full.
    pub fn has_overflowed(&self) -> bool {
        self.overflow
    }

    /// Puts last words into the queue, whatever waits already.
    pub fn say(&mut self, frame: Frame) {
        let _ = self.out.push(frame, Kind::Exempt, usize::MAX);
    }

    /// Writes what the kernel takes. Returns how it ended and how many bytes went.
    pub fn flush_out(&mut self, now: Moment) -> io::Result<(Flow, usize)> {
        let (flow, count) = self.out.write_to(&mut self.tcp)?;
        if count > 0 {
            self.progress = now;
        }
        Ok((flow, count))
    }

    /// Tells the peer that nothing more comes.
    pub fn shut(&self) {
        // A peer that is gone already is noticed at the next read.
        let _ = self.tcp.shutdown(Shutdown::Write);
    }

    /// The connection is over. A peer that has not taken what waits for it is reset: the kernel would go on offering it
    /// what it holds, in its own memory.
    pub fn abandon(&self) {
        if !self.out.is_empty() {
            // Without it the kernel gives up by itself, later.
            let _ = SockRef::from(&self.tcp).set_linger(Some(Duration::ZERO));
        }
    }

    /// Reads and throws away. True at the end of the stream.
    pub fn drain(&mut self) -> io::Result<bool> {
        self.inflow = None;
        let mut bytes = [0; 4096];
        loop {
            match self.read(&mut bytes) {
                Ok(0) => return Ok(true),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }
}

impl Socket {
    fn check_budget(&mut self) -> io::Result<()> {
        if self.budget > 0 {
            return Ok(());
        }
        self.cut_short = true;
        Err(ErrorKind::WouldBlock.into())
    }

    /// Reads as the bytes come.
    fn read_raw(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.check_budget()?;
        let count = loop {
            match self.tcp.read(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        self.budget = self.budget.saturating_sub(count);
        self.heard |= count > 0;
        self.received += count;
        Ok(count)
    }

    /// Reads what comes of the bytes. That counts against the budget too, so that a turn inflates one long message at
    /// most.
    fn read_inflated(&mut self, inflow: &mut Inflow, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match inflow.take(bytes) {
                0 => self.check_budget()?,
                count => return Ok(count),
            }
            if let Some(fault) = self.found {
                self.fault = Some(fault);
                return Err(ErrorKind::InvalidData.into());
            }
            if inflow.is_dry() {
                let mut raw = [0; 4096];
                let count = self.read_raw(&mut raw)?;
                if count == 0 {
                    return Ok(0);
                }
                inflow.feed(raw.get(..count).unwrap_or_default());
            }
            match inflow.step() {
                Ok(step) => {
                    self.frames += step.frames;
                    self.budget = self.budget.saturating_sub(step.inflated);
                }
                Err(fault) => self.found = Some(fault),
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if let Some(mut inflow) = self.inflow.take() {
            let result = self.read_inflated(&mut inflow, bytes);
            self.inflow = Some(inflow);
            return result;
        }
        let count = self.read_raw(bytes)?;
        self.frames += self.counter.feed(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }
}

impl Write for Socket {
    /// Takes one whole frame, which is how tungstenite writes when its own buffer has size 0.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.muted && self.out.push(bytes.into(), Kind::Live, self.limit).is_err() {
            self.overflow = true;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts websocket frames in a stream of bytes by reading their heads only (RFC 6455 section 5.2). Odoo's rate limit
/// counts every frame, fragments and control frames included.
#[derive(Default)]
struct FrameCounter {
    /// Bytes of the current head so far: at most 14 are needed.
    have: u8,
    /// Bytes of the extended length in the current head: 0, 2 or 8.
    extended: u8,
    need: u8,
    length: u64,
    /// Payload bytes still to be skipped.
    skip: u64,
}

impl FrameCounter {
    /// Returns how many heads were completed.
    fn feed(&mut self, mut bytes: &[u8]) -> usize {
        let mut frames = 0;
        loop {
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
            self.skip -= skipped as u64;
            let Some((byte, rest)) = bytes.get(skipped..).and_then(<[u8]>::split_first) else { return frames };
            bytes = rest;
            if self.head(*byte) {
                self.skip = self.length;
                self.have = 0;
                frames += 1;
            }
        }
    }

    /// Takes one byte of a head; true when it was the last.
    fn head(&mut self, byte: u8) -> bool {
        self.have += 1;
        if self.have == 1 {
            return false;
        }
        if self.have == 2 {
            self.extended = match byte & 0x7f {
                126 => 2,
                127 => 8,
                _ => 0,
            };
            self.length = if self.extended == 0 { u64::from(byte & 0x7f) } else { 0 };
            self.need = 2 + self.extended + if byte & 0x80 == 0 { 0 } else { 4 };
        } else if self.have <= 2 + self.extended {
            self.length = self.length << 8 | u64::from(byte);
        }
        self.have == self.need
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A masked frame of a client.
    fn frame(first: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![first];
        match length {
            0..=125 => bytes.push(0x80 | length as u8),
            126..=0xffff => {
                bytes.push(0x80 | 126);
                bytes.extend((length as u16).to_be_bytes());
            }
            _ => {
                bytes.push(0x80 | 127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend([1, 2, 3, 4]);
        bytes.resize(bytes.len() + length, 0x81);
        bytes
    }

    #[test]
    fn frames_are_counted_however_they_are_cut() {
        let lengths = [0, 1, 125, 126, 127, 0xffff, 0x10000, 0];
        let bytes: Vec<u8> = lengths.iter().flat_map(|length| frame(0x81, *length)).collect();
        for chunk in [1, 2, 3, 7, 2048, bytes.len()] {
            let mut counter = FrameCounter::default();
            let count: usize = bytes.chunks(chunk).map(|chunk| counter.feed(chunk)).sum();
            assert_eq!(count, lengths.len(), "cut every {chunk} bytes");
        }
    }

    #[test]
    fn unmasked_frames_and_giants_do_no_harm() {
        let mut counter = FrameCounter::default();
        assert_eq!(counter.feed(&[0x89, 0, 0x89, 0]), 2);
        assert_eq!(counter.feed(&[&[0x82, 0xff][..], &[0xff; 12], &[0; 100]].concat()), 1);
    }
}
