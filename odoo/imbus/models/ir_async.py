import inspect
import json

from odoo import _, api, fields, models
from odoo.exceptions import AccessError, UserError
from odoo.service.model import get_public_method

from .. import runner
from ..hooks import check_extension

# Server code only. api.private is not in the first 18.0.
private = getattr(api, 'private', lambda method: method)

STATES = [
    ('created', 'Waiting'),
    ('processing', 'Running'),
    ('succeeded', 'Result waits'),
    ('done', 'Done'),
    ('failed', 'Failed'),
    ('cancelled', 'Cancelled'),
]

# Options of a job, with the SQL types of ir_async_call's arguments.
OPTIONS = {
    'queue': 'text', 'priority': 'integer', 'run_at': 'timestamptz', 'max_attempts': 'integer',
    'retry_delay': 'interval', 'timeout': 'interval', 'identity_key': 'text', 'depends_on': 'bigint[]',
}


class IrAsync(models.Model):
    """The extension's table of jobs. It is read here; changes go through the extension's functions only."""

    _name = 'ir.async'
    _description = 'Asynchronous Job'
    _auto = False
    _table = 'ir_async'
    _order = 'id desc'

    name = fields.Char('Description', readonly=True)
    state = fields.Selection(STATES, readonly=True)
    res_model = fields.Char('Model', readonly=True)
    method = fields.Char(readonly=True)
    queue = fields.Char(readonly=True)
    priority = fields.Integer(readonly=True)
    create_date = fields.Datetime('Created on', readonly=True)
    run_at = fields.Datetime('Not before', readonly=True)
    claimed_at = fields.Datetime('Started on', readonly=True)
    finished_at = fields.Datetime('Finished on', readonly=True)
    attempts = fields.Integer(readonly=True)
    max_attempts = fields.Integer(readonly=True)
    user_id = fields.Many2one('res.users', 'User', readonly=True)
    traceback = fields.Text(readonly=True)
    payload = fields.Json(readonly=True)
    payload_text = fields.Text('Result', compute='_compute_payload_text')
    progress_percent = fields.Float('Progress', readonly=True, help='In percent, while the job runs')
    progress_message = fields.Char('Progress message', readonly=True)

    # The columns as Odoo's fields want them: times without zone, in UTC, the progress of what is being processed, and no user
    # who is not there: the table has no foreign key. A filter on the user makes the join an inner one, and finds the index.
    @property
    def _table_query(self):
        return """
            SELECT j.id, j.name, j.state, j.res_model, j.method, j.queue, j.priority, j.create_date,
                   CASE WHEN isfinite(j.run_at) THEN j.run_at AT TIME ZONE 'UTC' END AS run_at,
                   j.claimed_at AT TIME ZONE 'UTC' AS claimed_at, j.finished_at AT TIME ZONE 'UTC' AS finished_at,
                   j.attempts, j.max_attempts, u.id AS user_id, j.traceback, j.payload,
                   p.percent AS progress_percent, p.message AS progress_message
              FROM ir_async j
              LEFT JOIN res_users u ON u.id = j.user_id
              LEFT JOIN imbus_progress p ON p.job_id = j.id AND j.state = 'processing' AND p.at >= j.claimed_at"""

    def init(self):
        """Raises UserError where the extension is missing, so that no update goes half through either."""
        check_extension(self.env.cr)

    def _check_removed_columns(self, log=False):
        # Columns without a field are the extension's, as the table is.
        return

    @api.depends('payload')
    def _compute_payload_text(self):
        for job in self:
            job.payload_text = json.dumps(job.payload, indent=2, ensure_ascii=False) if job.payload else False

    @api.depends('name', 'res_model', 'method')
    def _compute_display_name(self):
        for job in self:
            job.display_name = job.name or f'{job.res_model or "SQL"}: {job.method}'

    @api.model_create_multi
    def create(self, vals_list):
        """Raises UserError: jobs are enqueued by call()."""
        raise UserError(_('Jobs are enqueued by call(), not created.'))

    def write(self, vals):
        """Raises UserError: jobs change through cancel(), retry() and complete()."""
        raise UserError(_('Jobs cannot be written.'))

    def unlink(self):
        """Raises UserError: the extension removes what has ended, after imbus.job_retention; what has failed, once it is
        cancelled."""
        raise UserError(_('Jobs cannot be deleted: they go after imbus.job_retention, failed ones when they are cancelled.'))

    # ---------------------------------------------------------------- enqueueing

    @private
    def call(self, target, args=None, kwargs=None, *, description=None, notify=None, **options):
        """Enqueues a call in the current transaction.

        :param target: a method bound to a recordset, private or not; its records, user, context and superuser mode are
            those of the job
        :param list args: positional arguments, JSON
        :param dict kwargs: named arguments, JSON
        :param str description: what the systray shows; the job is not listed there without
        :param bool notify: whether its user is notified at each state; None: if it has a description
        :param options: `queue` (text), `priority` (smaller first, 10), `run_at` (datetime in UTC), `max_attempts` (1),
            `retry_delay` and `timeout` (timedelta, or text such as "10 minutes"), `identity_key` (an unfinished job with
            the same key is returned instead), `depends_on` (jobs, or their ids)
        :return: the job
        :raises TypeError: for a target that is no method of records, arguments or a context that are not JSON, an
            unknown option
        :raises ValueError: for records that are not saved, or numbers that JSON has not
        """
        return self._enqueue(target, args, kwargs, options, description, bool(description) if notify is None else notify)

    @private
    def call_notify(self, description, method, *args, **kwargs):
        """Enqueues a call, with a notification to its user at each state: the one that the method's records are bound to.

        :param str description: as :meth:`call`
        :param method: a method bound to a recordset
        :param args: its arguments, JSON
        :param kwargs: its named arguments, JSON
        :return: the job
        :raises: as :meth:`call`
        """
        return self._enqueue(method, args, kwargs, {}, description, is_told=True)

    @api.model
    def _enqueue(self, target, args, kwargs, options, description, is_told):
        records = getattr(target, '__self__', None)
        if not inspect.ismethod(target) or not isinstance(records, models.BaseModel):
            raise TypeError(f'{target!r} is no method of a recordset')
        name = target.__name__
        if getattr(getattr(type(records), name, None), '__name__', None) != name or not callable(getattr(records, name)):
            raise TypeError(f'the model {records._name} has no method {name}')
        if any(not isinstance(record_id, int) for record_id in records._ids):
            raise ValueError(f'{records}: only saved records can be in a job')
        call = {
            'target': name, 'args': list(args or []), 'kwargs': dict(kwargs or {}), 'model': records._name,
            'res_ids': list(records._ids), 'user_id': records.env.uid, 'su': records.env.su,
            'context': dict(records.env.context),
        }
        return self._insert(call, options, description or None, records.env.user if is_told else None)

    @api.model
    def _call_rpc(self, model, method, args, kwargs, description=None):
        """Enqueues what an RPC would have called: as the current user, with no more rights, if the method is public.
        Notifies the user; returns the job's id."""
        if not (isinstance(model, str) and isinstance(method, str) and isinstance(args, list) and isinstance(kwargs, dict)
                and (description is None or isinstance(description, str))):
            raise UserError(_('A call is made of a model, a method, a list of arguments and an object of named ones.'))
        if model not in self.env:
            raise UserError(_('The model %s does not exist.', model))
        function = get_public_method(self.env[model], method)
        kwargs = dict(kwargs)
        context = kwargs.pop('context', None) or {}
        if not isinstance(context, dict):
            raise UserError(_('The context must be an object.'))
        # 19.0 marks the methods of a model by one name, 18.0 by another.
        is_model = getattr(function, '_api_model', False) or getattr(function, '_api', None) in ('model', 'model_create')
        ids = None
        if not is_model:
            if not args:
                raise UserError(_('The first argument must be the ids of the records.'))
            ids, args = args[0], args[1:]
            ids = [ids] if type(ids) is int else ids or []
            if not isinstance(ids, list) or not all(type(record_id) is int for record_id in ids):
                raise UserError(_('The ids must be integers.'))
        call = {
            'target': method, 'args': args, 'kwargs': kwargs, 'model': model, 'res_ids': ids, 'user_id': self.env.uid,
            'su': False, 'context': {**context, runner.RPC: True},
        }
        return self._insert(call, {}, description or None, self.env.user).id

    @api.model
    def _insert(self, call, options, description, user):
        unknown = set(options) - set(OPTIONS)
        if unknown:
            raise TypeError(f'a job has no option {", ".join(sorted(unknown))}')
        context = call['context']
        context.pop('async_job_id', None)
        context.pop(runner.TRACE, None)
        if trace := runner.trace_for_child(self.env.cr.dbname):
            context[runner.TRACE] = trace
        values = {
            'target': ('text', call['target']), 'model': ('text', call['model']), 'user_id': ('integer', call['user_id']),
            'su': ('boolean', call['su']), 'res_ids': ('bigint[]', call['res_ids']), 'description': ('text', description),
        }
        for part in ('args', 'kwargs', 'context'):
            try:
                values[part] = 'jsonb', runner.dumps_argument(call[part])
            except (TypeError, ValueError) as error:
                raise type(error)(f'{part} of a job on {call["model"]}.{call["target"]}: {error}') from error
        if user:
            # Where res.users sends its notifications.
            values['notify'] = 'jsonb', json.dumps(['res.partner', user.sudo().partner_id.id])
        for option, value in options.items():
            if value is not None:
                values[option] = OPTIONS[option], self._option(option, value)
        named = ', '.join(f'{name} => %s::{sql_type}' for name, (sql_type, _value) in values.items())
        self.env.cr.execute(f'SELECT ir_async_call({named})', [value for _type, value in values.values()])
        job = self.browse(self.env.cr.fetchone()[0])
        # With an identity_key it may be known already.
        job.invalidate_recordset()
        return job

    @api.model
    def _option(self, option, value):
        if option == 'depends_on':
            return list(value.ids if isinstance(value, models.BaseModel) else value)
        if option == 'run_at':
            # Odoo's times are in UTC and do not say so.
            return fields.Datetime.to_string(value) + '+00'
        return value

    # ---------------------------------------------------------------- controlling

    def _check_own(self, or_admin=True):
        """Raises AccessError unless all are the current user's (or that user is an administrator)."""
        if or_admin and self.env.is_system():
            return
        self.check_access('read')
        if any(job.user_id.id != self.env.uid for job in self.sudo()):
            raise AccessError(_('Only their own user may do that with these jobs.'))

    def _control(self, function):
        changed = True
        for job in self:
            self.env.cr.execute(f'SELECT {function}(%s)', (job.id,))
            changed = self.env.cr.fetchone()[0] and changed
        self.invalidate_recordset()
        return changed

    def complete(self):
        """Turns succeeded jobs of the current user into done ones: their results have been seen.

        :return: True; jobs that wait, run, have failed or are done already stay as they are
        :raises AccessError: for somebody else's jobs
        """
        self._check_own(or_admin=False)
        self.invalidate_recordset(['state'])
        self.filtered(lambda job: job.state == 'succeeded')._control('ir_async_complete')
        return True

    def cancel(self):
        """Cancels jobs that wait, run or have failed. What a running one does is undone, at its next word to the database;
        a failed one is discarded, which the extension would keep.

        :return: whether all were there to be cancelled
        :raises AccessError: for somebody else's jobs, unless the user is an administrator
        """
        self._check_own()
        return self._control('ir_async_cancel')

    def retry(self):
        """Brings failed and cancelled jobs back.

        :return: whether all came back
        :raises AccessError: for somebody else's jobs, unless the user is an administrator
        :raises UserError: for jobs that have succeeded
        """
        self._check_own()
        self.invalidate_recordset(['state'])
        if self.filtered(lambda job: job.state in ('succeeded', 'done')):
            raise UserError(_('Only jobs that have failed or were cancelled can be retried.'))
        return self._control('ir_async_retry')

    @private
    def progress(self, percent, message=None):
        """Tells how far the job is in which this is called, at once, whatever becomes of its transaction. The job's
        timeout begins anew.

        :param float percent: 0 to 100, or None
        :param str message: what is being done, or None
        :return: True; False outside a job, where nothing happens
        :raises imbus.runner.JobLost: when the job was taken away meanwhile (cancelled, timed out): let it pass
        """
        return runner.progress(self.env.registry, percent, message)

    # ---------------------------------------------------------------- the browser's side

    @api.model
    def rpc(self, model, method, args, kwargs, description=None):
        """Enqueues what an RPC would have called: as the current user and with no more rights, if the method is public.
        The user is notified at each state.

        :param str model: name of a model
        :param str method: name of a public method
        :param list args: positional arguments, the ids first unless it is a method of the model
        :param dict kwargs: named arguments, and `context`
        :param str description: what the systray shows; nothing without
        :return: the job's id
        :raises AccessError: for a private method
        :raises UserError: for a malformed call
        """
        return self._call_rpc(model, method, args, kwargs, description)

    @api.model
    def watch(self, ids=()):
        """The current user's jobs that a page follows, as notifications tell them.

        :param list ids: jobs that are awaited, whatever their state
        :return: `{"id", "name", "state", "payload", "progress"}` of these, and of all with a description that wait, run,
            have a result to be seen, or have failed within a day; the oldest first. At most 200 of the latter.
        """
        domain = [('user_id', '=', self.env.uid)]
        day_ago = fields.Datetime.subtract(fields.Datetime.now(), days=1)
        seen = [
            *domain, ('name', '!=', False), '|', ('state', 'in', ('created', 'processing', 'succeeded')),
            '&', ('state', '=', 'failed'), ('finished_at', '>', day_ago),
        ]
        jobs = self.sudo().search(seen, limit=200)
        if ids:
            jobs |= self.sudo().search([*domain, ('id', 'in', [job_id for job_id in ids if type(job_id) is int])])
        jobs.invalidate_recordset()
        return [{
            'id': job.id,
            'name': job.name or None,
            'state': job.state,
            'payload': job.payload or None,
            'progress': {'percent': job.progress_percent, 'message': job.progress_message or None}
            if job.state == 'processing' and (job.progress_percent or job.progress_message) else None,
        } for job in jobs.sorted('id')]
