//! The settings `imbus.*`: one table, each with its unit, range and reason, and the plain copy the network threads get.

use super::{shared, worker};
use crate::core::odoo;
use crate::core::queues::Limits;
use crate::core::settings::{AuthMethod, Settings};
use pgrx::prelude::*;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};
use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::rc::Rc;
use std::time::Duration;

type Text = GucSetting<Option<CString>>;

static PORT: GucSetting<i32> = GucSetting::<i32>::new(8072);
static LISTEN_ADDRESSES: Text = Text::new(Some(c"127.0.0.1"));
static LISTEN_DATABASE: Text = Text::new(Some(c"postgres"));
static IO_THREADS: GucSetting<i32> = GucSetting::<i32>::new(2);
static AUTH: Text = Text::new(Some(c"token"));
static TOKEN_SECRET: Text = Text::new(Some(c""));
static ODOO_URL: Text = Text::new(Some(c"http://127.0.0.1:8069"));
static ODOO_CONCURRENCY: GucSetting<i32> = GucSetting::<i32>::new(8);
static SESSION_RECHECK: GucSetting<i32> = GucSetting::<i32>::new(60);
static AUTH_FUNCTION: Text = Text::new(Some(c""));
static ALLOWED_ORIGINS: Text = Text::new(Some(c""));
/// PostgreSQL itself refuses payloads of 8000 bytes and more (async.c, NOTIFY_PAYLOAD_MAX_LENGTH), as Odoo knows.
static NOTIFY_PAYLOAD_MAX_LENGTH: GucSetting<i32> = GucSetting::<i32>::new(8000);
static EMIT_NOTIFY: GucSetting<bool> = GucSetting::<bool>::new(true);
/// Odoo's own retention in later 18.0 versions (ODOO_BUS section 12).
static GC_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(24 * 3600);
static MAX_CONNECTIONS: GucSetting<i32> = GucSetting::<i32>::new(20_000);
/// Costs the gateway more than it saves it (docs/benchmarks.md): for where the network is what is dear.
static COMPRESSION: GucSetting<bool> = GucSetting::<bool>::new(false);
static SEND_QUEUE_MAX: GucSetting<i32> = GucSetting::<i32>::new(1 << 20);
static RATE_LIMIT_BURST: GucSetting<i32> = GucSetting::<i32>::new(10);
static RATE_LIMIT_DELAY: GucSetting<i32> = GucSetting::<i32>::new(200);
static KEEPALIVE: GucSetting<i32> = GucSetting::<i32>::new(3600);
static PING_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(45);
static JOB_WORKERS: GucSetting<i32> = GucSetting::<i32>::new(4);
/// Odoo's documentation advises six workers for some thirty users; jobs leave most of them to people.
static ODOO_JOBS: GucSetting<i32> = GucSetting::<i32>::new(2);
static QUEUES: Text = Text::new(Some(c""));
static JOB_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(3 * 24 * 3600);

/// An integer setting: name, what it is, storage, least, greatest, context, unit.
type Integer = (&'static CStr, &'static CStr, &'static GucSetting<i32>, i32, i32, GucContext, GucFlags);

/// Defines the settings; those fixed at server start only while the postmaster preloads the library.
pub fn define(preloaded: bool) {
    define_integers(preloaded);
    define_texts(preloaded);
    GucRegistry::define_bool_guc(
        c"imbus.compression",
        c"Compresses messages for clients that offer permessage-deflate.",
        c"",
        &COMPRESSION,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"imbus.emit_notify",
        c"Emits NOTIFY imbus on behalf of writers, for Odoo processes that still listen.",
        c"",
        &EMIT_NOTIFY,
        GucContext::Sighup,
        GucFlags::default(),
    );
    if preloaded {
        // Otherwise the settings fixed at server start, not defined then, would be thrown out with a WARNING.
        // SAFETY: main thread, and the prefix is a C string; PostgreSQL copies it.
        unsafe { pg_sys::MarkGUCPrefixReserved(c"imbus".as_ptr()) };
    }
}

fn define_integers(preloaded: bool) {
    use GucContext::{Postmaster, Sighup, Userset};
    let none = GucFlags::default();
    let (s, ms, byte) = (GucFlags::UNIT_S, GucFlags::UNIT_MS, GucFlags::UNIT_BYTE);
    let day = 24 * 3600;
    let fixed: [Integer; 2] = [
        (c"imbus.port", c"TCP port of the gateway; 0 takes any free one.", &PORT, 0, 65_535, Postmaster, none),
        (c"imbus.io_threads", c"Network threads of the gateway.", &IO_THREADS, 1, 64, Postmaster, none),
    ];
    let reloadable: [Integer; 13] = [
        (
            c"imbus.notify_payload_max_length",
            c"A NOTIFY payload stays shorter than this.",
            &NOTIFY_PAYLOAD_MAX_LENGTH,
            32,
            8000,
            Userset,
            byte,
        ),
        (c"imbus.gc_retention", c"Age at which notifications are deleted.", &GC_RETENTION, 60, 3650 * day, Sighup, s),
        (c"imbus.max_connections", c"Open client connections.", &MAX_CONNECTIONS, 1, 1_000_000, Sighup, none),
        (
            c"imbus.send_queue_max",
            c"Bytes that may wait for one slow client before it is closed.",
            &SEND_QUEUE_MAX,
            1024,
            1 << 30,
            Sighup,
            byte,
        ),
        (c"imbus.rate_limit_burst", c"Frames a client may send at once.", &RATE_LIMIT_BURST, 1, 10_000, Sighup, none),
        (c"imbus.rate_limit_delay", c"Average time between frames.", &RATE_LIMIT_DELAY, 0, 60_000, Sighup, ms),
        (c"imbus.odoo_concurrency", c"Calls of Odoo at the same time.", &ODOO_CONCURRENCY, 1, 64, Sighup, none),
        (
            c"imbus.session_recheck",
            c"Age at which Odoo is asked again whether a session goes on; 0 is never.",
            &SESSION_RECHECK,
            0,
            day,
            Sighup,
            s,
        ),
        (c"imbus.keepalive", c"Age at which a client is asked to reconnect.", &KEEPALIVE, 10, 30 * day, Sighup, s),
        (c"imbus.ping_interval", c"Silence after which a client is pinged.", &PING_INTERVAL, 1, 3600, Sighup, s),
        (
            c"imbus.job_workers",
            c"Background workers that run jobs at the same time.",
            &JOB_WORKERS,
            0,
            shared::RUNNERS as i32,
            Sighup,
            none,
        ),
        (
            c"imbus.odoo_jobs",
            c"Requests with jobs that Odoo works on at the same time.",
            &ODOO_JOBS,
            0,
            64,
            Sighup,
            none,
        ),
        (c"imbus.job_retention", c"Age at which finished jobs are deleted.", &JOB_RETENTION, 60, 3650 * day, Sighup, s),
    ];
    let fixed = fixed.into_iter().filter(|_| preloaded);
    for (name, about, setting, min, max, context, unit) in fixed.chain(reloadable) {
        GucRegistry::define_int_guc(name, about, c"", setting, min, max, context, unit);
    }
}

fn define_texts(preloaded: bool) {
    let list = GucFlags::default();
    if preloaded {
        let fixed: [(&'static CStr, &'static CStr, &'static Text); 2] = [
            (c"imbus.listen_addresses", c"Addresses the gateway listens on, separated by commas.", &LISTEN_ADDRESSES),
            (c"imbus.listen_database", c"Database whose NOTIFY imbus wakes the gateway.", &LISTEN_DATABASE),
        ];
        for (name, about, setting) in fixed {
            GucRegistry::define_string_guc(name, about, c"", setting, GucContext::Postmaster, list);
        }
    }
    GucRegistry::define_string_guc(
        c"imbus.token_secret",
        c"Key that signs tokens; empty takes the one kept in the data directory.",
        c"",
        &TOKEN_SECRET,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY | GucFlags::NO_SHOW_ALL,
    );
    GucRegistry::define_string_guc(
        c"imbus.allowed_origins",
        c"Origins accepted besides the request's own host, separated by commas; * accepts any.",
        c"",
        &ALLOWED_ORIGINS,
        GucContext::Sighup,
        list,
    );
    GucRegistry::define_string_guc(
        c"imbus.auth_function",
        c"Function (headers jsonb, channels jsonb) that says what a client may subscribe to, with its schema.",
        c"",
        &AUTH_FUNCTION,
        GucContext::Suset,
        list,
    );
    // SAFETY: the hooks have the signature PostgreSQL asks for and are guarded.
    unsafe {
        GucRegistry::define_string_guc_with_hooks(
            c"imbus.auth",
            c"How clients prove who they are, tried in order.",
            c"",
            &AUTH,
            GucContext::Sighup,
            list,
            Some(check_auth),
            None,
            None,
        );
        GucRegistry::define_string_guc_with_hooks(
            c"imbus.odoo_url",
            c"Where Odoo itself answers, for imbus.auth = 'odoo': http://host:port.",
            c"",
            &ODOO_URL,
            GucContext::Sighup,
            list,
            Some(check_odoo_url),
            None,
            None,
        );
        GucRegistry::define_string_guc_with_hooks(
            c"imbus.queues",
            c"How many jobs of a queue run at the same time: name:limit, separated by commas; 0 leaves it to others.",
            c"",
            &QUEUES,
            GucContext::Sighup,
            list,
            Some(check_queues),
            None,
            None,
        );
    }
}

/// Refuses names of unknown methods, so that a typing error never opens or closes the gateway unnoticed.
#[pg_guard]
unsafe extern "C-unwind" fn check_auth(
    value: *mut *mut std::ffi::c_char,
    _extra: *mut *mut std::ffi::c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: see [`hooked`].
    auth_methods(&unsafe { hooked(value) }).is_some()
}

/// Refuses what is no URL of an Odoo. It is Odoo itself that is asked, not the proxy before it: no TLS.
#[pg_guard]
unsafe extern "C-unwind" fn check_odoo_url(
    value: *mut *mut std::ffi::c_char,
    _extra: *mut *mut std::ffi::c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: see [`hooked`].
    odoo::is_url(&unsafe { hooked(value) })
}

/// Refuses what is no list of limits.
#[pg_guard]
unsafe extern "C-unwind" fn check_queues(
    value: *mut *mut std::ffi::c_char,
    _extra: *mut *mut std::ffi::c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: see [`hooked`].
    Limits::parse(&unsafe { hooked(value) }).is_ok()
}

/// The value that a check hook is asked about.
///
/// # Safety
/// `value` is the address of a valid C string (or NULL), as PostgreSQL passes it to check hooks.
unsafe fn hooked(value: *mut *mut std::ffi::c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { (*value).is_null().then(String::new).unwrap_or_else(|| lossy(CStr::from_ptr(*value))) }
}

fn lossy(text: &CStr) -> String {
    text.to_string_lossy().into_owned()
}

fn auth_methods(text: &str) -> Option<Vec<AuthMethod>> {
    let methods: Option<Vec<_>> = words(text)
        .iter()
        .map(|name| match name.as_str() {
            "token" => Some(AuthMethod::Token),
            "odoo" => Some(AuthMethod::Odoo),
            "function" => Some(AuthMethod::Function),
            _ => None,
        })
        .collect();
    methods.filter(|list| !list.is_empty())
}

fn words(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn text(setting: &Text) -> String {
    setting.get().as_deref().map(lossy).unwrap_or_default()
}

fn positive(setting: &GucSetting<i32>) -> u64 {
    u64::try_from(setting.get()).unwrap_or(0)
}

/// The function that says what a client may subscribe to (`imbus.auth_function`), as this process knows it.
pub fn auth_function() -> Option<String> {
    Some(text(&AUTH_FUNCTION)).filter(|name| !name.is_empty())
}

/// The database whose NOTIFY is heard (`imbus.listen_database`).
pub fn listen_database() -> String {
    text(&LISTEN_DATABASE)
}

/// A payload must stay shorter than this many bytes (`imbus.notify_payload_max_length`).
pub fn notify_payload_max_length() -> usize {
    positive(&NOTIFY_PAYLOAD_MAX_LENGTH) as usize
}

/// Whether NOTIFY goes out for what imbus publishes (`imbus.emit_notify`).
pub fn emit_notify() -> bool {
    EMIT_NOTIFY.get()
}

/// Age at which notifications are deleted, in seconds (`imbus.gc_retention`).
pub fn gc_retention() -> i64 {
    i64::from(GC_RETENTION.get())
}

/// Age at which finished jobs are deleted, in seconds (`imbus.job_retention`).
pub fn job_retention() -> i64 {
    i64::from(JOB_RETENTION.get())
}

/// How many runners may work at once in the cluster (`imbus.job_workers`).
pub fn job_workers() -> usize {
    positive(&JOB_WORKERS) as usize
}

/// How many requests with jobs Odoo may work on at once in the cluster (`imbus.odoo_jobs`).
pub fn odoo_jobs() -> u32 {
    positive(&ODOO_JOBS) as u32
}

thread_local! {
    /// What `queues` last read, and from what.
    static LIMITS: RefCell<(CString, Rc<Limits>)> = RefCell::default();
}

/// The limits of queues (`imbus.queues`).
pub fn queues() -> Rc<Limits> {
    worker::assert_main_thread();
    // SAFETY: a C string of the setting's, or NULL; it stays until the setting is set again.
    let set = unsafe {
        let set = *QUEUES.as_ptr();
        if set.is_null() { c"" } else { CStr::from_ptr(set) }
    };
    LIMITS.with_borrow_mut(|(text, limits)| {
        if text.as_c_str() != set {
            *limits = Rc::new(Limits::parse(&lossy(set)).unwrap_or_default());
            *text = set.to_owned();
        }
        Rc::clone(limits)
    })
}

/// The key of the tokens: the setting, or else the secret kept in the data directory.
pub fn token_secret() -> Vec<u8> {
    let set = text(&TOKEN_SECRET);
    if set.is_empty() { shared::get().map(|s| s.secret().to_vec()).unwrap_or_default() } else { set.into_bytes() }
}

/// The copy for the network threads.
pub fn settings() -> Settings {
    worker::assert_main_thread();
    Settings {
        port: u16::try_from(PORT.get()).unwrap_or(0),
        listen_addresses: words(&text(&LISTEN_ADDRESSES)),
        io_threads: positive(&IO_THREADS) as usize,
        auth: auth_methods(&text(&AUTH)).unwrap_or_default(),
        odoo_url: text(&ODOO_URL),
        odoo_concurrency: positive(&ODOO_CONCURRENCY) as usize,
        session_recheck: Duration::from_secs(positive(&SESSION_RECHECK)),
        token_secret: token_secret(),
        allowed_origins: words(&text(&ALLOWED_ORIGINS)),
        max_connections: positive(&MAX_CONNECTIONS) as usize,
        compression: COMPRESSION.get(),
        send_queue_max: positive(&SEND_QUEUE_MAX) as usize,
        rate_limit_burst: u32::try_from(RATE_LIMIT_BURST.get()).unwrap_or(1),
        rate_limit_delay: Duration::from_millis(positive(&RATE_LIMIT_DELAY)),
        keepalive: Duration::from_secs(positive(&KEEPALIVE)),
        ping_interval: Duration::from_secs(positive(&PING_INTERVAL)),
    }
}
