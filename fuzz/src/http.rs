//! HTTP: what is answered does not depend on how the bytes come, and is HTTP. The first byte says how to cut.

use super::websocket::frames;
use super::{cut, world};
use imbus::core::json;
use imbus::net::testing::Head;

/// Beyond a head's longest it matters how the bytes come: 431 is the answer as soon as there are too many.
const LENGTH_MAX: usize = 8000;

pub fn run(data: &[u8]) {
    let Some((how, bytes)) = data.split_first() else { return };
    if bytes.len() > LENGTH_MAX {
        return;
    }
    head(bytes, *how);
    let whole = world().visit([bytes]).expect("a pair of sockets");
    assert!(whole.gone, "a connection ends with its client");
    responses(&whole.sent);
    let mut pieces = world().visit(cut(bytes, *how)).expect("a pair of sockets");
    // Who waits to be told to go on is told so only where the body is not there yet.
    let mut whole = whole;
    for visit in [&mut pieces, &mut whole] {
        without(&mut visit.sent, b"HTTP/1.1 100 Continue\r\n\r\n");
    }
    assert_eq!(pieces, whole);
}

/// The first head of the bytes: more of them change nothing in what was decided.
fn head(bytes: &[u8], how: u8) {
    let whole = world().head(bytes, false);
    let mut end = 0;
    for piece in cut(bytes, how) {
        end += piece.len();
        let so_far = world().head(&bytes[..end], false);
        assert!(so_far == Head::Partial || so_far == whole, "{so_far:?} became {whole:?}");
    }
    match &whole {
        Head::Partial => {}
        Head::Answered { consumed, skip, .. } => assert!(*consumed <= bytes.len() && *skip <= 1 << 20),
        Head::Asked { consumed } => assert!(*consumed <= bytes.len()),
        Head::Upgraded { consumed, response, .. } => {
            assert!(*consumed <= bytes.len() && response.starts_with(b"HTTP/1.1 101 "));
        }
    }
    let refused = world().head(bytes, true);
    assert!(
        !matches!(refused, Head::Upgraded { .. } | Head::Asked { .. } | Head::Answered { close: false, .. }),
        "nobody is let in"
    );
}

/// What was sent is a row of whole responses; after one that closes there is none, after a 101 come frames.
fn responses(mut sent: &[u8]) {
    while !sent.is_empty() {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let head = match response.parse(sent) {
            Ok(httparse::Status::Complete(_)) if response.code == Some(101) => return frames(sent),
            Ok(httparse::Status::Complete(length)) => length,
            other => panic!("no response but {other:?}: {:?}", String::from_utf8_lossy(sent)),
        };
        let find = |name: &str| response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        let closes = find("Connection").is_some_and(|header| header.value == b"close");
        let length = find("Content-Length").and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok());
        let is_json = find("Content-Type").is_some_and(|header| header.value == b"application/json");
        let rest = &sent[head..];
        let body: usize = length.unwrap_or(0);
        // The answer to a HEAD has the length of a body that does not follow.
        let is_head = rest.is_empty() && body > 0 || rest.starts_with(b"HTTP/1.1 ");
        let skip = if is_head { 0 } else { body };
        assert!(skip <= rest.len(), "the body is cut short");
        if is_json && !is_head {
            let body = std::str::from_utf8(&rest[..skip]).expect("UTF-8");
            assert_eq!(json::check(body), Ok(()), "{body}");
        }
        sent = &rest[skip..];
        assert!(!closes || sent.is_empty(), "something follows a response that closes");
    }
}

/// Takes all of these out of the bytes.
fn without(bytes: &mut Vec<u8>, what: &[u8]) {
    while let Some(at) = bytes.windows(what.len()).position(|window| window == what) {
        bytes.drain(at..at + what.len());
    }
}
