//! The short way into a table: rows are put in as logical replication's apply worker does it
//! (ExecSimpleRelationInsert), without parsing, planning or triggers. Only where that comes to the same as INSERT: no rules,
//! row security or checks, no trigger that the caller has not allowed for, and no index with a predicate or an expression
//! but those that a superuser has made (a user's domain, too, calls functions); so no code but PostgreSQL's own runs, and no
//! change of user is needed.

use super::ffi;
use super::report::Outcome;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};

thread_local! {
    /// By the indexes' OIDs.
    static KNOWN: RefCell<BTreeMap<u32, Known>> = const { RefCell::new(BTreeMap::new()) };
}

/// What is known of an index, in the life of which it does not change. Kept for that of the process: to find it out for each row
/// costs more than the rest of the row's way into the indexes.
#[derive(Clone, Copy)]
struct Known {
    /// Its description, predicate and expressions compiled.
    info: *mut pg_sys::IndexInfo,
    /// The predicate's, NULL for none: after a wait, a look into the description is one more into memory.
    predicate: *mut pg_sys::ExprState,
}

/// An open table.
pub struct Table(pg_sys::Relation);

/// One of its columns.
pub struct Column<'a> {
    pub name: &'a [u8],
    pub type_oid: pg_sys::Oid,
    pub has_modifier: bool,
    pub is_required: bool,
    pub has_default: bool,
    pub is_dropped: bool,
}

impl Table {
    /// All columns, also dropped ones, in order.
    pub fn columns(&self) -> impl Iterator<Item = Column<'_>> {
        // SAFETY: the relation's cache entry stays while it is open.
        let (descriptor, count) = unsafe { ((*self.0).rd_att, (*(*self.0).rd_att).natts) };
        (0..count).map(move |index| {
            // SAFETY: so many columns are there; a NAME ends with a zero byte.
            unsafe {
                let column = &*ffi::attribute(descriptor, index);
                Column {
                    name: CStr::from_ptr(column.attname.data.as_ptr()).to_bytes(),
                    type_oid: column.atttypid,
                    has_modifier: column.atttypmod >= 0,
                    is_required: column.attnotnull,
                    has_default: column.atthasdef,
                    is_dropped: column.attisdropped,
                }
            }
        })
    }

    /// The names of the triggers that an INSERT fires, and whether they are PostgreSQL's own.
    pub fn triggers(&self) -> impl Iterator<Item = (&[u8], bool)> {
        self.triggers_of(pg_sys::TRIGGER_TYPE_INSERT)
    }

    fn triggers_of(&self, event: u32) -> impl Iterator<Item = (&[u8], bool)> {
        // SAFETY: the list of the relation's cache entry; names are C strings.
        let triggers = unsafe {
            (*self.0).trigdesc.as_ref().map_or(&[][..], |found| {
                std::slice::from_raw_parts(found.triggers, usize::try_from(found.numtriggers).unwrap_or(0))
            })
        };
        let fires = move |trigger: &&pg_sys::Trigger| trigger.tgtype & event as i16 != 0;
        // SAFETY: as above.
        let name = |trigger: &pg_sys::Trigger| unsafe { CStr::from_ptr(trigger.tgname) }.to_bytes();
        triggers.iter().filter(fires).map(move |trigger| (name(trigger), trigger.tgisinternal))
    }

    /// The columns of foreign keys, counted from 0.
    pub fn foreign_keys(&self) -> impl Iterator<Item = usize> {
        // SAFETY: a list of the relation's cache entry.
        let keys = unsafe { ffi::cells(pg_sys::RelationGetFKeyList(self.0)) };
        keys.iter().flat_map(|cell| {
            // SAFETY: its cells are such.
            let key = unsafe { &*cell.ptr_value.cast::<pg_sys::ForeignKeyCacheInfo>() };
            let count = usize::try_from(key.nkeys).unwrap_or(0);
            key.conkey.iter().take(count).filter_map(|number| usize::try_from(i32::from(*number) - 1).ok())
        })
    }

    /// Whether INSERT would do no more than put in the row and call triggers.
    fn is_plain(&self) -> bool {
        // SAFETY: the relation's cache entry stays while it is open.
        unsafe {
            (*self.0).rd_rules.is_null()
                && !(*(*self.0).rd_rel).relforcerowsecurity
                && (*(*self.0).rd_att)
                    .constr
                    .as_ref()
                    .is_none_or(|found| found.num_check == 0 && !found.has_generated_stored)
        }
    }
}

/// What stands in a column of a row that is moved.
pub enum Value {
    /// What stood there before.
    Same,
    /// Something else, None for NULL.
    Other(Option<pg_sys::Datum>),
}

/// Moves rows that this transaction has locked into another table, which has the same columns and which `fits`. `value` tells what
/// stands in a column (counted from 0) of a row (counted so among `places`, which have their ids) from now on. False when a row is
/// not as it was, so that the transaction must not be committed; None where the long way must be gone. Errors: as `with`.
pub fn relocate<F>(
    [from, to]: [pg_sys::Oid; 2],
    indexes: Indexes,
    fits: impl FnOnce(&Table) -> Option<F>,
    places: &[(pg_sys::ItemPointerData, i64)],
    mut value: impl FnMut(&F, usize, usize) -> Value,
) -> Outcome<Option<bool>> {
    if from == to {
        return Ok(None);
    }
    // SAFETY: as in `with`. The slot is dropped before its table is closed.
    unsafe {
        let from = Table(pg_sys::table_open(from, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE));
        let is_plain = from.is_plain() && from.triggers_of(pg_sys::TRIGGER_TYPE_DELETE).next().is_none();
        let is_like_it = |to: &Table| {
            let alike = |(one, other): (Column<'_>, Column<'_>)| {
                (one.name, one.type_oid, one.is_dropped) == (other.name, other.type_oid, other.is_dropped)
            };
            is_plain && from.columns().count() == to.columns().count() && from.columns().zip(to.columns()).all(alike)
        };
        let fits = |to: &Table| is_like_it(to).then(|| fits(to)).flatten();
        let id = from.columns().position(|column| column.name == b"id" && column.type_oid == pg_sys::INT8OID);
        let fits = |to: &Table| id.zip(fits(to));
        let moved = with(to, indexes, fits, |rows, (id, found)| {
            let slot = pg_sys::table_slot_create(from.0, std::ptr::null_mut());
            let mut are_there = true;
            for (row, (place, expected)) in places.iter().enumerate() {
                are_there = ffi::fetch(from.0, *place, slot);
                let (values, nulls) = ((*slot).tts_values, (*slot).tts_isnull);
                // Whoever rewrites the table puts another row there.
                are_there = are_there && (*values.add(id)).value() as i64 == *expected;
                if !are_there {
                    break;
                }
                rows.put(|column| match value(&found, row, column) {
                    Value::Same => (!*nulls.add(column)).then(|| *values.add(column)),
                    Value::Other(datum) => datum,
                });
                ffi::clear(slot);
                let mut place = *place;
                pg_sys::simple_table_tuple_delete(from.0, &raw mut place, &raw mut pg_sys::SnapshotSelfData);
            }
            pg_sys::ExecDropSingleTupleTableSlot(slot);
            Ok(are_there)
        });
        pg_sys::table_close(from.0, pg_sys::NoLock as pg_sys::LOCKMODE);
        moved
    }
}

/// A table with its indexes, ready to take rows.
pub struct Rows {
    relation: pg_sys::Relation,
    result: *mut pg_sys::ResultRelInfo,
    state: *mut pg_sys::EState,
    slot: *mut pg_sys::TupleTableSlot,
    /// Partial indexes that no row belongs in so far, by their OIDs, with their predicates. Most indexes of a queue are of
    /// states that a new job does not have: to open each and close it again costs a good part of the row's way.
    closed: Vec<(pg_sys::Oid, *mut pg_sys::ExprState)>,
}

/// Whose indexes a table has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Indexes {
    /// Those of some user.
    Anybodys,
    /// A superuser's alone, with whatever predicates and expressions.
    Superusers,
}

/// Opens a table for `work`, if what `fits` finds in it is right; None where the long way must be gone. The rows are there
/// for the next command. Errors: 25006 in a read-only transaction, 25000 in a parallel worker, and whatever `work` returns.
pub fn with<F, T>(
    relid: pg_sys::Oid,
    indexes: Indexes,
    fits: impl FnOnce(&Table) -> Option<F>,
    work: impl FnOnce(&mut Rows, F) -> Outcome<T>,
) -> Outcome<Option<T>> {
    // SAFETY: main thread, inside a transaction. What is opened is closed below; on ERROR the abort closes it.
    unsafe {
        pg_sys::PreventCommandIfReadOnly(c"INSERT".as_ptr());
        pg_sys::PreventCommandIfParallelMode(c"INSERT".as_ptr());
        let table = Table(pg_sys::table_open(relid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE));
        let done = match fits(&table).filter(|_| table.is_plain()) {
            Some(found) => with_indexes(table.0, indexes, |rows| work(rows, found)),
            None => Ok(None),
        };
        pg_sys::table_close(table.0, pg_sys::NoLock as pg_sys::LOCKMODE);
        done
    }
}

/// Whether an INSERT into a table fires a trigger of such a name: as it is now, whatever the transaction's snapshot, and as it
/// stays until the transaction's end. For rows that are put into another table in its stead.
pub fn fires(relid: pg_sys::Oid, is_such: impl Fn(&[u8]) -> bool) -> bool {
    // SAFETY: main thread, inside a transaction; closed below, on ERROR by the abort.
    let table = Table(unsafe { pg_sys::table_open(relid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE) });
    let fires = table.triggers().any(|(name, _)| is_such(name));
    // SAFETY: pairs with table_open; the lock is INSERT's.
    unsafe { pg_sys::table_close(table.0, pg_sys::NoLock as pg_sys::LOCKMODE) };
    fires
}

/// SAFETY: an open relation.
unsafe fn with_indexes<T>(
    relation: pg_sys::Relation,
    indexes: Indexes,
    work: impl FnOnce(&mut Rows) -> Outcome<T>,
) -> Outcome<Option<T>> {
    // SAFETY: as in `with`. The result relation and the slot live as long as the executor's state.
    unsafe {
        let state = pg_sys::CreateExecutorState();
        let context = pg_sys::MemoryContextSwitchTo((*state).es_query_cxt);
        // As InitResultRelInfo has it for a table that no statement's range table has, without a copy of its triggers.
        let result = pg_sys::palloc0(size_of::<pg_sys::ResultRelInfo>()).cast::<pg_sys::ResultRelInfo>();
        (*result).type_ = pg_sys::NodeTag::T_ResultRelInfo;
        (*result).ri_RelationDesc = relation;
        let done = match prepare(result, relation, indexes) {
            None => None,
            Some(closed) => {
                let slot = pg_sys::table_slot_create(relation, std::ptr::null_mut());
                let done = work(&mut Rows { relation, result, state, slot, closed });
                pg_sys::ExecDropSingleTupleTableSlot(slot);
                pg_sys::CommandCounterIncrement();
                Some(done)
            }
        };
        pg_sys::ExecCloseIndices(result);
        pg_sys::MemoryContextSwitchTo(context);
        pg_sys::FreeExecutorState(state);
        done.transpose()
    }
}

/// Opens the indexes, in the order of their OIDs as ExecOpenIndices does, but for partial ones that are known: those are
/// returned. None if one is checked later, by a trigger, or calls somebody's functions.
///
/// SAFETY: a result relation without indexes, of an open relation, in the executor's memory.
unsafe fn prepare(
    result: *mut pg_sys::ResultRelInfo,
    relation: pg_sys::Relation,
    indexes: Indexes,
) -> Option<Vec<(pg_sys::Oid, *mut pg_sys::ExprState)>> {
    // SAFETY: the caller's. Places for as many as there are.
    unsafe {
        let oids = ffi::cells(pg_sys::RelationGetIndexList(relation));
        (*result).ri_IndexRelationDescs = pg_sys::palloc0(size_of::<pg_sys::Relation>() * oids.len()).cast();
        (*result).ri_IndexRelationInfo = pg_sys::palloc0(size_of::<*mut pg_sys::IndexInfo>() * oids.len()).cast();
        let mut closed = Vec::with_capacity(oids.len());
        for cell in oids {
            let oid = cell.oid_value;
            match known(oid) {
                Some(known) if !known.predicate.is_null() => closed.push((oid, known.predicate)),
                _ => open(result, oid, indexes).then_some(())?,
            }
        }
        Some(closed)
    }
}

/// Opens one more index and makes it ready; false if it may not be one of this kind, or if what it is made of cannot be kept.
///
/// SAFETY: as in `prepare`, with a place left.
unsafe fn open(result: *mut pg_sys::ResultRelInfo, oid: pg_sys::Oid, indexes: Indexes) -> bool {
    // SAFETY: the caller's: ExecOpenIndices for one index. What is open is closed by ExecCloseIndices.
    unsafe {
        let relation = pg_sys::index_open(oid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
        // B-trees keep nothing in it from row to row.
        let is_shared = (*(*relation).rd_rel).relam == pg_sys::BTREE_AM_OID;
        let known = known(oid);
        let info = known.filter(|_| is_shared).map(|known| known.info);
        let info = info.unwrap_or_else(|| pg_sys::BuildIndexInfo(relation));
        let place = usize::try_from((*result).ri_NumIndices).unwrap_or(0);
        *(*result).ri_IndexRelationDescs.add(place) = relation;
        *(*result).ri_IndexRelationInfo.add(place) = info;
        (*result).ri_NumIndices += 1;
        let is_simple = (*info).ii_Expressions.is_null() && (*info).ii_Predicate.is_null();
        if !(*(*relation).rd_index).indimmediate || !is_simple && indexes == Indexes::Anybodys {
            return false;
        }
        if known.is_none() && !is_simple && !is_lasting(info) {
            return false;
        }
        let known = known.unwrap_or_else(|| learn(relation, oid));
        (*info).ii_PredicateState = known.predicate;
        (*info).ii_ExpressionsState = (*known.info).ii_ExpressionsState;
        (*info).ii_ReadyForInserts = (*(*relation).rd_index).indisready;
        true
    }
}

fn known(index: pg_sys::Oid) -> Option<Known> {
    KNOWN.with_borrow(|known| known.get(&u32::from(index)).copied())
}

/// Whether what an index is made of can be kept compiled: columns and constants, operators and functions of them. A whole row, for
/// one, keeps its description in the memory of the executor that it is first evaluated in.
///
/// SAFETY: a valid description of an index.
unsafe fn is_lasting(info: *mut pg_sys::IndexInfo) -> bool {
    // SAFETY: the caller's; lists of expressions or NULL.
    unsafe {
        let parts = [(*info).ii_Expressions, (*info).ii_Predicate];
        !ffi::guarded(|| parts.iter().any(|part| is_fleeting(part.cast(), std::ptr::null_mut())))
    }
}

/// Whether anything in an expression is not known to last.
///
/// SAFETY: a node of an expression, or NULL.
unsafe extern "C-unwind" fn is_fleeting(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    use pg_sys::NodeTag::*;
    // SAFETY: the caller's; the cast follows the tag.
    unsafe {
        if node.is_null() {
            return false;
        }
        let lasts = match (*node).type_ {
            T_Var => (*node.cast::<pg_sys::Var>()).varattno > 0,
            T_List | T_Const | T_FuncExpr | T_OpExpr | T_ScalarArrayOpExpr | T_BoolExpr | T_NullTest | T_CaseExpr
            | T_CaseWhen | T_CaseTestExpr | T_RelabelType => true,
            _ => false,
        };
        !lasts || ffi::expression_tree_walker(node, Some(is_fleeting), context)
    }
}

/// Describes an index for good, and compiles what it is made of as execIndexing.c does it at each first row of a statement.
///
/// SAFETY: an open index.
unsafe fn learn(relation: pg_sys::Relation, oid: pg_sys::Oid) -> Known {
    // SAFETY: the caller's. All of it is made in memory that lives as long as the process.
    unsafe {
        let context = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
        let info = pg_sys::BuildIndexInfo(relation);
        if !(*info).ii_Predicate.is_null() {
            (*info).ii_PredicateState = pg_sys::ExecInitQual((*info).ii_Predicate, std::ptr::null_mut());
        }
        for cell in ffi::cells((*info).ii_Expressions) {
            let state = pg_sys::ExecInitExpr(cell.ptr_value.cast(), std::ptr::null_mut());
            (*info).ii_ExpressionsState = pg_sys::lappend((*info).ii_ExpressionsState, state.cast());
        }
        pg_sys::MemoryContextSwitchTo(context);
        let known = Known { info, predicate: (*info).ii_PredicateState };
        KNOWN.with_borrow_mut(|all| all.insert(u32::from(oid), known));
        known
    }
}

impl Rows {
    /// Puts in a row. `value` tells what stands in a column (counted from 0), None for NULL; what it makes is for this row
    /// only. A column that may not be NULL, or a duplicate key, raises as INSERT does.
    pub fn put(&mut self, mut value: impl FnMut(usize) -> Option<pg_sys::Datum>) {
        // SAFETY: the slot has as many places as the relation has columns; its values are made in a memory context that
        // is emptied once the row is in.
        unsafe {
            if (*self.state).es_per_tuple_exprcontext.is_null() {
                pg_sys::MakePerTupleExprContext(self.state);
            }
            let memory = (*(*self.state).es_per_tuple_exprcontext).ecxt_per_tuple_memory;
            let context = pg_sys::MemoryContextSwitchTo(memory);
            let count = usize::try_from((*(*self.relation).rd_att).natts).unwrap_or(0);
            let values = std::slice::from_raw_parts_mut((*self.slot).tts_values, count);
            let nulls = std::slice::from_raw_parts_mut((*self.slot).tts_isnull, count);
            for (column, (place, null)) in values.iter_mut().zip(nulls).enumerate() {
                let datum = value(column);
                *null = datum.is_none();
                *place = datum.unwrap_or(pg_sys::Datum::from(0));
            }
            pg_sys::ExecStoreVirtualTuple(self.slot);
            while let Some(next) = ffi::first_held(&self.closed, self.state, self.slot) {
                pg_sys::MemoryContextSwitchTo(context);
                // It was allowed when it was first met.
                open(self.result, self.closed.remove(next).0, Indexes::Superusers);
                pg_sys::MemoryContextSwitchTo(memory);
            }
            pg_sys::MemoryContextSwitchTo(context);
            pg_sys::ExecSimpleRelationInsert(self.result, self.state, self.slot);
            ffi::clear(self.slot);
            pg_sys::MemoryContextReset(memory);
        }
    }
}

/// The next number of a sequence, whoever may use it.
pub fn next_of(sequence: pg_sys::Oid) -> i64 {
    // SAFETY: main thread, inside a transaction.
    unsafe { ffi::guarded(|| ffi::nextval_internal(sequence, false)) }
}
