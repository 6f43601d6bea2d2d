//! What the verifier makes of the programs.

use std::io::Write as _;

use proxy_common::names::TC_INGRESS;
use proxy_tests::programs::{Constants, Programs};

use crate::load;

/// The verifier takes every program; what it counted is printed, because it grows unnoticed (the limit is a million).
#[test]
fn verifier_accepts_every_program() {
    // The handle itself: what the macros print, the test runner keeps for failures.
    let mut out = std::io::stderr().lock();
    writeln!(out).unwrap();
    for (name, info) in load().infos().unwrap() {
        let verified = info.verified_instruction_count().unwrap_or_default();
        let size = info.size_jitted();
        writeln!(
            out,
            "{name:14} {verified:7} instructions verified, {size:6} bytes of machine code"
        )
        .unwrap();
        assert!(
            verified < 600_000,
            "{name} is close to the verifier's limit: {verified}"
        );
    }
}

/// A log level of "off" is not a test at run time: the verifier removes the statements.
#[test]
fn logging_that_is_off_is_pruned() {
    let size = |log_level| {
        let programs = Programs::load(Constants {
            log_level,
            ..Constants::default()
        })
        .unwrap();
        let infos = programs.infos().unwrap();
        let (_, ingress) = infos.iter().find(|(name, _)| name == TC_INGRESS).unwrap();
        ingress.size_jitted()
    };
    let (off, debug) = (size(0), size(4));
    assert!(
        off + 1_000 < debug,
        "{off} bytes of machine code with logging off, {debug} with it on"
    );
}
