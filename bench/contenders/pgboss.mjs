// pg-boss: fills its queues by insert and works on them.
import { PgBoss } from "pg-boss";
import { address, expect, handle, handled, serve, settings } from "./line.mjs";

const { batchSize, concurrency } = settings;
const boss = new PgBoss({ connectionString: address, max: concurrency + 4, useListenNotify: true, schedule: false });
boss.on("error", (error) => console.error(error));
boss.on("warning", () => {});
await boss.start();
const options = { batchSize, localConcurrency: concurrency, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true };

// A batch is all or nothing by default: the failing jobs are settled one by one.
function failing(jobs) {
    return jobs.map(({ id, data }) => {
        try {
            handle("fail", data);
            return { id, status: "completed" };
        } catch (error) {
            return { id, status: "failed", output: { message: error.message } };
        }
    });
}

await serve({
    ready() {},
    async create() {
        for (const name of ["noop", "note", "fail"]) await boss.createQueue(name, { notify: true, retryLimit: 0 });
    },
    async fill({ jobs, chunk, task, text }) {
        for (let from = 0; from < jobs; from += chunk) {
            const some = Array.from({ length: Math.min(chunk, jobs - from) }, (_, i) => ({ data: { n: from + i + 1, text } }));
            await boss.insert(task, some);
        }
    },
    expect,
    async start({ task }) {
        if (task === "fail") return void (await boss.work(task, { ...options, perJobResults: true }, async (jobs) => failing(jobs)));
        await boss.work(task, options, async (jobs) => {
            for (const { data } of jobs) handle(task, data);
        });
    },
    async stop({ task }) {
        await boss.offWork(task, { wait: true });
    },
    began: () => handled.began,
    quit: () => boss.stop({ graceful: false, close: true }),
});
