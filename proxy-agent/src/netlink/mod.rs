//! Stand-in with the interface of netlink, until that is merged.

use tokio::sync::watch::Sender;

/// Stand-in.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Network {}

/// Stand-in.
#[derive(Debug, thiserror::Error)]
#[error("stand-in")]
pub struct NetlinkError;

/// Stand-in.
pub async fn watch(tx: Sender<Option<Network>>) -> Result<(), NetlinkError> {
    let _ = tx.send(Some(Network {}));
    tx.closed().await;
    Ok(())
}
