//! Which of the ready endpoints topology hints leave over (S64–S74). One pure function.

use super::NodeContext;
use super::categorize::Candidate;
use crate::model::slice::{ENDPOINT_FOR_THIS_NODE, ENDPOINT_NODE_HINTED};

/// The ready endpoints to use for cluster-policy traffic, given all ready endpoints of the service port.
///
/// Same node first: if every ready endpoint has node hints and some endpoint is for this node, those for this node (S66).
/// Else same zone: if this node has a zone, every ready endpoint has zone hints, and some endpoint is for this zone, those for this
/// zone (S67). Else all: an endpoint without hints switches its level off for the whole service port (S68), and traffic is
/// never lost because of hints (S69).
pub fn apply_hints<'c, 'e, A>(ready: Vec<&'c Candidate<'e, A>>, node: &NodeContext) -> Vec<&'c Candidate<'e, A>> {
    if ready.iter().all(|c| c.endpoint.has(ENDPOINT_NODE_HINTED)) {
        let same_node: Vec<_> = ready
            .iter()
            .copied()
            .filter(|c| c.endpoint.has(ENDPOINT_FOR_THIS_NODE))
            .collect();
        if !same_node.is_empty() {
            return same_node;
        }
    }
    if let Some(zone) = &node.zone
        && ready.iter().all(|c| c.endpoint.zones.is_some())
    {
        let for_zone = |c: &&Candidate<'_, A>| c.endpoint.zones.as_ref().is_some_and(|zones| zones.contains(zone));
        let same_zone: Vec<_> = ready.iter().copied().filter(for_zone).collect();
        if !same_zone.is_empty() {
            return same_zone;
        }
    }
    ready
}
