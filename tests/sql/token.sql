-- bus_token makes a JWT of three parts whose claims name the channels of this database.
CREATE FUNCTION pg_temp.claims(token text) RETURNS jsonb LANGUAGE sql AS $$
    SELECT convert_from(decode(translate(body, '-_', '+/') || repeat('=', (4 - length(body) % 4) % 4), 'base64'),
                        'UTF8')::jsonb FROM split_part(token, '.', 2) body $$;
SELECT claims ->> 'db' = current_database() AS database,
       (claims ->> 'oid')::oid = (SELECT oid FROM pg_database WHERE datname = current_database()) AS oid,
       claims -> 'channels' AS channels, claims ->> 'sub' AS subject,
       (claims ->> 'exp')::bigint - (claims ->> 'iat')::bigint AS seconds, claims -> 'admin' AS admin
  FROM pg_temp.claims(bus_token('["broadcast", ["res.partner", 42]]', '2 hours', 'ann')) claims;
SELECT pg_temp.claims(bus_token('"*"')) -> 'channels' AS everything;
SELECT pg_temp.claims(bus_token('["*"]', admin => true)) -> 'admin' AS admin;
SELECT bus_token('["broadcast"]', '0 seconds');
SELECT bus_token('["broadcast"]', '-1 hour');
SELECT bus_token('["broadcast"]', NULL);
SELECT bus_token(NULL);
SELECT bus_token('{}');
SELECT bus_token('[[]]');

CREATE ROLE imbus_regress_owner;
GRANT EXECUTE ON FUNCTION bus_token(jsonb, interval, text, boolean) TO imbus_regress_owner;
SET ROLE imbus_regress_owner;
SELECT bus_token('["*"]', admin => true);
SELECT bus_token('["*"]') IS NOT NULL AS without_admin;
RESET ROLE;
DROP OWNED BY imbus_regress_owner;
DROP ROLE imbus_regress_owner;
