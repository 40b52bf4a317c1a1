import json
import re

from odoo import http
from odoo.http import request

from .. import runner

# {"db": …, "id": …, "token": …}: a database's name has 63 bytes at most.
BODY_MAX = 2048


class AsyncController(http.Controller):

    @http.route('/imbus/async/run', type='http', auth='none', methods=['POST'], csrf=False, save_session=False)
    def run(self, **_params):
        """Runs a job for the server, and those that follow under its token: the body is `{"db", "id", "token"}`. Answers
        200 `{"state"}` when the job was settled, 409 when it is not processed under that token, 404 without that database or the add-on in it, 400 for
        anything else than such a body."""
        asked = self._asked()
        if asked is None:
            return request.make_json_response({'error': 'malformed request'}, status=400)
        if request.env is not None:
            # The request's own cursor does nothing: it shall not hold a transaction open while the job runs.
            request.env.cr.rollback()
        try:
            return request.make_json_response({'state': runner.run(*asked)})
        except runner.Unavailable:
            return request.make_json_response({'error': 'no such database, or no imbus in it'}, status=404)
        except runner.JobLost:
            return request.make_json_response({'error': 'not processed under that token'}, status=409)

    def _asked(self):
        if (request.httprequest.content_length or 0) > BODY_MAX:
            return None
        try:
            body = json.loads(request.httprequest.get_data(cache=True).decode())
            dbname, job_id, token = body['db'], body['id'], body['token']
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if not isinstance(dbname, str) or not dbname or '\0' in dbname:
            return None
        if type(job_id) is not int or not 0 < job_id < 2 ** 63:
            return None
        if not isinstance(token, str) or not re.fullmatch('[0-9a-f]{32}', token):
            return None
        return dbname, job_id, token
