//! The EndpointSlices of one Service, by name. Nearly every Service has one, while the smallest node of a map has room for eleven: with
//! 10,000 Services that would be a tenth of the agent's memory. Owned by [`super::ClusterState`].
//!
//! What must stay true: sorted by name, each name once.

use super::EndpointSlice;

/// The slices of one service.
#[derive(Debug, Default)]
pub(super) struct Slices(Vec<EndpointSlice>);

impl Slices {
    /// The slice of this name.
    pub(super) fn get(&self, name: &str) -> Option<&EndpointSlice> {
        self.find(name).ok().map(|at| &self.0[at])
    }

    /// Puts a slice in; gives the one of the same name that was there.
    pub(super) fn insert(&mut self, slice: EndpointSlice) -> Option<EndpointSlice> {
        match self.find(&slice.name.name) {
            Ok(at) => Some(std::mem::replace(&mut self.0[at], slice)),
            Err(at) => {
                self.0.reserve_exact(1);
                self.0.insert(at, slice);
                None
            }
        }
    }

    /// Takes a slice out.
    pub(super) fn remove(&mut self, name: &str) -> Option<EndpointSlice> {
        self.find(name).ok().map(|at| self.0.remove(at))
    }

    /// All of them.
    pub(super) fn iter(&self) -> std::slice::Iter<'_, EndpointSlice> {
        self.0.iter()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn find(&self, name: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|slice| (*slice.name.name).cmp(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::fixtures::slice;

    #[test]
    fn one_of_each_name_in_order() {
        let mut slices = Slices::default();
        for name in ["b", "c", "a"] {
            assert!(slices.insert(slice(name, "web", &[], &[])).is_none());
        }
        let other = slice("b", "web", &["http:80/TCP"], &[]);
        let before = slices.insert(other.clone());
        assert_eq!(before, Some(slice("b", "web", &[], &[])));
        let names =
            |slices: &Slices| -> Vec<String> { slices.iter().map(|slice| slice.name.name.to_string()).collect() };
        assert_eq!(names(&slices), ["a", "b", "c"]);
        assert_eq!(slices.get("b"), Some(&other));
        assert!(slices.remove("a").is_some() && slices.remove("a").is_none());
        assert_eq!(names(&slices), ["b", "c"]);
        assert!(!slices.is_empty() && slices.get("a").is_none());
    }
}
