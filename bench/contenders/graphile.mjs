// graphile-worker: fills its queue by addJobs and works on it.
import { Logger, makeWorkerUtils, runTaskList } from "graphile-worker";
import pg from "pg";
import { address, expect, handle, handled, serve, settings } from "./line.mjs";

const silent = new Logger(() => (level, message) => level === "error" && !/as every hundredth/.test(message) && console.error(message));
const { concurrency, batched } = settings;
const worker = { concurrentJobs: concurrency, maxPoolSize: concurrency + 1, pollInterval: 2000, logger: silent };
if (batched) Object.assign(worker, { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 });
const pool = new pg.Pool({ connectionString: address, max: concurrency + 1 });
pool.on("error", (error) => console.error(error));
pool.on("connect", (client) => client.on("error", (error) => console.error(error)));
const utils = await makeWorkerUtils({ pgPool: pool, logger: silent });
const names = ["noop", "note", "fail"];
const tasks = Object.fromEntries(names.map((name) => [name, (payload) => handle(name, payload)]));
let workers;

// The pool's connections are open before the clock runs.
async function warm() {
    const clients = await Promise.all(Array.from({ length: concurrency }, () => pool.connect()));
    clients.forEach((client) => client.release());
}

await serve({
    ready: warm,
    create: () => utils.migrate(),
    async fill({ jobs, chunk, task, text }) {
        for (let from = 0; from < jobs; from += chunk) {
            const some = Array.from({ length: Math.min(chunk, jobs - from) }, (_, i) =>
                ({ identifier: task, payload: { n: from + i + 1, text }, maxAttempts: 1 }));
            await utils.addJobs(some);
        }
    },
    expect,
    async start() {
        workers = runTaskList({ preset: { worker }, logger: silent }, tasks, pool);
    },
    async stop() {
        await workers?.gracefulShutdown();
        workers = undefined;
    },
    began: () => handled.began,
    quit() {},
});
