//! Channels: which JSON names one, and the one text by which equal channels are equal (the text Odoo stores, without
//! the database). Must not know who is subscribed to what, nor which channels exist.

use super::error::{Error, Result, shown};
use super::json;
use serde::{Deserialize, Serialize};

/// Zeros a number in a channel may be padded with before it keeps its exponent: ids have at most 19 digits, and a few
/// bytes of hostile input (`1e999999`) must not become a megabyte.
const PADDING_MAX: i64 = 40;

/// The greatest exponent of a number in a channel, either way. PostgreSQL's numeric ends at 131,072.
const EXPONENT_MAX: i64 = 1_000_000;

/// A channel within its database: `["broadcast"]`, `["res.partner",42]`. The text is canonical, so that channels of the
/// same JSON value compare equal: Python's compact JSON, numbers without needless zeros or exponents. Deserializing
/// takes the text as it is: it is for the links between our own processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Channel(Box<str>);

impl Channel {
    /// The channel of a plain name. Errors: [`Error::Channel`] when it is empty.
    pub fn plain(name: &str) -> Result<Channel> {
        Channel::of(&[json::string(name).as_str()], name)
    }

    /// The channel that a string or an array names; an array whose first element is already the database's name loses
    /// it. Errors: [`Error::Json`], [`Error::Channel`].
    pub fn from_json(text: &str, database: &str) -> Result<Channel> {
        let Some(elements) = json::elements(text)? else {
            let value = text.trim();
            if !value.starts_with('"') {
                return Err(refused(text, "it must be a string or an array"));
            }
            return Channel::of(&[value], text);
        };
        match elements.split_first() {
            Some((first, [])) if names(first, database) => Err(refused(text, "it names nothing but the database")),
            Some((first, tail)) if names(first, database) => Channel::of(tail, text),
            _ => Channel::of(&elements, text),
        }
    }

    /// The channel of a row of the bus table, or of Odoo's NOTIFY. Errors: [`Error::Json`], [`Error::Channel`],
    /// [`Error::ForeignChannel`] when its first element is not the database's name.
    pub fn from_row(text: &str, database: &str) -> Result<Channel> {
        let elements = json::elements(text)?.ok_or_else(|| refused(text, "it must be an array"))?;
        match elements.split_first() {
            None => Err(refused(text, "it must not be empty")),
            Some((first, _)) if !names(first, database) => {
                Err(Error::ForeignChannel { value: shown(text), database: database.to_owned() })
            }
            Some((_, [])) => Err(refused(text, "it names nothing but the database")),
            Some((_, tail)) => Channel::of(tail, text),
        }
    }

    /// The text in the bus table: `["db","broadcast"]`, byte for byte Odoo's.
    pub fn stored(&self, database: &str) -> String {
        format!("[{},{}", json::string(database), self.0.get(1..).unwrap_or_default())
    }

    /// The canonical text, without the database: `["broadcast"]`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A number by which most channels differ, the same in every process; never 0.
    pub fn fingerprint(&self) -> u32 {
        let mut hasher = std::hash::DefaultHasher::new();
        std::hash::Hash::hash(self, &mut hasher);
        (std::hash::Hasher::finish(&hasher) as u32).max(1)
    }

    /// The channel of these elements; `value` is the text they come from.
    fn of(elements: &[&str], value: &str) -> Result<Channel> {
        let canonical = elements.iter().map(|text| element(text, value)).collect::<Result<Vec<_>>>()?;
        match canonical.first().map(String::as_str) {
            None | Some(r#""""#) => Err(refused(value, "it must not be empty")),
            Some(first) if !first.starts_with('"') => Err(refused(value, "its first element must be a string")),
            Some(_) => Ok(Channel(format!("[{}]", canonical.join(",")).into_boxed_str())),
        }
    }
}

fn refused(value: &str, reason: &'static str) -> Error {
    Error::Channel { value: shown(value), reason }
}

/// Whether a JSON value is this database's name.
fn names(element: &str, database: &str) -> bool {
    json::compact(element).is_ok_and(|text| text == json::string(database))
}

/// The canonical text of an element.
fn element(text: &str, value: &str) -> Result<String> {
    match text.bytes().next() {
        Some(b'"' | b't' | b'f') => json::compact(text),
        Some(b'-' | b'0'..=b'9') => number(text).ok_or_else(|| refused(value, "a number in it is out of range")),
        _ => Err(refused(value, "its elements must be strings, numbers or booleans")),
    }
}

/// The canonical text of a JSON number; None when its exponent is beyond [`EXPONENT_MAX`].
fn number(text: &str) -> Option<String> {
    let (sign, rest) = text.strip_prefix('-').map_or(("", text), |rest| ("-", rest));
    let (mantissa, exponent) = rest.split_once(['e', 'E']).unwrap_or((rest, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all = format!("{whole}{fraction}");
    let leading = all.trim_start_matches('0');
    let digits = leading.trim_end_matches('0');
    if digits.is_empty() {
        return Some("0".to_owned());
    }
    // The value is digits × 10^exponent, with no zero at either end of the digits: one such pair for each value.
    let shift = i64::try_from(leading.len() - digits.len()).ok()?.checked_sub(i64::try_from(fraction.len()).ok()?)?;
    let exponent = exponent.parse::<i64>().ok()?.checked_add(shift)?;
    (-EXPONENT_MAX..=EXPONENT_MAX).contains(&exponent).then(|| format!("{sign}{}", decimal(digits, exponent)))
}

/// digits × 10^exponent, written without exponent where that takes few zeros.
fn decimal(digits: &str, exponent: i64) -> String {
    let zeros = |count: i64| "0".repeat(usize::try_from(count).unwrap_or(0));
    // Digits before the point.
    let point = i64::try_from(digits.len()).unwrap_or(i64::MAX).saturating_add(exponent);
    if (0..=PADDING_MAX).contains(&exponent) {
        format!("{digits}{}", zeros(exponent))
    } else if exponent < 0 && point > 0 {
        let (whole, fraction) = digits.split_at_checked(usize::try_from(point).unwrap_or(0)).unwrap_or((digits, ""));
        format!("{whole}.{fraction}")
    } else if exponent < 0 && -point <= PADDING_MAX {
        format!("0.{}{digits}", zeros(-point))
    } else {
        format!("{digits}e{exponent}")
    }
}

#[cfg(test)]
mod tests;
