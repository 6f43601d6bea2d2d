//! The table of who answered how often, and what to make of it.

use std::net::SocketAddr;

use comfy_table::{CellAlignment, Table, presets};
use proxy_common::addr::Protocol;
use proxy_tests::echo::Failure;
use proxy_tests::stats::{self, ChiSquare};

/// A row is called uneven below this. Chance alone gets there once in ten thousand rows.
const IMPROBABLE: f64 = 1e-4;

/// Requests of one kind.
pub(crate) struct Row {
    from: String,
    to: String,
    counts: Vec<u64>,
    failed: Vec<Failure>,
    chi_square: ChiSquare,
}

impl Row {
    pub(crate) fn new(
        from: &str,
        protocol: Protocol,
        vip: SocketAddr,
        names: &[String],
        outcomes: &[Result<String, Failure>],
    ) -> Self {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let counts = stats::count(&names, outcomes.iter().flatten());
        Self {
            from: from.to_owned(),
            to: format!("{protocol} {vip}"),
            chi_square: stats::uniform(&counts),
            counts,
            failed: outcomes.iter().filter_map(|o| o.as_ref().err().copied()).collect(),
        }
    }

    /// What is wrong with it, if anything.
    pub(crate) fn verdict(&self) -> Option<String> {
        let what = if let Some(first) = self.failed.first() {
            format!("{} requests failed, the first: {first}", self.failed.len())
        } else if self.chi_square.p < IMPROBABLE {
            format!("shares are uneven (p = {:.2e})", self.chi_square.p)
        } else {
            return None;
        };
        Some(format!("{} to {}: {what}", self.from, self.to))
    }
}

/// The rows as a table.
pub(crate) fn table(names: &[String], rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let mut header = vec!["from".to_owned(), "to".to_owned()];
    header.extend(names.iter().cloned());
    header.extend(["expected", "chi²", "p", "failed"].map(String::from));
    let columns = header.len();
    table.set_header(header);
    for row in rows {
        let expected = row.counts.iter().sum::<u64>() as f64 / row.counts.len() as f64;
        let mut cells = vec![row.from.clone(), row.to.clone()];
        cells.extend(row.counts.iter().map(u64::to_string));
        cells.push(format!("{expected:.0} each"));
        cells.push(format!("{:.2}", row.chi_square.statistic));
        cells.push(format!("{:.3}", row.chi_square.p));
        cells.push(row.failed.len().to_string());
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(2).take(columns) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
