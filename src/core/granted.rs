//! What the authority that a client's channels are asked of has answered.

use super::channel::Channel;
use super::json;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The channels a client is subscribed to now, and who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    pub channels: Vec<Channel>,
    pub subject: Option<String>,
}

#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(borrow)]
    channels: &'a RawValue,
    #[serde(default)]
    subject: Option<String>,
}

impl Granted {
    /// Reads the answer of `imbus.auth_function`: `{"channels": […], "subject": …}`, with channels as strings or arrays.
    ///
    /// # Errors
    /// What is wrong with it, for the administrator.
    pub fn parse(text: &str, database: &str) -> Result<Granted, String> {
        // serde takes an array for a struct too.
        if !text.trim_start().starts_with('{') {
            return Err("it must be an object".to_owned());
        }
        let wire: Wire = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let elements = json::elements(wire.channels.get()).map_err(|error| error.to_string())?;
        let elements = elements.ok_or("channels must be an array")?;
        let channels = elements.into_iter().map(|element| Channel::from_json(element, database));
        let channels = channels.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        Ok(Granted { channels, subject: wire.subject })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_may_be_names_records_and_whole_ones() {
        let text = r#"{"channels": ["a", ["res.partner", 3], ["demo", "b"]], "subject": "somebody", "more": 1}"#;
        let granted = Granted::parse(text, "demo").unwrap();
        let texts: Vec<&str> = granted.channels.iter().map(Channel::as_str).collect();
        assert_eq!(texts, [r#"["a"]"#, r#"["res.partner",3]"#, r#"["b"]"#]);
        assert_eq!(granted.subject.as_deref(), Some("somebody"));
        assert_eq!(Granted::parse(r#"{"channels":[],"subject":null}"#, "demo").unwrap().subject, None);
    }

    #[test]
    fn anything_else_is_an_error() {
        for bad in [
            "[]",
            r#"[["a"],"x"]"#,
            "{}",
            r#"{"channels":"a"}"#,
            r#"{"channels":[1]}"#,
            r#"{"channels":[[]],"subject":"x"}"#,
        ] {
            assert!(Granted::parse(bad, "demo").is_err(), "{bad}");
        }
    }
}
