-- Jobs run in the background and end in their states; waits on conditions, never on time.
CREATE FUNCTION regress_wait(job bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE state text;
BEGIN
    FOR i IN 1..600 LOOP
        state := ir_async_status(job) ->> 'state';
        EXIT WHEN state NOT IN ('created', 'processing');
        PERFORM pg_sleep(0.05);
    END LOOP;
    RETURN state;
END $$;
CREATE TYPE regress_pair AS (a int, b text);
CREATE FUNCTION regress_types(i int, t text[], j jsonb, p regress_pair, d date DEFAULT '2026-01-02') RETURNS jsonb
    LANGUAGE sql AS $$ SELECT jsonb_build_array(i, t, j, p.b, d) $$;
CREATE FUNCTION regress_void() RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION regress_null() RETURNS int LANGUAGE sql AS 'SELECT NULL::int';
CREATE FUNCTION regress_set(n int) RETURNS SETOF int LANGUAGE sql AS 'SELECT generate_series(1, n)';
CREATE FUNCTION regress_table(OUT a int, OUT b text) RETURNS SETOF record LANGUAGE sql AS $$ VALUES (1, 'x'), (2, 'y') $$;
CREATE FUNCTION regress_fail() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'no way' USING ERRCODE = '22012', DETAIL = 'a detail', HINT = 'a hint'; END $$;
CREATE FUNCTION regress_path() RETURNS text LANGUAGE sql AS $$ SELECT current_setting('search_path') $$;

SELECT ir_async_call('regress_types', '[7, ["a", "b"], {"k": null}, {"a": 1, "b": "pair"}]') AS id \gset
SELECT regress_wait(:id), ir_async_status(:id) -> 'payload' AS payload;
SELECT ir_async_call('regress_types', '[7]', '{"t": [], "j": [1], "p": null, "d": "2026-11-23"}') AS id \gset
SELECT regress_wait(:id), ir_async_status(:id) -> 'payload' AS payload;
SELECT ir_async_complete(:id), ir_async_complete(:id) AS again;
SELECT ir_async_call('regress_void') AS id \gset
SELECT regress_wait(:id), ir_async_status(:id) -> 'payload' AS payload;
SELECT ir_async_call('regress_null') AS id \gset
SELECT regress_wait(:id), ir_async_status(:id) -> 'payload' AS payload;
SELECT ir_async_call('regress_set', '[3]') AS id \gset
SELECT regress_wait(:id), ir_async_status(:id) -> 'payload' AS payload;
SELECT ir_async_call('regress_table') AS id \gset
SELECT regress_wait(:id), ir_async_status(:id) -> 'payload' AS payload;
SELECT ir_async_call('regress_fail') AS id \gset
SELECT regress_wait(:id), ir_async_status(:id) -> 'payload' AS payload, ir_async_status(:id) -> 'attempts' AS attempts;
SELECT ir_async_call('regress_fail', max_attempts => 3, retry_delay => '10 ms') AS id \gset
SELECT regress_wait(:id), ir_async_status(:id) -> 'attempts' AS attempts;
SELECT ir_async_call('regress_types', '["no number", [], 1, null]') AS id \gset
SELECT regress_wait(:id), ir_async_status(:id) #> '{payload,error,code}' AS code;

-- The search_path of the moment of enqueueing.
SET search_path = pg_catalog, public;
SELECT ir_async_call('regress_path') AS id \gset
RESET search_path;
SELECT regress_wait(:id), ir_async_status(:id) -> 'payload' AS payload;

-- The earliest of times.
SELECT ir_async_call('regress_void', run_at => '-infinity') AS id \gset
SELECT regress_wait(:id);

-- A job that depends on another waits for it.
SELECT ir_async_call('regress_void', run_at => now() + interval '200 ms') AS first \gset
SELECT ir_async_call('regress_void', depends_on => ARRAY[:first]) AS second \gset
SELECT regress_wait(:second), ir_async_status(:first) ->> 'state' AS first;

-- Each state is a notification, in the same commit as the change.
SELECT ir_async_call_notify('A job', 'regress_set', '[1]', '{}', '["res.partner", 5]') AS id \gset
SELECT regress_wait(:id);
SELECT ir_async_complete(:id);
SELECT (message -> 'payload' ->> 'id')::bigint = :id AS mine, message ->> 'type' AS type, message #>> '{payload,name}' AS name,
       message #>> '{payload,state}' AS state, message #> '{payload,payload}' AS payload
  FROM bus_poll('[["res.partner", 5]]') ORDER BY bus_poll.id;

DELETE FROM ir_async;
DROP FUNCTION regress_wait, regress_types, regress_void, regress_null, regress_set, regress_table, regress_fail, regress_path;
DROP TYPE regress_pair;
