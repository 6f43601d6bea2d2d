//! The service networks (S78): the prefixes of all ServiceCIDR objects together. Owned by [`super::ClusterState`].
//!
//! What must stay true: a prefix is in the union as long as some object has it, and only once; the union is sorted.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;

use super::ServiceCidr;

/// The prefixes of all objects.
#[derive(Debug, Default)]
pub(super) struct ServiceNetworks {
    objects: BTreeMap<Arc<str>, Vec<IpNet>>,
    union: Vec<IpNet>,
    /// The union at the last call of [`Self::take_changed`].
    taken: Option<Vec<IpNet>>,
}

impl ServiceNetworks {
    /// These objects and no other.
    pub(super) fn replace(&mut self, objects: Vec<ServiceCidr>) {
        self.objects = objects
            .into_iter()
            .map(|object| (object.name, object.networks))
            .collect();
        self.unite();
    }

    /// One object as it is now; `None` if it is gone.
    pub(super) fn set(&mut self, name: Arc<str>, object: Option<ServiceCidr>) {
        match object {
            Some(object) => self.objects.insert(name, object.networks),
            None => self.objects.remove(&name),
        };
        self.unite();
    }

    /// All prefixes.
    pub(super) fn union(&self) -> &[IpNet] {
        &self.union
    }

    /// Is the union another one than at the last call? The first time it is, whatever it is: a former agent may have known others.
    pub(super) fn take_changed(&mut self) -> bool {
        let changed = self.taken.as_ref() != Some(&self.union);
        if changed {
            self.taken = Some(self.union.clone());
        }
        changed
    }

    fn unite(&mut self) {
        let mut union: Vec<IpNet> = self.objects.values().flatten().copied().collect();
        union.sort_unstable();
        union.dedup();
        self.union = union;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(name: &str, networks: &[&str]) -> ServiceCidr {
        ServiceCidr {
            name: name.into(),
            networks: networks.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn the_union_follows_its_objects() {
        let mut networks = ServiceNetworks::default();
        let texts = |networks: &mut ServiceNetworks| {
            let texts: Vec<String> = networks.union().iter().map(ToString::to_string).collect();
            (texts.join(" "), networks.take_changed())
        };
        networks.replace(Vec::new());
        assert_eq!(
            texts(&mut networks),
            (String::new(), true),
            "a former agent may have known some"
        );
        assert_eq!(texts(&mut networks), (String::new(), false));
        networks.replace(vec![
            cidr("kubernetes", &["10.96.0.0/16", "fd00:96::/108"]),
            cidr("more", &["10.97.0.0/16"]),
        ]);
        let all = "10.96.0.0/16 10.97.0.0/16 fd00:96::/108".to_owned();
        assert_eq!(texts(&mut networks), (all.clone(), true), "S78");
        networks.set("twice".into(), Some(cidr("twice", &["10.97.0.0/16"])));
        assert_eq!(texts(&mut networks), (all.clone(), false));
        networks.set("more".into(), None);
        assert_eq!(texts(&mut networks), (all, false), "another object has it still");
        networks.set("twice".into(), None);
        let fewer = "10.96.0.0/16 fd00:96::/108".to_owned();
        assert_eq!(texts(&mut networks), (fewer, true));
    }
}
