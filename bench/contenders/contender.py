"""The contenders: each has a database of its own, is filled while nothing works, then works until all is done."""
import json
import os
import subprocess
import threading
import time
from queue import Empty, Queue

HERE = os.path.dirname(os.path.abspath(__file__))
TEXT = "x" * 100
CHUNK = 1000
PATIENCE = 900  # seconds without an end are a failure


class Contender:
    """What all have in common. `tasks`: the jobs it can do, `schema`: where its tables are."""
    tasks, schema = ("noop", "note"), "public"

    def __init__(self, server, key, label):
        self.server, self.key, self.label = server, key, label
        self.database = "bench_" + key.replace("-", "_").replace("@", "_")

    def open(self):
        with self.server.connect("postgres") as link:
            link.execute(f'CREATE DATABASE "{self.database}"')
        self.link = self.server.connect(self.database)
        self.create()

    def rows(self, text, *args):
        return self.link.execute(text, args or None).fetchall()

    def one(self, text, *args):
        return self.rows(text, *args)[0][0]

    def tidy(self):
        """The same state of tables and disk for everybody before the clock runs."""
        self.link.execute("VACUUM ANALYZE")
        self.link.execute("CHECKPOINT")

    def drain(self, jobs, task="noop"):
        """Works until that many are done: seconds from the word to start to the end of the last."""
        began = time.time()
        self.start(jobs, task)
        self.wait(jobs, task)
        return time.time() - began

    def until(self, text, *args):
        """Waits for a query to say true; it is a cheap one."""
        patience = time.time() + PATIENCE
        while not self.one(text, *args):
            if time.time() > patience:
                raise RuntimeError(f"{self.label} does not come to an end: {self.outcome()}")
            time.sleep(0.005)

    def check(self, jobs, task):
        """Everybody has really done all jobs."""
        failed = jobs // 100 if task == "fail" else 0
        wanted, got = {"done": jobs - failed, "failed": failed, "left": 0}, self.outcome()
        if got != wanted:
            raise RuntimeError(f"{self.label} did not do all jobs: {got}, not {wanted}")

    def sizes(self):
        """(dead rows, bytes of tables, bytes of indexes) of what the queue consists of."""
        self.link.execute("SELECT pg_stat_clear_snapshot()")
        return self.rows("""SELECT sum(n_dead_tup)::bigint, sum(pg_table_size(relid))::bigint, sum(pg_indexes_size(relid))::bigint
                              FROM pg_stat_user_tables WHERE schemaname = %s AND relname <> 'started'""", self.schema)[0]

    def close(self):
        self.link.close()


class Imbus(Contender):
    tasks = ("noop", "plpgsql", "result", "fail", "note")

    def __init__(self, server, key, label, workers):
        super().__init__(server, key, label)
        self.workers = workers

    def create(self):
        self.link.execute("CREATE EXTENSION imbus")
        self.link.execute("""
            CREATE FUNCTION noop() RETURNS void LANGUAGE sql AS '';
            CREATE FUNCTION noop(n int, text text) RETURNS void LANGUAGE sql AS '';
            CREATE FUNCTION plpgsql() RETURNS void LANGUAGE plpgsql AS 'BEGIN END';
            CREATE FUNCTION result() RETURNS int LANGUAGE sql AS 'SELECT 42';
            CREATE FUNCTION fail(n int) RETURNS void LANGUAGE plpgsql AS $$
                BEGIN IF n % 100 = 0 THEN RAISE 'as every hundredth'; END IF; END $$;
            CREATE UNLOGGED TABLE started (n bigint, at timestamptz);
            CREATE FUNCTION note(n bigint) RETURNS void LANGUAGE sql AS 'INSERT INTO started VALUES (n, clock_timestamp())'""")
        self.until("SELECT count(pid) > 0 FROM imbus_stat_bus WHERE datname = current_database()")

    def rest(self):
        """No runner: none may start, and those that wait for work are ended."""
        self.server.setting("imbus.job_workers", 0)
        time.sleep(0.3)
        patience = time.time() + 60
        runners = "FROM pg_stat_activity WHERE backend_type LIKE 'imbus job%'"
        while self.one(f"SELECT count(*) {runners}"):
            if time.time() > patience:
                raise RuntimeError("imbus's runners do not end")
            self.one(f"SELECT count(pg_terminate_backend(pid)) {runners}")
            time.sleep(0.1)

    def reset(self):
        self.rest()
        self.link.execute("TRUNCATE ir_async, started")

    def fill(self, jobs, task="noop", text=None):
        for first in range(0, jobs, CHUNK):
            numbers = range(first + 1, min(first + CHUNK, jobs) + 1)
            args = (lambda n: [n, text]) if text else (lambda n: [n] if task in ("fail", "note") else [])
            least = self.one("SELECT min(id) FROM ir_async_call_many(%s) id",
                             json.dumps([{"target": task, "args": args(n)} for n in numbers]))
            self.last = least if first == 0 else self.last

    def start(self, jobs, task):
        self.server.setting("imbus.job_workers", self.workers)

    def wait(self, jobs, task):
        # One more job wakes the dispatcher: it need not wait for its next look.
        time.sleep(0.01)
        self.kick = self.one("SELECT ir_async_call('noop', priority => 0)")
        self.until("SELECT finished_at IS NOT NULL FROM ir_async WHERE id = %s", self.last + jobs - 1)
        if jobs >= self.one("SELECT last_value - %s FROM ir_async_id_seq", self.last):
            # Along the indexes: the look itself must not take long in a table that grows.
            self.until("SELECT NOT EXISTS (SELECT FROM ir_async WHERE state = 'created' AND ready)"
                       " AND NOT EXISTS (SELECT FROM ir_async WHERE state = 'processing')")
            self.link.execute("SET session_replication_role = replica")
            self.link.execute("DELETE FROM ir_async WHERE id = %s", [self.kick])
            self.link.execute("RESET session_replication_role")

    def stop(self, task):
        self.rest()

    def outcome(self):
        states = dict(self.rows("SELECT state, count(*) FROM ir_async GROUP BY 1"))
        done = states.pop("done", 0) + states.pop("succeeded", 0)
        return {"done": done, "failed": states.pop("failed", 0), "left": sum(states.values())}

    def enqueue(self, task):
        if task == "note":
            return "SELECT ir_async_call('note', jsonb_build_array(:n::bigint));"
        return f"SELECT ir_async_call('noop', jsonb_build_array(:n::int, '{TEXT}'));"

    def queued(self):
        return self.one("SELECT count(*) FROM ir_async")

    def began(self):
        return self.rows("SELECT n, extract(epoch FROM at)::float8 FROM started")

    def tail(self):
        """After a paced run: until nothing is left."""
        self.until("SELECT NOT EXISTS (SELECT FROM ir_async WHERE state IN ('created', 'processing'))")


class Plain(Contender):
    """FOR UPDATE SKIP LOCKED in a loop, by pgbench: the least a queue can do, and nothing besides."""

    def __init__(self, server, key, label, clients):
        super().__init__(server, key, label)
        self.clients, self.bench = clients, None

    def create(self):
        self.link.execute("CREATE TABLE jobs (id bigserial PRIMARY KEY, state text NOT NULL DEFAULT 'created', task text, payload jsonb)")
        self.link.execute("CREATE INDEX jobs_created ON jobs (id) WHERE state = 'created'")
        self.link.execute("CREATE UNLOGGED TABLE started (n bigint, at timestamptz)")

    def reset(self):
        self.link.execute("TRUNCATE jobs, started")

    def fill(self, jobs, task="noop", text=None):
        for first in range(0, jobs, CHUNK):
            self.link.execute("INSERT INTO jobs (task, payload) SELECT %s, jsonb_build_object('n', n, 'text', %s::text)"
                              " FROM generate_series(%s::int, %s::int) n", [task, text, first + 1, min(first + CHUNK, jobs)])

    claim = """UPDATE jobs SET state = 'done' WHERE id = (SELECT id FROM jobs WHERE state = 'created'
               ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 1)"""

    def start(self, jobs, task):
        if not jobs:
            # Looks each millisecond while there is nothing.
            script = f"""WITH j AS ({self.claim} RETURNING payload), s AS (
                INSERT INTO started SELECT (payload->>'n')::bigint, clock_timestamp() FROM j RETURNING 1)
                SELECT count(*) AS found FROM s \\gset\n\\if :found = 0\n\\sleep 1 ms\n\\endif\n"""
            self.bench = self.server.pgbench(self.database, script, self.clients, "-T", 86400)
            return
        self.last = self.one("SELECT min(id) FROM jobs WHERE state = 'created'") + jobs - 1
        self.bench = self.server.pgbench(self.database, self.claim + ";", self.clients, "-t", -(-jobs // self.clients))

    def wait(self, jobs, task):
        self.until("SELECT state = 'done' FROM jobs WHERE id = %s", self.last)
        self.until("SELECT NOT EXISTS (SELECT FROM jobs WHERE state = 'created' AND id <= %s)", self.last)

    def stop(self, task):
        if self.bench:
            self.bench.stop()
        self.bench = None

    def outcome(self):
        states = dict(self.rows("SELECT state, count(*) FROM jobs GROUP BY 1"))
        return {"done": states.pop("done", 0), "failed": 0, "left": sum(states.values())}

    def enqueue(self, task):
        text = "" if task == "note" else TEXT
        return f"INSERT INTO jobs (task, payload) VALUES ('{task}', jsonb_build_object('n', :n::bigint, 'text', '{text}'));"

    def queued(self):
        return self.one("SELECT count(*) FROM jobs")

    def began(self):
        return self.rows("SELECT n, extract(epoch FROM at)::float8 FROM started")

    def tail(self):
        self.until("SELECT NOT EXISTS (SELECT FROM jobs WHERE state = 'created')")


class Peer(Contender):
    """A queue whose client is a program of its own, spoken to in lines of JSON."""
    tasks = ("noop", "fail", "note")
    tables = left = ""

    def __init__(self, server, key, label, settings):
        super().__init__(server, key, label)
        self.settings, self.lines = settings, Queue()

    def create(self):
        command = [*self.program, self.server.address(self.database), json.dumps(self.settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        threading.Thread(target=self.listen, daemon=True).start()
        self.ask("create")
        self.ask("ready")

    def listen(self):
        for line in self.process.stdout:
            self.lines.put(json.loads(line))
        self.lines.put(None)

    def hear(self, kind):
        while True:
            try:
                message = self.lines.get(timeout=PATIENCE)
            except Empty:
                raise RuntimeError(f"{self.label} does not come to an end: {self.outcome()}") from None
            if message is None or "error" in message:
                raise RuntimeError(f"{self.label}: {(message or {}).get('error', 'has ended')}")
            if kind in message:
                return message[kind]

    def ask(self, do, **what):
        self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        return self.hear("answer") if do != "quit" else None

    def reset(self):
        self.link.execute(f"TRUNCATE {self.tables} CASCADE")
        self.filled = self.waiting = 0

    def fill(self, jobs, task="noop", text=None):
        self.filled += jobs
        self.waiting += jobs
        self.ask("fill", jobs=jobs, chunk=CHUNK, task=task, text=text or "")

    def tidy(self):
        super().tidy()
        self.ask("ready")

    def drain(self, jobs, task="noop"):
        self.ask("expect", jobs=jobs)
        began = time.time()
        # The word that all are through may come before the answer to start.
        self.process.stdin.write(json.dumps({"do": "start", "task": task}) + "\n")
        self.hear("event")
        if jobs == self.waiting:
            self.until(f"SELECT NOT EXISTS ({self.left})")
        self.waiting -= jobs
        return time.time() - began

    def start(self, jobs, task):
        self.ask("expect", jobs=-1)
        self.ask("start", task=task)

    def stop(self, task):
        self.ask("stop", task=task)

    def began(self):
        return self.ask("began")

    def tail(self):
        self.until(f"SELECT NOT EXISTS ({self.left})")

    def close(self):
        self.ask("quit")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.terminate()
        super().close()


class Graphile(Peer):
    schema, tables = "graphile_worker", "graphile_worker._private_jobs"
    left = "SELECT FROM graphile_worker._private_jobs WHERE attempts < max_attempts OR locked_at IS NOT NULL"

    def outcome(self):
        """What is done is deleted: all that were filled in and are there no more."""
        left, failed = self.rows("""SELECT count(*) FILTER (WHERE attempts < max_attempts OR locked_at IS NOT NULL),
            count(*) FILTER (WHERE attempts >= max_attempts AND locked_at IS NULL) FROM graphile_worker._private_jobs""")[0]
        return {"done": self.filled - left - failed, "failed": failed, "left": left}

    def enqueue(self, task):
        text = "" if task == "note" else TEXT
        return f"SELECT graphile_worker.add_job('{task}', json_build_object('n', :n::bigint, 'text', '{text}'), max_attempts => 1);"

    def queued(self):
        return self.one("SELECT count(*) FROM graphile_worker._private_jobs")


class PgBoss(Peer):
    schema, tables = "pgboss", "pgboss.job"
    left = "SELECT FROM pgboss.job WHERE state < 'completed'"

    def outcome(self):
        states = dict(self.rows("SELECT state::text, count(*) FROM pgboss.job GROUP BY 1"))
        return {"done": states.pop("completed", 0), "failed": states.pop("failed", 0), "left": sum(states.values())}

    def enqueue(self, task):
        """As send() does in a queue with notify."""
        text = "" if task == "note" else TEXT
        channel = "'pgboss_' || left(encode(sha224('pgboss'::bytea), 'hex'), 24)"
        return f"""WITH i AS (INSERT INTO pgboss.job (name, data, retry_limit)
            VALUES ('{task}', jsonb_build_object('n', :n::bigint, 'text', '{text}'), 0) RETURNING id, start_after),
            s AS (SELECT pg_notify({channel}, '{task}') FROM i WHERE start_after <= now())
            SELECT id FROM i WHERE (SELECT count(*) FROM s) >= 0;"""

    def queued(self):
        return self.one("SELECT count(*) FROM pgboss.job")


class Procrastinate(Peer):
    tables = "procrastinate_jobs, procrastinate_events"
    left = "SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"

    def outcome(self):
        states = dict(self.rows("SELECT status::text, count(*) FROM procrastinate_jobs GROUP BY 1"))
        return {"done": states.pop("succeeded", 0), "failed": states.pop("failed", 0), "left": sum(states.values())}

    def enqueue(self, task):
        text = "" if task == "note" else TEXT
        return f"""SELECT procrastinate_defer_jobs_v1(ARRAY[('default', '{task}', 0, NULL, NULL,
            jsonb_build_object('n', :n::bigint, 'text', '{text}'), NULL)::procrastinate_job_to_defer_v1]);"""

    def queued(self):
        return self.one("SELECT count(*) FROM procrastinate_jobs")


def contenders(server, node):
    """All, by the names that --contenders takes."""
    js = lambda name: [node, os.path.join(HERE, name)]
    Graphile.program, PgBoss.program = js("graphile.mjs"), js("pgboss.mjs")
    Procrastinate.program = [os.environ["PYTHON"], os.path.join(HERE, "procrastinate_peer.py")]
    return [
        Imbus(server, "imbus", "imbus, 4 workers (default)", 4),
        Imbus(server, "imbus@1", "imbus, 1 worker", 1),
        Imbus(server, "imbus@2", "imbus, 2 workers", 2),
        Graphile(server, "graphile", "graphile-worker, batched", {"concurrency": 24, "batched": True}),
        Graphile(server, "graphile-16", "graphile-worker, unbatched, 16 at once", {"concurrency": 16, "batched": False}),
        PgBoss(server, "pgboss", "pg-boss", {"batchSize": 500, "concurrency": 4}),
        Procrastinate(server, "procrastinate", "procrastinate, 16 at once", {"concurrency": 16}),
        Plain(server, "plain-1", "plain loop, 1 client", 1),
        Plain(server, "plain-16", "plain loop, 16 clients", 16),
    ]
