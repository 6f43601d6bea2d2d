//! Panels and alerts with what they say beside what is true.

use comfy_table::{CellAlignment, Table, presets};

/// A table, and what is wrong with it.
#[derive(Default)]
pub struct Findings {
    rows: Vec<[String; 4]>,
    /// One sentence each.
    pub wrong: Vec<String>,
}

impl Findings {
    /// Adds a line: whose it is, which one, what it says, what is true.
    pub(super) fn add(&mut self, cells: [String; 4], is_true: bool) {
        if !is_true {
            let [whose, line, says, truth] = &cells;
            self.wrong
                .push(format!("{whose}, {line}: says {says}, and that is not {truth}"));
        }
        self.rows.push(cells);
    }

    /// For people.
    pub fn table(&self, what: &str) -> String {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_FULL_CONDENSED);
        table.set_header([what, "line", "says", "is"]);
        let mut last = "";
        for [whose, line, says, truth] in &self.rows {
            let shown = if whose == last { "" } else { whose };
            last = whose;
            table.add_row([shown, line, says, truth]);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }
}
