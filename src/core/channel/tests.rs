use super::*;
use proptest::prelude::*;

fn reason(result: Result<Channel>) -> &'static str {
    match result {
        Err(Error::Channel { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

fn text(result: Result<Channel>) -> String {
    result.unwrap().as_str().to_owned()
}

#[test]
fn a_plain_name_is_one_element() {
    assert_eq!(text(Channel::plain("broadcast")), r#"["broadcast"]"#);
    assert_eq!(text(Channel::plain("é\"\n")), r#"["\u00e9\"\n"]"#);
    assert_eq!(text(Channel::plain("[1]")), r#"["[1]"]"#);
    assert_eq!(reason(Channel::plain("")), "it must not be empty");
}

#[test]
fn json_names_a_channel() {
    let cases = [
        (r#""broadcast""#, r#"["broadcast"]"#),
        (r#" "db" "#, r#"["db"]"#),
        (r#"["broadcast"]"#, r#"["broadcast"]"#),
        (r#"["db","broadcast"]"#, r#"["broadcast"]"#),
        (r#"["\u0064b", "broadcast"]"#, r#"["broadcast"]"#),
        (r#"["db","db"]"#, r#"["db"]"#),
        (r#"["other","broadcast"]"#, r#"["other","broadcast"]"#),
        (r#"[ "res.partner" , 42 ]"#, r#"["res.partner",42]"#),
        (r#"["discuss.channel",7.0,"members",true,false]"#, r#"["discuss.channel",7,"members",true,false]"#),
        (r#"["é\ud83d","\/"]"#, r#"["\u00e9\ud83d","/"]"#),
    ];
    for (given, canonical) in cases {
        assert_eq!(text(Channel::from_json(given, "db")), canonical, "{given}");
    }
}

#[test]
fn json_that_names_none_is_refused_with_a_reason() {
    let cases = [
        (r#""""#, "it must not be empty"),
        ("[]", "it must not be empty"),
        (r#"[""]"#, "it must not be empty"),
        (r#"["",1]"#, "it must not be empty"),
        (r#"["db",""]"#, "it must not be empty"),
        ("42", "it must be a string or an array"),
        ("{}", "it must be a string or an array"),
        ("null", "it must be a string or an array"),
        ("[42]", "its first element must be a string"),
        (r#"["db",42]"#, "its first element must be a string"),
        (r#"["db"]"#, "it names nothing but the database"),
        (r#"["a",null]"#, "its elements must be strings, numbers or booleans"),
        (r#"["a",[]]"#, "its elements must be strings, numbers or booleans"),
        (r#"["a",{"b":1}]"#, "its elements must be strings, numbers or booleans"),
        (r#"[["a"]]"#, "its elements must be strings, numbers or booleans"),
        (r#"["a",1e1000001]"#, "a number in it is out of range"),
        (r#"["a",1e-99999999999999999999]"#, "a number in it is out of range"),
    ];
    for (given, why) in cases {
        assert_eq!(reason(Channel::from_json(given, "db")), why, "{given}");
    }
    assert!(matches!(Channel::from_json("[", "db"), Err(Error::Json { .. })));
    assert!(matches!(Channel::from_json("broadcast", "db"), Err(Error::Json { .. })));
}

#[test]
fn a_row_must_be_of_its_database() {
    assert_eq!(text(Channel::from_row(r#"["db", "res.partner", 3]"#, "db")), r#"["res.partner",3]"#);
    assert_eq!(text(Channel::from_row(r#"["d\u0062","é"]"#, "db")), r#"["\u00e9"]"#);
    assert_eq!(text(Channel::from_row(r#"["é","x"]"#, "é")), r#"["x"]"#);
    for foreign in
        [r#"["other","x"]"#, r#"["DB","x"]"#, r#"[1,"x"]"#, r#"["x"]"#, r#"[["db"],"x"]"#, r#"["db\ud83d",1]"#]
    {
        let error = Error::ForeignChannel { value: foreign.into(), database: "db".into() };
        assert_eq!(Channel::from_row(foreign, "db"), Err(error));
    }
    assert_eq!(reason(Channel::from_row(r#"["db"]"#, "db")), "it names nothing but the database");
    assert_eq!(reason(Channel::from_row("[]", "db")), "it must not be empty");
    assert_eq!(reason(Channel::from_row(r#""db""#, "db")), "it must be an array");
    assert_eq!(reason(Channel::from_row(r#"["db",null]"#, "db")), "its elements must be strings, numbers or booleans");
    assert!(matches!(Channel::from_row("", "db"), Err(Error::Json { .. })));
}

#[test]
fn the_stored_text_is_odoos() {
    assert_eq!(Channel::plain("broadcast").unwrap().stored("odoo18"), r#"["odoo18","broadcast"]"#);
    let members = Channel::from_json(r#"["discuss.channel",7,"members"]"#, "é").unwrap();
    assert_eq!(members.stored("é"), r#"["\u00e9","discuss.channel",7,"members"]"#);
}

#[test]
fn numbers_of_one_value_have_one_text() {
    let cases: [(&str, &[&str]); 11] = [
        ("0", &["0", "-0", "0.0", "-0.000", "0e5", "0E-99999999999999999999", "-0.0e+7"]),
        ("42", &["42", "42.0", "4.2e1", "4.2E+01", "0.42e2", "420e-1", "4200.00e-0002"]),
        ("-42", &["-42", "-42.0", "-4.2e1"]),
        ("1000", &["1000", "1e3", "1E3", "10e2", "1000000e-3", "0.001e6"]),
        ("1.5", &["1.5", "1.50", "15e-1", "0.15e1"]),
        ("0.001", &["0.001", "1e-3", "0.00100", "100e-5"]),
        ("123456789012345678901234567890", &["123456789012345678901234567890", "1.2345678901234567890123456789e29"]),
        ("10000000000000000000000000000000000000000", &["1e40", "10e39"]),
        ("1e41", &["1e41", "100000000000000000000000000000000000000000", "10e40"]),
        ("0.00000000000000000000000000000000000000001", &["1e-41", "0.1e-40"]),
        ("-12e-43", &["-1.2e-42", "-12e-43"]),
    ];
    for (canonical, spellings) in cases {
        for spelling in spellings {
            assert_eq!(number(spelling).as_deref(), Some(canonical), "{spelling}");
        }
    }
}

#[test]
fn a_channel_survives_the_link() {
    let channel = Channel::from_json(r#"["res.partner",42]"#, "db").unwrap();
    let bytes = postcard::to_stdvec(&channel).unwrap();
    assert_eq!(postcard::from_bytes::<Channel>(&bytes), Ok(channel));
}

/// A number as mantissa and exponent, spelled in one of several ways.
fn spelled(mantissa: i64, exponent: i32, way: usize) -> String {
    let zeros = |count: i32| "0".repeat(count.try_into().unwrap());
    match way % 5 {
        0 => format!("{mantissa}e{exponent}"),
        1 => format!("{mantissa}.00E{exponent:+}"),
        2 => format!("{mantissa}000e{}", exponent - 3),
        3 if exponent >= 0 && mantissa != 0 => format!("{mantissa}{}", zeros(exponent)),
        3 => format!("{}0.{:05}e{}", if mantissa < 0 { "-" } else { "" }, mantissa.abs() % 100_000, exponent + 5),
        _ => format!("{mantissa}e-000{}", -exponent).replace("e-000-", "e+000"),
    }
}

/// The same value has the same pair, and no other has.
fn reduced(mut mantissa: i64, mut exponent: i32) -> (i64, i32) {
    if mantissa == 0 {
        return (0, 0);
    }
    while mantissa % 10 == 0 {
        mantissa /= 10;
        exponent += 1;
    }
    (mantissa, exponent)
}

proptest! {
    #[test]
    fn equal_numbers_and_only_those_are_equal(
        a in (-99_999i64..100_000, -50i32..50, 0usize..5), b in (-20i64..20, -3i32..4, 0usize..5),
        c in (-20i64..20, -3i32..4, 0usize..5),
    ) {
        let canonical = |(mantissa, exponent, way)| number(&spelled(mantissa, exponent, way)).unwrap();
        for way in 0..5 {
            prop_assert_eq!(canonical((a.0, a.1, way)), canonical(a));
        }
        prop_assert_eq!(canonical(b) == canonical(c), reduced(b.0, b.1) == reduced(c.0, c.1));
    }

    #[test]
    fn the_canonical_text_of_a_number_is_its_own(
        text in "-?(0|[1-9][0-9]{0,50})(\\.[0-9]{1,50})?([eE][+-]?[0-9]{1,6})?",
    ) {
        if let Some(canonical) = number(&text) {
            prop_assert_eq!(json::check(&canonical), Ok(()));
            prop_assert_eq!(number(&canonical), Some(canonical.clone()));
            prop_assert!(canonical.len() <= text.len() + PADDING_MAX as usize + 2, "{}", canonical);
            if let (Ok(given), Ok(shown)) = (text.parse::<f64>(), canonical.parse::<f64>()) {
                prop_assert_eq!(given, shown);
            }
        }
    }

    #[test]
    fn integers_are_themselves(value in any::<i64>()) {
        prop_assert_eq!(number(&value.to_string()), Some(value.to_string()));
    }

    #[test]
    fn canonicalisation_is_idempotent_and_spelling_does_not_matter(
        parts in prop::collection::vec(crate::core::json::tests::value(), 0..5), name in "[a-zé\u{1f600}]{1,8}",
    ) {
        let (loose, python): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        let quoted = json::string(&name);
        let array = |tail: Vec<String>| format!("[ {} ]", [vec![quoted.clone()], tail].concat().join(" , "));
        let channel = Channel::from_json(&array(loose.clone()), "DB");
        prop_assert_eq!(channel.is_ok(), Channel::from_json(&array(python.clone()), "DB").is_ok());
        if let Ok(channel) = channel {
            prop_assert_eq!(&Channel::from_json(&array(python), "DB").unwrap(), &channel);
            prop_assert_eq!(&Channel::from_json(channel.as_str(), "DB").unwrap(), &channel);
            prop_assert_eq!(&Channel::from_json(&channel.stored("DB"), "DB").unwrap(), &channel);
            prop_assert_eq!(&Channel::from_row(&channel.stored("DB"), "DB").unwrap(), &channel);
            prop_assert!(channel.as_str().is_ascii());
        }
    }

    #[test]
    fn a_row_comes_back_whatever_the_database_is_called(name in ".{1,10}", database in ".{1,10}") {
        let channel = Channel::plain(&name).unwrap();
        prop_assert_eq!(Channel::from_row(&channel.stored(&database), &database).unwrap(), channel.clone());
        prop_assert_eq!(Channel::from_json(&channel.stored(&database), &database).unwrap(), channel);
    }

    #[test]
    fn anything_is_refused_or_taken_without_panic(text in any::<String>(), database in any::<String>()) {
        let _ = (Channel::plain(&text), Channel::from_json(&text, &database), Channel::from_row(&text, &database));
    }

    #[test]
    fn anything_like_a_channel_is_refused_or_taken_without_panic(text in r#"\[?["a\\u0d8,1eE.+ -]{0,14}\]?"#) {
        let _ = (Channel::from_json(&text, "a"), Channel::from_row(&text, "a"));
    }
}
