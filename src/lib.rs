//! imbus: Odoo's real-time bus and job queue inside PostgreSQL.
//!
//! Three rings (ARCHITECTURE.md): `core` decides, `net` moves bytes, `pg` touches PostgreSQL. Without a `pgNN` feature
//! only `core` and `net` are compiled, and their tests need no PostgreSQL.

pub mod core;
pub mod net;
#[cfg(feature = "pg")]
mod pg;

#[cfg(feature = "pg")]
pgrx::pg_module_magic!(name, version);
