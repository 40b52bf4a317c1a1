//! An echo server on exactly the gateway's network code, for the Autobahn cases (scripts/conformance). Prints the URL
//! to connect to, then runs until its standard input ends.

use imbus::core::settings::{AuthMethod, Database, Settings};
use imbus::core::token::{Claims, Grant, sign};
use imbus::net::bridge::{Net, Start, ToMain};
use imbus::net::testing;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

const SECRET: &[u8] = b"a secret of the conformance tests";

/// The longest message of the Autobahn cases (9.1.6), in bytes; the gateway's own limit is 1 MiB.
const MESSAGE_MAX: usize = 16 << 20;

fn settings() -> Settings {
    Settings {
        port: 0,
        listen_addresses: vec!["127.0.0.1".to_owned()],
        io_threads: 2,
        auth: vec![AuthMethod::Token],
        odoo_url: "http://127.0.0.1:1".to_owned(),
        odoo_concurrency: 8,
        session_recheck: Duration::from_secs(60),
        token_secret: SECRET.to_vec(),
        allowed_origins: vec!["*".to_owned()],
        max_connections: 100,
        compression: true,
        send_queue_max: 1 << 20,
        rate_limit_burst: 0,
        rate_limit_delay: Duration::ZERO,
        keepalive: Duration::ZERO,
        ping_interval: Duration::ZERO,
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    testing::set_echo(MESSAGE_MAX);
    let claims = Claims {
        db: "demo".to_owned(),
        oid: 5,
        channels: Grant::All,
        iat: 0,
        exp: i64::from(u32::MAX),
        sub: None,
        admin: false,
    };
    let token = sign(&claims, SECRET).map_err(|error| error.to_string())?;
    let link_path = std::env::temp_dir().join(format!("imbus-echo-{}", std::process::id()));
    let net = Net::start(Start {
        settings: Arc::new(settings()),
        databases: Arc::new(vec![Database { oid: 5, name: "demo".to_owned() }]),
        link_path: link_path.clone(),
        wake_main: Box::new(|| {}),
        census: Box::new(Vec::new),
    })?;
    loop {
        match net.receiver().recv()? {
            ToMain::Listening { port } => {
                println!("ws://127.0.0.1:{port}/websocket?token={token}");
                break;
            }
            message => eprintln!("{message:?}"),
        }
    }
    std::thread::scope(|scope| {
        let messages = net.receiver().clone();
        scope.spawn(move || messages.iter().for_each(|message| eprintln!("{message:?}")));
        let end = std::io::stdin().read_to_end(&mut Vec::new());
        net.stop();
        end
    })?;
    let _ = std::fs::remove_file(link_path);
    Ok(())
}
