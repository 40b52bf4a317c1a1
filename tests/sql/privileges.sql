-- PUBLIC may use imbus_version() and imbus_notify(), nothing else; the installing role and the owner of the database
-- use the functions, and never change the tables by hand.
CREATE ROLE imbus_regress_other;
SET ROLE imbus_regress_other;
SELECT imbus_version() IS NOT NULL AS version;
SELECT imbus_notify('imbus_regress', 'x');
SELECT p.oid::regprocedure AS allowed FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e'
  JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'imbus'
 WHERE has_function_privilege(p.oid, 'EXECUTE') ORDER BY 1;
SELECT c.oid::regclass AS readable FROM pg_class c JOIN pg_depend d ON d.objid = c.oid AND d.deptype = 'e'
  JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'imbus'
 WHERE c.relkind IN ('r', 'v', 'S') AND has_table_privilege(c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE');
SELECT bus_sendone('broadcast', 't', '1');
SELECT bus_token('["*"]');
SELECT ir_async_call('now');
RESET ROLE;

-- Publishing needs EXECUTE alone, not rights on the table.
BEGIN;
GRANT EXECUTE ON FUNCTION bus_sendone(text, text, jsonb) TO imbus_regress_other;
SET LOCAL ROLE imbus_regress_other;
SELECT bus_sendone('broadcast', 't', '1') > 0 AS sent;
SELECT * FROM imbus_bus;
ROLLBACK;

DROP ROLE imbus_regress_other;
