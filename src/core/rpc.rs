//! JSON-RPC as Odoo's routes of type `json` speak it (ODOO_BUS §9): `{"jsonrpc":"2.0","method":"call","id":n,"params":{…}}`
//! in, `{"jsonrpc":"2.0","id":n,"result":…}` out. Knows no HTTP.

use serde::Deserialize;
use serde_json::value::RawValue;

/// A call.
#[derive(Debug)]
pub struct Call<'a> {
    /// The JSON text of its id, `null` without one.
    pub id: &'a str,
    /// The JSON text of its parameters, `{}` without any.
    pub params: &'a str,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    params: Option<&'a RawValue>,
}

impl<'a> Call<'a> {
    /// Reads a call.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn parse(body: &'a [u8]) -> Result<Call<'a>, String> {
        let text = std::str::from_utf8(body).map_err(|_| "the body is no UTF-8".to_owned())?;
        // serde takes an array for a struct too.
        if !text.trim_start().starts_with('{') {
            return Err("the body is no object".to_owned());
        }
        let envelope: Envelope = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let raw = |value: Option<&'a RawValue>, none| value.map_or(none, RawValue::get);
        Ok(Call { id: raw(envelope.id, "null"), params: raw(envelope.params, "{}") })
    }
}

/// The answer to a call; `id` and `result` are JSON texts.
pub fn result(id: &str, result: &str) -> String {
    let (before, after) = around(id);
    format!("{before}{result}{after}")
}

/// What stands before and after the result in the answer to a call.
pub fn around(id: &str) -> (String, &'static str) {
    (format!("{{\"jsonrpc\": \"2.0\", \"id\": {id}, \"result\": "), "}")
}

/// The answer to a call that failed, as Odoo's client reads it: code 200 for errors of the server, 100 for an expired
/// session; `name` stands for the exception's.
pub fn error(id: &str, code: i32, message: &str, name: &str) -> String {
    let (message, name) = (super::json::string(message), super::json::string(name));
    let data = format!("{{\"name\": {name}, \"message\": {message}, \"arguments\": [], \"debug\": \"\"}}");
    format!(
        "{{\"jsonrpc\": \"2.0\", \"id\": {id}, \"error\": {{\"code\": {code}, \"message\": {message}, \"data\": {data}}}}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_and_parameters_are_passed_on_as_they_stand() {
        let call = Call::parse(br#"{"jsonrpc":"2.0","method":"call","id":"a\u0000b","params":{"last":1e0}}"#).unwrap();
        assert_eq!((call.id, call.params), (r#""a\u0000b""#, r#"{"last":1e0}"#));
        let call = Call::parse(b"{}").unwrap();
        assert_eq!((call.id, call.params), ("null", "{}"));
        assert_eq!(result("7", "[]"), r#"{"jsonrpc": "2.0", "id": 7, "result": []}"#);
        let text = error("7", 200, "it \"failed\"", "builtins.ValueError");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["error"]["data"]["name"], "builtins.ValueError");
        assert_eq!(value["error"]["message"], "it \"failed\"");
    }

    #[test]
    fn what_is_no_call_is_refused() {
        for bad in [&b""[..], b"[]", b"{", b"7", b"\"x\"", b"\xff{}", b"{} {}"] {
            assert!(Call::parse(bad).is_err(), "{bad:?}");
        }
    }
}
