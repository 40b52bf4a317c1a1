//! A connection whose reads go on when a signal interrupts them. One with a time limit is not restarted by the kernel (signal(7)),
//! also when the whole process was only stopped and continued.

use std::io::{ErrorKind, Read, Result, Write};
use std::net::TcpStream;
use std::ops::Deref;

#[derive(Debug)]
pub struct Steady(pub TcpStream);

impl Read for Steady {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        loop {
            match self.0.read(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

impl Write for Steady {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> Result<()> {
        self.0.flush()
    }
}

impl Deref for Steady {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.0
    }
}
