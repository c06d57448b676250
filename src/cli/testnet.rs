//! `willcall testnet …`: a local network to play with, and peers that try to cheat it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use node::StopSignals;
use protocol::ticket::TicketEnvelope;

use serde_json::json;
use testnet::adversary::{self, Outcome, Tampering};

use super::client::HomeArgs;
use super::output::{self, Answer, field};
use super::scenario::{self, ScenarioArgs};
use super::{Global, parse_peer, text_argument};
use crate::local::{Narrator, Network, album};

/// Commands of the testnet.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a manager, a merchant and seeders on this machine, with something to buy; Ctrl-C stops all of it
    Up(UpArgs),
    /// Play a disturbance or an attack over a network in this process and report how it went; fails where something did
    /// not hold
    Scenario(ScenarioArgs),
    /// Present a ticket to one seeder and say what comes back; with --tamper, a ticket that was tampered with
    Present(PresentArgs),
}

/// Flags of `up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// File or folder to sell [default: an album made on the spot]
    path: Option<PathBuf>,
    /// How many seeders, besides the manager's origin
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=32))]
    seeders: u16,
    /// Folder for everything, kept afterwards [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// What is done to a ticket.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Tamper {
    /// Nothing
    None,
    /// Leave the merchant's endorsement out
    NoEndorsement,
    /// Change the lease and keep the manager's signature
    ForgedLease,
}

/// Flags of `present`.
#[derive(Debug, Args)]
pub(crate) struct PresentArgs {
    /// Ticket: a file, a line of text, or - for standard input
    ticket: String,
    /// The seeder: /ip4/…/tcp/…/p2p/12D3…
    #[arg(long, value_name = "MULTIADDR")]
    to: String,
    /// What is done to the ticket first
    #[arg(long, value_enum, default_value_t = Tamper::None)]
    tamper: Tamper,
    #[command(flatten)]
    home: HomeArgs,
}

/// Runs one command.
pub(crate) async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Up(args) => up(args, global).await,
        Command::Scenario(args) => Box::pin(scenario::run(args, global)).await,
        Command::Present(args) => present(&args, global).await,
    }
}

async fn up(args: UpArgs, global: &Global) -> Result<ExitCode> {
    // Before anything is made that a signal would leave behind.
    let mut stop = StopSignals::install().context("cannot wait for signals")?;
    let temporary = match &args.keep {
        Some(_) => None,
        None => Some(
            tempfile::Builder::new().prefix("willcall-testnet-").tempdir().context("cannot make a temporary folder")?,
        ),
    };
    let dir = match (&args.keep, &temporary) {
        (Some(keep), _) => {
            std::fs::create_dir_all(keep).with_context(|| format!("cannot make {}", keep.display()))?;
            std::fs::canonicalize(keep)?
        }
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => bail!("no folder to work in"),
    };
    if std::fs::read_dir(&dir)?.next().is_some() {
        bail!("{} is not empty; name an empty or absent folder for --keep", dir.display());
    }
    let goods = match &args.path {
        Some(path) => std::fs::canonicalize(path).with_context(|| format!("cannot read {}", path.display()))?,
        None => album(&dir).context("cannot write the sample album")?,
    };
    let mut network = Network::new(&dir, Narrator::new(global.json))?;
    let result = tokio::select! {
        result = Box::pin(set_up(&mut network, &goods, args.seeders, global)) => Some(result),
        _ = stop.wait() => None,
    };
    let result = match result {
        Some(Ok(())) => {
            loop {
                let ended = tokio::select! {
                    _ = stop.wait() => break,
                    ended = network.next_end() => ended,
                };
                // The rest goes on: what a network does without one of its nodes is worth a look, too.
                output::note(&ended);
            }
            Ok(())
        }
        Some(Err(error)) => Err(error),
        None => Ok(()),
    };
    network.narrator().say("\nStopping every process");
    let casualties = network.casualties();
    let stopped = network.stop().await;
    result.with_context(|| format!("testnet{casualties}")).and(stopped).map(|()| ExitCode::SUCCESS)
}

async fn set_up(network: &mut Network, goods: &std::path::Path, seeders: u16, global: &Global) -> Result<()> {
    network.check_space(goods, seeders)?;
    network.start_manager(seeders).await?;
    network.start_merchant().await?;
    for number in 1..=seeders {
        network.start_seeder(number).await?;
    }
    let product = network.publish(goods, "Testnet goods", "9.99", &[]).await?;
    network.wait_for_copies(&product, usize::from(seeders) + 1).await?;
    let (voucher, shop) = (network.voucher().await?, network.shop()?);
    let (manager, home) = (network.workshop().folder("manager"), network.workshop().folder("client"));
    let id = field(&product, "id");
    let buy =
        format!("willcall buy {id} --merchant {shop} --voucher {voucher} --home '{}' -o goods.ticket", home.display());
    let fetch = format!("willcall fetch goods.ticket --home '{}' -o goods", home.display());
    if global.json {
        let facts = json!({
            "ready": true, "dir": network.workshop().folder(""), "product": product, "merchant": shop, "voucher": voucher,
            "buy": buy, "fetch": fetch,
        });
        return output::line(&facts.to_string());
    }
    network.narrator().say(&format!(
        "\nReady. The shop is at {shop}; logs are in {}.\n\nBuy and fetch:\n  {buy}\n  {fetch}\n\nLook around:\n  \
         willcall manager status --dir '{}'\n  willcall manager ledger --dir '{}'\n\nCtrl-C stops all of it.",
        network.workshop().folder("logs").display(),
        manager.display(),
        manager.display(),
    ));
    Ok(())
}

async fn present(args: &PresentArgs, global: &Global) -> Result<ExitCode> {
    let envelope = read_ticket(&args.ticket)?;
    let home = args.home.open()?;
    let seeder = parse_peer(&args.to)?;
    let tampering = match args.tamper {
        Tamper::None => Tampering::None,
        Tamper::NoEndorsement => Tampering::NoEndorsement,
        Tamper::ForgedLease => Tampering::ForgedLease,
    };
    let (json, text) = match Box::pin(adversary::present(home.keypair(), &envelope, tampering, &seeder)).await? {
        Outcome::Refused(refusal) => (
            json!({"refused": true, "code": refusal.code, "detail": refusal.detail, "bytes": 0}),
            format!("refused: {refusal}"),
        ),
        Outcome::Served { bytes } => {
            (json!({"refused": false, "code": null, "bytes": bytes}), format!("served: {bytes} bytes came"))
        }
        Outcome::ShutOut { window } => (
            json!({"refused": false, "code": null, "bytes": 0, "window_used_up": window}),
            format!("taken, and nothing is sent: {window} chunks sent before were never acknowledged"),
        ),
    };
    Answer::new(json, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// A ticket from a file, a `willcall:` line, or standard input.
pub(crate) fn read_ticket(text: &str) -> Result<TicketEnvelope> {
    if text == "-" || text.starts_with("willcall:") {
        return text_argument(text)?.parse().context("the ticket");
    }
    let read = client_node::read_ticket_file(text.as_ref());
    let bytes = read.with_context(|| format!("cannot read the ticket file {text}"))?;
    TicketEnvelope::from_file_bytes(&bytes).with_context(|| text.to_owned())
}
