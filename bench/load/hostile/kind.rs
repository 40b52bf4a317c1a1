//! What there is of attacks, and what each of them says.

use std::fmt::Write;
use std::str::FromStr;
use std::time::Duration;

/// Bytes of a long message: the most a client may send.
const GIANT: usize = 1 << 20;

/// Channels in a long subscription: the most a client may have.
const CHANNELS: usize = 10_000;

/// Every so many-th of those that subscribe does so faster than it may.
const FAST: usize = 45;

/// An attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A byte of a header per second.
    Slowloris,
    /// Subscribed, then gone without a word.
    HalfOpen,
    /// Subscribed to long messages, and not reading.
    Stalled,
    /// All connect at once, subscribe, leave and come again.
    Burst,
    /// Messages of a mebibyte that mean nothing.
    Giants,
    /// Messages of a mebibyte that subscribe to as many channels as one may.
    Lists,
    /// Ever new subscriptions, at the rate limit and some above it.
    Subscribes,
}

/// All of them, with what they are called and how many peers they take.
pub const KINDS: [(&str, Kind, usize); 7] = [
    ("slowloris", Kind::Slowloris, 2_000),
    ("half-open", Kind::HalfOpen, 2_000),
    ("stalled", Kind::Stalled, 500),
    ("burst", Kind::Burst, 20_000),
    ("giants", Kind::Giants, 50),
    ("lists", Kind::Lists, 50),
    ("subscribes", Kind::Subscribes, 2_250),
];

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Kind, String> {
        let found = KINDS.iter().find(|(name, ..)| *name == text);
        found.map(|(_, kind, _)| *kind).ok_or_else(|| format!("no attack is called {text}"))
    }
}

impl Kind {
    /// Its name and its number of peers.
    pub fn describe(self) -> (&'static str, usize) {
        KINDS.iter().find(|(_, kind, _)| *kind == self).map_or(("", 0), |(name, _, peers)| (name, *peers))
    }

    /// Between two subscriptions of one peer. The gateway allows one every 200 ms.
    pub fn pace(self, place: usize) -> Duration {
        Duration::from_millis(if place.is_multiple_of(FAST) { 50 } else { 220 })
    }

    /// The subscription number `turn` of a peer: on two channels of its own in turn, so that each is a new one.
    pub fn subscription(self, number: usize, turn: usize, last: i64) -> String {
        subscribe(&format!("\"hostile-{number}-{}\"", turn % 2), last)
    }

    /// The long messages.
    pub fn giants(self, last: i64) -> Vec<String> {
        match self {
            Kind::Giants => {
                let mut text = String::from(r#"{"event_name":"nothing","data":""#);
                text.extend(std::iter::repeat_n('x', GIANT - text.len() - 2));
                text.push_str("\"}");
                vec![text]
            }
            Kind::Lists => vec![list(0, last), list(1, last)],
            _ => Vec::new(),
        }
    }
}

/// A subscription to these channels.
pub fn subscribe(channels: &str, last: i64) -> String {
    format!(r#"{{"event_name":"subscribe","data":{{"channels":[{channels}],"last":{last}}}}}"#)
}

/// A subscription to as many channels as one may have, as long as a message may be.
fn list(turn: usize, last: i64) -> String {
    let rest = GIANT - subscribe("", last).len();
    // Quotes and comma, then a name of its number and filling.
    let filling = "x".repeat(rest / CHANNELS - 3 - "hostile-0-00000-".len());
    let mut channels = String::new();
    for channel in 0..CHANNELS {
        let comma = if channel > 0 { "," } else { "" };
        let _ = write!(channels, r#"{comma}"hostile-{turn}-{channel:05}-{filling}""#);
    }
    subscribe(&channels, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_as_long_as_they_may_be() {
        for kind in [Kind::Giants, Kind::Lists] {
            for text in kind.giants(123) {
                assert!((GIANT - CHANNELS..=GIANT).contains(&text.len()), "{}", text.len());
            }
        }
    }
}
