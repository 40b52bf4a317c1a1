//! The link's decoder: messages are the same however their bytes are cut, and survive being sent on. The first byte
//! says how to cut, the second who speaks.

use super::cut;
use imbus::core::link::{Command, Decoder, Event, Malformed, encode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

pub fn run(data: &[u8]) {
    let Some(([how, who], bytes)) = data.split_first_chunk::<2>() else { return };
    if who & 1 == 0 {
        speak::<Event>(*how, bytes);
    } else {
        speak::<Command>(*how, bytes);
    }
}

fn speak<T: Serialize + DeserializeOwned + Debug + PartialEq>(how: u8, bytes: &[u8]) {
    let whole = decode::<T>(&[bytes]);
    assert_eq!(decode::<T>(&cut(bytes, how)), whole, "cut otherwise");
    let sent: Vec<Vec<u8>> = whole.0.iter().map(|message| encode(message).expect("as short as it came")).collect();
    let sent: Vec<&[u8]> = sent.iter().map(Vec::as_slice).collect();
    assert_eq!(decode::<T>(&sent), (whole.0, Ok(())), "sent on");
}

/// The messages up to the end, or to what is none.
fn decode<T: DeserializeOwned>(pieces: &[&[u8]]) -> (Vec<T>, Result<(), Malformed>) {
    let (mut decoder, mut found) = (Decoder::default(), Vec::new());
    for piece in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next() {
                Ok(Some(message)) => found.push(message),
                Ok(None) => break,
                Err(error) => return (found, Err(error)),
            }
        }
    }
    (found, Ok(()))
}
