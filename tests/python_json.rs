//! The bus table's text is byte for byte what Python's `json.dumps(value, separators=(',', ':'))` writes: asked of
//! Python itself, for values made here and for values made there. Needs `python3` in the PATH, its standard library
//! only; each case that differs is shown.

use imbus::core::json;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use std::io::Write;
use std::process::{Command, Stdio};

/// Reads JSON texts, one a line in hexadecimal, and writes each value as Odoo does.
const DUMP: &str = r#"
import json, sys
getattr(sys, "set_int_max_str_digits", lambda digits: None)(0)
lines = sys.stdin.read().split("\n")[:-1]
print("\n".join(json.dumps(json.loads(bytes.fromhex(line).decode()), separators=(",", ":")) for line in lines))
"#;

/// Reads strings, one a line in hexadecimal, and writes each as Odoo does.
const DUMP_STRING: &str = r#"
import json, sys
lines = sys.stdin.read().split("\n")[:-1]
print("\n".join(json.dumps(bytes.fromhex(line).decode()) for line in lines))
"#;

/// Makes values, and writes each in hexadecimal as loosely as Python can, a space, and as Odoo does.
const MAKE: &str = r#"
import json, random, struct, sys
seed = random.SystemRandom().getrandbits(64)
rng = random.Random(seed)
def string():
    ranges = [(0, 0x20), (0x20, 0x80), (0x80, 0xd800), (0xd800, 0xe000), (0xe000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(12)))
def floating():
    while True:
        (number,) = struct.unpack("d", rng.randbytes(8))
        if number - number == 0:
            return rng.choice([number, round(rng.uniform(-1e6, 1e6), rng.randrange(6)), float(rng.randrange(10**18))])
def value(depth):
    kind = rng.randrange(6 if depth < 5 else 4)
    if kind == 0: return string()
    if kind == 1: return floating()
    if kind == 2: return rng.choice([-1, 1]) * rng.getrandbits(rng.choice([1, 8, 31, 32, 63, 64, 500]))
    if kind == 3: return rng.choice([None, True, False])
    if kind == 4: return [value(depth + 1) for _ in range(rng.randrange(6))]
    return {string(): value(depth + 1) for _ in range(rng.randrange(6))}
def spelled(text):
    # UTF-8 has no surrogates: those stay escapes, in capitals for once.
    return "".join("\\u%04X" % ord(c) if 0xd800 <= ord(c) < 0xe000 else c for c in text)
for _ in range(3000):
    made = value(0)
    loose = spelled(json.dumps(made, ensure_ascii=False, indent=rng.choice([None, 0, 3, "\t"])))
    print(loose.encode().hex(), json.dumps(made, separators=(",", ":")))
"#;

/// What a Python script prints, by lines.
fn python(script: &str, input: &[String]) -> Vec<String> {
    let mut child = Command::new("python3")
        .args(["-I", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test compares with Python: python3 must be in the PATH");
    let lines: String = input.iter().map(|text| hexadecimal(text) + "\n").collect();
    // The scripts read all before they write: neither side waits for the other.
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "the Python script failed: {}", output.status);
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

fn hexadecimal(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn decoded(hexadecimal: &str) -> String {
    let byte = |at: usize| u8::from_str_radix(&hexadecimal[at..at + 2], 16).unwrap();
    String::from_utf8((0..hexadecimal.len()).step_by(2).map(byte).collect()).unwrap()
}

/// Python's text for each JSON text must be ours.
fn same_as_python(texts: &[String]) {
    let theirs = python(DUMP, texts);
    assert_eq!(theirs.len(), texts.len());
    for (text, theirs) in texts.iter().zip(theirs) {
        assert_eq!(json::compact(text).as_deref(), Ok(theirs.as_str()), "for {text:?}");
    }
}

/// The inside of a string, each character raw or escaped in one of the ways there are.
fn spelled() -> impl Strategy<Value = String> {
    let unit = prop_oneof![0u16..0x100, any::<u16>(), 0xd800u16..0xe000];
    let raw = any::<char>().prop_filter("must be escaped", |c| *c >= ' ' && *c != '"' && *c != '\\');
    let piece = prop_oneof![
        unit.prop_flat_map(|unit| prop_oneof![Just(format!("\\u{unit:04x}")), Just(format!("\\u{unit:04X}"))]),
        raw.prop_map(String::from),
        prop::sample::select(vec![r"\b", r"\t", r"\n", r"\f", r"\r", r"\\", r#"\""#, r"\/"]).prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

/// JSON text. Numbers are integers: Python writes others by their value, imbus as they stand. Keys differ by the number
/// in front: Python keeps one of equal ones.
fn value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        prop::sample::select(vec!["null", "true", "false", "0"]).prop_map(str::to_owned),
        "-?[1-9][0-9]{0,300}",
        spelled().prop_map(|inside| format!("\"{inside}\"")),
    ];
    leaf.prop_recursive(6, 60, 6, |inner| {
        let space = || prop::sample::select(vec!["", " ", "\n\t", "\r\n "]);
        let padded = (space(), inner, space()).prop_map(|(a, value, b)| format!("{a}{value}{b}")).boxed();
        let members = prop::collection::vec((spelled(), space(), padded.clone()), 0..6).prop_map(|members| {
            let members = members.into_iter().enumerate();
            let texts: Vec<String> =
                members.map(|(at, (key, space, value))| format!("{space}\"{at}{key}\"{space}:{value}")).collect();
            format!("{{{}}}", texts.join(","))
        });
        let elements = prop::collection::vec(padded, 0..6).prop_map(|elements| format!("[{}]", elements.join(",")));
        prop_oneof![elements, members]
    })
}

fn many<T: std::fmt::Debug>(strategy: impl Strategy<Value = T>, count: usize) -> Vec<T> {
    let mut runner = TestRunner::default();
    (0..count).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect()
}

#[test]
fn values_made_here_are_written_as_by_python() {
    same_as_python(&many(value(), 3000));
}

#[test]
fn values_made_by_python_are_written_as_by_python() {
    let lines = python(MAKE, &[]);
    assert_eq!(lines.len(), 3000);
    for line in lines {
        let (loose, theirs) = line.split_once(' ').unwrap();
        let loose = decoded(loose);
        assert_eq!(json::compact(&loose).as_deref(), Ok(theirs), "for {loose:?}");
        assert_eq!(json::check(&loose), Ok(()), "for {loose:?}");
    }
}

#[test]
fn big_numbers_and_deep_nesting_are_written_as_by_python() {
    let deep = json::DEPTH_MAX - 1;
    same_as_python(&[
        "9".repeat(10_000),
        format!("-1{}", "0".repeat(10_000)),
        format!("{}[ 1 ]{}", "[ ".repeat(deep), " ]".repeat(deep)),
        format!("{}{{ }}{}", r#"{ "é" : "#.repeat(deep), " }".repeat(deep)),
    ]);
}

#[test]
fn every_escape_is_written_as_by_python() {
    let spelled =
        |upper: bool| move |unit: u16| if upper { format!("\"\\u{unit:04X}\"") } else { format!("\"\\u{unit:04x}\"") };
    let lower: Vec<String> = (0..=u16::MAX).map(spelled(false)).collect();
    let upper: Vec<String> = (0..=u16::MAX).map(spelled(true)).collect();
    same_as_python(&lower);
    same_as_python(&upper);
}

#[test]
fn every_character_is_written_as_by_python() {
    let characters: Vec<char> = ('\0'..=char::MAX).collect();
    let strings: Vec<String> = characters.chunks(500).map(|chunk| chunk.iter().collect()).collect();
    let theirs = python(DUMP_STRING, &strings);
    assert_eq!(theirs.len(), strings.len());
    for (text, theirs) in strings.iter().zip(theirs) {
        assert_eq!(json::string(text), theirs);
        let raw: String = text.chars().filter(|c| *c >= ' ' && *c != '"' && *c != '\\').collect();
        assert_eq!(json::compact(&format!("\"{raw}\"")), Ok(json::string(&raw)));
    }
}

#[test]
fn any_string_is_written_as_by_python() {
    let strings = many(any::<String>(), 3000);
    for (text, theirs) in strings.iter().zip(python(DUMP_STRING, &strings)) {
        assert_eq!(json::string(text), theirs, "for {text:?}");
    }
}
