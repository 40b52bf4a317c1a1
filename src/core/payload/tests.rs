use super::*;
use proptest::prelude::*;

fn texts(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| (*part).to_owned()).collect()
}

#[test]
fn what_is_short_stays_as_it_is() {
    for payload in ["", "not JSON", " [ 1 , 2 ] ", "[[\"db\",\"broadcast\"]]"] {
        assert_eq!(split(payload, payload.len() + 1), Ok(texts(&[payload])));
    }
}

#[test]
fn the_left_half_is_the_larger() {
    assert_eq!(split("[1,2,3]", 7), Ok(texts(&["[1,2]", "[3]"])));
    assert_eq!(split("[1,2,3,4,5]", 8), Ok(texts(&["[1,2,3]", "[4,5]"])));
    assert_eq!(split("[1,2,3,4,5]", 7), Ok(texts(&["[1,2]", "[3]", "[4,5]"])));
    assert_eq!(split("[1,2,3,4,5]", 4), Ok(texts(&["[1]", "[2]", "[3]", "[4]", "[5]"])));
}

#[test]
fn elements_keep_their_text() {
    assert_eq!(split(r#" [ ["é" , 1] , {"a" : 2} ] "#, 20), Ok(texts(&[r#"[["é" , 1]]"#, r#"[{"a" : 2}]"#])));
    // White space alone does not make an element too long.
    assert_eq!(split("[                ]", 5), Ok(texts(&["[]"])));
    assert_eq!(split("[               1]", 5), Ok(texts(&["[1]"])));
}

#[test]
fn what_cannot_be_split_is_refused_with_the_limit() {
    let too_long = |value: &str, length, limit| Err(Error::PayloadTooLong { value: value.into(), length, limit });
    assert_eq!(split(r#"["abcdef",1]"#, 10), too_long(r#""abcdef""#, 10, 10));
    assert_eq!(split("[1,2]", 3), too_long("1", 3, 3));
    assert_eq!(split("[]", 1), too_long("[]", 2, 1));
    for other in [r#"{"a":[1,2]}"#, r#""abcdefghi""#, "no JSON at all", "[1,2,3,4,5", "[1,2,3,4] x"] {
        assert_eq!(split(other, 5), too_long(other, other.len(), 5), "{other}");
    }
}

#[test]
fn databases_are_decoded_and_each_named_once() {
    assert_eq!(databases("[]"), Ok(vec![]));
    assert_eq!(databases(r#"[["b","x"],["a","y",1],["b","z"],["\u0061"]]"#), Ok(texts(&["b", "a"])));
    assert_eq!(databases(r#" [ [ "\u00e9\ud83d\ude00\n" , null ] ] "#), Ok(texts(&["é\u{1f600}\n"])));
}

#[test]
fn malformed_payloads_are_refused() {
    assert!(matches!(databases("imbus"), Err(Error::Json { .. })));
    assert!(matches!(databases(""), Err(Error::Json { .. })));
    for payload in
        ["{}", "1", r#""db""#, r#"["db"]"#, "[[]]", "[[1]]", "[[[\"db\"]]]", r#"[["db"],{}]"#, r#"[["db"],["\ud83d"]]"#]
    {
        assert!(matches!(databases(payload), Err(Error::Channel { .. })), "{payload}");
    }
}

/// The same, told as Odoo does it: a list is sent whole when it is short or has but one channel, else halved.
fn oracle(elements: &[String], limit: usize) -> Option<Vec<String>> {
    let payload = format!("[{}]", elements.join(","));
    if payload.len() < limit {
        return Some(vec![payload]);
    }
    if elements.len() < 2 {
        return None;
    }
    let (left, right) = elements.split_at(elements.len() - elements.len() / 2);
    Some([oracle(left, limit)?, oracle(right, limit)?].concat())
}

proptest! {
    #[test]
    fn parts_are_short_and_make_up_the_whole(
        elements in prop::collection::vec(crate::core::json::tests::value(), 0..40), limit in 0usize..400,
    ) {
        let elements: Vec<String> = elements.into_iter().map(|(_, python)| python).collect();
        let payload = format!("[{}]", elements.join(","));
        let parts = split(&payload, limit);
        prop_assert_eq!(parts.clone().ok(), oracle(&elements, limit));
        match parts {
            Ok(parts) => {
                prop_assert!(parts.iter().all(|part| part.len() < limit));
                let whole: Vec<&str> = parts.iter().flat_map(|part| json::elements(part).unwrap().unwrap()).collect();
                prop_assert_eq!(whole, elements);
            }
            Err(Error::PayloadTooLong { length, limit: named, .. }) => {
                prop_assert!(length >= limit);
                prop_assert_eq!(named, limit);
            }
            Err(other) => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn databases_are_those_of_the_channels(names in prop::collection::vec(".{0,4}", 0..20)) {
        let channels: Vec<String> = names.iter().map(|name| format!("[{},\"x\"]", json::string(name))).collect();
        let mut once: Vec<String> = Vec::new();
        names.into_iter().for_each(|name| if !once.contains(&name) { once.push(name) });
        prop_assert_eq!(databases(&format!("[{}]", channels.join(","))), Ok(once));
    }

    #[test]
    fn nothing_panics(payload in any::<String>(), limit in any::<usize>()) {
        let _ = (split(&payload, limit), databases(&payload));
    }
}
