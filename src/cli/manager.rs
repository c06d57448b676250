//! `willcall manager …`: sets up and runs the content manager with its origin seeder, and talks to a running one.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use node::units::{parse_size, parse_time};
use protocol::manifest::KeyPolicy;
use protocol::{Address, Amount, Currency};
use serde_json::{Value, json};

use super::daemon::{self, RunArgs, ask};
use super::facts::{listed, page};
use super::new_file::new_place;
use super::output::{self, Answer, field, rows};
use super::{Global, backup, books, config_edit, goods, progress};

/// Commands of the manager.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Set up a new network: root key, network keys, data folder
    Init(InitArgs),
    /// Run the manager and its origin seeder
    Run(RunArgs),
    /// Pack, encrypt and sign a file or folder, and put it into the catalogue
    Publish(PublishArgs),
    /// Print a join line that lets one merchant or seeder be enrolled
    Invite(InviteArgs),
    /// Print the join line for clients
    Join(DirArgs),
    /// Show how the manager is
    Status(DirArgs),
    /// List the catalogue: what is on sale, withdrawn, taken down, or void because the key that signed it was revoked
    Products(DirArgs),
    /// Sign a product again whose manifest is void because the key that signed it was revoked; its files are not needed
    Republish(goods::RepublishArgs),
    /// Show one product, and which seeders hold it
    Product(ProductArgs),
    /// List enrolled merchants
    Merchants(DirArgs),
    /// List enrolled seeders
    Seeders(DirArgs),
    /// List the newest transactions
    Transactions(DirArgs),
    /// Show one transaction: state, deliveries, receipts
    Transaction(TransactionArgs),
    /// Show the ledger: the newest postings, and every balance
    Ledger(books::LedgerArgs),
    /// List the newest receipts and what became of them
    Receipts(DirArgs),
    /// Make a transaction, an enrolment or content void
    Revoke(RevokeArgs),
    /// Take content down: off sale, out of every lease, and purged by every seeder that has it
    Takedown(TakedownArgs),
    /// Give a transaction's money back and stop its delivery; the shop hears of it and gives the payment back by itself
    Refund(TransactionArgs),
    /// Statements of account of seeders
    #[command(subcommand)]
    Statements(books::Statements),
    /// List what is to be paid out to seeders
    Payouts(books::PayoutArgs),
    /// Put everything that is signed of a transaction into a file that proves itself
    Evidence(EvidenceArgs),
    /// The network's keys: list, replace or revoke them while the manager runs
    #[command(subcommand)]
    Keys(super::keys::Command),
    /// The log of what the manager did, each entry chained to the one before
    #[command(subcommand)]
    Audit(super::audit::Audit),
    /// Book money that moved outside: a merchant paid what it owes, or somebody was paid out
    Payment(PaymentArgs),
    /// Show what a merchant owes, paid ahead, and may still come to owe, or change its limit
    Credit(CreditArgs),
    /// Show how much of what is over has moved out of the database into segments
    Archive(ArchiveArgs),
    /// Write database, keys and configuration of the running manager into one file
    Backup(backup::BackupArgs),
    /// Make the manager anew from such a file; seeders then send again what it may lack
    Restore(backup::RestoreArgs),
    /// After the folder was restored by other means, before the next run: seeders then send again what it may lack
    Restored(RestoredArgs),
}

/// Where the data are.
#[derive(Debug, Args)]
pub(crate) struct DirArgs {
    /// Data folder [default: the user's data folder]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Flags of `restored`.
#[derive(Debug, Args)]
pub(crate) struct RestoredArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// A restore number that seeders have seen (`fork` in their status), where the clock was ahead at an earlier restore
    #[arg(long, value_name = "NUMBER", default_value_t = 0, hide_default_value = true)]
    above: u64,
}

/// Flags of `init`.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// Address to listen on; may be repeated [default: TCP and QUIC on port 4601]
    #[arg(long, value_name = "MULTIADDR")]
    listen: Vec<Address>,
    /// Address that others reach this node at, where it differs; may be repeated
    #[arg(long, value_name = "MULTIADDR")]
    external: Vec<Address>,
    /// A setting of config.toml; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Flags of `publish`.
#[derive(Debug, Args)]
pub(crate) struct PublishArgs {
    /// File or folder
    path: PathBuf,
    #[command(flatten)]
    dir: DirArgs,
    /// Name of the product, for people
    #[arg(long)]
    title: String,
    /// Lowest price, in the currency's major unit
    #[arg(long, value_name = "DECIMAL")]
    price: String,
    /// ISO 4217 code
    #[arg(long)]
    currency: Currency,
    /// A rights holder's part of the price, in percent; may be repeated
    #[arg(long = "share", value_name = "NAME=PERCENT")]
    shares: Vec<String>,
    /// When the key is handed out and the payment captured: at-release or on-completion
    #[arg(long, default_value = "at-release")]
    policy: KeyPolicy,
    /// Bytes in a chunk: a power of two from 64KiB to 4MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    chunk_size: Option<u64>,
    /// How long a ticket is good before it is renewed, e.g. 7d, 12h, 90s
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    lease: Option<u64>,
    /// What seeders earn: millionths of the currency's minor unit per MiB
    #[arg(long, value_name = "MILLIONTHS")]
    rate: Option<u64>,
    /// Print nothing but the product id
    #[arg(long)]
    id_only: bool,
    /// Seeders that have not heard from the manager for longer than this and their clock grace (10 minutes unless set)
    /// refuse tickets, e.g. 1h [default: never]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    staleness: Option<u64>,
}

/// Whom an invitation is for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Role {
    /// Sells
    Merchant,
    /// Serves
    Seeder,
}

/// Flags of `invite`.
#[derive(Debug, Args)]
pub(crate) struct InviteArgs {
    /// Whom it is for
    role: Role,
    #[command(flatten)]
    dir: DirArgs,
    /// How many may use it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
}

/// Flags of commands about one transaction.
#[derive(Debug, Args)]
pub(crate) struct TransactionArgs {
    /// Transaction id
    transaction: protocol::TransactionId,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `product`.
#[derive(Debug, Args)]
pub(crate) struct ProductArgs {
    /// Product id
    product: protocol::ProductId,
    #[command(flatten)]
    dir: DirArgs,
}

/// What can be made void.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Revocable {
    /// One purchase
    Transaction,
    /// A merchant's enrolment
    Merchant,
    /// A seeder's enrolment
    Seeder,
    /// Content: seeders purge it
    Content,
}

/// Flags of `revoke`.
#[derive(Debug, Args)]
pub(crate) struct RevokeArgs {
    /// What kind of thing
    kind: Revocable,
    /// Transaction id, peer ID or product id
    id: String,
    /// Revoke a transaction that this manager does not know: one that a restore from a backup lost
    #[arg(long)]
    unknown: bool,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `takedown`.
#[derive(Debug, Args)]
pub(crate) struct TakedownArgs {
    /// Product id, content id or manifest digest
    id: String,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `evidence`.
#[derive(Debug, Args)]
pub(crate) struct EvidenceArgs {
    /// Transaction id
    transaction: protocol::TransactionId,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// With the manager's word that nothing had been acknowledged
    #[arg(long)]
    non_delivery: bool,
    /// By when nothing had been acknowledged, as times are shown (2026-11-25 07:21:08 UTC) or unix milliseconds [default: now]
    #[arg(long, value_name = "TIME", value_parser = output::parse_moment, requires = "non_delivery")]
    by: Option<u64>,
    #[command(flatten)]
    dir: DirArgs,
}

/// Whose money moved.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Party {
    /// A merchant paid what it owes
    MerchantDue,
    /// A merchant was paid what it earned
    MerchantEarned,
    /// A seeder was paid
    Seeder,
    /// A rights holder was paid
    RightsHolder,
}

/// Flags of `payment`.
#[derive(Debug, Args)]
pub(crate) struct PaymentArgs {
    /// Whose money moved
    account: Party,
    /// Peer ID, or a rights holder's name
    party: String,
    /// How much, in the currency's major unit
    amount: String,
    /// ISO 4217 code
    #[arg(long)]
    currency: Currency,
    /// Reference of the transfer; a second booking under one reference is refused
    #[arg(long)]
    reference: String,
    /// It was made before a restore: book it although what it was owed for may be lost, too
    #[arg(long)]
    again: bool,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `credit`.
#[derive(Debug, Args)]
pub(crate) struct CreditArgs {
    /// The merchant
    merchant: protocol::PeerId,
    /// ISO 4217 code
    #[arg(long)]
    currency: Currency,
    /// Change how much it may come to owe, in the currency's major unit; 0 for deposits only
    #[arg(long, value_name = "DECIMAL")]
    limit: Option<String>,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `archive`.
#[derive(Debug, Args)]
pub(crate) struct ArchiveArgs {
    /// Read all segments and check that every record is as it was written
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    dir: DirArgs,
}

impl DirArgs {
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| super::default_dir("manager"))
    }
}

/// Runs one command.
pub(crate) async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Init(args) => init(&args, global),
        Command::Run(args) => serve(args, global).await,
        Command::Publish(args) => publish(args, global).await,
        Command::Invite(args) => invite(&args, global).await,
        Command::Join(dir) => ask(&dir.path(), json!({"cmd": "join"}), global, |a| field(a, "join")).await,
        Command::Status(dir) => ask(&dir.path(), json!({"cmd": "status"}), global, page).await,
        Command::Products(dir) => goods::products(&dir, global).await,
        Command::Republish(args) => goods::republish(args, global).await,
        Command::Product(args) => {
            ask(&args.dir.path(), json!({"cmd": "product", "id": args.product}), global, goods::product).await
        }
        Command::Merchants(dir) => {
            let columns = &["peer", "name", "enrolled_at", "until", "revoked"];
            let text = |a: &Value| listed(a, "merchants", columns);
            daemon::ask_all(&dir.path(), json!({"cmd": "merchants"}), "merchants", global, text).await
        }
        Command::Seeders(dir) => {
            let columns = &["peer", "name", "origin", "here", "held", "free", "capacity", "revoked", "trouble"];
            let text = |a: &Value| listed(a, "seeders", columns);
            daemon::ask_all(&dir.path(), json!({"cmd": "seeders"}), "seeders", global, text).await
        }
        Command::Transactions(dir) => {
            let columns = &["id", "state", "title", "price", "client", "formed_at"];
            let text = |answer: &Value| {
                let unreadable = rows(answer, "transactions").iter().filter(|row| row.get("error").is_some());
                let unreadable = unreadable.map(|row| format!("\n{}: {}", field(row, "id"), field(row, "error")));
                listed(answer, "transactions", columns) + &unreadable.collect::<String>()
            };
            ask(&dir.path(), json!({"cmd": "transactions"}), global, text).await
        }
        Command::Transaction(args) => {
            let request = json!({"cmd": "transaction", "id": args.transaction});
            ask(&args.dir.path(), request, global, page).await
        }
        Command::Ledger(args) => books::ledger(&args, global).await,
        Command::Receipts(dir) => {
            let columns = &["at", "seeder", "transaction", "delivery", "chunks", "status", "reason"];
            ask(&dir.path(), json!({"cmd": "receipts"}), global, |a| listed(a, "receipts", columns)).await
        }
        Command::Revoke(args) => {
            let kind = match args.kind {
                Revocable::Transaction => "transaction",
                Revocable::Merchant => "merchant",
                Revocable::Seeder => "seeder",
                Revocable::Content => "content",
            };
            let request = json!({"cmd": "revoke", "kind": kind, "id": args.id, "unknown": args.unknown});
            let text = |a: &Value| format!("revoked; epoch {}{}", field(a, "epoch"), goods::taken(a));
            ask(&args.dir.path(), request, global, text).await
        }
        Command::Takedown(args) => {
            let request = json!({"cmd": "revoke", "kind": "content", "id": args.id});
            let text = |a: &Value| format!("taken down; epoch {}{}", field(a, "epoch"), goods::taken(a));
            ask(&args.dir.path(), request, global, text).await
        }
        Command::Statements(command) => books::statements(command, global).await,
        Command::Payouts(args) => books::payouts(&args, global).await,
        Command::Audit(command) => super::audit::run(command, global).await,
        Command::Keys(command) => super::keys::run(command, global).await,
        Command::Evidence(args) => {
            let request = json!({
                "cmd": "evidence", "id": args.transaction, "path": new_place(&args.output)?,
                "non_delivery": args.non_delivery, "by": args.by,
            });
            ask(&args.dir.path(), request, global, |a| format!("evidence in {}", field(a, "path"))).await
        }
        Command::Payment(args) => payment(args, global).await,
        Command::Credit(args) => {
            let limit = args.limit.as_ref().map(|text| Amount::parse(text, args.currency)).transpose()?;
            let limit = limit.map(|amount| amount.minor);
            let request = json!({
                "cmd": "credit", "merchant": args.merchant, "currency": args.currency, "limit_minor": limit,
            });
            ask(&args.dir.path(), request, global, books::credit_text).await
        }
        Command::Archive(args) => {
            ask(&args.dir.path(), json!({"cmd": "archive", "verify": args.verify}), global, page).await
        }
        Command::Backup(args) => backup::backup("manager", args, global).await,
        Command::Restore(args) => backup::manager(&args, global),
        Command::Restored(args) => {
            let number = manager_node::mark_restored(&args.dir.path(), args.above)?;
            let text = format!("restore number {number}; start the manager now\n{}", backup::BOOK_AGAIN);
            Answer::new(json!({"restore": number}), text).print(global.json)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Refund(args) => {
            let request = json!({"cmd": "refund", "id": args.transaction});
            ask(&args.dir.path(), request, global, |a| {
                format!("state: {}; the shop hears of it and gives the payment back by itself", field(a, "state"))
            })
            .await
        }
    }
}

fn init(args: &InitArgs, global: &Global) -> Result<ExitCode> {
    let dir = args.dir.path();
    let mut options = manager_node::InitOptions::default();
    if !args.listen.is_empty() {
        options.listen.clone_from(&args.listen);
    }
    options.external.clone_from(&args.external);
    let report = manager_node::init(&dir, options)?;
    config_edit::apply(&dir, &args.settings, manager_node::Config::load)?;
    let text = format!(
        "network {}\nmanager {}\n\nThe root key is in {}: copy it to a safe place, it can replace every other key.\nNext: willcall manager run --dir {}",
        report.network,
        report.peer,
        report.root_key.display(),
        dir.display()
    );
    let json = json!({"network": report.network, "peer": report.peer, "root": report.root, "dir": dir});
    Answer::new(json, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the manager, and beside it, as an ordinary seeder with a key of its own, the origin.
async fn serve(args: RunArgs, global: &Global) -> Result<ExitCode> {
    let dir = args.dir.unwrap_or_else(|| super::default_dir("manager"));
    let running = Box::pin(origin::start(&dir)).await?;
    let manager = running.manager();
    let facts = json!({"join": manager.join_line().to_string(), "origin": running.origin().peer_id()});
    daemon::announce("manager", manager.handle(), facts, global.json).await?;
    let waited = tokio::select! {
        waited = daemon::wait(manager.supervisor(), args.until_stdin_closes) => waited,
        reason = running.failed() => Err(anyhow::anyhow!("the node failed: {reason}")),
    };
    let stopped = running.stop(daemon::STOP_DEADLINE).await.context("stopping");
    daemon::ended(waited, stopped)
}

async fn publish(args: PublishArgs, global: &Global) -> Result<ExitCode> {
    let path = std::path::absolute(&args.path).with_context(|| format!("cannot read {}", args.path.display()))?;
    let request = json!({
        "cmd": "publish", "path": path, "title": args.title, "price": args.price, "currency": args.currency,
        "shares": args.shares, "policy": args.policy, "chunk_size": args.chunk_size, "lease_ms": args.lease,
        "rate": args.rate, "staleness_ms": args.staleness.unwrap_or(0),
    });
    let bar = progress::Bytes::new("publishing", global.json);
    let answer = node::control_call(&args.dir.path(), &request, |p| {
        let number = |name: &str| p.get(name).and_then(Value::as_u64).unwrap_or_default();
        bar.set(number("done"), number("total"));
    })
    .await;
    bar.finish();
    let answer = answer?;
    if args.id_only && !global.json {
        output::line(&field(&answer, "product"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let text = format!(
        "product {}\ncontent root {}\n{} files, {} -> {} of ciphertext in {} chunks",
        field(&answer, "product"),
        field(&answer, "root"),
        field(&answer, "files"),
        output::bytes(answer.get("plain_bytes").and_then(Value::as_u64).unwrap_or_default()),
        output::bytes(answer.get("content_bytes").and_then(Value::as_u64).unwrap_or_default()),
        field(&answer, "chunks")
    );
    Answer::new(answer, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

async fn payment(args: PaymentArgs, global: &Global) -> Result<ExitCode> {
    let amount = Amount::parse(&args.amount, args.currency)?;
    let account = match args.account {
        Party::MerchantDue => "merchant-due",
        Party::MerchantEarned => "merchant-earned",
        Party::Seeder => "seeder",
        Party::RightsHolder => "rights-holder",
    };
    let request = json!({
        "cmd": "record-payment", "account": account, "party": args.party, "minor": amount.minor,
        "currency": amount.currency, "reference": args.reference, "again": args.again,
    });
    ask(&args.dir.path(), request, global, page).await
}

async fn invite(args: &InviteArgs, global: &Global) -> Result<ExitCode> {
    let role = match args.role {
        Role::Merchant => "merchant",
        Role::Seeder => "seeder",
    };
    let request = json!({"cmd": "invite", "role": role, "uses": args.uses});
    ask(&args.dir.path(), request, global, |a| field(a, "join")).await
}
