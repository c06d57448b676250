//! `willcall seeder …`: sets up and runs a seeder, and talks to a running one.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use node::units::{parse_rate, parse_size, parse_time};
use protocol::Address;
use protocol::trust::JoinLine;
use serde_json::json;

use super::daemon::{self, RunArgs, ask};
use super::facts::{listed, page};
use super::output::{self, Answer};
use super::{Global, config_edit, new_file};

/// Commands of the seeder.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Set up a seeder from an invitation
    Init(InitArgs),
    /// Run the seeder
    Run(RunArgs),
    /// Show how the seeder is: what it holds, serves, earned, and what is wrong
    Status(DirArgs),
    /// List the newest receipts and how far they got, or ask what became of one
    Receipts(ReceiptsArgs),
    /// List the manager's statements of account, new ones first, or write them into a file that proves itself
    Statements(StatementsArgs),
    /// Show the limits on what is sent, or change them while the seeder runs
    Limit(LimitArgs),
    /// Leave in order: finish what runs, take nobody new, hand copies over, bring receipts home, stop
    Drain(DrainArgs),
    /// Show the contents that this seeder has nothing to do with, or change them while it runs
    Deny(DenyArgs),
    /// Show what the manager's audit log was, by its signed heartbeats, for `willcall manager audit verify --heads`
    Heads(HeadsArgs),
    /// Have the manager try whether others can reach this seeder, and say what to do
    Check(DirArgs),
    /// Read everything that is stored and check it; damaged files are written anew, damaged chunks reported to the manager,
    /// which orders them from other seeders, and the exit code is 1
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

/// Flags of `receipts`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ReceiptsArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// How many, 1000 at most
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000))]
    limit: u64,
    #[command(subcommand)]
    command: Option<ReceiptsCommand>,
}

/// Commands about one receipt.
#[derive(Debug, Subcommand)]
pub(crate) enum ReceiptsCommand {
    /// Ask the manager what became of a receipt, and why
    Explain(ExplainArgs),
}

/// Flags of `receipts explain`.
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// Receipt id, from `willcall seeder receipts`
    id: protocol::Digest,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `statements`.
#[derive(Debug, Args)]
pub(crate) struct StatementsArgs {
    /// Write all of them to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// With -o: from this number on
    #[arg(long, value_name = "NUMBER", requires = "output")]
    first: Option<u64>,
    /// With -o: those that were put aside when the manager came back from a backup, by its restore number
    #[arg(long, value_name = "RESTORE", requires = "output")]
    superseded: Option<u64>,
    #[command(flatten)]
    dir: DirArgs,
}

fn upload_of(text: &str) -> Result<u64, String> {
    seeder::check_upload(parse_rate(text)?)
}

/// Flags of `limit`.
#[derive(Debug, Args)]
pub(crate) struct LimitArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// Bytes per second that all deliveries together send at most, e.g. 5MB, or none
    #[arg(long, value_name = "SIZE", value_parser = upload_of)]
    upload: Option<u64>,
    /// Bytes per second that each delivery sends at most, e.g. 500kB, or none
    #[arg(long, value_name = "SIZE", value_parser = upload_of)]
    upload_per_delivery: Option<u64>,
}

/// Flags of `drain`.
#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// Stop after this time whatever is left, e.g. 2h
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    patience: Option<u64>,
    /// Stay after all
    #[arg(long, conflicts_with = "patience")]
    cancel: bool,
}

/// Flags of `deny`.
#[derive(Debug, Args)]
pub(crate) struct DenyArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// Serve and store this content no more: a content id or manifest digest from `willcall seeder status --json`
    #[arg(long, value_name = "ID")]
    add: Option<String>,
    /// Take this content off the list
    #[arg(long, value_name = "ID", conflicts_with = "add")]
    remove: Option<String>,
}

/// Flags of `heads`.
#[derive(Debug, Args)]
pub(crate) struct HeadsArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// Write them into this file, one JSON object a line
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl DirArgs {
    fn path(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| super::default_dir("seeder"))
    }
}

/// The exit code of a drain that ended before everything was done: what it kept may have been the last copies.
const UNFINISHED: u8 = 3;

/// Runs one command.
pub(crate) async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Init(args) => init(args, global),
        Command::Run(args) => serve(args, global).await,
        Command::Status(dir) => ask(&dir.path(), json!({"cmd": "status"}), global, page).await,
        Command::Receipts(ReceiptsArgs { command: Some(ReceiptsCommand::Explain(args)), .. }) => {
            let request = json!({"cmd": "explain", "id": args.id});
            ask(&args.dir.path(), request, global, |a| output::field(a, "summary")).await
        }
        Command::Receipts(ReceiptsArgs { dir, limit, command: None }) => {
            let columns = &["id", "transaction", "chunks", "state", "at"];
            let text = |answer: &serde_json::Value| {
                let shown = output::rows(answer, "receipts").len() as u64;
                let total = answer.get("total").and_then(serde_json::Value::as_u64);
                let more = total.filter(|total| *total > shown);
                let more = more.map(|total| format!("\nthe newest {shown} of {total}; --limit shows more of them"));
                listed(answer, "receipts", columns) + &more.unwrap_or_default()
            };
            ask(&dir.path(), json!({"cmd": "receipts", "limit": limit}), global, text).await
        }
        Command::Statements(args) => statements(args, global).await,
        Command::Limit(args) => {
            let request =
                json!({"cmd": "limit", "upload": args.upload, "upload_per_delivery": args.upload_per_delivery});
            ask(&args.dir.path(), request, global, rates).await
        }
        Command::Drain(args) => {
            let request = json!({"cmd": "drain", "patience_ms": args.patience, "cancel": args.cancel});
            let silent = global.json;
            let answer = node::control_call(&args.dir.path(), &request, |mut facts| {
                if !silent {
                    // One line; `waits_for` has the first of them.
                    if let Some(facts) = facts.as_object_mut() {
                        facts.remove("kept");
                    }
                    let told = page(&facts).replace('\n', ", ");
                    output::note(&format!("left to do: {told}"));
                }
            })
            .await?;
            let text = page(&answer);
            let unfinished = answer.get("complete").and_then(serde_json::Value::as_bool) == Some(false);
            Answer::new(answer, text).print(global.json)?;
            Ok(if unfinished { ExitCode::from(UNFINISHED) } else { ExitCode::SUCCESS })
        }
        Command::Deny(args) => {
            let request = json!({"cmd": "deny", "add": args.add, "remove": args.remove});
            ask(&args.dir.path(), request, global, page).await
        }
        Command::Heads(args) => heads(args, global).await,
        Command::Check(dir) => {
            let answer = daemon::call(&dir.path(), json!({"cmd": "check"})).await?;
            let reachable = answer.get("reachable").and_then(serde_json::Value::as_bool) == Some(true);
            // Without the manager it is a check of less than was asked for.
            let tried = answer.get("manager_away").is_none_or(serde_json::Value::is_null);
            let text = findings(&answer);
            Answer::new(answer, text).print(global.json)?;
            Ok(if reachable && tried { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Scrub(dir) => {
            let answer = daemon::call(&dir.path(), json!({"cmd": "scrub"})).await?;
            let contents = answer.get("contents").and_then(serde_json::Value::as_array);
            let good = contents.into_iter().flatten().all(|content| {
                let number = |name: &str| content.get(name).and_then(serde_json::Value::as_u64);
                let files = content.get("damaged_files").and_then(serde_json::Value::as_str);
                number("damaged_chunks") == Some(0)
                    && files.is_none_or(str::is_empty)
                    && output::field(content, "state") != "broken off"
            });
            let columns = &["manifest", "checked", "damaged_chunks", "damaged", "damaged_files", "state"];
            let text = format!("{}\n{}", listed(&answer, "contents", columns), output::field(&answer, "says"));
            Answer::new(answer, text).print(global.json)?;
            Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

/// What went into a file of statements, and what did not.
pub(crate) fn statements_written(answer: &serde_json::Value) -> String {
    let field = |name| output::field(answer, name);
    let mut text =
        format!("{} statements, {} to {}, in {}", field("statements"), field("first"), field("last"), field("path"));
    if answer.get("next").is_some_and(|next| !next.is_null()) {
        let restore = answer.get("superseded").filter(|restore| !restore.is_null());
        let chain = restore.map_or_else(String::new, |restore| format!("--superseded {restore} "));
        text.push_str(&format!(
            "\nMORE FOLLOW: a file takes no more than these; the next ones: {chain}--first {} -o ANOTHER",
            field("next")
        ));
    }
    text
}

async fn statements(args: StatementsArgs, global: &Global) -> Result<ExitCode> {
    let answer = daemon::call(&args.dir.path(), json!({"cmd": "statements"})).await?;
    if let Some(path) = &args.output {
        let request = json!({
            "cmd": "statement-file", "path": new_file::new_place(path)?, "first": args.first,
            "superseded": args.superseded,
        });
        return ask(&args.dir.path(), request, global, statements_written).await;
    }
    let mut text = super::books::statements_text(&answer, &[]);
    let (shown, total) = (output::rows(&answer, "statements").len() as u64, answer.get("total"));
    if let Some(total) = total.and_then(serde_json::Value::as_u64).filter(|total| *total > shown) {
        text.push_str(&format!("\nthe newest {shown} of {total}; -o FILE writes all"));
    }
    let mut restores: Vec<String> =
        output::rows(&answer, "superseded").iter().map(|line| output::field(line, "restore")).collect();
    restores.dedup();
    for restore in restores {
        text.push_str(&format!(
            "\nsome were put aside when the manager came back from a backup; -o FILE --superseded {restore} writes them"
        ));
    }
    if answer.get("more_wait").and_then(serde_json::Value::as_bool) == Some(true) {
        text.push_str("\nthe manager has more: ask again");
    }
    if let Some(why) = answer.get("not_fetched_because").and_then(serde_json::Value::as_str) {
        text.push_str(&format!("\nno new ones were fetched: {why}"));
    }
    Answer::new(answer, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

async fn heads(args: HeadsArgs, global: &Global) -> Result<ExitCode> {
    let mut page = daemon::call(&args.dir.path(), json!({"cmd": "heads"})).await?;
    let Some(path) = &args.output else {
        let mut text = listed(&page, "heads", &["at", "number", "digest", "restore"]);
        if page.get("next").is_some_and(|next| !next.is_null()) {
            let (shown, total) = (output::rows(&page, "heads").len(), output::field(&page, "total"));
            text.push_str(&format!("\nthe newest {shown} of {total}; -o FILE writes all"));
        }
        Answer::new(page, text).print(global.json)?;
        return Ok(ExitCode::SUCCESS);
    };
    // The key set first: by it the heads' signatures are verified.
    let mut text: String = output::rows(&page, "key_sets").iter().map(|line| format!("{line}\n")).collect();
    let mut heads = 0;
    loop {
        let lines = output::rows(&page, "heads");
        heads += lines.len();
        text.extend(lines.iter().map(|line| format!("{line}\n")));
        match page.get("next").filter(|next| !next.is_null()) {
            Some(next) => page = daemon::call(&args.dir.path(), json!({"cmd": "heads", "before": next})).await?,
            None => break,
        }
    }
    new_file::write_whole(path, text.as_bytes())?;
    text = format!("{heads} heads in {}", path.display());
    Answer::new(json!({"path": path, "heads": heads}), text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// One line for each thing that was looked at, and what to do in the end.
fn findings(answer: &serde_json::Value) -> String {
    let found = answer.get("findings").and_then(serde_json::Value::as_array).into_iter().flatten();
    let mut text = Vec::new();
    for finding in found {
        let mark = match finding.get("good").and_then(serde_json::Value::as_bool) {
            Some(true) => "ok",
            Some(false) => "no",
            None => "--",
        };
        let (check, says) = (output::field(finding, "check"), output::field(finding, "says"));
        let todo = finding.get("todo").and_then(serde_json::Value::as_str);
        text.push(format!("{mark}  {check}: {says}{}", todo.map(|todo| format!("; {todo}")).unwrap_or_default()));
    }
    text.push(format!("=>  {}", output::field(answer, "advice")));
    text.join("\n")
}

/// Limits as lines; 0 is none.
fn rates(answer: &serde_json::Value) -> String {
    let limits = answer.as_object().into_iter().flatten();
    let line = |(name, rate): (&String, &serde_json::Value)| match rate.as_u64() {
        Some(0) | None => format!("{name}: no limit"),
        Some(rate) => format!("{name}: {}/s", output::bytes(rate)),
    };
    limits.map(line).collect::<Vec<_>>().join("\n")
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
    let waited = tokio::select! {
        waited = daemon::wait(running.supervisor(), args.until_stdin_closes) => waited,
        () = running.drained() => {
            tracing::info!("drained: stopping");
            Ok(())
        }
    };
    let stopped = running.stop(daemon::STOP_DEADLINE).await.context("stopping");
    daemon::ended(waited, stopped)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::statements_written;

    #[test]
    fn the_next_file_is_named_so_that_it_is_of_the_same_chain() {
        let written = |next, superseded| {
            let answer = json!({
                "path": "/f", "statements": 960, "first": 1, "last": 960, "next": next, "superseded": superseded,
            });
            statements_written(&answer)
        };
        assert_eq!(written(None::<u64>, None::<u64>), "960 statements, 1 to 960, in /f");
        assert!(written(Some(961), None).ends_with("the next ones: --first 961 -o ANOTHER"));
        assert!(written(Some(961), Some(7)).ends_with("the next ones: --superseded 7 --first 961 -o ANOTHER"));
    }
}
