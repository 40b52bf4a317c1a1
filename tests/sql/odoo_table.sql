-- Odoo's table is the bus table where it exists, with Odoo's columns, in the right hands.
BEGIN;
CREATE TABLE public.bus_bus (id serial PRIMARY KEY, create_uid int, write_uid int, channel varchar, message varchar,
                             create_date timestamp, write_date timestamp);
-- Its ids go on above those given out before.
SELECT last_value AS given_out FROM imbus_bus_id_seq \gset
SELECT bus_sendone('broadcast', 't', '{"to": "Odoo"}') AS id \gset
SELECT :id > :given_out AS goes_on;
SELECT id = :id AS same, replace(channel, current_database(), 'db') AS channel, message, create_uid,
       create_date = now() AT TIME ZONE 'UTC' AS stamped FROM public.bus_bus;
SELECT message FROM bus_poll('["broadcast"]');
SELECT count(*) FROM imbus_bus;
DROP TABLE public.bus_bus;
SELECT bus_sendone('broadcast', 't', '{"to": "imbus"}') > 0 AS sent;
SELECT message FROM imbus_bus;
-- A view, or a table of another shape, is not Odoo's.
CREATE VIEW public.bus_bus AS SELECT * FROM imbus_bus;
SELECT bus_sendone('broadcast', 't', '2') > 0 AS sent;
DROP VIEW public.bus_bus;
CREATE TABLE public.bus_bus (id int, channel int);
SELECT bus_sendone('broadcast', 't', '3') > 0 AS sent;
SELECT count(*) FROM imbus_bus;
ROLLBACK;

-- Nor is the table of a role that owns neither the database nor the extension.
BEGIN;
CREATE ROLE imbus_regress_stranger;
CREATE TABLE public.bus_bus (id serial PRIMARY KEY, create_uid int, write_uid int, channel varchar, message varchar,
                             create_date timestamp, write_date timestamp);
ALTER TABLE public.bus_bus OWNER TO imbus_regress_stranger;
SELECT bus_sendone('broadcast', 't', '1') > 0 AS sent;
SELECT (SELECT count(*) FROM public.bus_bus) AS odoo, (SELECT count(*) FROM imbus_bus) AS imbus;
ROLLBACK;
