//! Whether anything has changed in PostgreSQL's catalogs that what is remembered of functions, types, schemas and roles
//! depends on, or anything of tables. Counters, moved by the invalidations that every process hears of.

use super::report::Outcome;
use super::sql;
use pgrx::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::thread::LocalKey;

thread_local! {
    /// 0: not listening yet.
    static GENERATION: Cell<u64> = const { Cell::new(0) };
    /// The same of tables.
    static TABLES: Cell<u64> = const { Cell::new(0) };
}

/// The number of the present state; what was found out under another one is to be found out again. Invalidations are
/// taken in when locks are taken, so ask after the transaction has begun.
pub fn generation() -> u64 {
    listen();
    GENERATION.get()
}

/// The same of whatever tables, their columns, triggers, names and schemas.
pub fn tables() -> (u64, u64) {
    listen();
    (GENERATION.get(), TABLES.get())
}

fn listen() {
    if GENERATION.get() == 0 {
        GENERATION.set(1);
        use pg_sys::SysCacheIdentifier as Cache;
        let caches = [
            Cache::PROCOID,
            Cache::TYPEOID,
            Cache::NAMESPACEOID,
            Cache::AUTHOID,
            Cache::AUTHMEMMEMROLE,
            Cache::DATABASEOID,
        ];
        for cache in caches {
            // SAFETY: main thread, once in the life of a process; the callback touches its own counter only.
            unsafe { pg_sys::CacheRegisterSyscacheCallback(cache as i32, Some(changed), pg_sys::Datum::from(0)) };
        }
        // SAFETY: as above.
        unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(table_changed), pg_sys::Datum::from(0)) };
    }
}

unsafe extern "C-unwind" fn changed(_argument: pg_sys::Datum, _cache: i32, _hash: u32) {
    GENERATION.set(GENERATION.get() + 1);
}

unsafe extern "C-unwind" fn table_changed(_argument: pg_sys::Datum, _relid: pg_sys::Oid) {
    TABLES.set(TABLES.get() + 1);
}

/// Answers kept at once, at most; then all are forgotten.
const KEPT: usize = 200;

/// What was found out in the catalogs, by what was asked.
pub struct Remembered<K, V> {
    generation: u64,
    answers: HashMap<K, V>,
}

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Remembered<K, V> {
        Remembered { generation: 0, answers: HashMap::new() }
    }
}

/// The answer to a question, which is found out only if it is not known, or if something has changed since.
pub fn remembered<K: Eq + Hash, V: Clone>(
    memory: &'static LocalKey<RefCell<Remembered<K, V>>>,
    question: K,
    find_out: impl FnOnce(&K) -> Outcome<V>,
) -> Outcome<V> {
    let generation = generation();
    let known = memory.with_borrow_mut(|memory| {
        if memory.generation != generation || memory.answers.len() >= KEPT {
            memory.answers.clear();
            memory.generation = generation;
        }
        memory.answers.get(&question).cloned()
    });
    if let Some(known) = known {
        return Ok(known);
    }
    let found = sql::as_of_now(|| find_out(&question))?;
    // Whatever has changed meanwhile: found out under an older state, it is forgotten with it.
    memory.with_borrow_mut(|memory| {
        if memory.generation == generation {
            memory.answers.insert(question, found.clone());
        }
    });
    Ok(found)
}
