from odoo.exceptions import UserError


def check_extension(cr):
    """Raises UserError where the extension imbus, or its table of jobs, is not in the cursor's database."""
    cr.execute("SELECT to_regclass('ir_async') IS NOT NULL AND EXISTS (SELECT FROM pg_extension WHERE extname = 'imbus')")
    if not cr.fetchone()[0]:
        raise UserError(
            'The PostgreSQL extension imbus is not in database "%s", or not in a schema of the search_path. '
            'As the owner of the database run CREATE EXTENSION imbus, then install this module again.' % cr.dbname)


def pre_init_hook(env):
    """Refuses the installation without the extension, before anything has been installed."""
    check_extension(env.cr)
