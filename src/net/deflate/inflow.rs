//! What a client sends on a connection with permessage-deflate, on its way to tungstenite, which knows no extension:
//! compressed messages are taken out, inflated and put back as one ordinary masked frame; everything else passes as it
//! came, also what is wrong with it, for tungstenite to judge. A message is inflated as it arrives, so that the work of
//! a turn is bounded by what is read and by what comes of it; no more than a message's limit is ever kept.

use crate::net::websocket::MESSAGE_MAX;
use flate2::{Decompress, FlushDecompress, Status};

/// The longest head of a masked frame, in bytes.
const HEAD_MAX: usize = 14;

/// The longest compressed message, in bytes: what cannot be compressed becomes somewhat longer.
pub(super) const PACKED_MAX: usize = MESSAGE_MAX + MESSAGE_MAX / 8;

/// Unmasked at once, in bytes.
const CHUNK: usize = 1024;

/// Put after a message: what its sender took off (RFC 7692 section 7.2.2), then an empty last block. Only a message that
/// is whole lets that block end the stream.
const END: [u8; 6] = [0, 0, 0xff, 0xff, 3, 0];

/// Why the connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A message begins inside another one.
    Nested,
    /// What is said to be compressed is not.
    Broken,
    /// The message is longer than a message may be.
    TooBig,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Frames whose heads were read.
    pub frames: usize,
    /// Bytes that came out of compressed ones.
    pub inflated: usize,
}

/// The bytes of one connection between its socket and tungstenite.
#[derive(Default)]
pub struct Inflow {
    /// Read and not looked at yet; from `looked` on.
    raw: Vec<u8>,
    looked: usize,
    /// For tungstenite; from `taken` on.
    ready: Vec<u8>,
    taken: usize,
    head: [u8; HEAD_MAX],
    have: usize,
    payload: Payload,
    message: Message,
}

/// Of the current frame.
#[derive(Clone, Copy, Default)]
enum Payload {
    /// Its head is not complete.
    #[default]
    Unknown,
    /// So much of it is still to be passed on.
    Passed(u64),
    /// So much is still to be inflated; the next byte is masked by the first of these.
    Packed { left: u64, mask: [u8; 4], last: bool },
}

/// The data message that is under way.
#[derive(Default)]
enum Message {
    #[default]
    None,
    Plain,
    Packed(Box<Packed>),
}

impl Inflow {
    /// Takes in what the socket has sent.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.raw.extend_from_slice(bytes);
    }

    /// Whether everything that was fed has been looked at.
    pub fn is_dry(&self) -> bool {
        self.raw.is_empty()
    }

    /// Bytes that are allocated while nothing is under way.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.raw.capacity() + self.ready.capacity()
    }

    /// Hands on what is ready.
    pub fn take(&mut self, bytes: &mut [u8]) -> usize {
        let rest = self.ready.get(self.taken..).unwrap_or_default();
        let count = rest.len().min(bytes.len());
        for (to, from) in bytes.iter_mut().zip(rest) {
            *to = *from;
        }
        self.taken += count;
        if self.taken == self.ready.len() {
            (self.ready, self.taken) = (Vec::new(), 0);
        }
        count
    }

    /// Looks at what was fed, to its end or to the end of a compressed message.
    ///
    /// # Errors
    /// The connection is to be closed; there is nothing more to be had.
    pub fn step(&mut self) -> Result<Step, Fault> {
        let mut raw = std::mem::take(&mut self.raw);
        let result = self.look(raw.get(self.looked..).unwrap_or_default());
        let (step, left) = result?;
        self.looked = raw.len() - left;
        if left == 0 {
            (raw, self.looked) = (Vec::new(), 0);
        }
        self.raw = raw;
        Ok(step)
    }

    /// Returns how many bytes are left as well.
    fn look(&mut self, mut bytes: &[u8]) -> Result<(Step, usize), Fault> {
        let mut step = Step::default();
        loop {
            match self.payload {
                Payload::Unknown => {
                    let Some((byte, rest)) = bytes.split_first() else { return Ok((step, 0)) };
                    bytes = rest;
                    if self.is_head_complete(*byte) {
                        self.have = 0;
                        self.begin_frame()?;
                        step.frames += 1;
                    }
                }
                Payload::Passed(0) => self.payload = Payload::Unknown,
                Payload::Packed { left: 0, last, .. } => {
                    self.payload = Payload::Unknown;
                    if last {
                        step.inflated += self.end_message()?;
                        return Ok((step, bytes.len()));
                    }
                }
                Payload::Passed(_) | Payload::Packed { .. } if bytes.is_empty() => return Ok((step, 0)),
                Payload::Passed(left) => {
                    let (chunk, rest) = cut(bytes, left);
                    self.ready.extend_from_slice(chunk);
                    self.payload = Payload::Passed(left - chunk.len() as u64);
                    bytes = rest;
                }
                Payload::Packed { left, mask, last } => {
                    let (chunk, rest) = cut(bytes, left.min(CHUNK as u64));
                    step.inflated += self.inflate(chunk, mask)?;
                    let (left, mask) = (left - chunk.len() as u64, rotated(mask, chunk.len()));
                    self.payload = Payload::Packed { left, mask, last };
                    bytes = rest;
                }
            }
        }
    }

    /// Takes one byte of a head.
    fn is_head_complete(&mut self, byte: u8) -> bool {
        if let Some(place) = self.head.get_mut(self.have) {
            *place = byte;
        }
        self.have += 1;
        let [_, second, ..] = self.head;
        self.have >= 2 && self.have == head_len(second)
    }

    /// Decides what becomes of the frame whose head is complete.
    fn begin_frame(&mut self) -> Result<(), Fault> {
        let [first, second, ..] = self.head;
        let (is_last, reserved, opcode) = (first & 0x80 != 0, first & 0x70, first & 0x0f);
        let is_masked = second & 0x80 != 0;
        let is_data = opcode == 1 || opcode == 2;
        match &mut self.message {
            Message::None if is_data && reserved == 0x40 && is_masked => {
                self.message = Message::Packed(Box::new(Packed::new(opcode)));
                return self.begin_packed(is_last);
            }
            Message::None if is_data && !is_last => self.message = Message::Plain,
            Message::Plain if opcode == 0 && is_last => self.message = Message::None,
            Message::Packed(_) if opcode == 0 && reserved == 0 && is_masked => return self.begin_packed(is_last),
            Message::Packed(_) if is_data => return Err(Fault::Nested),
            _ => {}
        }
        let head = self.head.get(..head_len(second)).unwrap_or_default();
        self.ready.extend_from_slice(head);
        self.payload = Payload::Passed(self.length());
        Ok(())
    }

    fn begin_packed(&mut self, last: bool) -> Result<(), Fault> {
        let left = self.length();
        let Message::Packed(packed) = &mut self.message else { return Ok(()) };
        packed.size = packed.size.saturating_add(usize::try_from(left).unwrap_or(usize::MAX));
        if packed.size > PACKED_MAX {
            return Err(Fault::TooBig);
        }
        let [_, second, ..] = self.head;
        let head = self.head.get(..head_len(second)).unwrap_or_default();
        let mask = head.last_chunk().copied().unwrap_or_default();
        self.payload = Payload::Packed { left, mask, last };
        Ok(())
    }

    /// The length of the current frame's payload.
    fn length(&self) -> u64 {
        let [_, second, a, b, c, d, e, f, g, h, ..] = self.head;
        match second & 0x7f {
            126 => u64::from(u16::from_be_bytes([a, b])),
            127 => u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            length => u64::from(length),
        }
    }

    fn inflate(&mut self, masked: &[u8], mask: [u8; 4]) -> Result<usize, Fault> {
        let Message::Packed(packed) = &mut self.message else { return Ok(0) };
        let mut bytes = [0; CHUNK];
        for ((to, from), mask) in bytes.iter_mut().zip(masked).zip(mask.iter().cycle()) {
            *to = from ^ mask;
        }
        packed.inflate(bytes.get(..masked.len()).unwrap_or_default())
    }

    /// Puts the message back as one frame, masked with zeros.
    fn end_message(&mut self) -> Result<usize, Fault> {
        let Message::Packed(mut packed) = std::mem::take(&mut self.message) else { return Ok(0) };
        let inflated = packed.end()?;
        let text = &packed.text;
        self.ready.reserve_exact(HEAD_MAX + text.len());
        self.ready.extend_from_slice(&[0x80 | packed.opcode, 0x80 | 127]);
        self.ready.extend_from_slice(&(text.len() as u64).to_be_bytes());
        self.ready.extend_from_slice(&[0; 4]);
        self.ready.extend_from_slice(text);
        Ok(inflated)
    }
}

/// The length of a head with this second byte.
fn head_len(second: u8) -> usize {
    let extended = match second & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    2 + extended + if second & 0x80 == 0 { 0 } else { 4 }
}

fn cut(bytes: &[u8], at: u64) -> (&[u8], &[u8]) {
    bytes.split_at(usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len()))
}

fn rotated(mut mask: [u8; 4], by: usize) -> [u8; 4] {
    mask.rotate_left(by % 4);
    mask
}

/// A compressed message on its way. To make it takes half a microsecond and 50 KiB, which are gone when it has come.
struct Packed {
    opcode: u8,
    inflater: Decompress,
    /// Bytes of its frames so far, the current one's in advance.
    size: usize,
    text: Vec<u8>,
    /// What came after a block that says it is the last.
    after: Option<Vec<u8>>,
}

impl Packed {
    fn new(opcode: u8) -> Packed {
        Packed { opcode, inflater: Decompress::new(false), size: 0, text: Vec::new(), after: None }
    }

    /// Returns how many bytes came of these.
    fn inflate(&mut self, mut bytes: &[u8]) -> Result<usize, Fault> {
        let before = self.text.len();
        while self.after.is_none() {
            self.make_room()?;
            let looked = self.inflater.total_in();
            let status = self.inflater.decompress_vec(bytes, &mut self.text, FlushDecompress::Sync);
            let looked = usize::try_from(self.inflater.total_in() - looked).unwrap_or(usize::MAX);
            bytes = bytes.get(looked..).unwrap_or_default();
            match status.map_err(|_| Fault::Broken)? {
                Status::StreamEnd => self.after = Some(Vec::new()),
                // With room left there is nothing more to come of it.
                Status::Ok | Status::BufError if self.text.len() < self.text.capacity() => break,
                Status::Ok | Status::BufError => {}
            }
        }
        if let Some(after) = &mut self.after {
            after.extend_from_slice(bytes);
            if after.len() > 1 + END.len() {
                return Err(Fault::Broken);
            }
        }
        Ok(self.text.len() - before)
    }

    /// There is room for one byte more than a message may have, so that it is seen when one is longer.
    fn make_room(&mut self) -> Result<(), Fault> {
        let len = self.text.len();
        if len > MESSAGE_MAX {
            return Err(Fault::TooBig);
        }
        if len == self.text.capacity() {
            self.text.reserve_exact(len.max(CHUNK).min(MESSAGE_MAX + 1 - len));
        }
        Ok(())
    }

    /// The message is whole: checks that it is. A message may end with a last block; then nothing follows but the byte
    /// that stands for the block after it (section 7.2.3.4).
    fn end(&mut self) -> Result<usize, Fault> {
        if self.size == 0 {
            // Not quite what section 7.2.3.6 makes of an empty message; zlib lets it pass, and so the peers do.
            return Ok(0);
        }
        let inflated = self.inflate(&END)?;
        if self.text.len() > MESSAGE_MAX {
            return Err(Fault::TooBig);
        }
        match self.after.as_deref() {
            Some([]) => Ok(inflated),
            Some(after) if after == END || after.strip_prefix(&[0]) == Some(&END) => Ok(inflated),
            _ => Err(Fault::Broken),
        }
    }
}
