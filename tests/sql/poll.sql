-- bus_poll is Odoo's _poll: last = 0 gives the last 50 s, else what has a greater id, ascending.
BEGIN;
INSERT INTO imbus_bus (id, channel, message, create_date) VALUES
    (101, json_build_array(current_database(), 'broadcast')::text, '{"type":"old","payload":1}',
     (now() AT TIME ZONE 'UTC') - interval '51 seconds'),
    (102, json_build_array(current_database(), 'broadcast')::text, '{"type":"new","payload":2}',
     (now() AT TIME ZONE 'UTC') - interval '40 seconds'),
    (103, json_build_array(current_database(), 'res.partner', 42)::text, '{"type":"partner","payload":3}', DEFAULT),
    (104, json_build_array('another', 'broadcast')::text, '{"type":"foreign","payload":4}', DEFAULT);
SELECT id, message FROM bus_poll('["broadcast"]');
SELECT id, message FROM bus_poll('["broadcast"]', 100);
SELECT id, message FROM bus_poll('["broadcast"]', 101);
SELECT id, message FROM bus_poll('["broadcast", ["res.partner", 42]]', 100, '{102}');
SELECT id FROM bus_poll('[["res.partner", 42.0]]', 100);
SELECT id FROM bus_poll('[["res.partner", "42"]]', 100);
SELECT id FROM bus_poll(jsonb_build_array(jsonb_build_array(current_database(), 'res.partner', 42)), 100);
SELECT count(*) FROM bus_poll('[]', 100);
SELECT count(*) FROM bus_poll('["broadcast"]', -1);
ROLLBACK;

-- Channels are compared as values: raw UTF-8 as later Odoo versions write it, escapes, white space.
BEGIN;
INSERT INTO imbus_bus (id, channel, message) VALUES
    (201, '["' || current_database() || '", "canal é"]', '{"type": "raw", "payload": "é"}'),
    (202, '["' || current_database() || '","canal \u00e9"]', '{"type":"escaped","payload":"\u00e9"}');
SELECT id, replace(channel::text, current_database(), 'db') AS channel, message FROM bus_poll('["canal é"]', 200);
ROLLBACK;

-- Rows that are no notifications are left out; what jsonb cannot hold is U+FFFD.
BEGIN;
INSERT INTO imbus_bus (id, channel, message) SELECT * FROM (VALUES
    (301, NULL, '{"type":"t","payload":1}'),
    (302, json_build_array(current_database(), 'c')::text, NULL),
    (303, 'not json', '{"type":"t","payload":1}'),
    (304, '[]', '{"type":"t","payload":1}'),
    (305, json_build_array(current_database(), 'c')::text, '{"type":'),
    (306, json_build_array(current_database(), 'c')::text, '{"type":"t","payload":"a\u0000b\ud83dc"}'),
    (307, json_build_array(current_database(), 'c')::text, '{"type":"t","payload":"sound"}')) v;
SELECT id, message FROM bus_poll('["c"]', 300);
ROLLBACK;

SELECT bus_poll('"c"');
SELECT bus_poll('["c", 5]');
