//! Who wants a frontend: the smallest claim has it (S37). Nearly every frontend has one claim, and there are as many frontends as anything
//! else here, so a frontend's claims are a list. Part of `FamilySync`.
//!
//! What must stay true: each claim once, the smallest first; a frontend that nobody claims is not in the table.

use std::collections::HashMap;

use proxy_common::addr::Address;
use proxy_common::frontend::FrontendKey;

use super::Name;

/// Creation time and name of a service.
pub(super) type Claim = (i64, Name);

/// Claims with the flags that each asks for.
pub(super) struct Claims<A>(HashMap<FrontendKey<A>, Vec<(Claim, u32)>>);

impl<A: Address> Claims<A> {
    pub(super) fn new() -> Self {
        Self(HashMap::new())
    }

    /// Does anybody want it?
    pub(super) fn contains(&self, key: &FrontendKey<A>) -> bool {
        self.0.contains_key(key)
    }

    /// Who has it, and with which flags.
    pub(super) fn winner(&self, key: &FrontendKey<A>) -> Option<(&Name, u32)> {
        self.0.get(key)?.first().map(|((_, name), flags)| (name, *flags))
    }

    /// Adds a claim; gives the one who has it if there are others beside.
    pub(super) fn add(&mut self, key: FrontendKey<A>, claim: Claim, flags: u32) -> Option<&Name> {
        let claims = self.0.entry(key).or_default();
        match claims.binary_search_by(|(known, _)| known.cmp(&claim)) {
            Ok(at) => claims[at].1 = flags,
            Err(at) => {
                claims.reserve_exact(1);
                claims.insert(at, (claim, flags));
            }
        }
        claims.first().filter(|_| claims.len() > 1).map(|((_, name), _)| name)
    }

    /// Withdraws a claim.
    pub(super) fn remove(&mut self, key: &FrontendKey<A>, claim: &Claim) {
        let Some(claims) = self.0.get_mut(key) else { return };
        claims.retain(|(known, _)| known != claim);
        if claims.is_empty() {
            self.0.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::addr::{Addr4, Port, Protocol};

    use super::*;
    use crate::plan::ServicePortName;

    #[test]
    fn the_oldest_has_it_then_the_first_by_name() {
        let claim = |created: i64, name: &str| -> Claim {
            let name = ServicePortName {
                namespace: "ns".to_owned(),
                name: name.to_owned(),
                port: String::new(),
                protocol: Protocol::Tcp,
            };
            (created, Name::new(name))
        };
        let key = FrontendKey::new(Addr4([10, 96, 0, 1]), Port::new(80), 6);
        let mut claims = Claims::new();
        assert_eq!(claims.add(key, claim(2, "a"), 1), None);
        assert_eq!(claims.add(key, claim(2, "a"), 2), None, "the same again");
        assert_eq!(claims.winner(&key).map(|(_, flags)| flags), Some(2));
        assert_eq!(claims.add(key, claim(2, "b"), 3).map(|name| &*name.name), Some("a"));
        assert_eq!(claims.add(key, claim(1, "c"), 4).map(|name| &*name.name), Some("c"));
        claims.remove(&key, &claim(1, "c"));
        assert_eq!(claims.winner(&key).map(|(name, _)| &*name.name), Some("a"));
        claims.remove(&key, &claim(2, "b"));
        claims.remove(&key, &claim(2, "a"));
        assert!(!claims.contains(&key) && claims.winner(&key).is_none());
    }
}
