//! An explanation as data and as text.

use std::fmt;
use std::net::SocketAddr;

use proxy_common::reason::Reason;
use serde::Serialize;

use super::super::ConnectionRow;
use super::{Question, Source};

/// What would happen to a new connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Who dials: an address or `host`.
    pub source: String,
    /// What is dialled.
    pub destination: SocketAddr,
    /// With which protocol.
    pub protocol: String,
    /// `translated`, `refused` (answered with an error), `dropped`, or `notAService` (left alone).
    pub verdict: &'static str,
    /// Why it is refused or dropped, by the name that the metric uses.
    pub reason: Option<&'static str>,
    /// The rule that says so.
    pub rule: Option<&'static str>,
    /// The service port.
    pub service: Option<String>,
    /// How its frontend was found: `exact`, `nodePort` or `undefined`.
    pub matched: Option<&'static str>,
    /// `ClusterIP` or `External`.
    pub kind: Option<&'static str>,
    /// `Cluster` or `Local`.
    pub policy: Option<&'static str>,
    /// Whether the client is in the Service's source ranges, where it has some.
    pub in_source_ranges: Option<bool>,
    /// `pod`, `host` or `external`.
    pub origin: &'static str,
    /// `cluster` or `local`.
    pub set: Option<&'static str>,
    /// The client's address is replaced, whichever endpoint is chosen.
    pub masquerade: bool,
    /// Session affinity timeout, 0 for none.
    pub affinity_seconds: u32,
    /// The endpoint that the client's affinity record names, if it is followed.
    pub affinity: Option<SocketAddr>,
    /// Endpoints that may be chosen.
    pub candidates: Vec<Candidate>,
    /// Connections from the client to the destination that are open already.
    pub connections: Vec<ConnectionRow>,
    /// How this was decided, in order.
    pub steps: Vec<String>,
}

/// An endpoint that may be chosen.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    /// Its address and port.
    pub address: SocketAddr,
    /// It runs on this node.
    pub local: bool,
    /// It terminates.
    pub terminating: bool,
    /// It sees an address of this node as its client.
    pub masqueraded: bool,
}

impl Explanation {
    pub(super) fn new(question: &Question) -> Self {
        Self {
            source: match question.source {
                Source::Host => "host".to_owned(),
                Source::Address(ip) => ip.to_string(),
            },
            destination: question.destination,
            protocol: question.protocol.to_string(),
            verdict: "notAService",
            reason: None,
            rule: None,
            service: None,
            matched: None,
            kind: None,
            policy: None,
            in_source_ranges: None,
            origin: "external",
            set: None,
            masquerade: false,
            affinity_seconds: 0,
            affinity: None,
            candidates: Vec::new(),
            connections: Vec::new(),
            steps: Vec::new(),
        }
    }

    pub(super) fn step(&mut self, text: impl Into<String>) {
        self.steps.push(text.into());
    }

    /// It is not served.
    pub(super) fn end(&mut self, reason: Reason) {
        let (rule, why) = match reason {
            Reason::NoEndpoints => (Some("S122"), "the service has no usable endpoint anywhere"),
            Reason::NoLocalEndpoints => (
                Some("S58"),
                "there are endpoints, but none that this policy may use here",
            ),
            Reason::SourceNotAllowed => (Some("S103"), "the client is in none of the source ranges"),
            Reason::UndefinedPort => (Some("S77"), "the Service does not define this port"),
            Reason::Unallocated => (
                Some("S78"),
                "it would leave the node for an address that belongs to nobody",
            ),
            Reason::BadRange => (
                None,
                "the frontend points outside the backend table; the agent repairs it",
            ),
            _ => (None, "it cannot be served"),
        };
        self.verdict = if reason.is_refused() { "refused" } else { "dropped" };
        self.reason = Some(reason.name());
        self.rule = rule;
        let named = rule.map(|rule| format!(" ({rule})")).unwrap_or_default();
        self.step(format!("{}: {why}{named}", self.verdict));
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            source,
            destination,
            protocol,
            ..
        } = self;
        writeln!(f, "{source} -> {destination}/{}", protocol.to_lowercase())?;
        for (number, step) in (1..).zip(&self.steps) {
            writeln!(f, "{number:3}. {step}")?;
        }
        match (self.verdict, self.reason) {
            ("notAService", _) => writeln!(f, "verdict: not a service, left alone")?,
            (verdict, Some(reason)) => writeln!(f, "verdict: {verdict} ({reason})")?,
            (verdict, None) => writeln!(f, "verdict: {verdict}")?,
        }
        for candidate in &self.candidates {
            let notes = [
                (candidate.local, " on this node"),
                (candidate.terminating, " terminating"),
                (candidate.masqueraded, " masqueraded"),
            ];
            let notes: String = notes.iter().filter(|(is, _)| *is).map(|(_, note)| *note).collect();
            writeln!(f, "  candidate {}{notes}", candidate.address)?;
        }
        if self.connections.is_empty() {
            return writeln!(f, "no connection of this client to it is in the table");
        }
        for connection in &self.connections {
            writeln!(
                f,
                "  open: {} -> {} ({}, silent for {} s); it stays where it is",
                connection.client, connection.backend, connection.state, connection.idle_seconds
            )?;
        }
        Ok(())
    }
}
