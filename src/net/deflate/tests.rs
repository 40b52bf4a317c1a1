//! What is agreed, what is sent compressed, and that nothing a client sends does more than close its connection.

use super::inflow::PACKED_MAX;
use super::*;
use crate::net::websocket::MESSAGE_MAX;
use flate2::{Decompress, FlushDecompress};
use proptest::prelude::*;

fn accept(headers: &[&str]) -> Option<String> {
    Agreement::accept(headers.iter().copied()).map(Agreement::answer)
}

/// Deflated, without the end of the flush.
fn packed(text: &[u8], level: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len() * 2 + 100);
    Compress::new(Compression::new(level), false).compress_vec(text, &mut bytes, FlushCompress::Sync).unwrap();
    bytes.strip_suffix(&FLUSH_END).unwrap().to_vec()
}

/// A masked frame of a client.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let frame = protocol::frame(first, payload);
    let (head, mask) = (frame.len() - payload.len(), [0xa5, 0x17, 0x5a, 0xff]);
    let mut bytes = frame[..head].to_vec();
    bytes[1] |= 0x80;
    bytes.extend(mask);
    bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

/// What tungstenite gets of these bytes, and how many frames were counted.
fn flows(bytes: &[u8], chunk: usize) -> Result<(Vec<u8>, usize), Fault> {
    let (mut inflow, mut got, mut frames) = (Inflow::default(), Vec::new(), 0);
    for chunk in bytes.chunks(chunk) {
        inflow.feed(chunk);
        while !inflow.is_dry() {
            let step = inflow.step()?;
            frames += step.frames;
            let mut place = [0; 1000];
            loop {
                match inflow.take(&mut place) {
                    0 => break,
                    count => got.extend_from_slice(&place[..count]),
                }
            }
        }
    }
    Ok((got, frames))
}

/// An inflated message as tungstenite gets it.
fn plain(opcode: u8, text: &[u8]) -> Vec<u8> {
    [&[0x80 | opcode, 0xff][..], &(text.len() as u64).to_be_bytes(), &[0; 4], text].concat()
}

fn assert_flows(bytes: &[u8], expected: &[u8], frames: usize) {
    for chunk in [1, 2, 3, 7, 1024, usize::MAX] {
        assert_eq!(flows(bytes, chunk), Ok((expected.to_vec(), frames)), "cut every {chunk} bytes");
    }
}

fn assert_fault(bytes: &[u8], fault: Fault) {
    for chunk in [1, 1000, usize::MAX] {
        assert_eq!(flows(bytes, chunk).map(|(got, _)| got.len()), Err(fault), "cut every {chunk} bytes");
    }
}

/// Deflates badly.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn offers_are_accepted_by_the_table() {
    let both = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
    for offer in [
        "permessage-deflate",
        "permessage-deflate; client_max_window_bits",
        "permessage-deflate; client_max_window_bits=8",
        "permessage-deflate;client_max_window_bits = \"15\"; server_no_context_takeover",
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
        "x-webkit-deflate-frame, permessage-deflate",
        "permessage-deflate; what_is_this, permessage-deflate",
        "other; text=\"a, b; c\" ,\tpermessage-deflate\t",
    ] {
        assert_eq!(accept(&[offer]).as_deref(), Some(both), "{offer}");
    }
    for offer in [
        "",
        ",;=,",
        "permessage-deflate2",
        "Permessage-Deflate",
        "permessage-deflate; ",
        "permessage-deflate; server_no_context_takeover=1",
        "permessage-deflate; client_no_context_takeover=\"\"",
        "permessage-deflate; server_no_context_takeover; server_no_context_takeover",
        "permessage-deflate; server_max_window_bits",
        "permessage-deflate; server_max_window_bits=7",
        "permessage-deflate; server_max_window_bits=16",
        "permessage-deflate; server_max_window_bits=09",
        "permessage-deflate; server_max_window_bits=+9",
        "permessage-deflate; server_max_window_bits=9; server_max_window_bits=9",
        "permessage-deflate; client_max_window_bits=",
        "permessage-deflate; client_max_window_bits=16",
        "permessage-deflate; client_max_window_bits; client_max_window_bits=9",
        "other; text=\"a, permessage-deflate, b\"",
    ] {
        assert_eq!(accept(&[offer]), None, "{offer}");
    }
}

#[test]
fn the_first_acceptable_offer_counts_and_its_window_is_kept_to() {
    let answer = accept(&[
        "permessage-deflate; server_max_window_bits=16",
        "permessage-deflate; server_max_window_bits=11, permessage-deflate",
    ]);
    let with = "permessage-deflate; server_no_context_takeover; client_no_context_takeover; server_max_window_bits=11";
    assert_eq!(answer.as_deref(), Some(with));
    let text = |len| protocol::frame(0x81, &vec![b'x'; len]);
    let narrow = Agreement { window_bits: Some(11) };
    assert!(narrow.takes(&text(2048)), "no message refers further back than to its beginning");
    assert!(!narrow.takes(&text(2049)));
    for all in [None, Some(15)] {
        assert!(Agreement { window_bits: all }.takes(&text(1 << 17)), "DEFLATE refers no further back");
    }
}

#[test]
fn a_frame_has_a_twin_where_it_is_worth_while() {
    let frame = |text: &[u8]| protocol::frame(0x81, text);
    assert_eq!(twin(&frame(&[b'x'; WORTHWHILE - 1])), None);
    assert_eq!(twin(&frame(&noise(5000))), None, "it would become longer");
    for len in [WORTHWHILE, 2000, 70_000, 3_000_000] {
        let short = twin(&frame(&vec![b'x'; len])).unwrap();
        assert!(short[0] == 0xc1 && short.len() < len / 10, "{len} bytes became {}", short.len());
    }
}

#[test]
fn what_is_not_compressed_passes_as_it_came() {
    let bytes = [
        masked(0x81, b"text"),
        masked(0x82, &[0]),
        masked(0x01, &[b'x'; 126]),
        masked(0x89, b"ping"),
        masked(0x80, &[b'x'; 70_000]),
        masked(0x81, b""),
        masked(0x88, &[3, 0xe8]),
    ]
    .concat();
    assert_flows(&bytes, &bytes, 7);
}

#[test]
fn a_compressed_message_becomes_an_ordinary_one() {
    let text = br#"{"event_name":"subscribe","data":{"channels":["a","b","a"],"last":0}}"#;
    for level in [0, 1, 6, 9] {
        assert_flows(&masked(0xc1, &packed(text, level)), &plain(1, text), 1);
    }
    assert_flows(&masked(0xc2, &packed(text, 6)), &plain(2, text), 1);
}

#[test]
fn the_examples_of_the_rfc_are_understood() {
    for bytes in [
        &[0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00][..],
        &[0x00, 0x05, 0x00, 0xfa, 0xff, 0x48, 0x65, 0x6c, 0x6c, 0x6f, 0x00],
        &[0xf3, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00, 0x00],
        &[0xf2, 0x48, 0x05, 0x00, 0x00, 0x00, 0xff, 0xff, 0xca, 0xc9, 0xc9, 0x07, 0x00],
    ] {
        assert_flows(&masked(0xc1, bytes), &plain(1, b"Hello"), 1);
    }
}

#[test]
fn fragments_are_put_together_around_control_frames() {
    let (text, ping) = (b"a long message, a long message, a long message", masked(0x89, b"ping"));
    let bytes = packed(text, 6);
    let mut frames = vec![masked(0x41, &bytes[..1]), ping.clone(), masked(0, b"")];
    frames.extend(bytes[1..].chunks(3).map(|chunk| masked(0, chunk)));
    frames.push(masked(0x80, b""));
    let count = frames.len();
    assert_flows(&frames.concat(), &[ping, plain(1, text)].concat(), count);
}

#[test]
fn empty_messages_are_messages() {
    for bytes in [&b""[..], &[0], &[2, 0], &packed(b"", 6)] {
        let frame = masked(0xc1, bytes);
        assert_flows(&[frame.clone(), frame].concat(), &[plain(1, b""), plain(1, b"")].concat(), 2);
    }
}

#[test]
fn a_zero_byte_is_a_connection_check_compressed_or_not() {
    assert_flows(&masked(0xc2, &packed(&[0], 6)), &plain(2, &[0]), 1);
}

#[test]
fn a_message_may_end_with_a_last_block_but_not_go_on_after_it() {
    let mut last = Vec::with_capacity(1000);
    Compress::new(Compression::new(6), false).compress_vec(b"text", &mut last, FlushCompress::Finish).unwrap();
    assert_flows(&masked(0xc1, &last), &plain(1, b"text"), 1);
    last.push(0);
    assert_flows(&masked(0xc1, &last), &plain(1, b"text"), 1);
    for more in [&[0][..], &[1], &packed(b"more", 6), &[3, 0].repeat(100_000)] {
        assert_fault(&masked(0xc1, &[&last[..], more].concat()), Fault::Broken);
    }
}

#[test]
fn what_rsv1_must_not_be_on_is_left_to_tungstenite_to_refuse() {
    let begun = masked(0x41, &packed(b"text", 6));
    let no_mask = protocol::frame(0xc1, b"text").to_vec();
    for (before, frame) in [
        (&[][..], masked(0xc9, b"")),
        (&[], masked(0xc8, b"")),
        (&[], masked(0xc0, b"")),
        (&[], masked(0xc3, b"")),
        (&[], masked(0xe1, b"text")),
        (&[], masked(0xd1, b"text")),
        (&[], no_mask),
        (&begun, masked(0xc0, b"text")),
        (&begun, masked(0xca, b"")),
        (&begun, protocol::frame(0x80, b"text").to_vec()),
    ] {
        assert_flows(&[before, &frame].concat(), &frame, 1 + usize::from(!before.is_empty()));
    }
    let bytes = [masked(0x01, b"te"), masked(0xc1, &packed(b"text", 6))].concat();
    assert_flows(&bytes, &bytes, 2);
}

#[test]
fn a_message_inside_a_compressed_one_is_a_fault() {
    for first in [0x81, 0xc1, 0x02] {
        assert_fault(&[masked(0x41, b""), masked(first, b"")].concat(), Fault::Nested);
    }
}

#[test]
fn what_cannot_be_inflated_is_a_fault() {
    assert_fault(&masked(0xc1, &[7]), Fault::Broken);
    assert_fault(&masked(0xc1, b"no deflate"), Fault::Broken);
    let text = noise(300);
    // A stored block would take what is put after the message for its own.
    let whole = packed(b"a long message, a long message, the longest message", 6);
    for len in 1..whole.len() - 1 {
        let cut = flows(&masked(0xc1, &whole[..len]), usize::MAX);
        assert_eq!(cut, Err(Fault::Broken), "{len} of {} bytes", whole.len());
    }
    // Refers to what the message before it said.
    let mut compressor = Compress::new(Compression::new(6), false);
    let mut both = Vec::with_capacity(1000);
    compressor.compress_vec(&text, &mut both, FlushCompress::Sync).unwrap();
    let first = both.len();
    compressor.compress_vec(&text, &mut both, FlushCompress::Sync).unwrap();
    assert!(flows(&masked(0xc1, &both[..first - 4]), usize::MAX).is_ok());
    assert_fault(&masked(0xc1, &both[first..both.len() - 4]), Fault::Broken);
}

#[test]
fn a_message_inflates_to_a_mebibyte_and_no_further() {
    let whole = vec![b' '; MESSAGE_MAX];
    assert_eq!(flows(&masked(0xc1, &packed(&whole, 6)), 4096), Ok((plain(1, &whole), 1)));
    let hard = noise(MESSAGE_MAX);
    assert_eq!(flows(&masked(0xc1, &packed(&hard, 1)), 4096), Ok((plain(1, &hard), 1)));
    for len in [MESSAGE_MAX + 1, 8 << 20] {
        let bomb = masked(0xc1, &packed(&vec![b' '; len], 9));
        assert_eq!(flows(&bomb, 4096), Err(Fault::TooBig), "{len}");
    }
}

#[test]
fn a_bomb_keeps_no_more_than_a_message() {
    let bomb = masked(0x41, &packed(&vec![b' '; 8 << 20], 9));
    let mut inflow = Inflow::default();
    let mut inflated = 0;
    let fault = bomb.chunks(64).find_map(|chunk| {
        inflow.feed(chunk);
        inflow.step().map(|step| inflated += step.inflated).err()
    });
    assert_eq!(fault, Some(Fault::TooBig));
    assert!(inflated <= MESSAGE_MAX, "{inflated}");
}

#[test]
fn a_frame_too_long_to_inflate_is_refused_at_its_head() {
    let mut head = vec![0xc1, 0xff];
    head.extend((PACKED_MAX as u64 + 1).to_be_bytes());
    head.extend([0; 4]);
    assert_fault(&head, Fault::TooBig);
    head[2..10].fill(0xff);
    assert_fault(&head, Fault::TooBig);
    let half = [&[0x41, 0xff][..], &(PACKED_MAX as u64 / 2).to_be_bytes(), &[0; 4]].concat();
    let empty = [0, 0, 0, 0xff, 0xff].repeat(PACKED_MAX / 10);
    let filled = [&half[..], &empty, &vec![0; PACKED_MAX / 2 - empty.len()]].concat();
    assert!(flows(&filled, 4096).is_ok());
    let mut second = half;
    (second[0], second[9]) = (0x80, second[9] + 2);
    assert_eq!(flows(&[filled, second].concat(), 4096), Err(Fault::TooBig), "the sum of the fragments counts");
}

#[test]
fn a_step_ends_with_a_compressed_message() {
    let message = masked(0xc1, &packed(&[b' '; 1000], 6));
    let mut inflow = Inflow::default();
    inflow.feed(&[message.clone(), message].concat());
    assert_eq!(inflow.step(), Ok(inflow::Step { frames: 1, inflated: 1000 }));
    assert!(!inflow.is_dry());
    assert_eq!(inflow.step(), Ok(inflow::Step { frames: 1, inflated: 1000 }));
    assert!(inflow.is_dry());
}

#[test]
fn an_idle_connection_keeps_next_to_nothing() {
    let mut inflow = Inflow::default();
    inflow.feed(&masked(0xc1, &packed(&[b' '; 1000], 6)));
    inflow.step().unwrap();
    while inflow.take(&mut [0; 100]) > 0 {}
    assert_eq!(inflow.kept(), 0);
    assert!(size_of::<Inflow>() <= 160, "{}", size_of::<Inflow>());
}

fn texts() -> impl Strategy<Value = Vec<u8>> {
    let words = prop::collection::vec("[a-z]{1,6}|[0-9]{1,9}|\\{\"id\":", 0..500);
    prop_oneof![words.prop_map(|words| words.concat().into_bytes()), prop::collection::vec(any::<u8>(), 0..2000)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_twin_inflates_to_its_frame(text in texts()) {
        let frame = protocol::frame(0x81, &text);
        if let Some(twin) = twin(&frame) {
            prop_assert!(twin.len() < frame.len());
            let bytes = [payload(&twin), &FLUSH_END].concat();
            let mut inflated = Vec::with_capacity(text.len() + 1);
            Decompress::new(false).decompress_vec(&bytes, &mut inflated, FlushDecompress::Sync).unwrap();
            prop_assert_eq!(inflated, text);
        }
    }

    #[test]
    fn what_was_deflated_arrives_however_it_is_cut(
        text in texts(), level in 0..10u32, fragment in 1..3000usize, chunk in 1..5000usize,
    ) {
        let bytes = packed(&text, level);
        let count = bytes.chunks(fragment).count();
        let frames = bytes.chunks(fragment).enumerate().map(|(at, fragment)| {
            let first = if at == 0 { 0x41 } else { 0 } | if at + 1 == count { 0x80 } else { 0 };
            masked(first, fragment)
        });
        let frames = frames.collect::<Vec<_>>().concat();
        prop_assert_eq!(flows(&frames, chunk), Ok((plain(1, &text), count)));
    }

    #[test]
    fn noise_does_not_disturb(bytes in prop::collection::vec(any::<u8>(), 0..2000), chunk in 1..3000usize) {
        let _ = flows(&bytes, chunk);
        let _ = flows(&masked(0xc1, &bytes), chunk);
        let headed = [&[0xc1, 0xfe, 1, 0, 1, 2, 3, 4][..], &bytes].concat();
        let _ = flows(&headed, chunk);
    }

    #[test]
    fn agreeing_survives_anything(header in ".{0,200}|(permessage-deflate|;|,|=|\"|[a-z_]{1,30}| |[0-9]{1,3}){0,20}") {
        let _ = accept(&[&header]);
    }
}
