"""procrastinate: fills its queue by batch_defer and works on it. Speaks as line.mjs does."""
import asyncio
import json
import logging
import sys
import time

from procrastinate import App, PsycopgConnector

logging.disable(logging.CRITICAL)
address, settings = sys.argv[1], json.loads(sys.argv[2])
concurrency = settings["concurrency"]
app = App(connector=PsycopgConnector(conninfo=address, min_size=concurrency + 2, max_size=concurrency + 2))
handled = {"count": 0, "expected": None, "began": []}
running = None


def say(message):
    print(json.dumps(message), flush=True)


def count():
    handled["count"] += 1
    if handled["count"] == handled["expected"]:
        say({"event": "handled", "at": time.time()})


@app.task(name="noop")
async def noop(n=0, text=""):
    count()


@app.task(name="note")
async def note(n, text=""):
    handled["began"].append((n, time.time()))
    count()


@app.task(name="fail")
async def fail(n, text=""):
    count()
    if n % 100 == 0:
        raise RuntimeError("as every hundredth")


async def fill(jobs, chunk, task, text):
    for start in range(0, jobs, chunk):
        some = [{"n": n + 1, "text": text} for n in range(start, min(start + chunk, jobs))]
        await app.configure_task(task).batch_defer_async(*some)


async def start(task):
    global running
    running = asyncio.create_task(app.run_worker_async(concurrency=concurrency, install_signal_handlers=False))


async def stop(task):
    global running
    if running:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    running = None


async def expect(jobs):
    handled.update(count=0, expected=jobs, began=[])


async def create():
    await app.schema_manager.apply_schema_async()


async def began():
    return handled["began"]


async def nothing():
    return None


COMMANDS = {"create": create, "ready": nothing, "fill": fill, "expect": expect, "start": start, "stop": stop,
            "began": began, "quit": nothing}


async def main():
    lines = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with app.open_async():
        while line := await lines.readline():
            message = json.loads(line)
            name = message.pop("do")
            try:
                say({"answer": await COMMANDS[name](**message)})
            except Exception as error:  # the driver reports it
                say({"error": repr(error)})
            if name == "quit":
                return


asyncio.run(main())
