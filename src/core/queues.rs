//! The limits of queues (`imbus.queues`).

use std::collections::HashMap;

/// How many jobs of each queue may be processed at the same time (`imbus.queues`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits(HashMap<String, usize>);

impl Limits {
    /// Reads `name:limit,name:limit`; a name may hold anything but a comma and, at its end, white space. Err says what is
    /// wrong.
    pub fn parse(text: &str) -> Result<Limits, String> {
        let mut limits = HashMap::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, limit) = part.rsplit_once(':').ok_or_else(|| format!("\"{part}\" has no limit"))?;
            let (name, limit) = (name.trim(), limit.trim());
            let number = limit.parse().map_err(|_| format!("\"{limit}\" is no number of jobs"))?;
            if name.is_empty() {
                return Err(format!("\"{part}\" names no queue"));
            }
            if limits.insert(name.to_owned(), number).is_some() {
                return Err(format!("queue \"{name}\" is named twice"));
            }
        }
        Ok(Limits(limits))
    }

    /// The limit of a queue; None for as many as there are runners, 0 for one that is left to runners outside.
    pub fn of(&self, queue: &str) -> Option<usize> {
        self.0.get(queue).copied()
    }

    /// The queues that have one.
    pub fn queues(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_limits() {
        let limits = Limits::parse("default:4, mail:1 ,root.export:2,a:b:0,").unwrap();
        assert_eq!(limits.of("default"), Some(4));
        assert_eq!(limits.of("root.export"), Some(2));
        assert_eq!(limits.of("a:b"), Some(0));
        assert_eq!(limits.of("other"), None);
        assert!(Limits::parse("").unwrap().is_empty());
        for wrong in ["default", "default:x", ":3", "a:1,a:2", "a:-1", "a:"] {
            assert!(Limits::parse(wrong).is_err(), "{wrong}");
        }
    }
}
