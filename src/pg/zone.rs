//! The server's time zones: those that `SET timezone` takes, from the same files, so that what a government decides
//! reaches schedules with the operating system's update and the worker's next start.

use super::report::Outcome;
use crate::core::error::Error;
use crate::core::schedule::{Span, Zone};
use pgrx::prelude::*;
use std::ffi::{CStr, CString};

/// A time zone of the server's, which keeps it for the life of the process.
pub struct ServerZone(*mut pg_sys::pg_tz);

impl ServerZone {
    /// The zone of that name. Errors: 22023 when there is none.
    pub fn named(name: &str) -> Outcome<ServerZone> {
        let unknown = || {
            let reason = "it must be the name of a time zone (pg_timezone_names lists them)".to_owned();
            Error::Argument { argument: "time_zone", value: name.to_owned(), reason }
        };
        let text = CString::new(name).map_err(|_| unknown())?;
        // SAFETY: main thread; a C string. The zone is PostgreSQL's own, kept for the life of the process.
        let zone = unsafe { pg_sys::pg_tzset(text.as_ptr()) };
        // SAFETY: as above. Zones that count leap seconds are not PostgreSQL's time.
        if zone.is_null() || !unsafe { pg_sys::pg_tz_acceptable(zone) } {
            return Err(unknown().into());
        }
        Ok(ServerZone(zone))
    }

    /// Its name as the server writes it.
    pub fn name(&self) -> String {
        // SAFETY: main thread; a C string of the zone's own.
        unsafe { CStr::from_ptr(pg_sys::pg_get_timezone_name(self.0)) }.to_string_lossy().into_owned()
    }
}

impl Zone for ServerZone {
    fn span(&self, at: i64) -> Span {
        let (mut before, mut after, mut boundary) = (0, 0, 0);
        let (mut before_dst, mut after_dst) = (0, 0);
        // SAFETY: main thread; reads the zone, writes the variables.
        let found = unsafe {
            pg_sys::pg_next_dst_boundary(
                &at,
                &mut before,
                &mut before_dst,
                &mut boundary,
                &mut after,
                &mut after_dst,
                self.0,
            )
        };
        // A moment too far away to be converted has no offset: the search for a match ends by itself there.
        Span { offset: before, until: (found > 0 && boundary > at).then_some(boundary) }
    }
}
