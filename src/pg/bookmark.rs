//! Bookmarks: positions of the database worker on disk, in table `imbus_bookmark` next to imbus's own bus table.

use super::bus::Bus;
use super::datum::Text;
use super::report::Outcome;
use super::sql;
use super::transaction::safely;
use crate::core::position::{History, Position, Snapshot};
use pgrx::prelude::*;

/// Microseconds between 1970 and 2000 (PostgreSQL's epoch).
const EPOCH: &str = "timestamptz '2000-01-01 00:00:00+00'";

impl Bus {
    /// Which table the newest bookmark is about, and its greatest id. Asked of imbus's own table.
    pub fn last_bookmarked(&self) -> Outcome<Option<(pg_sys::Oid, i64)>> {
        let text = format!("SELECT bus, high FROM {} ORDER BY id DESC LIMIT 1", self.bookmarks());
        let read = |row: &sql::Row| Ok((row.get(1)?.unwrap_or(pg_sys::InvalidOid), row.need(2)?));
        self.as_owner(|| sql::first(&text, &[], read))
    }

    /// The bookmarks of the last `seconds` of whatever table was in force: ids go on from one to the next. And one more
    /// before them. With the snapshot that was kept with the newest.
    pub fn load_bookmarks(&self, seconds: f64) -> Outcome<(History, Option<Snapshot>)> {
        let text = format!(
            "SELECT (extract(epoch FROM made_at - {EPOCH}) * 1000000)::bigint, bus, high, gaps, snapshot FROM {0}
              WHERE id >= COALESCE((SELECT max(id) FROM {0}
                                     WHERE made_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1)), 0)
              ORDER BY id",
            self.bookmarks()
        );
        let mut history = History::default();
        let rows = self.as_owner(|| {
            sql::rows(&text, &[seconds.into()], |row| {
                let bounds = row.get::<Vec<Option<i64>>>(4)?.unwrap_or_default();
                let bounds: Vec<i64> = bounds.into_iter().flatten().collect();
                let gaps = bounds.chunks_exact(2).filter_map(|pair| Some((*pair.first()?, *pair.last()?))).collect();
                let table = row.get::<pg_sys::Oid>(2)?.unwrap_or(pg_sys::InvalidOid).into();
                let position = Position { table, high: row.need(3)?, gaps, ..Position::default() };
                Ok((row.need::<i64>(1)?, position, row.text(5)?))
            })
        })?;
        let snapshot = rows.last().and_then(|(.., text)| Snapshot::parse(text));
        rows.into_iter().for_each(|(at, position, _)| history.push(at, position));
        Ok((history, snapshot))
    }

    /// Keeps a position, made `ago` seconds ago. All that `snapshot` sees of the ids up to it, the text of an earlier
    /// snapshot, had been dispatched by then.
    pub fn keep_bookmark(&self, position: &Position, ago: f64, snapshot: &str) -> Outcome<()> {
        let text = format!(
            "INSERT INTO {} (made_at, bus, high, gaps, snapshot)
             VALUES (pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1), $2, $3, $4, $5)",
            self.bookmarks()
        );
        let gaps: Vec<i64> = position.gaps.iter().flat_map(|(low, high)| [*low, *high]).collect();
        let args = [
            ago.into(),
            pg_sys::Oid::from(position.table).into(),
            position.high.into(),
            gaps.into(),
            Text(snapshot.to_owned()).into(),
        ];
        self.as_owner(|| sql::execute(&text, &args))?;
        Ok(())
    }

    /// Forgets the bookmarks of more than `seconds` ago but for the newest of them; all, when ids start again.
    pub fn forget_bookmarks(&self, seconds: Option<f64>) -> Outcome<()> {
        let text = match seconds {
            None => format!("DELETE FROM {}", self.bookmarks()),
            Some(_) => format!(
                "DELETE FROM {0} WHERE id < (SELECT max(id) FROM {0}
                  WHERE made_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1))",
                self.bookmarks()
            ),
        };
        let args: Vec<_> = seconds.into_iter().map(Into::into).collect();
        self.as_owner(|| sql::execute(&text, &args))?;
        Ok(())
    }
}

/// Which transactions have ended now, as text.
pub fn snapshot() -> Outcome<String> {
    let text = "SELECT pg_catalog.pg_current_snapshot()::text";
    Ok(sql::first(text, &[], |row| row.text(1))?.unwrap_or_default())
}

/// The numbers of the prepared transactions of this database.
pub fn prepared() -> Outcome<Vec<u32>> {
    let text = "SELECT transaction FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()";
    let numbers = safely(|| sql::rows(text, &[], |row| row.get::<pg_sys::TransactionId>(1)))?;
    Ok(numbers.into_iter().flatten().map(|number| number.into_inner()).collect())
}
