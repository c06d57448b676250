//! What `run` is for every role: say when it is ready, wait for a signal or a failure, stop in order. And how commands
//! beside a running node talk to it.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use node::{NodeHandle, Supervisor};
use serde_json::{Value, json};

use super::Global;
use super::output::{self, Answer};

/// How long tasks may take to end.
pub(crate) const STOP_DEADLINE: Duration = Duration::from_secs(15);

/// Flags of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Data folder [default: the user's data folder]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Stop when standard input is closed: for programs that start nodes
    #[arg(long, hide = true)]
    pub(crate) until_stdin_closes: bool,
}

/// Says that a node is ready: one line on standard output.
pub(crate) async fn announce(role: &str, node: &NodeHandle, mut facts: Value, json: bool) -> Result<()> {
    let addresses = node.listen_addresses().await?;
    if let Some(facts) = facts.as_object_mut() {
        facts.insert("ready".into(), Value::Bool(true));
        facts.insert("role".into(), json!(role));
        facts.insert("peer".into(), json!(node.peer_id()));
        facts.insert("addresses".into(), json!(addresses));
    }
    if json {
        return output::line(&facts.to_string());
    }
    let listed = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let on = if listed.is_empty() { String::new() } else { format!(" on {listed}") };
    let mut text = format!("{role} {} is ready{on}", node.peer_id());
    for (name, value) in facts.as_object().into_iter().flatten() {
        if let (Value::String(value), false) = (value, matches!(name.as_str(), "role" | "peer")) {
            text.push_str(&format!("\n{name}: {value}"));
        }
    }
    output::line(&text)
}

/// Waits until the node is to stop: a signal, a closed standard input where asked for, or a failure.
pub(crate) async fn wait(supervisor: &Supervisor, until_stdin_closes: bool) -> Result<()> {
    tokio::select! {
        signal = node::wait_for_stop() => {
            tracing::info!(signal = signal.context("cannot wait for signals")?, "stopping");
            Ok(())
        }
        () = stdin_closed(), if until_stdin_closes => {
            tracing::info!("standard input was closed: stopping");
            Ok(())
        }
        reason = supervisor.failed() => bail!("the node failed: {reason}"),
    }
}

/// A thread of its own: a read of standard input cannot be broken off, and must not hold up the runtime's end.
async fn stdin_closed() {
    let (closed, wait) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let _closed_at_the_end = closed;
        let mut buffer = [0; 64];
        while matches!(std::io::stdin().read(&mut buffer), Ok(read) if read > 0) {}
    });
    let _ = wait.await;
}

/// Ends a `run`: the first thing that went wrong is what is reported.
pub(crate) fn ended(waited: Result<()>, stopped: Result<()>) -> Result<ExitCode> {
    waited.and(stopped).map(|()| ExitCode::SUCCESS)
}

/// Asks the node that runs over `dir`, and prints its answer by `text`.
pub(crate) async fn ask(
    dir: &Path,
    request: Value,
    global: &Global,
    text: impl FnOnce(&Value) -> String,
) -> Result<ExitCode> {
    let answer = call(dir, request).await?;
    let text = if global.json { String::new() } else { text(&answer) };
    Answer::new(answer, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// A list of the node that runs over `dir`, a page after the other until nothing is left of it.
pub(crate) async fn call_all(dir: &Path, mut request: Value, name: &str) -> Result<Vec<Value>> {
    let mut lines = Vec::new();
    loop {
        let mut page = call(dir, request.clone()).await?;
        if let Some(Value::Array(more)) = page.get_mut(name) {
            lines.append(more);
        }
        match (page.get("next"), request.as_object_mut()) {
            (Some(next), Some(fields)) if !next.is_null() => drop(fields.insert("after".to_owned(), next.clone())),
            _ => return Ok(lines),
        }
    }
}

/// Asks for a whole list, and prints it by `text`.
pub(crate) async fn ask_all(
    dir: &Path,
    request: Value,
    name: &str,
    global: &Global,
    text: impl FnOnce(&Value) -> String,
) -> Result<ExitCode> {
    let lines = call_all(dir, request, name).await?;
    let answer = Value::Object([(name.to_owned(), Value::Array(lines))].into_iter().collect());
    let text = if global.json { String::new() } else { text(&answer) };
    Answer::new(answer, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Asks the node that runs over `dir`.
pub(crate) async fn call(dir: &Path, request: Value) -> Result<Value> {
    Ok(node::control_call(dir, &request, |_| {}).await?)
}
