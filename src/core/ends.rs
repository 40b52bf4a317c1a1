//! Ids of jobs that have ended, handed from whoever commits to the worker of their database: a ring without locks, which may be
//! overrun. Who reads then knows that it has missed some.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// How many can lie in it.
const PLACES: usize = 64;

/// The ring. In shared memory: zeroes are an empty one.
pub struct Ends {
    /// How many have been put in.
    head: AtomicU64,
    places: [Place; PLACES],
}

#[derive(Default)]
struct Place {
    id: AtomicI64,
    /// One more than the number of the entry that lies here, XOR its id: does not fit while one of them is written, or was by
    /// somebody who has been overtaken.
    check: AtomicU64,
}

impl Default for Ends {
    fn default() -> Ends {
        Ends { head: AtomicU64::new(0), places: std::array::from_fn(|_| Place::default()) }
    }
}

impl Ends {
    /// Puts ids in; any process, at any time. Of many the last are written: the reader has missed the others anyway.
    pub fn put(&self, ids: &[i64]) {
        let (lost, ids) = ids.split_at(ids.len().saturating_sub(PLACES));
        self.head.fetch_add(lost.len() as u64, Ordering::SeqCst);
        for id in ids {
            let number = self.head.fetch_add(1, Ordering::SeqCst);
            let Some(place) = self.place(number) else { continue };
            place.id.store(*id, Ordering::SeqCst);
            place.check.store((number + 1) ^ id.cast_unsigned(), Ordering::SeqCst);
        }
    }

    /// What has been put in since `read` entries had been, and how many there are now; None of them when some are lost, or are
    /// just being written.
    pub fn since(&self, read: u64) -> (Option<Vec<i64>>, u64) {
        let head = self.head.load(Ordering::SeqCst);
        if head.wrapping_sub(read) > PLACES as u64 {
            return (None, head);
        }
        let ids = (read..head).map(|number| {
            let place = self.place(number)?;
            let (id, check) = (place.id.load(Ordering::SeqCst), place.check.load(Ordering::SeqCst));
            (check ^ id.cast_unsigned() == number + 1).then_some(id)
        });
        (ids.collect(), head)
    }

    fn place(&self, number: u64) -> Option<&Place> {
        self.places.get((number % PLACES as u64) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn what_was_put_in_is_read_once_in_order() {
        let ends = Ends::default();
        assert_eq!(ends.since(0), (Some(vec![]), 0));
        ends.put(&[7, 3]);
        ends.put(&[9]);
        assert_eq!(ends.since(0), (Some(vec![7, 3, 9]), 3));
        assert_eq!(ends.since(3), (Some(vec![]), 3));
        ends.put(&[1]);
        assert_eq!(ends.since(3), (Some(vec![1]), 4));
    }

    #[test]
    fn who_is_overrun_knows_it() {
        let ends = Ends::default();
        let many: Vec<i64> = (1..=PLACES as i64).collect();
        ends.put(&many);
        assert_eq!(ends.since(0), (Some(many), PLACES as u64));
        ends.put(&[0]);
        assert_eq!(ends.since(0), (None, PLACES as u64 + 1));
        assert_eq!(ends.since(PLACES as u64), (Some(vec![0]), PLACES as u64 + 1));
        let more: Vec<i64> = (1..1000).collect();
        ends.put(&more);
        assert_eq!(ends.since(PLACES as u64), (None, PLACES as u64 + 1000));
        assert_eq!(ends.since(PLACES as u64 + 998), (Some(vec![998, 999]), PLACES as u64 + 1000));
        // A reader that begins anew, after many.
        assert_eq!(ends.since(u64::MAX).0, None);
    }

    #[test]
    fn several_writers_lose_nothing_unnoticed() {
        const EACH: i64 = 20_000;
        let ends = Ends::default();
        let (mut seen, mut lost, mut read) = (HashSet::new(), 0, 0);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..3)
                .map(|writer| {
                    let ends = &ends;
                    scope.spawn(move || {
                        for n in 0..EACH {
                            ends.put(&[writer * EACH + n + 1]);
                            if n % 16 == 0 {
                                std::thread::yield_now();
                            }
                        }
                    })
                })
                .collect();
            loop {
                let is_last = writers.iter().all(|writer| writer.is_finished());
                let (ids, head) = ends.since(read);
                match ids {
                    Some(ids) => ids.into_iter().for_each(|id| assert!(id > 0 && seen.insert(id), "{id} twice")),
                    None => lost += head - read,
                }
                read = head;
                if is_last && ends.since(read).1 == read {
                    break;
                }
            }
        });
        assert_eq!(seen.len() as u64 + lost, 3 * EACH as u64);
    }
}
