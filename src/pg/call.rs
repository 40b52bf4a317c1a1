//! From a target's name to the function it means, and from a stored job to its call. Runs as the caller or as the job's
//! role, never as anybody more.

use super::catalog::{Remembered, remembered};
use super::datum::{Jsonb, JsonbText, Text};
use super::report::{Outcome, report};
use super::sql;
use super::transaction::{safely, set_local};
use crate::core::error::{Error, shown};
use crate::core::job::{self, Candidate, Mismatch, Parameter, Returns};
use crate::core::json;
use pgrx::prelude::*;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::rc::Rc;

/// How a function is to be called: how many positional arguments, and the names of the others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    positional: usize,
    names: Vec<String>,
}

impl Shape {
    /// That of `args` (a JSON array) and `kwargs` (a JSON object). Errors: 22023.
    pub fn of(args: &Jsonb, kwargs: &Jsonb) -> Outcome<Shape> {
        let positional = args.array_len().ok_or_else(|| not_arguments("args", args.text()))?;
        if args.size() >= DEEP {
            json::elements(&args.text())?;
        }
        let names = match kwargs.object_len().ok_or_else(|| not_arguments("kwargs", kwargs.text()))? {
            0 => Vec::new(),
            _ => {
                let text = kwargs.text();
                let named: BTreeMap<String, IgnoredAny> =
                    serde_json::from_str(&text).map_err(|_| not_arguments("kwargs", text.clone()))?;
                named.into_keys().collect()
            }
        };
        Ok(Shape { positional, names })
    }
}

/// Arguments of fewer bytes are not nested deeper than `json::DEPTH_MAX`: each level takes at least eight.
const DEEP: usize = json::DEPTH_MAX * 8;

fn not_arguments(argument: &'static str, value: String) -> Error {
    let kind = if argument == "args" { "array" } else { "object" };
    Error::Argument { argument, value, reason: format!("it must be a JSON {kind}") }
}

/// The arguments of a job: positional ones and named ones, each as JSON text.
pub struct Arguments {
    args: Vec<String>,
    kwargs: Vec<(String, String)>,
}

impl Arguments {
    /// Reads `args` (a JSON array) and `kwargs` (a JSON object). Errors: 22023.
    pub fn parse(args: &str, kwargs: &str) -> Outcome<Arguments> {
        let positional = json::elements(args)?.ok_or_else(|| not_arguments("args", args.to_owned()))?;
        let named: BTreeMap<String, Box<RawValue>> =
            serde_json::from_str(kwargs).map_err(|_| not_arguments("kwargs", kwargs.to_owned()))?;
        Ok(Arguments {
            args: positional.into_iter().map(str::to_owned).collect(),
            kwargs: named.into_iter().map(|(name, value)| (name, value.get().to_owned())).collect(),
        })
    }

    fn shape(&self) -> Shape {
        let names = self.kwargs.iter().map(|(name, _)| name.clone()).collect();
        Shape { positional: self.args.len(), names }
    }

    fn object(&self) -> String {
        let named = self.kwargs.iter().map(|(_, value)| value.as_str());
        job::argument_object(self.args.iter().map(String::as_str).chain(named))
    }
}

/// Functions by their name, in the schemas given, in their order; $1 name, $2 schemas.
const BY_NAME: &str = "p.proname = $1 AND n.nspname = ANY($2) ORDER BY pg_catalog.array_position($2, n.nspname::text)";
/// The function with an OID.
const BY_OID: &str = "p.oid = $1";

/// What is read of a function. Polymorphic and variadic ones, procedures and triggers cannot be jobs and are left out.
const CANDIDATES: &str = "
    SELECT n.nspname::text,
           p.oid::pg_catalog.regprocedure::text,
           pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(p.proname),
           CASE WHEN p.prorettype = 'pg_catalog.void'::pg_catalog.regtype THEN 'void'
                WHEN p.proretset THEN 'set' ELSE 'value' END,
           pg_catalog.has_function_privilege(p.oid, 'EXECUTE'),
           p.pronargs - p.pronargdefaults,
           ARRAY(SELECT COALESCE(a.name, '') FROM (
                 SELECT i, COALESCE(p.proargmodes[i]::text, 'i') AS mode, p.proargnames[i] AS name
                   FROM pg_catalog.generate_series(1, COALESCE(
                        pg_catalog.cardinality(p.proargmodes), p.pronargs::integer)) i) a
                  WHERE a.mode IN ('i', 'b', 'v') ORDER BY a.i),
           ARRAY(SELECT pg_catalog.format_type(t.oid, NULL) FROM pg_catalog.unnest(p.proargtypes)
                 WITH ORDINALITY u (oid, i) JOIN pg_catalog.pg_type t ON t.oid = u.oid ORDER BY u.i)
      FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
     WHERE p.prokind = 'f' AND p.provariadic = 0
       AND p.prorettype <> ALL (ARRAY['trigger', 'event_trigger', 'internal', 'language_handler',
                                      'fdw_handler', 'index_am_handler', 'table_am_handler', 'tsm_handler']
                                ::pg_catalog.regtype[])
       AND NOT EXISTS (SELECT FROM pg_catalog.unnest(p.proargtypes) u (oid)
                         JOIN pg_catalog.pg_type t ON t.oid = u.oid WHERE t.typtype = 'p')
       AND ";

/// A function as found, with what is asked of it besides its shape.
struct Found {
    schema: String,
    executable: bool,
    candidate: Candidate,
}

fn find(condition: &str, args: &[pgrx::datum::DatumWithOid<'_>]) -> Outcome<Vec<Found>> {
    safely(|| sql::rows(&format!("{CANDIDATES}{condition}"), args, read))
}

fn read(row: &sql::Row) -> Outcome<Found> {
    let required = usize::try_from(row.need::<i32>(6)?).unwrap_or(0);
    let names = row.get::<Vec<Option<String>>>(7)?.unwrap_or_default();
    let types = row.get::<Vec<Option<String>>>(8)?.unwrap_or_default();
    let parameters = names.into_iter().zip(types).enumerate().map(|(index, (name, type_name))| Parameter {
        name: name.unwrap_or_default(),
        type_name: type_name.unwrap_or_default(),
        has_default: index >= required,
    });
    let returns = match row.text(4)?.as_str() {
        "void" => Returns::Void,
        "set" => Returns::Set,
        _ => Returns::Value,
    };
    Ok(Found {
        schema: row.text(1)?,
        executable: row.need(5)?,
        candidate: Candidate { signature: row.text(2)?, name: row.text(3)?, parameters: parameters.collect(), returns },
    })
}

/// The signature of the function that `target` (`name` or `schema.name`) means for the caller, now. Errors: 42883 when
/// none takes the arguments, 42725 when several do, 42501 when the caller may not execute it, 42602 for a bad name.
pub fn resolve(target: &str, shape: &Shape) -> Outcome<String> {
    let (schemas, name) = parse_name(target)?;
    let found = find(BY_NAME, &[Text(name).into(), schemas.into()])?;
    let mut schema_names: Vec<&str> = found.iter().map(|f| f.schema.as_str()).collect();
    schema_names.dedup();
    for schema in schema_names {
        let here: Vec<Candidate> = found.iter().filter(|f| f.schema == schema).map(|f| f.candidate.clone()).collect();
        match job::choose(&here, shape.positional, &shape.names) {
            Ok(chosen) => {
                let allowed = found.iter().any(|f| f.candidate == *chosen && f.executable);
                return if allowed { Ok(chosen.signature.clone()) } else { Err(denied(&chosen.signature)) };
            }
            Err(Mismatch::None) => {}
            Err(Mismatch::Ambiguous(several)) => return Err(ambiguous(target, &several)),
        }
    }
    Err(unknown(target, shape))
}

/// The schemas to look in (the search_path's when the name has none; never pg_temp, as PostgreSQL itself) and the name.
fn parse_name(target: &str) -> Outcome<(Vec<String>, String)> {
    let parts = safely(|| {
        sql::first("SELECT pg_catalog.parse_ident($1)", &[Text(target.to_owned()).into()], |row| {
            row.get::<Vec<Option<String>>>(1)
        })
    })?;
    let parts: Vec<String> = parts.flatten().unwrap_or_default().into_iter().flatten().collect();
    match parts.as_slice() {
        [name] => {
            // Asked for outside `safely`: the caller's own path is what counts.
            let path = sql::first("SELECT pg_catalog.current_schemas(true)::text[]", &[], |row| {
                row.get::<Vec<Option<String>>>(1)
            })?;
            let schemas = path.flatten().unwrap_or_default().into_iter().flatten();
            Ok((schemas.filter(|schema| !schema.starts_with("pg_temp")).collect(), name.clone()))
        }
        [schema, name] => Ok((vec![schema.clone()], name.clone())),
        _ => Err(report(
            PgSqlErrorCode::ERRCODE_INVALID_NAME,
            "invalid target",
            &format!("Target: {}", shown(target)),
            "A target is a function's name, or schema.name.",
        )),
    }
}

fn denied(signature: &str) -> pgrx::pg_sys::panic::ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
        &format!("permission denied for function {signature}"),
        "A job runs as the role that enqueues it.",
        "GRANT EXECUTE on the function to the role.",
    )
}

fn ambiguous(target: &str, several: &[String]) -> pgrx::pg_sys::panic::ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_AMBIGUOUS_FUNCTION,
        &format!("target \"{}\" is not unique", shown(target)),
        &format!("These take the arguments equally well: {}", several.join(", ")),
        "Name the arguments in kwargs.",
    )
}

fn unknown(target: &str, shape: &Shape) -> pgrx::pg_sys::panic::ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_UNDEFINED_FUNCTION,
        &format!("function \"{}\" does not exist for these arguments", shown(target)),
        &format!("{} positional arguments, named: [{}]", shape.positional, shape.names.join(", ")),
        "Name a function in the search_path, or schema.name; procedures, variadic and polymorphic functions cannot be \
         jobs.",
    )
}

/// The call of a function, as it is found for a signature and the shape of the arguments.
struct Prepared {
    statement: String,
    returns: Returns,
}

thread_local! {
    /// By signature and shape.
    static PREPARED: RefCell<Remembered<(String, Shape), Rc<Prepared>>> = RefCell::default();
}

/// Calls a stored signature as the current user with the given search_path: the result as JSON text, None for void or
/// NULL. Raises whatever the function raises, and 42501 or 42883 when it was revoked or dropped since. Of a job that was enqueued
/// while its queue was left to runners outside the target is a name, and resolved now.
pub fn run(target: &str, arguments: &Arguments, search_path: &str) -> Outcome<Option<String>> {
    let search_path = CString::new(search_path).map_err(super::report::internal)?;
    let prepared = if target.ends_with(')') {
        prepare(target, arguments)?
    } else {
        set_local(c"search_path", &search_path);
        prepare(&resolve(target, &arguments.shape())?, arguments)?
    };
    set_local(c"search_path", &search_path);
    let argument = [JsonbText(arguments.object()).into()];
    if prepared.returns == Returns::Void {
        sql::execute(&prepared.statement, &argument)?;
        return Ok(None);
    }
    let result = sql::first(&prepared.statement, &argument, |row| row.get::<JsonbText>(1))?;
    Ok(result.flatten().map(|json| json.0).filter(|json| json != "null"))
}

/// How the function is called; remembered while nothing changes in the catalogs. The right to call it is checked by each
/// call.
fn prepare(signature: &str, arguments: &Arguments) -> Outcome<Rc<Prepared>> {
    remembered(&PREPARED, (signature.to_owned(), arguments.shape()), |(signature, shape)| {
        let oid = safely(|| {
            let text = "SELECT $1::pg_catalog.regprocedure::oid";
            sql::first(text, &[Text(signature.clone()).into()], |row| row.get::<pg_sys::Oid>(1))
        })?;
        let found = find(BY_OID, &[oid.flatten().unwrap_or(pg_sys::InvalidOid).into()])?;
        let Some(candidate) = found.into_iter().next().map(|f| f.candidate) else {
            return Err(unknown(signature, shape));
        };
        let statement = job::call_statement(&candidate, shape.positional, &shape.names);
        Ok(Rc::new(Prepared { statement, returns: candidate.returns }))
    })
}
