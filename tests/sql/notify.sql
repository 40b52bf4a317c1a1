-- imbus_notify is pg_notify that splits long JSON arrays as Odoo does: in halves, the left one longer.
CREATE FUNCTION pg_temp.refused(command text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE state text; message text; hint text;
BEGIN
    EXECUTE command;
    RETURN 'accepted';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
    RETURN format('%s: %s | %s', state, message, hint);
END $$;
SELECT imbus_version() IS NOT NULL AS loaded;
SHOW imbus.notify_payload_max_length;
SELECT pg_temp.refused($$SELECT imbus_notify('', 'x')$$);
SELECT pg_temp.refused(format('SELECT imbus_notify(%L, %L)', repeat('c', 64), 'x'));
SELECT pg_temp.refused(format('SELECT imbus_notify(%L, %L)', 'imbus_regress', repeat('x', 7999))) AS longest;
SELECT pg_temp.refused(format('SELECT imbus_notify(%L, %L)', 'imbus_regress', repeat('x', 8000))) AS no_array;
SET imbus.notify_payload_max_length = 40;
SELECT pg_temp.refused($$SELECT imbus_notify('imbus_regress', '["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]')$$);
SELECT pg_temp.refused($$SELECT imbus_notify('imbus_regress',
    '["a","aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]')$$);
SELECT pg_temp.refused($$SELECT imbus_notify('imbus_regress', '{"a": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}')$$);
SELECT split_part(pg_temp.refused('SET imbus.notify_payload_max_length = 8001'), ':', 1) AS out_of_range;
