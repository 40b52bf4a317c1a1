import json

from odoo.tests import common


class JobCase(common.TransactionCase):
    """Plays the server: claims jobs by SQL, as its worker does, and reads what became of them."""

    def setUp(self):
        super().setUp()
        self.jobs = self.env['ir.async']
        self.partner = self.env['res.partner'].create({'name': 'Somebody'})

    def new_user(self, login, groups='base.group_user'):
        return common.new_test_user(self.env, login=login, groups=groups)

    def claim(self, queue):
        """The claimed job's id and token."""
        self.env.flush_all()
        self.env.cr.execute("SELECT id, token FROM ir_async_claim(%s, 1, 'test')", (queue,))
        return self.env.cr.fetchone()

    def row(self, job_id):
        self.env.cr.execute("SELECT row_to_json(j) FROM ir_async j WHERE id = %s", (job_id,))
        return self.env.cr.fetchone()[0]

    def notifications(self):
        """What was sent about jobs in this transaction: the payloads."""
        self.env.cr.execute("SELECT message FROM bus_bus WHERE message LIKE '%%\"ir.async\"%%' ORDER BY id")
        return [json.loads(message)['payload'] for (message,) in self.env.cr.fetchall()]
