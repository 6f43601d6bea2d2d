//! Helper processes of the demo: echo servers in pods, and the relay by which agents reach an API server that only the machine
//! itself can see. Processes of their own, so that they stay when `--keep` asks for it.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::Result;
use clap::Subcommand;
use proxy_tests::echo::EchoServer;
use proxy_tests::netns;

#[derive(Subcommand)]
pub(crate) enum Helper {
    /// Serves TCP and UDP in the namespace it is started in.
    #[command(hide = true)]
    Serve { name: String, addresses: Vec<SocketAddr> },
    /// Passes connections from a namespace on to an address that this one reaches.
    #[command(hide = true)]
    Relay {
        netns: std::path::PathBuf,
        listen: SocketAddr,
        target: String,
    },
}

impl Helper {
    /// Runs until killed.
    pub(crate) fn run(&self) -> Result<()> {
        match self {
            Self::Serve { name, addresses } => {
                let _server = EchoServer::start_here(name, addresses)?;
                loop {
                    thread::park();
                }
            }
            Self::Relay { netns, listen, target } => {
                let listener = netns::run_at(netns, || TcpListener::bind(listen))??;
                for client in listener.incoming() {
                    let (client, target) = (client?, target.clone());
                    // A connection that ends early is the business of its two ends.
                    thread::spawn(move || relay(&client, &target));
                }
                Ok(())
            }
        }
    }
}

fn relay(client: &TcpStream, target: &str) -> io::Result<()> {
    let server = TcpStream::connect(target)?;
    thread::scope(|scope| {
        scope.spawn(|| pass(client, &server));
        pass(&server, client)
    })
}

fn pass(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    io::copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)
}
