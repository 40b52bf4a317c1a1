-- Whatever a caller puts in the way, imbus finds its own objects.
CREATE SCHEMA imbus_regress_trap;
CREATE FUNCTION imbus_regress_trap.trap(text, text) RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
CREATE OPERATOR imbus_regress_trap.= (LEFTARG = text, RIGHTARG = text, PROCEDURE = imbus_regress_trap.trap);
CREATE TABLE imbus_regress_trap.imbus_bus (LIKE imbus_bus);
CREATE TABLE imbus_regress_trap.bus_bus (LIKE imbus_bus);
BEGIN;
SET LOCAL search_path = imbus_regress_trap, pg_catalog, public;
SELECT public.bus_sendone('broadcast', 't', '1') > 0 AS sent;
SELECT count(*) FROM public.imbus_bus;
SELECT count(*) FROM imbus_regress_trap.imbus_bus;
SHOW search_path;
ROLLBACK;
SET client_min_messages = warning;
DROP SCHEMA imbus_regress_trap CASCADE;
