//! `imbus.auth_function`: who may subscribe to what, asked of a function of the database (SPEC section 7, `function`).

use super::datum::JsonbText;
use super::ffi;
use super::guc;
use super::limit::Limit;
use super::report::{Outcome, report};
use super::sql;
use super::transaction::{self, Failure, as_user, safely};
use pgrx::prelude::*;
use pgrx::{FromDatum, IntoDatum};

/// How long the function may take, in milliseconds: what is committed waits for it.
const PATIENCE: i64 = 500;

/// The lock method of advisory locks (lock.h).
const USER_LOCKMETHOD: u16 = 2;

/// What the function of this database answers to a client's headers (a JSON object) and channels (a JSON array): the
/// text of its jsonb, None when it refuses, or there is none. Runs as the function's owner, under
/// SECURITY_RESTRICTED_OPERATION and with search_path `pg_catalog`, in a transaction of its own.
///
/// # Errors
/// The function's; it takes longer than half a second; it is not there, or not of the right kind.
pub fn ask(headers: &str, channels: &str) -> Result<Option<String>, Failure> {
    let answer = transaction::run(|| {
        let _limit = Limit::set(PATIENCE);
        let Some(name) = safely(configured)?.filter(|name| !name.trim().is_empty()) else { return Ok(None) };
        let function = safely(|| find(&name))?;
        let (headers, channels) = (JsonbText(headers.to_owned()), JsonbText(channels.to_owned()));
        as_user(function.owner, || Ok(call(function.oid, [headers.into_datum(), channels.into_datum()])))
    });
    if answer.is_err() {
        Limit::lift();
    }
    // What it has locked for the session is not this worker's to keep.
    // SAFETY: main thread, outside any transaction; as DISCARD ALL does (discard.c).
    unsafe { pg_sys::LockReleaseAll(USER_LOCKMETHOD, true) };
    answer
}

/// A function and who it belongs to.
struct Function {
    oid: pg_sys::Oid,
    owner: pg_sys::Oid,
}

/// The setting, as it is now: of the database (ALTER DATABASE … SET, which this process has read at its start only), or
/// of the server.
fn configured() -> Outcome<Option<String>> {
    let text = "SELECT pg_catalog.substr(s.entry, 21)
                  FROM pg_catalog.pg_db_role_setting r, pg_catalog.unnest(r.setconfig) s (entry)
                 WHERE r.setrole = 0 AND s.entry LIKE 'imbus.auth\\_function=%'
                   AND r.setdatabase = (SELECT d.oid FROM pg_catalog.pg_database d
                                         WHERE d.datname = pg_catalog.current_database())";
    Ok(sql::first(text, &[], |row| row.text(1))?.or_else(guc::auth_function))
}

/// The function of this name; one without a schema is looked for where the extension is.
fn find(name: &str) -> Outcome<Function> {
    let text = "SELECT p.oid, p.proowner
                  FROM pg_catalog.pg_extension e
                  JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
                  JOIN pg_catalog.pg_proc p
                    ON p.oid = COALESCE(pg_catalog.to_regprocedure($1 || '(pg_catalog.jsonb,pg_catalog.jsonb)'),
                                        pg_catalog.to_regprocedure(pg_catalog.quote_ident(n.nspname) || '.' || $1
                                                                   || '(pg_catalog.jsonb,pg_catalog.jsonb)'))
                 WHERE e.extname = 'imbus' AND p.prokind = 'f' AND NOT p.proretset
                   AND p.prorettype = 'pg_catalog.jsonb'::pg_catalog.regtype";
    let found = sql::first(text, &[super::datum::Text(name.to_owned()).into()], |row| {
        Ok(Function { oid: row.need(1)?, owner: row.need(2)? })
    })?;
    found.ok_or_else(|| {
        report(
            PgSqlErrorCode::ERRCODE_UNDEFINED_FUNCTION,
            "imbus.auth_function is not a function (jsonb, jsonb) that returns jsonb",
            &format!("Function: {}", crate::core::error::shown(name)),
            "Name it with its schema, for example: ALTER DATABASE … SET imbus.auth_function = 'public.may_subscribe'.",
        )
    })
}

/// Calls a function by its OID, so that it is the very one whose owner was looked up.
fn call(function: pg_sys::Oid, arguments: [Option<pg_sys::Datum>; 2]) -> Option<String> {
    let size = size_of::<pg_sys::FunctionCallInfoBaseData>() + 2 * size_of::<pg_sys::NullableDatum>();
    // SAFETY: as the macros LOCAL_FCINFO, InitFunctionCallInfoData and FunctionCallInvoke of fmgr.h; two arguments, and
    // the memory belongs to the transaction. The function is a raw pointer: its ERROR has to be turned by `guarded`.
    unsafe {
        let info = pg_sys::palloc0(size_of::<pg_sys::FmgrInfo>()).cast::<pg_sys::FmgrInfo>();
        pg_sys::fmgr_info(function, info);
        let frame = pg_sys::palloc0(size).cast::<pg_sys::FunctionCallInfoBaseData>();
        (*frame).flinfo = info;
        (*frame).nargs = 2;
        let slots = (*frame).args.as_mut_ptr();
        for (place, argument) in arguments.into_iter().enumerate() {
            let slot = slots.add(place);
            (*slot).isnull = argument.is_none();
            (*slot).value = argument.unwrap_or(pg_sys::Datum::from(0));
        }
        let address = (*info).fn_addr?;
        let datum = ffi::guarded(|| address(frame));
        JsonbText::from_datum(datum, (*frame).isnull).map(|text| text.0)
    }
}
