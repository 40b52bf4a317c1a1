//! Connections to Odoo that notice when the other end has vanished: TCP's keep-alive, which ureq's own do not ask for.

use socket2::{SockRef, TcpKeepalive};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use ureq::Error;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport};

/// How long it may take to reach Odoo.
const CONNECT: Duration = Duration::from_secs(5);

/// A peer that is silent for `.0` is asked every `.1` whether it lives, `.2` times: a machine that has vanished is noticed
/// in 5 s (SPEC section 8).
const ALIVE: (Duration, Duration, u32) = (Duration::from_secs(2), Duration::from_secs(1), 3);

/// Opens such connections. It knows no time limits but the one for opening: a job takes as long as it takes.
#[derive(Debug)]
pub struct Watched;

impl Connector<()> for Watched {
    type Out = Connection;

    fn connect(&self, details: &ConnectionDetails, _chained: Option<()>) -> Result<Option<Connection>, Error> {
        let mut failed = io::Error::from(ErrorKind::AddrNotAvailable);
        for address in &details.addrs {
            match TcpStream::connect_timeout(address, CONNECT) {
                Ok(stream) => return Ok(Some(Connection::new(stream, details)?)),
                Err(error) => failed = error,
            }
        }
        // Whatever it was: nothing has reached Odoo.
        Err(Error::Io(io::Error::new(ErrorKind::NotConnected, failed.to_string())))
    }
}

/// One of them.
pub struct Connection {
    stream: TcpStream,
    buffers: LazyBuffers,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl Connection {
    fn new(stream: TcpStream, details: &ConnectionDetails) -> io::Result<Connection> {
        let (idle, interval, times) = ALIVE;
        let alive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(times);
        let socket = SockRef::from(&stream);
        socket.set_tcp_keepalive(&alive)?;
        // While something sent is not acknowledged, no such question is asked.
        socket.set_tcp_user_timeout(Some(idle + interval * times))?;
        stream.set_nodelay(true)?;
        let (input, output) = (details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Connection { stream, buffers: LazyBuffers::new(input, output) })
    }
}

impl Transport for Connection {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, _timeout: NextTimeout) -> Result<(), Error> {
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        Ok(self.stream.write_all(output)?)
    }

    fn await_input(&mut self, _timeout: NextTimeout) -> Result<bool, Error> {
        loop {
            match self.stream.read(self.buffers.input_append_buf()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => {
                    let amount = result?;
                    self.buffers.input_appended(amount);
                    return Ok(amount > 0);
                }
            }
        }
    }

    fn is_open(&mut self) -> bool {
        // Never used twice.
        false
    }
}
