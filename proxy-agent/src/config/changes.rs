//! The configuration file while an agent runs: kube-proxy ends when it changes and is started anew with it, and so does this. Called by
//! `run`.
//!
//! What must stay true: a file that could not be started with ends nothing.

use std::time::Duration;

use super::{RunArgs, RunConfig};

/// A ConfigMap is a link to a folder that is exchanged, which no watch on the file itself sees.
const INTERVAL: Duration = Duration::from_secs(2);

/// Waits until the file of `--config` says something else that can be used. Without a file, for ever.
pub(crate) async fn changed(args: &RunArgs) {
    let Some(path) = &args.config else {
        return std::future::pending().await;
    };
    let mut known = tokio::fs::read(path).await.ok();
    loop {
        tokio::time::sleep(INTERVAL).await;
        // One that is just being replaced is not there for a moment.
        let Ok(found) = tokio::fs::read(path).await else {
            continue;
        };
        if known.as_ref() == Some(&found) {
            continue;
        }
        match RunConfig::from_args(args) {
            Ok(_) => return,
            Err(error) => {
                tracing::error!(%error, "the configuration has changed and cannot be used: going on with the old one")
            }
        }
        known = Some(found);
    }
}
