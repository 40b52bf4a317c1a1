//! Schedules: one job at each due time, as the role that made the schedule, whatever ends the processes around them.

mod common;

use common::{Cluster, eventually, kill_9, recovered, refusal, shared};
use postgres::Client;

/// A database with the extension, its tables owned by `postgres`, and a role of the same name that may schedule there.
fn database(cluster: &Cluster, name: &str) -> (Client, Client) {
    let mut sql = cluster.database(name);
    role(&mut sql, name);
    let role = cluster.connect_as(name, name);
    (sql, role)
}

fn role(sql: &mut Client, name: &str) {
    sql.batch_execute(&format!(
        "CREATE ROLE {name} LOGIN;
         GRANT CREATE ON SCHEMA public TO {name};
         GRANT EXECUTE ON FUNCTION ir_async_schedule, ir_async_unschedule TO {name}"
    ))
    .unwrap();
}

fn text(sql: &mut Client, query: &str) -> Option<String> {
    sql.query_opt(&format!("SELECT ({query})::text"), &[]).unwrap().and_then(|row| row.get(0))
}

fn number(sql: &mut Client, query: &str) -> i64 {
    sql.query_one(&format!("SELECT ({query})::bigint"), &[]).unwrap().get(0)
}

fn yes(sql: &mut Client, query: &str) -> bool {
    sql.query_one(&format!("SELECT ({query}) IS TRUE"), &[]).unwrap().get(0)
}

/// What a schedule says of itself.
fn of(sql: &mut Client, name: &str, what: &str) -> Option<String> {
    text(sql, &format!("SELECT {what} FROM imbus_schedule WHERE name = '{name}'"))
}

/// Has a schedule be due since three days, as if nobody had looked.
fn miss(sql: &mut Client, name: &str) {
    let text = format!("UPDATE imbus_schedule SET next_run = now() - interval '3 days' WHERE name = '{name}'");
    assert_eq!(sql.execute(&text, &[]).unwrap(), 1);
}

/// Waits until a schedule has run, so that everything that was due before has been looked at.
fn tick(sql: &mut Client, name: &str) {
    sql.batch_execute(&format!("SELECT ir_async_schedule('{name}', '@yearly', 'pg_catalog.now')")).unwrap();
    let before = number(sql, &format!("SELECT runs FROM imbus_schedule WHERE name = '{name}'"));
    miss(sql, name);
    eventually("a look at the schedules", || {
        number(sql, &format!("SELECT runs FROM imbus_schedule WHERE name = '{name}'")) > before
    });
}

#[test]
fn a_job_is_enqueued_at_each_time_as_the_role_of_the_schedule() {
    let cluster = shared();
    let (mut sql, mut role) = database(&cluster, "s_each");
    role.batch_execute(
        "CREATE TABLE seen (who text, path text, what text);
         CREATE FUNCTION see(what text, more text) RETURNS void LANGUAGE sql
             AS 'INSERT INTO seen VALUES (session_user || current_user, current_setting(''search_path''), what || more)';
         SET search_path = public, pg_temp;
         SELECT ir_async_schedule('each', '* * * * * *', 'see', '[\"a\"]', '{\"more\": \"b\"}', description => 'Each');
         SET search_path = pg_catalog",
    )
    .unwrap();
    eventually("it has run thrice", || number(&mut sql, "SELECT count(*) FROM seen") >= 3);
    sql.batch_execute("SELECT ir_async_unschedule('each')").unwrap();
    let rows = sql.query("SELECT DISTINCT who, path, what FROM seen", &[]).unwrap();
    assert_eq!(rows.len(), 1);
    let of = |column: usize| rows[0].get::<_, String>(column);
    assert_eq!((of(0), of(1), of(2)), ("s_eachs_each".into(), "public, pg_temp".into(), "ab".into()));
    // One job a second, whose run_at is that second.
    assert!(yes(
        &mut sql,
        "SELECT count(*) = count(DISTINCT run_at) AND every(run_at = date_trunc('second', run_at))
                                  AND every(name = 'Each') AND every(create_date AT TIME ZONE 'UTC' >= run_at)
                             FROM ir_async"
    ));
}

#[test]
fn what_was_missed_runs_once() {
    let cluster = shared();
    let (mut sql, mut role) = database(&cluster, "s_missed");
    role.batch_execute("SELECT ir_async_schedule('missed', '@hourly', 'pg_catalog.now', overlap => true)").unwrap();
    miss(&mut sql, "missed");
    eventually("it has run", || of(&mut sql, "missed", "runs").as_deref() != Some("0"));
    assert!(yes(
        &mut sql,
        "SELECT next_run BETWEEN now() - interval '1 minute' AND now() + interval '61 minutes'
                                  AND last_run <= now() AND last_job = (SELECT min(id) FROM ir_async)
                             FROM imbus_schedule"
    ));
    assert!(yes(&mut sql, "SELECT count(*) = 1 FROM ir_async WHERE run_at < now() - interval '2 days'"));
    tick(&mut sql, "tick");
    assert!(yes(
        &mut sql,
        "SELECT count(*) = 1 FROM ir_async WHERE run_at < now() - interval '2 days' AND role = 's_missed'::regrole"
    ));
}

#[test]
fn what_was_missed_while_the_server_was_down_runs_once() {
    let cluster = Cluster::start();
    let (mut sql, mut role) = database(&cluster, "s_down");
    role.batch_execute("SELECT ir_async_schedule('down', '0 0 1 1 *', 'pg_catalog.now', overlap => true)").unwrap();
    drop(role);
    miss(&mut sql, "down");
    drop(sql);
    cluster.pg_ctl(&["-m", "immediate", "-w", "restart"]);
    let mut sql = recovered(&cluster, "s_down");
    eventually("it has run", || of(&mut sql, "down", "runs").as_deref() == Some("1"));
    tick(&mut sql, "tick");
    assert_eq!(of(&mut sql, "down", "runs").as_deref(), Some("1"));
    assert_eq!(number(&mut sql, "SELECT count(*) FROM ir_async WHERE role = 's_down'::regrole"), 1);
}

#[test]
fn a_run_and_its_job_are_one_whatever_is_killed() {
    let cluster = Cluster::start();
    let (mut sql, mut role) = database(&cluster, "s_killed");
    for number in 0..5 {
        let text = format!(
            "SELECT ir_async_schedule('k{number}', '* * * * * *', 'pg_catalog.now', description => 'k{number}',
                                      overlap => true)"
        );
        role.batch_execute(&text).unwrap();
    }
    for round in 1..=3 {
        eventually("they run", || number(&mut sql, "SELECT min(runs) FROM imbus_schedule") >= round);
        let worker = "SELECT pid FROM imbus_stat_bus WHERE datname = 's_killed' AND pid IS NOT NULL";
        let pid: i32 = sql.query_one(worker, &[]).unwrap().get(0);
        kill_9(pid);
        eventually("the server has noticed", || sql.simple_query("SELECT 1").is_err());
        sql = recovered(&cluster, "s_killed");
    }
    eventually("they go on", || number(&mut sql, "SELECT min(runs) FROM imbus_schedule") > 3);
    role = cluster.connect_as("s_killed", "s_killed");
    for number in 0..5 {
        role.batch_execute(&format!("SELECT ir_async_schedule('k{number}', '@yearly', 'pg_catalog.now')")).unwrap();
    }
    let ledger = "SELECT count(*) = (SELECT sum(runs) FROM imbus_schedule)
                     AND count(*) = count(DISTINCT (name, run_at)) FROM ir_async";
    assert!(yes(&mut sql, ledger));
}

#[test]
fn a_clock_that_is_set_back_repeats_nothing_and_one_that_was_wrong_is_forgotten() {
    let cluster = shared();
    let (mut sql, mut role) = database(&cluster, "s_clock");
    role.batch_execute(
        "SELECT ir_async_schedule('back', '* * * * * *', 'pg_catalog.now', overlap => true);
         SELECT ir_async_schedule('wrong', '0 0 1 1 *', 'pg_catalog.now', overlap => true)",
    )
    .unwrap();
    // As if the clock had been an hour, and a year, ahead.
    sql.batch_execute(
        "UPDATE imbus_schedule SET last_run = now() + interval '1 hour', next_run = now() + interval '61 minutes', runs = 0
          WHERE name = 'back';
         UPDATE imbus_schedule SET last_run = now() + interval '10 years', next_run = now() + interval '11 years'
          WHERE name = 'wrong'",
    )
    .unwrap();
    eventually("the wrong clock is forgotten", || {
        yes(
            &mut sql,
            "SELECT next_run < now() + interval '2 years' AND last_run <= now() AND runs = 0
                         FROM imbus_schedule WHERE name = 'wrong'",
        )
    });
    tick(&mut sql, "tick");
    assert_eq!(of(&mut sql, "back", "runs").as_deref(), Some("0"));
    assert!(yes(&mut sql, "SELECT next_run > now() + interval '50 minutes' FROM imbus_schedule WHERE name = 'back'"));
}

#[test]
fn a_run_is_skipped_while_the_one_before_has_not_ended_unless_they_may_overlap() {
    let cluster = shared();
    let (mut sql, mut role) = database(&cluster, "s_overlap");
    role.batch_execute("CREATE FUNCTION pass() RETURNS void LANGUAGE sql AS 'SELECT pg_advisory_xact_lock(1)'")
        .unwrap();
    let mut gate = cluster.connect("s_overlap");
    gate.batch_execute("SELECT pg_advisory_lock(1)").unwrap();
    role.batch_execute("SELECT ir_async_schedule('alone', '* * * * * *', 'pass')").unwrap();
    role.batch_execute("SELECT ir_async_schedule('crowd', '* * * * * *', 'pass', overlap => true)").unwrap();
    eventually("one is skipped", || yes(&mut sql, "SELECT skipped >= 2 FROM imbus_schedule WHERE name = 'alone'"));
    assert_eq!(of(&mut sql, "alone", "runs").as_deref(), Some("1"));
    eventually("others overlap", || yes(&mut sql, "SELECT runs >= 3 FROM imbus_schedule WHERE name = 'crowd'"));
    assert_eq!(of(&mut sql, "crowd", "skipped").as_deref(), Some("0"));
    role.batch_execute("SELECT ir_async_unschedule('crowd')").unwrap();
    drop(gate);
    eventually("it runs again", || yes(&mut sql, "SELECT runs >= 2 FROM imbus_schedule WHERE name = 'alone'"));
}

#[test]
fn times_are_those_of_the_zone_whatever_its_clocks_do() {
    let cluster = shared();
    let (mut sql, mut role) = database(&cluster, "s_zone");
    for zone in ["Europe/Berlin", "america/new_york", "Asia/Kathmandu", "Pacific/Apia", "UTC", "<+02>-2"] {
        let text = format!("SELECT ir_async_schedule('noon', '0 12 * * *', 'pg_catalog.now', time_zone => '{zone}')");
        role.batch_execute(&text).unwrap();
        let noon = "SELECT (next_run AT TIME ZONE time_zone)::time = '12:00' AND next_run > now()
                           AND next_run < now() + interval '25 hours' FROM imbus_schedule WHERE name = 'noon'";
        assert!(yes(&mut sql, noon), "{zone}");
    }
    role.batch_execute(
        "SELECT ir_async_schedule('noon', '0 12 * * *', 'pg_catalog.now', time_zone => 'EUROPE/berlin')",
    )
    .unwrap();
    assert_eq!(of(&mut sql, "noon", "time_zone").as_deref(), Some("Europe/Berlin"));
    // The last Sunday of March: 02:30 does not exist; that of October: it exists twice.
    for (month, due) in [(3, "01:00"), (10, "00:30")] {
        let text = format!(
            "SELECT ir_async_schedule('change', '30 2 25-31 {month} +SUN', 'pg_catalog.now', time_zone => 'Europe/Berlin')"
        );
        role.batch_execute(&text).unwrap();
        let at = of(&mut sql, "change", "to_char(next_run AT TIME ZONE 'UTC', 'HH24:MI')");
        assert_eq!(at.as_deref(), Some(due));
    }
}

#[test]
fn what_is_said_again_keeps_the_run_that_is_due() {
    let cluster = shared();
    let (mut sql, mut role) = database(&cluster, "s_again");
    let say = |expression: &str| format!("SELECT ir_async_schedule('again', '{expression}', 'pg_catalog.now')");
    role.batch_execute(&say("0 0 1 1 *")).unwrap();
    let first = of(&mut sql, "again", "id::text || next_run");
    role.batch_execute(&say("0 0 1 1 *")).unwrap();
    assert_eq!(of(&mut sql, "again", "id::text || next_run"), first);
    sql.batch_execute("BEGIN").unwrap();
    miss(&mut sql, "again");
    sql.batch_execute("SET LOCAL SESSION AUTHORIZATION s_again").unwrap();
    sql.batch_execute(&say("0 0 1 1 *")).unwrap();
    sql.batch_execute("RESET SESSION AUTHORIZATION").unwrap();
    assert!(yes(&mut sql, "SELECT next_run < now() FROM imbus_schedule"), "still due");
    sql.batch_execute("SET LOCAL SESSION AUTHORIZATION s_again").unwrap();
    sql.batch_execute(&say("0 0 2 1 *")).unwrap();
    sql.batch_execute("RESET SESSION AUTHORIZATION").unwrap();
    assert!(yes(&mut sql, "SELECT next_run > now() FROM imbus_schedule"), "another time");
    sql.batch_execute("COMMIT").unwrap();
    assert_eq!(number(&mut sql, "SELECT count(*) FROM imbus_schedule"), 1);
}

#[test]
fn the_target_is_the_one_that_was_meant() {
    let cluster = shared();
    let (mut sql, mut role) = database(&cluster, "s_target");
    sql.batch_execute("CREATE SCHEMA mine AUTHORIZATION s_target").unwrap();
    role.batch_execute(
        "CREATE FUNCTION public.meant() RETURNS text LANGUAGE sql AS $$ SELECT 'right' $$;
         SET search_path = mine, public;
         SELECT ir_async_schedule('target', '@yearly', 'meant');
         CREATE FUNCTION mine.meant() RETURNS text LANGUAGE sql AS $$ SELECT 'wrong' $$",
    )
    .unwrap();
    miss(&mut sql, "target");
    eventually("it has run", || {
        text(&mut sql, "SELECT payload ->> 'result' FROM ir_async").as_deref() == Some("right")
    });
}

#[test]
fn a_schedule_is_changed_by_its_own_role_only() {
    let cluster = shared();
    let (mut sql, mut first) = database(&cluster, "s_own");
    role(&mut sql, "s_own_other");
    role(&mut sql, "s_own_member");
    sql.batch_execute("GRANT s_own TO s_own_member").unwrap();
    let mut other = cluster.connect_as("s_own", "s_own_other");
    let mut member = cluster.connect_as("s_own", "s_own_member");
    let make = "SELECT ir_async_schedule('own', '@yearly', 'pg_catalog.now')";
    first.batch_execute(make).unwrap();
    for client in [&mut other, &mut member, &mut sql] {
        let refused = refusal(client.query(make, &[]));
        assert_eq!(refused, "42501");
    }
    assert_eq!(refusal(other.query("SELECT ir_async_unschedule('own')", &[])), "42501");
    assert!(yes(&mut member, "SELECT ir_async_unschedule('own')"));
    assert!(!yes(&mut first, "SELECT ir_async_unschedule('own')"));
    other.batch_execute(make).unwrap();
    assert_eq!(of(&mut sql, "own", "role::regrole").as_deref(), Some("s_own_other"));
    for change in [
        "UPDATE imbus_schedule SET role = 10",
        "DELETE FROM imbus_schedule",
        "SELECT * FROM imbus_schedule",
        "INSERT INTO imbus_schedule (name, cron_expression, target) VALUES ('x', '@daily', 'now()')",
    ] {
        assert_eq!(refusal(other.query(change, &[])), "42501", "{change}");
    }
    assert!(yes(&mut sql, "SELECT ir_async_unschedule('own')"), "a superuser removes any");
}

#[test]
fn a_schedule_of_a_role_that_is_gone_stops_and_its_name_is_free() {
    let cluster = shared();
    let (mut sql, role) = database(&cluster, "s_gone");
    drop(role);
    sql.batch_execute(
        "CREATE ROLE s_gone_for_good LOGIN; GRANT EXECUTE ON FUNCTION ir_async_schedule TO s_gone_for_good",
    )
    .unwrap();
    let mut gone = cluster.connect_as("s_gone", "s_gone_for_good");
    gone.batch_execute("SELECT ir_async_schedule('gone', '* * * * * *', 'pg_catalog.now')").unwrap();
    drop(gone);
    sql.batch_execute("DROP OWNED BY s_gone_for_good; DROP ROLE s_gone_for_good").unwrap();
    eventually("it has stopped", || {
        of(&mut sql, "gone", "next_run IS NULL AND role IS NULL").as_deref() == Some("true")
    });
    assert_eq!(of(&mut sql, "gone", "problem").as_deref(), Some("its role does not exist any more"));
    let mut role = cluster.connect_as("s_gone", "s_gone");
    role.batch_execute("SELECT ir_async_schedule('gone', '@daily', 'pg_catalog.now')").unwrap();
    assert_eq!(of(&mut sql, "gone", "role::regrole || COALESCE(problem, '')").as_deref(), Some("s_gone"));
}

#[test]
fn a_schedule_that_is_inserted_belongs_to_who_inserts_it_or_to_nobody() {
    let cluster = shared();
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE ROLE s_insert LOGIN").unwrap();
    sql.batch_execute("CREATE DATABASE s_insert OWNER s_insert").unwrap();
    let mut owner = cluster.connect_as("s_insert", "s_insert");
    owner.batch_execute("CREATE EXTENSION imbus").unwrap();
    cluster.wait_served("s_insert");
    owner
        .batch_execute(
            "CREATE FUNCTION who() RETURNS text LANGUAGE sql AS 'SELECT session_user::text';
             INSERT INTO imbus_schedule (name, cron_expression, target, role, next_run) VALUES
                 ('mine', '@yearly', 'public.who()', 10, now());
             INSERT INTO imbus_schedule (name, cron_expression, target, role, role_name, next_run) VALUES
                 ('theirs', '@yearly', 'public.who()', 10, 'postgres', now()),
                 ('broken', 'whenever', 'public.who()', 10, NULL, now()),
                 ('nowhere', '@daily', 'public.who()', 10, NULL, now());
             ",
        )
        .unwrap();
    let infinite = "INSERT INTO imbus_schedule (name, cron_expression, target, next_run) VALUES ('x', '@daily', 'f()', '-infinity')";
    assert_eq!(refusal(owner.query(infinite, &[])), "23514");
    let mut sql = cluster.connect("s_insert");
    eventually("the job has run", || {
        yes(
            &mut sql,
            "SELECT count(*) = 2 AND every(payload ->> 'result' = 's_insert') FROM ir_async WHERE state = 'succeeded'",
        )
    });
    assert_eq!(of(&mut sql, "broken", "problem").as_deref(), Some("its cron_expression or its time_zone is not valid"));
    let problem = of(&mut sql, "theirs", "problem || COALESCE(role::text, '') || COALESCE(next_run::text, '')");
    assert_eq!(problem.as_deref(), Some("inserted by another role than the one whose schedule it was"));
    owner.batch_execute("SELECT ir_async_schedule('theirs', '@yearly', 'who')").unwrap();
    assert_eq!(of(&mut sql, "theirs", "role::regrole").as_deref(), Some("s_insert"));
}

#[test]
fn a_dump_keeps_schedules_and_a_superuser_who_restores_it_runs_none() {
    let cluster = shared();
    let mut sql = cluster.connect("postgres");
    sql.batch_execute("CREATE ROLE s_dump LOGIN; CREATE ROLE s_dump_other LOGIN").unwrap();
    for (name, owner) in [
        ("s_dump", "s_dump"),
        ("s_dump_same", "s_dump"),
        ("s_dump_other", "s_dump_other"),
        ("s_dump_super", "postgres"),
    ] {
        sql.batch_execute(&format!("CREATE DATABASE {name} OWNER {owner}")).unwrap();
    }
    let mut owner = cluster.connect_as("s_dump", "s_dump");
    owner
        .batch_execute(
            "CREATE EXTENSION imbus;
             CREATE FUNCTION who() RETURNS text LANGUAGE sql AS $$ SELECT current_database() || ' ' || session_user $$;
             SELECT ir_async_schedule('kept', '* * * * * *', 'who', time_zone => 'Europe/Berlin', timeout => '1 min')",
        )
        .unwrap();
    let file = cluster.dir.join("s_dump.dump").display().to_string();
    let port = cluster.port.to_string();
    let run = |program: &str, role: &str, arguments: &[&str]| {
        cluster.run(program, &[&["-h", "127.0.0.1", "-p", &port, "-U", role][..], arguments].concat());
    };
    run("pg_dump", "s_dump", &["-F", "c", "-f", &file, "s_dump"]);
    run("pg_restore", "s_dump", &["-e", "-d", "s_dump_same", &file]);
    run("pg_restore", "postgres", &["-e", "-d", "s_dump_super", &file]);
    run("pg_restore", "s_dump_other", &["-e", "--no-owner", "-d", "s_dump_other", &file]);
    let mut same = cluster.connect("s_dump_same");
    eventually("it runs on in the copy", || {
        yes(&mut same, "SELECT count(*) > 1 FROM ir_async WHERE payload ->> 'result' = 's_dump_same s_dump'")
    });
    assert_eq!(of(&mut same, "kept", "time_zone || timeout").as_deref(), Some("Europe/Berlin00:01:00"));
    assert!(yes(&mut same, "SELECT nextval('imbus_schedule_id_seq') > 1"));
    for database in ["s_dump_super", "s_dump_other"] {
        let mut copy = cluster.connect(database);
        assert_eq!(number(&mut copy, "SELECT count(*) FROM imbus_schedule WHERE role IS NULL AND next_run IS NULL"), 1);
    }
    let mut copy = cluster.connect("s_dump_super");
    cluster.wait_served("s_dump_super");
    tick(&mut copy, "tick");
    assert_eq!(
        of(&mut copy, "kept", "runs - (SELECT runs FROM imbus_schedule WHERE name = 'kept')").as_deref(),
        Some("0")
    );
    assert!(yes(
        &mut copy,
        "SELECT every(problem LIKE 'inserted by a superuser%') FROM imbus_schedule WHERE name = 'kept'"
    ));
    owner.batch_execute("SELECT ir_async_unschedule('kept')").unwrap();
}

#[test]
fn a_run_that_cannot_be_enqueued_stays_due_and_hinders_no_other() {
    let cluster = shared();
    let (mut sql, mut role) = database(&cluster, "s_stuck");
    role.batch_execute(
        "SELECT ir_async_schedule('stuck', '@yearly', 'pg_catalog.now', notify => '[\"news\", 1]',
                                  description => 'stuck');
         SELECT ir_async_schedule('free', '* * * * * *', 'pg_catalog.now', overlap => true)",
    )
    .unwrap();
    sql.batch_execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no news today'; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON ir_async FOR EACH ROW WHEN (NEW.name = 'stuck')
             EXECUTE FUNCTION refuse()",
    )
    .unwrap();
    miss(&mut sql, "stuck");
    eventually("the problem is seen", || {
        of(&mut sql, "stuck", "problem").is_some_and(|problem| problem.contains("no news today"))
    });
    let before = number(&mut sql, "SELECT runs FROM imbus_schedule WHERE name = 'free'");
    eventually("the other runs", || number(&mut sql, "SELECT runs FROM imbus_schedule WHERE name = 'free'") > before);
    assert_eq!(of(&mut sql, "stuck", "runs").as_deref(), Some("0"));
    sql.batch_execute("DROP TRIGGER refuse ON ir_async").unwrap();
    eventually("it has run", || of(&mut sql, "stuck", "runs || COALESCE(problem, '')").as_deref() == Some("1"));
    eventually("and told", || {
        number(&mut sql, "SELECT count(*) FROM imbus_bus WHERE channel = '[\"s_stuck\",\"news\",1]'") >= 3
    });
}

#[test]
fn a_schedule_that_is_being_changed_hinders_no_other() {
    let cluster = shared();
    let (mut sql, mut role) = database(&cluster, "s_locked");
    role.batch_execute(
        "SELECT ir_async_schedule('locked', '* * * * * *', 'pg_catalog.now');
         SELECT ir_async_schedule('free', '* * * * * *', 'pg_catalog.now', overlap => true)",
    )
    .unwrap();
    role.batch_execute("BEGIN; SELECT ir_async_unschedule('locked')").unwrap();
    let before = number(&mut sql, "SELECT runs FROM imbus_schedule WHERE name = 'free'");
    eventually("the other runs", || {
        number(&mut sql, "SELECT runs FROM imbus_schedule WHERE name = 'free'") > before + 1
    });
    role.batch_execute("ROLLBACK").unwrap();
    let before = number(&mut sql, "SELECT runs FROM imbus_schedule WHERE name = 'locked'");
    eventually("it runs again", || number(&mut sql, "SELECT runs FROM imbus_schedule WHERE name = 'locked'") > before);
}
