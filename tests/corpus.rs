//! Every file of the fuzz targets' corpus goes through its target (fuzz/), on stable Rust: what was found once stays
//! found. Needs feature `testing`.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::fs;
use std::panic::catch_unwind;
use std::path::PathBuf;

/// Gives a target all files of its corpus.
fn replay(target: &str, run: fn(&[u8])) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        assert!(catch_unwind(|| run(&bytes)).is_ok(), "{}", path.display());
        count += 1;
    }
    assert!(count > 0, "{} is empty", folder.display());
}

#[test]
fn the_corpus_holds_for_channels() {
    replay("channel", targets::channel::run);
}

#[test]
fn the_corpus_holds_for_http() {
    replay("http", targets::http::run);
}

#[test]
fn the_corpus_holds_for_json() {
    replay("json", targets::json::run);
}

#[test]
fn the_corpus_holds_for_links() {
    replay("link", targets::link::run);
}

#[test]
fn the_corpus_holds_for_payloads() {
    replay("payload", targets::payload::run);
}

#[test]
fn the_corpus_holds_for_the_protocol() {
    replay("protocol", targets::protocol::run);
}

#[test]
fn the_corpus_holds_for_tokens() {
    replay("token", targets::token::run);
}

#[test]
fn the_corpus_holds_for_websockets() {
    replay("websocket", targets::websocket::run);
}
