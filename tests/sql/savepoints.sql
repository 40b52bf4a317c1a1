-- Publishing follows savepoints, works in functions, DO blocks, triggers and prepared statements.
BEGIN;
SELECT bus_sendone('c', 'kept', '1') > 0 AS sent;
SAVEPOINT a;
SELECT bus_sendone('c', 'undone', '2') > 0 AS sent;
ROLLBACK TO a;
DO $$ BEGIN
    PERFORM bus_sendone('c', 'do', '3');
    BEGIN
        PERFORM bus_sendone('c', 'undone', '4');
        RAISE division_by_zero;
    EXCEPTION WHEN division_by_zero THEN NULL;
    END;
END $$;
PREPARE send(int) AS SELECT bus_sendone('c', 'prepared', to_jsonb($1)) > 0 AS sent;
EXECUTE send(5);
EXECUTE send(6);
CREATE TEMP TABLE source (i int);
CREATE FUNCTION pg_temp.publish() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM bus_sendone('c', 'trigger', to_jsonb(NEW.i)); RETURN NEW; END $$;
CREATE TRIGGER publish AFTER INSERT ON source FOR EACH ROW EXECUTE FUNCTION pg_temp.publish();
INSERT INTO source VALUES (7), (8);
SELECT message FROM bus_poll('["c"]');
ROLLBACK;
SELECT count(*) FROM imbus_bus;
