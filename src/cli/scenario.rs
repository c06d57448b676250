//! `willcall testnet scenario`: a disturbance or an attack, played over a whole network in this process, told as a report,
//! and judged: the exit code says whether everything held that must.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;
use node::StopSignals;
use node::units::parse_size;
use serde_json::json;
use testnet::scenario::{self, Options, Report, SCENARIOS};

use super::Global;
use super::output::{self, Answer};

/// Flags of `scenario`.
#[derive(Debug, Args)]
pub(crate) struct ScenarioArgs {
    /// Which; --list says what happens in each
    #[arg(required_unless_present = "list", value_parser = PossibleValuesParser::new(SCENARIOS.map(|(name, _)| name)))]
    name: Option<String>,
    /// List the scenarios
    #[arg(long, conflicts_with = "name")]
    list: bool,
    /// Chooses what is left to chance
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Size of the goods [default: 16MiB; 32MiB where what is judged needs many chunks]
    #[arg(long, value_name = "SIZE", value_parser = goods_size)]
    size: Option<u64>,
}

fn goods_size(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    let fits = (1 << 20..=1 << 34).contains(&size);
    fits.then_some(size).ok_or_else(|| "the goods have from 1MiB to 16GiB".to_owned())
}

/// Plays one scenario.
pub(crate) async fn run(args: ScenarioArgs, global: &Global) -> Result<ExitCode> {
    let Some(name) = args.name.filter(|_| !args.list) else {
        let rows = SCENARIOS.iter().map(|(name, what)| vec![(*name).to_owned(), (*what).to_owned()]).collect();
        let list: Vec<_> = SCENARIOS.iter().map(|(name, what)| json!({"name": name, "what": what})).collect();
        Answer::new(json!({"scenarios": list}), output::table(&["scenario", "what happens"], rows))
            .print(global.json)?;
        return Ok(ExitCode::SUCCESS);
    };
    let options = Options { seed: args.seed, bytes: args.size.unwrap_or_else(|| scenario::usual_bytes(&name)) };
    // Before anything is made that a signal would leave behind.
    let mut stop = StopSignals::install().context("cannot wait for signals")?;
    let report = tokio::select! {
        report = Box::pin(scenario::run(&name, options)) => report.with_context(|| format!("scenario {name}"))?,
        // The network is dropped with its folder.
        _ = stop.wait() => {
            bail!("scenario {name} was stopped before its end; nothing was judged");
        }
    };
    Answer::new(serde_json::to_value(&report)?, text(&report)).print(global.json)?;
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(report: &Report) -> String {
    let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1000.0);
    let mut parts = vec![format!(
        "{}, seed {}: {} deliveries, {} fetched in {}, {} of it twice ({:.2} %)",
        report.scenario,
        report.seed,
        report.deliveries,
        output::bytes(report.bytes),
        seconds(report.time_ms),
        output::bytes(report.duplicate_bytes),
        report.duplicate_share * 100.0
    )];
    let told = |events: &[scenario::Event]| {
        events.iter().map(|event| format!("  {:>8}  {}", seconds(event.at_ms), event.what)).collect::<Vec<_>>()
    };
    for (title, events) in [("What was done", &report.events), ("Why deliveries stood still", &report.causes)] {
        if !events.is_empty() {
            parts.push(format!("\n{title}"));
            parts.extend(told(events));
        }
    }
    let sources = report.sources.iter().map(|source| {
        let note = if source.banned { "dropped for a bad chunk" } else { "" };
        vec![source.peer.to_string(), source.chunks.to_string(), output::bytes(source.bytes), note.to_owned()]
    });
    parts.push(String::new());
    parts.push(output::table(&["seeder", "chunks", "bytes", ""], sources.collect()));
    if !report.figures.is_empty() {
        parts.push(String::new());
        parts.extend(report.figures.iter().map(|(name, value)| format!("  {name} {value:.2}")));
    }
    let checked = report.invariants.iter().map(|invariant| {
        let held = if invariant.held { "holds" } else { "BROKEN" };
        vec![invariant.name.to_owned(), held.to_owned(), invariant.detail.clone()]
    });
    let not_judged =
        report.not_judged.iter().map(|left| vec![left.name.to_owned(), "not judged".to_owned(), left.why.clone()]);
    let checked = checked.chain(not_judged);
    parts.push(String::new());
    parts.push(output::table(&["invariant", "", "what was found"], checked.collect()));
    parts.extend(report.problems.iter().map(|problem| format!("problem: {problem}")));
    parts.join("\n")
}
