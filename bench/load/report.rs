//! Markdown of the visits: medians over the rounds, ratios, and the aims with whether they were met.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// Values of the visits of one server with so many sockets, by key.
type Visits = HashMap<String, Vec<f64>>;

/// All visits, by server and sockets; those that looked at memory apart, by channels and pool.
#[derive(Default)]
struct All {
    visits: BTreeMap<(String, usize), Visits>,
    memory: BTreeMap<(u64, u64), (usize, f64)>,
}

impl All {
    fn read(text: &str) -> All {
        let mut all = All::default();
        for line in text.lines() {
            let pairs: HashMap<&str, &str> = line.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
            let number = |key: &str| pairs.get(key).and_then(|value| value.parse::<f64>().ok());
            let (Some(server), Some(sockets)) = (pairs.get("server"), number("sockets")) else { continue };
            let (channels, pool) = (number("channels").unwrap_or(1.0), number("pool").unwrap_or(0.0));
            if !pairs.contains_key("paced_per_s") {
                let bytes = number("connection_bytes").unwrap_or(f64::NAN);
                all.memory.insert((channels as u64, pool as u64), (sockets as usize, bytes));
                continue;
            }
            let visits = all.visits.entry(((*server).to_owned(), sockets as usize)).or_default();
            for key in pairs.keys() {
                visits.entry((*key).to_owned()).or_default().extend(number(key));
            }
        }
        all
    }

    /// Median over the rounds.
    fn median(&self, server: &str, sockets: usize, key: &str) -> Option<f64> {
        let mut values = self.visits.get(&(server.to_owned(), sockets))?.get(key)?.clone();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        match values.len() {
            0 => None,
            length if length % 2 == 0 => Some((values[middle - 1] + values[middle]) / 2.0),
            _ => Some(values[middle]),
        }
    }

    /// A server's value divided by the bare writer's of the same round, median over the rounds.
    fn ratio(&self, server: &str, sockets: usize, key: &str) -> Option<f64> {
        let of = |server: &str| self.visits.get(&(server.to_owned(), sockets))?.get(key);
        let mut ratios: Vec<f64> = of(server)?.iter().zip(of("bare")?).map(|(value, bare)| value / bare).collect();
        ratios.sort_by(f64::total_cmp);
        ratios.get(ratios.len() / 2).copied()
    }

    /// The ratio in per cent, or a dash.
    fn of_bare(&self, server: &str, sockets: usize, key: &str) -> String {
        self.ratio(server, sockets, key).map_or("–".to_owned(), |ratio| format!("{:.0} %", ratio * 100.0))
    }

    fn sizes(&self, server: &str) -> Vec<usize> {
        self.visits.keys().filter(|(name, _)| name == server).map(|(_, sockets)| *sockets).collect()
    }

    /// Median with so many decimals, or a dash.
    fn cell(&self, server: &str, sockets: usize, key: &str, decimals: usize) -> String {
        self.median(server, sockets, key).map_or("–".to_owned(), |value| format!("{value:.decimals$}"))
    }
}

/// The report.
pub fn report(text: &str) -> String {
    let all = All::read(text);
    let mut out = String::new();
    latency(&all, &mut out);
    stream(&all, "paced", "Paced: one write per message and socket", &mut out);
    stream(&all, "saturated", "Saturated: many messages per write", &mut out);
    connections(&all, &mut out);
    aims(&all, &mut out);
    out
}

fn rows(all: &All) -> impl Iterator<Item = (&str, usize)> {
    let mut rows: Vec<(&str, usize)> = all.visits.keys().map(|(server, sockets)| (server.as_str(), *sockets)).collect();
    let rank = |server: &str| ["imbus", "bare", "node"].iter().position(|name| *name == server);
    rows.sort_by_key(|(server, sockets)| (*sockets, rank(server)));
    rows.into_iter()
}

fn latency(all: &All, out: &mut String) {
    let _ = writeln!(out, "Commit → receipt of single broadcasts, ms (bare: from handing it the frame):\n");
    let _ = writeln!(out, "| sockets | server | last receipt p50 | p99 | max | all receipts p50 | p99 | max |");
    let _ = writeln!(out, "|---|---|---|---|---|---|---|---|");
    for (server, sockets) in rows(all) {
        let _ = write!(out, "| {sockets} | {server} |");
        for key in ["last_p50_ms", "last_p99_ms", "last_max_ms", "all_p50_ms", "all_p99_ms", "all_max_ms"] {
            let _ = write!(out, " {} |", all.cell(server, sockets, key, 2));
        }
        let _ = writeln!(out);
    }
}

fn stream(all: &All, name: &str, title: &str, out: &mut String) {
    let _ = writeln!(out, "\n{title}:\n");
    let _ = writeln!(
        out,
        "| sockets | server | deliveries/s | of bare | server µs CPU per delivery | of bare | client µs | deliveries per write | per read |"
    );
    let _ = writeln!(out, "|---|---|---|---|---|---|---|---|---|");
    for (server, sockets) in rows(all) {
        let key = |suffix: &str| format!("{name}_{suffix}");
        let _ = writeln!(
            out,
            "| {sockets} | {server} | {} | {} | {} | {} | {} | {} | {} |",
            all.cell(server, sockets, &key("per_s"), 0),
            all.of_bare(server, sockets, &key("per_s")),
            all.cell(server, sockets, &key("cpu_us"), 2),
            all.of_bare(server, sockets, &key("cpu_us")),
            all.cell(server, sockets, &key("client_us"), 2),
            all.cell(server, sockets, &key("per_write"), 2),
            all.cell(server, sockets, &key("per_read"), 2),
        );
    }
}

fn connections(all: &All, out: &mut String) {
    let _ = writeln!(out, "\nConnecting (TCP, upgrade, subscribe, until a broadcast has reached everybody):\n");
    let _ = writeln!(out, "| sockets | server | connects/s | server µs CPU each |\n|---|---|---|---|");
    for (server, sockets) in rows(all) {
        let rate = all.cell(server, sockets, "connects_per_s", 0);
        let _ = writeln!(out, "| {sockets} | {server} | {rate} | {} |", all.cell(server, sockets, "connect_cpu_us", 0));
    }
    if all.memory.is_empty() {
        return;
    }
    let _ = writeln!(out, "\nMemory of the gateway's process, each from a fresh start:\n");
    let _ = writeln!(
        out,
        "| sockets | channels each | of different channels | bytes per connection | bytes per subscription |"
    );
    let _ = writeln!(out, "|---|---|---|---|---|");
    let one = all.memory.iter().find(|((channels, _), _)| *channels == 1).map(|(_, (_, bytes))| *bytes);
    for ((channels, pool), (sockets, bytes)) in &all.memory {
        let different = if *pool > 0 { *pool as usize + 1 } else { sockets * (*channels as usize - 1) + 1 };
        let each = one.filter(|_| *channels > 1).map(|one| (bytes - one) / (*channels - 1) as f64);
        let each = each.map_or("–".to_owned(), |each| format!("{each:.0}"));
        let _ = writeln!(out, "| {sockets} | {channels} | {different} | {bytes:.0} | {each} |");
    }
}

fn aims(all: &All, out: &mut String) {
    let _ = writeln!(out, "\n| aim | measured | |\n|---|---|---|");
    let mut aim = |text: String, value: Option<f64>, unit: &str, met: &dyn Fn(f64) -> bool| {
        let Some(value) = value else { return };
        let verdict = if met(value) { "pass" } else { "FAIL" };
        let decimals = if value < 100.0 { 2 } else { 0 };
        let _ = writeln!(out, "| {text} | {value:.decimals$}{unit} | {verdict} |");
    };
    let percent = |sockets: usize, key: &str| all.ratio("imbus", sockets, key).map(|ratio| ratio * 100.0);
    let sizes = all.sizes("imbus");
    for sockets in [1_000, 10_000] {
        let value = percent(sockets, "paced_per_s");
        aim(format!("paced, {sockets} sockets: at least 85 % of the bare writer"), value, " %", &|v| v >= 85.0);
        let value = all.median("imbus", sockets, "saturated_per_s");
        aim(format!("saturated, {sockets} sockets: at least 1,000,000 deliveries/s"), value, "", &|v| v >= 1e6);
        let value = percent(sockets, "saturated_per_s");
        aim(format!("saturated, {sockets} sockets: at least 40 % of the bare writer"), value, " %", &|v| v >= 40.0);
    }
    for (sockets, most) in [(1_000, 10.0), (10_000, 60.0)] {
        let value = all.median("imbus", sockets, "last_p50_ms");
        aim(format!("last of {sockets} receipts within {most} ms of the commit (p50)"), value, " ms", &|v| v <= most);
    }
    let memory = all.memory.iter().find(|((channels, _), _)| *channels == 1).map(|(_, (_, bytes))| *bytes);
    aim("at most 8,192 bytes per idle connection".to_owned(), memory, "", &|v| v <= 8192.0);
    let value = all.median("imbus", 10_000, "connects_per_s");
    aim("5,000 connects/s (10,000 sockets)".to_owned(), value, "", &|v| v >= 5_000.0);
    let cost = |sockets: &usize| all.median("imbus", *sockets, "paced_cpu_us");
    if let (Some(first), true) = (sizes.first().and_then(cost), sizes.len() > 1) {
        let most = sizes.iter().filter_map(cost).fold(0.0, f64::max);
        let text = "paced, cost per delivery flat: the greatest of all sizes at most 1.25 of the smallest size's";
        aim(text.to_owned(), Some(most / first), "", &|v| v <= 1.25);
    }
}
