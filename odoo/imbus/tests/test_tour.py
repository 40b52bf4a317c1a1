import json

from odoo.tests import HttpCase, tagged

from .common import JobCase


@tagged('post_install', '-at_install')
class TestTour(JobCase, HttpCase):
    """The pages, of jobs that are there. No transaction ends in these tests, so that no notification is sent: what the pages
    do with those is tested outside of Odoo's tests."""

    def end(self, function, job, outcome):
        """Settles a job that waits in the default queue, as a runner does."""
        job_id, token = self.claim('default')
        self.assertEqual(job_id, job.id)
        self.env.cr.execute(f'SELECT {function}(%s, %s, %s::jsonb)', (job_id, token, json.dumps(outcome)))

    def break_down(self, job):
        self.end('ir_async_fail', job, {'message': 'No such thing', 'retry': False, 'data': {'debug': 'Where it broke'}})

    def test_systray_and_list(self):
        admin = self.env.ref('base.user_admin')
        jobs, read = self.jobs.with_user(admin), self.partner.with_user(admin).read
        ready = jobs.call_notify('Partners to see', read, ['name'])
        self.end('ir_async_finish', ready, {
            'type': 'ir.actions.act_window', 'name': 'Partners of the job', 'res_model': 'res.partner', 'views': [[False, 'list']],
        })
        broken = jobs.call_notify('It broke', read, ['name'])
        self.break_down(broken)
        self.start_tour('/odoo', 'imbus_systray', login='admin')
        self.env.invalidate_all()
        self.assertEqual((ready.state, broken.state), ('done', 'failed'))

        broken_for_good = jobs.call_notify('Broken for good', read, ['name'])
        self.break_down(broken_for_good)
        waiting = jobs.call_notify('To be cancelled', read, ['name'])
        self.start_tour('/odoo/async-jobs', 'imbus_administrator', login='admin')
        self.env.invalidate_all()
        self.assertEqual((broken.state, broken_for_good.state, waiting.state), ('created', 'failed', 'cancelled'))
