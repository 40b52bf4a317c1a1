-- NULL and empty arguments are errors of their own (22004), never a crash, never a half-sent notification.
CREATE FUNCTION pg_temp.refused(command text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE state text; message text;
BEGIN
    EXECUTE command;
    RETURN 'accepted';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT;
    RETURN format('%s: %s', state, message);
END $$;
SELECT command, pg_temp.refused(command) FROM unnest(ARRAY[
    $$SELECT bus_sendone(NULL::text, 't', '1')$$,
    $$SELECT bus_sendone(NULL::jsonb, 't', '1')$$,
    $$SELECT bus_sendone('c', NULL, '1')$$,
    $$SELECT bus_sendone('c', '', '1')$$,
    $$SELECT bus_sendone('c', 't', NULL)$$,
    $$SELECT bus_sendmany(NULL)$$,
    $$SELECT * FROM bus_poll(NULL)$$,
    $$SELECT * FROM bus_poll('["c"]', NULL, NULL)$$,
    $$SELECT * FROM bus_poll('["c"]', 0, ARRAY[NULL, 1]::bigint[])$$,
    $$SELECT bus_has_missed_notifications(NULL)$$,
    $$SELECT bus_gc(NULL)$$,
    $$SELECT imbus_notify(NULL, 'x')$$,
    $$SELECT imbus_notify('c', NULL)$$
]) command;
SELECT bus_last_id();
