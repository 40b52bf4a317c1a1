"""Runs jobs that the server has claimed: rebuilds each one's environment, calls its method, and settles it through SQL.

Short jobs are claimed under one token and run one after another, in order, each in a transaction of its own.
The fencing token stays here, out of the reach of contexts, which travel.
"""
import contextlib
import datetime
import json
import logging
import threading
import traceback
from collections.abc import Mapping
from contextvars import ContextVar

import psycopg2
from psycopg2 import errors

from odoo import api, fields, http, sql_db
from odoo.addons.web.controllers.utils import clean_action
from odoo.exceptions import RedirectWarning, UserError
from odoo.models import BaseModel
from odoo.modules.registry import Registry
from odoo.service import db as service_db
from odoo.service.model import get_public_method, retrying
from odoo.tools import config, lazy

try:
    from odoo.service.model import call_kw
except ImportError:  # 18.0
    from odoo.api import call_kw
try:
    from odoo.tools import json_default
except ImportError:  # the first 18.0
    from odoo.tools.date_utils import json_default

_logger = logging.getLogger(__name__)

# Keys of a stored context that are the runner's, and not the method's.
TRACE, RPC = 'async_trace', 'async_rpc'
# How much is kept of where a job's ancestors enqueued it.
TRACE_DEPTH, TRACE_LENGTH = 5, 4000

CLAIMED = "SELECT 1 FROM ir_async WHERE id = %s AND token = %s AND state = 'processing'"
# For the transaction that does the work: from here on it is not given back as one that only waits. With it come whether its
# user is active, NULL for none, and the job that is to follow.
BEGIN_JOB = """
    SELECT b.model, b.res_ids, b.target, b.args, b.kwargs, b.user_id, b.context, b.su,
           (SELECT u.active FROM res_users u WHERE u.id = b.user_id), b.following
      FROM ir_async_begin(%s, %s) b"""

# What Odoo's pool has psycopg2 do before a session is used again (DISCARD ALL, and its own setting), but for DISCARD PLANS. Committed,
# so that a method's own rollback does not bring back what another job has left; the transaction after it is as psycopg2 began this one.
CLEAN = """
    CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; SET datestyle TO 'ISO'; DEALLOCATE ALL; UNLISTEN *;
    SELECT pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES; COMMIT AND CHAIN;"""


class JobLost(Exception):
    """The job is not this runner's any more: it was cancelled, its time is over, or its token is wrong."""


class Unavailable(Exception):
    """No such database, or no add-on imbus in it."""


class Job:
    """The job that this thread works on."""

    def __init__(self, dbname, job_id, token):
        self.dbname = dbname
        self.id = job_id
        self.token = token
        self.label = ''
        self.trace = []
        self.following = None
        self.is_begun = False


current = ContextVar('imbus_job', default=None)


def trace_for_child(dbname):
    """What a job enqueued now is to remember of the jobs above it: a list of {"id", "call", "stack"}, newest first."""
    job = current.get()
    if job is None or job.dbname != dbname:
        return []
    stack = ''.join(traceback.format_stack()[:-2])[-TRACE_LENGTH:]
    return [{'id': job.id, 'call': job.label, 'stack': stack}, *job.trace][:TRACE_DEPTH]


def dumps(value):
    """JSON of a result. Dates become text as in Odoo's RPC, and domains lists. Raises TypeError or ValueError for the rest."""
    def default(thing):
        if isinstance(thing, lazy):
            return thing._value
        if isinstance(thing, datetime.datetime):
            return fields.Datetime.to_string(thing)
        if isinstance(thing, datetime.date):
            return fields.Date.to_string(thing)
        if isinstance(thing, BaseModel):
            raise TypeError(f'the recordset {thing} is not JSON: pass its ids')
        if isinstance(thing, Mapping):
            return dict(thing)
        if isinstance(thing, getattr(fields, 'Domain', ())):  # 19.0
            return list(thing)
        raise TypeError(f'a {type(thing).__name__} is not JSON')
    return json.dumps(value, default=default, allow_nan=False)


def dumps_argument(value):
    """JSON of an argument: it is the same when the method gets it, but for dates and tuples. Raises as :func:`dumps`."""
    def check(thing):
        if isinstance(thing, Mapping):
            for key, inner in thing.items():
                if not isinstance(key, str):
                    raise TypeError(f'the key {key!r} is not JSON: only text is')
                check(inner)
        elif isinstance(thing, (list, tuple)):
            for inner in thing:
                check(inner)

    check(value)
    return dumps(value)


def is_served(dbname):
    """Whether this Odoo serves a database of that name. A dbfilter that depends on the request's host cannot be asked:
    the server calls by Odoo's own address."""
    try:
        names = service_db.list_dbs(force=True)
    except psycopg2.OperationalError:
        return False
    if dbname not in names:
        return False
    pattern = config['dbfilter'] or ''
    return '%h' in pattern or '%d' in pattern or bool(http.db_filter([dbname], host=''))


def open_cursor(dbname):
    """A cursor, without loading a registry for it."""
    if dbname in Registry.registries:
        return Registry.registries[dbname].cursor()
    return sql_db.db_connect(dbname).cursor()


def check_claim(dbname, job_id, token):
    """Raises Unavailable or JobLost. A caller without the token does not even make Odoo load a registry."""
    if not is_served(dbname):
        raise Unavailable()
    try:
        with contextlib.closing(open_cursor(dbname)) as cr:
            cr.execute("SELECT to_regclass('ir_async') IS NOT NULL AND to_regclass('ir_module_module') IS NOT NULL")
            if not cr.fetchone()[0]:
                raise Unavailable()
            cr.execute("SELECT 1 FROM ir_module_module WHERE name = 'imbus' AND state IN ('installed', 'to upgrade')")
            if not cr.rowcount:
                raise Unavailable()
            cr.execute(CLAIMED, (job_id, token))
            if not cr.rowcount:
                raise JobLost()
    except psycopg2.OperationalError as error:
        raise Unavailable() from error


@contextlib.contextmanager
def background(job):
    """Like a cron job: no HTTP request is to be seen, and the logs name the database."""
    mark = current.set(job)
    http._request_stack.push(None)
    threading.current_thread().dbname = job.dbname
    try:
        yield
    finally:
        http._request_stack.pop()
        current.reset(mark)


def run(dbname, job_id, token):
    """Runs the claimed job, and those that follow under its token, and settles them; returns the last one's new state.
    Raises Unavailable, JobLost (nothing was done)."""
    if dbname not in Registry.registries:
        check_claim(dbname, job_id, token)
    # One that is loaded is served, and the claim is checked by the transaction that does the work.
    registry = Registry(dbname).check_signaling()
    if 'ir.async' not in registry:
        raise Unavailable()
    state = None
    with contextlib.closing(Session(registry)) as session:
        while job_id:
            job = Job(dbname, job_id, token)
            try:
                state = run_job(registry, session, job)
            except JobLost:
                # Whatever the server has not given back yet, it gives back when the call ends.
                if state is None:
                    raise
                break
            job_id = job.following
    return state


class Session:
    """A session of the database for jobs that are run one after another. Each finds it as a request finds that which it
    borrows, but for the plans that the server has made: to throw them away, as the pool does, takes longer than a short job.
    For the cursors it is the pool (:class:`odoo.sql_db.ConnectionPool`), with one connection to lend."""

    readonly = False

    def __init__(self, registry):
        self.registry = registry
        # The cursor whose connection the others use.
        self.holder = None
        # A job has had it.
        self.is_used = False

    def borrow(self, _connection_info):
        """The connection, whatever is asked for."""
        return self.holder.connection

    def give_back(self, connection, keep_in_pool=True):
        """It is kept."""

    def close(self):
        """Gives the connection back to where it comes from."""
        holder, self.holder, self.is_used = self.holder, None, False
        if holder is not None:
            holder.close()

    @contextlib.contextmanager
    def cursor(self):
        """A cursor for one job, and what is to be said first in its transaction. A job that fails leaves no session."""
        if self.holder is not None and self.holder.closed:
            self.close()
        if self.holder is None:
            cr = self.registry.cursor()
            if type(cr) is not sql_db.Cursor:
                # A test's, which are all one transaction.
                with cr:
                    yield cr, ''
                return
            self.holder = cr
        try:
            self.holder.connection.set_session(deferrable='DEFAULT')
            with sql_db.Cursor(self, self.registry.db_name, {}) as cr:
                # Also before the first one: pgbouncer may have another session behind it than the one that the pool has cleaned.
                yield cr, CLEAN
            self.is_used = True
        except BaseException:
            self.close()
            raise


def run_job(registry, session, job):
    """Runs a job and settles it; returns its new state. Raises JobLost."""
    with background(job):
        is_used = session.is_used
        try:
            with session.cursor() as (cr, clean):
                return work(cr, clean, job)
        except JobLost:
            raise
        except (errors.ObjectNotInPrerequisiteState, errors.SerializationFailure) as error:
            # Whichever statement met it: is the job still ours?
            check_claim(job.dbname, job.id, job.token)
            failure = error
        except Exception as error:  # noqa: BLE001 whatever a method raises is the job's failure
            failure = error
        if is_used and not job.is_begun and isinstance(failure, (psycopg2.InterfaceError, psycopg2.OperationalError)):
            # The connection broke while nobody needed it: as the pool does, with another one.
            return run_job(registry, session, job)
        return fail(registry, job, failure)


def work(cr, clean, job):
    """Calls the method and finishes the job in one transaction, which `clean` goes before, and is retried as a request is."""
    env = api.Environment(cr, api.SUPERUSER_ID, {})

    def attempt():
        # Again at each try: a job taken away meanwhile is not run once more.
        env.cr.execute(clean + BEGIN_JOB, (job.id, job.token))
        row = env.cr.fetchone()
        if row is None:
            raise JobLost()
        job.is_begun = True
        *asked, job.following = row
        result = call(env, job, *asked)
        env.flush_all()
        env.cr.execute("SELECT ir_async_finish(%s, %s, %s::jsonb)", (job.id, job.token, result))
        return 'done' if result == 'null' else 'succeeded'

    return retrying(attempt, env)


def call(env, job, model, ids, method, args, kwargs, user_id, context, su, is_active):
    """The method's result as JSON: as an RPC's where a page has asked, and an action as one that a button returns."""
    context = dict(context or {})
    job.label = f'{model}.{method}'
    job.trace = context.pop(TRACE, None) or []
    is_rpc = context.pop(RPC, False)
    context['async_job_id'] = job.id
    uid = user_id or api.SUPERUSER_ID
    if uid != api.SUPERUSER_ID and not is_active:
        raise UserError(env._('The user of job %(job)s does not exist, or is not active.', job=job.id))
    threading.current_thread().uid = uid
    env = api.Environment(env.cr, uid, context, bool(su))
    if hasattr(env.transaction, 'default_env'):  # 19.0
        env.transaction.default_env = env
    if model not in env:
        raise UserError(env._('The model %(model)s of job %(job)s does not exist.', model=model, job=job.id))
    if is_rpc:
        get_public_method(env[model], method)
        args = args if ids is None else [ids, *args]
        result = call_kw(env[model], method, args, {**kwargs, 'context': context})
    else:
        result = getattr(env[model].browse(ids or []), method)(*args, **kwargs)
    kind = result.get('type') if isinstance(result, dict) else None
    if isinstance(kind, str) and kind.startswith('ir.actions.') and kind in env:
        defaults = {'view_mode': 'list,form'} if kind == 'ir.actions.act_window' else {}
        result = clean_action({**defaults, **result}, env)
    return json.dumps(result, default=json_default, allow_nan=False) if is_rpc else dumps(result)


def fail(registry, job, error):
    """Records a failure; returns the job's state. Raises JobLost."""
    said = describe(error, job)
    level = logging.INFO if said.get('retry') is False else logging.WARNING
    _logger.log(level, 'job %s (%s) failed: %s', job.id, job.label, said['message'], exc_info=error)
    try:
        with registry.cursor() as cr:
            cr.execute("SELECT ir_async_fail(%s, %s, %s::jsonb)", (job.id, job.token, json.dumps(said)))
            cr.execute("SELECT state FROM ir_async WHERE id = %s", (job.id,))
            return cr.fetchone()[0]
    except (errors.ObjectNotInPrerequisiteState, errors.SerializationFailure) as lost:
        raise JobLost() from lost


def describe(error, job):
    """A failure as an RPC tells it, with the stacks of the jobs that enqueued this one."""
    def is_json(value):
        with contextlib.suppress(TypeError, ValueError):
            dumps(value)
            return True
        return False

    kind = type(error)
    # jsonb has no NUL.
    text = (str(error.args[0]) if isinstance(error, (UserError, RedirectWarning)) and error.args else str(error)).replace('\0', '')
    debug = ''.join(traceback.format_exception(kind, error, error.__traceback__)).replace('\0', '')
    for parent in job.trace:
        debug += f"\nEnqueued by job {parent['id']} ({parent['call']}), at:\n{parent['stack']}"
    said = {
        'code': 200,
        'message': text or kind.__name__,
        'data': {
            'name': f'{kind.__module__}.{kind.__name__}',
            'message': text,
            'arguments': [json.loads(dumps(arg)) if is_json(arg) else str(arg) for arg in error.args],
            'context': {},
            'debug': debug,
        },
    }
    if isinstance(error, (UserError, RedirectWarning)):
        said['retry'] = False
    return json.loads(json.dumps(said).replace('\\u0000', ''))


def progress(registry, percent, message):
    """Tells how far the current job is, at once; False outside a job. Raises JobLost."""
    job = current.get()
    if job is None or job.dbname != registry.db_name:
        return False
    try:
        with registry.cursor() as cr:
            cr.execute("SELECT ir_async_progress(%s, %s, %s, %s)", (job.id, job.token, percent, message))
    except errors.ObjectNotInPrerequisiteState as lost:
        raise JobLost() from lost
    return True
