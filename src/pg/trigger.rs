//! The trigger on Odoo's table: internal, so that no dump contains it, and dependent on the extension, so that it goes
//! with DROP EXTENSION without CASCADE (SPEC section 11).

use super::bus::Bus;
use super::report::Outcome;
use super::sql;
use super::transaction::{safely, set_local};
use pgrx::prelude::*;

/// How long the table's lock is waited for; writers queue behind us meanwhile.
const LOCK_TIMEOUT: &std::ffi::CStr = c"100ms";

/// Attaches the trigger, unless it is there. Errors 55P03 when the table is locked: to be tried again.
pub fn attach(bus: &Bus) -> Outcome<()> {
    let relid = pg_sys::Oid::from(bus.oid());
    let there = "SELECT true FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
                   JOIN pg_catalog.pg_extension e ON e.extname = 'imbus' AND e.extnamespace = p.pronamespace
                  WHERE t.tgrelid = $1 AND p.proname = 'imbus_bus_inserted'";
    if safely(|| sql::first(there, &[relid.into()], |_| Ok(())))?.is_some() {
        return Ok(());
    }
    let function = "SELECT p.oid, e.oid FROM pg_catalog.pg_extension e
                      JOIN pg_catalog.pg_proc p ON p.pronamespace = e.extnamespace
                     WHERE e.extname = 'imbus' AND p.proname = 'imbus_bus_inserted'";
    let found = safely(|| sql::first(function, &[], |row| Ok((row.get(1)?, row.get(2)?))))?;
    let Some((Some(function), Some(extension))) = found else { return Ok(()) };
    set_local(c"lock_timeout", LOCK_TIMEOUT);
    // SAFETY: inside a transaction, main thread; all three exist.
    unsafe { create(relid, function, extension) };
    Ok(())
}

/// SAFETY: inside a transaction; the arguments exist.
unsafe fn create(relid: pg_sys::Oid, function: pg_sys::Oid, extension: pg_sys::Oid) {
    // SAFETY: a node of PostgreSQL's own making, as CREATE TRIGGER … AFTER INSERT … FOR EACH ROW has it; it fires always,
    // also under session_replication_role = replica. The caller is the worker, no rights are asked for an internal one.
    unsafe {
        let size = size_of::<pg_sys::CreateTrigStmt>();
        let statement = pg_sys::palloc0(size).cast::<pg_sys::CreateTrigStmt>();
        (*statement).type_ = pg_sys::NodeTag::T_CreateTrigStmt;
        (*statement).trigname = pg_sys::pstrdup(c"imbus_bus_inserted".as_ptr());
        (*statement).row = true;
        (*statement).events = pg_sys::TRIGGER_TYPE_INSERT as i16;
        let none = pg_sys::InvalidOid;
        let trigger = pg_sys::CreateTriggerFiringOn(
            statement,
            std::ptr::null(),
            relid,
            none,
            none,
            none,
            function,
            none,
            std::ptr::null_mut(),
            true,
            false,
            pg_sys::TRIGGER_FIRES_ALWAYS as std::ffi::c_char,
        );
        let extension =
            pg_sys::ObjectAddress { classId: pg_sys::ExtensionRelationId, objectId: extension, objectSubId: 0 };
        pg_sys::recordDependencyOn(&trigger, &extension, pg_sys::DependencyType::DEPENDENCY_AUTO_EXTENSION);
    }
}
