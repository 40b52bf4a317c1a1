from unittest.mock import patch

from odoo import fields
from odoo.exceptions import UserError, ValidationError
from odoo.tests import HttpCase, tagged

from .. import runner
from .common import JobCase


@tagged('post_install', '-at_install')
class TestRun(JobCase, HttpCase):
    """The controller, asked as the server asks it."""

    def ask(self, **body):
        return self.opener.post(f'{self.base_url()}/imbus/async/run', json=body, timeout=60)

    def run_next(self, queue='test'):
        job_id, token = self.claim(queue)
        reply = self.ask(db=self.env.cr.dbname, id=job_id, token=token)
        self.env.invalidate_all()
        return reply

    def method(self, function, name='imbus_test'):
        """A method of res.partner for the length of this test."""
        model = type(self.env['res.partner'])
        function.__name__ = name
        patcher = patch.object(model, name, function, create=True)
        patcher.start()
        self.addCleanup(patcher.stop)
        return getattr(self.partner, name)

    def test_runs_as_user_with_context_and_ids(self):
        seen = {}

        def method(records, number, *, word):
            seen.update(ids=records.ids, uid=records.env.uid, su=records.env.su, context=dict(records.env.context))
            records.write({'name': f'{word} {number}'})
            return {'number': number}

        user = self.new_user('runs_as', 'base.group_user,base.group_partner_manager')
        target = self.method(method)
        records = target.__self__.with_user(user).with_context(word='from context')
        job = self.jobs.with_user(user).call(records.imbus_test, [7], {'word': 'seven'}, queue='test')
        reply = self.run_next()
        self.assertEqual((reply.status_code, reply.json()), (200, {'state': 'succeeded'}))
        self.assertEqual((seen['ids'], seen['uid'], seen['su']), (self.partner.ids, user.id, False))
        self.assertEqual((seen['context']['word'], seen['context']['async_job_id']), ('from context', job.id))
        self.assertEqual((job.state, job.payload, self.partner.name), ('succeeded', {'result': {'number': 7}}, 'seven 7'))
        self.assertTrue(job.with_user(user).complete())
        self.assertEqual(job.state, 'done')

    def test_an_action_is_one_that_a_page_can_open(self):
        for mode, views in (({}, ['list', 'form']), ({'view_mode': 'form'}, ['form'])):
            action = {'type': 'ir.actions.act_window', 'res_model': 'res.partner', 'name': 'Partners', **mode}
            job = self.jobs.call(self.method(lambda records, action=action: action), queue='test')
            self.run_next()
            found = job.payload['result']
            self.assertEqual((found['views'], found['name']), ([[False, view] for view in views], 'Partners'))
        # Whatever calls itself so.
        job = self.jobs.call(self.method(lambda records: {'type': 'ir.actions.nonsense'}), queue='test')
        self.run_next()
        self.assertEqual(job.payload, {'result': {'type': 'ir.actions.nonsense'}})

    def test_what_a_page_asks_for_comes_as_an_rpc_brings_it(self):
        attachment = self.env['ir.attachment'].create({'name': 'a file', 'datas': b'aW1idXM=', 'public': True})
        kwargs = {'context': dict(self.env.context)}
        call = ['ir.attachment', 'read', [attachment.ids, ['datas', 'create_date']], kwargs]
        job = self.jobs.browse(self.jobs.rpc(*call))
        self.run_next('default')
        [found] = job.payload['result']
        self.assertEqual((found['datas'], found['create_date']), ('aW1idXM=', fields.Datetime.to_string(attachment.create_date)))

    def test_no_result_is_done(self):
        self.jobs.call(self.method(lambda records: None), queue='test')
        self.assertEqual(self.run_next().json(), {'state': 'done'})

    def test_only_the_token_runs_it_and_only_once(self):
        calls = []
        job = self.jobs.call(self.method(lambda records: calls.append(1)), queue='test')
        job_id, token = self.claim('test')
        database = self.env.cr.dbname
        wrong = self.ask(db=database, id=job_id, token='0' * 32)
        self.assertEqual(wrong.status_code, 409)
        self.assertNotIn('res.partner', wrong.text)
        self.assertEqual(self.ask(db=database, id=job_id + 1000, token=token).status_code, 409)
        self.assertFalse(calls)
        self.assertEqual(self.ask(db=database, id=job_id, token=token).status_code, 200)
        self.assertEqual(self.ask(db=database, id=job_id, token=token).status_code, 409)
        self.assertEqual(len(calls), 1)
        self.env.invalidate_all()
        self.assertEqual(job.state, 'done')

    def test_refuses_garbage_and_foreign_databases(self):
        url = f'{self.base_url()}/imbus/async/run'
        token = '0' * 32
        for body in (b'', b'{', b'[]', b'null', b'"x"', b'\xff', b'[' * 1500, b'{"db": "x"}', b'x' * 5000):
            self.assertEqual(self.opener.post(url, data=body, timeout=60).status_code, 400, body[:20])
        database = self.env.cr.dbname
        for body in (
            {'db': database, 'id': '1', 'token': token}, {'db': database, 'id': True, 'token': token},
            {'db': database, 'id': -1, 'token': token}, {'db': database, 'id': 2 ** 63, 'token': token},
            {'db': database, 'id': 1, 'token': 'x'}, {'db': 'a\0b', 'id': 1, 'token': token}, {'db': 1, 'id': 1, 'token': token},
        ):
            self.assertEqual(self.ask(**body).status_code, 400, body)
        for name in ('postgres', 'template1', 'no_such_database', "x' OR 1=1", 'host=elsewhere'):
            self.assertEqual(self.ask(db=name, id=1, token=token).status_code, 404, name)

    def test_a_users_error_is_final_and_undoes_the_work(self):
        def method(records):
            records.name = 'half done'
            raise ValidationError('No, "thanks"')

        job = self.jobs.call(self.method(method), queue='test', max_attempts=5)
        self.assertEqual(self.run_next().json(), {'state': 'failed'})
        error = job.payload['error']
        self.assertEqual((error['code'], error['message']), (200, 'No, "thanks"'))
        self.assertEqual((error['data']['name'], error['data']['arguments']), ('odoo.exceptions.ValidationError', ['No, "thanks"']))
        self.assertIn('Traceback', error['data']['debug'])
        self.assertIn('Traceback', job.traceback)
        self.assertEqual(self.partner.name, 'Somebody')

    def test_other_errors_use_up_attempts(self):
        def method(records):
            raise ZeroDivisionError('by zero')

        job = self.jobs.call(self.method(method), queue='test', max_attempts=2, retry_delay='0')
        self.assertEqual(self.run_next().json(), {'state': 'created'})
        self.assertEqual(self.run_next().json(), {'state': 'failed'})
        self.assertEqual((job.attempts, job.payload['error']['data']['name']), (2, 'builtins.ZeroDivisionError'))

    def test_a_result_that_is_no_json_is_a_failure(self):
        def method(records):
            records.name = 'half done'
            return records

        job = self.jobs.call(self.method(method), queue='test')
        self.assertEqual(self.run_next().json(), {'state': 'failed'})
        self.assertIn('not JSON', job.payload['error']['message'])
        self.assertEqual(self.partner.name, 'Somebody')

    def test_a_job_cancelled_while_it_runs_is_undone(self):
        def method(records):
            records.name = 'half done'
            records.flush_recordset()
            records.env.cr.execute("SELECT ir_async_cancel(%s)", (records.env.context['async_job_id'],))

        job = self.jobs.call(self.method(method), queue='test')
        # In one transaction with the cancelling, which the rollback would undo: its failure is what is looked at.
        job_id, token = self.claim('test')
        with patch.object(runner, 'check_claim', side_effect=runner.JobLost()):
            reply = self.ask(db=self.env.cr.dbname, id=job_id, token=token)
        self.assertEqual(reply.status_code, 409)
        self.env.invalidate_all()
        self.assertEqual(self.partner.name, 'Somebody')
        self.assertFalse(job.payload)

    def test_progress_is_told_and_kept(self):
        seen = []

        def method(records):
            seen.append(records.env['ir.async'].progress(25, 'a quarter'))
            job = records.env['ir.async'].browse(records.env.context['async_job_id'])
            job.invalidate_recordset()
            seen.append((job.progress_percent, job.progress_message))

        self.jobs.call_notify('Slow', self.method(method))
        self.assertFalse(self.jobs.progress(50))
        self.assertEqual(self.run_next('default').json(), {'state': 'done'})
        self.assertEqual(seen, [True, (25.0, 'a quarter')])
        told = [payload.get('progress') for payload in self.notifications()]
        self.assertIn({'percent': 25, 'message': 'a quarter'}, told)

    def test_a_childs_traceback_tells_of_the_jobs_above_it(self):
        def grandchild(records):
            raise ZeroDivisionError('deep down')

        def child(records):
            records.env['ir.async'].call(records.imbus_grandchild, queue='test')

        def method(records):
            records.env['ir.async'].call(records.imbus_child, queue='test')

        self.method(grandchild, 'imbus_grandchild')
        self.method(child, 'imbus_child')
        parent = self.jobs.call(self.method(method), queue='test')
        for state in ('done', 'done', 'failed'):
            self.assertEqual(self.run_next().json(), {'state': state})
        failed = self.jobs.search([('method', '=', 'imbus_grandchild')])
        self.assertIn('deep down', failed.traceback)
        self.assertIn('res.partner.imbus_child', failed.traceback)
        self.assertIn(f'Enqueued by job {parent.id} (res.partner.imbus_test)', failed.traceback)
        self.assertNotIn('token', self.row(failed.id)['context'])

    def test_rpc_has_the_rights_of_its_user_and_no_more(self):
        user = self.new_user('rpc_user')
        jobs = self.jobs.with_user(user)
        job = self.jobs.browse(jobs.rpc('res.partner', 'read', [self.partner.ids, ['name']], {}))
        self.assertEqual(self.run_next('default').json(), {'state': 'succeeded'})
        self.assertEqual(job.payload['result'], [{'id': self.partner.id, 'name': 'Somebody'}])
        job = self.jobs.browse(jobs.rpc('ir.config_parameter', 'set_param', ['imbus.test', 'x'], {}))
        self.assertEqual(self.run_next('default').json(), {'state': 'failed'})
        self.assertEqual(job.payload['error']['data']['name'], 'odoo.exceptions.AccessError')
        admin = self.env.ref('base.user_admin')
        job = self.jobs.browse(self.jobs.with_user(admin).rpc('res.partner', 'create', [{'name': 'New'}], {}))
        self.assertEqual(self.run_next('default').json(), {'state': 'succeeded'})
        self.assertEqual(self.env['res.partner'].browse(job.payload['result']).name, 'New')

    def test_the_user_must_still_be_there(self):
        user = self.new_user('leaves')
        job = self.jobs.with_user(user).call(self.partner.with_user(user).read, queue='test')
        user.active = False
        self.assertEqual(self.run_next().json(), {'state': 'failed'})
        self.assertEqual(job.payload['error']['data']['name'], 'odoo.exceptions.UserError')

    def test_no_request_is_seen_in_a_job(self):
        from odoo.http import request
        seen = []
        self.jobs.call(self.method(lambda records: seen.append(bool(request))), queue='test')
        self.assertEqual(self.run_next().json(), {'state': 'done'})
        self.assertEqual(seen, [False])

    def test_a_users_error_has_its_text_only(self):
        def method(records):
            raise UserError('only this\0')

        job = self.jobs.call(self.method(method), queue='test')
        self.assertEqual(self.run_next().json(), {'state': 'failed'})
        self.assertEqual(job.payload['error']['message'], 'only this')
