//! Markdown of the visits: medians over the rounds, for the slowest their greatest; ratios to the calm phase of the same
//! visit and to the control.

use super::kind::KINDS;
use std::collections::HashMap;
use std::fmt::Write;

/// Values of the visits of one attack on one target, by key.
type Visits = HashMap<String, Vec<f64>>;

struct All(HashMap<(String, String), Visits>);

impl All {
    fn read(text: &str) -> All {
        let mut all = HashMap::new();
        for line in text.lines() {
            let pairs: HashMap<&str, &str> = line.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
            let (Some(attack), Some(target)) = (pairs.get("attack"), pairs.get("target")) else { continue };
            let visits: &mut Visits = all.entry(((*attack).to_owned(), (*target).to_owned())).or_default();
            for (key, value) in &pairs {
                visits.entry((*key).to_owned()).or_default().extend(value.parse::<f64>());
            }
        }
        All(all)
    }

    fn values(&self, attack: &str, target: &str, key: &str) -> Vec<f64> {
        let visits = self.0.get(&(attack.to_owned(), target.to_owned()));
        let mut values = visits.and_then(|visits| visits.get(key)).cloned().unwrap_or_default();
        values.sort_by(f64::total_cmp);
        values
    }

    /// Median over the rounds; of what is a maximum already, the greatest.
    fn value(&self, attack: &str, target: &str, key: &str) -> Option<f64> {
        let values = self.values(attack, target, key);
        if key.ends_with("_max") { values.last().copied() } else { median(&values) }
    }

    fn cell(&self, attack: &str, target: &str, key: &str, unit: f64, decimals: usize) -> String {
        self.value(attack, target, key).map_or("–".to_owned(), |value| format!("{:.decimals$}", value / unit))
    }

    /// p50, p99 and max of a phase in ms.
    fn times(&self, attack: &str, target: &str, name: &str) -> String {
        let cell = |suffix: &str| self.cell(attack, target, &format!("{name}_{suffix}"), 1.0, 2);
        format!("{} / {} / {}", cell("p50"), cell("p99"), cell("max"))
    }

    /// p50 and p99 as multiples of another's.
    fn ratio(&self, attack: &str, one: (&str, &str), other: (&str, &str)) -> String {
        let ratio = |suffix: &str| {
            let value = |(target, name): (&str, &str)| self.value(attack, target, &format!("{name}_{suffix}"));
            value(one).zip(value(other)).map_or("–".to_owned(), |(one, other)| format!("{:.1}", one / other.max(0.1)))
        };
        format!("{} / {}", ratio("p50"), ratio("p99"))
    }

    fn attacks(&self) -> impl Iterator<Item = &'static str> {
        let names = KINDS.iter().map(|(name, ..)| *name);
        names.filter(|name| self.0.keys().any(|(attack, _)| attack == name))
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 0 => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        _ => Some(sorted[middle]),
    }
}

/// The report.
pub fn report(text: &str) -> String {
    let all = All::read(text);
    let mut out = String::new();
    latency(&all, &mut out);
    resources(&all, &mut out);
    deeds(&all, &mut out);
    out
}

fn latency(all: &All, out: &mut String) {
    let _ = writeln!(
        out,
        "Commit → receipt, p50 / p99 / max in ms; as a multiple (p50 / p99) of the calm phase and of the control:\n"
    );
    let _ =
        writeln!(out, "| attack | on | to single ones | of calm | of control | to all 500 | of calm | of control |");
    let _ = writeln!(out, "|---|---|---|---|---|---|---|---|");
    for attack in all.attacks() {
        for (phase, target) in [("calm", "imbus"), ("attack", "imbus"), ("attack", "control")] {
            let name = if phase == "calm" { "nobody" } else { target };
            let _ = write!(out, "| {attack} | {name} |");
            for who in ["single", "all"] {
                let now = format!("{phase}_{who}");
                let _ = write!(out, " {} |", all.times(attack, target, &now));
                let calm = all.ratio(attack, (target, &now), (target, &format!("calm_{who}")));
                let control = all.ratio(attack, (target, &now), ("control", &now));
                let is_attacked = (phase, target) == ("attack", "imbus");
                let _ = write!(out, " {} |", if phase == "calm" { "" } else { &calm });
                let _ = write!(out, " {} |", if is_attacked { &control } else { "" });
            }
            let _ = writeln!(out);
        }
    }
}

fn resources(all: &All, out: &mut String) {
    let _ = writeln!(
        out,
        "\nMemory in MB, processors used (2 = both); a new connection's `GET /websocket/health` in ms, and how many of them \
         were turned away:\n"
    );
    let _ = writeln!(
        out,
        "| attack | on | gateway before / peak / after | database worker, peak | kernel's TCP, peak | CPU: gateway | \
         database worker | attackers | bare writer | newcomer p50 / p99 / max | turned away |"
    );
    let _ = writeln!(out, "|---|---|---|---|---|---|---|---|---|---|---|");
    for attack in all.attacks() {
        for target in ["imbus", "control"] {
            let megabytes = |key: &str| all.cell(attack, target, key, 1e6, 0);
            let _ = write!(out, "| {attack} | {target} | {} /", megabytes("before_bytes"));
            let _ = write!(out, " {} / {} |", megabytes("peak_bytes"), megabytes("after_bytes"));
            let _ = write!(out, " {} | {} |", megabytes("peak_worker"), megabytes("peak_kernel"));
            for key in ["gateway_cpu", "worker_cpu", "attackers_cpu", "control_cpu"] {
                let _ = write!(out, " {} |", all.cell(attack, target, key, 1.0, 2));
            }
            let _ = write!(out, " {} |", all.times(attack, target, "attack_new"));
            let _ = writeln!(out, " {} |", all.cell(attack, target, "attack_new_failed", 1.0, 0));
        }
    }
}

fn deeds(all: &All, out: &mut String) {
    let _ = writeln!(out, "\nWhat the attackers did, in one round:\n");
    let _ = writeln!(
        out,
        "| attack | on | s | connections opened | turned away | closed on them | messages | MB | sockets of the gateway before \
         / peak / end | counted in `/metrics` |"
    );
    let _ = writeln!(out, "|---|---|---|---|---|---|---|---|---|---|");
    for attack in all.attacks() {
        for target in ["imbus", "control"] {
            let cell = |key: &str, unit: f64| all.cell(attack, target, key, unit, 0);
            let _ = write!(out, "| {attack} | {target} | {} |", cell("seconds", 1.0));
            for (key, unit) in [("opened", 1.0), ("refused", 1.0), ("closed", 1.0), ("messages", 1.0), ("bytes", 1e6)] {
                let _ = write!(out, " {} |", cell(&format!("did_{key}"), unit));
            }
            let _ = write!(out, " {} /", cell("before_files", 1.0));
            let _ = write!(out, " {} / {} |", cell("peak_files", 1.0), cell("end_files", 1.0));
            let _ = writeln!(out, " {} |", all.rejected(attack, target));
        }
    }
}

impl All {
    /// What the gateway counted of those it turned away.
    fn rejected(&self, attack: &str, target: &str) -> String {
        let Some(visits) = self.0.get(&(attack.to_owned(), target.to_owned())) else { return String::new() };
        let mut reasons: Vec<&str> = visits.keys().filter_map(|key| key.strip_prefix("rejected_")).collect();
        reasons.sort_unstable();
        let counted = reasons.into_iter().map(|reason| {
            let count = self.cell(attack, target, &format!("rejected_{reason}"), 1.0, 0);
            format!("{reason} {count}")
        });
        counted.collect::<Vec<_>>().join(", ")
    }
}
