from odoo import models


class IrModel(models.Model):
    _inherit = 'ir.model'

    def _drop_table(self):
        # The table is the extension's: it outlives the add-on.
        return super(IrModel, self.filtered(lambda model: model.model != 'ir.async'))._drop_table()


class IrModelFields(models.Model):
    _inherit = 'ir.model.fields'

    def _drop_column(self):
        return super(IrModelFields, self.filtered(lambda field: field.model != 'ir.async'))._drop_column()
