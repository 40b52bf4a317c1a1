//! From `created` to `processing`: which jobs can run, and who has them.

use super::{Claimed, change_and_tell, new_token, on_table};
use crate::pg::datum::{JsonbText, Text};
use crate::pg::report::Outcome;
use crate::pg::transaction::safely;
use crate::pg::{guc, sql};
use pgrx::prelude::*;
use std::collections::HashMap;

/// What makes a waiting job runnable now; $1 are the queues that are full. Jobs of Odoo (with a model) are no business of
/// SQL runners.
const RUNNABLE: &str =
    "c.state = 'created' AND c.res_model IS NULL AND c.queue <> ALL ($1) AND c.run_at <= pg_catalog.clock_timestamp()
    AND NOT EXISTS (SELECT FROM pg_catalog.unnest(c.depends_on) d (id) JOIN TABLE p ON p.id = d.id
                     WHERE p.state NOT IN ('succeeded', 'done'))";

/// The queues of which as many jobs are processed as may be, by whomever.
fn full() -> Outcome<Vec<String>> {
    let limits = guc::queues();
    if limits.is_empty() {
        return Ok(Vec::new());
    }
    let text = "SELECT c.queue::text, pg_catalog.count(*) FROM TABLE c
                 WHERE c.state = 'processing' AND c.queue = ANY($1) GROUP BY c.queue";
    let processing = on_table(text, &[limits.queues().into()], |row| Ok((row.text(1)?, row.need::<i64>(2)?)))?;
    let processing: HashMap<String, i64> = processing.into_iter().collect();
    let taken = |queue: &String| processing.get(queue).map_or(0, |count| usize::try_from(*count).unwrap_or(0));
    Ok(limits
        .queues()
        .into_iter()
        .filter(|queue| limits.of(queue).is_some_and(|limit| taken(queue) >= limit))
        .collect())
}

/// Counting and claiming are one where queues have limits. False when another transaction is at it.
pub fn lock_limits() -> Outcome<bool> {
    let text = "SELECT pg_catalog.pg_try_advisory_xact_lock(1768780402, 1)";
    Ok(guc::queues().is_empty() || safely(|| sql::first(text, &[], |row| row.need::<bool>(1)))?.unwrap_or(false))
}

/// How many more jobs of the queue may be processed, at most `wanted`; the limits are locked.
pub fn room(queue: &str, wanted: i64) -> Outcome<i64> {
    let Some(limit) = guc::queues().of(queue).filter(|limit| *limit > 0) else { return Ok(wanted) };
    let text = "SELECT pg_catalog.pg_advisory_xact_lock(1768780402, 1)";
    safely(|| sql::execute(text, &[]))?;
    let text = "SELECT pg_catalog.count(*) FROM TABLE WHERE state = 'processing' AND queue = $1";
    let taken = on_table(text, &[Text(queue.to_owned()).into()], |row| row.need::<i64>(1))?.into_iter().next();
    Ok(i64::try_from(limit).unwrap_or(i64::MAX).saturating_sub(taken.unwrap_or(0)).clamp(0, wanted))
}

/// The roles that have runnable jobs, with how many (of the first few hundred), in the order of their first ones.
pub fn waiting() -> Outcome<Vec<(u32, i64)>> {
    let text = format!(
        "SELECT r.role, count(*) FROM (
           SELECT c.role, row_number() OVER (ORDER BY c.priority, c.run_at, c.id) AS place
             FROM TABLE c WHERE {RUNNABLE} ORDER BY c.priority, c.run_at, c.id LIMIT 256) r
          GROUP BY r.role ORDER BY min(r.place)"
    );
    on_table(&text, &[full()?.into()], |row| Ok((u32::from(row.need::<pg_sys::Oid>(1)?), row.need(2)?)))
}

/// Seconds until the next job is to start that waits for its time; None when there is none.
pub fn next_start() -> Outcome<Option<f64>> {
    let text = "SELECT EXTRACT(epoch FROM min(run_at) - pg_catalog.clock_timestamp())::float8 FROM TABLE
                 WHERE state = 'created' AND run_at > pg_catalog.clock_timestamp() AND run_at < 'infinity'";
    Ok(on_table(text, &[], |row| row.get::<f64>(1))?.into_iter().flatten().next())
}

/// Claims the first runnable job of a role: `processing`, one attempt more, a new token.
pub fn claim(role: u32) -> Outcome<Option<Claimed>> {
    if !lock_limits()? {
        return Ok(None);
    }
    let token = new_token()?;
    let text = format!(
        "SELECT c.id FROM TABLE c WHERE c.role = $2 AND {RUNNABLE}
          ORDER BY c.priority, c.run_at, c.id LIMIT 1 FOR UPDATE OF c SKIP LOCKED"
    );
    let args = [full()?.into(), pg_sys::Oid::from(role).into()];
    let found = on_table(&text, &args, |row| row.need::<i64>(1))?;
    let Some(id) = found.into_iter().next() else { return Ok(None) };
    let text = "UPDATE TABLE j SET state = 'processing', attempts = attempts + 1, token = $2,
                       claimed_at = pg_catalog.clock_timestamp(),
                       write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC' WHERE id = $1";
    change_and_tell(text, &[id.into(), Text(token.clone()).into()])?;
    Ok(Some(Claimed { id, token }))
}

/// What a runner needs of its job.
pub struct Work {
    pub target: String,
    pub args: String,
    pub kwargs: String,
    pub search_path: String,
    /// How long it may take, in milliseconds.
    pub timeout: Option<i64>,
}

/// Locks a claimed job for the transaction that runs it; None when the token has been given up.
pub fn lock(claimed: &Claimed) -> Outcome<Option<Work>> {
    let text = "SELECT method::text, args, kwargs, search_path,
                       pg_catalog.ceil(EXTRACT(epoch FROM LEAST(timeout, '1 year')) * 1000)::bigint FROM TABLE
                 WHERE id = $1 AND token = $2 AND state = 'processing' FOR UPDATE";
    let found = on_table(text, &[claimed.id.into(), Text(claimed.token.clone()).into()], |row| {
        Ok(Work {
            target: row.text(1)?,
            args: row.get::<JsonbText>(2)?.map(|json| json.0).unwrap_or_default(),
            kwargs: row.get::<JsonbText>(3)?.map(|json| json.0).unwrap_or_default(),
            search_path: row.text(4)?,
            timeout: row.get(5)?,
        })
    })?;
    Ok(found.into_iter().next())
}

/// A job that is `processing`, for a worker that asks who still works on it.
pub struct Processing {
    pub claimed: Claimed,
    /// The session that claimed it (`pg::sessions`), where a runner outside did.
    pub session: Option<i64>,
    /// It has a timeout, and was claimed, or told of its progress, longer ago than that.
    pub is_overdue: bool,
}

/// The jobs that are `processing` here.
pub fn processing() -> Outcome<Vec<Processing>> {
    let text = "SELECT j.id, j.token::text, j.session,
                       COALESCE(GREATEST(j.claimed_at, p.at) + LEAST(j.timeout, '1 year')
                                < pg_catalog.clock_timestamp(), false)
                  FROM TABLE j LEFT JOIN PROGRESS p ON p.job_id = j.id WHERE j.state = 'processing'";
    on_table(text, &[], |row| {
        Ok(Processing {
            claimed: Claimed { id: row.need(1)?, token: row.text(2)? },
            session: row.get(3)?,
            is_overdue: row.need(4)?,
        })
    })
}
