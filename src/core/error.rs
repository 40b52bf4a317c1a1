//! Every way the core refuses input, in one place. `pg::report` maps each variant to its SQLSTATE; the network maps
//! the few it meets to close codes. No text here is written for a log: it is what a user reads.

use std::fmt;

/// A refusal, with the offending value where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The text is not JSON; the string says where and why.
    Json { value: String, reason: &'static str, at: usize },
    /// The JSON is no channel: not a string or array, empty, or an element of a wrong type.
    Channel { value: String, reason: &'static str },
    /// The channel names another database than the one it stands in.
    ForeignChannel { value: String, database: String },
    /// A payload that cannot be split below the limit (bytes).
    PayloadTooLong { value: String, length: usize, limit: usize },
    /// An argument is NULL or empty where it must not be.
    Missing { argument: &'static str },
    /// An argument has a value outside its domain.
    Argument { argument: &'static str, value: String, reason: String },
    /// The token is malformed, forged, expired or for another database.
    Token { reason: String },
}

/// The result of everything in the core that can refuse.
pub type Result<T> = std::result::Result<T, Error>;

/// How much of an offending value is shown, in characters (SPEC section 4).
pub const SHOWN: usize = 200;

/// Cuts a value to what an error may show of it.
pub fn shown(value: &str) -> String {
    match value.char_indices().nth(SHOWN) {
        None => value.to_owned(),
        Some((end, _)) => format!("{}…", value.get(..end).unwrap_or_default()),
    }
}

impl fmt::Display for Error {
    /// One line in PostgreSQL's message style: lower case, no full stop.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Json { .. } => write!(f, "invalid JSON"),
            Error::Channel { reason, .. } => write!(f, "invalid channel: {reason}"),
            Error::ForeignChannel { .. } => write!(f, "channel belongs to another database"),
            Error::PayloadTooLong { length, limit, .. } => {
                write!(f, "payload of {length} bytes cannot be split below the limit of {limit} bytes")
            }
            Error::Missing { argument } => write!(f, "{argument} must not be null or empty"),
            Error::Argument { argument, reason, .. } => write!(f, "invalid {argument}: {reason}"),
            Error::Token { reason } => write!(f, "invalid token: {reason}"),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_at_most_two_hundred_characters() {
        assert_eq!(shown("short"), "short");
        assert_eq!(shown(&"é".repeat(200)), "é".repeat(200));
        assert_eq!(shown(&"é".repeat(201)), format!("{}…", "é".repeat(200)));
    }
}
