from types import SimpleNamespace
from unittest.mock import patch

from odoo import sql_db
from odoo.exceptions import UserError
from odoo.tests import TransactionCase, tagged
from odoo.tools import mute_logger

from .. import runner

# What a session keeps when a transaction has ended.
LEAVE = """
    SET work_mem = '7MB'; CREATE TEMP TABLE left_over (); SELECT pg_advisory_lock_shared(1); LISTEN left_over;
    PREPARE left_over AS SELECT; DECLARE left_over CURSOR WITH HOLD FOR SELECT"""
LEFT = """
    SELECT current_setting('work_mem') = '7MB', to_regclass('pg_temp.left_over') IS NOT NULL,
           EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
           EXISTS (SELECT FROM pg_listening_channels()), EXISTS (SELECT FROM pg_prepared_statements),
           EXISTS (SELECT FROM pg_cursors WHERE name = 'left_over')"""
ME = "SELECT pg_backend_pid(), current_setting('transaction_isolation'), current_setting('transaction_read_only')"


@tagged('post_install', '-at_install')
class TestSession(TransactionCase):
    """The session that the jobs of one call share: a real one, beside that of the test."""

    def setUp(self):
        super().setUp()
        self.db = sql_db.db_connect(self.env.cr.dbname)
        self.session = runner.Session(SimpleNamespace(db_name=self.env.cr.dbname, cursor=self.db.cursor))
        self.addCleanup(self.session.close)

    def do(self, query):
        """What a job reads whose work is this query, or the last of these."""
        with self.session.cursor() as (cr, clean):
            cr.execute(clean + query)
            return cr.fetchall()

    def run_job(self, outcome):
        """Runs a job whose work is this query, or comes to this error. Returns its state, and how often that was tried."""
        job, count = runner.Job(self.env.cr.dbname, 1, 'x'), 0

        def work(cr, clean, _job):
            nonlocal count
            count += 1
            if isinstance(outcome, Exception):
                raise outcome
            cr.execute(clean + outcome)
            return 'done'

        with patch.object(runner, 'work', work), patch.object(runner, 'fail', lambda _registry, _job, error: repr(error)):
            return runner.run_job(self.session.registry, self.session, job), count

    def test_jobs_share_it_and_find_nothing_of_each_other(self):
        first = self.do(ME)
        self.assertEqual(first[0][1:], ('repeatable read', 'off'))
        self.assertEqual(self.do(f'{LEAVE}; {LEFT}'), [(True, True, True, False, True, True)])
        self.assertEqual(self.do(LEFT), [(False,) * 6])
        self.do(f'{LEAVE}; {LEFT}')
        with self.session.cursor() as (cr, clean):
            cr.execute(clean + LEFT)
            # A method may do so.
            cr.rollback()
            cr.execute(LEFT)
            self.assertEqual(cr.fetchall(), [(False,) * 6])
            cr.rollback()
            cr.connection.set_session('READ COMMITTED', readonly=True, deferrable=True, autocommit=True)
        self.assertEqual(self.do(ME), first)
        self.assertEqual(self.do("SHOW transaction_deferrable"), [('off',)])

    def test_cursors_are_their_jobs_own(self):
        with self.session.cursor() as (first, _clean):
            first.cache['left_over'] = True
            first.execute('SELECT 1')
        self.assertTrue(first.closed)
        with self.session.cursor() as (second, _clean):
            self.assertNotIn('left_over', second.cache)
            self.assertIsNot(first, second)
            second.execute('SELECT 1')
            # A method may do that, too.
            second.close()
        self.assertEqual(self.do('SELECT 2'), [(2,)])

    def test_who_fails_leaves_no_session(self):
        self.do('SELECT 1')
        self.assertEqual(self.run_job(UserError('no')), ("UserError('no')", 1))
        self.assertIsNone(self.session.holder)
        self.assertEqual(self.run_job('SELECT 1'), ('done', 1))
        with self.assertRaises(ZeroDivisionError), self.session.cursor() as (cr, clean):
            cr.execute(clean + 'SELECT 1')
            cr.postrollback.add(lambda: 1 / 0)
            raise UserError('no')
        self.assertEqual(self.run_job('SELECT 1'), ('done', 1))

    @mute_logger('odoo.sql_db')
    def test_a_connection_that_broke_in_between_costs_no_attempt(self):
        [(pid, *_rest)] = self.do(ME)
        with self.db.cursor() as cr:
            cr.execute('SELECT pg_terminate_backend(%s, 10000)', (pid,))
            self.assertTrue(cr.fetchone()[0])
        self.assertEqual(self.run_job('SELECT 1'), ('done', 2))
        self.assertNotEqual(self.do(ME)[0][0], pid)
        # One that breaks in each job is the job's own.
        state, count = self.run_job('SELECT pg_terminate_backend(pg_backend_pid())')
        self.assertEqual(count, 2)
        self.assertIn('Error', state)
