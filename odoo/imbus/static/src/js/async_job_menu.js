import { AlertDialog } from "@web/core/confirmation_dialog/confirmation_dialog";
import { Dropdown } from "@web/core/dropdown/dropdown";
import { _t } from "@web/core/l10n/translation";
import { registry } from "@web/core/registry";
import { useService } from "@web/core/utils/hooks";
import { Component, useState } from "@odoo/owl";

/** The user's jobs in the systray: nothing is shown where there are none. */
export class AsyncJobMenu extends Component {
    static template = "imbus.AsyncJobMenu";
    static components = { Dropdown };
    static props = {};

    setup() {
        this.asyncJob = useService("async_job");
        this.action = useService("action");
        this.dialog = useService("dialog");
        this.state = useState(this.asyncJob.state);
    }

    get jobs() {
        return Object.values(this.state.jobs).sort((a, b) => b.id - a.id);
    }

    get stateLabels() {
        return {
            created: _t("Waiting"),
            processing: _t("Running"),
            succeeded: _t("Ready"),
            failed: _t("Failed"),
        };
    }

    get removeLabels() {
        return {
            created: _t("Cancel"),
            processing: _t("Cancel"),
            succeeded: _t("Done"),
            failed: _t("Discard"),
        };
    }

    isAction(job) {
        const result = job.payload?.result;
        return typeof result?.type === "string" && result.type.startsWith("ir.actions.");
    }

    percent(job) {
        return Math.round(job.progress?.percent || 0);
    }

    async open(job) {
        if (job.state === "succeeded") {
            const result = job.payload?.result;
            if (this.isAction(job)) {
                await this.action.doAction(result);
            } else {
                const text = typeof result === "string" ? result : JSON.stringify(result, null, 2);
                this.dialog.add(AlertDialog, { title: job.name, body: text });
            }
            await this.asyncJob.complete(job.id);
        } else if (job.state === "failed") {
            this.dialog.add(AlertDialog, { title: job.name, body: job.payload?.error?.message || _t("The job failed.") });
            this.asyncJob.dismiss(job.id);
        }
    }

    /** Takes the job from the list, in all tabs. */
    remove(job) {
        return job.state === "succeeded" ? this.asyncJob.complete(job.id) : this.asyncJob.cancel(job.id);
    }
}

registry.category("systray").add("imbus.AsyncJobMenu", { Component: AsyncJobMenu }, { sequence: 40 });
