//! `willcall seeder …`: sets up and runs a seeder, and talks to a running one.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use protocol::Address;
use protocol::trust::JoinLine;
use serde_json::json;

use super::daemon::{self, RunArgs, ask, lines};
use super::manager::parse_size;
use super::output::Answer;
use super::{Global, config_edit, manager};

/// Commands of the seeder.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Set up a seeder from an invitation
    Init(InitArgs),
    /// Run the seeder
    Run(RunArgs),
    /// Show how the seeder is: what it holds, serves, earned, and what is wrong
    Status(DirArgs),
    /// List the newest receipts and how far they got
    Receipts(DirArgs),
    /// Read everything that is stored and check it; damaged chunks are fetched again
    Scrub(DirArgs),
}

/// Where the data are.
#[derive(Debug, Args)]
pub(crate) struct DirArgs {
    /// Data folder [default: the user's data folder]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Flags of `init`.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// Join line from `willcall manager invite seeder`, as text, @FILE, or - for standard input
    #[arg(long, value_name = "LINE")]
    join: String,
    /// A name for the manager's lists
    #[arg(long)]
    name: String,
    /// Disk space offered, e.g. 500GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    capacity: u64,
    /// Address to listen on; may be repeated [default: TCP and QUIC, ports chosen at the
    /// first start and kept]
    #[arg(long, value_name = "MULTIADDR")]
    listen: Vec<Address>,
    /// Address that others reach this node at, where it differs; may be repeated
    #[arg(long, value_name = "MULTIADDR")]
    external: Vec<Address>,
    /// A setting of config.toml; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

impl DirArgs {
    fn path(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| super::default_dir("seeder"))
    }
}

/// Runs one command.
pub(crate) async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Init(args) => init(args, global),
        Command::Run(args) => serve(args, global).await,
        Command::Status(dir) => ask(&dir.path(), json!({"cmd": "status"}), global, lines).await,
        Command::Receipts(dir) => {
            let columns = &["id", "transaction", "chunks", "state", "at"];
            ask(&dir.path(), json!({"cmd": "receipts"}), global, |a| manager::listed(a, "receipts", columns)).await
        }
        Command::Scrub(dir) => ask(&dir.path(), json!({"cmd": "scrub"}), global, lines).await,
    }
}

fn init(args: InitArgs, global: &Global) -> Result<ExitCode> {
    let dir = args.dir.path();
    let join: JoinLine = super::text_argument(&args.join)?.parse().context("--join")?;
    let options = seeder::InitOptions {
        join,
        name: args.name,
        capacity: args.capacity,
        listen: args.listen,
        external: args.external,
    };
    let report = seeder::init(&dir, options)?;
    config_edit::apply(&dir, &args.settings, seeder::Config::load)?;
    let text = format!("seeder {}\nNext: willcall seeder run --dir {}", report.peer, dir.display());
    Answer::new(json!({"peer": report.peer, "dir": dir}), text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(args: RunArgs, global: &Global) -> Result<ExitCode> {
    let dir = args.dir.unwrap_or_else(|| super::default_dir("seeder"));
    let config = seeder::Config::load(&dir)?;
    let running = Box::pin(seeder::start(&dir, config)).await?;
    daemon::announce("seeder", running.handle(), json!({}), global.json).await?;
    let waited = daemon::wait(running.supervisor(), args.until_stdin_closes).await;
    let stopped = running.stop(daemon::STOP_DEADLINE).await.context("stopping");
    daemon::ended(waited, stopped)
}
