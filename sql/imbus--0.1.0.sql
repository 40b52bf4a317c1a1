-- imbus 0.1.0: the whole install script. Runs as the bootstrap superuser (trusted extension); nobody gets more than the
-- grants at the end say. SPEC names in comments, details in docs/sql.md.
\echo Use "CREATE EXTENSION imbus" to load this file. \quit

---------------------------------------------------------------- tables

-- The bus where there is no Odoo: the columns of Odoo's bus_bus.
CREATE TABLE imbus_bus (
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
CREATE TABLE imbus_bookmark (
    id bigserial CONSTRAINT imbus_bookmark_pkey PRIMARY KEY,
    made_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    bus oid NOT NULL,
    high bigint NOT NULL,
    gaps bigint[] NOT NULL DEFAULT '{}'
);

-- Jobs: the columns of Odoo's ir.async first, then imbus's own.
CREATE TABLE ir_async (
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
    queue varchar NOT NULL DEFAULT 'default',
    priority integer NOT NULL DEFAULT 10,
    run_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
    max_attempts integer NOT NULL DEFAULT 1,
    attempts integer NOT NULL DEFAULT 0,
    deaths integer NOT NULL DEFAULT 0,
    retry_delay interval NOT NULL DEFAULT '10 seconds',
    timeout interval,
    identity_key varchar,
    depends_on bigint[],
    token text,
    claimed_at timestamptz,
    finished_at timestamptz,
    CONSTRAINT ir_async_state_check
        CHECK (state IN ('created', 'processing', 'succeeded', 'done', 'failed', 'cancelled')),
    CONSTRAINT ir_async_token_check CHECK ((state = 'processing') = (token IS NOT NULL)),
    CONSTRAINT ir_async_finished_check CHECK ((state IN ('created', 'processing')) = (finished_at IS NULL)),
    CONSTRAINT ir_async_max_attempts_check CHECK (max_attempts >= 1)
);

SELECT pg_catalog.pg_extension_config_dump('imbus_bus', '');
SELECT pg_catalog.pg_extension_config_dump('imbus_bus_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('ir_async', '');
SELECT pg_catalog.pg_extension_config_dump('ir_async_id_seq', '');

---------------------------------------------------------------- indexes

CREATE INDEX ir_async_claim_index ON ir_async (priority, run_at, id) WHERE state = 'created';
CREATE INDEX ir_async_run_at_index ON ir_async (run_at) WHERE state = 'created';
CREATE INDEX ir_async_processing_index ON ir_async (id) WHERE state = 'processing';
CREATE INDEX ir_async_finished_index ON ir_async (finished_at) WHERE finished_at IS NOT NULL;
CREATE UNIQUE INDEX ir_async_identity_index ON ir_async (identity_key)
    WHERE identity_key IS NOT NULL AND state IN ('created', 'processing');

---------------------------------------------------------------- the bus

CREATE FUNCTION bus_sendone(target text, notification_type text, message jsonb) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_sendone_text_wrapper';
CREATE FUNCTION bus_sendone(target jsonb, notification_type text, message jsonb) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_sendone_jsonb_wrapper';
CREATE FUNCTION bus_sendmany(notifications jsonb) RETURNS SETOF bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_sendmany_wrapper';
CREATE FUNCTION bus_poll(channels jsonb, last bigint DEFAULT 0, ignore_ids bigint[] DEFAULT '{}')
    RETURNS TABLE (id bigint, channel jsonb, message jsonb)
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_poll_wrapper';
CREATE FUNCTION bus_last_id() RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_last_id_wrapper';
CREATE FUNCTION bus_has_missed_notifications(last bigint) RETURNS boolean
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_has_missed_notifications_wrapper';
CREATE FUNCTION bus_gc(retention interval DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_gc_wrapper';
CREATE FUNCTION bus_token(channels jsonb, expires_in interval DEFAULT '1 hour', subject text DEFAULT NULL,
                          admin boolean DEFAULT false) RETURNS text
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'bus_token_wrapper';
CREATE FUNCTION imbus_notify(channel text, payload text) RETURNS void
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'imbus_notify_wrapper';
CREATE FUNCTION imbus_version() RETURNS text
    LANGUAGE c IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'imbus_version_wrapper';

CREATE FUNCTION imbus_bus_inserted() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'imbus_bus_inserted_wrapper';
CREATE TRIGGER imbus_bus_inserted AFTER INSERT ON imbus_bus
    FOR EACH ROW EXECUTE FUNCTION imbus_bus_inserted();
ALTER TABLE imbus_bus ENABLE ALWAYS TRIGGER imbus_bus_inserted;

---------------------------------------------------------------- jobs

CREATE FUNCTION ir_async_call(
    target text, args jsonb DEFAULT '[]', kwargs jsonb DEFAULT '{}', description text DEFAULT NULL,
    notify jsonb DEFAULT NULL, queue text DEFAULT 'default', priority integer DEFAULT 10,
    run_at timestamptz DEFAULT NULL, max_attempts integer DEFAULT 1, retry_delay interval DEFAULT NULL,
    timeout interval DEFAULT NULL, identity_key text DEFAULT NULL, depends_on bigint[] DEFAULT NULL,
    model text DEFAULT NULL, res_ids bigint[] DEFAULT NULL, user_id integer DEFAULT NULL,
    context jsonb DEFAULT NULL, su boolean DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_call_wrapper';
CREATE FUNCTION ir_async_call_notify(
    description text, target text, args jsonb, kwargs jsonb, notify jsonb,
    queue text DEFAULT 'default', priority integer DEFAULT 10, run_at timestamptz DEFAULT NULL,
    max_attempts integer DEFAULT 1, retry_delay interval DEFAULT NULL, timeout interval DEFAULT NULL,
    identity_key text DEFAULT NULL, depends_on bigint[] DEFAULT NULL, model text DEFAULT NULL,
    res_ids bigint[] DEFAULT NULL, user_id integer DEFAULT NULL, context jsonb DEFAULT NULL,
    su boolean DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_call_notify_wrapper';
CREATE FUNCTION ir_async_status(id bigint) RETURNS jsonb
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_status_wrapper';
CREATE FUNCTION ir_async_complete(id bigint) RETURNS boolean
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'ir_async_complete_wrapper';

CREATE FUNCTION ir_async_inserted() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'ir_async_inserted_wrapper';
CREATE TRIGGER ir_async_inserted BEFORE INSERT ON ir_async
    FOR EACH ROW EXECUTE FUNCTION ir_async_inserted();

---------------------------------------------------------------- live state

CREATE FUNCTION imbus_gateway_state(
    OUT pid integer, OUT port integer, OUT started_at timestamptz, OUT databases bigint, OUT databases_waiting bigint,
    OUT connections bigint, OUT connections_total bigint, OUT rejected bigint, OUT messages_received bigint,
    OUT notifications_sent bigint, OUT bytes_sent bigint, OUT slow_consumers bigint) RETURNS SETOF record
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'imbus_gateway_state_wrapper';
CREATE FUNCTION imbus_bus_state(
    OUT datid oid, OUT pid integer, OUT "position" bigint, OUT gaps bigint, OUT dispatched bigint, OUT skipped bigint,
    OUT notify_splits bigint) RETURNS SETOF record
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'imbus_bus_state_wrapper';
CREATE FUNCTION imbus_connections(
    OUT id bigint, OUT datid oid, OUT address text, OUT user_agent text, OUT subject text, OUT channels bigint,
    OUT sent bigint, OUT queued bigint, OUT age_ms bigint) RETURNS SETOF record
    LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'imbus_connections_wrapper';

CREATE VIEW imbus_stat_gateway AS
    SELECT pid, port, started_at, databases, databases_waiting, connections, connections_total, rejected,
           messages_received, notifications_sent, bytes_sent, slow_consumers
      FROM imbus_gateway_state();
CREATE VIEW imbus_stat_bus AS
    SELECT s.datid, d.datname, s.pid, s."position", s.gaps, s.dispatched, s.skipped, s.notify_splits
      FROM imbus_bus_state() s LEFT JOIN pg_catalog.pg_database d ON d.oid = s.datid;
CREATE VIEW imbus_stat_connections AS
    SELECT c.id, c.datid, d.datname, c.address, c.user_agent, c.subject, c.channels, c.sent, c.queued,
           pg_catalog.make_interval(secs => c.age_ms / 1000.0) AS age
      FROM imbus_connections() c LEFT JOIN pg_catalog.pg_database d ON d.oid = c.datid;
CREATE VIEW imbus_stat_jobs AS
    SELECT queue, state, pg_catalog.count(*) AS jobs, pg_catalog.min(create_date) AS oldest,
           pg_catalog.sum(attempts) AS attempts, pg_catalog.sum(deaths) AS deaths
      FROM ir_async GROUP BY queue, state;

---------------------------------------------------------------- privileges

REVOKE ALL ON FUNCTION
    bus_sendone(text, text, jsonb), bus_sendone(jsonb, text, jsonb), bus_sendmany(jsonb),
    bus_poll(jsonb, bigint, bigint[]), bus_last_id(), bus_has_missed_notifications(bigint), bus_gc(interval),
    bus_token(jsonb, interval, text, boolean), imbus_bus_inserted(), ir_async_inserted(),
    ir_async_call(text, jsonb, jsonb, text, jsonb, text, integer, timestamptz, integer, interval, interval, text,
                  bigint[], text, bigint[], integer, jsonb, boolean),
    ir_async_call_notify(text, text, jsonb, jsonb, jsonb, text, integer, timestamptz, integer, interval, interval,
                         text, bigint[], text, bigint[], integer, jsonb, boolean),
    ir_async_status(bigint), ir_async_complete(bigint),
    imbus_gateway_state(), imbus_bus_state(), imbus_connections()
FROM PUBLIC;
REVOKE ALL ON imbus_bus, imbus_bookmark, ir_async, imbus_stat_gateway, imbus_stat_bus, imbus_stat_connections, imbus_stat_jobs
FROM PUBLIC;

-- The installing role and the owner of the database (after a restore they may differ) get it all; monitors look.
DO $grants$
DECLARE
    grantee text;
    owner text := (SELECT r.rolname FROM pg_catalog.pg_database d JOIN pg_catalog.pg_roles r ON r.oid = d.datdba
                    WHERE d.datname = pg_catalog.current_database());
    fn regprocedure;
BEGIN
    FOREACH grantee IN ARRAY ARRAY[$owner$@extowner@$owner$, pg_catalog.quote_ident(owner)] LOOP
        FOR fn IN SELECT p.oid::regprocedure FROM pg_catalog.pg_depend d
                    JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND e.extname = 'imbus'
                    JOIN pg_catalog.pg_proc p ON p.oid = d.objid AND d.classid = 'pg_catalog.pg_proc'::regclass
                   WHERE d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e'
                     AND p.prorettype <> 'pg_catalog.trigger'::regtype
        LOOP
            EXECUTE pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO %s', fn, grantee);
        END LOOP;
        EXECUTE pg_catalog.format('GRANT SELECT ON imbus_stat_gateway, imbus_stat_bus, imbus_stat_connections,
                                   imbus_stat_jobs TO %s', grantee);
        -- INSERT only so that pg_restore works.
        EXECUTE pg_catalog.format('GRANT SELECT, INSERT ON imbus_bus, ir_async TO %s', grantee);
        EXECUTE pg_catalog.format('GRANT SELECT ON imbus_bookmark TO %s', grantee);
        EXECUTE pg_catalog.format('GRANT SELECT, UPDATE ON SEQUENCE imbus_bus_id_seq, ir_async_id_seq TO %s', grantee);
    END LOOP;
END
$grants$;
GRANT EXECUTE ON FUNCTION imbus_gateway_state(), imbus_bus_state(), imbus_connections() TO pg_monitor;
GRANT SELECT ON imbus_stat_gateway, imbus_stat_bus, imbus_stat_connections, imbus_stat_jobs TO pg_monitor;

---------------------------------------------------------------- comments

COMMENT ON TABLE imbus_bus IS 'notifications, where there is no Odoo table bus_bus';
COMMENT ON TABLE imbus_bookmark IS 'how far the database worker was; gaps are pairs of bounds';
COMMENT ON TABLE ir_async IS 'asynchronous jobs; changed through the ir_async_* functions only';
COMMENT ON FUNCTION bus_sendone(text, text, jsonb) IS
    'publish on a plain string channel in the current transaction; returns the id';
COMMENT ON FUNCTION bus_sendone(jsonb, text, jsonb) IS
    'publish on a channel such as ["res.partner",42] in the current transaction; returns the id';
COMMENT ON FUNCTION bus_sendmany(jsonb) IS 'publish [[target, type, message], ...] in order; returns the ids';
COMMENT ON FUNCTION bus_poll(jsonb, bigint, bigint[]) IS
    'notifications on these channels: of the last 50 s (last = 0), or with a greater id';
COMMENT ON FUNCTION bus_last_id() IS 'greatest visible id of a notification, 0 when there is none';
COMMENT ON FUNCTION bus_has_missed_notifications(bigint) IS 'true when no notification has that id';
COMMENT ON FUNCTION bus_gc(interval) IS 'delete notifications older than that (NULL: the setting); returns how many';
COMMENT ON FUNCTION bus_token(jsonb, interval, text, boolean) IS
    'a signed token that lets its bearer subscribe to these channels ("*": all) of this database';
COMMENT ON FUNCTION imbus_notify(text, text) IS
    'pg_notify that splits a JSON array too long for one payload (ODOO_NOTIFY_FUNCTION)';
COMMENT ON FUNCTION imbus_version() IS 'version of the imbus library';
COMMENT ON FUNCTION imbus_bus_inserted() IS 'trigger: tells the worker at commit, in the order of commits';
COMMENT ON FUNCTION ir_async_inserted() IS 'trigger: a job runs as the role that inserts it';
COMMENT ON TRIGGER imbus_bus_inserted ON imbus_bus IS 'tells the worker at commit, in the order of commits';
COMMENT ON TRIGGER ir_async_inserted ON ir_async IS 'a job runs as the role that inserts it';
COMMENT ON FUNCTION ir_async_call(text, jsonb, jsonb, text, jsonb, text, integer, timestamptz, integer, interval,
    interval, text, bigint[], text, bigint[], integer, jsonb, boolean) IS
    'enqueue a call of an SQL function in the current transaction; returns the id of the job';
COMMENT ON FUNCTION ir_async_call_notify(text, text, jsonb, jsonb, jsonb, text, integer, timestamptz, integer, interval,
    interval, text, bigint[], text, bigint[], integer, jsonb, boolean) IS
    'enqueue a call of an SQL function, with a notification on a channel at each state; returns the id of the job';
COMMENT ON FUNCTION ir_async_status(bigint) IS 'a job as JSON';
COMMENT ON FUNCTION ir_async_complete(bigint) IS 'turn a job that succeeded into done';
COMMENT ON FUNCTION imbus_gateway_state() IS 'what imbus_stat_gateway shows';
COMMENT ON FUNCTION imbus_bus_state() IS 'what imbus_stat_bus shows';
COMMENT ON FUNCTION imbus_connections() IS 'what imbus_stat_connections shows';
COMMENT ON VIEW imbus_stat_gateway IS 'the gateway: process, port, connections, counters since it started';
COMMENT ON VIEW imbus_stat_bus IS 'the worker of each served database: position, gaps, counters since it started';
COMMENT ON VIEW imbus_stat_connections IS 'the open client connections';
COMMENT ON VIEW imbus_stat_jobs IS 'jobs by queue and state';
