//! How many short jobs a runner claims at once: few enough that they take no longer than [`BUDGET`] together, by what the
//! last ones took. Jobs that take longer are claimed one by one.

use std::time::Duration;

/// How long jobs that share a transaction may take together before it is committed: nobody notices the delay, and the
/// costs of a commit are spread over many.
pub const BUDGET: Duration = Duration::from_millis(5);

/// Jobs claimed at once, at most.
const MOST: usize = 256;

/// The pace of one runner.
#[derive(Clone, Debug)]
pub struct Pace(usize);

impl Default for Pace {
    fn default() -> Pace {
        Pace(1)
    }
}

impl Pace {
    /// How many jobs to claim next.
    pub fn size(&self) -> usize {
        self.0
    }

    /// So many jobs have taken so long, with all that belongs to them. At most twice as many next time.
    pub fn record(&mut self, jobs: usize, took: Duration) {
        let each = (took.as_nanos() / (jobs.max(1) as u128)).max(1);
        let fit = usize::try_from(BUDGET.as_nanos() / each).unwrap_or(MOST);
        self.0 = fit.min(self.0.max(jobs).saturating_mul(2)).clamp(1, MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_jobs_are_claimed_by_ever_more_long_ones_one_by_one() {
        let mut pace = Pace::default();
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
}
