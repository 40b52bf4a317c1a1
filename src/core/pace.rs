//! How many short jobs are claimed at once: few enough that they take no longer than a budget together, by what the last
//! ones took. Jobs that take longer are claimed one by one.

use std::time::Duration;

/// The pace of one runner.
#[derive(Clone, Debug)]
pub struct Pace {
    size: usize,
    budget: Duration,
    most: usize,
}

impl Pace {
    /// For jobs that may take so long together, and never more than `most` of them. It begins with one.
    pub fn new(budget: Duration, most: usize) -> Pace {
        Pace { size: 1, budget, most }
    }

    /// How many jobs to claim next.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Of those that were claimed no more than these could be done in one go: as many next time.
    pub fn cut_short(&mut self, jobs: usize) {
        self.size = self.size.min(jobs.max(1));
    }

    /// So many jobs have taken so long, with all that belongs to them. At most twice as many next time.
    pub fn record(&mut self, jobs: usize, took: Duration) {
        let each = (took.as_nanos() / (jobs.max(1) as u128)).max(1);
        let fit = usize::try_from(self.budget.as_nanos() / each).unwrap_or(self.most);
        self.size = fit.min(self.size.max(jobs).saturating_mul(2)).clamp(1, self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_jobs_are_claimed_by_ever_more_long_ones_one_by_one() {
        let mut pace = Pace::new(Duration::from_millis(5), 256);
        let mut sizes = Vec::new();
        for _ in 0..10 {
            sizes.push(pace.size());
            pace.record(pace.size(), Duration::from_micros(10) * pace.size() as u32);
        }
        assert_eq!(sizes, [1, 2, 4, 8, 16, 32, 64, 128, 256, 256]);
        pace.record(256, Duration::from_millis(256));
        assert_eq!(pace.size(), 5);
        pace.record(1, Duration::from_secs(60));
        assert_eq!(pace.size(), 1);
    }

    #[test]
    fn what_cannot_be_done_in_one_go_is_not_claimed_for_it() {
        let mut pace = Pace::new(Duration::from_millis(5), 256);
        for _ in 0..10 {
            pace.record(pace.size(), Duration::from_micros(10));
        }
        pace.record(56, Duration::from_micros(10));
        pace.cut_short(56);
        assert_eq!(pace.size(), 56);
        pace.cut_short(0);
        assert_eq!(pace.size(), 1);
    }
}
