//! `willcall demo`: a whole sale on one machine, through the same commands and APIs that a user has, every node a process
//! of its own. It is the proof that the parts fit, so it believes nobody: files are compared byte by byte, steps are
//! read back from the log of the process that took them, refusals come over real connections.

mod compare;
mod sale;
mod steps;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::cli::output;
use crate::local::{self, Narrator, Network};
use sale::Sale;

/// Flags of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// File or folder to sell [default: an album made on the spot]
    path: Option<PathBuf>,
    /// How many seeders, besides the manager's origin
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=32))]
    seeders: u16,
    /// Keep everything (data, logs, goods) in this folder, which must be empty or absent
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Runs the demo.
pub(crate) async fn run(args: DemoArgs, json: bool) -> Result<ExitCode> {
    // Before anything is made that a signal would leave behind.
    let mut stop = node::StopSignals::install().context("cannot wait for signals")?;
    let (dir, _remove) = folder(args.keep.as_deref())?;
    let goods = match &args.path {
        Some(path) => std::fs::canonicalize(path).with_context(|| format!("cannot read {}", path.display()))?,
        None => local::album(&dir).context("cannot write the sample album")?,
    };
    let mut network = Network::new(&dir, Narrator::new(json))?;
    let sold = {
        let mut sale = Sale::new(&mut network, &goods, &dir);
        tokio::select! {
            result = Box::pin(sale.run(args.seeders)) => result.map_err(|error| sale.explain(error)),
            signal = stop.wait() => Err(anyhow::anyhow!("stopped by {signal}")),
        }
    };
    network.narrator().say("Stopping every process");
    let stopped = network.stop().await;
    let result = match (sold, stopped) {
        (Ok(mut result), Ok(())) => {
            if let (Some(keep), Some(object)) = (&args.keep, result.as_object_mut()) {
                object.insert("kept".into(), json!(keep));
            }
            result
        }
        (Err(error), _) | (Ok(_), Err(error)) => return Err(error.context("demo")),
    };
    if json {
        output::line(&result.to_string())?;
    } else {
        network.narrator().say(&summary(&result));
    }
    Ok(ExitCode::SUCCESS)
}

/// The folder to work in: the one to keep, or a temporary one that goes away with the second value.
fn folder(keep: Option<&Path>) -> Result<(PathBuf, Option<tempfile::TempDir>)> {
    let Some(keep) = keep else {
        let dir =
            tempfile::Builder::new().prefix("willcall-demo-").tempdir().context("cannot make a temporary folder")?;
        return Ok((dir.path().to_owned(), Some(dir)));
    };
    std::fs::create_dir_all(keep).with_context(|| format!("cannot make {}", keep.display()))?;
    let mut entries = std::fs::read_dir(keep).with_context(|| format!("cannot read {}", keep.display()))?;
    if entries.next().is_some() {
        bail!("{} is not empty; name an empty or absent folder for --keep", keep.display());
    }
    Ok((std::fs::canonicalize(keep)?, None))
}

fn summary(result: &Value) -> String {
    let delivery = result.get("delivery").cloned().unwrap_or_default();
    let mut text = format!(
        "\nDone: {} bytes of goods, identical to what was sold, in {} s ({} MiB/s).",
        output::field(&delivery, "bytes"),
        output::field(&delivery, "seconds"),
        output::field(&delivery, "mib_per_s"),
    );
    if let Some(kept) = result.get("kept").and_then(Value::as_str) {
        text.push_str(&format!("\nEverything is kept in {kept}"));
    }
    text
}
