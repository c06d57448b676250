//! Logging as a user sets it: level by `--log` or `WILLCALL_LOG`, text or JSON, always on standard error.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The network library is chatty at `info`, and warns of every datagram that finds no way out: causes are told elsewhere.
const QUIET: &str = "libp2p_swarm=warn,libp2p_gossipsub=error,libp2p_kad=warn,quinn=warn,quinn_udp=error,hyper=warn";

/// Starts logging to `file`, or to standard error. `default` is the level where the user names none.
pub(crate) fn start(filter: Option<&str>, format: LogFormat, file: Option<&Path>, default: &str) -> Result<()> {
    let wanted = filter.unwrap_or(default);
    let filter = EnvFilter::try_new(format!("{QUIET},{wanted}"))
        .with_context(|| format!("--log '{wanted}' is no log filter; examples: info, debug, willcall_seeder=debug"))?;
    let ansi = file.is_none() && io::IsTerminal::is_terminal(&io::stderr());
    let writer = match file {
        Some(path) => {
            let file = File::options().create(true).append(true).open(path);
            BoxMakeWriter::new(file.with_context(|| format!("cannot write the log file {}", path.display()))?)
        }
        None => BoxMakeWriter::new(io::stderr),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(ansi);
    match format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).init(),
    }
    Ok(())
}
