"""The private cluster: SQL on it, and pgbench."""
import os
import re
import subprocess
import tempfile
from glob import glob

import psycopg


class Server:
    def __init__(self, directory, port, bindir):
        self.directory, self.port, self.bindir = directory, port, bindir

    def address(self, database):
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def connect(self, database):
        return psycopg.connect(self.address(database), autocommit=True)

    def setting(self, name, value):
        with self.connect("postgres") as link:
            link.execute(f"ALTER SYSTEM SET {name} = {value}")
            link.execute("SELECT pg_reload_conf()")

    def pgbench(self, database, script, clients, *options):
        """Starts pgbench on a script; its transactions are logged into the returned folder."""
        folder = tempfile.mkdtemp(dir=self.directory)
        path = os.path.join(folder, "script.sql")
        with open(path, "w") as file:
            file.write(script)
        command = [f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-n",
                   "-M", "prepared", "-c", str(clients), "-j", str(min(clients, 2)), "-f", path, *map(str, options), database]
        return Bench(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                      cwd=folder), folder)


class Bench:
    def __init__(self, process, folder):
        self.process, self.folder = process, folder

    def finish(self):
        """Waits for the end: the report's text. Any error of SQL is ours."""
        out, err = self.process.communicate()
        if self.process.returncode or "ERROR" in err:
            raise RuntimeError(f"pgbench: {err.strip()}")
        self.text = out
        return out

    def stop(self):
        self.process.terminate()
        self.process.communicate()

    def figure(self, pattern):
        return float(re.search(pattern, self.text)[1])

    def tps(self):
        return self.figure(r"tps = ([\d.]+)")

    def transactions(self):
        return int(self.figure(r"transactions actually processed: (\d+)"))

    def latencies(self):
        """Milliseconds of each command, in the script's order (pgbench -r)."""
        return [float(line.split()[0]) for line in self.text.split("statement latencies")[1].splitlines()[1:] if line.strip()]

    def ends(self):
        """When each transaction had ended for its client: {(client, count from 1): seconds since the epoch}."""
        ends, counts = {}, {}
        for name in glob(os.path.join(self.folder, "pgbench_log.*")):
            for line in open(name):
                client, _, _, _, seconds, micro = line.split()[:6]
                counts[client] = counts.get(client, 0) + 1
                ends[int(client), counts[client]] = int(seconds) + int(micro) / 1e6
        return ends
