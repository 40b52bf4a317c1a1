//! JSON as text (RFC 8259): whether it is well-formed, how Python's `json.dumps` writes it, the elements of an array,
//! and what jsonb can hold of it. Works on the text and builds no values, so that what Python may write and Rust's
//! strings cannot hold (lone surrogates) passes unharmed. Must not know what the JSON means.

use super::error::{Error, Result, shown};
use std::borrow::Cow;

/// How deep arrays and objects may nest. Python's own parser gives up at about 1,000, jsonb at about 6,000.
pub const DEPTH_MAX: usize = 512;

/// Digits that a PostgreSQL numeric may have before and after the point (NUMERIC_WEIGHT_MAX, NUMERIC_DSCALE_MAX in
/// utils/adt/numeric.c).
const NUMERIC_WHOLE_MAX: i64 = 131_072;
const NUMERIC_SCALE_MAX: i64 = 16_383;

/// Whether the text is one JSON value, with white space around it at most. `\u0000` and lone surrogate escapes are
/// accepted, NaN and Infinity are not.
pub fn check(text: &str) -> Result<()> {
    Scanner::new(text).try_for_each(|token| token.map(drop))
}

/// The same value as Python's `json.dumps(value, separators=(',', ':'))` writes it: ASCII only, no white space. Keys
/// keep their order, numbers their spelling.
pub fn compact(text: &str) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    for token in Scanner::new(text) {
        let token = token?;
        match token.kind {
            Kind::Text => rewrite(token.text, &mut out),
            _ => out.push_str(token.text),
        }
    }
    Ok(out)
}

/// A string as Python's `json.dumps` writes it, in double quotes.
pub fn string(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 2);
    out.push('"');
    value.encode_utf16().for_each(|unit| push_unit(&mut out, unit));
    out.push('"');
    out
}

/// The text of each element of an array, without the white space around it; None when the text is JSON but no array.
pub fn elements(text: &str) -> Result<Option<Vec<&str>>> {
    let mut scanner = Scanner::new(text);
    let mut found = Vec::new();
    let mut element: Option<(usize, usize)> = None;
    let mut is_array = false;
    loop {
        let depth = scanner.open.len();
        let Some(token) = scanner.advance()? else { return Ok(is_array.then_some(found)) };
        match (depth, token.kind) {
            (0, _) => is_array = token.text == "[",
            (1, Kind::Comma | Kind::Close) => {
                found.extend(element.take().and_then(|(start, end)| text.get(start..end)).filter(|_| is_array));
            }
            _ => element = Some((element.map_or(token.at, |(start, _)| start), scanner.at)),
        }
    }
}

/// JSON that jsonb accepts: `\u0000` and lone surrogates become U+FFFD, numbers beyond PostgreSQL's numeric the string
/// of it. The text must have passed [`check`]; from the first fault on, any other is left as it is.
pub fn for_jsonb(text: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut copied = 0;
    for token in Scanner::new(text).map_while(Result::ok) {
        let instead = match token.kind {
            Kind::Text => storable(token.text),
            Kind::Number if !fits_numeric(token.text) => Some(r#""\ufffd""#.to_owned()),
            _ => None,
        };
        if let Some(instead) = instead {
            out.push_str(text.get(copied..token.at).unwrap_or_default());
            out.push_str(&instead);
            copied = token.at + token.text.len();
        }
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    out.push_str(text.get(copied..).unwrap_or_default());
    Cow::Owned(out)
}

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `[` or `{`
    Open,
    /// `]` or `}`
    Close,
    Comma,
    Colon,
    /// A string in its quotes, value or key.
    Text,
    Number,
    /// `true`, `false` or `null`
    Word,
}

/// A piece of JSON text and the byte it starts at.
#[derive(Clone, Copy, Debug)]
struct Token<'a> {
    kind: Kind,
    text: &'a str,
    at: usize,
}

/// What the grammar allows next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Value,
    /// A value or the end of an empty array.
    First,
    Key,
    /// A key or the end of an empty object.
    FirstKey,
    Colon,
    /// A comma or the end of the array or object.
    Separator,
    End,
}

/// Cuts JSON text into tokens, checking the grammar. Not recursive: what is open is a list.
struct Scanner<'a> {
    text: &'a str,
    at: usize,
    /// The brackets that will close what is open.
    open: Vec<u8>,
    expect: Expect,
}

impl<'a> Iterator for Scanner<'a> {
    type Item = Result<Token<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}

impl<'a> Scanner<'a> {
    fn new(text: &'a str) -> Self {
        Scanner { text, at: 0, open: Vec::new(), expect: Expect::Value }
    }

    /// The next token, None after the value.
    fn advance(&mut self) -> Result<Option<Token<'a>>> {
        self.skip(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'));
        let at = self.at;
        let Some(byte) = self.peek() else {
            return if self.expect == Expect::End { Ok(None) } else { Err(self.fault("the text ends too early")) };
        };
        let kind = match (self.expect, byte) {
            (Expect::Value | Expect::First, b'[' | b'{') => self.open(byte)?,
            (Expect::First | Expect::FirstKey | Expect::Separator, b']' | b'}') => self.close(byte)?,
            (Expect::Value | Expect::First, _) => self.scalar(byte)?,
            (Expect::Key | Expect::FirstKey, b'"') => {
                self.string()?;
                self.take(Kind::Text, 0, Expect::Colon)
            }
            (Expect::Key | Expect::FirstKey, _) => return Err(self.fault("a key in double quotes is expected")),
            (Expect::Colon, b':') => self.take(Kind::Colon, 1, Expect::Value),
            (Expect::Colon, _) => return Err(self.fault("a colon is expected")),
            (Expect::Separator, b',') if self.open.last() == Some(&b'}') => self.take(Kind::Comma, 1, Expect::Key),
            (Expect::Separator, b',') => self.take(Kind::Comma, 1, Expect::Value),
            (Expect::Separator, _) => return Err(self.fault("a comma or a closing bracket is expected")),
            (Expect::End, _) => return Err(self.fault("there is text after the value")),
        };
        Ok(Some(Token { kind, text: self.text.get(at..self.at).unwrap_or_default(), at }))
    }

    fn fault(&self, reason: &'static str) -> Error {
        Error::Json { value: shown(self.text), reason, at: self.at }
    }

    fn rest(&self) -> &'a [u8] {
        self.text.as_bytes().get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<u8> {
        self.rest().first().copied()
    }

    /// Passes over bytes of a sort, and says how many they were.
    fn skip(&mut self, sort: impl Fn(u8) -> bool) -> usize {
        let rest = self.rest();
        let count = rest.iter().position(|byte| !sort(*byte)).unwrap_or(rest.len());
        self.at += count;
        count
    }

    /// Passes over a byte if it is there.
    fn accept(&mut self, sort: impl Fn(u8) -> bool) -> bool {
        let there = self.peek().is_some_and(sort);
        self.at += usize::from(there);
        there
    }

    fn take(&mut self, kind: Kind, bytes: usize, expect: Expect) -> Kind {
        self.at += bytes;
        self.expect = expect;
        kind
    }

    fn open(&mut self, bracket: u8) -> Result<Kind> {
        if self.open.len() >= DEPTH_MAX {
            return Err(self.fault("arrays and objects are nested too deep"));
        }
        let (closing, expect) = if bracket == b'[' { (b']', Expect::First) } else { (b'}', Expect::FirstKey) };
        self.open.push(closing);
        Ok(self.take(Kind::Open, 1, expect))
    }

    fn close(&mut self, bracket: u8) -> Result<Kind> {
        if self.open.last() != Some(&bracket) {
            return Err(self.fault("the closing bracket is of the wrong kind"));
        }
        self.open.pop();
        let expect = self.after_value();
        Ok(self.take(Kind::Close, 1, expect))
    }

    fn after_value(&self) -> Expect {
        if self.open.is_empty() { Expect::End } else { Expect::Separator }
    }

    fn scalar(&mut self, byte: u8) -> Result<Kind> {
        let kind = match byte {
            b'"' => {
                self.string()?;
                Kind::Text
            }
            b'-' | b'0'..=b'9' => {
                self.number()?;
                Kind::Number
            }
            _ => {
                self.word()?;
                Kind::Word
            }
        };
        let expect = self.after_value();
        Ok(self.take(kind, 0, expect))
    }

    fn string(&mut self) -> Result<()> {
        self.at += 1;
        loop {
            self.skip(|byte| byte >= 0x20 && byte != b'"' && byte != b'\\');
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => self.escape()?,
                Some(_) => return Err(self.fault("a control character in a string must be escaped")),
                None => return Err(self.fault("the text ends within a string")),
            }
        }
    }

    fn escape(&mut self) -> Result<()> {
        match self.rest().get(1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 2,
            Some(b'u') if self.text.get(self.at..).and_then(unit).is_some() => self.at += UNIT_LENGTH,
            _ => return Err(self.fault("there is no such escape")),
        }
        Ok(())
    }

    fn number(&mut self) -> Result<()> {
        let digit = |byte: u8| byte.is_ascii_digit();
        self.accept(|byte| byte == b'-');
        if !self.accept(|byte| byte == b'0') && self.skip(digit) == 0 {
            return Err(self.fault("a digit is expected"));
        }
        if self.accept(|byte| byte == b'.') && self.skip(digit) == 0 {
            return Err(self.fault("a digit is expected after the point"));
        }
        if self.accept(|byte| byte == b'e' || byte == b'E') {
            self.accept(|byte| byte == b'+' || byte == b'-');
            if self.skip(digit) == 0 {
                return Err(self.fault("a digit is expected in the exponent"));
            }
        }
        Ok(())
    }

    fn word(&mut self) -> Result<()> {
        let words: [&[u8]; 3] = [b"true", b"false", b"null"];
        let word = words.iter().find(|word| self.rest().starts_with(word));
        self.at += word.ok_or_else(|| self.fault("a value is expected"))?.len();
        Ok(())
    }
}

/// Bytes of `\uXXXX`.
const UNIT_LENGTH: usize = 6;

/// The UTF-16 unit of the `\uXXXX` that the text starts with.
fn unit(text: &str) -> Option<u16> {
    let hex = text.strip_prefix("\\u")?.get(..4)?;
    // from_str_radix alone would take a sign.
    hex.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u16::from_str_radix(hex, 16).ok())?
}

/// Writes a string, checked and in its quotes, as Python does.
fn rewrite(quoted: &str, out: &mut String) {
    let mut rest = quoted;
    loop {
        let plain = rest.bytes().position(|byte| byte == b'\\' || !matches!(byte, b' '..=b'~')).unwrap_or(rest.len());
        out.push_str(rest.get(..plain).unwrap_or_default());
        rest = rest.get(plain..).unwrap_or_default();
        let Some(first) = rest.chars().next() else { return };
        let length = match unit(rest) {
            Some(unit) => {
                push_unit(out, unit);
                UNIT_LENGTH
            }
            None if first == '\\' => {
                // Only the escape of '/' is not Python's own.
                let escape = rest.get(..2).unwrap_or_default();
                out.push_str(if escape == "\\/" { "/" } else { escape });
                2
            }
            None => {
                first.encode_utf16(&mut [0; 2]).iter().for_each(|unit| push_unit(out, *unit));
                first.len_utf8()
            }
        };
        rest = rest.get(length..).unwrap_or_default();
    }
}

/// Writes one UTF-16 unit of a string as Python does (ESCAPE_ASCII and ESCAPE_DCT in json/encoder.py).
fn push_unit(out: &mut String, unit: u16) {
    let short = match unit {
        0x22 => "\\\"",
        0x5c => "\\\\",
        0x08 => "\\b",
        0x09 => "\\t",
        0x0a => "\\n",
        0x0c => "\\f",
        0x0d => "\\r",
        0x20..=0x7e => return out.extend(char::from_u32(u32::from(unit))),
        _ => {
            out.push_str("\\u");
            let digits =
                [12, 8, 4, 0].into_iter().filter_map(|shift| char::from_digit(u32::from(unit >> shift & 15), 16));
            return out.extend(digits);
        }
    };
    out.push_str(short);
}

/// A string in its quotes with U+FFFD for what jsonb refuses; None when it refuses nothing.
fn storable(quoted: &str) -> Option<String> {
    let mut out = String::new();
    let (mut at, mut copied) = (0, 0);
    let from = |at: usize| quoted.get(at..).unwrap_or_default();
    while let Some(next) = from(at).find('\\') {
        at += next;
        match unit(from(at)) {
            None => at += 2,
            Some(0xd800..=0xdbff) if matches!(unit(from(at + UNIT_LENGTH)), Some(0xdc00..=0xdfff)) => {
                at += 2 * UNIT_LENGTH;
            }
            Some(0 | 0xd800..=0xdfff) => {
                out.push_str(quoted.get(copied..at).unwrap_or_default());
                out.push_str("\\ufffd");
                at += UNIT_LENGTH;
                copied = at;
            }
            Some(_) => at += UNIT_LENGTH,
        }
    }
    out.push_str(from(copied));
    (copied > 0).then_some(out)
}

/// Whether a JSON number fits PostgreSQL's numeric, which jsonb holds numbers in. Zeros in front count as digits, so
/// that `0.1e131072`, which would just fit, does not.
fn fits_numeric(number: &str) -> bool {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let Ok(exponent) = exponent.parse::<i32>() else { return false };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let length = |digits: &str| i64::try_from(digits.len()).unwrap_or(i64::MAX);
    length(whole.trim_start_matches('-')).saturating_add(exponent.into()) <= NUMERIC_WHOLE_MAX
        && length(fraction).saturating_sub(exponent.into()) <= NUMERIC_SCALE_MAX
}

#[cfg(test)]
pub(crate) mod tests;
