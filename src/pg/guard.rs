//! What a worker, or a function that runs as the tables' owner, may read as superuser: imbus's own tables, the one it
//! was told, and PostgreSQL's catalogs. SQL names tables by name, and whoever owns the schema can put a view in place of
//! a name between two looks; so while such a statement is analysed, every relation it has come to mean is checked by OID
//! (before views are expanded and functions folded, and again when a kept plan is made anew).

use super::{bus, ffi};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_void};

thread_local! {
    /// The relations that may be read besides imbus's own; None while nothing is guarded.
    static ALLOWED: RefCell<Option<[pg_sys::Oid; 2]>> = const { RefCell::new(None) };
    /// The statement that is checked; what triggers of a user's run inside it is their own.
    static STATEMENT: RefCell<CString> = RefCell::new(CString::default());
}

static mut PREVIOUS: pg_sys::post_parse_analyze_hook_type = None;

/// Installs the hook, in every process that loads the library.
pub fn install() {
    // SAFETY: `_PG_init`, main thread.
    unsafe {
        PREVIOUS = pg_sys::post_parse_analyze_hook;
        pg_sys::post_parse_analyze_hook = Some(analysed);
    }
}

/// While it lives, statements are checked.
pub struct Guard(Option<[pg_sys::Oid; 2]>);

/// Allows these relations, besides imbus's own, until the guard is dropped.
pub fn allow(relations: [pg_sys::Oid; 2]) -> Guard {
    Guard(ALLOWED.replace(Some(relations)))
}

/// This statement runs next.
pub fn statement(text: &CStr) {
    if ALLOWED.with_borrow(Option::is_some) {
        STATEMENT.set(text.to_owned());
    }
}

fn is_checked(state: *const pg_sys::ParseState) -> bool {
    // SAFETY: a valid parse state, whose source is a C string or NULL.
    let source = unsafe { (*state).p_sourcetext };
    ALLOWED.with_borrow(Option::is_some)
        && !source.is_null()
        // SAFETY: as above.
        && STATEMENT.with_borrow(|text| text.as_c_str() == unsafe { CStr::from_ptr(source) })
}

impl Drop for Guard {
    fn drop(&mut self) {
        ALLOWED.set(self.0.take());
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn analysed(
    state: *mut pg_sys::ParseState,
    query: *mut pg_sys::Query,
    jumble: *mut pg_sys::JumbleState,
) {
    // SAFETY: the arguments are passed on as they came; the query is walked as PostgreSQL walks it.
    unsafe {
        if let Some(previous) = PREVIOUS {
            ffi::guarded(|| previous(state, query, jumble));
        }
        if is_checked(state) && strays(query.cast(), std::ptr::null_mut()) {
            pgrx::ereport!(
                ERROR,
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                "a table of imbus has been replaced by another relation",
                "Its schema was renamed, or another object took its name."
            );
        }
    }
}

/// Whether a node means a relation that is not allowed.
///
/// SAFETY: a node of an analysed query, or NULL.
unsafe extern "C-unwind" fn strays(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    // SAFETY: the caller's; each cast follows the tag.
    unsafe {
        if node.is_null() {
            return false;
        }
        if (*node).type_ != pg_sys::NodeTag::T_Query {
            return ffi::expression_tree_walker(node, Some(strays), context);
        }
        let query = node.cast::<pg_sys::Query>();
        let foreign = |cell: &pg_sys::ListCell| {
            let entry = &*cell.ptr_value.cast::<pg_sys::RangeTblEntry>();
            entry.rtekind == pg_sys::RTEKind::RTE_RELATION && !is_allowed(entry.relid)
        };
        ffi::cells((*query).rtable).iter().any(foreign) || ffi::query_tree_walker(query, Some(strays), context, 0)
    }
}

fn is_allowed(relation: pg_sys::Oid) -> bool {
    if u32::from(relation) < pg_sys::FirstNormalObjectId
        || ALLOWED.with_borrow(|list| list.is_some_and(|l| l.contains(&relation)))
    {
        return true;
    }
    // SAFETY: catalog look-ups inside a transaction.
    let is_imbus = unsafe {
        let imbus = pg_sys::get_extension_oid(c"imbus".as_ptr(), true);
        imbus != pg_sys::InvalidOid && pg_sys::getExtensionOfObject(pg_sys::RelationRelationId, relation) == imbus
    };
    // Whoever owns the extension can add relations of his own to it.
    // SAFETY: as above.
    is_imbus && bus::owner(relation).is_some_and(|owner| unsafe { pg_sys::superuser_arg(owner) })
}
