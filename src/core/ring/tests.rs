use super::*;

fn ring<const N: usize>() -> Ring<AtomicU64, N> {
    let cell = |_| Cell { stamp: 0.into(), tag: 0.into(), first: 0.into(), last: 0.into() };
    Ring { head: 0.into(), cells: std::array::from_fn(cell) }
}

fn entry(first: i64) -> Entry {
    Entry { database: 7, kind: Kind::Committed, first, last: first + 1 }
}

#[test]
fn entries_come_in_their_order_once() {
    let ring = ring::<8>();
    ring.append([entry(5), entry(1)].into_iter());
    ring.append([entry(3)].into_iter());
    let (mut reader, mut got) = (Reader::new(0), Vec::new());
    assert!(reader.read(&ring, |index, entry| got.push((index, entry))));
    assert_eq!(got, [(0, entry(5)), (1, entry(1)), (2, entry(3))]);
    assert!(reader.read(&ring, |_, _| panic!("twice")));
    assert_eq!(reader.position(), 3);
}
