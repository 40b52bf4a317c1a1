from . import test_call, test_export, test_neutralize, test_run, test_session, test_tour
