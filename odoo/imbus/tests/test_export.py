import csv
import datetime
import io

from openpyxl import load_workbook

from odoo.exceptions import AccessError, UserError
from odoo.tests import tagged

from .common import JobCase


@tagged('post_install', '-at_install')
class TestExport(JobCase):

    def setUp(self):
        super().setUp()
        self.partner.write({'name': '=1+1', 'comment': False, 'color': 5})
        self.data = {
            'model': 'res.partner', 'ids': self.partner.ids, 'domain': [], 'import_compat': False, 'context': {},
            'fields': [{'name': 'name', 'label': 'Name'}, {'name': 'color', 'label': 'Color'}, {'name': 'create_date', 'label': 'On'}],
        }
        self.user = self.new_user('exporter', 'base.group_user,base.group_allow_export')

    def make(self, file_format):
        action = self.jobs.with_user(self.user)._export(self.data, file_format)
        self.assertEqual(action['type'], 'ir.actions.act_url')
        return self.env['ir.attachment'].browse(int(action['url'].split('/')[3].split('?')[0]))

    def test_csv(self):
        file = self.make('csv')
        rows = list(csv.reader(io.StringIO(file.raw.decode())))
        self.assertEqual(rows[0], ['Name', 'Color', 'On'])
        self.assertEqual(rows[1][:2], ["'=1+1", '5'])

    def test_xlsx(self):
        sheet = load_workbook(io.BytesIO(self.make('xlsx').raw)).active
        rows = list(sheet.iter_rows(values_only=True))
        self.assertEqual(rows[0], ('Name', 'Color', 'On'))
        self.assertEqual(rows[1][:2], ('=1+1', 5))
        self.assertIsInstance(rows[1][2], datetime.datetime)

    def test_the_file_is_its_users_and_goes_after_some_days(self):
        file = self.make('csv')
        other = self.new_user('no_exporter')
        self.assertTrue(file.with_user(self.user).raw)
        with self.assertRaises(AccessError):
            file.with_user(other).read(['raw'])
        self.jobs._gc_exports()
        self.assertTrue(file.exists())
        self.env.cr.execute("UPDATE ir_attachment SET create_date = create_date - interval '4 days' WHERE id = %s", (file.id,))
        self.jobs._gc_exports()
        self.assertFalse(file.exists())

    def test_needs_the_right_to_export(self):
        job = self.jobs.browse(self.jobs.with_user(self.user).export(self.data, 'csv'))
        self.assertEqual((job.user_id, job.state, job.queue), (self.user, 'created', 'root.export'))
        self.assertIn('Export', job.name)
        with self.assertRaises(UserError):
            self.jobs.with_user(self.new_user('no_exporter')).export(self.data, 'csv')
        with self.assertRaises(UserError):
            self.jobs.with_user(self.user).export(self.data, 'exe')
