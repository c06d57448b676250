//! `willcall merchant …`: sets up and runs a shop, and talks to a running one.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use protocol::trust::JoinLine;
use protocol::{Address, Currency};
use serde_json::{Value, json};

use super::daemon::{self, RunArgs, ask};
use super::facts::{self, listed, page};
use super::output::{self, Answer, field, rows};
use super::{Global, backup, config_edit};

/// Commands of the merchant.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Set up a shop from an invitation
    Init(InitArgs),
    /// Run the shop
    Run(RunArgs),
    /// Show how the shop is
    Status(DirArgs),
    /// Voucher codes: what buyers pay with
    #[command(subcommand)]
    Vouchers(Vouchers),
    /// List the newest orders
    Orders(DirArgs),
    /// Show one order
    Order(OrderArgs),
    /// Give an order's money back and stop its delivery
    Refund(OrderArgs),
    /// Give what was bought to another peer, for a buyer who lost the key that it was bought for
    Recover(RecoverArgs),
    /// Put what is signed of an order, and what this shop says of it, into a file
    Evidence(EvidenceArgs),
    /// Write database, key and configuration of the running shop into one file
    Backup(backup::BackupArgs),
    /// Make the shop anew from such a file
    Restore(backup::RestoreArgs),
}

/// Commands about vouchers.
#[derive(Debug, Subcommand)]
pub(crate) enum Vouchers {
    /// Make voucher codes; they are shown once
    Issue(IssueArgs),
    /// List vouchers and their balances
    List(DirArgs),
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
    /// Join line from `willcall manager invite merchant`, as text, @FILE, or - for standard input
    #[arg(long, value_name = "LINE")]
    join: String,
    /// The shop's name
    #[arg(long)]
    name: String,
    /// Where the HTTP API listens [default: 127.0.0.1:4680]
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// Address to listen on for other nodes; may be repeated
    #[arg(long, value_name = "MULTIADDR")]
    listen: Vec<Address>,
    /// A setting of config.toml; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Flags of `vouchers issue`.
#[derive(Debug, Args)]
pub(crate) struct IssueArgs {
    /// What each code is worth, in the currency's major unit
    amount: String,
    /// ISO 4217 code
    #[arg(long)]
    currency: Currency,
    /// How many
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `evidence`.
#[derive(Debug, Args)]
pub(crate) struct EvidenceArgs {
    /// Order id
    order: String,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `recover`.
#[derive(Debug, Args)]
pub(crate) struct RecoverArgs {
    /// Order id
    order: String,
    /// Peer ID that is to have it: `willcall id` on the new device
    #[arg(long, value_name = "PEER")]
    to: protocol::PeerId,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of commands about one order.
#[derive(Debug, Args)]
pub(crate) struct OrderArgs {
    /// Order id
    order: String,
    #[command(flatten)]
    dir: DirArgs,
}

impl DirArgs {
    fn path(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| super::default_dir("merchant"))
    }
}

/// Runs one command.
pub(crate) async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Init(args) => init(args, global),
        Command::Run(args) => serve(args, global).await,
        Command::Status(dir) => ask(&dir.path(), json!({"cmd": "status"}), global, page).await,
        Command::Vouchers(Vouchers::Issue(args)) => {
            let (currency, count) = (args.currency, args.count);
            let request = json!({"cmd": "vouchers-issue", "amount": args.amount, "currency": currency, "count": count});
            ask(&args.dir.path(), request, global, codes).await
        }
        Command::Vouchers(Vouchers::List(dir)) => {
            daemon::ask_all(&dir.path(), json!({"cmd": "vouchers-list"}), "vouchers", global, vouchers).await
        }
        Command::Orders(dir) => {
            let columns = &["order", "stage", "transaction", "amount", "client", "created_at"];
            ask(&dir.path(), json!({"cmd": "orders"}), global, |a| listed(a, "orders", columns)).await
        }
        Command::Order(args) => ask(&args.dir.path(), json!({"cmd": "order", "order": args.order}), global, page).await,
        Command::Evidence(args) => {
            let path = super::new_file::new_place(&args.output)?;
            let request = json!({"cmd": "evidence", "order": args.order, "path": path});
            ask(&args.dir.path(), request, global, evidence).await
        }
        Command::Recover(args) => {
            let request = json!({"cmd": "recover", "order": args.order, "to": args.to});
            let text = |a: &Value| {
                let (transaction, client) = (field(a, "transaction"), field(a, "client"));
                format!("transaction {transaction} is for {client} now; its ticket waits in that client's mailbox")
            };
            ask(&args.dir.path(), request, global, text).await
        }
        Command::Backup(args) => backup::backup("merchant", args, global).await,
        Command::Restore(args) => backup::merchant(&args, global),
        Command::Refund(args) => {
            let request = json!({"cmd": "refund", "order": args.order});
            ask(&args.dir.path(), request, global, |a| format!("stage: {}", field(a, "stage"))).await
        }
    }
}

/// What was written, and that it is of no use where that is so.
fn evidence(answer: &Value) -> String {
    let mut text = page(answer);
    if answer.get("proves_nothing") == Some(&Value::Bool(true)) {
        text.push_str(
            "\n\nPROVES NOTHING: nothing in the file holds under the network's present keys, and the manager, which vouches \
             for what a revoked key signed, gave no part of its own; ask again once it can be reached",
        );
    }
    text
}

fn init(args: InitArgs, global: &Global) -> Result<ExitCode> {
    let dir = args.dir.path();
    let join: JoinLine = super::text_argument(&args.join)?.parse().context("--join")?;
    let mut options = merchant_node::InitOptions::new(join, args.name);
    if !args.listen.is_empty() {
        options.listen = args.listen;
    }
    options.http = args.http;
    let report = merchant_node::init(&dir, options)?;
    config_edit::apply(&dir, &args.settings, merchant_node::Config::load)?;
    let text = format!("merchant {}\nNext: willcall merchant run --dir {}", report.peer, dir.display());
    Answer::new(json!({"peer": report.peer, "dir": dir}), text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(args: RunArgs, global: &Global) -> Result<ExitCode> {
    let dir = args.dir.unwrap_or_else(|| super::default_dir("merchant"));
    let config = merchant_node::Config::load(&dir)?;
    let shop = Box::pin(merchant_node::start(&dir, config)).await?;
    let facts = json!({"http": format!("http://{}", shop.http_address())});
    daemon::announce("merchant", shop.handle(), facts, global.json).await?;
    let waited = daemon::wait(shop.supervisor(), args.until_stdin_closes).await;
    let stopped = shop.stop(daemon::STOP_DEADLINE).await.context("stopping");
    daemon::ended(waited, stopped)
}

fn codes(answer: &Value) -> String {
    rows(answer, "codes").iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

/// Vouchers with their balances as money: JSON has minor units.
fn vouchers(answer: &Value) -> String {
    let table = rows(answer, "vouchers")
        .iter()
        .map(|v| {
            let money = |name: &str| {
                let currency = v.pointer("/issued/currency").cloned().unwrap_or_default();
                let minor = v.get(name).cloned().unwrap_or_default();
                facts::money(Some(&json!({"minor": minor, "currency": currency})))
            };
            let id = field(v, "id").chars().take(16).collect();
            vec![id, facts::money(v.get("issued")), money("available"), money("held"), money("spent")]
        })
        .collect();
    output::table(&["voucher", "issued", "available", "held", "spent"], table)
}
