//! What the workers, and the functions that only look, read and write in the bus table.

use super::Bus;
use crate::core::position::{Position, Range};
use crate::core::tracker::Holders;
use crate::pg::datum::Text;
use crate::pg::guc;
use crate::pg::report::Outcome;
use crate::pg::ring;
use crate::pg::sql;
use crate::pg::transaction::{as_owner, safely};
use pgrx::prelude::*;

/// How far `last = 0` reaches back, in seconds (Odoo's `_poll`: its TIMEOUT of 50 s).
const RECENT: i64 = 50;
/// Longest retention, in seconds (10 years): beyond, dates overflow.
const RETENTION_MAX: f64 = 10.0 * 366.0 * 86_400.0;
/// Rows deleted, or moved, in one transaction of the worker.
const BATCH: i64 = 10_000;

/// A row as it stands, not yet trusted.
#[derive(Debug)]
pub struct RawRow {
    pub id: i64,
    pub channel: Option<String>,
    pub message: Option<String>,
    /// Published by imbus rather than by Odoo's ORM (which fills create_uid).
    pub own: bool,
    /// The transaction that wrote it.
    pub xmin: u32,
}

/// Which rows are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    All,
    /// Created in the last 50 s.
    Recent,
}

impl Scope {
    fn condition(self) -> String {
        match self {
            Scope::All => String::new(),
            Scope::Recent => format!(
                " AND create_date > (pg_catalog.clock_timestamp() AT TIME ZONE 'UTC') - interval '{RECENT} seconds'"
            ),
        }
    }
}

fn raw(row: &sql::Row) -> Outcome<RawRow> {
    Ok(RawRow {
        id: row.need(1)?,
        channel: row.get::<Text>(2)?.map(|text| text.0),
        message: row.get::<Text>(3)?.map(|text| text.0),
        own: row.need(4)?,
        xmin: row.get::<pg_sys::TransactionId>(5)?.map_or(0, |number| number.into_inner()),
    })
}

/// An id and the transaction that wrote it.
fn written(row: &sql::Row) -> Outcome<(i64, u32)> {
    let xmin = row.get::<pg_sys::TransactionId>(2)?.map_or(0, |number| number.into_inner());
    Ok((row.need(1)?, xmin))
}

// Odoo's ids are of 32 bits: ORDER BY names the column (`i.id`), as by the output of the same name all would be sorted.
const COLUMNS: &str = "id::bigint, channel::text, message::text, create_uid IS NULL, xmin";

impl Bus {
    /// Runs statements on the table as its owner.
    pub fn as_owner<T>(&self, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        as_owner(self.owner, [self.relid, self.sequence], work)
    }

    /// OID of the table.
    pub fn oid(&self) -> u32 {
        self.relid.into()
    }

    fn select(&self, condition: &str, args: &[pgrx::datum::DatumWithOid<'_>]) -> Outcome<Vec<RawRow>> {
        let text = format!("SELECT {COLUMNS} FROM {} i WHERE {condition}", self.name);
        self.as_owner(|| sql::rows(&text, args, raw))
    }

    /// One value of a statement on the table.
    fn number(&self, text: &str, args: &[pgrx::datum::DatumWithOid<'_>]) -> Outcome<Option<i64>> {
        Ok(self.as_owner(|| sql::first(text, args, |row| row.get::<i64>(1)))?.flatten())
    }

    /// Those of these rows that are visible, in the order asked for.
    pub fn among(&self, ids: &[i64], scope: Scope) -> Outcome<Vec<RawRow>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let condition = format!("i.id = ANY($1){}", scope.condition());
        let found = self.select(&condition, &[ids.to_vec().into()])?;
        let mut rows: std::collections::HashMap<i64, RawRow> = found.into_iter().map(|row| (row.id, row)).collect();
        Ok(ids.iter().filter_map(|id| rows.remove(id)).collect())
    }

    /// How many of these rows, from the first on, have messages of so many bytes together, at least one; None when all
    /// have less. A length is known without the message.
    pub fn fitting(&self, ids: &[i64], bytes: usize) -> Outcome<Option<usize>> {
        let condition = "i.id = ANY($1)";
        let lengths: std::collections::HashMap<i64, usize> =
            self.lengths(condition, &[ids.to_vec().into()])?.into_iter().collect();
        Ok(prefix(ids.iter().map(|id| lengths.get(id).copied().unwrap_or_default()), bytes))
    }

    /// The same of the first `limit` rows above `low`.
    pub fn fitting_above(&self, low: i64, limit: i64, bytes: usize, scope: Scope) -> Outcome<Option<usize>> {
        let condition = format!("i.id > $1{} ORDER BY i.id LIMIT $2", scope.condition());
        let lengths = self.lengths(&condition, &[low.into(), limit.into()])?;
        Ok(prefix(lengths.into_iter().map(|(_, length)| length), bytes))
    }

    fn lengths(&self, condition: &str, args: &[pgrx::datum::DatumWithOid<'_>]) -> Outcome<Vec<(i64, usize)>> {
        let text = format!(
            "SELECT id::bigint, COALESCE(pg_catalog.octet_length(message::text), 0) FROM {} i WHERE {condition}",
            self.name
        );
        let read = |row: &sql::Row| Ok((row.need(1)?, usize::try_from(row.need::<i32>(2)?).unwrap_or_default()));
        self.as_owner(|| sql::rows(&text, args, read))
    }

    /// The first `limit` visible rows above `low`, ascending: one range of the primary key.
    pub fn above(&self, low: i64, limit: i64, scope: Scope) -> Outcome<Vec<RawRow>> {
        let condition = format!("i.id > $1{} ORDER BY i.id LIMIT $2", scope.condition());
        self.select(&condition, &[low.into(), limit.into()])
    }

    /// The same up to the greatest id that the sequence has given out: what lies beyond would be found again and again.
    pub fn drawn_above(&self, low: i64, limit: i64) -> Outcome<Vec<RawRow>> {
        if self.sequence_name.is_empty() {
            return self.above(low, limit, Scope::All);
        }
        let condition =
            format!("i.id > $1 AND i.id <= (SELECT s.last_value FROM {} s) ORDER BY i.id LIMIT $2", self.sequence_name);
        self.select(&condition, &[low.into(), limit.into()])
    }

    /// Which rows with ids in these ranges (inclusive) are visible, ascending.
    pub fn within(&self, ranges: &[Range], scope: Scope) -> Outcome<Vec<RawRow>> {
        if ranges.is_empty() {
            return Ok(Vec::new());
        }
        let (low, high): (Vec<i64>, Vec<i64>) = ranges.iter().copied().unzip();
        // OFFSET 0 keeps the planner from turning the look-ups by primary key into a join.
        let text = format!(
            "SELECT b.* FROM ROWS FROM (pg_catalog.unnest($1::bigint[]), pg_catalog.unnest($2::bigint[])) r (low, high)
               CROSS JOIN LATERAL (SELECT {COLUMNS} FROM {} i WHERE i.id BETWEEN r.low AND r.high{} ORDER BY i.id OFFSET 0) b
              ORDER BY 1",
            self.name,
            scope.condition()
        );
        self.as_owner(|| sql::rows(&text, &[low.into(), high.into()], raw))
    }

    /// Odoo's `_poll`: the last 50 s when `last` is 0, else everything above it, ascending.
    pub fn since(&self, last: i64) -> Outcome<Vec<RawRow>> {
        let scope = if last == 0 { Scope::Recent } else { Scope::All };
        self.select(&format!("i.id > $1{} ORDER BY i.id", scope.condition()), &[last.into()])
    }

    /// The greatest visible id, 0 when the table is empty.
    pub fn last_id(&self) -> Outcome<i64> {
        let text = format!("SELECT max(id)::bigint FROM {}", self.name);
        Ok(self.number(&text, &[])?.unwrap_or(0))
    }

    /// Whether a row with this id is visible.
    pub fn has(&self, id: i64) -> Outcome<bool> {
        let text = format!("SELECT id::bigint FROM {} WHERE id = $1", self.name);
        Ok(self.number(&text, &[id.into()])?.is_some())
    }

    /// The visible ids above `low`, ascending.
    pub fn ids_above(&self, low: i64) -> Outcome<Vec<i64>> {
        let text = format!("SELECT id::bigint FROM {} i WHERE i.id > $1 ORDER BY i.id", self.name);
        self.as_owner(|| sql::rows(&text, &[low.into()], |row| row.need(1)))
    }

    /// The greatest id of a row older than `seconds`, 0 when there is none.
    pub fn last_id_before(&self, seconds: f64) -> Outcome<i64> {
        let text = format!(
            "SELECT id::bigint FROM {} i WHERE create_date < (pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')
                    - pg_catalog.make_interval(secs => $1) ORDER BY i.id DESC LIMIT 1",
            self.name
        );
        Ok(self.number(&text, &[seconds.into()])?.unwrap_or(0))
    }

    /// The greatest id given out by the sequence; None without a sequence.
    pub fn last_drawn(&self) -> Outcome<Option<i64>> {
        if self.sequence_name.is_empty() {
            return Ok(None);
        }
        let text = format!("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {}", self.sequence_name);
        self.number(&text, &[])
    }

    /// Has the sequence go on above `id`.
    pub(super) fn advance(&self, id: i64) -> Outcome<()> {
        let text = "SELECT pg_catalog.setval($1::pg_catalog.oid::pg_catalog.regclass, $2)";
        self.number(text, &[self.sequence.into(), id.into()])?;
        Ok(())
    }

    /// The transactions that may hold ids which are drawn but not visible: whoever draws one locks the sequence, whoever
    /// inserts locks the table, each until its transaction ends (init_sequence in sequence.c; prepared transactions
    /// keep their locks). This process's own is left out.
    pub fn holders(&self) -> Holders {
        let mut holders = Holders::new();
        for relation in [self.relid, self.sequence].into_iter().filter(|oid| *oid != pg_sys::InvalidOid) {
            holders.extend(writers(relation));
        }
        holders
    }

    /// Deletes rows older than `seconds`: how many.
    pub fn gc(&self, seconds: f64) -> Outcome<i64> {
        let text = format!(
            "DELETE FROM {} WHERE create_date < (pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')
                    - pg_catalog.make_interval(secs => $1)",
            self.name
        );
        let deleted = self.as_owner(|| sql::execute(&text, &[seconds.into()]))?;
        Ok(i64::try_from(deleted).unwrap_or(i64::MAX))
    }

    /// Deletes some of the rows older than `seconds` that had been dispatched at a position of the past: how many.
    pub fn prune(&self, seconds: f64, position: &Position) -> Outcome<i64> {
        let (low, high): (Vec<i64>, Vec<i64>) = position.gaps.iter().copied().unzip();
        let text = format!(
            "DELETE FROM {0} WHERE id IN (
                SELECT b.id FROM {0} b WHERE b.id <= $1
                   AND b.create_date < (pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')
                       - pg_catalog.make_interval(secs => $2)
                   AND NOT EXISTS (SELECT 1 FROM ROWS FROM (pg_catalog.unnest($3::bigint[]), pg_catalog.unnest($4::bigint[])) r (low, high)
                                    WHERE b.id BETWEEN r.low AND r.high)
                 ORDER BY b.id LIMIT {BATCH})",
            self.name
        );
        let args = [position.high.into(), seconds.into(), low.into(), high.into()];
        let deleted = self.as_owner(|| sql::execute(&text, &args))?;
        Ok(i64::try_from(deleted).unwrap_or(i64::MAX))
    }

    /// The visible rows above `low` up to `high`, with the transactions that wrote them.
    pub fn ids_between(&self, low: i64, high: i64) -> Outcome<Vec<(i64, u32)>> {
        let text = format!("SELECT id::bigint, xmin FROM {} i WHERE i.id > $1 AND i.id <= $2 ORDER BY i.id", self.name);
        self.as_owner(|| sql::rows(&text, &[low.into(), high.into()], written))
    }

    /// The commands of their transaction that wrote these rows: the order of sending, as far as the table knows it.
    pub fn commands(&self, ids: &[i64]) -> Outcome<Vec<(i64, i64)>> {
        let text = format!("SELECT id::bigint, cmin::text::bigint FROM {} WHERE id = ANY($1)", self.name);
        self.as_owner(|| sql::rows(&text, &[ids.to_vec().into()], |row| Ok((row.need(1)?, row.need(2)?))))
    }

    /// The latest rows not older than `seconds`, with the transactions that wrote them.
    pub fn latest(&self, seconds: f64, limit: i64) -> Outcome<Vec<(i64, u32)>> {
        let text = format!(
            "SELECT id::bigint, xmin FROM {} i WHERE create_date >= (pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')
                    - pg_catalog.make_interval(secs => $1) ORDER BY i.id DESC LIMIT $2",
            self.name
        );
        self.as_owner(|| sql::rows(&text, &[seconds.into(), limit.into()], written))
    }

    /// Moves rows into another bus table with their ids, oldest first, and drops those older than `seconds`: what was
    /// taken away. A row whose id is taken there gets a new one.
    pub fn move_to(&self, other: &Bus, seconds: f64) -> Outcome<Vec<Moved>> {
        let taken = self.take(BATCH)?;
        let text = format!(
            "INSERT INTO {0} (id, create_uid, write_uid, channel, message, create_date, write_date)
             SELECT CASE WHEN $8 OR EXISTS (SELECT 1 FROM {0} b WHERE b.id = $1)
                         THEN pg_catalog.nextval($9::pg_catalog.oid::pg_catalog.regclass) ELSE $1 END,
                    $2, $3, $4, $5, $6, $7
              WHERE $6 IS NULL OR $6 >= (pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')
                        - pg_catalog.make_interval(secs => $10)
             RETURNING id::bigint, xmin",
            other.name
        );
        let is_narrow = other.is_narrow()?;
        let mut moved = Vec::with_capacity(taken.len());
        for row in taken {
            let old = row.id;
            let too_great = is_narrow && row.id > i64::from(i32::MAX);
            let args = [
                row.id.into(),
                row.create_uid.into(),
                row.write_uid.into(),
                row.channel.map(Text).into(),
                row.message.map(Text).into(),
                row.create_date.into(),
                row.write_date.into(),
                too_great.into(),
                other.sequence.into(),
                seconds.into(),
            ];
            let read = |row: &sql::Row| {
                let xmin = row.get::<pg_sys::TransactionId>(2)?.map_or(0, |number| number.into_inner());
                Ok(Moved { old, id: row.need(1)?, xmin })
            };
            let put = other.as_owner(|| sql::first(&text, &args, read))?;
            moved.push(put.unwrap_or(Moved { old, id: old, xmin: 0 }));
        }
        // What was moved is not new.
        ring::forget();
        Ok(moved)
    }

    /// Whether the table's ids are of 32 bits.
    pub(super) fn is_narrow(&self) -> Outcome<bool> {
        let text = "SELECT true FROM pg_catalog.pg_attribute WHERE attrelid = $1 AND attname = 'id' AND atttypid = 23";
        Ok(safely(|| sql::first(text, &[self.relid.into()], |_| Ok(())))?.is_some())
    }

    fn take(&self, limit: i64) -> Outcome<Vec<WholeRow>> {
        let text = format!(
            "DELETE FROM {0} WHERE id IN (SELECT id FROM {0} ORDER BY id LIMIT $1)
             RETURNING id::bigint, create_uid, write_uid, channel::text, message::text, create_date, write_date",
            self.name
        );
        let mut taken = self.as_owner(|| {
            sql::rows(&text, &[limit.into()], |row| {
                Ok(WholeRow {
                    id: row.need(1)?,
                    create_uid: row.get(2)?,
                    write_uid: row.get(3)?,
                    channel: row.get::<Text>(4)?.map(|text| text.0),
                    message: row.get::<Text>(5)?.map(|text| text.0),
                    create_date: row.get(6)?,
                    write_date: row.get(7)?,
                })
            })
        })?;
        taken.sort_unstable_by_key(|row| row.id);
        Ok(taken)
    }
}

/// How many of these, from the first on, come to so many bytes, at least one; None when all come to less.
fn prefix(lengths: impl Iterator<Item = usize>, bytes: usize) -> Option<usize> {
    let mut sum = 0usize;
    for (at, length) in lengths.enumerate() {
        sum = sum.saturating_add(length);
        if sum > bytes {
            return Some(at.max(1));
        }
    }
    None
}

/// A row that was moved to another table.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    /// Its id before.
    pub old: i64,
    pub id: i64,
    pub xmin: u32,
}

/// A row with all its columns.
struct WholeRow {
    id: i64,
    create_uid: Option<i32>,
    write_uid: Option<i32>,
    channel: Option<String>,
    message: Option<String>,
    create_date: Option<pgrx::datum::Timestamp>,
    write_date: Option<pgrx::datum::Timestamp>,
}

/// The transactions that hold a lock on a relation with which they may write (those that conflict with SHARE).
fn writers(relation: pg_sys::Oid) -> Holders {
    // SAFETY: main thread; the list is palloc'd and freed here. PostgreSQL 15 to 18 keep the entry at two 32-bit words.
    unsafe {
        let tag = pg_sys::LOCKTAG {
            locktag_field1: pg_sys::MyDatabaseId.into(),
            locktag_field2: relation.into(),
            locktag_field3: 0,
            locktag_field4: 0,
            locktag_type: pg_sys::LockTagType::LOCKTAG_RELATION as u8,
            locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
        };
        let mut count = 0;
        let list = pg_sys::GetLockConflicts(&tag, pg_sys::ShareLock as pg_sys::LOCKMODE, &mut count);
        let words = std::slice::from_raw_parts(list.cast::<[u32; 2]>(), usize::try_from(count).unwrap_or(0));
        let holders = words.iter().map(|[backend, local]| u64::from(*backend) << 32 | u64::from(*local)).collect();
        pg_sys::pfree(list.cast());
        holders
    }
}

/// The retention in seconds: Odoo's `bus.gc_retention_seconds` where there is an Odoo, else `imbus.gc_retention`.
pub fn retention() -> Outcome<f64> {
    let find =
        "SELECT c.relowner, c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
          WHERE n.nspname = 'public' AND c.relname = 'ir_config_parameter' AND c.relkind = 'r'
            AND (SELECT count(*) FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped
                  AND a.attname IN ('key', 'value') AND a.atttypid IN (25, 1043)) = 2";
    let found = safely(|| sql::first(find, &[], |row| Ok((row.get::<pg_sys::Oid>(1)?, row.get::<pg_sys::Oid>(2)?))))?;
    let Some((Some(owner), Some(relation))) = found else { return Ok(guc::gc_retention() as f64) };
    let text = "SELECT value::text FROM public.ir_config_parameter WHERE key = 'bus.gc_retention_seconds'";
    let value = as_owner(owner, [relation; 2], || sql::first(text, &[], |row| row.get::<Text>(1)))?.flatten();
    let seconds = value.and_then(|text| text.0.trim().parse::<f64>().ok());
    Ok(seconds.filter(|s| *s >= 0.0).map_or(guc::gc_retention() as f64, |seconds| seconds.min(RETENTION_MAX)))
}
