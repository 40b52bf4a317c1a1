//! When a schedule is due next: cron expressions, and what a change of the clocks does to them. Knows no clock and no
//! table of time zones; both are arguments.

use super::error::{Error, Result};
use croner::parser::{CronParser, Seconds, Year};
use croner::{CivilDate, CivilDateTime, CivilTime, Weekday};
use croner::{Cron, CronDateTime, Resolution, errors::CronError};
use std::cmp::Ordering;

const DAY: i64 = 86_400;
/// Longer than any expression that a person writes (every minute of an hour by its number takes 169 characters).
const LENGTH_MAX: usize = 512;
/// What has no match for so long never has: 29 February on a given weekday comes within 40 years.
const YEARS: i32 = 50;
/// Changes of a zone's clocks that are looked at; a zone has two a year.
const CHANGES_MAX: usize = 4 * YEARS as usize;
/// A change of the clocks sets them by a day at most (Samoa, 2011); in a zone that somebody made up by twice 168 hours, as far as
/// PostgreSQL lets it be ahead or behind (getsecs of timezone/localtime.c).
const CHANGE_MAX: i64 = 14 * DAY;

/// Names for expressions, as Vixie cron has them.
const NAMES: [(&str, &str); 7] = [
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
    ("@monthly", "0 0 1 * *"),
    ("@weekly", "0 0 * * 0"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@hourly", "0 * * * *"),
];
/// The fields, in their order.
const FIELDS: [&str; 6] = ["second", "minute", "hour", "day of the month", "month", "day of the week"];
const MONTHS: &[&str] = &["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];
const WEEKDAYS: &[&str] = &["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];

/// How far a zone is ahead of UTC from some moment on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Seconds to add to UTC.
    pub offset: i64,
    /// The moment (in seconds since 1970) from which on it may be another; None: never.
    pub until: Option<i64>,
}

/// A time zone.
pub trait Zone {
    /// What holds at a moment in seconds since 1970; its end is later than that moment.
    fn span(&self, at: i64) -> Span;
}

/// A cron expression.
#[derive(Clone, Debug)]
pub struct Expression {
    cron: Cron,
    /// It matches in every hour of a day.
    is_hourly: bool,
}

impl Expression {
    /// Reads an expression of five fields (minute, hour, day of the month, month, day of the week) or six (seconds
    /// first), or a name such as `@daily`. Errors: anything else.
    pub fn parse(text: &str) -> Result<Expression> {
        let refused = |reason: String| Error::Argument { argument: "cron_expression", value: text.to_owned(), reason };
        if text.len() > LENGTH_MAX {
            return Err(refused(format!("it is longer than {LENGTH_MAX} bytes")));
        }
        let trimmed = text.trim();
        let named = NAMES.iter().find(|(name, _)| trimmed.eq_ignore_ascii_case(name));
        if named.is_none() && trimmed.starts_with('@') {
            let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
            return Err(refused(format!("it must be one of {}", names.join(", "))));
        }
        let upper = named.map_or(trimmed, |(_, expression)| expression).to_ascii_uppercase();
        let mut fields: Vec<&str> = upper.split_ascii_whitespace().collect();
        if fields.len() == 5 {
            fields.insert(0, "0");
        }
        if fields.len() != FIELDS.len() {
            return Err(refused("it must have five fields, or six with seconds first".to_owned()));
        }
        for (index, (field, name)) in fields.iter().zip(FIELDS).enumerate() {
            check(index, field).map_err(|reason| refused(format!("the {name} \"{field}\" {reason}")))?;
        }
        let cron = parser().parse(&fields.join(" ")).map_err(|error| refused(said(&error)))?;
        let is_hourly = cron.pattern.hours.values().len() == 24;
        Ok(Expression { cron, is_hourly })
    }

    /// The first moment after `now` (both in seconds since 1970) at which it is due; None when there is none in the next
    /// 50 years.
    ///
    /// A time on the wall is due when the clocks first show it or are past it: one that does not exist since they are
    /// set forward, at the moment they are; one that exists twice, the first time only. An expression that matches in
    /// every hour (`*/10 * * * *`, `@hourly`) means an interval: it goes by elapsed time, without a pause or a burst when
    /// the clocks change.
    pub fn next(&self, now: i64, zone: &impl Zone) -> Option<i64> {
        let mut span = zone.span(now);
        // The first time on the wall that has not been yet.
        let mut from = now.checked_add(1)?.checked_add(span.offset)?;
        if !self.is_hourly {
            from = from.max(seen(now, zone));
        }
        for _ in 0..CHANGES_MAX {
            let found = self.matching(from)?;
            let at = found.checked_sub(span.offset)?;
            let Some(until) = span.until.filter(|until| at >= *until) else { return Some(at) };
            let after = zone.span(until);
            let (left, reached) = (until.checked_add(span.offset)?, until.checked_add(after.offset)?);
            if self.is_hourly {
                from = reached;
            } else if found < reached {
                return Some(until);
            } else {
                from = from.max(left).max(reached);
            }
            span = after;
        }
        None
    }

    /// The first matching time on the wall that is not before `from`.
    fn matching(&self, from: i64) -> Option<i64> {
        let from = Wall::at(from)?;
        self.cron.find_next_occurrence(&from, true).ok().map(|wall| wall.seconds)
    }
}

/// Up to which time on the wall all times have been by now, where clocks have been set back of late.
fn seen(now: i64, zone: &impl Zone) -> i64 {
    let (mut at, mut seen) = (now.saturating_sub(CHANGE_MAX), i64::MIN);
    for _ in 0..CHANGES_MAX {
        let span = zone.span(at);
        let Some(until) = span.until.filter(|until| *until <= now) else { break };
        seen = seen.max(until.saturating_add(span.offset));
        at = until;
    }
    seen
}

fn parser() -> CronParser {
    CronParser::builder().seconds(Seconds::Required).year(Year::Disallowed).build()
}

/// croner's words without its own name for the thing.
fn said(error: &CronError) -> String {
    match error {
        CronError::InvalidPattern(words) | CronError::IllegalCharacters(words) | CronError::ComponentError(words) => {
            words.trim_end_matches('.').to_owned()
        }
        other => other.to_string(),
    }
}

/// Refuses a field, in words, that is wrong by itself, or that the parser takes although it can mean nothing good
/// (names are replaced by numbers wherever they stand, empty elements of a list are skipped).
fn check(index: usize, field: &str) -> std::result::Result<(), String> {
    let words = field.strip_prefix('+').filter(|_| index == 5).unwrap_or(field).split([',', '-', '/', '#']);
    if !words.into_iter().all(|word| is_word(index, word)) {
        return Err("is malformed".to_owned());
    }
    let alone: Vec<&str> = (0..FIELDS.len()).map(|other| if other == index { field } else { "*" }).collect();
    match parser().parse(&alone.join(" ")) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("is not valid: {}", said(&error).to_lowercase())),
    }
}

/// What may stand between the separators of a field.
fn is_word(index: usize, word: &str) -> bool {
    let is_number = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    let is_special = match index {
        3 => matches!(word, "?" | "L" | "LW") || word.strip_suffix('W').is_some_and(is_number),
        4 => MONTHS.contains(&word),
        5 => {
            let day = word.strip_suffix('L').unwrap_or(word);
            matches!(word, "?" | "L") || WEEKDAYS.contains(&day) || is_number(day)
        }
        _ => false,
    };
    word == "*" || is_number(word) || is_special
}

/// A time on the wall of no zone: seconds since 1970-01-01 00:00 there.
#[derive(Clone, Copy, Debug)]
struct Wall {
    seconds: i64,
    civil: CivilDateTime,
    /// No match is looked for after this year.
    last_year: i32,
}

impl Wall {
    fn at(seconds: i64) -> Option<Wall> {
        let (days, time) = (seconds.div_euclid(DAY), u32::try_from(seconds.rem_euclid(DAY)).ok()?);
        let (year, month, day) = date(days)?;
        let date = CivilDate::from_ymd_opt(year, month, day)?;
        let time = CivilTime::from_hms_opt(time / 3600, time / 60 % 60, time % 60)?;
        Some(Wall { seconds, civil: CivilDateTime::new(date, time), last_year: year.saturating_add(YEARS) })
    }
}

impl CronDateTime for Wall {
    fn to_civil(&self) -> CivilDateTime {
        self.civil
    }

    fn civil_weekday(&self) -> Weekday {
        // 1970-01-01 was a Thursday.
        let day = (self.seconds.div_euclid(DAY) + 4).rem_euclid(7);
        Weekday::from_days_from_sunday(u32::try_from(day).unwrap_or(0))
    }

    fn resolve_civil(&self, civil: CivilDateTime) -> std::result::Result<Resolution<Wall>, CronError> {
        if civil.year() > self.last_year {
            return Err(CronError::TimeSearchLimitExceeded);
        }
        let time = i64::from(civil.hour()) * 3600 + i64::from(civil.minute()) * 60 + i64::from(civil.second());
        let seconds = days(civil.year(), civil.month(), civil.day()) * DAY + time;
        Ok(Resolution::Single(Wall { seconds, civil, last_year: self.last_year }))
    }

    fn checked_add_seconds(&self, seconds: i64) -> Option<Wall> {
        let wall = Wall::at(self.seconds.checked_add(seconds)?)?;
        Some(Wall { last_year: self.last_year, ..wall })
    }

    fn cmp_instant(&self, other: &Wall) -> Ordering {
        self.seconds.cmp(&other.seconds)
    }
}

/// Days in 400 years.
const ERA: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;

/// Year, month and day of the so-manieth day since 1970. Years are counted from March, so that leap days end them.
fn date(days: i64) -> Option<(i32, u32, u32)> {
    let since = days.checked_add(EPOCH)?;
    let (era, day) = (since.div_euclid(ERA), since.rem_euclid(ERA));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = i32::try_from(year + era * 400 + later).ok()?;
    Some((year, u32::try_from(month).ok()?, u32::try_from(day).ok()?))
}

/// The reverse.
fn days(year: i32, month: u32, day: u32) -> i64 {
    let (month, day) = (i64::from(month), i64::from(day));
    let year = i64::from(year) - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * ERA + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - EPOCH
}

#[cfg(test)]
mod tests;
