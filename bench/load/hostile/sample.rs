//! What is looked at again and again during a phase: memory, sockets, processor time; and how long somebody waits who
//! comes anew.

use crate::process;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Between two that come anew.
const EVERY: Duration = Duration::from_millis(100);

/// The greatest that was seen.
#[derive(Default)]
pub struct Peak {
    pub resident: u64,
    pub worker: u64,
    pub files: usize,
    /// How many files were open at the last look.
    pub files_now: usize,
    pub kernel: u64,
}

impl Peak {
    /// Looks.
    pub fn look(&mut self, pid: u32, worker: u32) {
        self.resident = self.resident.max(process::resident(pid));
        self.worker = self.worker.max(process::resident(worker));
        self.files_now = process::files(pid);
        self.files = self.files.max(self.files_now);
        self.kernel = self.kernel.max(kernel());
    }
}

/// Memory of all TCP sockets of the machine in the kernel, in bytes.
pub fn kernel() -> u64 {
    let text = fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("TCP: ")).unwrap_or_default();
    let pages = line.split_whitespace().skip_while(|word| *word != "mem").nth(1);
    pages.and_then(|pages| pages.parse::<u64>().ok()).unwrap_or_default() * 4096
}

/// Comes anew until told to stop: connects, asks `/websocket/health`. Returns how long each took, in ms, and how many got no
/// answer or another one.
pub fn newcomers(address: SocketAddr, stop: &AtomicBool) -> (Vec<f64>, usize) {
    let (mut times, mut failures) = (Vec::new(), 0);
    while !stop.load(Ordering::Acquire) {
        let begin = Instant::now();
        match get(address, "/websocket/health") {
            Ok(answer) if answer.starts_with("HTTP/1.1 200 ") => times.push(begin.elapsed().as_secs_f64() * 1e3),
            _ => failures += 1,
        }
        std::thread::sleep(EVERY.saturating_sub(begin.elapsed()));
    }
    (times, failures)
}

fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let patience = Some(Duration::from_secs(20));
    let mut tcp = TcpStream::connect(address)?;
    tcp.set_read_timeout(patience)?;
    tcp.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    tcp.read_to_string(&mut answer)?;
    Ok(answer)
}

/// What the gateway counts of those it turned away, by reason.
///
/// # Errors
/// It does not say.
pub fn rejections(address: SocketAddr) -> Result<BTreeMap<String, u64>, Box<dyn Error>> {
    let text = get(address, "/metrics")?;
    let counted = text.lines().filter_map(|line| {
        let (reason, count) = line.strip_prefix("imbus_rejections_total{reason=\"")?.split_once("\"} ")?;
        Some((reason.to_owned(), count.parse().ok()?))
    });
    let counted: BTreeMap<String, u64> = counted.collect();
    if counted.is_empty() { Err(format!("no counters in {text:?}").into()) } else { Ok(counted) }
}
