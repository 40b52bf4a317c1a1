"""Runs the Autobahn cases against an echo server and prints what came of them (scripts/conformance).

run.py URL EXPECTED [CASE ...]: EXPECTED lists the cases whose outcome is not OK, as they are known; any FAILED, and any
case that came out worse than it is listed, is a failure. With CASEs (ids or globs) only those run.
"""

import asyncio
import collections
import fnmatch
import sys

from kosoku import FailureError, run_fuzzingclient
from kosoku.cases import CASES

# Ways to close that show no fault of the server's.
HARMLESS = {"OK", "NON-STRICT", "INFORMATIONAL"}


def mend_cases():
    """The compression cases hash what they hear, which kosoku 0.1.0 hands on as a str (of text, or of code points 0 to
    255) where the server has not compressed it; not all that may be compressed has to be."""
    for case, cls in CASES.items():
        if case.split(".")[0] in ("12", "13"):
            cls.onMessage = as_bytes(cls.onMessage)


def as_bytes(heard):
    def hear(self, msg, binary):
        if isinstance(msg, str):
            msg = msg.encode("latin-1" if binary else "utf-8")
        heard(self, msg, binary)

    return hear


def known(path):
    with open(path, encoding="ascii") as file:
        lines = [line.split("#")[0].split() for line in file]
    pairs = [line for line in lines if line]
    return lambda case: next((outcome for glob, outcome in pairs if fnmatch.fnmatch(case, glob)), "OK")


async def run(url, cases):
    try:
        return await run_fuzzingclient(url, cases or None)
    except FailureError as failure:
        return failure.results


def main():
    url, expected, cases = sys.argv[1], known(sys.argv[2]), sys.argv[3:]
    mend_cases()
    results = asyncio.run(run(url, cases))
    counts, closes = collections.Counter(), collections.Counter()
    bad, better = [], collections.Counter()
    for result in results:
        behavior, close, usual = result.behavior.value, result.behavior_close.value, expected(result.case_id)
        counts[behavior] += 1
        closes[close] += 1
        if behavior == "OK" and close == "OK":
            better[usual] += usual != "OK"
        elif behavior != usual or behavior == "FAILED" or close not in HARMLESS:
            bad.append(f"{result.case_id}: {behavior}, close {close}: {result.result} {result.result_close}")
    print(*bad, sep="\n", end="\n" if bad else "")
    print(f"{len(results)} cases:", ", ".join(f"{count} {name}" for name, count in counts.most_common()))
    print("closes:", ", ".join(f"{count} {name}" for name, count in closes.most_common()))
    for usual, count in (+better).items():
        print(f"{count} of them are OK that are listed as {usual}: bring tests/conformance/expected up to date")
    sys.exit(1 if bad or not results else 0)


main()
