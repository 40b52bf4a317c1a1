import { browser } from "@web/core/browser/browser";
import { _t } from "@web/core/l10n/translation";
import { makeErrorFromResponse } from "@web/core/network/rpc";
import { registry } from "@web/core/registry";
import { user } from "@web/core/user";
import { EventBus, reactive } from "@odoo/owl";

const DISMISSED = "imbus.dismissed";
const LISTED = new Set(["created", "processing", "succeeded", "failed"]);
// "gone" is no state: the model knows the job no more.
const ENDED = new Set(["succeeded", "done", "failed", "cancelled", "gone"]);
// How often the model is asked about what is awaited, in ms: no notification comes where the websocket is not up.
const ASK_EVERY = 15000;

/** The result of a job that has ended; throws its error as an RPC does. */
async function outcome({ state, payload }) {
    if (state === "succeeded" || state === "done") {
        return payload?.result ?? null;
    }
    const message = state === "gone" ? _t("The job is not kept any more.") : _t("The job was cancelled.");
    const error = payload?.error || {
        code: 200,
        message,
        data: { name: state, message, arguments: [message], debug: "", context: {} },
    };
    // 18.0 looks into data.
    throw makeErrorFromResponse({ ...error, data: error.data || {} });
}

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
        // For each question to the model that is under way, the jobs of which notifications have come meanwhile: these are
        // newer than its answer.
        const questions = new Set();
        let timer = null;

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

        function settle(job) {
            const waiting = awaited.get(job.id);
            if (!waiting || !ENDED.has(job.state)) {
                return;
            }
            awaited.delete(job.id);
            keepAsking();
            waiting.resolve(outcome(job));
            if (!waiting.isDescribed && job.state === "succeeded") {
                complete(job.id);
            }
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
            for (const newer of questions) {
                newer.add(job.id);
            }
            apply(job);
        });

        /** Asks the model what has become of the jobs: after the bus was away. */
        async function refresh() {
            const newer = new Set();
            const asked = [...awaited.keys()];
            questions.add(newer);
            try {
                const jobs = await orm.silent.call("ir.async", "watch", [asked]);
                const found = new Set(jobs.map((job) => job.id));
                const isGone = (id) => !found.has(id) && !newer.has(id);
                for (const id of Object.keys(state.jobs).map(Number).filter(isGone)) {
                    delete state.jobs[id];
                }
                for (const job of jobs.filter(({ id }) => !newer.has(id))) {
                    apply(job);
                }
                for (const id of asked.filter(isGone)) {
                    settle({ id, state: "gone" });
                }
            } finally {
                questions.delete(newer);
            }
        }
        // Without a connection there is nothing to show: the next one asks again.
        const refreshQuietly = () => refresh().catch(() => {});

        /** While anything is awaited, its state is asked for now and then. */
        function keepAsking() {
            if (!awaited.size) {
                browser.clearTimeout(timer);
                timer = null;
                return;
            }
            timer ??= browser.setTimeout(() => {
                timer = null;
                refreshQuietly().then(keepAsking);
            }, ASK_EVERY);
        }

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
                ended = new Promise((resolve) => {
                    awaited.set(id, { resolve, isDescribed: Boolean(description) });
                });
                keepAsking();
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
            delete state.jobs[id];
        }

        /** Ends a job that waits or runs, and discards one that has failed. */
        async function cancel(id) {
            await orm.call("ir.async", "cancel", [[id]]);
            await refreshQuietly();
        }

        /** Lists a failed job no more, in this browser. */
        function dismiss(id) {
            browser.localStorage.setItem(DISMISSED, JSON.stringify([...dismissed(), id].slice(-200)));
            delete state.jobs[id];
        }
        // Another tab has dismissed one.
        browser.addEventListener("storage", ({ key }) => {
            if (key === DISMISSED) {
                Object.values(state.jobs).forEach(list);
            }
        });

        return { state, bus, asyncRpc, complete, cancel, dismiss, refresh: refreshQuietly };
    },
};

registry.category("services").add("async_job", asyncJobService);
