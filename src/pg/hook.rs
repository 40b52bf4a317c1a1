//! The utility hook: lets DROP DATABASE, RENAME and copies through a served database (its workers leave, and stay out
//! until the command ends), and tells the workers of what no trigger sees: extensions that come and go, COMMIT PREPARED.

use super::datum::Text;
use super::ffi::cells;
use super::shared::{self, DatabaseState, RunnerState, Shared};
use super::transaction::safely;
use super::worker::{self, Waiting};
use super::{ring, sql, wake};
use pgrx::prelude::*;
use std::ffi::{CStr, c_char};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a command waits for the workers to leave; afterwards PostgreSQL's own check decides.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);
/// How long an idle worker has to leave by itself, which spares the log a FATAL.
const COURTESY: Duration = Duration::from_millis(100);

static mut PREVIOUS: pg_sys::ProcessUtility_hook_type = None;

/// Installs the hook, in the postmaster.
pub fn install() {
    // SAFETY: `_PG_init`, before any other thread or process.
    unsafe {
        PREVIOUS = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(utility);
    }
}

/// What a statement means to imbus.
enum Meaning {
    Nothing,
    /// The workers of this database must be out while it runs.
    Hold(pg_sys::Oid),
    /// An extension may come or go, here.
    Extension,
    /// This database has a new owner.
    Owner(u32),
    /// This prepared transaction is committed: its rows become visible without a commit of their own session.
    Finish(*const c_char),
}

#[pg_guard]
#[allow(clippy::too_many_arguments)]
unsafe extern "C-unwind" fn utility(
    statement: *mut pg_sys::PlannedStmt,
    query: *const c_char,
    read_only: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    destination: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: the arguments are passed on as they came; the hook that was there before, or PostgreSQL's own code.
    let run = || unsafe {
        match PREVIOUS {
            Some(hook) => pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| {
                hook(statement, query, read_only, context, params, environment, destination, completion)
            }),
            None => pg_sys::standard_ProcessUtility(
                statement,
                query,
                read_only,
                context,
                params,
                environment,
                destination,
                completion,
            ),
        }
    };
    // SAFETY: PostgreSQL passes a valid statement.
    match unsafe { meaning((*statement).utilityStmt) } {
        Meaning::Nothing => run(),
        Meaning::Hold(database) => held(database, run),
        Meaning::Extension => {
            run();
            wake::extension_changed();
        }
        Meaning::Owner(database) => {
            run();
            wake::owner_changed(database);
        }
        Meaning::Finish(name) => {
            // SAFETY: a C string of the statement; a command of its own always runs inside a transaction.
            ring::finishing(unsafe { prepared_numbers(name) });
            run();
            // It may have ended or enqueued anything.
            wake::enqueued_blocked();
        }
    }
}

/// SAFETY: `node` is a valid parse node of the kind its tag says.
unsafe fn meaning(node: *mut pg_sys::Node) -> Meaning {
    use pg_sys::NodeTag as Tag;
    if node.is_null() {
        return Meaning::Nothing;
    }
    // SAFETY: each cast follows the tag.
    unsafe {
        match (*node).type_ {
            Tag::T_DropdbStmt => hold((*node.cast::<pg_sys::DropdbStmt>()).dbname, false),
            Tag::T_CreatedbStmt => match option((*node.cast::<pg_sys::CreatedbStmt>()).options, c"template") {
                Some(template) => hold(pg_sys::defGetString(template), true),
                None => Meaning::Extension,
            },
            Tag::T_AlterDatabaseStmt => {
                let alter = &*node.cast::<pg_sys::AlterDatabaseStmt>();
                // SET TABLESPACE moves its files; the other options concern nobody here.
                match option(alter.options, c"tablespace") {
                    Some(_) => hold(alter.dbname, false),
                    None => Meaning::Nothing,
                }
            }
            Tag::T_RenameStmt => {
                let rename = &*node.cast::<pg_sys::RenameStmt>();
                match rename.renameType == pg_sys::ObjectType::OBJECT_DATABASE {
                    true => hold(rename.subname, true),
                    false => Meaning::Nothing,
                }
            }
            Tag::T_CreateExtensionStmt | Tag::T_AlterExtensionStmt | Tag::T_DropOwnedStmt => Meaning::Extension,
            Tag::T_DropStmt => drops(&*node.cast::<pg_sys::DropStmt>()),
            Tag::T_AlterOwnerStmt => {
                let alter = &*node.cast::<pg_sys::AlterOwnerStmt>();
                match alter.objectType == pg_sys::ObjectType::OBJECT_DATABASE && !alter.object.is_null() {
                    true => Meaning::Owner(database_named(value(alter.object)).into()),
                    false => Meaning::Nothing,
                }
            }
            Tag::T_TransactionStmt => {
                let statement = &*node.cast::<pg_sys::TransactionStmt>();
                match statement.kind {
                    pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT_PREPARED => Meaning::Finish(statement.gid),
                    _ => Meaning::Nothing,
                }
            }
            _ => Meaning::Nothing,
        }
    }
}

/// The number of a prepared transaction of this database and those of its savepoints, as far as PostgreSQL keeps them in
/// memory (64); the rows of further ones are found by the worker's look-out, not in the order of commits. Empty when
/// there is no such transaction, which the command itself will say.
///
/// SAFETY: `name` is a C string.
unsafe fn prepared_numbers(name: *const c_char) -> Vec<u32> {
    if shared::get().is_none() || name.is_null() {
        return Vec::new();
    }
    // SAFETY: the caller's; main thread, inside a transaction; the snapshot is for the query alone.
    unsafe {
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let text = "SELECT transaction FROM pg_catalog.pg_prepared_xacts
                     WHERE gid = $1 AND database = pg_catalog.current_database()";
        let found = safely(|| sql::first(text, &[Text(name).into()], |row| row.get::<pg_sys::TransactionId>(1)));
        pg_sys::PopActiveSnapshot();
        let Ok(Some(Some(number))) = found else { return Vec::new() };
        let mut numbers = vec![number.into_inner()];
        let process = super::ffi::guarded(|| super::ffi::TwoPhaseGetDummyProc(number, false));
        if !process.is_null() {
            let count = usize::from((*process).subxidStatus.count);
            numbers.extend((*process).subxids.xids.iter().take(count).map(|number| number.into_inner()));
        }
        numbers
    }
}

/// What a DROP means. DROP EXTENSION imbus by its owner pushes the workers of this database out, so that it does not
/// wait for a job that runs.
///
/// SAFETY: a valid statement of PostgreSQL's parser.
unsafe fn drops(statement: &pg_sys::DropStmt) -> Meaning {
    match statement.removeType {
        pg_sys::ObjectType::OBJECT_SCHEMA => Meaning::Extension,
        pg_sys::ObjectType::OBJECT_EXTENSION => {
            // SAFETY: the objects of DROP EXTENSION are String nodes; a catalog look-up inside a transaction.
            unsafe {
                let named = cells(statement.objects).iter().any(|cell| {
                    let name = value(cell.ptr_value.cast());
                    !name.is_null() && CStr::from_ptr(name) == c"imbus"
                });
                let extension = pg_sys::get_extension_oid(c"imbus".as_ptr(), true);
                let owned = named && extension != pg_sys::InvalidOid && owns_extension(extension);
                if owned { Meaning::Hold(pg_sys::MyDatabaseId) } else { Meaning::Extension }
            }
        }
        _ => Meaning::Nothing,
    }
}

/// The text of a String node.
///
/// SAFETY: `node` is one.
unsafe fn value(node: *mut pg_sys::Node) -> *const c_char {
    // SAFETY: the caller's; the struct has been the same since PostgreSQL 15.
    unsafe { (*node.cast::<pg_sys::String>()).sval }
}

/// SAFETY: `name` is a C string.
unsafe fn database_named(name: *const c_char) -> pg_sys::Oid {
    // SAFETY: a catalog look-up inside a transaction.
    unsafe { pg_sys::get_database_oid(name, true) }
}

/// An option of CREATE or ALTER DATABASE that has a value.
///
/// SAFETY: `options` is a list of DefElem, each with a name, or NULL.
unsafe fn option(options: *mut pg_sys::List, name: &CStr) -> Option<*mut pg_sys::DefElem> {
    // SAFETY: the caller's.
    unsafe {
        let mut options = cells(options).iter().map(|cell| cell.ptr_value.cast::<pg_sys::DefElem>());
        options.find(|option| CStr::from_ptr((**option).defname) == name && !(**option).arg.is_null())
    }
}

/// Whether the workers of the named database are to leave: it is served, is not this one, and the caller has the right
/// to the command, which is checked here first so that nobody else can push the workers out.
///
/// SAFETY: `name` is a C string or NULL.
unsafe fn hold(name: *const c_char, creates: bool) -> Meaning {
    let Some(shared) = shared::get().filter(|_| !name.is_null()) else { return Meaning::Nothing };
    // SAFETY: catalog look-ups inside a transaction.
    let (oid, allowed) = unsafe {
        let oid = pg_sys::get_database_oid(name, true);
        let user = pg_sys::GetUserId();
        let owns = oid != pg_sys::InvalidOid && owns_database(oid, user);
        (oid, owns && (!creates || may_create_databases(user)))
    };
    let after = if creates { Meaning::Extension } else { Meaning::Nothing };
    if oid == pg_sys::InvalidOid || u32::from(oid) == worker::database_oid() || !allowed {
        return after;
    }
    if shared.database(oid.into()).is_none() { after } else { Meaning::Hold(oid) }
}

unsafe fn owns_database(database: pg_sys::Oid, user: pg_sys::Oid) -> bool {
    // SAFETY: a catalog look-up inside a transaction.
    unsafe {
        #[cfg(feature = "pg15")]
        let owns = pg_sys::pg_database_ownercheck(database, user);
        #[cfg(not(feature = "pg15"))]
        let owns = pg_sys::object_ownercheck(pg_sys::DatabaseRelationId, database, user);
        owns
    }
}

unsafe fn owns_extension(extension: pg_sys::Oid) -> bool {
    // SAFETY: a catalog look-up inside a transaction.
    unsafe {
        let user = pg_sys::GetUserId();
        #[cfg(feature = "pg15")]
        let owns = pg_sys::pg_extension_ownercheck(extension, user);
        #[cfg(not(feature = "pg15"))]
        let owns = pg_sys::object_ownercheck(pg_sys::ExtensionRelationId, extension, user);
        owns
    }
}

unsafe fn may_create_databases(user: pg_sys::Oid) -> bool {
    // SAFETY: a catalog look-up; the tuple is released before it is left.
    unsafe {
        if pg_sys::superuser_arg(user) {
            return true;
        }
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::AUTHOID as i32, user.into());
        if tuple.is_null() {
            return false;
        }
        let may = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_authid>()).rolcreatedb;
        pg_sys::ReleaseSysCache(tuple);
        may
    }
}

/// Runs a command while the workers of a database are kept out. They are let back when the transaction ends, however
/// it ends (`wake`): before that nobody sees what the command did.
fn held(database: pg_sys::Oid, run: impl FnOnce()) {
    let Some(shared) = shared::get() else { return run() };
    let oid = u32::from(database);
    wake::holding();
    if !shared.hold(oid, worker::pid()) {
        pgrx::warning!("too many databases are held at once: a worker of imbus may come back before the command ends");
    }
    push_out(shared, oid);
    run();
}

/// Has the workers of a database leave and waits until they have: idle ones go when they are woken, those at work are
/// terminated.
fn push_out(shared: &Shared, database: u32) {
    let until = Instant::now() + PATIENCE;
    let mut again = Instant::now() + COURTESY;
    wake_all(shared, database);
    while is_served(shared, database) && Instant::now() < until {
        if Instant::now() >= again {
            again = Instant::now() + Duration::from_secs(1);
            terminate(shared, database);
        }
        worker::wait(&Waiting { socket: None, writable: false, timeout: POLL });
    }
}

fn is_served(shared: &Shared, database: u32) -> bool {
    let worker = shared.database(database).is_some_and(|slot| {
        matches!(slot.state(), DatabaseState::Starting | DatabaseState::Running) || slot.process.pid() != 0
    });
    worker || shared.runners().any(|(_, slot)| is_runner_of(slot, database))
}

fn is_runner_of(slot: &shared::RunnerSlot, database: u32) -> bool {
    // A job that drops its own extension is left alone.
    slot.database.load(Ordering::Acquire) == database
        && slot.process.pid() != worker::pid()
        && matches!(slot.state(), RunnerState::Reserved | RunnerState::Running)
}

fn wake_all(shared: &Shared, database: u32) {
    shared.runners().filter(|(_, slot)| is_runner_of(slot, database)).for_each(|(_, slot)| slot.process.wake());
    if let Some(slot) = shared.database(database) {
        slot.process.wake();
    }
}

fn terminate(shared: &Shared, database: u32) {
    let runners = shared.runners().filter(|(_, slot)| is_runner_of(slot, database)).map(|(_, slot)| {
        slot.held.store(true, Ordering::Release);
        slot.process.pid()
    });
    let worker = shared.database(database).map(|slot| slot.process.pid());
    for pid in runners.chain(worker).filter(|pid| *pid > 0) {
        // SAFETY: a worker of this server, entered by itself and cleared when it ends.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
}
