-- The owner of a database creates and uses the extension without being superuser; another role gets nothing there.
CREATE ROLE imbus_regress_owner;
CREATE ROLE imbus_regress_other;
CREATE DATABASE imbus_regress_owned OWNER imbus_regress_owner;
SELECT current_database() AS here \gset
\c imbus_regress_owned
SET SESSION AUTHORIZATION imbus_regress_owner;
CREATE EXTENSION imbus;
SELECT bus_sendone('broadcast', 't', '1') > 0 AS sent;
SELECT count(*) FROM bus_sendmany('[["broadcast", "t", 2], [["res.partner", 1], "t", 3]]');
SELECT message FROM bus_poll('["broadcast", ["res.partner", 1]]');
SELECT bus_last_id() > 0 AS last, bus_has_missed_notifications(-1) AS missed, bus_gc() AS pruned;
SELECT count(*) FROM imbus_bus;
-- Its own tables change through the functions only.
UPDATE imbus_bus SET message = '{}';
DELETE FROM imbus_bus;
TRUNCATE ir_async;
CREATE TRIGGER own BEFORE INSERT ON imbus_bus FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger();
SELECT p.oid::regprocedure AS refused FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e'
  JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'imbus'
 WHERE NOT has_function_privilege(p.oid, 'EXECUTE') ORDER BY 1;
SET SESSION AUTHORIZATION imbus_regress_other;
SELECT bus_sendone('broadcast', 't', '1');
SELECT * FROM bus_poll('["broadcast"]');
SELECT * FROM ir_async;
SELECT * FROM imbus_stat_bus;
SELECT imbus_version() IS NOT NULL AS version;
-- Whatever code an index of the owner's brings along runs as the owner, whoever publishes.
SET SESSION AUTHORIZATION imbus_regress_owner;
CREATE TABLE public.bus_bus (id serial PRIMARY KEY, create_uid int, write_uid int, channel varchar, message varchar,
                             create_date timestamp, write_date timestamp);
CREATE DOMAIN regress_seen AS varchar;
CREATE INDEX ON public.bus_bus ((message::regress_seen));
CREATE FUNCTION regress_who(text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
    RAISE NOTICE 'run as %', current_user; RETURN true; END $$;
RESET SESSION AUTHORIZATION;
SELECT bus_sendone('broadcast', 't', '1') > 0 AS sent;
SET SESSION AUTHORIZATION imbus_regress_owner;
ALTER DOMAIN regress_seen ADD CHECK (regress_who(VALUE));
\c imbus_regress_owned
SELECT bus_sendone('broadcast', 't', '2') > 0 AS sent;
DROP TABLE public.bus_bus;
SET SESSION AUTHORIZATION imbus_regress_owner;
DROP EXTENSION imbus;
SELECT count(*) AS left_behind FROM pg_class WHERE relname LIKE 'imbus%' OR relname LIKE 'ir_async%';
\c :here
DROP DATABASE imbus_regress_owned;
DROP ROLE imbus_regress_owner, imbus_regress_other;
