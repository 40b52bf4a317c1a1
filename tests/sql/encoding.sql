-- The text in the bus table is what Python's json.dumps(v, separators=(',', ':')) writes.
BEGIN;
SET LOCAL client_min_messages = warning;
SELECT bus_sendone('broadcast', 'tÿpe', '{"text": "h\u00e9llo \u4e16\u754c"}') > 0 AS ascii;
SELECT bus_sendone('broadcast', 't', '"\ud83d\ude00 \uffff"') > 0 AS surrogate_pair;
SELECT bus_sendone('broadcast', 't', '"\u0001\b\f\n\r\t\u007f\"\\ / \u2028"') > 0 AS control;
SELECT bus_sendone('broadcast', 't', '[123456789012345678901234567890, -0.50, 1e3, 1E-7, true, null]') > 0 AS numbers;
SELECT bus_sendone('broadcast', 't', '{"bb": 1, "a": {"y": [ ], "x": { }}}') > 0 AS nested;
SELECT bus_sendone('"canal \u00e9"'::jsonb, 't', '1') > 0 AS channel;
SELECT replace(channel, current_database(), 'db') AS channel, message FROM imbus_bus ORDER BY id;
ROLLBACK;
