-- bus_last_id and bus_has_missed_notifications.
BEGIN;
DELETE FROM imbus_bus;
SELECT bus_last_id();
INSERT INTO imbus_bus (id, channel, message) VALUES (11, '["x","y"]', '{}'), (15, '["x","y"]', '{}');
SELECT bus_last_id(), bus_has_missed_notifications(11) AS at_11, bus_has_missed_notifications(12) AS at_12,
       bus_has_missed_notifications(15) AS at_15;
ROLLBACK;
