//! What a desk promises.

use super::*;

fn recover(desk: &mut Desk, request: u64) {
    desk.ask(0, Ask::Recover(Recovery { request, channels: Vec::new(), last: 7 }));
}

/// What is asked of the worker now: requests, and `last` where it is the first page.
fn said(desk: &mut Desk) -> Vec<(u64, Option<i64>)> {
    std::iter::from_fn(|| desk.next())
        .map(|command| match command {
            Command::Recover { request, last, .. } => (request, Some(last)),
            Command::More { request } => (request, None),
            other => panic!("{other:?}"),
        })
        .collect()
}

#[test]
fn places_are_taken_in_the_order_of_asking_and_parked_replays_hold_none() {
    let mut desk = Desk::default();
    (1..=6).for_each(|request| recover(&mut desk, request));
    assert_eq!(said(&mut desk), [1, 2, 3, 4].map(|request| (request, Some(7))));
    assert_eq!(desk.answered(2, Some(20), true), Some(0));
    assert_eq!(said(&mut desk), [(5, Some(7))]);
    desk.ask(0, Ask::More(2));
    desk.ask(0, Ask::More(2));
    recover(&mut desk, 7);
    for request in [1, 3, 4] {
        desk.answered(request, Some(20), true);
    }
    assert_eq!(said(&mut desk), [(6, Some(7)), (2, None), (7, Some(7))]);
    assert_eq!((desk.answered(2, None, false), desk.answered(2, None, false)), (Some(0), None));
    desk.ask(0, Ask::More(2));
    assert_eq!(said(&mut desk), [], "2 is done");
}

#[test]
fn a_lost_link_is_made_up_for_in_the_old_order_and_from_the_last_page() {
    let mut desk = Desk { link: Some(1), ..Desk::default() };
    (1..=5).for_each(|request| recover(&mut desk, request));
    said(&mut desk);
    desk.answered(1, Some(30), true);
    desk.answered(2, Some(20), true);
    desk.answered(3, None, true);
    desk.ask(0, Ask::More(3));
    assert_eq!(said(&mut desk), [(5, Some(7)), (3, None)]);
    desk.ask(0, Ask::More(2));
    assert!(desk.forget(5));
    desk.lose();
    assert_eq!(desk.link, None);
    assert_eq!(desk.answered(4, Some(99), true), None, "the next worker was not asked yet");
    assert_eq!(said(&mut desk), [(4, Some(7)), (3, Some(7)), (2, Some(20))]);
    desk.ask(0, Ask::More(1));
    assert_eq!(said(&mut desk), [(1, Some(30))], "it was parked");
}

#[test]
fn what_is_given_up_frees_its_place_but_not_without_end() {
    let mut desk = Desk::default();
    for request in 1..=AHEAD as u64 {
        recover(&mut desk, request);
        assert_eq!(said(&mut desk).len(), 1);
        assert!(desk.forget(request));
    }
    recover(&mut desk, 100);
    recover(&mut desk, 101);
    assert_eq!(said(&mut desk), []);
    assert!(!desk.forget(101), "the worker has not heard of it");
    assert_eq!(desk.answered(3, Some(9), true), None);
    assert_eq!(said(&mut desk), [(100, Some(7))]);
    assert_eq!(desk.answered(100, Some(9), false), Some(0));
    (1..=AHEAD as u64).for_each(|request| assert_eq!(desk.answered(request, None, false), None));
    assert!(desk.is_empty() && desk.line.is_empty() && desk.asked == 0 && desk.forgotten.is_empty());
}

#[test]
fn pages_not_asked_for_are_passed_on_and_take_no_place() {
    let mut desk = Desk::default();
    recover(&mut desk, 1);
    said(&mut desk);
    assert_eq!(desk.answered(1, Some(8), true), Some(0));
    assert_eq!(desk.answered(1, Some(9), true), Some(0));
    desk.ask(0, Ask::More(1));
    assert_eq!(desk.answered(1, Some(10), true), Some(0));
    assert_eq!(said(&mut desk), [], "that was the page it waited for");
    desk.ask(0, Ask::More(1));
    assert_eq!(said(&mut desk), [(1, None)]);
    assert_eq!(desk.answered(1, None, false), Some(0));
    assert_eq!(desk.asked, 0);
}
