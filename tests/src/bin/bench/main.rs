//! `cargo xtask bench all`: every contender in the same namespaces, in turn, and what came out as a table, a document and plots.
//!
//! Cases come in groups that share what they are measured on ([`GROUPS`]). A group gives its cases ([`proxy_tests::results`]), each is
//! written to a file at once, and everything that is said afterwards is made of these files. Whatever a group has made is removed when
//! it returns, also after an error or Ctrl-C.

mod bpf;
mod cases;
mod conntrack;
mod contenders;
mod external;
mod flood;
mod load;
mod machine;
mod render;
mod site;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use proxy_tests::leftovers;
use proxy_tests::results::{Case, contender};

/// Measures every contender in the same namespaces.
#[derive(Parser)]
#[command(name = "bench")]
struct Args {
    /// Fewer repetitions and sizes; the document stays as it is.
    #[arg(long)]
    quick: bool,
    /// One repetition of an instant, to see that everything works; says nothing about anybody.
    #[arg(long, conflicts_with = "quick")]
    tiny: bool,
    /// Only these cases; the document stays as it is.
    #[arg(long, value_name = "CASE", value_delimiter = ',')]
    cases: Vec<String>,
    /// Only contenders whose names contain one of these, beside the one without a proxy: to look at one closely.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    contenders: Vec<String>,
    /// Numbers of Services instead of the usual ones, in rising order.
    #[arg(long, value_name = "NUMBER", value_delimiter = ',')]
    sizes: Vec<u32>,
    /// Name the cases and end.
    #[arg(long)]
    list: bool,
    /// Write the document of all results that are there, whatever was measured now.
    #[arg(long)]
    document: bool,
    /// Measure nothing: only say again what the results are.
    #[arg(long)]
    only_render: bool,
    /// Where results are kept, one file per case.
    #[arg(long, value_name = "DIR")]
    results: PathBuf,
    /// The folder of the document.
    #[arg(long, value_name = "DIR")]
    docs: PathBuf,
}

/// Cases that are measured on the same things.
struct Group {
    /// Their names, in the order of the table.
    cases: &'static [&'static str],
    /// Measures those of them that are wanted.
    run: fn(&Run) -> Result<Vec<Case>>,
}

/// All of them, in the order of the table.
const GROUPS: &[Group] = &[
    Group {
        cases: cases::traffic::CASES,
        run: cases::traffic::run,
    },
    Group {
        cases: external::PACKET,
        run: external::packet,
    },
    Group {
        cases: external::PLANE,
        run: external::plane,
    },
];

/// How thoroughly.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    Full,
    Quick,
    Tiny,
}

/// What was asked for.
pub(crate) struct Run {
    pub(crate) scale: Scale,
    wanted: Vec<String>,
    contenders: Vec<String>,
    /// Numbers of Services, if others than usual are wanted.
    pub(crate) sizes: Vec<u32>,
    interrupted: Arc<AtomicBool>,
    began: Instant,
}

impl Run {
    /// Is this case to be measured?
    pub(crate) fn wants(&self, case: &str) -> bool {
        self.wanted.is_empty() || self.wanted.iter().any(|wanted| wanted == case)
    }

    /// Is this contender to be measured?
    pub(crate) fn wants_contender(&self, name: &str) -> bool {
        let some = &self.contenders;
        name == contender::DIRECT || some.is_empty() || some.iter().any(|part| name.contains(part.as_str()))
    }

    /// What is for this scale: of three, for a full run, a quick one and a tiny one.
    pub(crate) fn pick<T: Copy>(&self, of: [T; 3]) -> T {
        of[self.scale as usize]
    }

    /// Fails once somebody has pressed Ctrl-C; to be asked every second or so.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    /// Says what is done now.
    pub(crate) fn step(&self, what: &str) {
        let seconds = self.began.elapsed().as_secs();
        eprintln!("  {:>2}:{:02} {what}", seconds / 60, seconds % 60);
    }

    /// Asks `question` until it answers yes, the limit is reached (`false`) or somebody presses Ctrl-C (an error).
    pub(crate) fn wait(&self, limit: Duration, mut question: impl FnMut() -> bool) -> Result<bool> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            self.check()?;
            if question() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(false)
    }
}

fn main() -> ExitCode {
    match bench(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: Args) -> Result<()> {
    let known: Vec<&str> = GROUPS.iter().flat_map(|group| group.cases).copied().collect();
    if args.list {
        known.iter().for_each(|case| println!("{case}"));
        return Ok(());
    }
    let unknown = args.cases.iter().find(|case| !known.contains(&case.as_str()));
    ensure!(
        unknown.is_none(),
        "there is no case {}; there are {}",
        unknown.map_or("", String::as_str),
        known.join(", ")
    );
    let scale = match (args.tiny, args.quick) {
        (true, _) => Scale::Tiny,
        (_, true) => Scale::Quick,
        _ => Scale::Full,
    };
    let mut failures = Vec::new();
    let mut measured = Vec::new();
    if !args.only_render {
        let run = Run {
            scale,
            wanted: args.cases.clone(),
            contenders: args.contenders.clone(),
            sizes: args.sizes.clone(),
            interrupted: watch_signals()?,
            began: Instant::now(),
        };
        machine::check()?;
        for group in GROUPS
            .iter()
            .filter(|group| group.cases.iter().any(|case| run.wants(case)))
        {
            match (group.run)(&run) {
                Ok(cases) => {
                    for case in &cases {
                        case.write(&args.results)?;
                        measured.push(case.name.clone());
                    }
                }
                // What other groups find is worth having.
                Err(error) => failures.push(format!("{}: {error:#}", group.cases.join(", "))),
            }
            if run.check().is_err() {
                break;
            }
        }
        run.step("done");
        let left = leftovers::owned_by_this_process();
        ensure!(left.is_empty(), "something was left behind: {left:?}");
    }
    let all = in_order(Case::read_all(&args.results).unwrap_or_default(), &known);
    let shown: Vec<Case> = all
        .iter()
        .filter(|case| args.only_render || measured.contains(&case.name))
        .cloned()
        .collect();
    println!("{}", render::text(&shown));
    let is_whole = args.cases.is_empty()
        && args.contenders.is_empty()
        && scale == Scale::Full
        && !args.only_render
        && failures.is_empty();
    if is_whole || args.document {
        render::write_document(&args.docs, &all, &machine::describe()?).context("writing the document")?;
        eprintln!("  written: {}", args.docs.join("performance.md").display());
    }
    ensure!(failures.is_empty(), "not measured: {}", failures.join("; "));
    Ok(())
}

/// As the groups name them; results of cases that are no more are left out.
fn in_order(cases: Vec<Case>, known: &[&str]) -> Vec<Case> {
    let place = |case: &Case| known.iter().position(|name| *name == case.name);
    let mut placed: Vec<_> = cases
        .into_iter()
        .filter_map(|case| Some((place(&case)?, case)))
        .collect();
    placed.sort_by_key(|(place, _)| *place);
    placed.into_iter().map(|(_, case)| case).collect()
}

fn watch_signals() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    Ok(interrupted)
}
