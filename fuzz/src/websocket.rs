//! A websocket from its first byte to its end: what is heard and sent does not depend on how the bytes come, and what
//! is sent is RFC 6455. The first byte says how to cut, the second what the handshake offers.

use super::{cut, token, world};
use imbus::core::json;
use imbus::net::testing::Heard;

pub fn run(data: &[u8]) {
    let Some(([how, offer], bytes)) = data.split_first_chunk::<2>() else { return };
    let extensions = match offer & 3 {
        0 | 1 => "",
        2 => "Sec-WebSocket-Extensions: permessage-deflate\r\n",
        _ => "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=9\r\n",
    };
    let request = format!(
        "GET /websocket?version=18.0-7&token={} HTTP/1.1\r\nHost: h\r\nOrigin: http://allowed\r\nUpgrade: websocket\r\n\
         Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{extensions}\r\n",
        token()
    );
    let whole = [request.as_bytes(), bytes].concat();
    let whole = world().visit([whole.as_slice()]).expect("a pair of sockets");
    assert!(whole.opened && whole.gone);
    for heard in &whole.heard {
        if let Heard::Subscribe { channels, last } = heard {
            assert!(*last >= 0 && json::check(channels).is_ok());
        }
    }
    frames(&whole.sent);
    let pieces = [request.as_bytes()].into_iter().chain(cut(bytes, *how));
    assert_eq!(world().visit(pieces).expect("a pair of sockets"), whole);
}

/// What was sent after the handshake is a row of whole unmasked frames that ends with a close at the latest.
pub fn frames(sent: &[u8]) {
    let end = sent.windows(4).position(|window| window == b"\r\n\r\n").expect("the handshake's end");
    assert!(sent.starts_with(b"HTTP/1.1 101 "));
    let mut rest = &sent[end + 4..];
    let mut closed = false;
    while let Some((first, tail)) = rest.split_first() {
        assert!(!closed, "a frame after the close");
        assert!(matches!(first, 0x88..=0x8a), "only pings, pongs and closes: nothing is published here");
        let (length, tail) = tail.split_first().expect("a length");
        assert!(*length <= 125, "control frames are short, and the server masks none");
        let (payload, tail) = tail.split_at_checked(usize::from(*length)).expect("the payload");
        if *first == 0x88 {
            closed = true;
            let code = payload.split_first_chunk::<2>().map(|(code, _)| u16::from_be_bytes(*code));
            assert!(payload.is_empty() || code.is_some(), "half a code");
            assert!(payload.get(2..).is_none_or(|reason| std::str::from_utf8(reason).is_ok()));
        }
        rest = tail;
    }
}
