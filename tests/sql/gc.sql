-- bus_gc deletes by age; Odoo's own parameter wins over the setting.
BEGIN;
INSERT INTO imbus_bus (id, channel, message, create_date)
SELECT i, '["x","y"]', '{}', (now() AT TIME ZONE 'UTC') - make_interval(hours => i) FROM generate_series(1, 48) i;
SELECT bus_gc('47.5 hours');
SHOW imbus.gc_retention;
SELECT bus_gc(NULL);
SELECT bus_gc();
SELECT count(*), max(id) FROM imbus_bus;
CREATE TABLE public.ir_config_parameter (key varchar, value varchar);
INSERT INTO public.ir_config_parameter VALUES ('bus.gc_retention_seconds', '36000');
SELECT bus_gc();
UPDATE public.ir_config_parameter SET value = 'nonsense';
SELECT bus_gc();
SELECT count(*), max(id) FROM imbus_bus;
ROLLBACK;
SELECT bus_gc('-1 second');
