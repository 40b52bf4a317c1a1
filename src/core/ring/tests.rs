use super::*;
use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

/// A ring of any kind of word.
fn empty<W, const N: usize>(word: impl Fn() -> W) -> Ring<W, N> {
    let cell = |_| Cell { stamp: word(), tag: word(), first: word(), last: word() };
    Ring { head: word(), cells: std::array::from_fn(cell) }
}

fn ring<const N: usize>() -> Ring<AtomicU64, N> {
    empty(|| AtomicU64::new(0))
}

/// Whoever reads one sees whether all of it is of the same entry.
fn entry(first: i64) -> Entry {
    Entry { database: first as u32 + 7, kind: Kind::Committed, first, last: first * 5 + 1 }
}

fn entries(numbers: &[i64]) -> impl ExactSizeIterator<Item = Entry> {
    numbers.iter().copied().map(entry)
}

/// A reader, what it was given and whether it was told of a loss. Checks what holds at all times: nothing torn, nothing
/// twice, and nothing passed over for good without a word in the same read.
#[derive(Default)]
struct Listener {
    reader: Reader,
    indexes: HashSet<u64>,
    got: Vec<i64>,
    /// Indexes that a false `read` was about.
    lost: HashSet<u64>,
    is_told: bool,
}

impl Listener {
    fn at(cursor: u64) -> Listener {
        Listener { reader: Reader::new(cursor), ..Listener::default() }
    }

    fn listen<W: Word, const N: usize>(&mut self, ring: &Ring<W, N>) -> bool {
        let before = self.reader.position();
        let whole = self.reader.read(ring, |index, read| {
            assert_eq!(read, entry(read.first), "torn");
            assert!(self.indexes.insert(index), "{index} twice");
            self.got.push(read.first);
        });
        self.is_told |= !whole;
        let is_known = |index: &u64| self.reader.holes.contains(index) || self.indexes.contains(index);
        let missing = (before..self.reader.cursor()).filter(|index| !is_known(index) && !self.lost.contains(index));
        let missing: Vec<u64> = missing.collect();
        assert!(!whole || missing.is_empty(), "{missing:?} lost without a word");
        self.lost.extend(missing);
        whole
    }
}

/// Reserves the next index, as a writer does that then falls asleep.
fn reserve<const N: usize>(ring: &Ring<AtomicU64, N>) -> u64 {
    ring.head.fetch_add(1, Ordering::AcqRel)
}

#[test]
fn entries_come_in_their_order_once() {
    let ring = ring::<8>();
    ring.append(entries(&[5, 1]));
    ring.append(entries(&[3]));
    let (mut reader, mut got) = (Reader::new(0), Vec::new());
    assert!(reader.read(&ring, |index, entry| got.push((index, entry))));
    assert_eq!(got, [(0, entry(5)), (1, entry(1)), (2, entry(3))]);
    assert!(reader.read(&ring, |_, _| panic!("twice")));
    assert_eq!((reader.position(), reader.cursor(), ring.head()), (3, 3, 3));
}

#[test]
fn a_reader_that_keeps_up_gets_everything_lap_after_lap() {
    let (ring, mut listener) = (ring::<8>(), Listener::default());
    for number in 0..50 {
        ring.append(entries(&[2 * number, 2 * number + 1]));
        assert!(number % 4 != 3 || listener.listen(&ring));
    }
    assert!(listener.listen(&ring));
    assert_eq!(listener.got, (0..100).collect::<Vec<_>>());
}

#[test]
fn a_reader_begins_where_it_is_told_to() {
    let (ring, mut got) = (ring::<8>(), Vec::new());
    (0..6).for_each(|number| ring.append(entries(&[number])));
    assert!(Reader::new(4).read(&ring, |index, entry| got.push((index, entry.first))));
    assert_eq!(got, [(4, 4), (5, 5)]);
}

#[test]
fn a_reader_that_is_lapped_is_told_once_and_gets_what_is_left() {
    let (ring, mut listener) = (ring::<4>(), Listener::default());
    (0..4).for_each(|number| ring.append(entries(&[number])));
    assert!(Listener::at(0).listen(&ring), "a full ring is whole");
    ring.append(entries(&[4]));
    assert!(!listener.listen(&ring));
    assert_eq!(listener.got, [1, 2, 3, 4]);
    assert!(listener.listen(&ring));
}

#[test]
fn a_hole_is_given_once_when_it_is_filled_before_what_is_newer() {
    let (ring, mut listener) = (ring::<8>(), Listener::default());
    let late = reserve(&ring);
    ring.append(entries(&[1]));
    assert!(listener.listen(&ring));
    assert_eq!((listener.reader.position(), listener.reader.cursor()), (late, 2));
    assert!(listener.listen(&ring));
    ring.append(entries(&[2]));
    ring.write(late, entry(0));
    assert!(listener.listen(&ring));
    assert!(listener.listen(&ring));
    assert_eq!((listener.got, listener.reader.position()), (vec![1, 0, 2], 3));
}

#[test]
fn a_hole_that_is_never_filled_is_told_in_the_end() {
    let (ring, mut listener) = (ring::<4>(), Listener::default());
    let never = reserve(&ring);
    for number in 1..4 {
        ring.append(entries(&[number]));
        assert!(listener.listen(&ring));
        assert_eq!(listener.reader.position(), never);
    }
    ring.append(entries(&[4]));
    assert!(!listener.listen(&ring));
    assert_eq!((&listener.got[..], listener.reader.position()), (&[1, 2, 3, 4][..], 5));
    assert!(listener.listen(&ring));
}

#[test]
fn a_place_that_a_sleeping_writer_holds_is_given_up_and_told() {
    let (ring, mut listener) = (ring::<2>(), Listener::default());
    let asleep = reserve(&ring);
    ring.cells[asleep as usize].stamp.store(being_written(asleep), Ordering::Relaxed);
    ring.append_all(2, entries(&[1, 2]));
    assert!(!listener.listen(&ring), "the sleeper's entry is out of reach");
    assert_eq!((&listener.got[..], listener.reader.position()), (&[1][..], 2));
    ring.cells[asleep as usize].stamp.store(written(asleep), Ordering::Release);
    assert!(listener.listen(&ring), "not known to be lost yet");
    ring.append_all(2, entries(&[3, 4]));
    assert!(!listener.listen(&ring));
    assert_eq!((&listener.got[..], listener.reader.position()), (&[1, 3, 4][..], 5));
}

#[test]
fn a_writer_that_was_lapped_in_its_sleep_leaves_the_newer_entry_alone() {
    let (ring, mut listener) = (ring::<2>(), Listener::default());
    let asleep = reserve(&ring);
    ring.append_all(2, entries(&[1, 2]));
    ring.write(asleep, entry(0));
    assert!(!listener.listen(&ring));
    assert_eq!(listener.got, [1, 2]);
}

#[test]
fn an_entry_of_a_later_lap_is_no_hole_but_a_loss() {
    let (ring, mut listener) = (ring::<2>(), Listener::default());
    ring.append_all(1, entries(&[0]));
    // Another writer has reserved index 2 after the reader looked at the head.
    ring.cells[0].stamp.store(being_written(2), Ordering::Relaxed);
    assert!(!listener.listen(&ring));
    assert_eq!((listener.got.len(), listener.reader.position()), (0, 1));
}

#[test]
fn more_than_a_quarter_of_the_ring_is_one_overflow() {
    let (ring, mut got) = (ring::<8>(), Vec::new());
    ring.append(entries(&[]));
    ring.append(entries(&[1, 2]));
    ring.append(entries(&[3, 4, 5]));
    assert!(Reader::new(0).read(&ring, |_, entry| got.push((entry.kind, entry.first))));
    assert_eq!(got, [(Kind::Committed, 1), (Kind::Committed, 2), (Kind::Overflow, 3)]);
}

#[test]
fn a_cursor_beyond_the_head_is_told_and_goes_on_from_there() {
    let (ring, mut listener) = (ring::<8>(), Listener::at(90));
    ring.append(entries(&[1, 2]));
    assert!(!listener.listen(&ring));
    ring.append(entries(&[3]));
    assert!(listener.listen(&ring));
    assert_eq!((&listener.got[..], listener.reader.cursor()), (&[3][..], 3));
}

#[test]
fn holes_of_a_ring_that_has_begun_anew_are_forgotten() {
    let (old, new, mut listener) = (ring::<8>(), ring::<8>(), Listener::default());
    (0..4).for_each(|number| old.append(entries(&[number])));
    reserve(&old);
    listener.listen(&old);
    listener.indexes.clear();
    new.append(entries(&[10]));
    assert!(!listener.listen(&new));
    assert_eq!(listener.reader.position(), 1);
    (11..16).for_each(|number| new.append(entries(&[number])));
    assert!(listener.listen(&new));
    assert_eq!(listener.got, [0, 1, 2, 3, 11, 12, 13, 14, 15]);
}

#[test]
fn what_no_writer_writes_is_told_and_not_given() {
    for tag in [0, 7, 6 << 32, u64::MAX] {
        let ring = ring::<4>();
        ring.append(entries(&[1]));
        ring.cells[0].tag.store(tag, Ordering::Relaxed);
        ring.append(entries(&[2]));
        let mut got = Vec::new();
        assert!(!Reader::new(0).read(&ring, |index, _| got.push(index)));
        assert_eq!(got, [1], "{tag:x}");
    }
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "in vain");
        thread::yield_now();
    }
}

/// Writers keep half a ring's distance from the first reader, which must get everything; the second is on its own.
#[test]
fn four_busy_writers_lose_nothing_for_a_reader_that_keeps_up() {
    const WRITERS: i64 = 4;
    const APPENDS: i64 = 25_000;
    const N: usize = 256;
    let (ring, kept) = (ring::<N>(), AtomicU64::new(0));
    let total = (WRITERS * APPENDS * 2) as u64;
    let write = |writer: i64| {
        for number in (0..APPENDS).map(|number| (number * WRITERS + writer) * 2) {
            wait_until(|| ring.head().saturating_sub(kept.load(Ordering::Acquire)) <= N as u64 / 2);
            ring.append(entries(&[number, number + 1]));
        }
    };
    let read = |is_first: bool| {
        let mut listener = Listener::default();
        wait_until(|| {
            listener.listen(&ring);
            if is_first {
                kept.store(listener.reader.position(), Ordering::Release);
            }
            listener.reader.position() >= total
        });
        let mut latest = [-1; WRITERS as usize];
        for append in listener.got.iter().map(|number| number / 2) {
            let latest = &mut latest[(append % WRITERS) as usize];
            assert!(*latest <= append, "{append} after {latest}");
            *latest = append;
        }
        (listener.got.len() as u64, listener.is_told)
    };
    thread::scope(|scope| {
        let (first, second) = (scope.spawn(|| read(true)), scope.spawn(|| read(false)));
        (0..WRITERS).for_each(|writer| drop(scope.spawn(move || write(writer))));
        assert_eq!(first.join().unwrap(), (total, false));
        let (got, is_told) = second.join().unwrap();
        assert!(is_told || got == total);
    });
}

/// All the ways in which few threads can go through the ring, and all that they may see of each other, as loom finds
/// them.
mod models {
    use super::*;
    use loom::sync::{Arc, atomic};
    use loom::thread;

    struct Checked(atomic::AtomicU64);

    impl Word for Checked {
        fn load(&self, order: Ordering) -> u64 {
            self.0.load(order)
        }

        fn store(&self, value: u64, order: Ordering) {
            self.0.store(value, order);
        }

        fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            self.0.fetch_add(value, order)
        }

        fn compare_exchange(&self, current: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64> {
            self.0.compare_exchange(current, new, success, failure)
        }

        fn fence(order: Ordering) {
            atomic::fence(order);
        }
    }

    impl Listener {
        /// Reads what is left, while nobody writes. What was given up is known to be lost after one more lap.
        fn finish<W: Word, const N: usize>(mut self, ring: &Ring<W, N>) -> Listener {
            self.listen(ring);
            let (head, got) = (ring.head(), self.got.clone());
            (0..N).for_each(|_| ring.append_all(1, entries(&[99])));
            self.listen(ring);
            let is_settled = |index| self.indexes.contains(&index) || self.lost.contains(&index);
            assert!((0..head).all(is_settled), "neither given nor told");
            self.got = got;
            self
        }

        /// Whether `first` was given, if at all, before `second`.
        fn has_in_order(&self, first: i64, second: i64) -> bool {
            let place = |number| self.got.iter().position(|got| *got == number);
            place(first).zip(place(second)).is_none_or(|(first, second)| first < second)
        }
    }

    /// One after another: an append each.
    type Writer = &'static [&'static [i64]];

    /// Runs writers beside a reader that looks `looks` times, and gives what it got in the end to `check`.
    fn model<const N: usize>(preemptions: usize, looks: usize, writers: &'static [Writer], check: fn(&Listener)) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(move || {
            let ring = Arc::new(empty::<_, N>(|| Checked(atomic::AtomicU64::new(0))));
            let write = |writer: &'static Writer| {
                let ring = ring.clone();
                thread::spawn(move || {
                    writer.iter().for_each(|numbers| ring.append_all(numbers.len() as u64, entries(numbers)))
                })
            };
            let threads: Vec<_> = writers.iter().map(write).collect();
            let mut listener = Listener::default();
            (0..looks).for_each(|_| _ = listener.listen(&ring));
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let listener = listener.finish(&ring);
            for appends in writers {
                let numbers: Vec<i64> = appends.iter().map(|numbers| numbers[0]).collect();
                assert!(numbers.is_sorted_by(|a, b| listener.has_in_order(*a, *b)), "{:?}", listener.got);
            }
            check(&listener);
        });
    }

    #[test]
    fn two_writers_with_room_lose_nothing() {
        model::<4>(2, 2, &[&[&[10], &[11]], &[&[20]]], |listener| {
            assert!(!listener.is_told);
            assert_eq!(listener.got.len(), 3);
        });
    }

    #[test]
    fn appends_of_several_entries_lose_nothing() {
        model::<4>(2, 1, &[&[&[10, 11]], &[&[20, 21]]], |listener| {
            assert!(!listener.is_told);
            assert_eq!(listener.got.len(), 4);
        });
    }

    #[test]
    fn the_entries_of_one_append_come_in_their_order() {
        model::<4>(2, 1, &[&[&[10, 11]]], |listener| {
            assert!(listener.has_in_order(10, 11), "{:?}", listener.got);
        });
    }

    #[test]
    fn a_reader_overtaken_by_one_writer_is_told() {
        model::<2>(3, 2, &[&[&[10], &[11], &[12]]], |_| {});
    }

    #[test]
    fn a_reader_overtaken_by_two_writers_is_told() {
        model::<2>(2, 1, &[&[&[10], &[11]], &[&[20]]], |_| {});
    }

    #[test]
    fn two_writers_of_one_place_tear_nothing() {
        model::<1>(2, 2, &[&[&[10]], &[&[20]]], |_| {});
    }

    /// B appends when it has seen that A's append has returned.
    fn causal<const N: usize>(check: fn(&Listener)) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let word = || Checked(atomic::AtomicU64::new(0));
            let shared = Arc::new((empty::<_, N>(word), word()));
            let (a, b) = (shared.clone(), shared.clone());
            let a = thread::spawn(move || {
                a.0.append_all(1, entries(&[1]));
                a.1.store(1, Ordering::Release);
            });
            let b = thread::spawn(move || {
                if b.1.load(Ordering::Acquire) == 1 {
                    b.0.append_all(1, entries(&[2]));
                }
            });
            let mut listener = Listener::default();
            listener.listen(&shared.0);
            listener.listen(&shared.0);
            [a, b].into_iter().for_each(|thread| thread.join().unwrap());
            let listener = listener.finish(&shared.0);
            assert!(listener.has_in_order(1, 2), "{:?}", listener.got);
            check(&listener);
        });
    }

    #[test]
    fn what_was_appended_after_another_append_returned_comes_after_it() {
        causal::<2>(|listener| assert!(!listener.is_told && listener.got.contains(&1)));
    }

    #[test]
    fn so_it_does_when_it_writes_over_it() {
        causal::<1>(|_| {});
    }
}
