//! The command line: flags to plain data, one function a command, one line for an error. Libraries never see clap.

mod audit;
mod backup;
mod books;
mod client;
mod config_edit;
mod daemon;
mod device;
mod evidence;
mod facts;
mod goods;
mod key_files;
mod keys;
mod logs;
mod manager;
mod merchant;
mod new_file;
pub(crate) mod output;
mod progress;
mod scenario;
mod seeder;
mod shop;
mod testnet;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use protocol::{Address, PeerAddrs, PeerId};
use serde_json::json;

use crate::demo;

/// Peer-to-peer delivery of paid-for digital goods
///
/// A merchant sells; a manager turns the sale into a ticket for one client's peer ID; seeders deliver encrypted, verified
/// chunks to that client alone. Try `willcall demo` first.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Print one JSON object on standard output instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Log level or filter: error, warn, info, debug, or e.g. willcall_seeder=debug
    #[arg(long, global = true, env = "WILLCALL_LOG", value_name = "FILTER")]
    log: Option<String>,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    log_format: logs::LogFormat,
    /// Write the log to the end of this file instead of standard error
    #[arg(long, global = true, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A whole sale on this machine: every node a process of its own, all twelve steps, all checks
    Demo(demo::DemoArgs),
    /// A local network to play with
    #[command(subcommand)]
    Testnet(testnet::Command),
    /// The content manager: catalogue, tickets, receipts, ledger
    #[command(subcommand)]
    Manager(manager::Command),
    /// The merchant: the shop's HTTP API, vouchers, orders
    #[command(subcommand)]
    Merchant(merchant::Command),
    /// A seeder: stores ciphertext, serves ticket holders
    #[command(subcommand)]
    Seeder(seeder::Command),
    /// Show this client's peer ID (made at first use): what a buyer designates
    Id(client::IdArgs),
    /// Buy a product at a merchant, for this client or for another
    Buy(shop::BuyArgs),
    /// List the products of a merchant
    Products(shop::ProductsArgs),
    /// List the tickets that wait for this client at the manager
    Inbox(client::InboxArgs),
    /// Fetch what a ticket stands for; goes on where an earlier fetch stopped
    Fetch(client::FetchArgs),
    /// Show or change how fast running fetches take what comes
    Limit(client::LimitArgs),
    /// Check delivered files against what was sold
    Verify(client::VerifyArgs),
    /// Show this client's deliveries
    Status(client::StatusArgs),
    /// Take purchases along to a new device
    #[command(subcommand)]
    Device(device::Command),
    /// Put what this client can prove of a purchase into a file
    Evidence(evidence::ClientArgs),
    /// Check a file of evidence with nothing but the network's root key
    VerifyEvidence(evidence::VerifyArgs),
    /// Check a seeder's statements of account with nothing but the network's root key
    VerifyStatement(evidence::VerifyStatementArgs),
}

/// Parses the flags, runs the command and reports how it went.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Tools read an object here, too. Help and version are no errors, and not for tools.
            if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
                let text = error.to_string();
                // The first paragraph says what is wrong; usage and hints come after it.
                let what = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
                let message = what.split_whitespace().collect::<Vec<_>>().join(" ");
                let _ = output::line(&json!({"ok": false, "error": {"message": message}}).to_string());
            }
            error.exit()
        }
    };
    let json = cli.global.json;
    if let Err(error) = all_text() {
        report(&error, json);
        return ExitCode::FAILURE;
    }
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            report(&error, json);
            ExitCode::FAILURE
        }
    }
}

/// Paths end up in answers, configuration files and the database, all of which are text.
fn all_text() -> Result<()> {
    for argument in std::env::args_os() {
        if argument.to_str().is_none() {
            anyhow::bail!("{} is not UTF-8; name files and folders in UTF-8 here", argument.to_string_lossy());
        }
    }
    Ok(())
}

/// One line: what failed, then its causes. With `--json` the same as an object on standard output.
fn report(error: &anyhow::Error, json: bool) {
    // Errors of libraries often repeat their cause in their own text: say each thing once.
    let mut message = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if !message.contains(&text) {
            if !message.is_empty() {
                message.push_str(": ");
            }
            message.push_str(&text);
        }
    }
    let message = message.replace('\n', " ");
    if json {
        // Should standard output be gone, the exit code still tells.
        let _ = output::line(&json!({"ok": false, "error": {"message": message}}).to_string());
    }
    output::note(&format!("willcall: {message}"));
}

fn run(cli: Cli) -> Result<ExitCode> {
    let default = match &cli.command {
        Command::Manager(manager::Command::Run(_))
        | Command::Merchant(merchant::Command::Run(_))
        | Command::Seeder(seeder::Command::Run(_)) => "info",
        _ => "error",
    };
    logs::start(cli.global.log.as_deref(), cli.global.log_format, cli.global.log_file.as_deref(), default)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    let global = &cli.global;
    let result = runtime.block_on(async {
        match cli.command {
            Command::Demo(args) => Box::pin(demo::run(args, global.json)).await,
            Command::Testnet(command) => Box::pin(testnet::run(command, global)).await,
            Command::Manager(command) => Box::pin(manager::run(command, global)).await,
            Command::Merchant(command) => Box::pin(merchant::run(command, global)).await,
            Command::Seeder(command) => Box::pin(seeder::run(command, global)).await,
            Command::Id(args) => client::id(&args, global),
            Command::Buy(args) => Box::pin(shop::buy(args, global)).await,
            Command::Products(args) => Box::pin(shop::products(args, global)).await,
            Command::Inbox(args) => Box::pin(client::inbox(args, global)).await,
            Command::Fetch(args) => Box::pin(client::fetch(args, global)).await,
            Command::Limit(args) => client::limit(&args, global).await,
            Command::Verify(args) => Box::pin(client::verify(args, global)).await,
            Command::Status(args) => client::status(&args, global).await,
            Command::Device(command) => device::run(command, global).await,
            Command::Evidence(args) => evidence::client(args, global).await,
            Command::VerifyEvidence(args) => evidence::verify(&args, global),
            Command::VerifyStatement(args) => evidence::verify_statement(&args, global),
        }
    });
    // What still blocks (a read of a hung disk) must not keep a finished command from ending.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    result
}

/// The default folder of a role: beside the user's other application data.
pub(crate) fn default_dir(role: &str) -> PathBuf {
    match std::env::var_os("WILLCALL_DIR") {
        Some(dir) => PathBuf::from(dir).join(role),
        // Without a home folder of the user, the folder where one is.
        None => client_node::Home::default_dir()
            .map_or_else(|_| PathBuf::from("willcall").join(role), |client| client.with_file_name(role)),
    }
}

/// Reads a line of text given as itself, as `@FILE`, or as `-` for standard input.
pub(crate) fn text_argument(text: &str) -> Result<String> {
    use std::io::Read;
    const LIMIT: u64 = 256 * 1024;
    let mut out = String::new();
    match text.strip_prefix('@') {
        Some(path) => {
            let file = std::fs::File::open(path).with_context(|| format!("cannot read {path}"))?;
            file.take(LIMIT).read_to_string(&mut out).with_context(|| format!("cannot read {path}"))?;
        }
        None if text == "-" => {
            std::io::stdin().take(LIMIT).read_to_string(&mut out).context("cannot read standard input")?;
        }
        None => out.push_str(text),
    }
    Ok(out.trim().to_owned())
}

/// `/ip4/…/tcp/…/p2p/12D3…`
pub(crate) fn parse_peer(text: &str) -> Result<PeerAddrs> {
    let (address, peer) = text
        .rsplit_once("/p2p/")
        .with_context(|| format!("'{text}': an address that ends in /p2p/ and a peer ID is expected"))?;
    let (address, peer): (Address, PeerId) = (address.parse()?, peer.parse()?);
    Ok(PeerAddrs::new(peer, vec![address]))
}
