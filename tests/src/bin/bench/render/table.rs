//! The text for the terminal.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use proxy_tests::results::Case;

use super::{base, direction, ratio, relation, size, spread, target_lines};

/// A table for each case, then one of the targets.
pub(crate) fn text(cases: &[Case]) -> String {
    let mut text: String = cases.iter().map(one).collect();
    let mut targets = new(&["target", "is", "reached", ""]);
    for line in cases.iter().flat_map(target_lines) {
        targets.add_row([&line.what, &line.bound, &line.reached, line.verdict]);
    }
    if !targets.is_empty() {
        text += &format!("\n{targets}\n");
    }
    text
}

fn one(case: &Case) -> String {
    let axis = case.axis.clone().unwrap_or_default();
    let beside = base(case)
        .map(|base| format!("in relation to {base}"))
        .unwrap_or_default();
    let mut table = new(&["", &axis, &case.unit, &beside]);
    for row in &case.rows {
        let value = row.spread().map(spread).unwrap_or_default();
        let note = row.note.as_deref().unwrap_or_default();
        let value = [value.as_str(), note].join(" ");
        let relation = relation(case, row).map(ratio).unwrap_or_default();
        table.add_row([row.contender.as_str(), &size(row.at), value.trim(), &relation]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!(
        "\n{} ({}; {})\n{table}\n",
        case.title,
        case.name,
        direction(case.better)
    )
}

fn new(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table
}
