-- imbus 0.1.0: the whole install script. Runs as the bootstrap superuser (trusted extension); nobody gets more than the
-- grants at the end say. SPEC names in comments, details in docs/sql.md.
\echo Use "CREATE EXTENSION imbus" to load this file. \quit

-- No name below means anything of a user's: every operator, function and type is PostgreSQL's own, and imbus's objects
-- are named with their schema (PostgreSQL's manual, "Security Considerations for Extension Scripts"; scripts/lint).
SET LOCAL search_path = pg_catalog, pg_temp;

---------------------------------------------------------------- tables

-- The bus where there is no Odoo: the columns of Odoo's bus_bus.
CREATE TABLE @extschema@.imbus_bus (
    id bigserial CONSTRAINT imbus_bus_pkey PRIMARY KEY,
    create_uid integer,
    write_uid integer,
    channel varchar,
    message varchar,
    create_date timestamp DEFAULT (pg_catalog.now() AT TIME ZONE 'UTC'),
    write_date timestamp DEFAULT (pg_catalog.now() AT TIME ZONE 'UTC')
);

-- How far the database worker was, every few seconds while there is something new: what a client that comes back is
-- owed, and what is old enough to be deleted. The newest row also tells which bus table is in force. Not dumped.
CREATE TABLE @extschema@.imbus_bookmark (
    id bigserial CONSTRAINT imbus_bookmark_pkey PRIMARY KEY,
    made_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    bus oid NOT NULL,
    high bigint NOT NULL,
    gaps bigint[] NOT NULL DEFAULT '{}',
    snapshot text
);

-- Jobs: the columns of Odoo's ir.async first, then imbus's own.
CREATE TABLE @extschema@.ir_async (
    id bigserial CONSTRAINT ir_async_pkey PRIMARY KEY,
    create_uid integer,
    create_date timestamp DEFAULT (pg_catalog.now() AT TIME ZONE 'UTC'),
    write_uid integer,
    write_date timestamp DEFAULT (pg_catalog.now() AT TIME ZONE 'UTC'),
    name varchar,
    state varchar NOT NULL DEFAULT 'created',
    res_model varchar,
    res_ids jsonb,
    method varchar NOT NULL,
    args jsonb NOT NULL DEFAULT '[]',
    kwargs jsonb NOT NULL DEFAULT '{}',
    user_id integer,
    context jsonb,
    super_user boolean,
    traceback text,
    payload jsonb,
    role oid NOT NULL,
    search_path text NOT NULL DEFAULT 'pg_catalog',
    notify varchar,
    queue varchar COLLATE pg_catalog."C" NOT NULL DEFAULT 'default',
    priority integer NOT NULL DEFAULT 10,
    run_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
    max_attempts integer NOT NULL DEFAULT 1,
    attempts integer NOT NULL DEFAULT 0,
    deaths integer NOT NULL DEFAULT 0,
    retry_delay interval NOT NULL DEFAULT '10 seconds',
    timeout interval,
    identity_key varchar,
    depends_on bigint[],
    ready boolean NOT NULL DEFAULT true,
    token text COLLATE pg_catalog."C",
    session bigint,
    worker varchar,
    errors jsonb NOT NULL DEFAULT '[]',
    claimed_at timestamptz,
    finished_at timestamptz
    -- What holds between state, token and finished_at is checked by the trigger: nobody may update this table, and CHECKs
    -- are compiled anew by each statement, which cost a fifth of an enqueueing.
);

-- Where jobs wait and run, by turns: what updates leave behind goes when one of them is truncated, however old the oldest
-- transaction is (src/pg/rotation.rs). Those that have ended come into ir_async itself.
CREATE TABLE @extschema@.ir_async_1 (CONSTRAINT ir_async_1_pkey PRIMARY KEY (id)) INHERITS (@extschema@.ir_async);
CREATE TABLE @extschema@.ir_async_2 (CONSTRAINT ir_async_2_pkey PRIMARY KEY (id)) INHERITS (@extschema@.ir_async);
CREATE TABLE @extschema@.ir_async_3 (CONSTRAINT ir_async_3_pkey PRIMARY KEY (id)) INHERITS (@extschema@.ir_async);

-- How far jobs are that are processed. A table of its own: a job's own row is not touched while somebody works on it.
CREATE TABLE @extschema@.imbus_progress (
    job_id bigint CONSTRAINT imbus_progress_pkey PRIMARY KEY,
    percent double precision,
    message text,
    at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- Schedules: when, as whom, and the job that is enqueued then. Without next_run a schedule does not run.
CREATE TABLE @extschema@.imbus_schedule (
    id bigserial CONSTRAINT imbus_schedule_pkey PRIMARY KEY,
    name text NOT NULL CONSTRAINT imbus_schedule_name_key UNIQUE,
    cron_expression text NOT NULL,
    time_zone text NOT NULL DEFAULT 'UTC',
    overlap boolean NOT NULL DEFAULT false,
    next_run timestamptz,
    last_run timestamptz,
    last_job bigint,
    runs bigint NOT NULL DEFAULT 0,
    skipped bigint NOT NULL DEFAULT 0,
    problem text,
    role oid,
    role_name text,
    search_path text NOT NULL DEFAULT 'pg_catalog',
    description text,
    target text NOT NULL,
    args jsonb NOT NULL DEFAULT '[]',
    kwargs jsonb NOT NULL DEFAULT '{}',
    notify text,
    queue text NOT NULL DEFAULT 'default',
    priority integer NOT NULL DEFAULT 10,
    max_attempts integer NOT NULL DEFAULT 1,
    retry_delay interval NOT NULL DEFAULT '10 seconds',
    timeout interval,
    model text,
    res_ids jsonb,
    user_id integer,
    context jsonb,
    su boolean,
    CONSTRAINT imbus_schedule_role_check CHECK (next_run IS NULL OR role IS NOT NULL),
    CONSTRAINT imbus_schedule_next_run_check CHECK (pg_catalog.isfinite(next_run)),
    CONSTRAINT imbus_schedule_max_attempts_check CHECK (max_attempts >= 1)
);

SELECT pg_catalog.pg_extension_config_dump('@extschema@.imbus_bus', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.imbus_bus_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.ir_async', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.ir_async_1', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.ir_async_2', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.ir_async_3', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.ir_async_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.imbus_schedule', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.imbus_schedule_id_seq', '');

---------------------------------------------------------------- indexes

-- Lanes: jobs that differ in nothing but their times (src/pg/jobs/claims.rs).
CREATE INDEX ir_async_claim_index ON @extschema@.ir_async (queue, (CASE WHEN res_model IS NULL THEN 0 ELSE 1 END), role,
                                                                priority, run_at, id)
    WHERE state = 'created' AND ready;
CREATE INDEX ir_async_processing_index ON @extschema@.ir_async (token, id) WHERE state = 'processing';
CREATE INDEX ir_async_finished_index ON @extschema@.ir_async (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX ir_async_user_index ON @extschema@.ir_async (user_id, id) WHERE user_id IS NOT NULL AND name IS NOT NULL;
CREATE INDEX ir_async_blocked_index ON @extschema@.ir_async (id) WHERE NOT ready AND state = 'created';
CREATE INDEX ir_async_depends_on_index ON @extschema@.ir_async USING gin (depends_on) WITH (fastupdate = off) WHERE NOT ready;
-- Of its own table each; src/pg/jobs/identity.rs sees to what they have to do with each other.
CREATE UNIQUE INDEX ir_async_identity_index ON @extschema@.ir_async (identity_key)
    WHERE identity_key IS NOT NULL AND state IN ('created', 'processing');
CREATE INDEX ir_async_1_claim_index ON @extschema@.ir_async_1 (queue, (CASE WHEN res_model IS NULL THEN 0 ELSE 1 END), role,
                                                                priority, run_at, id)
    WHERE state = 'created' AND ready;
CREATE INDEX ir_async_1_processing_index ON @extschema@.ir_async_1 (token, id) WHERE state = 'processing';
CREATE INDEX ir_async_1_finished_index ON @extschema@.ir_async_1 (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX ir_async_1_user_index ON @extschema@.ir_async_1 (user_id, id) WHERE user_id IS NOT NULL AND name IS NOT NULL;
CREATE INDEX ir_async_1_blocked_index ON @extschema@.ir_async_1 (id) WHERE NOT ready AND state = 'created';
CREATE INDEX ir_async_1_depends_on_index ON @extschema@.ir_async_1 USING gin (depends_on) WITH (fastupdate = off) WHERE NOT ready;
CREATE UNIQUE INDEX ir_async_1_identity_index ON @extschema@.ir_async_1 (identity_key)
    WHERE identity_key IS NOT NULL AND state IN ('created', 'processing');
CREATE INDEX ir_async_2_claim_index ON @extschema@.ir_async_2 (queue, (CASE WHEN res_model IS NULL THEN 0 ELSE 1 END), role,
                                                                priority, run_at, id)
    WHERE state = 'created' AND ready;
CREATE INDEX ir_async_2_processing_index ON @extschema@.ir_async_2 (token, id) WHERE state = 'processing';
CREATE INDEX ir_async_2_finished_index ON @extschema@.ir_async_2 (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX ir_async_2_user_index ON @extschema@.ir_async_2 (user_id, id) WHERE user_id IS NOT NULL AND name IS NOT NULL;
CREATE INDEX ir_async_2_blocked_index ON @extschema@.ir_async_2 (id) WHERE NOT ready AND state = 'created';
CREATE INDEX ir_async_2_depends_on_index ON @extschema@.ir_async_2 USING gin (depends_on) WITH (fastupdate = off) WHERE NOT ready;
CREATE UNIQUE INDEX ir_async_2_identity_index ON @extschema@.ir_async_2 (identity_key)
    WHERE identity_key IS NOT NULL AND state IN ('created', 'processing');
CREATE INDEX ir_async_3_claim_index ON @extschema@.ir_async_3 (queue, (CASE WHEN res_model IS NULL THEN 0 ELSE 1 END), role,
                                                                priority, run_at, id)
    WHERE state = 'created' AND ready;
CREATE INDEX ir_async_3_processing_index ON @extschema@.ir_async_3 (token, id) WHERE state = 'processing';
CREATE INDEX ir_async_3_finished_index ON @extschema@.ir_async_3 (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX ir_async_3_user_index ON @extschema@.ir_async_3 (user_id, id) WHERE user_id IS NOT NULL AND name IS NOT NULL;
CREATE INDEX ir_async_3_blocked_index ON @extschema@.ir_async_3 (id) WHERE NOT ready AND state = 'created';
CREATE INDEX ir_async_3_depends_on_index ON @extschema@.ir_async_3 USING gin (depends_on) WITH (fastupdate = off) WHERE NOT ready;
CREATE UNIQUE INDEX ir_async_3_identity_index ON @extschema@.ir_async_3 (identity_key)
    WHERE identity_key IS NOT NULL AND state IN ('created', 'processing');
CREATE INDEX imbus_schedule_next_run_index ON @extschema@.imbus_schedule (next_run);
CREATE INDEX imbus_schedule_last_run_index ON @extschema@.imbus_schedule (last_run);

---------------------------------------------------------------- the bus

CREATE FUNCTION @extschema@.bus_sendone(target text, notification_type text, message jsonb) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_sendone_text_wrapper';
CREATE FUNCTION @extschema@.bus_sendone(target jsonb, notification_type text, message jsonb) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_sendone_jsonb_wrapper';
CREATE FUNCTION @extschema@.bus_sendmany(notifications jsonb) RETURNS SETOF bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_sendmany_wrapper';
CREATE FUNCTION @extschema@.bus_poll(channels jsonb, last bigint DEFAULT 0, ignore_ids bigint[] DEFAULT '{}')
    RETURNS TABLE (id bigint, channel jsonb, message jsonb)
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_poll_wrapper';
CREATE FUNCTION @extschema@.bus_last_id() RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_last_id_wrapper';
CREATE FUNCTION @extschema@.bus_has_missed_notifications(last bigint) RETURNS boolean
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_has_missed_notifications_wrapper';
CREATE FUNCTION @extschema@.bus_gc(retention interval DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_gc_wrapper';
CREATE FUNCTION @extschema@.bus_token(channels jsonb, expires_in interval DEFAULT '1 hour', subject text DEFAULT NULL,
                          admin boolean DEFAULT false) RETURNS text
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_token_wrapper';
CREATE FUNCTION @extschema@.imbus_notify(channel text, payload text) RETURNS void
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'imbus_notify_wrapper';
CREATE FUNCTION @extschema@.imbus_version() RETURNS text
    LANGUAGE c IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'imbus_version_wrapper';

CREATE FUNCTION @extschema@.imbus_bus_inserted() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'imbus_bus_inserted_wrapper';
CREATE TRIGGER imbus_bus_inserted AFTER INSERT ON @extschema@.imbus_bus
    FOR EACH ROW EXECUTE FUNCTION @extschema@.imbus_bus_inserted();
ALTER TABLE @extschema@.imbus_bus ENABLE ALWAYS TRIGGER imbus_bus_inserted;

---------------------------------------------------------------- jobs

CREATE FUNCTION @extschema@.ir_async_call(
    target text, args jsonb DEFAULT '[]', kwargs jsonb DEFAULT '{}', description text DEFAULT NULL,
    notify jsonb DEFAULT NULL, queue text DEFAULT 'default', priority integer DEFAULT 10,
    run_at timestamptz DEFAULT NULL, max_attempts integer DEFAULT 1, retry_delay interval DEFAULT NULL,
    timeout interval DEFAULT NULL, identity_key text DEFAULT NULL, depends_on bigint[] DEFAULT NULL,
    model text DEFAULT NULL, res_ids bigint[] DEFAULT NULL, user_id integer DEFAULT NULL,
    context jsonb DEFAULT NULL, su boolean DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_call_wrapper';
CREATE FUNCTION @extschema@.ir_async_call_notify(
    description text, target text, args jsonb, kwargs jsonb, notify jsonb,
    queue text DEFAULT 'default', priority integer DEFAULT 10, run_at timestamptz DEFAULT NULL,
    max_attempts integer DEFAULT 1, retry_delay interval DEFAULT NULL, timeout interval DEFAULT NULL,
    identity_key text DEFAULT NULL, depends_on bigint[] DEFAULT NULL, model text DEFAULT NULL,
    res_ids bigint[] DEFAULT NULL, user_id integer DEFAULT NULL, context jsonb DEFAULT NULL,
    su boolean DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_call_notify_wrapper';
CREATE FUNCTION @extschema@.ir_async_status(id bigint) RETURNS jsonb
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_status_wrapper';
CREATE FUNCTION @extschema@.ir_async_complete(id bigint) RETURNS boolean
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_complete_wrapper';

CREATE FUNCTION @extschema@.ir_async_cancel(id bigint) RETURNS boolean
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_cancel_wrapper';
CREATE FUNCTION @extschema@.ir_async_retry(id bigint) RETURNS boolean
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_retry_wrapper';
CREATE FUNCTION @extschema@.ir_async_call_many(jobs jsonb) RETURNS SETOF bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_call_many_wrapper';

CREATE FUNCTION @extschema@.ir_async_claim(queue text, max_jobs integer DEFAULT 1, worker text DEFAULT NULL)
    RETURNS TABLE (id bigint, token text, name text, target text, args jsonb, kwargs jsonb, model text, res_ids jsonb,
                   user_id integer, context jsonb, su boolean, attempt integer, timeout interval)
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_claim_wrapper';
CREATE FUNCTION @extschema@.ir_async_begin(id bigint, token text)
    RETURNS TABLE (model text, res_ids jsonb, target text, args jsonb, kwargs jsonb, user_id integer, context jsonb,
                   su boolean, following bigint)
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_begin_wrapper';
CREATE FUNCTION @extschema@.ir_async_finish(id bigint, token text, result jsonb DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_finish_wrapper';
CREATE FUNCTION @extschema@.ir_async_fail(id bigint, token text, error jsonb) RETURNS void
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_fail_wrapper';
CREATE FUNCTION @extschema@.ir_async_progress(id bigint, token text, percent double precision DEFAULT NULL,
                                              message text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_progress_wrapper';

CREATE FUNCTION @extschema@.ir_async_inserted() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'ir_async_inserted_wrapper';
CREATE TRIGGER ir_async_inserted BEFORE INSERT ON @extschema@.ir_async
    FOR EACH ROW EXECUTE FUNCTION @extschema@.ir_async_inserted();
-- Always: a job that comes by replication does not choose its role either.
ALTER TABLE @extschema@.ir_async ENABLE ALWAYS TRIGGER ir_async_inserted;
CREATE TRIGGER ir_async_inserted BEFORE INSERT ON @extschema@.ir_async_1
    FOR EACH ROW EXECUTE FUNCTION @extschema@.ir_async_inserted();
ALTER TABLE @extschema@.ir_async_1 ENABLE ALWAYS TRIGGER ir_async_inserted;
CREATE TRIGGER ir_async_inserted BEFORE INSERT ON @extschema@.ir_async_2
    FOR EACH ROW EXECUTE FUNCTION @extschema@.ir_async_inserted();
ALTER TABLE @extschema@.ir_async_2 ENABLE ALWAYS TRIGGER ir_async_inserted;
CREATE TRIGGER ir_async_inserted BEFORE INSERT ON @extschema@.ir_async_3
    FOR EACH ROW EXECUTE FUNCTION @extschema@.ir_async_inserted();
ALTER TABLE @extschema@.ir_async_3 ENABLE ALWAYS TRIGGER ir_async_inserted;

---------------------------------------------------------------- schedules

CREATE FUNCTION @extschema@.ir_async_schedule(
    name text, cron_expression text, target text, args jsonb DEFAULT '[]', kwargs jsonb DEFAULT '{}',
    time_zone text DEFAULT 'UTC', description text DEFAULT NULL, notify jsonb DEFAULT NULL,
    queue text DEFAULT 'default', priority integer DEFAULT 10, max_attempts integer DEFAULT 1,
    retry_delay interval DEFAULT NULL, timeout interval DEFAULT NULL, model text DEFAULT NULL,
    res_ids bigint[] DEFAULT NULL, user_id integer DEFAULT NULL, context jsonb DEFAULT NULL, su boolean DEFAULT NULL,
    overlap boolean DEFAULT false) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_schedule_wrapper';
CREATE FUNCTION @extschema@.ir_async_unschedule(name text) RETURNS boolean
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_unschedule_wrapper';

CREATE FUNCTION @extschema@.imbus_schedule_inserted() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'imbus_schedule_inserted_wrapper';
CREATE TRIGGER imbus_schedule_inserted BEFORE INSERT ON @extschema@.imbus_schedule
    FOR EACH ROW EXECUTE FUNCTION @extschema@.imbus_schedule_inserted();
-- Always, as with jobs.
ALTER TABLE @extschema@.imbus_schedule ENABLE ALWAYS TRIGGER imbus_schedule_inserted;

---------------------------------------------------------------- live state

CREATE FUNCTION @extschema@.imbus_gateway_state(
    OUT pid integer, OUT port integer, OUT started_at timestamptz, OUT databases bigint, OUT databases_waiting bigint,
    OUT connections bigint, OUT connections_total bigint, OUT rejected bigint, OUT messages_received bigint,
    OUT notifications_sent bigint, OUT bytes_sent bigint, OUT slow_consumers bigint) RETURNS SETOF record
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'imbus_gateway_state_wrapper';
CREATE FUNCTION @extschema@.imbus_bus_state(
    OUT datid oid, OUT pid integer, OUT "position" bigint, OUT gaps bigint, OUT dispatched bigint, OUT skipped bigint,
    OUT notify_splits bigint) RETURNS SETOF record
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'imbus_bus_state_wrapper';
CREATE FUNCTION @extschema@.imbus_connections(
    OUT id bigint, OUT datid oid, OUT address text, OUT user_agent text, OUT subject text, OUT channels bigint,
    OUT sent bigint, OUT queued bigint, OUT age_ms bigint) RETURNS SETOF record
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'imbus_connections_wrapper';

CREATE VIEW @extschema@.imbus_stat_gateway AS
    SELECT pid, port, started_at, databases, databases_waiting, connections, connections_total, rejected,
           messages_received, notifications_sent, bytes_sent, slow_consumers
      FROM @extschema@.imbus_gateway_state();
CREATE VIEW @extschema@.imbus_stat_bus AS
    SELECT s.datid, d.datname, s.pid, s."position", s.gaps, s.dispatched, s.skipped, s.notify_splits
      FROM @extschema@.imbus_bus_state() s LEFT JOIN pg_catalog.pg_database d ON d.oid = s.datid;
CREATE FUNCTION @extschema@.imbus_disconnect(id bigint, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'imbus_disconnect_wrapper';

CREATE VIEW @extschema@.imbus_stat_connections AS
    SELECT c.id, c.datid, d.datname, c.address, c.user_agent, c.subject, c.channels, c.sent, c.queued,
           pg_catalog.make_interval(secs => c.age_ms / 1000.0) AS age
      FROM @extschema@.imbus_connections() c LEFT JOIN pg_catalog.pg_database d ON d.oid = c.datid;
CREATE VIEW @extschema@.imbus_stat_jobs AS
    SELECT queue, state, pg_catalog.count(*) AS jobs, pg_catalog.min(create_date) AS oldest,
           pg_catalog.sum(attempts) AS attempts, pg_catalog.sum(deaths) AS deaths
      FROM @extschema@.ir_async GROUP BY queue, state;

---------------------------------------------------------------- privileges

REVOKE ALL ON FUNCTION
    @extschema@.bus_sendone(text, text, jsonb), @extschema@.bus_sendone(jsonb, text, jsonb),
    @extschema@.bus_sendmany(jsonb), @extschema@.bus_poll(jsonb, bigint, bigint[]), @extschema@.bus_last_id(),
    @extschema@.bus_has_missed_notifications(bigint), @extschema@.bus_gc(interval),
    @extschema@.bus_token(jsonb, interval, text, boolean),
    @extschema@.ir_async_call(text, jsonb, jsonb, text, jsonb, text, integer, timestamptz, integer, interval, interval,
                              text, bigint[], text, bigint[], integer, jsonb, boolean),
    @extschema@.ir_async_call_notify(text, text, jsonb, jsonb, jsonb, text, integer, timestamptz, integer, interval,
                                     interval, text, bigint[], text, bigint[], integer, jsonb, boolean),
    @extschema@.ir_async_status(bigint), @extschema@.ir_async_complete(bigint),
    @extschema@.ir_async_cancel(bigint), @extschema@.ir_async_retry(bigint), @extschema@.ir_async_call_many(jsonb),
    @extschema@.ir_async_claim(text, integer, text), @extschema@.ir_async_begin(bigint, text),
    @extschema@.ir_async_finish(bigint, text, jsonb),
    @extschema@.ir_async_fail(bigint, text, jsonb),
    @extschema@.ir_async_progress(bigint, text, double precision, text),
    @extschema@.ir_async_schedule(text, text, text, jsonb, jsonb, text, text, jsonb, text, integer, integer, interval,
                                  interval, text, bigint[], integer, jsonb, boolean, boolean),
    @extschema@.ir_async_unschedule(text),
    @extschema@.imbus_gateway_state(), @extschema@.imbus_bus_state(), @extschema@.imbus_connections(),
    @extschema@.imbus_disconnect(bigint, text),
    @extschema@.imbus_bus_inserted(), @extschema@.ir_async_inserted(), @extschema@.imbus_schedule_inserted()
FROM PUBLIC;
REVOKE ALL ON @extschema@.ir_async_1, @extschema@.ir_async_2, @extschema@.ir_async_3, @extschema@.imbus_schedule,
    @extschema@.imbus_progress
FROM PUBLIC;
REVOKE ALL ON @extschema@.imbus_bus, @extschema@.imbus_bookmark, @extschema@.ir_async, @extschema@.imbus_stat_gateway, @extschema@.imbus_stat_bus, @extschema@.imbus_stat_connections,
    @extschema@.imbus_stat_jobs
FROM PUBLIC;

-- The installing role and whoever owns the database (after a restore, a copy or a change of hands another one).
GRANT EXECUTE ON FUNCTION @extschema@.imbus_version(), @extschema@.imbus_notify(text, text),
    @extschema@.bus_sendone(text, text, jsonb), @extschema@.bus_sendone(jsonb, text, jsonb),
    @extschema@.bus_sendmany(jsonb), @extschema@.bus_poll(jsonb, bigint, bigint[]), @extschema@.bus_last_id(),
    @extschema@.bus_has_missed_notifications(bigint), @extschema@.bus_gc(interval),
    @extschema@.bus_token(jsonb, interval, text, boolean),
    @extschema@.ir_async_call(text, jsonb, jsonb, text, jsonb, text, integer, timestamptz, integer, interval, interval,
                              text, bigint[], text, bigint[], integer, jsonb, boolean),
    @extschema@.ir_async_call_notify(text, text, jsonb, jsonb, jsonb, text, integer, timestamptz, integer, interval,
                                     interval, text, bigint[], text, bigint[], integer, jsonb, boolean),
    @extschema@.ir_async_status(bigint), @extschema@.ir_async_complete(bigint),
    @extschema@.ir_async_cancel(bigint), @extschema@.ir_async_retry(bigint), @extschema@.ir_async_call_many(jsonb),
    @extschema@.ir_async_claim(text, integer, text), @extschema@.ir_async_begin(bigint, text),
    @extschema@.ir_async_finish(bigint, text, jsonb),
    @extschema@.ir_async_fail(bigint, text, jsonb),
    @extschema@.ir_async_progress(bigint, text, double precision, text),
    @extschema@.ir_async_schedule(text, text, text, jsonb, jsonb, text, text, jsonb, text, integer, integer, interval,
                                  interval, text, bigint[], integer, jsonb, boolean, boolean),
    @extschema@.ir_async_unschedule(text),
    @extschema@.imbus_gateway_state(), @extschema@.imbus_bus_state(), @extschema@.imbus_connections(),
    @extschema@.imbus_disconnect(bigint, text)
TO @extowner@, pg_database_owner;
GRANT SELECT ON @extschema@.imbus_stat_gateway, @extschema@.imbus_stat_bus, @extschema@.imbus_stat_connections,
    @extschema@.imbus_stat_jobs, @extschema@.imbus_bookmark, @extschema@.imbus_progress
TO @extowner@, pg_database_owner;
-- INSERT only so that pg_restore works.
GRANT SELECT, INSERT ON @extschema@.imbus_bus, @extschema@.ir_async, @extschema@.ir_async_1, @extschema@.ir_async_2,
    @extschema@.ir_async_3, @extschema@.imbus_schedule
TO @extowner@, pg_database_owner;
GRANT SELECT, UPDATE ON SEQUENCE @extschema@.imbus_bus_id_seq, @extschema@.ir_async_id_seq,
    @extschema@.imbus_schedule_id_seq
TO @extowner@, pg_database_owner;

-- Monitors look.
GRANT EXECUTE ON FUNCTION @extschema@.imbus_gateway_state(), @extschema@.imbus_bus_state(),
    @extschema@.imbus_connections() TO pg_monitor;
GRANT EXECUTE ON FUNCTION @extschema@.imbus_disconnect(bigint, text) TO pg_signal_backend;
GRANT SELECT ON @extschema@.imbus_stat_gateway, @extschema@.imbus_stat_bus, @extschema@.imbus_stat_connections,
    @extschema@.imbus_stat_jobs TO pg_monitor;

---------------------------------------------------------------- comments

COMMENT ON TABLE @extschema@.imbus_bus IS 'notifications, where there is no Odoo table bus_bus';
COMMENT ON TABLE @extschema@.imbus_bookmark IS 'how far the database worker was; gaps are pairs of bounds; all that the snapshot sees had been handed on';
COMMENT ON TABLE @extschema@.ir_async IS 'asynchronous jobs; changed through the ir_async_* functions only';
COMMENT ON TABLE @extschema@.ir_async_1 IS 'jobs that wait or run; look at ir_async, which shows them too';
COMMENT ON TABLE @extschema@.ir_async_2 IS 'jobs that wait or run; look at ir_async, which shows them too';
COMMENT ON TABLE @extschema@.ir_async_3 IS 'jobs that wait or run; look at ir_async, which shows them too';
COMMENT ON TABLE @extschema@.imbus_progress IS 'how far jobs are that runners outside or Odoo work on';
COMMENT ON TABLE @extschema@.imbus_schedule IS
    'schedules of jobs; changed through ir_async_schedule and ir_async_unschedule only; without next_run one does not run, problem says why';
COMMENT ON FUNCTION @extschema@.bus_sendone(text, text, jsonb) IS
    'publish on a plain string channel in the current transaction; returns the id';
COMMENT ON FUNCTION @extschema@.bus_sendone(jsonb, text, jsonb) IS
    'publish on a channel such as ["res.partner",42] in the current transaction; returns the id';
COMMENT ON FUNCTION @extschema@.bus_sendmany(jsonb) IS 'publish [[target, type, message], ...] in order; returns the ids';
COMMENT ON FUNCTION @extschema@.bus_poll(jsonb, bigint, bigint[]) IS
    'notifications on these channels: of the last 50 s (last = 0), or with a greater id';
COMMENT ON FUNCTION @extschema@.bus_last_id() IS 'greatest visible id of a notification, 0 when there is none';
COMMENT ON FUNCTION @extschema@.bus_has_missed_notifications(bigint) IS 'true when no notification has that id';
COMMENT ON FUNCTION @extschema@.bus_gc(interval) IS 'delete notifications older than that (NULL: the setting); returns how many';
COMMENT ON FUNCTION @extschema@.bus_token(jsonb, interval, text, boolean) IS
    'a signed token that lets its bearer subscribe to these channels ("*": all) of this database';
COMMENT ON FUNCTION @extschema@.imbus_notify(text, text) IS
    'pg_notify that splits a JSON array too long for one payload (ODOO_NOTIFY_FUNCTION)';
COMMENT ON FUNCTION @extschema@.imbus_disconnect(bigint, text) IS
    'end a client connection (see imbus_stat_connections) with that reason; its client may come back';
COMMENT ON FUNCTION @extschema@.imbus_version() IS 'version of the imbus library';
COMMENT ON FUNCTION @extschema@.imbus_bus_inserted() IS 'trigger: tells the worker at commit, in the order of commits';
COMMENT ON FUNCTION @extschema@.ir_async_inserted() IS 'trigger: a job runs as the role that inserts it';
COMMENT ON TRIGGER imbus_bus_inserted ON @extschema@.imbus_bus IS 'tells the worker at commit, in the order of commits';
COMMENT ON TRIGGER ir_async_inserted ON @extschema@.ir_async IS 'a job runs as the role that inserts it';
COMMENT ON TRIGGER ir_async_inserted ON @extschema@.ir_async_1 IS 'a job runs as the role that inserts it';
COMMENT ON TRIGGER ir_async_inserted ON @extschema@.ir_async_2 IS 'a job runs as the role that inserts it';
COMMENT ON TRIGGER ir_async_inserted ON @extschema@.ir_async_3 IS 'a job runs as the role that inserts it';
COMMENT ON FUNCTION @extschema@.ir_async_call(text, jsonb, jsonb, text, jsonb, text, integer, timestamptz, integer, interval,
    interval, text, bigint[], text, bigint[], integer, jsonb, boolean) IS
    'enqueue a call of an SQL function in the current transaction; returns the id of the job';
COMMENT ON FUNCTION @extschema@.ir_async_call_notify(text, text, jsonb, jsonb, jsonb, text, integer, timestamptz, integer, interval,
    interval, text, bigint[], text, bigint[], integer, jsonb, boolean) IS
    'enqueue a call of an SQL function, with a notification on a channel at each state; returns the id of the job';
COMMENT ON FUNCTION @extschema@.ir_async_status(bigint) IS 'a job as JSON';
COMMENT ON FUNCTION @extschema@.ir_async_complete(bigint) IS 'turn a job that succeeded into done';
COMMENT ON FUNCTION @extschema@.ir_async_cancel(bigint) IS 'end a job that waits or runs, discard one that has failed';
COMMENT ON FUNCTION @extschema@.ir_async_retry(bigint) IS 'bring a failed or cancelled job back';
COMMENT ON FUNCTION @extschema@.ir_async_call_many(jsonb) IS 'enqueue jobs given as objects of ir_async_call''s arguments';
COMMENT ON FUNCTION @extschema@.ir_async_schedule(text, text, text, jsonb, jsonb, text, text, jsonb, text, integer, integer,
    interval, interval, text, bigint[], integer, jsonb, boolean, boolean) IS
    'have a job enqueued whenever the cron expression (minute hour day month weekday, seconds before them if wanted, or @daily) matches the clock of time_zone; replaces the schedule of that name; returns its id';
COMMENT ON FUNCTION @extschema@.ir_async_claim(text, integer, text) IS
    'claim jobs of a queue for a runner outside: they are this session''s until it ends or their timeout has passed';
COMMENT ON FUNCTION @extschema@.ir_async_begin(bigint, text) IS
    'say that a claimed job is begun, of several: it is not given back while the transaction lasts; what is to be called, and the job that follows; no row when it is lost';
COMMENT ON FUNCTION @extschema@.ir_async_finish(bigint, text, jsonb) IS 'end a claimed job with a result, or NULL for none';
COMMENT ON FUNCTION @extschema@.ir_async_fail(bigint, text, jsonb) IS
    'end an attempt of a claimed job with an error {"code","message","data"}; "retry": false for no other attempt';
COMMENT ON FUNCTION @extschema@.ir_async_progress(bigint, text, double precision, text) IS
    'say how far a claimed job is; its timeout begins anew';
COMMENT ON FUNCTION @extschema@.ir_async_unschedule(text) IS 'remove a schedule; true when there was one';
COMMENT ON FUNCTION @extschema@.imbus_schedule_inserted() IS 'trigger: a schedule is the role''s that inserts it, or nobody''s';
COMMENT ON TRIGGER imbus_schedule_inserted ON @extschema@.imbus_schedule IS 'a schedule is the role''s that inserts it, or nobody''s';
COMMENT ON FUNCTION @extschema@.imbus_gateway_state() IS 'what imbus_stat_gateway shows';
COMMENT ON FUNCTION @extschema@.imbus_bus_state() IS 'what imbus_stat_bus shows';
COMMENT ON FUNCTION @extschema@.imbus_connections() IS 'what imbus_stat_connections shows';
COMMENT ON VIEW @extschema@.imbus_stat_gateway IS 'the gateway: process, port, connections, counters since it started';
COMMENT ON VIEW @extschema@.imbus_stat_bus IS 'the worker of each served database: position, gaps, counters since it started';
COMMENT ON VIEW @extschema@.imbus_stat_connections IS 'the open client connections';
COMMENT ON VIEW @extschema@.imbus_stat_jobs IS 'jobs by queue and state';
