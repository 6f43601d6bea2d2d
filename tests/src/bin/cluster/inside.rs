//! What the program is on nodes and in pods.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Subcommand;
use proxy_tests::echo::EchoServer;
use proxy_tests::kubernetes::{client, init};

#[derive(Subcommand)]
pub(crate) enum Role {
    /// The first process of a node.
    #[command(hide = true)]
    Init { plan: PathBuf },
    /// Waits for its end: keeps a pod's namespaces.
    #[command(hide = true)]
    Pause,
    /// Serves TCP and UDP on the pod's addresses.
    #[command(hide = true)]
    Serve { port: u16 },
    /// Asks an address several times over TCP and UDP, and prints who answered.
    #[command(hide = true)]
    Ask {
        address: SocketAddr,
        #[arg(long, default_value_t = 20)]
        count: usize,
    },
    /// Sends requests until a line on standard input tells how many more, then prints what became of them.
    #[command(hide = true)]
    Load { addresses: Vec<SocketAddr> },
}

impl Role {
    pub(crate) fn run(&self) -> Result<()> {
        match self {
            Self::Init { plan } => init::run(plan),
            Self::Pause => wait_for_the_end(),
            Self::Serve { port } => {
                let name = std::env::var("POD_NAME").context("POD_NAME")?;
                let ips = std::env::var("POD_IPS").context("POD_IPS")?;
                let ips = ips.split(',').map(str::parse::<IpAddr>);
                let addresses: Vec<SocketAddr> = ips
                    .map(|ip| Ok(SocketAddr::new(ip?, *port)))
                    .collect::<Result<_>>()
                    .context("POD_IPS")?;
                let _server = EchoServer::start_here(&name, &addresses)?;
                wait_for_the_end()
            }
            Self::Ask { address, count } => client::ask(*address, *count),
            Self::Load { addresses } => client::serve(addresses),
        }
    }
}

/// The first process of a container gets no signal that it does not ask for.
fn wait_for_the_end() -> Result<()> {
    let (mut end, sender) = std::os::unix::net::UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
    }
    end.read_exact(&mut [0])?;
    Ok(())
}
