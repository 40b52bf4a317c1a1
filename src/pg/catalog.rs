//! Whether anything has changed in PostgreSQL's catalogs that what is remembered of functions, types, schemas and roles
//! depends on. A counter, moved by the invalidations that every process hears of.

use pgrx::prelude::*;
use std::cell::Cell;

thread_local! {
    /// 0: not listening yet.
    static GENERATION: Cell<u64> = const { Cell::new(0) };
}

/// The number of the present state; what was found out under another one is to be found out again. Invalidations are
/// taken in when locks are taken, so ask after the transaction has begun.
pub fn generation() -> u64 {
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
    }
    GENERATION.get()
}

unsafe extern "C-unwind" fn changed(_argument: pg_sys::Datum, _cache: i32, _hash: u32) {
    GENERATION.set(GENERATION.get() + 1);
}
