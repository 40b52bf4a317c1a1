import base64
import csv
import datetime
import io

import xlsxwriter

from odoo import _, api, fields, models
from odoo.exceptions import UserError
from odoo.tools import osutil

# An administrator may limit it (imbus.queues): whoever exports much leaves other jobs their places.
QUEUE = 'root.export'
# How long a file is kept, in days.
KEPT = 3
# Rows that are read at once: between two, progress is told and memory is given back.
BATCH = 1000
# A sheet's own limit.
ROWS_MAX = 1_048_576 - 1


class IrAsync(models.Model):
    _inherit = 'ir.async'

    @api.model
    def export(self, data, file_format):
        """Enqueues an export of a list's records as a described job of the current user, whose result is the download.

        :param dict data: `model`, `fields` (each with `name` and `label`), `ids` or `domain`, `import_compat`, `context`,
            as the export dialog says them
        :param str file_format: "xlsx" or "csv"
        :return: the job's id
        :raises AccessError: for a user who may not export
        :raises UserError: for another format or a model that there is not
        """
        if file_format not in ('xlsx', 'csv'):
            raise UserError(_('Only xlsx and csv files can be made.'))
        if not isinstance(data, dict) or data.get('model') not in self.env:
            raise UserError(_('There is no such model.'))
        model = self.env[data['model']]
        model.check_access('read')
        if not (self.env.is_admin() or self.env.user.has_group('base.group_allow_export')):
            raise UserError(_('You do not have the rights to export data.'))
        title = self.env['ir.model']._get(model._name).name
        return self.call(self._export, [data, file_format], description=_('Export of %s', title), queue=QUEUE).id

    @api.model
    def _export(self, data, file_format):
        """Makes the file; an action that downloads it."""
        context = {**(data.get('context') or {}), 'import_compat': data.get('import_compat')}
        model = self.env[data['model']].with_context(**{key: value for key, value in context.items() if isinstance(key, str)})
        columns = data['fields']
        if not model._is_an_ordinary_table():
            columns = [column for column in columns if column['name'] != 'id']
        names = [column['name'] for column in columns]
        labels = names if data.get('import_compat') else [column['label'].strip() for column in columns]
        records = model.browse(data['ids']) if data.get('ids') else model.search(data.get('domain') or [])
        rows = self._export_rows(records, names)
        content = self._export_csv(labels, rows) if file_format == 'csv' else self._export_xlsx(labels, rows)
        title = self.env['ir.model']._get(model._name).name
        # Created by the user and of no record: nobody else may read it.
        attachment = self.env['ir.attachment'].create({
            'name': osutil.clean_filename(f'{title} ({model._name}).{file_format}'),
            'datas': base64.b64encode(content),
            'description': self._export_mark(),
        })
        return {'type': 'ir.actions.act_url', 'url': f'/web/content/{attachment.id}?download=true', 'target': 'download'}

    @api.model
    def _export_mark(self):
        return 'imbus: export in background'

    @api.model
    def _export_rows(self, records, names):
        for start in range(0, len(records), BATCH):
            self.progress(100 * start / len(records), _('%(done)s of %(all)s records', done=start, all=len(records)))
            yield from records[start:start + BATCH].export_data(names).get('datas', [])
            records.env.invalidate_all()

    @api.model
    def _export_csv(self, labels, rows):
        file = io.StringIO()
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(labels)
        for row in rows:
            writer.writerow([self._export_text(value) for value in row])
        return file.getvalue().encode()

    @api.model
    def _export_text(self, value):
        if value is None or value is False:
            return ''
        if isinstance(value, bytes):
            value = value.decode(errors='replace')
        # A spreadsheet would take it for a formula.
        if isinstance(value, str) and value.startswith(('=', '+', '-')):
            return f"'{value}"
        return value

    @api.model
    def _export_xlsx(self, labels, rows):
        file = io.BytesIO()
        with xlsxwriter.Workbook(file, {'in_memory': True}) as book:
            sheet = book.add_worksheet()
            bold = book.add_format({'bold': True})
            date = book.add_format({'num_format': 'yyyy-mm-dd'})
            time = book.add_format({'num_format': 'yyyy-mm-dd hh:mm:ss'})
            for column, label in enumerate(labels):
                sheet.write_string(0, column, label, bold)
            sheet.set_column(0, max(len(labels) - 1, 0), 24)
            for number, row in enumerate(rows, 1):
                if number > ROWS_MAX:
                    raise UserError(_('There are too many rows for an xlsx file: export to csv.'))
                for column, value in enumerate(row):
                    if isinstance(value, bytes):
                        value = value.decode(errors='replace')
                    if isinstance(value, datetime.datetime):
                        sheet.write_datetime(number, column, value.replace(tzinfo=None), time)
                    elif isinstance(value, datetime.date):
                        sheet.write_datetime(number, column, datetime.datetime.combine(value, datetime.time()), date)
                    elif isinstance(value, (bool, int, float)):
                        sheet.write(number, column, '' if value is False else value)
                    elif value is not None:
                        sheet.write_string(number, column, str(value)[:32767])
        return file.getvalue()

    @api.autovacuum
    def _gc_exports(self):
        """Removes the files of exports after some days."""
        before = fields.Datetime.subtract(fields.Datetime.now(), days=KEPT)
        self.env['ir.attachment'].sudo().search([
            ('description', '=', self._export_mark()), ('res_model', '=', False), ('create_date', '<', before),
        ], limit=1000).unlink()
