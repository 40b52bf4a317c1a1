"""What is measured. Each section takes the contenders in turn, the other way round in every second round."""
import time
from collections import defaultdict

from contender import TEXT, CHUNK, Imbus, Peer, Plain
from report import median, number, percentiles, ratio, spread, table


def turns(contenders, rounds):
    for turn in range(rounds):
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            yield turn, contender


def visit(contender, jobs, task="noop", fill=None):
    """One drain from a clean table: jobs per second."""
    contender.reset()
    contender.fill(fill or jobs, task)
    contender.tidy()
    try:
        seconds = contender.drain(jobs, task)
    finally:
        contender.stop(task)
    if not fill:
        contender.check(jobs, task)
    return jobs / seconds


class Drain:
    """Jobs per second of a full queue."""

    def run(self, run):
        visits = [(c, task) for c in run.contenders for task in c.tasks if task != "note" and (task == "noop" or "@" not in c.key)]
        rates = defaultdict(list)
        for _, (contender, task) in turns(visits, run.rounds):
            jobs = self.jobs(run, contender)
            rate = visit(contender, jobs, task)
            rates[contender, task].append(rate)
            run.keep("drain", contender, task=task, jobs=jobs, rate=rate)
        best = max((median(v) for (c, t), v in rates.items() if t == "noop" and not isinstance(c, Imbus)), default=None)
        names = {"noop": "no-op", "plpgsql": "no-op in plpgsql", "result": "with a result", "fail": "every 100th fails"}
        rows = []
        for (contender, task), values in rates.items():
            rate, width = spread(values)
            rows.append([contender.label, names[task], number(self.jobs(run, contender)), number(rate), f"{100 * width:.0f} %", ratio(rate, best)])
        table("Drain:", ["queue", "job", "jobs", "jobs/s", "spread of rounds", "of the fastest peer"], rows)

    @staticmethod
    def jobs(run, contender):
        """Of the slow ones as many as take some seconds; a multiple of 100 for those that fail, of 16 for the loops."""
        return max(1600, run.jobs // (20 if contender.key == "procrastinate" else 1) // 1600 * 1600)


class Enqueue:
    """Jobs per second that come in, with nobody at work."""

    def plain_insert(self, imbus):
        """The row that ir_async_call writes, into tables with one key, and with all indexes of the job table."""
        imbus.reset()
        imbus.link.execute(f"SELECT ir_async_call('noop', jsonb_build_array(1, '{TEXT}'))")
        imbus.link.execute("""CREATE TABLE IF NOT EXISTS one_key (LIKE ir_async INCLUDING DEFAULTS, PRIMARY KEY (id));
                              CREATE TABLE IF NOT EXISTS all_indexes (LIKE ir_async INCLUDING ALL)""")
        columns = [name for (name,) in imbus.rows("""SELECT attname FROM pg_attribute WHERE attrelid = 'ir_async'::regclass
            AND attnum > 0 AND NOT attisdropped AND attname NOT IN ('id', 'create_date', 'write_date', 'run_at') ORDER BY attnum""")]
        args = f"jsonb_build_array(1::int, '{TEXT}')"  # made by the statement, as those of the call are
        given = lambda name: "$$" + args + "$$" if name == "args" else f"quote_nullable({name}::text)"
        values = imbus.one(f"SELECT concat_ws(', ', {', '.join(map(given, columns))}) FROM ir_async")
        return f"INSERT INTO %s ({', '.join(columns)}) VALUES ({values}) RETURNING id;"

    def run(self, run):
        self.singly(run)
        self.in_bulk(run)

    def singly(self, run):
        """By pgbench, each job a transaction. Every entry: label, contender, script, how many rows there are."""
        entries = []
        for contender in run.contenders:
            if "@" not in contender.key and contender.key not in ("graphile-16", "plain-16"):
                entries.append((contender.label.split(",")[0], contender, contender.enqueue("noop").replace(":n::", "1::"), contender.queued))
        imbus = next((c for c in run.contenders if isinstance(c, Imbus)), None)
        if imbus:
            later = imbus.enqueue("noop").replace("));", "), run_at => now() + interval '1 hour');")
            entries.append(("imbus, due in an hour", imbus, later.replace(":n::", "1::"), imbus.queued))
            insert = self.plain_insert(imbus)
            for name, label in (("one_key", "INSERT, one key"), ("all_indexes", "INSERT, the job table's indexes")):
                entries.append((label, imbus, insert % name, lambda name=name: imbus.one(f"SELECT count(*) FROM {name}")))
        rates = defaultdict(list)
        for turn in range(run.rounds):
            for clients in run.clients:
                for label, contender, script, count in entries if turn % 2 == 0 else reversed(entries):
                    rate = self.measure(run, contender, script, count, clients)
                    rates[label, clients].append(rate)
                    run.keep("enqueue", contender, what=label, clients=clients, rate=rate)
        rows = []
        for label, *_ in entries:
            row = [label]
            for clients in run.clients:
                rate, base = median(rates[label, clients]), rates.get(("INSERT, one key", clients))
                row.append(f"{number(rate)} ({ratio(rate, median(base))})" if base else number(rate))
            rows.append(row)
        table("Enqueue, one job per transaction (of an INSERT into a table with one key):",
              ["queue"] + [f"{n} client{'s' * (n > 1)}, jobs/s" for n in run.clients], rows)

    def measure(self, run, contender, script, count, clients):
        contender.reset()
        if isinstance(contender, Imbus):
            contender.link.execute("TRUNCATE one_key, all_indexes")
        contender.tidy()
        bench = run.server.pgbench(contender.database, script, clients, "-T", run.seconds)
        bench.finish()
        if count() != bench.transactions():
            raise RuntimeError(f"{contender.label}: {count()} jobs of {bench.transactions()} transactions")
        return bench.tps()

    def in_bulk(self, run):
        rates, jobs = defaultdict(list), max(CHUNK, run.jobs // CHUNK * CHUNK)
        some = [c for c in run.contenders if "@" not in c.key and c.key not in ("graphile-16", "plain-16")]
        for _, contender in turns(some, run.rounds):
            contender.reset()
            contender.tidy()
            began = time.time()
            contender.fill(jobs, "noop", TEXT)
            rate = jobs / (time.time() - began)
            if contender.queued() != jobs:
                raise RuntimeError(f"{contender.label} did not take all jobs")
            rates[contender].append(rate)
            run.keep("bulk", contender, jobs=jobs, rate=rate)
        calls = {"imbus": "ir_async_call_many", "graphile": "addJobs", "pgboss": "insert", "procrastinate": "batch_defer_async", "plain-1": "INSERT … SELECT"}
        best = max((median(v) for c, v in rates.items() if isinstance(c, Peer)), default=None)
        table(f"Enqueue in bulk, {CHUNK:,} per call, one client, {jobs:,} jobs:", ["queue", "call", "jobs/s", "of the fastest peer"],
              [[c.label.split(",")[0], f"`{calls[c.key]}`", number(median(v)), ratio(median(v), best)] for c, v in rates.items()])


class Latency:
    """From the commit's return in the enqueuer to the job's start, by the machine's one clock."""

    def run(self, run):
        some = [c for c in run.contenders if "@" not in c.key]
        seen, asked = defaultdict(list), {}
        for turn, contender in turns(some, run.rounds):
            if turn == 0:
                asked[contender, "half"] = self.half(run, contender)
            for kind, rate, clients in (("50/s", 50, 1), ("half", asked[contender, "half"], 8)):
                late, achieved = self.paced(run, contender, rate, clients)
                seen[contender, kind].append((achieved, percentiles(late)))
                run.keep("latency", contender, kind=kind, asked=rate, achieved=achieved, late=percentiles(late), jobs=len(late))
        rows = []
        for (contender, kind), values in seen.items():
            figures = [number(1000 * median(column), 2) for column in zip(*(p for _, p in values))]
            rows.append([contender.label, number(50 if kind == "50/s" else asked[contender, kind]),
                         number(median(achieved for achieved, _ in values)), *figures])
        table("Commit → start, ms (negative: the job began before its enqueuer had heard of the commit):",
              ["queue", "jobs/s asked", "came in", "p50", "p90", "p99", "p99.9"], sorted(rows, key=lambda row: row[1] != "50"))

    def half(self, run, contender):
        """Half of what it drains, or 80 % of what the enqueuer can do with nobody at work."""
        drained = visit(contender, Drain.jobs(run, contender))
        contender.reset()
        bench = run.server.pgbench(contender.database, contender.enqueue("noop").replace(":n::", "1::"), 8, "-T", 2)
        bench.finish()
        half = int(min(drained / 2, 0.8 * bench.tps()))
        run.keep("half", contender, drained=drained, enqueued=bench.tps(), asked=half)
        return max(half, 1)

    def paced(self, run, contender, rate, clients):
        contender.reset()
        contender.tidy()
        contender.start(0, "note")
        time.sleep(1)
        # Poisson arrivals; n tells the client and its transaction.
        script = f"\\set k :k + 1\n\\set n :client_id * 100000000 + :k\n{contender.enqueue('note')}\n"
        bench = run.server.pgbench(contender.database, script, clients, "-T", run.latency_seconds, "-R", rate, "-D", "k=0", "-l")
        try:
            bench.finish()
            contender.tail()
            began = dict(contender.began())
        finally:
            contender.stop("note")
        ends = {client * 100000000 + count: at for (client, count), at in bench.ends().items()}
        if set(ends) != set(began):
            raise RuntimeError(f"{contender.label}: {len(began)} jobs began of {len(ends)} that were enqueued")
        warm = min(ends.values()) + 0.5
        return [began[n] - at for n, at in ends.items() if at > warm], bench.tps()


class Claim:
    """What a claim costs in a short and in a long queue."""

    def run(self, run):
        self.outside(run)
        self.drained(run)

    def outside(self, run):
        """A runner of its own: claims one, ends it and enqueues another, so that the queue stays as long."""
        imbus = next((c for c in run.contenders if isinstance(c, Imbus)), None)
        if not imbus:
            return
        seen = defaultdict(list)
        script = """SELECT id, token FROM ir_async_claim('outside', 1, 'bench') \\gset
                    SELECT ir_async_finish(:id, :token);
                    SELECT ir_async_call('anything', queue => 'outside');\n"""
        run.server.setting("imbus.queues", "'outside:0'")
        time.sleep(0.5)
        for turn in range(run.rounds):
            for waiting in (10, run.waiting) if turn % 2 == 0 else (run.waiting, 10):
                imbus.reset()
                for first in range(0, waiting, 10000):
                    imbus.link.execute("""SELECT count(*) FROM ir_async_call_many((SELECT jsonb_agg('{"target": "anything",
                        "queue": "outside"}'::jsonb) FROM generate_series(1, %s::int)))""", [min(10000, waiting - first)])
                imbus.tidy()
                bench = run.server.pgbench(imbus.database, script, 1, "-T", run.seconds, "-r")
                bench.finish()
                seen[waiting].append(bench.latencies()[:3])
                run.keep("claim", imbus, waiting=waiting, milliseconds=bench.latencies())
        run.server.setting("imbus.queues", "''")
        time.sleep(0.5)
        base = [median(column) for column in zip(*seen[10])]
        rows = []
        for waiting in (10, run.waiting):
            figures = [median(column) for column in zip(*seen[waiting])]
            rows.append([number(waiting)] + [f"{number(f, 3)} ({ratio(f, b)})" for f, b in zip(figures, base)])
        table("A runner of its own, ms a call, one after another:", ["jobs waiting", "`ir_async_claim`", "`ir_async_finish`", "`ir_async_call`"], rows)

    def drained(self, run):
        """The first K of K jobs and of many more."""
        some = [c for c in run.contenders if "@" not in c.key and c.key != "plain-1"]
        seen = defaultdict(list)
        for _, contender in turns(some, run.rounds):
            few = max(1600, Drain.jobs(run, contender) // 5 // 1600 * 1600)
            for waiting in (few, max(run.waiting, few + 1)):
                rate = visit(contender, few, fill=waiting if waiting != few else None)
                seen[contender, few, waiting].append(rate)
                run.keep("queue length", contender, jobs=few, waiting=waiting, rate=rate)
        rows, base = [], {}
        for (contender, few, waiting), values in seen.items():
            base.setdefault(contender, median(values))
            rows.append([contender.label, number(few), number(waiting), number(median(values)), ratio(median(values), base[contender])])
        table("The first jobs of a short and of a long queue:", ["queue", "jobs done", "waiting at the start", "jobs/s", "of the short one"], rows)


class Dead:
    """Bursts, again and again, while a long transaction is held elsewhere."""

    def run(self, run):
        some = [c for c in run.contenders if "@" not in c.key and c.key not in ("graphile-16", "plain-1")]
        rows = []
        for holder in ("nobody", "another database", "the same database"):
            for contender in some:
                rows += self.watch(run, contender, holder)
        table(f"Bursts under a REPEATABLE READ transaction in …, {run.dead_seconds} s each:",
              ["queue", "transaction in", "after s", "jobs done", "dead rows", "tables MB", "indexes MB", "jobs/s", "of the first burst"], rows)

    def watch(self, run, contender, holder):
        contender.reset()
        contender.tidy()
        with run.server.connect("postgres" if holder != "the same database" else contender.database) as link:
            if holder != "nobody":
                link.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                link.execute("SELECT count(*) FROM pg_class")
                link.execute("SELECT pg_current_xact_id()")
            samples = list(self.bursts(run, contender, holder))
        shown = [samples[round(i * (len(samples) - 1) / 4)] for i in range(5)] if len(samples) > 5 else samples
        return [[contender.label, holder, *map(number, sample[:3]), number(sample[3] / 1e6, 1), number(sample[4] / 1e6, 1),
                 number(sample[5]), ratio(sample[5], samples[0][5])] for sample in shown]

    def bursts(self, run, contender, holder):
        began, done = time.time(), 0
        burst = max(160, run.burst // (20 if contender.key == "procrastinate" else 1) // 16 * 16)
        while time.time() - began < run.dead_seconds:
            contender.fill(burst)
            try:
                rate = burst / contender.drain(burst)
            finally:
                contender.stop("noop")
            done += burst
            time.sleep(1.2)  # the statistics of a session that goes on are written once a second
            sample = [time.time() - began, done, *contender.sizes(), rate]
            run.keep("dead", contender, holder=holder, sample=[float(x) for x in sample])
            yield sample
        contender.check(done, "noop")


SECTIONS = {"drain": Drain, "enqueue": Enqueue, "latency": Latency, "claim": Claim, "dead": Dead}
