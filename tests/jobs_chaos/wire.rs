//! The network between imbus and Odoo, which can be cut.

use super::common::PATIENCE;
use socket2::SockRef;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// What becomes of the connections made from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    #[default]
    Through,
    /// What imbus says goes nowhere.
    LoseRequests,
    /// What Odoo says goes nowhere.
    LoseAnswers,
}

#[derive(Default)]
struct State {
    mode: Mode,
    lines: HashMap<u64, (TcpStream, Option<TcpStream>)>,
    next: u64,
    /// How often something was lost.
    losses: usize,
}

/// A proxy in front of an Odoo. While that is down it answers with status 502.
#[derive(Clone)]
pub struct Wire {
    pub port: u16,
    odoo: u16,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Wire {
    pub fn to(odoo: u16) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let wire = Wire { port: listener.local_addr().unwrap().port(), odoo, state: Arc::default() };
        let accepting = wire.clone();
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let wire = accepting.clone();
                std::thread::spawn(move || wire.carry(near));
            }
        });
        wire
    }

    /// Loses what is said on connections made from now on.
    pub fn lose(&self, mode: Mode) {
        let mut state = self.state.0.lock().unwrap();
        (state.mode, state.losses) = (mode, 0);
    }

    /// Once something has been lost, new connections go through, and those that there are are reset.
    pub fn heal(&self) {
        let state = self.state.0.lock().unwrap();
        let is_waiting = |state: &mut State| state.losses == 0;
        let (mut state, waited) = self.state.1.wait_timeout_while(state, PATIENCE, is_waiting).unwrap();
        assert!(!waited.timed_out(), "nothing was said that could be lost ({:?})", state.mode);
        state.mode = Mode::Through;
        drop(state);
        self.reset();
    }

    /// Resets all connections.
    pub fn reset(&self) {
        for (_, (near, far)) in self.state.0.lock().unwrap().lines.drain() {
            // With this, the last hold on it that is let go sends RST.
            let _ = SockRef::from(&near).set_linger(Some(Duration::ZERO));
            let _ = near.shutdown(Shutdown::Read);
            far.inspect(|far| drop(far.shutdown(Shutdown::Both)));
        }
    }

    fn carry(&self, mut near: TcpStream) {
        let mode = self.state.0.lock().unwrap().mode;
        let far = if mode == Mode::LoseRequests { None } else { TcpStream::connect(("127.0.0.1", self.odoo)).ok() };
        if mode != Mode::LoseRequests && far.is_none() {
            let _ = near.read(&mut [0; 4096]);
            let _ = near.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n");
            return;
        }
        let number = self.enter(&near, far.as_ref());
        if let Some(far) = far {
            let (from, to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            std::thread::spawn(move || pump(from, |bytes| (&to).write_all(bytes).is_ok()));
            pump(far, |bytes| match mode {
                Mode::Through => (&near).write_all(bytes).is_ok(),
                _ => self.lost(),
            });
        } else {
            pump(near.try_clone().unwrap(), |_| self.lost());
        }
        // What was lost is not followed by an end: nobody knows until the connections are reset.
        if mode == Mode::Through && self.leave(number) {
            let _ = near.shutdown(Shutdown::Both);
        }
    }

    fn enter(&self, near: &TcpStream, far: Option<&TcpStream>) -> u64 {
        let mut state = self.state.0.lock().unwrap();
        state.next += 1;
        let number = state.next;
        let far = far.map(|far| far.try_clone().unwrap());
        state.lines.insert(number, (near.try_clone().unwrap(), far));
        number
    }

    /// False when the connection has been reset.
    fn leave(&self, number: u64) -> bool {
        self.state.0.lock().unwrap().lines.remove(&number).is_some()
    }

    fn lost(&self) -> bool {
        self.state.0.lock().unwrap().losses += 1;
        self.state.1.notify_all();
        true
    }
}

/// Passes on what comes until it ends.
fn pump(mut from: TcpStream, mut pass: impl FnMut(&[u8]) -> bool) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if !pass(&bytes[..count]) {
            return;
        }
    }
}
