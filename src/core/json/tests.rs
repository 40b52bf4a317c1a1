//! What Python itself writes is compared in tests/python_json.rs; serde_json is the second opinion here.

use super::*;
use proptest::prelude::*;
use serde::de::IgnoredAny;

fn refused(text: &str) -> (&'static str, usize) {
    match check(text) {
        Err(Error::Json { reason, at, .. }) => (reason, at),
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn faults_are_named_with_their_place() {
    let cases = [
        ("", "the text ends too early", 0),
        (" \n", "the text ends too early", 2),
        ("[1", "the text ends too early", 2),
        (r#"{"a""#, "the text ends too early", 4),
        ("[1]]", "there is text after the value", 3),
        ("1 2", "there is text after the value", 2),
        ("01", "there is text after the value", 1),
        ("truefalse", "there is text after the value", 4),
        ("[1}", "the closing bracket is of the wrong kind", 2),
        ("{]", "the closing bracket is of the wrong kind", 1),
        ("[1 2]", "a comma or a closing bracket is expected", 3),
        ("[1,]", "a value is expected", 3),
        ("[,1]", "a value is expected", 1),
        ("]", "a value is expected", 0),
        (r#"{"a":}"#, "a value is expected", 5),
        (r#"{"a":1,}"#, "a key in double quotes is expected", 7),
        ("{1:2}", "a key in double quotes is expected", 1),
        (r#"{"a" 1}"#, "a colon is expected", 5),
        ("-", "a digit is expected", 1),
        ("+1", "a value is expected", 0),
        (".5", "a value is expected", 0),
        ("1.", "a digit is expected after the point", 2),
        ("1e+", "a digit is expected in the exponent", 3),
        ("NaN", "a value is expected", 0),
        ("-Infinity", "a digit is expected", 1),
        ("nul", "a value is expected", 0),
        ("'a'", "a value is expected", 0),
        ("\u{feff}1", "a value is expected", 0),
        ("\u{a0}1", "a value is expected", 0),
        ("\"a", "the text ends within a string", 2),
        ("\"a\nb\"", "a control character in a string must be escaped", 2),
        ("\"\0\"", "a control character in a string must be escaped", 1),
        (r#""\x41""#, "there is no such escape", 1),
        (r#""\u12g4""#, "there is no such escape", 1),
        (r#""\u+123""#, "there is no such escape", 1),
        (r#""\u12"#, "there is no such escape", 1),
        ("\"\\u00é0\"", "there is no such escape", 1),
        ("\"\\", "there is no such escape", 1),
    ];
    for (text, reason, at) in cases {
        assert_eq!(refused(text), (reason, at), "{text:?}");
    }
}

#[test]
fn an_error_shows_at_most_the_beginning() {
    match check(&"[".repeat(100_000)) {
        Err(Error::Json { value, .. }) => assert_eq!(value, shown(&"[".repeat(100_000))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn nesting_is_bounded() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    assert_eq!(check(&nested(DEPTH_MAX)), Ok(()));
    assert_eq!(refused(&nested(DEPTH_MAX + 1)), ("arrays and objects are nested too deep", DEPTH_MAX));
    assert_eq!(refused(&r#"{"":"#.repeat(1_000_000)), ("arrays and objects are nested too deep", 4 * DEPTH_MAX));
}

#[test]
fn compact_writes_as_python_does() {
    let cases = [
        (" [ 1 , 2.50 , -0 , 1E+5 ] ", "[1,2.50,-0,1E+5]"),
        ("{ \"b\" : 1 ,\n\"a\" : [ ] , \"b\" : { } }", r#"{"b":1,"a":[],"b":{}}"#),
        (r#""\/\u002F\u0041\u00E9é""#, r#""//A\u00e9\u00e9""#),
        (r#""\u0008\u0009\u000A\u000c\u000D\u0022\u005C\u0000\u001F""#, r#""\b\t\n\f\r\"\\\u0000\u001f""#),
        ("\"\u{7e}\u{7f}\u{80}\u{2028}\u{ffff}\"", r#""~\u007f\u0080\u2028\uffff""#),
        ("\"\u{1f600}\"", r#""\ud83d\ude00""#),
        (r#""\uD83D\uDE00""#, r#""\ud83d\ude00""#),
        (r#""\uD83D""#, r#""\ud83d""#),
        (r#""\uDE00\uD83D x""#, r#""\ude00\ud83d x""#),
        (r#"{"é":"\\u0041"}"#, r#"{"\u00e9":"\\u0041"}"#),
        ("123456789012345678901234567890.000", "123456789012345678901234567890.000"),
        ("null", "null"),
    ];
    for (text, python) in cases {
        assert_eq!(compact(text).as_deref(), Ok(python), "{text}");
    }
}

#[test]
fn strings_are_written_as_python_does() {
    assert_eq!(string(""), r#""""#);
    assert_eq!(string("a/b'c"), r#""a/b'c""#);
    assert_eq!(string("\"\\\n\r\t\u{c}\u{8}\0\u{7f}é\u{1f600}"), r#""\"\\\n\r\t\f\b\u0000\u007f\u00e9\ud83d\ude00""#);
}

#[test]
fn elements_are_the_text_between_commas() {
    assert_eq!(elements("[]"), Ok(Some(vec![])));
    assert_eq!(elements(" [ \n ] "), Ok(Some(vec![])));
    assert_eq!(
        elements(r#" [ 1 , "a,]" , [ 2 , 3 ] ,{"k" : [4]} , null ] "#),
        Ok(Some(vec!["1", r#""a,]""#, "[ 2 , 3 ]", r#"{"k" : [4]}"#, "null"]))
    );
    for other in ["{}", r#"{"a":[1,2],"b":[3]}"#, "1", r#""[1]""#, "true"] {
        assert_eq!(elements(other), Ok(None), "{other}");
    }
    assert!(elements("[1,").is_err());
    assert!(elements("[1] 2").is_err());
}

#[test]
fn jsonb_gets_what_it_can_hold() {
    let cases = [
        (r#""a\u0000b""#, r#""a\ufffdb""#),
        (r#""\ud83d""#, r#""\ufffd""#),
        (r#""\ude00\ud83d""#, r#""\ufffd\ufffd""#),
        (r#""\ud83d\ud83d\ude00""#, r#""\ufffd\ud83d\ude00""#),
        (r#""\uD83Dx\uDE00""#, r#""\ufffdx\ufffd""#),
        (r#"{"\u0000":["\ud800", 1]}"#, r#"{"\ufffd":["\ufffd", 1]}"#),
        (r#"["\\u0000","\\\u0000"]"#, r#"["\\u0000","\\\ufffd"]"#),
        ("[1e131072, -1e131071, -1e131072]", r#"["\ufffd", -1e131071, "\ufffd"]"#),
        ("[-10.5e131070, 10.5e131071]", r#"[-10.5e131070, "\ufffd"]"#),
        ("[1e-16384, 1.5e-16382, 1e99999999999999999999]", r#"["\ufffd", 1.5e-16382, "\ufffd"]"#),
    ];
    for (text, held) in cases {
        assert_eq!(for_jsonb(text), held, "{text}");
    }
    for same in [r#"{"a":"\ud83d\ude00\u0001 é"}"#, "[1.5e3]", "", "\"\\", "[\"\\u0000"] {
        let unchanged = matches!(for_jsonb(same), Cow::Borrowed(text) if text == same);
        assert!(unchanged, "{same}");
    }
}

/// A piece of a string, spelled in some way, and as Python writes it.
fn piece() -> impl Strategy<Value = (String, String)> {
    let python = |unit: u16| match unit {
        0x22 | 0x5c => format!("\\{}", unit as u8 as char),
        0x20..=0x7e => (unit as u8 as char).to_string(),
        0x08 => "\\b".into(),
        0x09 => "\\t".into(),
        0x0a => "\\n".into(),
        0x0c => "\\f".into(),
        0x0d => "\\r".into(),
        _ => format!("\\u{unit:04x}"),
    };
    let units = prop_oneof![0u16..0x100, any::<u16>(), 0xd800u16..0xe000];
    let raw = any::<char>().prop_filter("must be escaped", |c| *c >= ' ' && *c != '"' && *c != '\\');
    let short = prop::sample::select(vec!["\\b", "\\t", "\\n", "\\f", "\\r", "\\\\", "\\\""]);
    prop_oneof![
        (units, any::<bool>()).prop_map(move |(unit, upper)| {
            (if upper { format!("\\u{unit:04X}") } else { format!("\\u{unit:04x}") }, python(unit))
        }),
        raw.prop_map(move |c| (c.into(), c.encode_utf16(&mut [0; 2]).iter().map(|unit| python(*unit)).collect())),
        short.prop_map(|text| (text.into(), text.into())),
        Just(("\\/".into(), "/".into())),
    ]
}

fn text() -> impl Strategy<Value = (String, String)> {
    prop::collection::vec(piece(), 0..8).prop_map(|pieces| {
        let (loose, python): (String, String) = pieces.into_iter().unzip();
        (format!("\"{loose}\""), format!("\"{python}\""))
    })
}

fn space() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["", "", " ", "\n\t", "\r\n "])
}

/// JSON spelled in some way, and as Python writes it.
pub(crate) fn value() -> impl Strategy<Value = (String, String)> {
    let same = |text: String| (text.clone(), text);
    let leaf = prop_oneof![
        prop::sample::select(vec!["null", "true", "false", "0", "-0"]).prop_map(move |text| same(text.into())),
        any::<i64>().prop_map(move |number| same(number.to_string())),
        "-?(0|[1-9][0-9]{0,40})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?".prop_map(same),
        text(),
    ];
    leaf.prop_recursive(6, 60, 6, |inner| {
        let padded = (space(), inner.clone(), space())
            .prop_map(|(a, (loose, python), b)| (format!("{a}{loose}{b}"), python))
            .boxed();
        let member = (space(), text(), space(), padded.clone())
            .prop_map(|(a, key, b, value)| (format!("{a}{}{b}:{}", key.0, value.0), format!("{}:{}", key.1, value.1)));
        let joined = |parts: Vec<(String, String)>, open: char, close: char| {
            let (loose, python): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
            (format!("{open}{}{close}", loose.join(",")), format!("{open}{}{close}", python.join(",")))
        };
        prop_oneof![
            prop::collection::vec(padded, 0..6).prop_map(move |parts| joined(parts, '[', ']')),
            prop::collection::vec(member, 0..6).prop_map(move |parts| joined(parts, '{', '}')),
        ]
    })
}

/// A text with one character replaced, left out or added.
fn mutated() -> impl Strategy<Value = String> {
    let junk =
        prop_oneof![any::<char>(), prop::sample::select("\"\\{}[],:0123456789eE.-+u \n".chars().collect::<Vec<_>>())];
    (value(), any::<prop::sample::Index>(), junk, 0..3).prop_map(|((loose, _), place, junk, how)| {
        let mut chars: Vec<char> = loose.chars().collect();
        let at = place.index(chars.len());
        match how {
            0 => chars[at] = junk,
            1 => drop(chars.remove(at)),
            _ => chars.insert(at, junk),
        }
        chars.into_iter().collect()
    })
}

/// All that must hold of any text whatever.
fn judge(text: &str) -> std::result::Result<(), TestCaseError> {
    let valid = serde_json::from_str::<IgnoredAny>(text).is_ok();
    prop_assert_eq!(check(text).is_ok(), valid, "{}", text);
    prop_assert_eq!(compact(text).err(), check(text).err());
    prop_assert_eq!(elements(text).err(), check(text).err());
    let held = for_jsonb(text);
    if let Ok(compacted) = compact(text) {
        prop_assert!(compacted.is_ascii());
        prop_assert_eq!(compact(&compacted), Ok(compacted.clone()));
        prop_assert_eq!(compact(&held).is_ok(), true);
        // serde_json refuses lone surrogates, as jsonb does.
        prop_assert!(serde_json::from_str::<serde_json::Value>(&held).is_ok(), "{}", held);
        if let Ok(value) = serde_json::from_str::<serde_json::Value>(text) {
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&compacted).unwrap(), value);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_spelling_becomes_pythons((loose, python) in value()) {
        prop_assert_eq!(compact(&loose), Ok(python));
        judge(&loose)?;
    }

    #[test]
    fn any_string_is_judged_as_by_serde_json(text in any::<String>()) {
        judge(&text)?;
    }

    #[test]
    fn anything_like_json_is_judged_as_by_serde_json(text in r#"[\[\]{},:"\\u0d8c 1eE.+tn-]{0,12}"#) {
        judge(&text)?;
    }

    #[test]
    fn slightly_wrong_json_is_judged_as_by_serde_json(text in mutated()) {
        judge(&text)?;
    }

    #[test]
    fn elements_are_found(parts in prop::collection::vec((space(), value(), space()), 0..8)) {
        let padded: Vec<String> = parts.iter().map(|(a, (loose, _), b)| format!("{a}{loose}{b}")).collect();
        let array = format!("[{}]", padded.join(","));
        prop_assert_eq!(elements(&array), Ok(Some(parts.iter().map(|(_, (loose, _), _)| loose.as_str()).collect())));
    }

    #[test]
    fn strings_come_back(value in any::<String>()) {
        let written = string(&value);
        prop_assert!(written.is_ascii());
        prop_assert_eq!(compact(&written), Ok(written.clone()));
        prop_assert_eq!(serde_json::from_str::<String>(&written).unwrap(), value);
    }

    #[test]
    fn jsonb_text_has_no_nul((loose, _) in value()) {
        let held = for_jsonb(&loose);
        let value: serde_json::Value = serde_json::from_str(&held).unwrap();
        prop_assert!(!value.to_string().replace("\\\\", "").contains("\\u0000"));
        prop_assert_eq!(for_jsonb(&held), held.as_ref());
    }
}
