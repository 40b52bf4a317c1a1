-- Without shared_preload_libraries publishing and polling work; what needs the workers says so.
SELECT bus_sendone('broadcast', 't', '1') > 0 AS sent;
SELECT message FROM bus_poll('["broadcast"]');
SELECT bus_token('["broadcast"]');
SELECT ir_async_call('now');
SELECT * FROM imbus_stat_gateway;
SELECT * FROM imbus_stat_bus;
SELECT * FROM imbus_stat_connections;
SHOW imbus.gc_retention;
SHOW imbus.port;
DELETE FROM imbus_bus;
