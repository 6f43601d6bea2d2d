//! The text of one manifest file: its documents, and the Services, EndpointSlices, Nodes and ServiceCIDRs in them. Pure; called by
//! [`super::manifests`] for every file that changed.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::convert::{Converter, trigger_time};
use super::{Kind, Warning, objects};
use crate::model::{Change, EndpointSlice, Node, ObjectName, Service, ServiceCidr};

const DEFAULT_NAMESPACE: &str = "default";
/// Nodes of a YAML document: a `List` of everything in a large cluster has a few million.
const MAX_YAML_NODES: usize = 20_000_000;

/// What an object is known by.
pub(super) type Key = (Kind, ObjectName);

/// An object of a file; `None` for one that is to be ignored (S1–S6), which hides nothing from other files.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Object {
    Service(Option<Service>),
    /// With the time of the change that led to it (S188).
    Slice(Option<EndpointSlice>, Option<SystemTime>),
    Node(Node),
    ServiceCidr(ServiceCidr),
}

/// What a file contributes.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) objects: BTreeMap<Key, Object>,
    pub(super) warnings: Vec<Warning>,
    /// Some document could not be parsed, so objects may be missing.
    pub(super) damaged: bool,
}

impl Object {
    /// The change that makes this object known, or with `None` forgotten.
    pub(super) fn change(key: &Key, object: Option<&Self>) -> Change {
        match (key.0, object) {
            (Kind::Service, Some(Self::Service(service))) => Change::Service(key.1.clone(), service.clone()),
            (Kind::Service, _) => Change::Service(key.1.clone(), None),
            (Kind::EndpointSlice, Some(Self::Slice(slice, time))) => Change::Slice(key.1.clone(), slice.clone(), *time),
            (Kind::EndpointSlice, _) => Change::Slice(key.1.clone(), None, None),
            (Kind::ServiceCidr, Some(Self::ServiceCidr(cidr))) => {
                Change::ServiceCidr(key.1.name.clone(), Some(cidr.clone()))
            }
            (Kind::ServiceCidr, _) => Change::ServiceCidr(key.1.name.clone(), None),
            (_, Some(Self::Node(node))) => Change::Node(Some(node.clone())),
            _ => Change::Node(None),
        }
    }
}

/// Reads the documents of a file. `file` names it in warnings.
pub(super) fn read(file: &str, text: &str, is_json: bool, converter: &mut Converter) -> Contents {
    let mut contents = Contents::default();
    for (index, document) in values(text, is_json).into_iter().enumerate() {
        let place = format!("{file}, document {}", index + 1);
        match document {
            Ok(value) => read_value(&place, value, None, converter, &mut contents),
            Err(problem) => {
                contents.damaged = true;
                let remedy = "the document is skipped and what the file said before stays; correct it";
                contents.warnings.push(file_warning(place, "document", problem, remedy));
            }
        }
    }
    contents.warnings.extend(converter.take_warnings());
    contents
}

/// A warning about a file.
pub(super) fn file_warning(object: String, field: &str, problem: String, remedy: &'static str) -> Warning {
    Warning {
        kind: Kind::File,
        object,
        field: field.to_owned(),
        problem,
        remedy,
    }
}

/// The documents of a text, or what is wrong with each.
pub(crate) fn values(text: &str, is_json: bool) -> Vec<Result<Value, String>> {
    if is_json {
        json_documents(text)
    } else {
        yaml_documents(text)
    }
}

fn json_documents(text: &str) -> Vec<Result<Value, String>> {
    let values = serde_json::Deserializer::from_str(text).into_iter();
    values.map(|value| value.map_err(|error| error.to_string())).collect()
}

fn yaml_documents(text: &str) -> Vec<Result<Value, String>> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        // `no`, `n` and `on` are fine names of ports and namespaces.
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            max_nodes: MAX_YAML_NODES,
            max_events: MAX_YAML_NODES,
        },
    };
    split_yaml(text)
        .into_iter()
        .map(|document| {
            let value: Option<Value> =
                serde_saphyr::from_str_with_options(document, options.clone()).map_err(|error| error.to_string())?;
            Ok(value.unwrap_or_default())
        })
        .collect()
}

/// Splits at the lines that begin a document, so that a bad one does not spoil those after it. Such a line cannot be part of a
/// scalar, so this needs no parser. What precedes the first one is only a document if it says something.
fn split_yaml(text: &str) -> Vec<&str> {
    let mut documents = Vec::new();
    let mut start = 0;
    let mut position = 0;
    for line in text.split_inclusive('\n') {
        let is_marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if is_marker {
            documents.push(&text[start..position]);
            start = position;
        }
        position += line.len();
    }
    documents.push(&text[start..]);
    let says_something = |document: &&str| {
        let mut lines = document
            .lines()
            .map(|line| line.strip_prefix("---").unwrap_or(line).trim());
        lines.any(|line| !line.is_empty() && !line.starts_with('#') && line != "...")
    };
    documents.into_iter().filter(says_something).collect()
}

fn read_value(place: &str, value: Value, list_kind: Option<&str>, converter: &mut Converter, contents: &mut Contents) {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    let kind = text("kind").or(list_kind).unwrap_or_default().to_owned();
    let version = text("apiVersion").unwrap_or(match kind.as_str() {
        "EndpointSlice" if list_kind.is_some() => "discovery.k8s.io/v1",
        "ServiceCIDR" if list_kind.is_some() => "networking.k8s.io/v1",
        _ if list_kind.is_some() => "v1",
        _ => "",
    });
    match (version, kind.as_str()) {
        ("v1", "Service") => read_service(place, value, converter, contents),
        ("discovery.k8s.io/v1", "EndpointSlice") => read_slice(place, value, converter, contents),
        ("v1", "Node") => read_node(value, converter, contents),
        ("networking.k8s.io/v1", "ServiceCIDR") => read_service_cidr(place, value, converter, contents),
        ("v1", "List" | "ServiceList" | "NodeList")
        | ("discovery.k8s.io/v1", "EndpointSliceList")
        | ("networking.k8s.io/v1", "ServiceCIDRList") => {
            let item_kind = kind.strip_suffix("List").filter(|kind| !kind.is_empty());
            let Value::Object(mut list) = value else { return };
            if let Some(Value::Array(items)) = list.remove("items") {
                for (index, item) in items.into_iter().enumerate() {
                    read_value(
                        &format!("{place}, item {}", index + 1),
                        item,
                        item_kind,
                        converter,
                        contents,
                    );
                }
            }
        }
        ("", "Service" | "EndpointSlice" | "Node" | "ServiceCIDR") => {
            let remedy = "the object is ignored; write v1, discovery.k8s.io/v1 for an EndpointSlice, networking.k8s.io/v1 for a ServiceCIDR";
            contents.warnings.push(file_warning(
                place.to_owned(),
                "apiVersion",
                "is missing".to_owned(),
                remedy,
            ));
        }
        _ => tracing::debug!(place, version, kind, "not a kind that is read"),
    }
}

fn read_service(place: &str, value: Value, converter: &mut Converter, contents: &mut Contents) {
    let Some((name, object)) = decode::<objects::Service>(place, value, contents) else {
        return;
    };
    let service = converter.service(&name, &object);
    contents.objects.insert((Kind::Service, name), Object::Service(service));
}

fn read_slice(place: &str, value: Value, converter: &mut Converter, contents: &mut Contents) {
    let Some((name, object)) = decode::<objects::EndpointSlice>(place, value, contents) else {
        return;
    };
    let slice = Object::Slice(converter.slice(&name, &object), trigger_time(&object.metadata));
    contents.objects.insert((Kind::EndpointSlice, name), slice);
}

fn read_service_cidr(place: &str, value: Value, converter: &mut Converter, contents: &mut Contents) {
    let Some((name, object)) = decode::<objects::ServiceCIDR>(place, value, contents) else {
        return;
    };
    let name = ObjectName::new("", name.name);
    let cidr = converter.service_cidr(&name, &object);
    contents
        .objects
        .insert((Kind::ServiceCidr, name), Object::ServiceCidr(cidr));
}

fn read_node(value: Value, converter: &mut Converter, contents: &mut Contents) {
    let Ok(object) = serde_json::from_value::<objects::Node>(value) else {
        return;
    };
    if let Some(node) = converter.node(&object) {
        let name = ObjectName::new("", object.metadata.name.unwrap_or_default());
        contents.objects.insert((Kind::Node, name), Object::Node(node));
    }
}

fn decode<K: DeserializeOwned + kube::Resource>(
    place: &str,
    value: Value,
    contents: &mut Contents,
) -> Option<(ObjectName, K)> {
    let mut warn = |problem: String| {
        let remedy = "the object is ignored; give it a name";
        contents
            .warnings
            .push(file_warning(place.to_owned(), "metadata.name", problem, remedy));
    };
    let object: K = serde_json::from_value(value)
        .map_err(|error| warn(error.to_string()))
        .ok()?;
    let meta = object.meta();
    let Some(name) = meta.name.clone().filter(|name| !name.is_empty()) else {
        warn("is missing".to_owned());
        return None;
    };
    let namespace = meta.namespace.clone().filter(|namespace| !namespace.is_empty());
    Some((
        ObjectName::new(namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()), name),
        object,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str =
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  clusterIP: 10.96.0.1\n  ports: [{port: 80}]\n";

    fn names(text: &str, is_json: bool) -> (Vec<String>, Vec<String>, bool) {
        let contents = read("f", text, is_json, &mut Converter::new("node-a"));
        let names = contents
            .objects
            .keys()
            .map(|(kind, name)| format!("{} {name}", kind.name()))
            .collect();
        (
            names,
            contents.warnings.iter().map(|w| w.object.clone()).collect(),
            contents.damaged,
        )
    }

    #[test]
    fn documents_lists_and_other_kinds() {
        let text = format!(
            "# hello\n---\n{SERVICE}--- # next\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c}}\ndata:\n  x: |\n    ---\n---\n\
             apiVersion: v1\nkind: List\nitems:\n- apiVersion: discovery.k8s.io/v1\n  kind: EndpointSlice\n  metadata: {{name: a, namespace: n}}\n\
             ---\napiVersion: v1\nkind: ServiceList\nitems: [{{metadata: {{name: other}}, spec: {{}}}}]\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSliceList\nitems: [{{metadata: {{name: b}}}}]\n---\n\
             apiVersion: v1\nkind: Node\nmetadata: {{name: node-a}}\n---\napiVersion: v1\nkind: Node\nmetadata: {{name: node-b}}\n---\n\
             apiVersion: networking.k8s.io/v1\nkind: ServiceCIDRList\nitems: [{{metadata: {{name: kubernetes}}, spec: {{cidrs: [10.96.0.0/16]}}}}]\n---\n\
             apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {{name: other-group}}\n...\n"
        );
        let (found, _, damaged) = names(&text, false);
        let expected = [
            "Service default/other",
            "Service default/web",
            "EndpointSlice default/b",
            "EndpointSlice n/a",
            "Node node-a",
            "ServiceCIDR kubernetes",
        ];
        assert_eq!(found, expected);
        assert!(!damaged);
    }

    #[test]
    fn a_bad_document_is_named_and_the_others_stay() {
        let text =
            format!("{SERVICE}---\nkind: [\n---\napiVersion: v1\nkind: Service\nmetadata: {{}}\n---\njust text\n");
        let (found, warnings, damaged) = names(&text, false);
        assert_eq!(found, ["Service default/web"]);
        assert_eq!(warnings, ["f, document 2", "f, document 3"]);
        assert!(damaged);
    }

    #[test]
    fn json_too() {
        let one = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {"clusterIP": "10.96.0.1"}}"#;
        assert_eq!(
            names(one, true),
            (vec!["Service default/web".to_owned()], vec![], false)
        );
        assert_eq!(
            names(one, false),
            (vec!["Service default/web".to_owned()], vec![], false)
        );
        assert!(names(&one[..40], true).2);
        assert_eq!(names("", true), (vec![], vec![], false));
    }

    #[test]
    fn unquoted_scalars_of_all_types() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: web, labels: {a: true, b: 1, c: ~}}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80, name: 5}]}\n";
        let contents = read("f", text, false, &mut Converter::new("node-a"));
        assert_eq!(contents.warnings.len(), 1, "{:?}", contents.warnings);
        assert_eq!(contents.objects.len(), 1);
    }
}
