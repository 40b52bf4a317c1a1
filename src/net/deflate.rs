//! permessage-deflate (RFC 7692): what of an offer is accepted, and the compressed twin of a frame. Neither side keeps
//! a context from one message to the next, so a message is compressed once for everybody it goes to, and an idle
//! connection keeps neither window nor tables. What arrives is [`inflow`]'s. Knows no sockets.

mod inflow;

use crate::core::protocol::{self, Frame};
use flate2::{Compress, Compression, FlushCompress};
use std::cell::RefCell;

pub use inflow::{Fault, Inflow};

/// The extension's name.
const NAME: &str = "permessage-deflate";

/// Texts shorter than this, in bytes, go out as they are: in one packet either way, and little would be saved
/// (docs/benchmarks.md).
const WORTHWHILE: usize = 1024;

/// How hard to compress. The next level takes twice the time for a fifth off what is left (docs/benchmarks.md).
const LEVEL: u32 = 1;

/// The window of the compressor, the greatest there is: 32 KiB.
const WINDOW_BITS: u8 = 15;

/// Ends what a flush has written and is not sent (RFC 7692 section 7.2.1).
const FLUSH_END: [u8; 4] = [0, 0, 0xff, 0xff];

/// FIN, RSV1 and the opcode of text: the first byte of a compressed message in one frame.
const COMPRESSED_TEXT: u8 = 0xc1;

/// A connection that understands compressed messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// `server_max_window_bits`, where the client asks for it: so far back, as a power of two, may a message refer.
    /// Instead of compressing anew for each window, messages that are longer than it go out as they are.
    window_bits: Option<u8>,
}

impl Agreement {
    /// The first acceptable offer in the values of `Sec-WebSocket-Extensions`.
    pub fn accept<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Agreement> {
        headers.flat_map(|header| split(header, ',')).find_map(Agreement::from_offer)
    }

    /// An offer with a parameter that is unknown, twice there or has no valid value is declined (section 7.1). Of
    /// `client_max_window_bits` nothing has to be said: the client may use any window, all of them are understood.
    fn from_offer(offer: &str) -> Option<Agreement> {
        let mut parts = split(offer, ';');
        if parts.next() != Some(NAME) {
            return None;
        }
        let (mut seen, mut window_bits) = (Vec::new(), None);
        for part in parts {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name.trim_end(), Some(unquoted(value.trim_start()))),
                None => (part, None),
            };
            match (name, value) {
                ("server_no_context_takeover" | "client_no_context_takeover" | "client_max_window_bits", None) => {}
                ("client_max_window_bits", Some(value)) => _ = bits(value)?,
                ("server_max_window_bits", Some(value)) => window_bits = Some(bits(value)?),
                _ => return None,
            }
            if seen.contains(&name) {
                return None;
            }
            seen.push(name);
        }
        Some(Agreement { window_bits })
    }

    /// The value of `Sec-WebSocket-Extensions` in the answer.
    pub fn answer(self) -> String {
        let bits = self.window_bits.map(|bits| format!("; server_max_window_bits={bits}")).unwrap_or_default();
        format!("{NAME}; server_no_context_takeover; client_no_context_takeover{bits}")
    }

    /// Whether the compressed twin of this frame is for this client.
    pub fn takes(self, frame: &Frame) -> bool {
        self.window_bits.is_none_or(|bits| bits == WINDOW_BITS || payload(frame).len() <= 1 << bits)
    }
}

/// Cuts at separators outside quotes, and trims the pieces.
fn split(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut is_quoted = false;
    let cut = move |char| {
        is_quoted ^= char == '"';
        char == separator && !is_quoted
    };
    text.split(cut).map(|piece| piece.trim_matches([' ', '\t']))
}

fn unquoted(value: &str) -> &str {
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

/// 8 to 15, without leading zeros (section 7.1.2).
fn bits(value: &str) -> Option<u8> {
    (8..=WINDOW_BITS).find(|bits: &u8| bits.to_string() == value)
}

/// What an unmasked frame carries.
fn payload(frame: &Frame) -> &[u8] {
    let head = match frame.get(1) {
        Some(126) => 4,
        Some(127) => 10,
        _ => 2,
    };
    frame.get(head..).unwrap_or_default()
}

thread_local! {
    /// A compressor takes some 300 KiB and 40 µs to make, 2 µs to use again.
    static COMPRESSOR: RefCell<Compress> = RefCell::new(Compress::new(Compression::new(LEVEL), false));
}

/// The same message compressed; None when that is not worth while. `frame` is a text frame of our own.
pub fn twin(frame: &Frame) -> Option<Frame> {
    let text = payload(frame);
    if text.len() < WORTHWHILE {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len());
    COMPRESSOR.with_borrow_mut(|compressor| {
        compressor.reset();
        compressor.compress_vec(text, &mut bytes, FlushCompress::Sync).ok()
    })?;
    // What does not end like this did not fit: it has become longer.
    let packed = bytes.strip_suffix(&FLUSH_END).filter(|_| bytes.len() < bytes.capacity())?;
    Some(protocol::frame(COMPRESSED_TEXT, packed))
}

#[cfg(test)]
mod tests;
