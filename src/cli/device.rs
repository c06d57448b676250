//! `willcall device …`: what was bought goes with its owner from one device to the next.

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use client_node::{LinkOptions, MoveChoice};
use protocol::{PeerId, TransactionId};
use serde_json::{Value, json};

use super::Global;
use super::client::{HomeArgs, join_line};
use super::output::{self, Answer};

/// Commands about devices.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move purchases of this client to another peer; this client's tickets for them are void then
    Move(MoveArgs),
}

/// Flags of `device move`.
#[derive(Debug, Args)]
pub(crate) struct MoveArgs {
    /// Peer ID of the new device: `willcall id` there
    to: PeerId,
    /// A purchase that is to go; may be repeated
    #[arg(long = "transaction", value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    transactions: Vec<TransactionId>,
    /// Everything that was bought for this client
    #[arg(long)]
    all: bool,
    /// Join line of the network, where this client does not know it: text, @FILE, or - for standard input
    #[arg(long, value_name = "LINE")]
    join: Option<String>,
    #[command(flatten)]
    home: HomeArgs,
}

/// Runs one command.
pub(crate) async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    let Command::Move(args) = command;
    let (home, join) = (args.home.open()?, join_line(args.join.as_ref())?);
    let choice = match args.all {
        true => MoveChoice::All,
        false => MoveChoice::Some(args.transactions.into_iter().collect::<BTreeSet<_>>()),
    };
    let options = LinkOptions::default();
    let moves = Box::pin(client_node::move_purchases(&home, args.to, &choice, join.as_ref(), &options)).await?;
    let table = moves
        .items
        .iter()
        .map(|item| {
            let what = match (&item.generation, &item.problem) {
                (Some(generation), None) => format!("moved, generation {generation}"),
                (Some(generation), Some(problem)) => format!("moved, generation {generation}; {problem}"),
                (None, problem) => problem.clone().unwrap_or_default(),
            };
            vec![item.transaction.to_string(), item.title.clone(), what]
        })
        .collect();
    let mut text = output::table(&["transaction", "title", "what became of it"], table);
    for (network, error) in &moves.failed {
        text.push_str(&format!("\nnetwork {network}: {error}"));
    }
    if moves.items.iter().any(|item| item.generation.is_some()) {
        text.push_str("\nOn the new device: willcall inbox, then willcall fetch TRANSACTION");
    }
    let failed: Vec<Value> = moves.failed.iter().map(|(n, e)| json!({"network": n, "error": e.to_string()})).collect();
    let whole = failed.is_empty() && moves.items.iter().all(|item| item.generation.is_some() && item.problem.is_none());
    Answer::new(json!({"to": args.to, "items": moves.items, "failed": failed}), text).print(global.json)?;
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
