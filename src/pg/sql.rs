//! The only way to SPI: prepared once, kept for the life of the process, parameters bound, rows copied out. By hand rather
//! than by pgrx's client, which draws a transaction number for every statement that is not marked read-only (spi.rs,
//! mark_mutable); read-only statements would not see what their own transaction has just written.

use super::datum::Text;
use super::guard;
use super::report::{Outcome, internal};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::rc::Rc;

/// Statements kept per process; the texts are few (one set per bus table), the limit guards against a fault.
const KEPT: usize = 256;

thread_local! {
    static PLANS: RefCell<HashMap<String, Plan>> = RefCell::new(HashMap::new());
    /// Statements see what the active snapshot sees.
    static AS_OF_NOW: Cell<bool> = const { Cell::new(false) };
}

/// A kept plan and its text.
#[derive(Clone)]
struct Plan {
    plan: pg_sys::SPIPlanPtr,
    text: Rc<CStr>,
}

/// One row of a result.
pub struct Row {
    tuple: pg_sys::HeapTuple,
    descriptor: pg_sys::TupleDesc,
}

impl Row {
    /// The value of a column (counted from 1); None for NULL.
    pub fn get<T: IntoDatum + FromDatum>(&self, column: usize) -> Outcome<Option<T>> {
        let number = c_int::try_from(column).map_err(internal)?;
        // SAFETY: a row of the result that SPI still holds, and its descriptor. The value is copied by FromDatum.
        unsafe {
            let of = pg_sys::SPI_gettypeid(self.descriptor, number);
            if !T::is_compatible_with(of) {
                return Err(internal(format!("column {column} is of another type (OID {of})")));
            }
            let mut is_null = false;
            let value = pg_sys::SPI_getbinval(self.tuple, self.descriptor, number, &mut is_null);
            Ok(T::from_polymorphic_datum(value, is_null, of))
        }
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
pub fn rows<T>(text: &str, args: &[DatumWithOid<'_>], mut map: impl FnMut(&Row) -> Outcome<T>) -> Outcome<Vec<T>> {
    connected(|| {
        run(text, args)?;
        // SAFETY: set by the statement just run; NULL when it returns no rows.
        let table = unsafe { pg_sys::SPI_tuptable.as_ref() };
        let Some(table) = table else { return Ok(Vec::new()) };
        let count = usize::try_from(processed()).map_err(internal)?;
        // SAFETY: so many rows are in the table.
        let tuples = if count == 0 { &[][..] } else { unsafe { std::slice::from_raw_parts(table.vals, count) } };
        tuples.iter().map(|tuple| map(&Row { tuple: *tuple, descriptor: table.tupdesc })).collect()
    })
}

/// The first row, if any.
pub fn first<T>(text: &str, args: &[DatumWithOid<'_>], map: impl FnMut(&Row) -> Outcome<T>) -> Outcome<Option<T>> {
    Ok(rows(text, args, map)?.into_iter().next())
}

/// Runs a statement for its effect; the number of rows it touched.
pub fn execute(text: &str, args: &[DatumWithOid<'_>]) -> Outcome<u64> {
    connected(|| {
        run(text, args)?;
        Ok(processed())
    })
}

fn processed() -> u64 {
    // SAFETY: a plain global.
    unsafe { pg_sys::SPI_processed }
}

/// Between SPI_connect and SPI_finish; on ERROR the abort finishes it, on an `Err` it is finished here.
fn connected<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // SAFETY: main thread, inside a transaction; paired below.
    unsafe { check(pg_sys::SPI_connect())? };
    let result = work();
    // SAFETY: pairs with SPI_connect.
    unsafe { check(pg_sys::SPI_finish())? };
    result
}

fn run(text: &str, args: &[DatumWithOid<'_>]) -> Outcome<()> {
    let Plan { plan, text } = plan(text, args)?;
    guard::statement(&text);
    let mut values = Vec::with_capacity(args.len());
    let mut nulls: Vec<c_char> = Vec::with_capacity(args.len());
    for arg in args {
        let value = arg.datum();
        nulls.push(if value.is_none() { b'n' } else { b' ' } as c_char);
        values.push(value.map_or(pg_sys::Datum::from(0), |value| value.sans_lifetime()));
    }
    // SAFETY: as many values and marks as the plan has parameters.
    let code = unsafe { pg_sys::SPI_execute_plan(plan, values.as_mut_ptr(), nulls.as_ptr(), AS_OF_NOW.get(), 0) };
    check(code)
}

/// Runs statements that only read, by a snapshot of now even where the transaction keeps an older one: what is to be remembered
/// of catalogs must be as new as the invalidations that have been heard, since none of these comes twice.
pub fn as_of_now<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // SAFETY: plain globals.
    if unsafe { pg_sys::IsInParallelMode() } {
        // No other snapshot can be had there.
        return work();
    }
    // SAFETY: main thread, inside a transaction; popped below, on ERROR by the abort.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let mark = AsOfNow(AS_OF_NOW.replace(true));
    let result = work();
    drop(mark);
    // SAFETY: pairs with the push.
    unsafe { pg_sys::PopActiveSnapshot() };
    result
}

/// Sets the mark back whatever happens.
struct AsOfNow(bool);

impl Drop for AsOfNow {
    fn drop(&mut self) {
        AS_OF_NOW.set(self.0);
    }
}

fn plan(text: &str, args: &[DatumWithOid<'_>]) -> Outcome<Plan> {
    if let Some(plan) = PLANS.with_borrow(|plans| plans.get(text).cloned()) {
        return Ok(plan);
    }
    let source = CString::new(text).map_err(internal)?;
    guard::statement(&source);
    let mut types: Vec<pg_sys::Oid> = args.iter().map(DatumWithOid::oid).collect();
    let count = c_int::try_from(types.len()).map_err(internal)?;
    // SAFETY: a C string and as many types as it says; the plan is kept for the life of the process.
    let plan = unsafe {
        let plan = pg_sys::SPI_prepare(source.as_ptr(), count, types.as_mut_ptr());
        if plan.is_null() {
            check(pg_sys::SPI_result)?;
        }
        check(pg_sys::SPI_keepplan(plan))?;
        plan
    };
    let plan = Plan { plan, text: source.into() };
    PLANS.with_borrow_mut(|plans| {
        if plans.len() >= KEPT {
            for (_, old) in plans.drain() {
                // SAFETY: kept by us, in nobody's hands.
                unsafe { pg_sys::SPI_freeplan(old.plan) };
            }
        }
        plans.insert(text.to_owned(), plan.clone());
    });
    Ok(plan)
}

fn check(code: c_int) -> Outcome<()> {
    if code >= 0 {
        return Ok(());
    }
    // SAFETY: a constant string of PostgreSQL's.
    let name = unsafe { CStr::from_ptr(pg_sys::SPI_result_code_string(code)) };
    Err(internal(name.to_string_lossy()))
}
