//! Errors become PostgreSQL's: each has its SQLSTATE, a DETAIL with the offending value and a HINT. The only place
//! that knows SQLSTATEs.

use crate::core::error::{Error, shown};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, function_name};

/// What SQL functions return: a value or a report that pgrx raises as an ERROR.
pub type Outcome<T> = Result<T, ErrorReport>;

impl From<Error> for ErrorReport {
    fn from(error: Error) -> ErrorReport {
        use PgSqlErrorCode as Code;
        let message = error.to_string();
        let of = |code, detail: String, hint: &str| report(code, &message, &detail, hint);
        match &error {
            Error::Json { value, reason, at } => of(
                Code::ERRCODE_INVALID_TEXT_REPRESENTATION,
                format!("{reason} at byte {at}: {}", shown(value)),
                "Pass well-formed JSON.",
            ),
            Error::Channel { value, .. } => of(
                Code::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("Channel: {}", shown(value)),
                "A channel is a non-empty string, or an array such as [\"res.partner\", 42].",
            ),
            Error::ForeignChannel { value, database } => of(
                Code::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("Channel: {}", shown(value)),
                &format!("This is database \"{database}\"."),
            ),
            Error::PayloadTooLong { value, limit, .. } => of(
                Code::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                format!("Payload: {}", shown(value)),
                &format!(
                    "Only a JSON array of several elements can be split; imbus.notify_payload_max_length is {limit}."
                ),
            ),
            Error::Missing { argument } => {
                of(Code::ERRCODE_NULL_VALUE_NOT_ALLOWED, format!("Argument: {argument}"), "Pass a value.")
            }
            Error::Argument { argument, value, .. } => of(
                Code::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("Value: {}", shown(value)),
                &format!("See the comment of the function on {argument}."),
            ),
            Error::Token { .. } => of(
                Code::ERRCODE_INVALID_PARAMETER_VALUE,
                "The token was not accepted.".to_owned(),
                "Ask bus_token() for a new one.",
            ),
        }
    }
}

/// An error with its code, message (lower case, no full stop), detail and hint (sentences).
pub fn report(code: PgSqlErrorCode, message: &str, detail: &str, hint: &str) -> ErrorReport {
    let mut report = ErrorReport::new(code, message.to_owned(), function_name!());
    if !detail.is_empty() {
        report = report.set_detail(detail.to_owned());
    }
    if !hint.is_empty() {
        report = report.set_hint(hint.to_owned());
    }
    report
}

/// What needs the workers says so when the library is not preloaded (SPEC section 4).
pub fn not_preloaded(what: &str) -> ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        &format!("{what} needs the imbus background workers"),
        "The library imbus was not loaded at server start.",
        "Add imbus to shared_preload_libraries and restart PostgreSQL.",
    )
}

/// The errors of SPI's own calls (a wrong index, a wrong type): they mean a fault of imbus.
pub fn internal(error: impl std::fmt::Display) -> ErrorReport {
    report(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, &format!("imbus: {error}"), "", "")
}
