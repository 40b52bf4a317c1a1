//! A connection's bounded outbound queue: whole frames, shared with everybody else they go to, in the order they will
//! be written. Decides when a connection is too slow; knows nothing of what is in the frames.

use crate::core::protocol::Frame;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Write};

/// Frames handed to the kernel at once.
const SLICES: usize = 64;

/// Written to one socket in one turn, in bytes; then the others have theirs.
const TURN: usize = 1 << 20;

/// What a frame counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Counts against the limit.
    Live,
    /// A replay or a last word: goes in whatever waits already.
    Exempt,
}

/// The queue is over its limit: the peer reads too slowly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// All is written.
    Empty,
    /// The socket takes no more for now.
    Blocked,
    /// Enough for this turn.
    Paused,
}

/// The queue.
#[derive(Debug, Default)]
pub struct Outbound {
    frames: VecDeque<(Frame, Kind)>,
    /// Bytes of the first frame that are written already.
    written: usize,
    bytes: usize,
    live: usize,
}

impl Outbound {
    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes - self.written
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Adds a frame. One is taken whatever its size when no other live one waits.
    pub fn push(&mut self, frame: Frame, kind: Kind, limit: usize) -> Result<(), Full> {
        if kind == Kind::Live {
            if self.live > 0 && self.live.saturating_add(frame.len()) > limit {
                return Err(Full);
            }
            self.live += frame.len();
        }
        self.bytes += frame.len();
        self.frames.push_back((frame, kind));
        Ok(())
    }

    /// Drops what the peer has not begun to receive.
    pub fn cut(&mut self) {
        self.frames.truncate(usize::from(self.written > 0));
        self.bytes = self.frames.iter().map(|(frame, _)| frame.len()).sum();
        self.live = self.frames.iter().filter(|(_, kind)| *kind == Kind::Live).map(|(frame, _)| frame.len()).sum();
    }

    /// Writes what the socket takes. Returns how it ended and how many bytes went.
    ///
    /// # Errors
    /// The socket's, but for "would block".
    pub fn write_to(&mut self, socket: &mut impl Write) -> io::Result<(Flow, usize)> {
        let mut total = 0;
        while !self.frames.is_empty() {
            if total >= TURN {
                return Ok((Flow::Paused, total));
            }
            match self.write_some(socket) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    total += count;
                    self.advance(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok((Flow::Blocked, total)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.frames.capacity() > SLICES {
            self.frames = VecDeque::new();
        }
        Ok((Flow::Empty, total))
    }

    fn write_some(&self, socket: &mut impl Write) -> io::Result<usize> {
        if let (1, Some((frame, _))) = (self.frames.len(), self.frames.front()) {
            // Most often there is one, and one needs no list.
            return socket.write(frame.get(self.written..).unwrap_or_default());
        }
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut skip = self.written;
        let mut count = 0;
        for (slice, (frame, _)) in slices.iter_mut().zip(&self.frames) {
            *slice = IoSlice::new(frame.get(std::mem::take(&mut skip)..).unwrap_or_default());
            count += 1;
        }
        socket.write_vectored(slices.get(..count).unwrap_or_default())
    }

    fn advance(&mut self, count: usize) {
        self.written += count;
        while let Some((frame, kind)) = self.frames.front() {
            if self.written < frame.len() {
                return;
            }
            self.written -= frame.len();
            self.bytes -= frame.len();
            if *kind == Kind::Live {
                self.live -= frame.len();
            }
            self.frames.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes `room` bytes, then blocks.
    struct Narrow {
        taken: Vec<u8>,
        room: usize,
    }

    impl Write for Narrow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.room);
            if count == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.room -= count;
            self.taken.extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn frame(text: &str) -> Frame {
        text.as_bytes().into()
    }

    #[test]
    fn order_is_kept_through_partial_writes() {
        let mut queue = Outbound::default();
        for text in ["one", "two", "three"] {
            queue.push(frame(text), Kind::Live, 100).unwrap();
        }
        let mut socket = Narrow { taken: Vec::new(), room: 4 };
        assert_eq!(queue.write_to(&mut socket).unwrap(), (Flow::Blocked, 4));
        assert_eq!(queue.len(), 7);
        socket.room = 100;
        assert_eq!(queue.write_to(&mut socket).unwrap(), (Flow::Empty, 7));
        assert_eq!(socket.taken, b"onetwothree");
        assert_eq!((queue.len(), queue.live), (0, 0));
    }

    #[test]
    fn an_empty_queue_takes_one_frame_of_any_size() {
        let mut queue = Outbound::default();
        assert_eq!(queue.push(frame("a long frame"), Kind::Live, 3), Ok(()));
        assert_eq!(queue.push(frame("x"), Kind::Live, 3), Err(Full));
        assert_eq!(queue.push(frame("close"), Kind::Exempt, 3), Ok(()));
    }

    #[test]
    fn a_replay_does_not_count() {
        let mut queue = Outbound::default();
        queue.push(frame("a long replay"), Kind::Exempt, 3).unwrap();
        queue.push(frame("abc"), Kind::Live, 3).unwrap();
        assert_eq!(queue.push(frame("d"), Kind::Live, 3), Err(Full));
    }

    #[test]
    fn cutting_keeps_what_was_begun() {
        let mut queue = Outbound::default();
        queue.push(frame("one"), Kind::Live, 100).unwrap();
        queue.push(frame("two"), Kind::Live, 100).unwrap();
        let mut socket = Narrow { taken: Vec::new(), room: 1 };
        queue.write_to(&mut socket).unwrap();
        queue.cut();
        assert_eq!((queue.len(), queue.live), (2, 3));
        queue.cut();
        socket.room = 100;
        queue.write_to(&mut socket).unwrap();
        assert_eq!(socket.taken, b"one");
    }
}
