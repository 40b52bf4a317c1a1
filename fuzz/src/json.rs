//! The JSON scanner: it judges as serde_json does, and what it rewrites keeps its meaning.

use imbus::core::json::{self, DEPTH_MAX};
use serde::de::IgnoredAny;
use serde_json::Value;

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let ours = json::check(text).is_ok();
    // IgnoredAny knows no depth, and takes lone surrogates as we do.
    let theirs = serde_json::from_str::<IgnoredAny>(text).is_ok();
    assert!(ours == theirs || theirs && brackets(text) > DEPTH_MAX, "we say {ours}, serde_json {theirs}");
    let written = json::string(text);
    assert!(written.is_ascii());
    assert_eq!(serde_json::from_str::<String>(&written).expect("a string"), text);
    assert_eq!(json::check(&written), Ok(()));
    let compact = json::compact(text);
    assert_eq!(compact.is_ok(), ours);
    assert_eq!(json::elements(text).is_ok(), ours);
    let Ok(compact) = compact else { return };
    assert!(compact.is_ascii());
    assert_eq!(json::compact(&compact).as_ref(), Ok(&compact), "compact text is stable");
    if let Ok(value) = serde_json::from_str::<Value>(text) {
        assert_eq!(serde_json::from_str::<Value>(&compact).expect("the same value"), value);
    }
    elements(text, &compact);
    storable(text);
}

fn elements(text: &str, compact: &str) {
    let found = json::elements(text).expect("it was checked");
    assert_eq!(found.is_some(), compact.starts_with('['));
    let Some(found) = found else { return };
    found.iter().for_each(|element| assert_eq!(json::check(element), Ok(()), "{element}"));
    let joined = format!("[{}]", found.join(","));
    assert_eq!(json::elements(&joined), Ok(Some(found)));
    assert_eq!(json::compact(&joined).as_deref(), Ok(compact), "nothing is lost between the elements");
}

fn storable(text: &str) {
    let stored = json::for_jsonb(text);
    assert_eq!(json::check(&stored), Ok(()));
    assert_eq!(json::for_jsonb(&stored), stored, "once is enough");
    assert!(!has_escaped_nul(&stored), "{stored}");
}

fn has_escaped_nul(text: &str) -> bool {
    // A backslash before it may be escaped itself.
    text.replace(r"\\", "").contains(r"\u0000")
}

fn brackets(text: &str) -> usize {
    text.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count()
}
