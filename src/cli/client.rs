//! The client's commands: whoever receives needs one (`fetch`); the buyer's are in `shop`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use client_node::{
    AskError, DeliveryState, FetchOptions, FetchPhase, FetchProgress, FileState, Home, LimitChange, LinkOptions,
    Target, VerifyTarget,
};
use node::units::{parse_rate, parse_time};
use protocol::trust::JoinLine;
use protocol::{PeerAddrs, TransactionId};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::output::{self, Answer, field};
use super::{Global, parse_peer, progress, text_argument};

/// Where the client's key and library are.
#[derive(Debug, Args)]
pub(crate) struct HomeArgs {
    /// Folder of this client's key and library [default: the user's data folder]
    #[arg(long, env = "WILLCALL_HOME", value_name = "DIR")]
    home: Option<PathBuf>,
}

impl HomeArgs {
    fn dir(&self) -> Result<PathBuf> {
        Ok(match &self.home {
            Some(dir) => dir.clone(),
            None => Home::default_dir()?,
        })
    }

    /// Opens the home, for what makes no sense in one that is made for it.
    fn open_existing(&self) -> Result<Home> {
        let dir = self.dir()?;
        if !dir.join("key").exists() {
            bail!(
                "there is no home of a client at {}; name another with --home DIR, or make it: willcall id",
                dir.display()
            );
        }
        self.open()
    }

    /// Opens the home; at first use it is made.
    pub(crate) fn open(&self) -> Result<Home> {
        let dir = self.dir()?;
        let passphrase = passphrase(&dir)?;
        Ok(Home::open(&dir, passphrase.as_deref().map(String::as_str))?)
    }
}

/// Asks for the passphrase of a sealed key; there is none for others.
fn passphrase(dir: &Path) -> Result<Option<zeroize::Zeroizing<String>>> {
    passphrase_of(&dir.join("key"))
}

/// Asks for the passphrase of a key file, if it is sealed.
pub(crate) fn passphrase_of(key: &Path) -> Result<Option<zeroize::Zeroizing<String>>> {
    if !key.exists() || !node::key_is_sealed(key)? {
        return Ok(None);
    }
    if let Ok(passphrase) = std::env::var("WILLCALL_PASSPHRASE") {
        return Ok(Some(zeroize::Zeroizing::new(passphrase)));
    }
    let prompt = format!("Passphrase of {}: ", key.display());
    let typed = rpassword::prompt_password(prompt).context("cannot ask for the key's passphrase")?;
    Ok(Some(zeroize::Zeroizing::new(typed)))
}

/// Flags of `id`.
#[derive(Debug, Args)]
pub(crate) struct IdArgs {
    #[command(flatten)]
    home: HomeArgs,
}

/// Flags of `inbox`.
#[derive(Debug, Args)]
pub(crate) struct InboxArgs {
    /// Join line of the network, needed the first time: text, @FILE, or - for standard input
    #[arg(long, value_name = "LINE")]
    join: Option<String>,
    #[command(flatten)]
    home: HomeArgs,
}

/// Flags of `fetch`.
#[derive(Debug, Args)]
pub(crate) struct FetchArgs {
    /// Ticket file, `willcall:` line, - for a line on standard input, or a transaction id
    ticket: String,
    /// Folder that the goods are put into. Where an earlier delivery of them lies there, only what is missing or damaged is
    /// fetched, and all else there stays; what stands where a file of the product belongs and is another one is kept aside
    /// as NAME.kept-1
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    output: PathBuf,
    /// Fetch only these files, folders or patterns, besides what is there from earlier fetches; may be repeated
    #[arg(long, value_name = "PATH")]
    only: Vec<String>,
    /// Join line of the network, where a transaction id is given that this client has not seen
    #[arg(long, value_name = "LINE")]
    join: Option<String>,
    /// Most bytes a second, e.g. 5MB, or none; `willcall limit` changes it meanwhile [default: the home's config.toml]
    #[arg(long, value_name = "SIZE", value_parser = limit_of)]
    limit: Option<u64>,
    /// Give up when nothing new came for this long, e.g. 10m; time in which this machine slept does not count
    /// [default: 2m for seeders, 10m for a manager that is needed]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    patience: Option<u64>,
    /// A seeder to ask first, besides those that ticket and network name, as /ip4/…/tcp/…/p2p/PEER; may be repeated. One that
    /// is up is enough where the manager and the ticket's seeders are not
    #[arg(long, value_name = "ADDRESS", value_parser = parse_peer)]
    seeder: Vec<PeerAddrs>,
    /// Show progress on standard error with --json, too: a JSON object a line, or as text
    #[arg(long, value_name = "FORM", num_args = 0..=1, require_equals = true)]
    progress: Option<Option<ProgressForm>>,
    #[command(flatten)]
    home: HomeArgs,
}

/// A limit that a fetch can go by.
fn limit_of(text: &str) -> Result<u64, String> {
    client_node::check_rate(parse_rate(text)?)
}

/// For whom progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ProgressForm {
    /// For people
    Text,
    /// For programs
    Json,
}

/// Flags of `verify`.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// What `fetch` put in its place
    path: PathBuf,
    /// The purchase that it came from, where it was moved since
    #[arg(long, value_name = "ID")]
    transaction: Option<TransactionId>,
    #[command(flatten)]
    home: HomeArgs,
}

/// Flags of `limit`.
#[derive(Debug, Args)]
pub(crate) struct LimitArgs {
    /// The running fetch that is meant [default: all of this home]
    transaction: Option<TransactionId>,
    /// Bytes per second of the transfer, e.g. 5MB, or none
    #[arg(long, value_name = "SIZE", value_parser = limit_of)]
    download: Option<u64>,
    /// Bytes per second of all transfers of its process, e.g. 5MB, or none
    #[arg(long, value_name = "SIZE", value_parser = limit_of)]
    process: Option<u64>,
    #[command(flatten)]
    home: HomeArgs,
}

/// Flags of `status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    home: HomeArgs,
}

/// `willcall id`
pub(crate) fn id(args: &IdArgs, global: &Global) -> Result<ExitCode> {
    let home = args.home.open()?;
    let peer = home.peer_id();
    Answer::new(json!({"peer": peer, "home": home.dir().to_string_lossy()}), peer.to_string()).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn join_line(text: Option<&String>) -> Result<Option<JoinLine>> {
    text.map(|text| text_argument(text)?.parse().context("--join")).transpose()
}

/// `willcall inbox`
pub(crate) async fn inbox(args: InboxArgs, global: &Global) -> Result<ExitCode> {
    let (home, join) = (args.home.open()?, join_line(args.join.as_ref())?);
    let inbox = Box::pin(client_node::inbox(&home, join.as_ref(), &LinkOptions::default())).await?;
    let table = inbox
        .items
        .iter()
        .map(|i| {
            let (size, at) = (output::bytes(i.plain_bytes), output::time(i.released_at));
            vec![i.transaction.to_string(), i.title.clone(), i.state.as_str().to_owned(), size, at]
        })
        .collect();
    let mut text = output::table(&["transaction", "title", "state", "size", "released"], table);
    for (network, error) in &inbox.failed {
        text.push_str(&format!("\nnetwork {network}: {error}"));
    }
    let failed: Vec<Value> = inbox.failed.iter().map(|(n, e)| json!({"network": n, "error": e.to_string()})).collect();
    Answer::new(json!({"items": inbox.items, "failed": failed}), text).print(global.json)?;
    Ok(if inbox.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `willcall fetch`
pub(crate) async fn fetch(args: FetchArgs, global: &Global) -> Result<ExitCode> {
    let home = args.home.open()?;
    let target: Target = match args.ticket.as_str() {
        // A file is named, not piped in.
        "-" => match text_argument("-")?.parse()? {
            Target::File(_) => bail!(
                "what came on standard input is not a ticket; a ticket is a line that begins with willcall:, or a \
                 transaction id"
            ),
            target => target,
        },
        text => text.parse()?,
    };
    let mut options = FetchOptions {
        only: args.only,
        sources: args.seeder,
        join: join_line(args.join.as_ref())?,
        ..FetchOptions::default()
    };
    let settings = home.settings()?;
    let limit = args.limit.unwrap_or(settings.download_limit_per_transfer);
    options.limits.bytes_per_second = (limit > 0).then_some(limit);
    options.process_pace.rate().set(settings.download_limit);
    options.link.lan = settings.lan;
    if let Some(patience) = args.patience {
        options.limits.patience = Duration::from_millis(patience);
        options.manager_patience = Duration::from_millis(patience);
    }
    let (sender, seen) = watch::channel(FetchProgress::default());
    let cancel = CancellationToken::new();
    let form = match (args.progress, global.json) {
        (Some(Some(form)), _) => Some(form),
        (Some(None), true) => Some(ProgressForm::Json),
        (None, true) => None,
        (_, false) => Some(ProgressForm::Text),
    };
    let shown = tokio::spawn(show(seen, form));
    let work = client_node::fetch(&home, target, &args.output, options, sender, cancel.clone());
    let mut work = std::pin::pin!(work);
    let result = tokio::select! {
        result = &mut work => result,
        _ = node::wait_for_stop() => {
            // What is here is made durable, and acknowledged, before the end.
            cancel.cancel();
            work.await
        }
    };
    shown.await.context("the progress display failed")?;
    let outcome = match result {
        Ok(outcome) => outcome,
        Err(error) if global.json => {
            let cause = error.cause();
            let mut said = json!({"ok": false, "error": {"message": error.to_string(), "cause": cause}});
            if let (false, Some(told)) = (error.sources().is_empty(), said.get_mut("error")) {
                told["sources"] = json!(error.sources());
            }
            output::line(&said.to_string())?;
            output::note(&format!("willcall: {error}"));
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error.into()),
    };
    let mut json = serde_json::to_value(&outcome)?;
    let rate = mib_per_s(outcome.bytes, outcome.transfer_ms);
    if let Some(object) = json.as_object_mut() {
        object.insert("ok".into(), Value::Bool(true));
        object.insert("seconds".into(), json!(seconds(outcome.transfer_ms)));
        object.insert("mib_per_s".into(), json!(rate));
    }
    let mut text = if outcome.already_here {
        format!("{} is here already, and sound", outcome.path.display())
    } else {
        format!(
            "{}\n{} files, {} ({} of ciphertext in {} s, {rate} MiB/s, seeders: {}{})",
            outcome.path.display(),
            outcome.files,
            output::bytes(outcome.plain_bytes),
            output::bytes(outcome.bytes),
            seconds(outcome.transfer_ms),
            outcome.sources.iter().filter(|s| s.chunks > 0).count(),
            match outcome.resumed_from {
                0 => String::new(),
                before => format!("; {} were here before", output::bytes(before)),
            }
        )
    };
    for kept in &outcome.kept_aside {
        text.push_str(&format!("\nkept aside, because it is not what was sold: {}", kept.display()));
    }
    Answer::new(json, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds as seconds with three decimals.
#[expect(clippy::cast_precision_loss, reason = "for display: durations are far below 2^52 ms")]
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "for display")]
fn mib_per_s(bytes: u64, ms: u64) -> f64 {
    let rate = bytes as f64 / f64::from(1 << 20) / seconds(ms.max(1));
    (rate * 10.0).round() / 10.0
}

/// A fetch whose goods are in their place ends so soon unless a seeder is away.
const SOON: Duration = Duration::from_secs(1);

/// Shows progress until the fetch ends. People are told once why nothing moves, each time the reason changes; programs hear
/// of each new time at which something is tried, too, and when it moves again.
async fn show(mut seen: watch::Receiver<FetchProgress>, form: Option<ProgressForm>) {
    let (text, json) = (form == Some(ProgressForm::Text), form == Some(ProgressForm::Json));
    let mut bar = progress::Bytes::new("fetching", !text);
    let (mut stage, mut said, mut said_next, mut told) = ("fetching", String::new(), None, None);
    let mut stood_at = None;
    while seen.changed().await.is_ok() {
        let now = seen.borrow_and_update().clone();
        if now.phase == FetchPhase::Done {
            bar.finish();
            let over = async { while seen.changed().await.is_ok() {} };
            if tokio::time::timeout(SOON, over).await.is_err() && text {
                output::note("the goods are in their place; seeders are being told, which may be broken off");
            }
            return;
        }
        let (doing, done, total) = match now.phase {
            FetchPhase::Checking => ("checking", now.transfer.have_bytes, now.transfer.total_bytes),
            FetchPhase::Unpacking => ("unpacking", now.unpacked_bytes, now.plain_bytes),
            _ => ("fetching", now.transfer.have_bytes, now.transfer.total_bytes),
        };
        if doing != std::mem::replace(&mut stage, doing) {
            bar.finish();
            bar = progress::Bytes::new(doing, !text);
        }
        let own = if stage == "fetching" { now.transfer.new_bytes.min(done) } else { done };
        bar.set_after(own, done, total);
        if json && total > 0 {
            let step = (now.phase, progress::tenths(done, total));
            if told != Some(step) {
                told = Some(step);
                let rate = match now.transfer.bytes_per_second {
                    0 if done >= total => bar.mean(own),
                    rate => rate,
                };
                output::note(&progress_line(&now, (done, total), rate).to_string());
            }
        }
        let (why, next, data) = match (&now.waiting, &now.transfer.stalled) {
            (Some(waiting), _) => (waiting.detail.clone(), Some(waiting.next_try), object(waiting)),
            (None, Some(stall)) => (stall.cause.to_string(), stall.next_try, object(stall)),
            (None, None) => (String::new(), None, Value::Null),
        };
        // That one thing is waited for no longer does not mean that anything moves: another may be waited for next.
        let came = Some((now.transfer.new_bytes, now.unpacked_bytes));
        if why.is_empty() && came == stood_at {
            continue;
        }
        stood_at = came;
        // Without a time it is the end, which the answer tells.
        if json && (why != said || next.is_some() && next != said_next) {
            output::note(&json!({"stalled": data, "clock": now.transfer.clock}).to_string());
            (said, said_next) = (why, next);
        } else if text && !why.is_empty() && why != said {
            bar.say(&format!("not moving: {why}"));
            said = why;
        }
    }
    bar.finish();
}

/// The same for programs. A path in it may be no text.
fn object(why: &impl serde::Serialize) -> Value {
    serde_json::to_value(why).unwrap_or_else(|error| json!({"cause": "unnamed", "detail": error.to_string()}))
}

/// How far it is, for programs.
fn progress_line(now: &FetchProgress, (done, total): (u64, u64), rate: u64) -> Value {
    json!({"progress": {
        "phase": now.phase,
        "bytes": done,
        "total_bytes": total,
        "percent": progress::tenths(done, total) * 10,
        "bytes_per_second": rate,
        "seeders": now.transfer.active,
    }})
}

/// `willcall verify`
pub(crate) async fn verify(args: VerifyArgs, global: &Global) -> Result<ExitCode> {
    let home = args.home.open()?;
    let target = match args.transaction {
        Some(transaction) => VerifyTarget::Moved(transaction, args.path),
        None => VerifyTarget::Path(args.path),
    };
    let bar = progress::Bytes::new("verifying", global.json);
    let report = client_node::verify(&home, target, move |done, total| {
        bar.set(done, total);
        if done == total {
            bar.finish();
        }
    })
    .await?;
    let mut lines: Vec<String> = report
        .files
        .iter()
        .filter_map(|file| match &file.state {
            FileState::Ok | FileState::NotFetched => None,
            FileState::Damaged(why) => Some(format!("damaged: {} ({why})", file.path.escape_debug())),
            FileState::Missing => Some(format!("missing: {}", file.path.escape_debug())),
        })
        .chain(report.extra.iter().map(|path| format!("not sold: {}", path.escape_debug())))
        .collect();
    let sound = report.count(|state| *state == FileState::Ok);
    lines.push(format!("{sound} files and folders are as they were sold ({} checked)", output::bytes(report.bytes)));
    let mut json = serde_json::to_value(&report)?;
    if let Some(object) = json.as_object_mut() {
        object.insert("ok".into(), json!(report.is_good()));
    }
    Answer::new(json, lines.join("\n")).print(global.json)?;
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `willcall limit`
pub(crate) async fn limit(args: &LimitArgs, global: &Global) -> Result<ExitCode> {
    let home = args.home.open_existing()?;
    let change = LimitChange { process: args.process, transfer: args.download };
    let meant = match args.transaction {
        Some(transaction) => vec![transaction],
        None => client_node::status(&home).await?.into_iter().map(|delivery| delivery.transaction).collect(),
    };
    let (mut fetches, mut silent) = (Vec::new(), Vec::new());
    for transaction in meant {
        match client_node::limit(&home, transaction, change).await {
            Ok(limits) => fetches.push((transaction, limits)),
            Err(AskError::NotRunning(_)) if args.transaction.is_none() => {}
            // The others are told all the same.
            Err(error @ AskError::Silent(_)) if args.transaction.is_none() => silent.push((transaction, error)),
            Err(error) => return Err(error.into()),
        }
    }
    if fetches.is_empty() && silent.is_empty() && change != LimitChange::default() {
        bail!(
            "nothing is being fetched at the moment, so nothing was changed; limits for the next time are fetch --limit \
             and the home's config.toml"
        );
    }
    let rate = |rate| if rate == 0 { "none".to_owned() } else { format!("{}/s", output::bytes(rate)) };
    let table =
        fetches.iter().map(|(id, limits)| vec![id.to_string(), rate(limits.transfer), rate(limits.process)]).collect();
    let mut text = match fetches.is_empty() {
        true if silent.is_empty() => "nothing is being fetched at the moment".to_owned(),
        _ => output::table(&["transaction", "transfer", "process"], table),
    };
    for (_, error) in &silent {
        text.push_str(&format!("\n{error}"));
    }
    let listed: Vec<Value> = fetches
        .iter()
        .map(|(id, limits)| json!({"transaction": id, "transfer": limits.transfer, "process": limits.process}))
        .collect();
    let unheard: Vec<TransactionId> = silent.iter().map(|(id, _)| *id).collect();
    Answer::new(json!({"fetches": listed, "silent": unheard}), text).print(global.json)?;
    Ok(if silent.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A running fetch in a line: how far, and why not further.
fn moving(progress: &Value) -> String {
    if let Some(silent) = progress.get("silent").and_then(Value::as_str) {
        return silent.to_owned();
    }
    let transfer = progress.get("transfer").unwrap_or(&Value::Null);
    let number = |name: &str| transfer.get(name).and_then(Value::as_u64).unwrap_or(0);
    let mut text = format!(
        "{}, {} of {}, {}/s",
        field(progress, "phase"),
        output::bytes(number("have_bytes")),
        output::bytes(number("total_bytes")),
        output::bytes(number("bytes_per_second"))
    );
    let stalled = progress.get("waiting").filter(|waiting| !waiting.is_null());
    if let Some(stall) = stalled.or_else(|| transfer.get("stalled").filter(|stall| !stall.is_null())) {
        text.push_str(&format!("; not moving: {}", field(stall, "cause")));
        if let Some(at) = stall.get("next_try").and_then(Value::as_u64) {
            text.push_str(&format!(", tried again at {}", output::time(at)));
        }
    }
    text
}

/// `willcall status`
pub(crate) async fn status(args: &StatusArgs, global: &Global) -> Result<ExitCode> {
    let home = args.home.open_existing()?;
    let mut deliveries = client_node::status(&home).await?;
    let mut running = serde_json::Map::new();
    // Also those that are done: they may be fetched once more.
    for delivery in &mut deliveries {
        let progress = match client_node::progress_of(&home, delivery.transaction).await {
            Err(AskError::Silent(_)) => Some(json!({"silent": "its process does not answer; it may be stopped"})),
            progress => progress?,
        };
        if let Some(progress) = progress {
            let number = |name: &str| progress.get("transfer")?.get(name)?.as_u64();
            if let (Some(have), Some(total @ 1..)) = (number("have_bytes"), number("total_bytes"))
                && delivery.state != DeliveryState::Done
            {
                (delivery.have_bytes, delivery.total_bytes) = (have, total);
            }
            running.insert(delivery.transaction.to_string(), progress);
        }
    }
    let json = json!({"peer": home.peer_id(), "deliveries": deliveries, "running": running});
    let rows = json.get("deliveries").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut text = format!("client {}\n", home.peer_id());
    let table = rows
        .iter()
        .map(|d| vec![field(d, "transaction"), field(d, "title"), field(d, "state"), field(d, "path")])
        .collect();
    text.push_str(&output::table(&["transaction", "title", "state", "path"], table));
    for (delivery, row) in deliveries.iter().zip(&rows) {
        if let Some(now) = running.get(&delivery.transaction.to_string()) {
            text.push_str(&format!("\n{}: {}", field(row, "transaction"), moving(now)));
        } else if let Some(trouble) = &delivery.trouble {
            text.push_str(&format!("\n{}: {} ({})", field(row, "transaction"), trouble.detail, trouble.cause));
        }
    }
    Answer::new(json, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}
