-- bus_sendmany publishes in order, or nothing.
BEGIN;
WITH sent AS (
    SELECT id, row_number() OVER () AS place FROM bus_sendmany(
        '[["broadcast", "a", 1], [["res.partner", 3], "b", {"x": [2]}], ["broadcast", "c", null]]') id
)
SELECT place, id - min(id) OVER () AS step FROM sent ORDER BY place;
SELECT replace(channel, current_database(), 'db') AS channel, message FROM imbus_bus ORDER BY id;
SELECT count(*) AS none FROM bus_sendmany('[]');
ROLLBACK;

SELECT bus_sendmany('{"a": 1}');
SELECT bus_sendmany('[["broadcast", "a", 1], ["broadcast", "a"]]');
SELECT bus_sendmany('[["broadcast", "a", 1], ["broadcast", 7, 1]]');
SELECT bus_sendmany('[["broadcast", "a", 1], ["broadcast", "", 1]]');
SELECT bus_sendmany('[["broadcast", "a", 1], [5, "a", 1]]');
SELECT count(*) FROM imbus_bus;
