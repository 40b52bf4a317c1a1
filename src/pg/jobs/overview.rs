//! What the administrator sees, and what is cleared away.

use super::{on_table, table, through_table};
use crate::core::status::{FailedJob, Jobs, Queue};
use crate::pg::report::Outcome;
use crate::pg::sql;
use crate::pg::transaction::{along_bitmaps, safely};

/// Jobs counted for the administrator, a state.
const COUNTED: u32 = 20_000;
/// Finished jobs deleted in one transaction.
const PRUNE_BATCH: i64 = 10_000;
/// Dead rows that are no sign of anything.
const DEAD: i64 = 50_000;

/// How the jobs are, for the administrator's page: counted up to a bound a state, so that a long queue costs no more.
pub fn summary() -> Outcome<Jobs> {
    let text = format!(
        "SELECT s.queue::text, s.state::text, pg_catalog.count(*) FROM (
            (SELECT queue, state FROM TABLE WHERE state = 'created' LIMIT {COUNTED})
            UNION ALL (SELECT queue, state FROM TABLE WHERE state = 'processing' LIMIT {COUNTED})
            UNION ALL (SELECT queue, state FROM TABLE WHERE finished_at IS NOT NULL
                        ORDER BY finished_at DESC LIMIT {COUNTED})) s
          GROUP BY 1, 2 ORDER BY 1"
    );
    let mut queues: Vec<Queue> = Vec::new();
    for (name, state, count) in on_table(&text, &[], |row| Ok((row.text(1)?, row.text(2)?, row.need::<i64>(3)?)))? {
        if queues.last().is_none_or(|queue| queue.queue != name) {
            queues.push(Queue { queue: name, ..Queue::default() });
        }
        let Some(queue) = queues.last_mut() else { continue };
        match state.as_str() {
            "created" => queue.waiting = count,
            "processing" => queue.processing = count,
            "succeeded" => queue.succeeded = count,
            "failed" => queue.failed = count,
            _ => queue.done += count,
        }
    }
    let text = format!(
        "SELECT s.id, s.name::text, pg_catalog.left(pg_catalog.split_part(s.error, E'\n', 1), 200),
                (pg_catalog.date_part('epoch', s.finished_at) * 1000)::bigint
           FROM (SELECT id, COALESCE(name, method) AS name, COALESCE(payload #>> '{{error,message}}', '') AS error, state,
                        finished_at
                   FROM TABLE WHERE finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT {COUNTED}) s
          WHERE s.state = 'failed' ORDER BY s.finished_at DESC LIMIT 20"
    );
    let failed = on_table(&text, &[], |row| {
        Ok(FailedJob { id: row.need(1)?, name: row.text(2)?, error: row.text(3)?, at: row.need(4)? })
    })?;
    Ok(Jobs { queues, failed })
}

/// Deletes finished jobs older than `seconds`: how many (a batch at most). Failed jobs stay visible. None is deleted while
/// there are so many dead rows that some transaction must have kept autovacuum from clearing them: more would gain nothing.
pub fn prune(seconds: i64) -> Outcome<i64> {
    let relid = table()?.relid;
    // Where the administrator clears away himself, it is his to say when.
    let text = "SELECT pg_catalog.current_setting('autovacuum')::boolean AND pg_catalog.pg_stat_get_dead_tuples($1)
                       > GREATEST($2, pg_catalog.pg_stat_get_live_tuples($1) / 2)";
    let is_behind = safely(|| sql::first(text, &[relid.into(), DEAD.into()], |row| row.need::<bool>(1)))?;
    if is_behind == Some(true) {
        return Ok(0);
    }
    // A cancelled one without which others may not run is kept, also for those that somebody may bring back: it would count as one
    // that has succeeded. Said twice: a row that was put in by hand may have the id of another job.
    let old = "j.state IN ('succeeded', 'done', 'cancelled')
               AND j.finished_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1)
               AND (j.state <> 'cancelled'
                    OR NOT EXISTS (SELECT FROM TABLE b WHERE NOT b.ready AND b.depends_on && ARRAY[j.id]))";
    let text = format!(
        "DELETE FROM TABLE j WHERE {old} AND j.id IN (SELECT j.id FROM TABLE j WHERE {old} LIMIT $2) RETURNING j.id"
    );
    on_table(
        "DELETE FROM PROGRESS p WHERE NOT EXISTS (SELECT FROM TABLE j WHERE j.id = p.job_id AND j.state = 'processing')
         RETURNING p.job_id",
        &[],
        |_| Ok(()),
    )?;
    let args = [(seconds as f64).into(), PRUNE_BATCH.into()];
    let deleted = along_bitmaps(|| through_table(&text, &[], &args, |_| Ok(())))?;
    Ok(i64::try_from(deleted.len()).unwrap_or(0))
}
