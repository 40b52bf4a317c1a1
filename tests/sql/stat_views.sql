-- The live views; the worker of this database may need a moment to come up.
DO $$ BEGIN
    FOR i IN 1..300 LOOP
        EXIT WHEN EXISTS (SELECT FROM imbus_stat_bus WHERE datname = current_database() AND pid IS NOT NULL)
              AND EXISTS (SELECT FROM imbus_stat_gateway WHERE pid IS NOT NULL);
        PERFORM pg_sleep(0.1);
    END LOOP;
END $$;
SELECT pid IS NOT NULL AS running, started_at <= now() AS started, databases > 0 AS serves, slow_consumers >= 0 AS counts
  FROM imbus_stat_gateway;
SELECT datname = current_database() AS here, pid IS NOT NULL AS running, gaps >= 0 AS gaps
  FROM imbus_stat_bus WHERE datid = (SELECT oid FROM pg_database WHERE datname = current_database());
SELECT count(*) AS connections FROM imbus_stat_connections WHERE datname = current_database();
SELECT a.backend_type = 'imbus database ' || current_database() AS named FROM pg_stat_activity a
  JOIN imbus_stat_bus b USING (pid) WHERE b.datname = current_database();
SELECT count(*) AS gateways FROM pg_stat_activity WHERE backend_type = 'imbus gateway';
