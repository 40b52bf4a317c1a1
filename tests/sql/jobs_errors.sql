-- What cannot run is refused when it is enqueued.
CREATE FUNCTION regress_add(a int, b int DEFAULT 1) RETURNS int LANGUAGE sql AS 'SELECT a + b';
CREATE FUNCTION regress_twice(a int) RETURNS int LANGUAGE sql AS 'SELECT a';
CREATE FUNCTION regress_twice(a text) RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION regress_any(a anyelement) RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE PROCEDURE regress_procedure() LANGUAGE sql AS 'SELECT 1';
SELECT ir_async_call(NULL);
SELECT ir_async_call('');
SELECT ir_async_call('no_such_function');
SELECT ir_async_call('no_such_schema.f');
SELECT ir_async_call('a.b.c');
SELECT ir_async_call('regress_add');
SELECT ir_async_call('regress_add', '[1, 2, 3]');
SELECT ir_async_call('regress_add', '[1]', '{"a": 2}');
SELECT ir_async_call('regress_add', '[1]', '{"c": 2}');
SELECT ir_async_call('regress_twice', '[1]');
SELECT ir_async_call('regress_any', '[1]');
SELECT ir_async_call('regress_procedure');
SELECT ir_async_call('regress_add', '{"a": 1}');
SELECT ir_async_call('regress_add', '[1]', '[2]');
SELECT ir_async_call('regress_add', '[1]', notify => '42');
SELECT ir_async_call('regress_add', '[1]', max_attempts => 0);
SELECT ir_async_call('', model => 'res.partner', res_ids => '{1}');
SELECT ir_async_call('write', res_ids => '{1}');
SELECT ir_async_call('write', su => true);
SELECT ir_async_call('write', '{}', model => 'res.partner', res_ids => '{1}');
SELECT ir_async_call('regress_add', '[1]', timeout => '0');
SELECT ir_async_call_notify('x', 'regress_add', '[1]', '{}', NULL);

CREATE ROLE imbus_regress_nologin;
CREATE ROLE imbus_regress_login LOGIN;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO imbus_regress_nologin, imbus_regress_login;
REVOKE EXECUTE ON FUNCTION regress_add(int, int) FROM PUBLIC, imbus_regress_login;
SET ROLE imbus_regress_nologin;
SELECT ir_async_call('regress_add', '[1]');
SET ROLE imbus_regress_login;
SELECT ir_async_call('regress_add', '[1]');
RESET ROLE;

SELECT ir_async_status(NULL);
SELECT ir_async_status(-1) IS NULL AS unknown;
SELECT ir_async_complete(-1);
SELECT count(*) FROM ir_async;

-- A waiting job: refused to be completed, hidden from strangers, one per identity_key.
SELECT ir_async_call('regress_add', '[1]', run_at => 'infinity', identity_key => 'k') AS id \gset
SELECT ir_async_call('regress_add', '[2]', identity_key => 'k') = :id AS same;
SELECT ir_async_status(:id) -> 'state' AS state, ir_async_status(:id) ->> 'target' AS target;
SELECT set_config('regress.job', :'id', false) IS NOT NULL AS remembered;
SET ROLE imbus_regress_login;
SELECT ir_async_status(:id) IS NULL AS hidden;
RESET ROLE;
DO $$ BEGIN PERFORM ir_async_complete(id) FROM ir_async; EXCEPTION WHEN object_not_in_prerequisite_state THEN
    RAISE NOTICE 'not in the right state'; END $$;
SET ROLE imbus_regress_login;
DO $$ BEGIN PERFORM ir_async_complete(current_setting('regress.job')::bigint);
    EXCEPTION WHEN insufficient_privilege THEN RAISE NOTICE 'not allowed'; END $$;
RESET ROLE;
DELETE FROM ir_async;

-- The short way into the table and INSERT write the same row; several at once keep their order.
BEGIN;
SELECT ir_async_call('regress_add', '[1]', '{"b": 2}', description => 'Both', notify => '["a", 1]', queue => 'q', priority => 3,
    run_at => 'infinity', max_attempts => 2, retry_delay => '3 s', timeout => '1 min', identity_key => key, depends_on => '{1}',
    user_id => 4, context => '{"lang": "fr"}') IS NOT NULL AS enqueued FROM (VALUES (NULL), ('k')) v (key);
SELECT ir_async_call('regress_add', '[1]', run_at => 'infinity', identity_key => key) IS NOT NULL AS enqueued
  FROM (VALUES (NULL), ('l')) v (key);
SELECT ir_async_call('method', model => 'res.partner', res_ids => '{1, 2}', su => true, run_at => 'infinity',
    identity_key => key) IS NOT NULL AS enqueued FROM (VALUES (NULL), ('m')) v (key);
SELECT count(*), count(DISTINCT to_jsonb(j) - '{id,identity_key}'::text[]) FROM ir_async j GROUP BY method, name ORDER BY method, name;
COMMIT;
DELETE FROM ir_async;
SELECT array_agg(m.id ORDER BY m.n) AS ids FROM ir_async_call_many('[
    {"target": "regress_add", "args": [1], "run_at": "infinity"}, {"target": "regress_add", "args": [2], "run_at": "infinity"},
    {"target": "regress_add", "args": [3], "run_at": "infinity", "identity_key": "k"},
    {"target": "regress_add", "args": [4], "run_at": "infinity", "identity_key": "k"},
    {"target": "regress_add", "args": [5], "run_at": "infinity"}]') WITH ORDINALITY m (id, n) \gset
SELECT array_agg(j.args ->> 0 ORDER BY m.n) FROM unnest(:'ids'::bigint[]) WITH ORDINALITY m (id, n) JOIN ir_async j USING (id);
SELECT ir_async_call_many('{}');
SELECT ir_async_call_many('[{"target": "regress_add"}, 1]');
SELECT ir_async_call_many('[{"targets": "regress_add"}]');
SELECT ir_async_call_many('[{"target": "regress_add", "args": {}}]');
SELECT count(*) FROM ir_async_call_many('[]');
BEGIN READ ONLY;
SELECT ir_async_call('regress_add', '[1]');
ROLLBACK;
-- What the administrator puts on the table is obeyed.
DELETE FROM ir_async;
ALTER TABLE ir_async ALTER user_id SET NOT NULL;
\set VERBOSITY sqlstate
SELECT ir_async_call('regress_add', '[1]', run_at => 'infinity');
\set VERBOSITY default
ALTER TABLE ir_async ALTER user_id DROP NOT NULL;
ALTER TABLE ir_async ADD COLUMN regress_note text DEFAULT 'noted';
CREATE FUNCTION regress_seen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE NOTICE 'seen'; RETURN NEW; END $$;
CREATE TRIGGER regress_seen BEFORE INSERT ON ir_async FOR EACH ROW EXECUTE FUNCTION regress_seen();
SELECT ir_async_call('regress_add', '[1]', run_at => 'infinity') AS id \gset
DROP TRIGGER regress_seen ON ir_async;
CREATE FUNCTION regress_none() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER regress_none BEFORE INSERT ON ir_async FOR EACH ROW EXECUTE FUNCTION regress_none();
SELECT ir_async_call('regress_add', '[1]', run_at => 'infinity');
DROP TRIGGER regress_none ON ir_async;
DROP FUNCTION regress_none;
SELECT ir_async_call('regress_add', '[1]', run_at => 'infinity') AS other \gset
SELECT id = :id AS first, regress_note FROM ir_async WHERE id IN (:id, :other) ORDER BY id;
ALTER TABLE ir_async DROP COLUMN regress_note;
SELECT ir_async_call('regress_add', '[1]', run_at => 'infinity') AS id \gset
SELECT run_at FROM ir_async WHERE id = :id;
DELETE FROM ir_async;
DROP FUNCTION regress_seen;

-- A superuser's plain INSERT (a restore) never makes somebody's job run with a superuser's rights.
INSERT INTO ir_async (method, role) VALUES ('pg_catalog.now()', 1)
    RETURNING role::regrole::text = current_user AS mine, state, payload #>> '{error,code}' AS code;
INSERT INTO ir_async (method, role, state, token) VALUES ('pg_catalog.now()', 1, 'processing', 'x')
    RETURNING state, token, finished_at IS NOT NULL AS finished;
INSERT INTO ir_async (method, role, state, finished_at) VALUES ('pg_catalog.now()', 1, 'done', now())
    RETURNING state, payload;
DELETE FROM ir_async;
DROP OWNED BY imbus_regress_nologin, imbus_regress_login;
DROP ROLE imbus_regress_nologin, imbus_regress_login;
DROP FUNCTION regress_add, regress_twice(int), regress_twice(text), regress_any;
DROP PROCEDURE regress_procedure;
