//! Who enqueues jobs for functions, whatever happens to the server meanwhile.

use super::common::Cluster;
use super::stage::{reach, reach_with};
use crossbeam_channel::Receiver;
use postgres::Client;

/// Jobs enqueued in one transaction.
pub const BATCH: usize = 50;

/// Effect, result and state of job `n` can be told from `n`: every hundredth fails twice, some take a while, every
/// second has a result.
pub const SETUP: &str = "
    CREATE TABLE effect (n int);
    CREATE ROLE ann LOGIN;
    GRANT INSERT ON effect TO ann;
    GRANT EXECUTE ON FUNCTION ir_async_call_many TO ann;
    CREATE FUNCTION attempt(n int) RETURNS int LANGUAGE sql SECURITY DEFINER AS
        $$ SELECT attempts FROM ir_async WHERE identity_key = n::text AND state = 'processing' $$;
    CREATE FUNCTION work(n int) RETURNS int LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO effect VALUES (n);
        IF n % 10 = 7 THEN PERFORM pg_sleep(CASE WHEN n % 50 = 7 THEN 0.02 ELSE 0.002 END); END IF;
        IF n % 100 = 3 AND attempt(n) < 3 THEN RAISE EXCEPTION 'once more'; END IF;
        RETURN CASE WHEN n % 2 = 0 THEN n END;
    END $$";

const ENQUEUE: &str = "
    SELECT count(*) FROM (SELECT ir_async_call_many((
        SELECT jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
                   'target', 'work', 'args', jsonb_build_array(n), 'max_attempts', 3, 'retry_delay', '10 ms',
                   'notify', CASE WHEN n % 5 = 0 THEN '\"jobs\"'::jsonb END,
                   'identity_key', CASE WHEN n % 100 = 3 THEN n::text END)) ORDER BY n)
          FROM generate_series($1::int, $2::int) n))) s";

fn session(cluster: &Cluster, database: &str, role: &str) -> Client {
    reach_with(cluster, database, &format!("SET application_name = 'enqueuer'; SET ROLE {role}"))
}

/// Enqueues the batches that it is given. What it does not know to be committed it looks for, and enqueues again if it
/// is not there. Before each it rolls back another one.
pub fn enqueue(cluster: &Cluster, database: &str, role: &str, batches: &Receiver<usize>) {
    let mut sql = session(cluster, database, role);
    for batch in batches {
        if roll_back(&mut sql, batch).is_err() {
            sql = session(cluster, database, role);
        }
        let (first, last) = ((batch * BATCH + 1) as i32, ((batch + 1) * BATCH) as i32);
        while enqueue_one(&mut sql, first, last).is_err() {
            let is_in = is_committed(cluster, database, first);
            println!("cut off while it enqueued from {first}, committed: {is_in}");
            sql = session(cluster, database, role);
            if is_in {
                break;
            }
        }
    }
}

/// Stays open for a moment, so that blows find it so.
fn enqueue_one(sql: &mut Client, first: i32, last: i32) -> Result<(), postgres::Error> {
    let mut transaction = sql.transaction()?;
    transaction.query_one(ENQUEUE, &[&first, &last])?;
    transaction.query_one("SELECT pg_sleep(0.01)", &[])?;
    transaction.commit()
}

fn roll_back(sql: &mut Client, batch: usize) -> Result<(), postgres::Error> {
    let mut transaction = sql.transaction()?;
    let last = -((batch * BATCH) as i32) - 1;
    transaction.query_one(ENQUEUE, &[&(last - 4), &last])?;
    transaction.rollback()
}

fn is_committed(cluster: &Cluster, database: &str, n: i32) -> bool {
    loop {
        let look = "SELECT EXISTS (SELECT FROM ir_async WHERE args = jsonb_build_array($1::int))";
        if let Ok(row) = reach(cluster, database).query_one(look, &[&n]) {
            return row.get(0);
        }
    }
}
