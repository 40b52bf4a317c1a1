-- Targets: plain strings as text, any channel as jsonb; the database's name is put in front unless it is there.
BEGIN;
SELECT bus_sendone('broadcast', 't', '1') > 0 AS text_target;
SELECT bus_sendone('["res.partner", 42]'::text, 't', '1') > 0 AS text_is_never_parsed;
SELECT bus_sendone('"broadcast"'::jsonb, 't', '1') > 0 AS jsonb_string;
SELECT bus_sendone('["res.partner", 42]'::jsonb, 't', '1') > 0 AS record;
SELECT bus_sendone('["discuss.channel", 7, "members"]'::jsonb, 't', '1') > 0 AS subchannel;
SELECT bus_sendone(jsonb_build_array(current_database(), 'res.partner', 42), 't', '1') > 0 AS with_database;
SELECT bus_sendone('["other_db", "broadcast"]'::jsonb, 't', '1') > 0 AS no_other_database;
SELECT replace(channel, current_database(), 'db') AS channel FROM imbus_bus ORDER BY id;
ROLLBACK;

CREATE FUNCTION pg_temp.refused(command text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE state text; message text; detail text; hint text;
BEGIN
    EXECUTE command;
    RETURN 'accepted';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL,
                            hint = PG_EXCEPTION_HINT;
    RETURN format('%s: %s | %s | %s', state, message, detail, hint);
END $$;
SELECT pg_temp.refused($$SELECT bus_sendone('', 't', '1')$$);
SELECT pg_temp.refused($$SELECT bus_sendone('[]'::jsonb, 't', '1')$$);
SELECT pg_temp.refused($$SELECT bus_sendone('""'::jsonb, 't', '1')$$);
SELECT pg_temp.refused($$SELECT bus_sendone('42'::jsonb, 't', '1')$$);
SELECT pg_temp.refused($$SELECT bus_sendone('null'::jsonb, 't', '1')$$);
SELECT pg_temp.refused($$SELECT bus_sendone('{"a": 1}'::jsonb, 't', '1')$$);
SELECT pg_temp.refused($$SELECT bus_sendone('[42, "x"]'::jsonb, 't', '1')$$);
SELECT pg_temp.refused($$SELECT bus_sendone('["res.partner", null]'::jsonb, 't', '1')$$);
SELECT pg_temp.refused($$SELECT bus_sendone('["res.partner", [1]]'::jsonb, 't', '1')$$);
SELECT pg_temp.refused($$SELECT bus_sendone('["res.partner", {}]'::jsonb, 't', '1')$$);
SELECT replace(pg_temp.refused(format('SELECT bus_sendone(%L::jsonb, $t$t$t$, $m$1$m$)',
    jsonb_build_array(current_database()))), current_database(), 'db');
SELECT length(pg_temp.refused(format('SELECT bus_sendone(%L::jsonb, $t$t$t$, $m$1$m$)',
    jsonb_build_array('x', jsonb_build_array(repeat('y', 5000)))))) < 500 AS long_values_are_cut;
