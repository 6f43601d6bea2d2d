//! `docs/semantics.md` tells the truth where a machine can check it: every rule has one row that says how far it is kept, and the
//! tests it names exist.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, with its context")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const LAST_RULE: u32 = 200;
const INSERTED: [&str; 1] = ["S87a"];
/// What a row may say instead of naming a test.
const STATES: [&str; 3] = ["untested", "not yet", "does not apply"];

/// The cells of a rule's row.
struct Row<'t> {
    rule: &'t str,
    code: &'t str,
    shown_by: &'t str,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn rows(text: &str) -> Vec<Row<'_>> {
    text.lines()
        .filter(|line| line.starts_with("| S"))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [rule, _asks, code, shown_by] = cells[..] else {
                panic!("a row has four cells: {line}")
            };
            Row { rule, code, shown_by }
        })
        .collect()
}

/// What stands in backticks.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn every_rule_has_one_row() {
    let text = std::fs::read_to_string(root().join("docs/semantics.md")).unwrap();
    let mut found: BTreeMap<String, u32> = BTreeMap::new();
    for row in rows(&text) {
        *found.entry(row.rule.to_owned()).or_default() += 1;
    }
    let wanted: BTreeMap<String, u32> = (1..=LAST_RULE)
        .map(|number| format!("S{number}"))
        .chain(INSERTED.map(str::to_owned))
        .map(|rule| (rule, 1))
        .collect();
    let wrong: Vec<_> = wanted
        .keys()
        .chain(found.keys())
        .filter(|rule| wanted.get(*rule) != found.get(*rule))
        .collect();
    assert!(wrong.is_empty(), "no row, several, or no such rule: {wrong:?}");
}

#[test]
fn what_is_named_exists() {
    let root = root();
    let text = std::fs::read_to_string(root.join("docs/semantics.md")).unwrap();
    for row in rows(&text) {
        let rule = row.rule;
        for file in quoted(row.code) {
            assert!(root.join(file).is_file(), "{rule}: there is no file {file}");
        }
        let mut tests = 0;
        for (file, function) in quoted(row.shown_by).filter_map(|name| name.split_once("::")) {
            let source = std::fs::read_to_string(root.join(file))
                .unwrap_or_else(|error| panic!("{rule}: {file} cannot be read: {error}"));
            let is_there = [format!("fn {function}("), format!("fn {function}<")]
                .iter()
                .any(|start| source.contains(start));
            assert!(is_there, "{rule}: {file} has no function {function}");
            tests += 1;
        }
        let has_state = STATES.iter().any(|state| row.shown_by.contains(state));
        assert!(tests > 0 || has_state, "{rule} names no test and does not say why");
    }
}
