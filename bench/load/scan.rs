//! What a socket receives: counts notifications without taking them apart. Every notification of this load carries one
//! [`MARK`] and its number; nothing else in its text does.

/// Begins a notification's number.
pub const MARK: u8 = b'~';

/// Digits of the number.
pub const DIGITS: usize = 8;

/// Reads the frames of one socket, however they are cut.
#[derive(Debug, Default)]
pub struct Scan {
    head: [u8; 10],
    have: usize,
    /// Payload bytes still to come.
    remaining: u64,
    opcode: u8,
}

/// What one read brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Notifications.
    pub notifications: u64,
    /// Pings to be answered.
    pub pings: u32,
    /// A close frame came.
    pub closed: bool,
}

impl Scan {
    /// Takes what one read brought. `texts` sees the payload of text frames.
    pub fn feed(&mut self, mut bytes: &[u8], mut texts: impl FnMut(&[u8])) -> Found {
        let mut found = Found::default();
        while !bytes.is_empty() {
            if self.remaining == 0 {
                bytes = self.head(bytes, &mut found);
                continue;
            }
            let (payload, rest) = bytes.split_at(bytes.len().min(self.remaining as usize));
            if self.opcode <= 2 {
                found.notifications += payload.iter().filter(|byte| **byte == MARK).count() as u64;
                texts(payload);
            }
            self.remaining -= payload.len() as u64;
            bytes = rest;
        }
        found
    }

    /// Takes bytes of a frame's head; returns the rest.
    fn head<'a>(&mut self, bytes: &'a [u8], found: &mut Found) -> &'a [u8] {
        let need = match (self.have, self.head[1] & 0x7f) {
            (0 | 1, _) => 2,
            (_, 126) => 4,
            (_, 127) => 10,
            _ => 2,
        };
        let (taken, rest) = bytes.split_at(bytes.len().min(need - self.have));
        self.head[self.have..self.have + taken.len()].copy_from_slice(taken);
        self.have += taken.len();
        let length = match self.head[1] & 0x7f {
            126 if self.have == 4 => u64::from(u16::from_be_bytes([self.head[2], self.head[3]])),
            127 if self.have == 10 => self.head[2..].iter().fold(0, |length, byte| length << 8 | u64::from(*byte)),
            short @ 0..=125 if self.have == 2 => u64::from(short),
            _ => return rest,
        };
        self.opcode = self.head[0] & 0x0f;
        self.remaining = length;
        self.have = 0;
        found.pings += u32::from(self.opcode == 9);
        found.closed |= self.opcode == 8;
        rest
    }
}

/// Checks on one socket that every number comes once and in order.
#[derive(Debug, Default)]
pub struct Order {
    text: Vec<u8>,
    next: u64,
}

impl Order {
    /// Takes text of notifications.
    ///
    /// # Errors
    /// A number is not the next one.
    pub fn feed(&mut self, text: &[u8]) -> Result<(), String> {
        self.text.extend_from_slice(text);
        let mut done = 0;
        while let Some(at) = self.text[done..].iter().position(|byte| *byte == MARK).map(|at| done + at + 1) {
            let Some(digits) = self.text.get(at..at + DIGITS) else { break };
            let number = String::from_utf8_lossy(digits);
            if number.parse() != Ok(self.next) {
                return Err(format!("received {number} in place of {}", self.next));
            }
            self.next += 1;
            done = at + DIGITS;
        }
        // A mark whose number is cut stays.
        let keep = self.text[done..].iter().position(|byte| *byte == MARK).map_or(self.text.len(), |at| done + at);
        self.text.drain(..keep);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<u8> {
        let mut bytes = vec![0x89, 0];
        for (first, length) in [(0x81, 100), (0x81, 200), (0x81, 70_000)] {
            let text: Vec<u8> = format!("~{:08}", length).bytes().chain(std::iter::repeat(b'x')).take(length).collect();
            bytes.extend(crate::publish::frame(first, &text));
        }
        bytes
    }

    #[test]
    fn notifications_are_counted_however_frames_are_cut() {
        let bytes = frames();
        for chunk in [1, 2, 3, 64, bytes.len()] {
            let mut scan = Scan::default();
            let found: Vec<Found> = bytes.chunks(chunk).map(|chunk| scan.feed(chunk, |_| ())).collect();
            assert_eq!(found.iter().map(|found| found.notifications).sum::<u64>(), 3, "cut every {chunk} bytes");
            assert_eq!(found.iter().map(|found| found.pings).sum::<u32>(), 1);
        }
    }

    #[test]
    fn a_number_left_out_is_noticed() {
        let mut order = Order::default();
        assert_eq!(order.feed(b"[~00000000,~0000"), Ok(()));
        assert_eq!(order.feed(b"0001]"), Ok(()));
        assert!(order.feed(b"[~00000003]").is_err());
    }
}
