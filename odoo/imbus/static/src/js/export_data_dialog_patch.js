import { _t } from "@web/core/l10n/translation";
import { patch } from "@web/core/utils/patch";
import { useService } from "@web/core/utils/hooks";
import { ExportDataDialog } from "@web/views/view_dialogs/export_data_dialog";

patch(ExportDataDialog.prototype, {
    setup() {
        super.setup(...arguments);
        this.asyncJob = useService("async_job");
    },

    /** Enqueues the export: the file waits in the systray when it is made. */
    async onClickBackgroundExport() {
        const fields = this.state.exportList;
        if (!fields.length) {
            return this.notification.add(_t("Please select the fields to export."), { type: "danger" });
        }
        const { root } = this.props;
        const isCompatible = this.state.isCompatible ?? this.isCompatible; // 18.0, 19.0
        const columns = fields.map((field) => ({ name: field.name || field.id, label: field.label || field.string }));
        if (isCompatible) {
            columns.unshift({ name: "id", label: _t("External ID") });
        }
        const isSelection = !root.isDomainSelected && root.selection.length > 0;
        const data = {
            model: root.resModel,
            fields: columns,
            ids: isSelection ? root.selection.map((record) => record.resId) : false,
            domain: root.domain,
            import_compat: isCompatible,
            context: root.context,
        };
        this.state.disabled = true;
        try {
            await this.orm.call("ir.async", "export", [data, this.availableFormats[this.state.selectedFormat].tag]);
        } finally {
            this.state.disabled = false;
        }
        this.asyncJob.refresh();
        this.notification.add(_t("The export goes on in the background. Its file will wait for you above."), { type: "info" });
        this.props.close();
    },
});
