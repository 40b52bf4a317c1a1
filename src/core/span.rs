//! What runners have claimed of a lane, so that none passes one by one what another one has just locked. A place in a lane is a
//! job's time and its id.

/// A place in a lane: time in microseconds since 2000, and id.
pub type Place = (i64, i64);

/// Behind `from` up to `to`: a runner has claimed there whatever nobody else had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The lane's number, 0 for none.
    pub lane: u64,
    pub from: Place,
    pub to: Place,
}

/// Where there may be something to claim in a lane behind `at`: not in these spans, as far as they follow upon one another.
pub fn behind(lane: u64, mut at: Place, spans: &[Span]) -> Place {
    let next = |at: Place| {
        let goes_on = |span: &&Span| span.lane == lane && span.from <= at && at < span.to;
        spans.iter().find(goes_on).map(|span| span.to)
    };
    while let Some(further) = next(at) {
        at = further;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(lane: u64, from: i64, to: i64) -> Span {
        Span { lane, from: (from, 0), to: (to, 0) }
    }

    #[test]
    fn what_others_have_claimed_is_passed() {
        let spans = [span(1, 30, 40), span(1, 10, 20), span(1, 15, 30), Span::default()];
        assert_eq!(behind(1, (12, 5), &spans), (40, 0));
        assert_eq!(behind(1, (40, 0), &spans), (40, 0));
        assert_eq!(behind(1, (41, 0), &spans), (41, 0));
    }

    #[test]
    fn what_nobody_has_looked_at_is_not() {
        let spans = [span(1, 20, 30), span(2, 10, 20)];
        assert_eq!(behind(1, (10, 0), &spans), (10, 0));
        assert_eq!(behind(2, (10, 0), &spans), (20, 0));
        assert_eq!(behind(1, (19, i64::MAX), &spans), (19, i64::MAX));
        assert_eq!(behind(0, (0, 0), &[]), (0, 0));
    }
}
