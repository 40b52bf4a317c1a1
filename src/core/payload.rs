//! NOTIFY payloads on channel `imbus`: lists of bus channels, split as Odoo splits them when they are too long
//! (`_notify_channels`, bus/models/bus.py). Must not know who sends or hears them.

use super::error::{Error, Result, shown};
use super::json;
use std::collections::HashSet;

/// A payload as parts that are each shorter than `limit` bytes, in order. A payload that already is stays as it is;
/// otherwise a JSON array is halved again and again, the left half being the larger one. Errors:
/// [`Error::PayloadTooLong`] when a single element is too long, or a long payload is no JSON array.
pub fn split(payload: &str, limit: usize) -> Result<Vec<String>> {
    if payload.len() < limit {
        return Ok(vec![payload.to_owned()]);
    }
    let Ok(Some(elements)) = json::elements(payload) else {
        return Err(too_long(payload, payload.len(), limit));
    };
    let mut parts = Vec::new();
    match elements.len() {
        0 | 1 => fit(&elements, limit, &mut parts)?,
        _ => halve(&elements, limit, &mut parts)?,
    }
    Ok(parts)
}

/// The database names in a payload `[["db",…],…]`, each once, in order. Errors: [`Error::Json`], or [`Error::Channel`]
/// when it is no array of arrays that start with a string.
pub fn databases(payload: &str) -> Result<Vec<String>> {
    let refused = |reason| Error::Channel { value: shown(payload), reason };
    let channels = json::elements(payload)?.ok_or_else(|| refused("the payload must be an array of channels"))?;
    let mut seen = HashSet::new();
    let mut names = Vec::new();
    for channel in channels {
        let elements = json::elements(channel)?.unwrap_or_default();
        let first = elements.first().ok_or_else(|| refused("each channel must be a non-empty array"))?;
        // A lone surrogate is refused too: no database is called so.
        let name: String =
            serde_json::from_str(first).map_err(|_| refused("the first element of each must be a database name"))?;
        if seen.insert(name.clone()) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Adds the elements as one part, or as several when that would be too long.
fn fit(elements: &[&str], limit: usize, parts: &mut Vec<String>) -> Result<()> {
    // Brackets around, commas between.
    let length = elements.iter().map(|element| element.len() + 1).sum::<usize>().max(1) + 1;
    match elements {
        _ if length < limit => parts.push(format!("[{}]", elements.join(","))),
        [] | [_] => return Err(too_long(elements.first().unwrap_or(&"[]"), length, limit)),
        _ => halve(elements, limit, parts)?,
    }
    Ok(())
}

/// Adds two halves. The recursion is as deep as the logarithm of the number of elements.
fn halve(elements: &[&str], limit: usize, parts: &mut Vec<String>) -> Result<()> {
    let (left, right) = elements.split_at_checked(elements.len().div_ceil(2)).unwrap_or((elements, &[]));
    fit(left, limit, parts)?;
    fit(right, limit, parts)
}

fn too_long(value: &str, length: usize, limit: usize) -> Error {
    Error::PayloadTooLong { value: shown(value), length, limit }
}

#[cfg(test)]
mod tests;
