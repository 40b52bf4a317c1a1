import { registry } from "@web/core/registry";

registry.category("web_tour.tours").add("imbus_systray", {
    steps: () => [
        { content: "the jobs are listed", trigger: ".o_async_jobs_toggle:contains(2)", run: "click" },
        { content: "one has failed", trigger: ".o_async_job[data-state=failed]:contains(It broke):contains(Failed)" },
        {
            content: "the other's result is an action: it is executed",
            trigger: ".o_async_job[data-state=succeeded]:contains(Partners to see):contains(Ready) .o_async_job_open",
            run: "click",
        },
        { content: "by that action", trigger: ".o_breadcrumb:contains(Partners of the job)" },
        { content: "and shows records", trigger: ".o_list_view .o_data_row" },
        { content: "what failed says why", trigger: ".o_async_job[data-state=failed] .o_async_job_open", run: "click" },
        { content: "in its own words", trigger: ".modal-body:contains(No such thing)" },
        { content: "seen", trigger: ".modal-footer .btn-primary", run: "click" },
        { content: "the dialog is gone", trigger: "body:not(:has(.modal))" },
    ],
});

const row = (text, more = "") => `.o_list_view .o_data_row:contains(${text})${more}`;

registry.category("web_tour.tours").add("imbus_administrator", {
    steps: () => [
        { content: "what failed is brought back", trigger: row("It broke", " button[name=retry]"), run: "click" },
        { content: "and waits", trigger: row("It broke", ":contains(Waiting)") },
        { content: "what waits is cancelled", trigger: row("To be cancelled", " button[name=cancel]"), run: "click" },
        { content: "and ended", trigger: row("To be cancelled", ":contains(Cancelled)") },
        { content: "one has its errors", trigger: row("Broken for good", " .o_data_cell[name=display_name]"), run: "click" },
        { content: "told in full", trigger: ".o_form_view .o_field_widget[name=traceback]:contains(Where it broke)" },
        { content: "back to the list", trigger: ".o_breadcrumb .o_back_button, .breadcrumb-item a", run: "click" },
        { content: "which is filtered by state", trigger: ".o_searchview_dropdown_toggler", run: "click" },
        { content: "failed ones", trigger: ".o_filter_menu .o-dropdown-item:contains(Failed)", run: "click" },
        { content: "only", trigger: `.o_list_view:not(:has(.o_data_row:contains(It broke)))` },
        { content: "and not others", trigger: row("Broken for good") },
    ],
});
