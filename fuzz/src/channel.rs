//! Channels: one canonical text for all spellings of a value. The input is the database's name, a line feed, and JSON.

use imbus::core::channel::Channel;
use imbus::core::json;
use serde_json::Value;

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (database, text) = text.split_once('\n').unwrap_or(("demo", text));
    if let Ok(row) = Channel::from_row(text, database) {
        assert_eq!(Channel::from_row(&row.stored(database), database).as_ref(), Ok(&row));
        assert!(json::compact(text).is_ok());
    }
    if let Ok(plain) = Channel::plain(text) {
        assert_eq!(Channel::from_json(&json::string(text), database), Ok(plain));
    }
    let Ok(channel) = Channel::from_json(text, database) else { return };
    let canonical = channel.as_str();
    assert!(canonical.is_ascii());
    assert_eq!(json::compact(canonical).as_deref(), Ok(canonical), "it is Python's own spelling");
    let stored = channel.stored(database);
    assert_eq!(Channel::from_row(&stored, database).as_ref(), Ok(&channel), "it comes back from the table");
    assert_eq!(Channel::from_json(&stored, database).as_ref(), Ok(&channel), "and from a client");
    let Ok(value) = serde_json::from_str::<Value>(text) else { return };
    let other = Channel::from_json(&respelled(&value), database).expect("the same value in other words");
    assert_eq!(other, channel);
    assert_eq!(other.fingerprint(), channel.fingerprint());
    assert_ne!(channel.fingerprint(), 0);
}

/// The same value with white space, every character escaped, and numbers with a needless zero or exponent.
fn respelled(value: &Value) -> String {
    match value {
        Value::Array(elements) => {
            let elements: Vec<String> = elements.iter().map(respelled).collect();
            format!("\t[ {} ]\n", elements.join("\r,\n "))
        }
        Value::String(text) => {
            let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04X}")).collect();
            format!("\"{units}\"")
        }
        Value::Number(number) => {
            let number = number.to_string();
            match (number.contains(['e', 'E']), number.contains('.')) {
                (true, _) => number,
                (false, true) => format!("{number}0E+0"),
                (false, false) => format!("{number}.0"),
            }
        }
        other => other.to_string(),
    }
}
