import contextlib
from datetime import timedelta

from odoo.modules.neutralize import get_neutralization_queries
from odoo.sql_db import db_connect
from odoo.tests import tagged

from .common import JobCase


@tagged('post_install', '-at_install')
class TestNeutralize(JobCase):

    def setUp(self):
        super().setUp()
        [self.neutralize] = get_neutralization_queries(['imbus'])

    def schedule(self):
        self.env.cr.execute("SELECT ir_async_schedule('nightly', '0 0 * * *', 'imbus_version')")

    def count_schedules(self):
        self.env.cr.execute("SELECT count(*) FROM imbus_schedule")
        return self.env.cr.fetchone()[0]

    def test_ends_what_waits_or_runs_and_the_schedules(self):
        running = self.jobs.call(self.partner.read, queue='test')
        self.claim('test')
        ended = self.jobs.call(self.partner.read, queue='ended')
        self.env.cr.execute("SELECT ir_async_finish(%s, %s)", self.claim('ended'))
        waiting = self.jobs.call(self.partner.read, run_at=self.env.cr.now() + timedelta(days=365))
        self.schedule()
        self.env.cr.execute(self.neutralize)
        self.env.invalidate_all()
        self.assertEqual([job.state for job in (running, ended, waiting)], ['cancelled', 'done', 'cancelled'])
        self.assertEqual(self.count_schedules(), 0)

    def test_without_the_extension_nothing_happens(self):
        job = self.jobs.call(self.partner.read)
        self.schedule()
        self.env.flush_all()
        self.env.cr.execute("SET LOCAL search_path = pg_catalog")
        self.env.cr.execute(self.neutralize)
        self.env.cr.execute("RESET search_path")
        self.assertEqual((self.row(job.id)['state'], self.count_schedules()), ('created', 1))

    def test_what_is_touched_meanwhile_ends_by_a_job(self):
        def connect():
            return contextlib.closing(db_connect(self.env.cr.dbname).cursor())

        with connect() as server, connect() as odoo:
            server.execute("SELECT ir_async_schedule('hourly', '0 0 * * *', 'imbus_version')")
            server.execute("SELECT ir_async_call('read', model => 'res.partner', queue => 'touched', run_at => '2100-01-01')")
            job_id = server.fetchone()[0]
            server.commit()
            try:
                odoo.execute("SELECT 1")
                server.execute("SELECT ir_async_schedule('hourly', '0 * * * *', 'imbus_version')")
                server.execute("SELECT ir_async_cancel(%s), ir_async_retry(%s)", (job_id, job_id))
                server.commit()
                odoo.execute(self.neutralize)
                odoo.execute("SELECT method, args FROM ir_async WHERE state = 'created' ORDER BY id DESC LIMIT 2")
                self.assertEqual(odoo.fetchall(), [
                    ('public.ir_async_unschedule(text)', ['hourly']), ('public.ir_async_cancel(bigint)', [job_id]),
                ])
                odoo.rollback()
            finally:
                server.execute("SELECT ir_async_cancel(%s), ir_async_unschedule('hourly')", (job_id,))
                server.commit()
