//! The only way to SPI: prepared once, kept for the life of the process, parameters bound, rows copied out.

use super::datum::Text;
use super::report::{Outcome, internal};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::{OwnedPreparedStatement, SpiTupleTable};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// Statements kept per process; the texts are few (one set per bus table), the limit guards against a fault.
const KEPT: usize = 256;

thread_local! {
    static PLANS: RefCell<HashMap<String, Rc<OwnedPreparedStatement>>> = RefCell::new(HashMap::new());
}

/// One row of a result.
pub struct Row<'a>(&'a SpiTupleTable<'a>);

impl Row<'_> {
    /// The value of a column (counted from 1); None for NULL.
    pub fn get<T: IntoDatum + FromDatum>(&self, column: usize) -> Outcome<Option<T>> {
        self.0.get(column).map_err(internal)
    }

    /// The value of a column that is declared NOT NULL, or T's default.
    pub fn need<T: IntoDatum + FromDatum + Default>(&self, column: usize) -> Outcome<T> {
        Ok(self.get(column)?.unwrap_or_default())
    }

    /// The value of a text column, empty for NULL.
    pub fn text(&self, column: usize) -> Outcome<String> {
        Ok(self.get::<Text>(column)?.map(|text| text.0).unwrap_or_default())
    }
}

/// Runs a statement and maps its rows. Raises PostgreSQL's errors as they are.
pub fn rows<T>(text: &str, args: &[DatumWithOid<'_>], mut map: impl FnMut(&Row<'_>) -> Outcome<T>) -> Outcome<Vec<T>> {
    Spi::connect_mut(|client| {
        let plan = plan(client, text, args)?;
        let mut table = client.update(&*plan, None, args).map_err(internal)?;
        let mut found = Vec::with_capacity(table.len());
        while table.next().is_some() {
            found.push(map(&Row(&table))?);
        }
        Ok(found)
    })
}

/// The first row, if any.
pub fn first<T>(text: &str, args: &[DatumWithOid<'_>], map: impl FnMut(&Row<'_>) -> Outcome<T>) -> Outcome<Option<T>> {
    Ok(rows(text, args, map)?.into_iter().next())
}

/// Runs a statement for its effect; the number of rows it touched.
pub fn execute(text: &str, args: &[DatumWithOid<'_>]) -> Outcome<u64> {
    Spi::connect_mut(|client| {
        let plan = plan(client, text, args)?;
        client.update(&*plan, None, args).map_err(internal)?;
        // SAFETY: set by the statement just run.
        Ok(unsafe { pg_sys::SPI_processed })
    })
}

fn plan(
    client: &pgrx::spi::SpiClient<'_>,
    text: &str,
    args: &[DatumWithOid<'_>],
) -> Outcome<Rc<OwnedPreparedStatement>> {
    if let Some(plan) = PLANS.with(|plans| plans.borrow().get(text).cloned()) {
        return Ok(plan);
    }
    let types: Vec<PgOid> = args.iter().map(|arg| PgOid::from(arg.oid())).collect();
    let plan = Rc::new(client.prepare_mut(text, &types).map_err(internal)?.keep());
    PLANS.with(|plans| {
        let mut plans = plans.borrow_mut();
        if plans.len() >= KEPT {
            plans.clear();
        }
        plans.insert(text.to_owned(), Rc::clone(&plan));
    });
    Ok(plan)
}
