from datetime import datetime

from odoo import api
from odoo.exceptions import AccessError, UserError
from odoo.tests import tagged
from odoo.tools import SQL

from .common import JobCase


@tagged('post_install', '-at_install')
class TestCall(JobCase):

    def test_stores_records_user_context_and_su(self):
        partners = self.partner.with_user(self.env.ref('base.user_admin')).sudo().with_context(lang='en_US', deep={'a': [1]})
        job = self.jobs.call(partners.write, [{'name': 'x'}], queue='q')
        row = self.row(job.id)
        self.assertEqual((row['res_model'], row['method'], row['res_ids']), ('res.partner', 'write', partners.ids))
        self.assertEqual((row['args'], row['kwargs']), ([{'name': 'x'}], {}))
        self.assertEqual((row['user_id'], row['super_user']), (self.env.ref('base.user_admin').id, True))
        self.assertEqual((row['context']['lang'], row['context']['deep']), ('en_US', {'a': [1]}))
        self.assertEqual((job.state, job.queue, job.priority, job.attempts), ('created', 'q', 10, 0))

    def test_takes_the_options_of_sql(self):
        first = self.jobs.call(self.partner.read, [['name']], queue='q')
        job = self.jobs.call(
            self.partner.read, [['name']], queue='q', priority=3, run_at=datetime(2100, 1, 2, 3, 4, 5), max_attempts=4,
            retry_delay='5 seconds', timeout='2 minutes', identity_key='one', depends_on=first)
        row = self.row(job.id)
        self.assertEqual((row['priority'], row['max_attempts'], row['depends_on']), (3, 4, first.ids))
        self.assertEqual((row['retry_delay'], row['timeout']), ('00:00:05', '00:02:00'))
        self.assertEqual(job.run_at, datetime(2100, 1, 2, 3, 4, 5))
        self.assertEqual(self.jobs.call(self.partner.read, identity_key='one'), job)

    def test_a_described_job_takes_options_too(self):
        job = self.jobs.call(self.partner.read, [['name']], description='Reading', queue='q', priority=3, identity_key='two')
        self.assertEqual((job.name, job.queue, job.priority), ('Reading', 'q', 3))
        unseen = self.jobs.call(self.partner.read, description='Unseen', notify=False, queue='q')
        silent = self.jobs.call(self.partner.read, queue='q')
        hidden = self.jobs.call(self.partner.read, notify=True, queue='q')
        told = {payload['id']: payload['name'] for payload in self.notifications()}
        self.assertEqual(told.get(job.id), 'Reading')
        self.assertIsNone(told[hidden.id])
        self.assertFalse(told.keys() & {unseen.id, silent.id})
        self.assertEqual((unseen.name, hidden.name), ('Unseen', False))
        self.assertIn(job.id, [seen['id'] for seen in self.jobs.watch()])

    def test_refuses_what_cannot_be_stored(self):
        for target in ('write', len, self.partner, lambda: None):
            with self.assertRaises(TypeError):
                self.jobs.call(target)
        with self.assertRaises(TypeError):
            self.jobs.call(self.partner.write, [self.partner])
        for no_json in (object(), {'en_US', 'fr_FR'}, set(), b'bytes', {1: 'a key that is no text'}, [{'deep': {2: 3}}], iter([])):
            with self.assertRaises(TypeError):
                self.jobs.call(self.partner.write, kwargs={'vals': no_json})
            with self.assertRaises(TypeError):
                self.jobs.call(self.partner.with_context(thing=no_json).write, [{}])
        with self.assertRaises(TypeError):
            self.jobs.call(self.partner.with_context(thing=object()).write, [{}])
        with self.assertRaises(ValueError):
            self.jobs.call(self.partner.write, [float('nan')])
        with self.assertRaises(ValueError):
            self.jobs.call(self.env['res.partner'].new({}).write, [{}])
        with self.assertRaises(TypeError):
            self.jobs.call(self.partner.write, [{}], sooner=True)

    def test_call_notify_tells_the_user_of_each_state(self):
        job = self.jobs.call_notify('Reading', self.partner.read, ['name'])
        hidden = self.jobs.call_notify(False, self.partner.read, ['name'])
        told = {payload['id']: payload for payload in self.notifications()}
        self.assertEqual(told[job.id], {'id': job.id, 'name': 'Reading', 'state': 'created', 'payload': None})
        self.assertIsNone(told[hidden.id]['name'])
        # Whose job it is hears of it.
        other = self.new_user('told_user')
        theirs = self.jobs.call_notify('Theirs', self.partner.with_user(other).read, ['name'])
        self.assertEqual(theirs.user_id, other)
        self.assertIn(f'"res.partner",{other.partner_id.id}]', self.row(theirs.id)['notify'].replace(' ', ''))
        self.assertIn(f'"res.partner",{self.env.user.partner_id.id}]', self.row(job.id)['notify'].replace(' ', ''))

    def test_others_see_and_touch_nothing(self):
        mine, other = self.new_user('one_user'), self.new_user('other_user')
        job = self.jobs.with_user(mine).call_notify('Mine', self.partner.with_user(mine).read, ['name'])
        self.assertEqual(self.jobs.with_user(mine).search([]), job)
        self.assertFalse(self.jobs.with_user(other).search([]))
        self.assertEqual([told['id'] for told in self.jobs.with_user(mine).watch()], job.ids)
        self.assertFalse(self.jobs.with_user(other).watch(job.ids))
        theirs = job.with_user(other)
        for attempt in (theirs.cancel, theirs.retry, theirs.complete):
            with self.assertRaises(AccessError):
                attempt()
        with self.assertRaises(AccessError):
            theirs.read(['state'])
        self.assertTrue(job.with_user(mine).cancel())
        self.assertEqual(job.state, 'cancelled')
        admin = self.env.ref('base.user_admin')
        self.assertIn(job, self.jobs.with_user(admin).search([]))
        self.assertTrue(job.with_user(admin).retry())
        self.assertEqual(job.state, 'created')
        # What was shown to its user is its user's to complete.
        with self.assertRaises(AccessError):
            job.with_user(admin).complete()

    def test_a_user_who_is_gone_is_no_user(self):
        user = self.new_user('gone_user')
        job = self.jobs.with_user(user).call_notify('Left behind', self.partner.with_user(user).read, ['name'])
        self.env.cr.execute("SELECT ir_async_call('read', '[]', model => 'res.partner', user_id => 2000000000)")
        never = self.jobs.browse(self.env.cr.fetchone()[0])
        self.env.flush_all()
        user.unlink()
        jobs = (job | never).with_user(self.env.ref('base.user_admin'))
        domain = [('id', 'in', jobs.ids)]
        columns = {'state': {}, 'user_id': {'fields': {'display_name': {}}}}
        listed = jobs.web_search_read(domain, columns)
        self.assertEqual([(row['id'], row['user_id']) for row in listed['records']], [(never.id, False), (job.id, False)])
        self.assertEqual([row['user_id'] for row in jobs.web_read(columns)], [False, False])
        groups = jobs._read_group(domain, ['user_id'], ['__count'])
        self.assertEqual([(group.display_name, count) for group, count in groups], [(False, 2)])
        self.assertTrue(job.with_user(self.env.ref('base.user_admin')).cancel())

    def test_a_users_jobs_are_found_by_the_index(self):
        user = self.new_user('index_user')
        self.env.cr.execute("SET LOCAL enable_seqscan = off")
        for jobs, domain in ((self.jobs, [('user_id', '=', user.id)]), (self.jobs.with_user(user), [])):
            query = jobs._search([*domain, ('name', '!=', False)])
            self.env.cr.execute(SQL("EXPLAIN %s", query.select()))
            self.assertIn('ir_async_user_index', '\n'.join(line for (line,) in self.env.cr.fetchall()))

    def test_a_failed_job_is_discarded(self):
        job = self.jobs.call(self.partner.read, queue='test')
        self.env.cr.execute("SELECT ir_async_fail(%s, %s, %s)", (*self.claim('test'), '"broken"'))
        self.env.invalidate_all()
        self.assertEqual(job.state, 'failed')
        self.assertTrue(job.cancel())
        self.assertEqual(job.state, 'cancelled')

    def test_no_writes_through_the_orm(self):
        job = self.jobs.call(self.partner.read)
        for attempt in (lambda: job.write({'name': 'x'}), job.unlink, lambda: self.jobs.create({'name': 'x'})):
            with self.assertRaises(UserError):
                attempt()

    def test_rpc_enqueues_public_methods_only(self):
        user = self.new_user('rpc_user')
        jobs = self.jobs.with_user(user)
        for method in ('_write', '__init__', '_search'):
            with self.assertRaises(AccessError):
                jobs.rpc('res.partner', method, [self.partner.ids], {})
        with self.assertRaises(AttributeError):
            jobs.rpc('res.partner', 'no_such_method', [self.partner.ids], {})
        for args in ([], ['x'], [['1']]):
            with self.assertRaises(UserError):
                jobs.rpc('res.partner', 'read', args, {})
        with self.assertRaises(UserError):
            jobs.rpc('no.model', 'read', [[]], {})
        # Server code's own entries are none for RPC: a target is a method, which no JSON is.
        with self.assertRaises(AccessError if hasattr(api, 'private') else TypeError):
            jobs.rpc('ir.async', 'call', ['write'], {})

    def test_rpc_stores_ids_and_context_as_call_kw_takes_them(self):
        user = self.new_user('rpc_user')
        jobs = self.jobs.with_user(user)
        row = self.row(jobs.rpc('res.partner', 'read', [self.partner.ids, ['name']], {'context': {'lang': 'en_US'}}))
        self.assertEqual((row['res_ids'], row['args'], row['kwargs']), (self.partner.ids, [['name']], {}))
        self.assertEqual((row['context']['lang'], row['user_id'], row['super_user']), ('en_US', user.id, False))
        row = self.row(jobs.rpc('res.partner', 'search', [[['id', '=', 1]]], {'limit': 1}))
        self.assertEqual((row['res_ids'], row['args'], row['kwargs']), (None, [[['id', '=', 1]]], {'limit': 1}))
