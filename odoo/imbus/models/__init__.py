from . import ir_async, ir_async_export, ir_model
