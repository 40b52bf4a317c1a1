-- What cannot be scheduled is refused with the reason; what can is kept by its name.
CREATE FUNCTION regress_add(a int, b int DEFAULT 1) RETURNS int LANGUAGE sql AS 'SELECT a + b';
SELECT ir_async_schedule(NULL, '* * * * *', 'regress_add');
SELECT ir_async_schedule('', '* * * * *', 'regress_add');
SELECT ir_async_schedule(repeat('x', 256), '* * * * *', 'regress_add');
SELECT ir_async_schedule('s', NULL, 'regress_add');
SELECT ir_async_schedule('s', 'every day', 'regress_add', '[1]');
SELECT ir_async_schedule('s', '* * * *', 'regress_add', '[1]');
SELECT ir_async_schedule('s', '0 25 * * *', 'regress_add', '[1]');
SELECT ir_async_schedule('s', '0 0 * FOO *', 'regress_add', '[1]');
SELECT ir_async_schedule('s', '@reboot', 'regress_add', '[1]');
SELECT ir_async_schedule('s', '0 0 30 2 *', 'regress_add', '[1]');
SELECT ir_async_schedule('s', '* * * * *', 'regress_add', '[1]', time_zone => 'Mars/Olympus');
SELECT ir_async_schedule('s', '* * * * *', 'regress_add', '[1]', time_zone => 'right/UTC');
SELECT ir_async_schedule('s', '* * * * *', 'regress_add');
SELECT ir_async_schedule('s', '* * * * *', 'no_such_function');
SELECT ir_async_schedule('s', '* * * * *', 'regress_add', '{"a": 1}');
SELECT ir_async_schedule('s', '* * * * *', 'regress_add', '[1]', notify => '42');
SELECT ir_async_schedule('s', '* * * * *', 'regress_add', '[1]', max_attempts => 0);
SELECT ir_async_schedule('s', '* * * * *', 'regress_add', '[1]', timeout => '0');
SELECT count(*) FROM imbus_schedule;

SELECT ir_async_schedule('s', '@yearly', 'regress_add', '[1]', '{"b": 2}', 'europe/berlin', 'A sum', '["news", 1]',
                         'mail', 5, 3, '1 min', '1 hour', user_id => 2, context => '{"lang": "de"}', overlap => true) > 0 AS kept;
SELECT name, cron_expression, time_zone, overlap, next_run > now() AS later, last_run, last_job, runs, skipped, problem,
       role::regrole = current_user::regrole AS mine, search_path, description, target, args, kwargs,
       notify::jsonb - 0 AS notify, queue, priority, max_attempts, retry_delay, timeout, user_id, context
  FROM imbus_schedule \gx
SELECT to_char(next_run AT TIME ZONE time_zone, 'MM-DD HH24:MI:SS') AS local FROM imbus_schedule;
SELECT ir_async_schedule('s', '30 30 2 1 * *', 'regress_add', '[1]') = (SELECT id FROM imbus_schedule) AS same;
SELECT to_char(next_run AT TIME ZONE 'UTC', 'DD HH24:MI:SS') AS next, time_zone, overlap, kwargs, description
  FROM imbus_schedule;

CREATE ROLE imbus_regress_nologin;
CREATE ROLE imbus_regress_login LOGIN;
SET ROLE imbus_regress_login;
SELECT ir_async_schedule('s', '@daily', 'now');
RESET ROLE;
GRANT EXECUTE ON FUNCTION ir_async_schedule, ir_async_unschedule TO imbus_regress_nologin, imbus_regress_login;
SET ROLE imbus_regress_nologin;
SELECT ir_async_schedule('n', '@daily', 'now');
SET ROLE imbus_regress_login;
SELECT ir_async_schedule('s', '@daily', 'now');
SELECT ir_async_unschedule('s');
SELECT ir_async_schedule('mine', '@daily', 'now') > 0 AS kept;
RESET ROLE;

BEGIN;
SELECT ir_async_unschedule('s');
ROLLBACK;
SELECT ir_async_unschedule('s');
SELECT ir_async_unschedule('s');
SELECT ir_async_unschedule(NULL);
SELECT ir_async_unschedule('mine');

-- By hand a schedule is its inserter's, or nobody's.
SET ROLE imbus_regress_login;
INSERT INTO imbus_schedule (name, cron_expression, target) VALUES ('hand', '@daily', 'now()');
RESET ROLE;
INSERT INTO imbus_schedule (name, cron_expression, target, role, next_run) VALUES ('hand', '@daily', 'now()', 10, now());
SELECT role, next_run, problem FROM imbus_schedule;
SELECT ir_async_unschedule('hand');
DROP OWNED BY imbus_regress_login, imbus_regress_nologin;
DROP ROLE imbus_regress_login, imbus_regress_nologin;
DROP FUNCTION regress_add;
