use super::*;
use proptest::prelude::*;

/// A zone by its changes: from a moment on, so many seconds ahead.
#[derive(Debug)]
struct Changes {
    first: i64,
    then: Vec<(i64, i64)>,
}

impl Zone for Changes {
    fn span(&self, at: i64) -> Span {
        let past = self.then.iter().take_while(|(moment, _)| *moment <= at).count();
        let offset = if past == 0 { self.first } else { self.then[past - 1].1 };
        Span { offset, until: self.then.get(past).map(|(moment, _)| *moment) }
    }
}

const UTC: Changes = Changes { first: 0, then: Vec::new() };

/// Berlin in 2026: on 29 March at 2:00 to 3:00, on 25 October at 3:00 to 2:00.
fn berlin() -> Changes {
    Changes { first: 3600, then: vec![(at("2026-03-29 01:00:00"), 7200), (at("2026-10-25 01:00:00"), 3600)] }
}

/// A time in UTC.
fn at(text: &str) -> i64 {
    let part = |from: usize, to: usize| text[from..to].parse::<i64>().unwrap();
    let day = days(part(0, 4) as i32, part(5, 7) as u32, part(8, 10) as u32);
    day * DAY + part(11, 13) * 3600 + part(14, 16) * 60 + part(17, 19)
}

fn shown(moment: i64) -> String {
    let ((year, month, day), time) = (date(moment.div_euclid(DAY)).unwrap(), moment.rem_euclid(DAY));
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", time / 3600, time / 60 % 60, time % 60)
}

/// The next moments in UTC.
fn due(expression: &str, now: &str, zone: &Changes, count: usize) -> Vec<String> {
    let expression = Expression::parse(expression).unwrap();
    let mut now = at(now);
    let mut next = || {
        now = expression.next(now, zone).unwrap();
        shown(now)
    };
    (0..count).map(|_| next()).collect()
}

fn refusal(expression: &str) -> String {
    Expression::parse(expression).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn five_fields_six_fields_and_names_are_understood() {
    let now = "2026-11-23 19:29:30";
    let next = |expression| due(expression, now, &UTC, 1).remove(0);
    assert_eq!(next("* * * * *"), "2026-11-23 19:30:00");
    assert_eq!(next("*/10 * * * * *"), "2026-11-23 19:29:40");
    assert_eq!(next("  15   3 * * MON-FRI "), "2026-11-24 03:15:00");
    assert_eq!(next("0 0 1 jan *"), "2027-01-01 00:00:00");
    assert_eq!(next("0 0 * * sun"), "2026-11-29 00:00:00");
    assert_eq!(next("0 0 * * 7"), "2026-11-29 00:00:00");
    assert_eq!(next("0 12 L * *"), "2026-11-30 12:00:00");
    assert_eq!(next("0 12 * * FRI#2"), "2026-12-11 12:00:00");
    assert_eq!(next("0 12 * * 5L"), "2026-11-27 12:00:00");
    assert_eq!(next("0 12 15W * ?"), "2026-12-15 12:00:00");
    assert_eq!(next("0 0 13 * FRI"), "2026-11-27 00:00:00", "either day, as Vixie cron has it");
    assert_eq!(next("0 0 13 * +FRI"), "2027-08-13 00:00:00", "both");
    assert_eq!(next("@yearly"), "2027-01-01 00:00:00");
    assert_eq!(next("@monthly"), "2026-12-01 00:00:00");
    assert_eq!(next("@weekly"), "2026-11-29 00:00:00");
    assert_eq!(next("@Daily"), "2026-11-24 00:00:00");
    assert_eq!(next("@midnight"), "2026-11-24 00:00:00");
    assert_eq!(next("@hourly"), "2026-11-23 20:00:00");
    assert_eq!(next("0 0 29 2 *"), "2028-02-29 00:00:00");
    assert_eq!(next("0 0 29 2 +MON"), "2044-02-29 00:00:00");
}

#[test]
fn a_time_that_matches_now_is_not_the_next() {
    assert_eq!(due("0 3 * * *", "2026-11-23 03:00:00", &UTC, 1), ["2026-11-24 03:00:00"]);
    assert_eq!(due("0 3 * * *", "2026-11-23 02:59:59", &UTC, 1), ["2026-11-23 03:00:00"]);
}

#[test]
fn what_means_nothing_is_refused_with_the_field() {
    for expression in [
        "",
        " ",
        "*",
        "* * * *",
        "* * * * * * *",
        "@",
        "@reboot",
        "@every 5m",
        "5 seconds",
        "* * * * * 2027 *",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * 32 * *",
        "* * * 13 *",
        "* * * * 8",
        "-1 * * * *",
        "5-3 * * * *",
        "*/0 * * * *",
        "/5 * * * *",
        "5/5 * * * *",
        "1, * * * *",
        ", * * * *",
        "1,,2 * * * *",
        "1- * * * *",
        "1-2-3 * * * *",
        "* * * 1JAN *",
        "* * * JANFEB *",
        "MON * * * *",
        "* * FEB * *",
        "* * * MON *",
        "* * * * JAN",
        "? * * * *",
        "L * * * *",
        "* L * * *",
        "* * W * *",
        "* * * L *",
        "* * * * 1#6",
        "* * * * 1#0",
        "* * * * #",
        "* * * * 5W",
        "+1 * * * *",
        "* * * * ++1",
        "* * * * *; DROP",
        "🙂 * * * *",
        "ſ * * * *",
        "* * * * \0",
        "99999999999999999999 * * * *",
        "１ * * * *",
    ] {
        assert!(
            refusal(expression).starts_with("invalid cron_expression: "),
            "{expression:?}: {}",
            refusal(expression)
        );
    }
    assert_eq!(refusal("0 24 * * *"), "invalid cron_expression: the hour \"24\" is not valid: number out of bounds");
    assert_eq!(refusal("0 0 * * FOO"), "invalid cron_expression: the day of the week \"FOO\" is malformed");
    assert_eq!(refusal(&"1,".repeat(1000)), "invalid cron_expression: it is longer than 512 bytes");
}

#[test]
fn what_never_comes_is_found_out() {
    for expression in ["0 0 30 2 *", "0 0 31 2,4,6,9,11 *", "* * * 31 11 *"] {
        assert_eq!(Expression::parse(expression).unwrap().next(at("2026-11-23 00:00:00"), &UTC), None, "{expression}");
    }
    let daily = Expression::parse("@daily").unwrap();
    for now in [i64::MIN, i64::MIN / 2, i64::MAX / 2, i64::MAX - 1, i64::MAX, 0, -1] {
        assert!(daily.next(now, &UTC).is_none_or(|next| next > now));
    }
}

#[test]
fn a_time_that_does_not_exist_is_due_once_when_the_clocks_are_set_forward() {
    let zone = berlin();
    assert_eq!(due("30 2 * * *", "2026-03-28 12:00:00", &zone, 2), ["2026-03-29 01:00:00", "2026-03-30 00:30:00"]);
    assert_eq!(due("0,30 2,14 * * *", "2026-03-28 22:00:00", &zone, 2), ["2026-03-29 01:00:00", "2026-03-29 12:00:00"]);
    let every = due("*/20 1-3 * * *", "2026-03-29 00:30:00", &zone, 4);
    assert_eq!(every, ["2026-03-29 00:40:00", "2026-03-29 01:00:00", "2026-03-29 01:20:00", "2026-03-29 01:40:00"]);
    assert_eq!(due("0 0 29 3 *", "2026-03-28 12:00:00", &zone, 1), ["2026-03-28 23:00:00"]);
}

#[test]
fn a_time_that_exists_twice_is_due_once() {
    let zone = berlin();
    assert_eq!(due("30 2 * * *", "2026-10-24 12:00:00", &zone, 2), ["2026-10-25 00:30:00", "2026-10-26 01:30:00"]);
    // Asked in the second half: also by one that has not asked before.
    assert_eq!(due("30 2 * * *", "2026-10-25 01:10:00", &zone, 1), ["2026-10-26 01:30:00"]);
    assert_eq!(due("0 3 * * *", "2026-10-25 01:10:00", &zone, 1), ["2026-10-25 02:00:00"]);
}

#[test]
fn an_interval_goes_by_elapsed_time() {
    let zone = berlin();
    let every = due("*/30 * * * *", "2026-10-25 00:00:00", &zone, 4);
    assert_eq!(every, ["2026-10-25 00:30:00", "2026-10-25 01:00:00", "2026-10-25 01:30:00", "2026-10-25 02:00:00"]);
    assert_eq!(due("30 * * * *", "2026-03-29 00:00:00", &zone, 2), ["2026-03-29 00:30:00", "2026-03-29 01:30:00"]);
}

#[test]
fn a_day_that_does_not_exist_is_made_up_for() {
    // Samoa skipped 30 December 2011.
    let zone = Changes { first: -10 * 3600, then: vec![(at("2011-12-30 10:00:00"), 14 * 3600)] };
    assert_eq!(
        due("0 9 * * *", "2011-12-29 12:00:00", &zone, 3),
        ["2011-12-29 19:00:00", "2011-12-30 10:00:00", "2011-12-30 19:00:00"]
    );
}

#[test]
fn a_time_that_was_skipped_does_not_come_again_when_the_clocks_are_set_back_soon() {
    // Half an hour of the next morning in the evening: from 20:00 on it is 04:10, then 20:30 again.
    let (first, second) = (at("2026-09-21 20:00:00"), at("2026-09-21 20:30:00"));
    let zone = Changes { first: 0, then: vec![(first, 8 * 3600 + 600), (second, 0)] };
    let times = due("0,20,50 4 * * *", "2026-09-21 12:00:00", &zone, 4);
    assert_eq!(times, ["2026-09-21 20:00:00", "2026-09-21 20:10:00", "2026-09-22 04:50:00", "2026-09-23 04:00:00"]);
    // Also for one that asks only now.
    assert_eq!(due("0,20,50 4 * * *", "2026-09-22 03:00:00", &zone, 1), ["2026-09-22 04:50:00"]);
}

#[test]
fn days_that_were_seen_do_not_come_again_however_far_the_clocks_are_set_back() {
    // From four days ahead to four days behind: it was 14 October already.
    let zone = Changes { first: 4 * DAY, then: vec![(at("2026-10-10 00:00:00"), -4 * DAY)] };
    for now in ["2026-10-10 12:00:00", "2026-10-14 00:00:00", "2026-10-17 12:00:00"] {
        assert_eq!(due("0 12 * * *", now, &zone, 1), ["2026-10-18 12:00:00"], "{now}");
    }
}

#[test]
fn days_and_dates_agree() {
    for day in -800_000..800_000 {
        let (year, month, of_month) = date(day).unwrap();
        assert_eq!(days(year, month, of_month), day);
    }
    assert_eq!(date(0), Some((1970, 1, 1)));
    assert_eq!(date(20_780), Some((2026, 11, 23)));
}

/// All moments in the days around, worked out from the definition: each matching time on the wall in turn.
fn expected(expression: &Expression, zone: &Changes, now: i64) -> Option<i64> {
    let spans =
        std::iter::successors(Some(now - 4 * DAY), |at| zone.span(*at).until).take_while(|at| *at < now + 4 * DAY);
    let spans: Vec<(i64, Span)> = spans.map(|at| (at, zone.span(at))).collect();
    let walls = std::iter::successors(expression.matching(now - 3 * DAY), |wall| expression.matching(wall + 1));
    let mut moments = Vec::new();
    for wall in walls.take_while(|wall| *wall < now + 3 * DAY) {
        if expression.is_hourly {
            // Each moment at which the wall shows it.
            moments.extend(spans.iter().filter_map(|(from, span)| {
                let at = wall - span.offset;
                (at >= *from && span.until.is_none_or(|until| at < until)).then_some(at)
            }));
        } else {
            // The first moment at which the wall shows it or is past it.
            let first = spans.iter().find(|(_, span)| span.until.is_none_or(|until| until + span.offset > wall));
            moments.extend(first.map(|(from, span)| (wall - span.offset).max(*from)));
        }
    }
    moments.into_iter().filter(|at| *at > now && *at < now + 2 * DAY).min()
}

fn field(max: u32) -> impl Strategy<Value = String> {
    prop_oneof![
        Just("*".to_owned()),
        (1..=max).prop_map(|step| format!("*/{step}")),
        (0..=max).prop_map(|value| value.to_string()),
        prop::collection::vec(0..=max, 1..5).prop_map(|values| values
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(",")),
        (0..=max, 0..=max).prop_map(|(a, b)| format!("{}-{}", a.min(b), a.max(b))),
    ]
}

fn zones() -> impl Strategy<Value = Changes> {
    let change = (1i64..200, -24i64..=24);
    (-24i64..=24, prop::collection::vec(change, 0..5)).prop_map(|(first, changes)| {
        let mut moment = 1_790_000_000;
        let then = changes.into_iter().map(|(later, quarters)| {
            moment += later * 1800;
            (moment, quarters * 1800)
        });
        Changes { first: first * 1800, then: then.collect() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_next_time_is_later_than_now_and_matches(
        minute in field(59), hour in field(23), weekday in field(6), now in 1_789_990_000i64..1_791_000_000, zone in zones(),
    ) {
        let expression = Expression::parse(&format!("{minute} {hour} * * {weekday}")).unwrap();
        let next = expression.next(now, &zone);
        if let Some(next) = next {
            prop_assert!(next > now);
            let wall = next + zone.span(next).offset;
            let is_change = zone.then.iter().any(|(moment, _)| *moment == next);
            prop_assert!(expression.matching(wall) == Some(wall) || is_change);
        }
        prop_assert_eq!(next.filter(|next| *next < now + 2 * DAY), expected(&expression, &zone, now));
    }

    #[test]
    fn whatever_is_parsed_ends_well(text in "[-0-9*/,#LW?+@A-Z ]{0,40}", now in any::<i64>()) {
        if let Ok(expression) = Expression::parse(&text) {
            prop_assert!(expression.next(now, &UTC).is_none_or(|next| next > now));
        }
    }

    #[test]
    fn fields_of_any_characters_end_well(fields in prop::collection::vec("[-0-9*/,#LW?+]{1,6}", 5..7), now in 0i64..1 << 40) {
        if let Ok(expression) = Expression::parse(&fields.join(" ")) {
            prop_assert!(expression.next(now, &UTC).is_none_or(|next| next > now));
        }
    }
}
