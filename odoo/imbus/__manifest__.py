{
    'name': 'Asynchronous Jobs (imbus)',
    'version': '1.0.0',
    'category': 'Hidden/Tools',
    'summary': 'Jobs that PostgreSQL queues, Odoo runs and the browser follows',
    'author': 'imbus',
    'license': 'LGPL-3',
    'depends': ['base', 'web', 'bus'],
    'data': [
        'security/ir_async_security.xml',
        'security/ir.model.access.csv',
        'views/ir_async_views.xml',
    ],
    'assets': {
        'web.assets_backend': [
            'imbus/static/src/**/*',
        ],
        'web.assets_tests': [
            'imbus/static/tests/tours/**/*',
        ],
    },
    'pre_init_hook': 'pre_init_hook',
    'installable': True,
}
