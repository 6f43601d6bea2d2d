//! What a benchmark found: cases, their rows, and what they should come to. Written by every case of `cargo xtask bench all` as one
//! JSON file each, and read again when the table, the document and the plots are made, so that cases can be measured one by one.
//!
//! The samples of all rows of a case were taken in one run, in turn: sample `i` of one row belongs to sample `i` of every other, and
//! ratios are formed sample by sample before their median is taken.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A measured quantity with everybody who was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// Name, for `--cases` and for the file: lower case with hyphens.
    pub name: String,
    /// Heading.
    pub title: String,
    /// What was done, and what the figures include: a paragraph of the document.
    pub about: String,
    /// Unit of the samples.
    pub unit: String,
    /// Which direction is good.
    pub better: Better,
    /// What [`Row::at`] counts, if the case is measured at several sizes.
    pub axis: Option<String>,
    /// Who was measured, in the order of the table.
    pub rows: Vec<Row>,
    /// What it should come to.
    pub targets: Vec<Target>,
}

/// Which direction is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Rates.
    Higher,
    /// Times and sizes.
    Lower,
}

/// The samples of one contender at one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Who, by a name that is the same in all cases.
    pub contender: String,
    /// At which size.
    pub at: Option<u64>,
    /// One value per repetition.
    pub samples: Vec<f64>,
    /// Said instead of the values, or beside them, for example `not programmed within 180 s`.
    pub note: Option<String>,
}

/// What a contender should reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Who.
    pub contender: String,
    /// At which size; at every one if none is given.
    pub at: Option<u64>,
    /// In relation to what.
    pub against: Against,
    /// How much.
    pub bound: Bound,
}

/// What a target relates to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Against {
    /// The value itself.
    Nothing,
    /// The value of another contender at the same size.
    Contender(String),
    /// The value of the same contender at another size.
    Size(u64),
    /// The same, both in relation to another contender, which is there at both sizes and does not depend on them: what the machine does
    /// otherwise at another time falls out.
    SizeBeside(u64, String),
}

/// How much a value, or a ratio, should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
    /// One, give or take this.
    Around(f64),
}

/// The names of the contenders, one spelling for all cases.
pub mod contender {
    /// The client dials the pod itself, and nothing is attached.
    pub const DIRECT: &str = "no proxy";
    /// The agent with `--socket-lb all`.
    pub const SOCKET: &str = "ours, socket-lb all";
    /// The agent with `--socket-lb off`: every packet is translated by the tc programs.
    pub const TC: &str = "ours, tc only";
    /// The agent with `--socket-lb off` and XDP on the node's uplink.
    pub const XDP: &str = "ours, XDP";
    /// kube-proxy with `--proxy-mode nftables`.
    pub const NFTABLES: &str = "kube-proxy nftables";
    /// kube-proxy with `--proxy-mode iptables`, the programs of iptables being those over nftables.
    pub const IPTABLES: &str = "kube-proxy iptables";
    /// An XDP program that swaps the addresses of a packet and sends it back: the least that one can do.
    pub const XDP_SWAP: &str = "XDP swap";
    /// All of them, in the order of the tables.
    pub const ALL: [&str; 7] = [DIRECT, SOCKET, TC, XDP, NFTABLES, IPTABLES, XDP_SWAP];
}

impl Row {
    /// A row without samples yet.
    pub fn new(contender: &str, at: Option<u64>) -> Self {
        Self {
            contender: contender.to_owned(),
            at,
            samples: Vec::new(),
            note: None,
        }
    }

    /// Median, smallest and largest sample; `None` without samples.
    pub fn spread(&self) -> Option<Spread> {
        Spread::of(&self.samples)
    }
}

/// The middle of some values and how far they go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The value that half of the others are below.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of these values; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted[sorted.len() / 2];
        let lower = sorted[(sorted.len() - 1) / 2];
        Some(Self {
            median: (lower + upper) / 2.0,
            min,
            max,
        })
    }
}

/// What became of a target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// The value, or the ratio.
    pub reached: Spread,
    /// Whether its median keeps to the bound.
    pub is_met: bool,
}

impl Bound {
    /// Whether a value keeps to it.
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
            Self::Around(range) => (value - 1.0).abs() <= range,
        }
    }
}

impl Case {
    /// The row of a contender at a size.
    pub fn row(&self, contender: &str, at: Option<u64>) -> Option<&Row> {
        self.rows.iter().find(|row| row.contender == contender && row.at == at)
    }

    /// The row of a contender at a size, made if it is not there yet.
    pub fn row_mut(&mut self, contender: &str, at: Option<u64>) -> &mut Row {
        let found = self
            .rows
            .iter()
            .position(|row| row.contender == contender && row.at == at);
        let index = found.unwrap_or_else(|| {
            self.rows.push(Row::new(contender, at));
            self.rows.len() - 1
        });
        &mut self.rows[index]
    }

    /// What became of a target, at every size that it speaks of; `None` where something was not measured.
    pub fn verdicts(&self, target: &Target) -> Vec<(Option<u64>, Option<Verdict>)> {
        let mine = self.rows.iter().filter(|row| row.contender == target.contender);
        let meant = mine.filter(|row| target.at.is_none() || row.at == target.at);
        meant
            .filter(|row| match target.against {
                Against::Size(size) | Against::SizeBeside(size, _) => row.at != Some(size),
                _ => true,
            })
            .map(|row| (row.at, self.verdict(row, target)))
            .collect()
    }

    fn verdict(&self, row: &Row, target: &Target) -> Option<Verdict> {
        let values = match &target.against {
            Against::Nothing => row.samples.clone(),
            Against::Contender(other) => ratios(&row.samples, &self.row(other, row.at)?.samples),
            Against::Size(size) => ratios(&row.samples, &self.row(&row.contender, Some(*size))?.samples),
            Against::SizeBeside(size, other) => {
                let beside = |row: &Row| Some(ratios(&row.samples, &self.row(other, row.at)?.samples));
                let before = Spread::of(&beside(self.row(&row.contender, Some(*size))?)?)?.median;
                beside(row)?.iter().map(|ratio| ratio / before).collect()
            }
        };
        let reached = Spread::of(&values)?;
        Some(Verdict {
            reached,
            is_met: target.bound.holds(reached.median),
        })
    }

    /// Writes it into `<dir>/<name>.json`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let path = dir.join(format!("{}.json", self.name));
        fs::write(&path, serde_json::to_string_pretty(self)?).with_context(|| format!("writing {}", path.display()))
    }

    /// All cases in a folder, by name.
    pub fn read_all(dir: &Path) -> Result<Vec<Self>> {
        let entries = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        let read = |path: &std::path::PathBuf| {
            let text = fs::read_to_string(path)?;
            serde_json::from_str(&text).with_context(|| format!("{} is no result", path.display()))
        };
        paths.iter().map(read).collect()
    }
}

/// Value by value, as far as both go.
pub fn ratios(these: &[f64], those: &[f64]) -> Vec<f64> {
    these.iter().zip(those).map(|(this, that)| this / that).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> Case {
        let row = |contender: &str, at, samples: &[f64]| Row {
            samples: samples.to_vec(),
            ..Row::new(contender, Some(at))
        };
        Case {
            name: "made-up".into(),
            title: "Made up".into(),
            about: "Nothing.".into(),
            unit: "1/s".into(),
            better: Better::Higher,
            axis: Some("services".into()),
            rows: vec![
                row("a", 1, &[10.0, 30.0, 20.0]),
                row("b", 1, &[5.0, 10.0, 10.0]),
                row("a", 9, &[10.0, 29.0, 21.0]),
                row("b", 9, &[]),
            ],
            targets: Vec::new(),
        }
    }

    fn target(against: Against, bound: Bound) -> Target {
        Target {
            contender: "a".into(),
            at: None,
            against,
            bound,
        }
    }

    #[test]
    fn ratios_are_of_samples_that_belong_together() {
        let verdicts = case().verdicts(&target(Against::Contender("b".into()), Bound::AtLeast(2.0)));
        assert_eq!(verdicts.len(), 2);
        let first = verdicts[0].1.unwrap();
        assert_eq!(
            (first.reached.median, first.reached.min, first.reached.max),
            (2.0, 2.0, 3.0)
        );
        assert!(first.is_met);
        assert_eq!(verdicts[1], (Some(9), None), "b was not measured there");
    }

    #[test]
    fn a_size_is_compared_with_another_one_but_not_with_itself() {
        let verdicts = case().verdicts(&target(Against::Size(1), Bound::Around(0.03)));
        let [(Some(9), Some(verdict))] = verdicts[..] else {
            panic!("{verdicts:?}")
        };
        assert!(verdict.is_met && verdict.reached.median == 1.0, "{verdict:?}");
        let mut drifted = case();
        drifted.row_mut("b", Some(9)).samples = vec![5.0, 14.5, 10.5];
        let beside = target(Against::SizeBeside(1, "b".into()), Bound::Around(0.03));
        let [(Some(9), Some(verdict))] = drifted.verdicts(&beside)[..] else {
            panic!("one size but the first")
        };
        assert!(verdict.is_met && verdict.reached.median == 1.0, "{verdict:?}");
        let value = target(Against::Nothing, Bound::AtMost(19.0));
        assert!(!case().verdicts(&value)[0].1.unwrap().is_met);
    }

    #[test]
    fn files_give_back_what_was_written() {
        let dir = crate::leftovers::temp_dir("results").unwrap();
        let mut case = case();
        case.targets = vec![
            target(Against::Size(1), Bound::Around(0.03)),
            target(Against::Nothing, Bound::AtMost(1.0)),
        ];
        case.write(dir.path()).unwrap();
        assert_eq!(Case::read_all(dir.path()).unwrap(), [case]);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_two() {
        let spread = Spread::of(&[4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((spread.median, spread.min, spread.max), (2.5, 1.0, 4.0));
        assert_eq!(Spread::of(&[]), None);
    }
}
