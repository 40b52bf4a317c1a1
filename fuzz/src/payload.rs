//! NOTIFY payloads: what is split says the same in parts that are short enough. The first two bytes are the limit.

use imbus::core::error::Error;
use imbus::core::{json, payload};

pub fn run(data: &[u8]) {
    let Some((limit, text)) = data.split_first_chunk::<2>() else { return };
    let limit = usize::from(u16::from_le_bytes(*limit));
    let Ok(text) = std::str::from_utf8(text) else { return };
    let named = payload::databases(text);
    match payload::split(text, limit) {
        Ok(parts) => split(text, limit, &parts, named.ok()),
        Err(Error::PayloadTooLong { length, limit: told, .. }) => {
            assert!(length >= limit && told == limit && text.len() >= limit);
            if let Ok(Some(elements)) = json::elements(text) {
                let longest = elements.iter().map(|element| element.len()).max().unwrap_or(0);
                assert!(longest + 2 >= limit, "every element would have had room");
            }
        }
        Err(other) => panic!("{other:?}"),
    }
}

fn split(text: &str, limit: usize, parts: &[String], named: Option<Vec<String>>) {
    assert!(parts.iter().all(|part| part.len() < limit));
    if text.len() < limit {
        return assert_eq!(parts, [text]);
    }
    let whole = json::elements(text).expect("JSON").expect("an array");
    let pieces: Vec<&str> =
        parts.iter().flat_map(|part| json::elements(part).expect("JSON").expect("an array")).collect();
    assert_eq!(pieces, whole, "joined again it says the same");
    let Some(named) = named else { return };
    let mut again: Vec<String> = Vec::new();
    for name in parts.iter().flat_map(|part| payload::databases(part).expect("as good as the whole")) {
        if !again.contains(&name) {
            again.push(name);
        }
    }
    assert_eq!(again, named);
}
