//! Where objects come from: an API server ([`kube`], over a [`client`]) or a folder of manifests ([`manifests`]). Both decode into the same wire types
//! ([`objects`]) and make the same model types of them ([`convert`]); whatever is malformed is named in a [`Warning`] and left
//! out, and everything else of the object stays (S19, S20, S23).

pub mod client;
pub mod convert;
mod documents;
pub mod kube;
pub mod lenient;
pub mod manifests;
pub mod objects;
pub(crate) mod pods;

use std::fmt;

pub(crate) use documents::values as document_values;

use crate::model::Change;

/// What a source has to say.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// Something happened to the cluster.
    Change(Change),
    /// Some part of an object cannot be used.
    Warning(Warning),
}

/// Kinds of objects that are read (S14).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// A Service.
    Service,
    /// An EndpointSlice.
    EndpointSlice,
    /// A Node.
    Node,
    /// A ServiceCIDR.
    ServiceCidr,
    /// A file of the manifest folder, before it is known what is in it.
    File,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [
        Self::Service,
        Self::EndpointSlice,
        Self::Node,
        Self::ServiceCidr,
        Self::File,
    ];

    /// The kind as objects spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::File => "File",
        }
    }
}

/// Something in an object that cannot be used: where it is, what is wrong, what to do. The rest of the object is in use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Warning {
    /// Kind of the object.
    pub kind: Kind,
    /// Its namespace and name, or the file and document.
    pub object: String,
    /// Path of the field.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
    /// What would be right.
    pub remedy: &'static str,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, object, field) = (self.kind.name(), &self.object, &self.field);
        write!(f, "{kind} {object}: {field}: {}; {}", self.problem, self.remedy)
    }
}
