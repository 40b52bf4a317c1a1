import { browser } from "@web/core/browser/browser";
import { _t } from "@web/core/l10n/translation";
import { makeErrorFromResponse } from "@web/core/network/rpc";
import { registry } from "@web/core/registry";
import { user } from "@web/core/user";
import { EventBus, reactive } from "@odoo/owl";

const DISMISSED = "imbus.dismissed";
const LISTED = new Set(["created", "processing", "succeeded", "failed"]);
const ENDED = new Set(["succeeded", "done", "failed", "cancelled"]);

/**
 * Jobs of the current user, as they change: `state.jobs` (the described ones, by id), `bus` (event "job" with each
 * notification's payload), `asyncRpc`, `complete`, `cancel`, `dismiss`, `refresh`.
 */
export const asyncJobService = {
    dependencies: ["bus_service", "orm"],

    start(env, { bus_service: busService, orm }) {
        const bus = new EventBus();
        const state = reactive({ jobs: {} });
        const awaited = new Map();
        // What came while an enqueueing RPC was under way: it may be about the job whose id is not known yet.
        const early = new Map();
        let enqueueing = 0;
        // How many notifications came of a job: an older answer of the model does not overwrite a newer notification.
        const heard = new Map();

        function dismissed() {
            try {
                return JSON.parse(browser.localStorage.getItem(DISMISSED)) || [];
            } catch {
                return [];
            }
        }

        function list(job) {
            const known = state.jobs[job.id];
            const isListed =
                job.name && LISTED.has(job.state) && !(job.state === "failed" && dismissed().includes(job.id));
            if (!isListed) {
                delete state.jobs[job.id];
            } else if (known) {
                Object.assign(known, job, { progress: job.progress || null });
            } else {
                state.jobs[job.id] = { progress: null, ...job };
            }
        }

        async function settle(job) {
            const waiting = awaited.get(job.id);
            if (!waiting || !ENDED.has(job.state)) {
                return;
            }
            awaited.delete(job.id);
            if (job.state === "succeeded" || job.state === "done") {
                const result = job.payload && "result" in job.payload ? job.payload.result : null;
                waiting.resolve(result);
                if (!waiting.isDescribed && job.state === "succeeded") {
                    await complete(job.id);
                }
                return;
            }
            const message = _t("The job was cancelled.");
            const error = (job.payload && job.payload.error) || {
                code: 200,
                message,
                data: { name: "cancelled", message, arguments: [message], debug: "", context: {} },
            };
            waiting.reject(makeErrorFromResponse(error));
        }

        function apply(job) {
            if (enqueueing) {
                early.set(job.id, job);
            }
            list(job);
            bus.trigger("job", job);
            settle(job);
        }

        busService.subscribe("ir.async", (job) => {
            heard.set(job.id, (heard.get(job.id) || 0) + 1);
            apply(job);
        });

        /** Asks the model what has become of the jobs: after the bus was away. */
        async function refresh() {
            const before = new Map(heard);
            const jobs = await orm.silent.call("ir.async", "watch", [[...awaited.keys()]]);
            const isNewer = (id) => heard.get(id) !== before.get(id);
            const found = new Set(jobs.map((job) => job.id));
            for (const id of Object.keys(state.jobs).map(Number)) {
                if (!found.has(id) && !isNewer(id)) {
                    delete state.jobs[id];
                }
            }
            for (const job of jobs) {
                if (!isNewer(job.id)) {
                    apply(job);
                }
            }
        }
        // Without a connection there is nothing to show: the next one asks again.
        const refreshQuietly = () => refresh().catch(() => {});

        // The names of 19.0, and those that 18.0 had at first.
        for (const event of ["BUS:CONNECT", "BUS:RECONNECT", "connect", "reconnect"]) {
            busService.addEventListener(event, refreshQuietly);
        }
        busService.start();
        refreshQuietly();

        /**
         * Calls a method in the background, as `rpc` would have called it now.
         *
         * @param {{model: string, method: string, args?: any[], kwargs?: object, description?: string}} call with a
         *   description the job is listed in the systray, and its result stays there until it is opened
         * @returns {Promise<any>} the result, when the job has ended
         * @throws {RPCError} the job's error, as an RPC would have thrown it
         */
        async function asyncRpc({ model, method, args = [], kwargs = {}, description }) {
            const context = { ...user.context, ...(kwargs.context || {}) };
            const call = [model, method, args, { ...kwargs, context }, description || null];
            let ended;
            enqueueing++;
            try {
                const id = await orm.silent.call("ir.async", "rpc", call);
                ended = new Promise((resolve, reject) => {
                    awaited.set(id, { resolve, reject, isDescribed: Boolean(description) });
                });
                if (early.has(id)) {
                    settle(early.get(id));
                }
            } finally {
                enqueueing--;
                if (!enqueueing) {
                    early.clear();
                }
            }
            return ended;
        }

        /** The result has been seen: the job disappears from all tabs. */
        async function complete(id) {
            await orm.silent.call("ir.async", "complete", [[id]]);
        }

        /** Ends a job that waits or runs. */
        async function cancel(id) {
            await orm.call("ir.async", "cancel", [[id]]);
        }

        /** Lists a failed job no more, in this browser. */
        function dismiss(id) {
            browser.localStorage.setItem(DISMISSED, JSON.stringify([...dismissed(), id].slice(-200)));
            delete state.jobs[id];
        }

        return { state, bus, asyncRpc, complete, cancel, dismiss, refresh: refreshQuietly };
    },
};

registry.category("services").add("async_job", asyncJobService);
