"""bench/jobs: the options, and what each visit measured."""
import argparse
import datetime
import json
import os

from contender import contenders
from sections import SECTIONS
from server import Server


def options():
    p = argparse.ArgumentParser(prog="bench/jobs", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    words = lambda text: text.split(",")
    p.add_argument("--only", type=words, default=list(SECTIONS), metavar="SECTIONS", help="some of " + ",".join(SECTIONS))
    p.add_argument("--contenders", type=words, metavar="NAMES", help="some of imbus,imbus@1,imbus@2,graphile,graphile-16,"
                   "pgboss,procrastinate,plain-1,plain-16; all when left out")
    p.add_argument("--rounds", type=int, default=3, help="visits of each, of which the median is shown")
    p.add_argument("--jobs", type=int, default=100_000, help="jobs of a drain; procrastinate gets a twentieth")
    p.add_argument("--seconds", type=float, default=5, help="of each rate of enqueueing and claiming")
    p.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32], help="that enqueue")
    p.add_argument("--latency-seconds", type=float, default=30, help="of each rate")
    p.add_argument("--waiting", type=int, default=1_000_000, help="jobs of a long queue")
    p.add_argument("--dead-seconds", type=float, default=60, help="of bursts, for each contender and place")
    p.add_argument("--burst", type=int, default=10_000, help="jobs of a burst")
    found = p.parse_args()
    found.seconds, found.latency_seconds = max(1, round(found.seconds)), max(1, round(found.latency_seconds))
    if unknown := set(found.only) - set(SECTIONS):
        p.error(f"no such section: {', '.join(unknown)}")
    return p, found


class Run:
    def __init__(self):
        parser, found = options()
        vars(self).update(vars(found))
        self.server = Server(os.environ["CLUSTER"], int(os.environ["PGPORT"]), os.environ["BINDIR"])
        everybody = contenders(self.server, os.environ["NODE"])
        names = found.contenders or [c.key for c in everybody]
        if unknown := set(names) - {c.key for c in everybody}:
            parser.error(f"no such contender: {', '.join(unknown)}")
        self.contenders = [c for c in everybody if c.key in names]
        os.makedirs("results", exist_ok=True)
        self.raw = open(f"results/jobs-{datetime.datetime.now():%Y%m%d-%H%M%S}.json", "w")

    def keep(self, section, contender, **figures):
        """One line of JSON for each visit."""
        print(json.dumps({"section": section, "contender": contender.key, **figures}), file=self.raw, flush=True)

    def main(self):
        print(os.environ["HEADING"] + f" {self.rounds} rounds in turns, medians.", flush=True)
        for contender in self.contenders:
            contender.open()
        try:
            for name in self.only:
                SECTIONS[name]().run(self)
                print(end="", flush=True)
        finally:
            for contender in self.contenders:
                if hasattr(contender, "link"):
                    contender.close()
        print(f"\nLoad average at the end {open('/proc/loadavg').read().split()[0]}.")


Run().main()
