//! The state of the whole gateway at a moment, gathered from all reactors and databases for whoever looks: as Prometheus
//! text for `/metrics`, as JSON for the live page. Costs nothing while nobody looks.

use super::counters::{Counters, LATENCIES, REJECTIONS};
use crate::core::link::Connection;
use crate::core::protocol::{Frame, text_frame};
use crate::core::status::{Database, Jobs};
use prometheus::proto::{self, MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

/// Slow consumers shown.
pub const SLOW_MAX: usize = 20;

/// What one reactor has, or all of them.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// By database: connections, subscriptions.
    pub databases: BTreeMap<u32, (u64, u64)>,
    /// Bytes that wait in the queues of connections.
    pub queued: u64,
    /// The connections with most of them.
    pub slow: Vec<Connection>,
}

impl Gauges {
    /// Adds another reactor's.
    pub fn add(&mut self, other: Gauges) {
        for (database, (connections, subscriptions)) in other.databases {
            let sum = self.databases.entry(database).or_default();
            *sum = (sum.0 + connections, sum.1 + subscriptions);
        }
        self.queued += other.queued;
        self.slow.extend(other.slow);
        self.slow.sort_by_key(|connection| std::cmp::Reverse(connection.queued));
        self.slow.truncate(SLOW_MAX);
    }
}

/// The state at a moment.
pub struct Snapshot {
    /// Milliseconds since 1970.
    pub now: i64,
    /// Milliseconds since the gateway started.
    pub uptime: u64,
    pub gauges: Gauges,
    pub databases: Vec<Database>,
    /// The names of the databases, by OID.
    pub names: HashMap<u32, String>,
    pub jobs: BTreeMap<u32, Jobs>,
    frame: OnceLock<Frame>,
}

impl Snapshot {
    /// A snapshot of what was gathered.
    pub fn new(
        (now, uptime): (i64, u64),
        gauges: Gauges,
        databases: Vec<Database>,
        names: HashMap<u32, String>,
        jobs: BTreeMap<u32, Jobs>,
    ) -> Snapshot {
        Snapshot { now, uptime, gauges, databases, names, jobs, frame: OnceLock::new() }
    }

    /// The message for the live page, made once for all that watch.
    pub fn frame(&self, counters: &Counters) -> &Frame {
        self.frame.get_or_init(|| text_frame(&self.json(counters).to_string()))
    }

    fn name(&self, database: u32) -> String {
        self.names.get(&database).cloned().unwrap_or_else(|| format!("OID {database}"))
    }

    fn totals(&self) -> (u64, u64) {
        self.gauges.databases.values().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    fn json(&self, counters: &Counters) -> Value {
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let (connections, subscriptions) = self.totals();
        let rejected: serde_json::Map<String, Value> =
            REJECTIONS.iter().map(|(why, name)| ((*name).to_owned(), counters.rejected(*why).into())).collect();
        let (counts, sum) = counters.latencies();
        let bounds: Vec<f64> = LATENCIES.iter().map(|bound| *bound as f64 / 1000.0).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "now": self.now,
            "uptime_s": self.uptime / 1000,
            "gateway": {
                "connections": connections,
                "subscriptions": subscriptions,
                "sockets": get(&counters.sockets_open),
                "queued_bytes": self.gauges.queued,
                "connections_total": get(&counters.connections_total),
                "notifications_sent_total": get(&counters.notifications_sent),
                "frames_sent_total": get(&counters.frames_sent),
                "messages_received_total": get(&counters.messages_received),
                "bytes_sent_total": get(&counters.bytes_sent),
                "bytes_received_total": get(&counters.bytes_received),
                "slow_consumers_total": get(&counters.slow_consumers),
                "replays_total": get(&counters.recoveries),
                "rejected": rejected,
            },
            "latency": {"le_ms": bounds, "counts": counts, "sum_ms": sum as f64 / 1000.0, "count": counts.last()},
            "databases": self.databases.iter().map(|database| self.database(database)).collect::<Vec<_>>(),
            "slow": self.gauges.slow.iter().map(|connection| self.slow(connection)).collect::<Vec<_>>(),
            "queues": self.queues(),
            "failed_jobs": self.failed_jobs(),
        })
    }

    fn database(&self, database: &Database) -> Value {
        let (connections, subscriptions) = self.gauges.databases.get(&database.oid).copied().unwrap_or_default();
        json!({
            "oid": database.oid,
            "name": self.name(database.oid),
            "state": database.state,
            "connections": connections,
            "subscriptions": subscriptions,
            "dispatched_total": database.dispatched,
            "gaps": database.gaps,
            "position": database.position,
            "pid": database.pid,
        })
    }

    fn slow(&self, connection: &Connection) -> Value {
        json!({
            "id": connection.id,
            "database": self.name(connection.database),
            "address": connection.address,
            "subject": connection.subject,
            "user_agent": connection.user_agent,
            "queued": connection.queued,
            "channels": connection.channels,
            "age_s": connection.age_ms / 1000,
        })
    }

    fn queues(&self) -> Vec<Value> {
        let all = self.jobs.iter().flat_map(|(oid, jobs)| jobs.queues.iter().map(move |queue| (*oid, queue)));
        all.map(|(oid, queue)| {
            json!({
                "database": self.name(oid), "queue": queue.queue, "waiting": queue.waiting,
                "processing": queue.processing, "succeeded": queue.succeeded, "failed": queue.failed, "done": queue.done,
            })
        })
        .collect()
    }

    fn failed_jobs(&self) -> Vec<Value> {
        let mut all: Vec<_> =
            self.jobs.iter().flat_map(|(oid, jobs)| jobs.failed.iter().map(move |job| (*oid, job))).collect();
        all.sort_by_key(|(_, job)| std::cmp::Reverse(job.at));
        all.truncate(SLOW_MAX);
        let job = |(oid, job): (u32, &crate::core::status::FailedJob)| json!({"database": self.name(oid), "id": job.id, "name": job.name, "error": job.error, "at": job.at});
        all.into_iter().map(job).collect()
    }

    /// The text of `/metrics` (Prometheus' exposition format 0.0.4).
    pub fn metrics(&self, counters: &Counters) -> String {
        let mut families = vec![latency(counters)];
        // The encoder refuses a family without samples.
        families.extend(self.families(counters).into_iter().filter(|family| !family.get_metric().is_empty()));
        let mut text = Vec::new();
        // Writes into memory, and every family has a name and metrics.
        let _ = TextEncoder::new().encode(&families, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    fn families(&self, counters: &Counters) -> Vec<MetricFamily> {
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed) as f64;
        let one = |name, help, kind, value: f64| family(name, help, kind, vec![(vec![], value)]);
        let (counter, gauge) = (MetricType::COUNTER, MetricType::GAUGE);
        let by_database = |pick: fn(&(u64, u64)) -> u64| -> Vec<Sample> {
            let all = self.gauges.databases.iter();
            all.map(|(oid, both)| (vec![("database", self.name(*oid))], pick(both) as f64)).collect()
        };
        let of = |pick: &dyn Fn(&Database) -> f64| -> Vec<Sample> {
            self.databases.iter().map(|one| (vec![("database", self.name(one.oid))], pick(one))).collect()
        };
        let rejected =
            REJECTIONS.iter().map(|(why, name)| (vec![("reason", (*name).to_owned())], counters.rejected(*why) as f64));
        let mut states: BTreeMap<&str, f64> = [("running", 0.0), ("starting", 0.0)].into();
        for database in &self.databases {
            *states.entry(database.state).or_default() += 1.0;
        }
        let states = states.into_iter().map(|(state, count)| (vec![("state", state.to_owned())], count));
        vec![
            one("imbus_uptime_seconds", "Time since the gateway started.", gauge, self.uptime as f64 / 1000.0),
            family("imbus_connections", "Open websockets.", gauge, by_database(|both| both.0)),
            family("imbus_subscriptions", "Channels that open websockets are on.", gauge, by_database(|both| both.1)),
            one("imbus_sockets", "Open TCP connections, whatever they speak.", gauge, get(&counters.sockets_open)),
            one("imbus_queued_bytes", "Bytes that wait for clients to read.", gauge, self.gauges.queued as f64),
            one("imbus_connections_total", "Websockets opened.", counter, get(&counters.connections_total)),
            one("imbus_http_requests_total", "HTTP requests answered.", counter, get(&counters.requests)),
            one("imbus_messages_received_total", "Messages from clients.", counter, get(&counters.messages_received)),
            one("imbus_received_bytes_total", "Bytes read from clients.", counter, get(&counters.bytes_received)),
            one(
                "imbus_notifications_sent_total",
                "Notifications sent, once for each receiver.",
                counter,
                get(&counters.notifications_sent),
            ),
            one("imbus_frames_sent_total", "Frames sent, once for each receiver.", counter, get(&counters.frames_sent)),
            one("imbus_sent_bytes_total", "Bytes written to clients.", counter, get(&counters.bytes_sent)),
            one(
                "imbus_slow_consumers_total",
                "Clients closed because they read too slowly.",
                counter,
                get(&counters.slow_consumers),
            ),
            one("imbus_odoo_calls_total", "Calls made to Odoo.", counter, get(&counters.odoo_calls)),
            one(
                "imbus_odoo_failures_total",
                "Calls to Odoo that had no answer.",
                counter,
                get(&counters.odoo_failures),
            ),
            one("imbus_odoo_jobs_total", "Jobs that Odoo was called for.", counter, get(&counters.odoo_jobs)),
            one("imbus_odoo_waiting", "Calls to Odoo that wait in line.", gauge, get(&counters.odoo_waiting)),
            one("imbus_odoo_sessions", "Sessions of Odoo's with a websocket.", gauge, get(&counters.odoo_sessions)),
            one("imbus_replays_total", "Replays to clients that came back.", counter, get(&counters.recoveries)),
            family("imbus_rejections_total", "Clients turned away, by reason.", counter, rejected.collect()),
            family("imbus_database_workers", "Database workers, by state.", gauge, states.collect()),
            family("imbus_dispatched_total", "Notifications dispatched.", counter, of(&|one| one.dispatched as f64)),
            family("imbus_gaps", "Ranges of ids that may still be committed.", gauge, of(&|one| one.gaps as f64)),
            family("imbus_position", "The greatest id dispatched.", gauge, of(&|one| one.position as f64)),
            family("imbus_jobs", "Jobs, by queue and state (counted up to a bound).", gauge, self.job_samples()),
        ]
    }

    fn job_samples(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        for (oid, jobs) in &self.jobs {
            for queue in &jobs.queues {
                let states = [
                    ("created", queue.waiting),
                    ("processing", queue.processing),
                    ("succeeded", queue.succeeded),
                    ("failed", queue.failed),
                    ("done", queue.done),
                ];
                samples.extend(states.into_iter().map(|(state, count)| {
                    let labels = vec![
                        ("database", self.name(*oid)),
                        ("queue", queue.queue.clone()),
                        ("state", state.to_owned()),
                    ];
                    (labels, count as f64)
                }));
            }
        }
        samples
    }
}

/// Labels and a value.
type Sample = (Vec<(&'static str, String)>, f64);

fn family(name: &str, help: &str, kind: MetricType, samples: Vec<Sample>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    let metrics = samples.into_iter().map(|(labels, value)| {
        let mut metric = proto::Metric::default();
        let labels = labels.into_iter().map(|(name, value)| {
            let mut label = proto::LabelPair::default();
            label.set_name(name.to_owned());
            label.set_value(value);
            label
        });
        metric.set_label(labels.collect());
        if kind == MetricType::COUNTER {
            let mut counter = proto::Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = proto::Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        metric
    });
    family.set_metric(metrics.collect());
    family
}

fn latency(counters: &Counters) -> MetricFamily {
    let (counts, sum) = counters.latencies();
    // The encoder adds the last one itself.
    let bounds = LATENCIES.iter().map(|bound| *bound as f64 / 1e6);
    let buckets = bounds.zip(&counts).map(|(bound, count)| {
        let mut bucket = proto::Bucket::default();
        bucket.set_upper_bound(bound);
        bucket.set_cumulative_count(*count);
        bucket
    });
    let mut histogram = proto::Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(counts.last().copied().unwrap_or(0));
    histogram.set_sample_sum(sum as f64 / 1e6);
    let mut metric = proto::Metric::default();
    metric.set_histogram(histogram);
    let mut family = MetricFamily::default();
    family.set_name("imbus_commit_to_send_seconds".to_owned());
    family.set_help(
        "From a commit until its notifications were handed to the kernel, once for each receiver.".to_owned(),
    );
    family.set_field_type(MetricType::HISTOGRAM);
    family.set_metric(vec![metric]);
    family
}
