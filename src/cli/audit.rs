//! `willcall manager audit`: the log of what the manager did, exported, checked anywhere, and cut off where it was exported.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Global;
use super::daemon::{self, ask};
use super::evidence::root_of;
use super::manager::DirArgs;
use super::new_file::{NewFile, new_place};
use super::output::{self, Answer, field, rows};

/// Commands about the audit log.
#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// Write the log into a file, one JSON object a line
    Export(AuditExportArgs),
    /// Follow the chain of an exported log, and compare it with what seeders were told; needs no manager
    Verify(AuditVerifyArgs),
    /// Remove from the manager what is in an exported log: its last entry stays, and the chain goes on from it
    Cut(AuditCutArgs),
}

/// Flags of `audit export`.
#[derive(Debug, Args)]
pub(crate) struct AuditExportArgs {
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Only what follows this entry
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    after: u64,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `audit verify`.
#[derive(Debug, Args)]
pub(crate) struct AuditVerifyArgs {
    /// The exported log
    file: PathBuf,
    /// What a seeder was told of the log, from `willcall seeder heads -o FILE`; may be repeated
    #[arg(long, value_name = "FILE")]
    heads: Vec<PathBuf>,
    /// Verify that the manager signed the heads: the network's join line, or its root key; text, @FILE, or - for standard input
    #[arg(long, value_name = "JOINLINE_OR_ROOT")]
    network: Option<String>,
    /// The file is a part of the log: that it does not begin with the first entry, and heads of later entries than its
    /// last, are no sign that something was cut off
    #[arg(long)]
    part: bool,
}

/// Flags of `audit cut`.
#[derive(Debug, Args)]
pub(crate) struct AuditCutArgs {
    /// The exported log, which is kept in place of the entries
    file: PathBuf,
    #[command(flatten)]
    dir: DirArgs,
}

/// `willcall manager audit`
pub(crate) async fn run(command: Audit, global: &Global) -> Result<ExitCode> {
    match command {
        Audit::Export(args) => {
            let path = new_place(&args.output)?;
            let mut file = NewFile::begin(&args.output)?;
            let (mut after, mut entries, mut head) = (args.after, 0u64, Value::Null);
            loop {
                let page = daemon::call(&args.dir.path(), json!({"cmd": "audit", "after": after})).await?;
                for entry in rows(&page, "entries") {
                    file.write(format!("{entry}\n").as_bytes())?;
                    after = entry.get("number").and_then(Value::as_u64).unwrap_or(after);
                    head = entry.get("digest").cloned().unwrap_or(Value::Null);
                    entries += 1;
                }
                if rows(&page, "entries").is_empty() {
                    break;
                }
            }
            file.end()?;
            let answer = json!({"path": path, "entries": entries, "last": after, "head": head});
            let text = format!("{entries} entries in {}\nhead {}", path.display(), field(&answer, "head"));
            Answer::new(answer, text).print(global.json)?;
        }
        Audit::Verify(args) => return audit_verify(&args, global),
        Audit::Cut(args) => {
            let report = manager_node::verify_audit(read_log(&args.file)?, &[], true)?;
            let request = json!({"cmd": "audit-cut", "through": report.last, "digest": report.head});
            let text = |a: &Value| {
                let (removed, kept) = (field(a, "removed"), args.file.display());
                format!("{removed} entries removed; {kept} is all that is left of them: keep it")
            };
            return ask(&args.dir.path(), request, global, text).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn audit_verify(args: &AuditVerifyArgs, global: &Global) -> Result<ExitCode> {
    let root = args.network.as_deref().map(root_of).transpose()?;
    let mut files = Vec::new();
    for path in &args.heads {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the heads in {name}"))?;
        files.push((name, text));
    }
    let heads = manager_node::read_heads(&files, root)?;
    let report = manager_node::verify_audit(read_log(&args.file)?, &heads, args.part)?;
    let mut text =
        vec![format!("{} entries from {} on, unbroken", report.entries, report.first), format!("head {}", report.head)];
    if let Some(cut_by) = report.cut_by {
        text.push(format!(
            "entry {cut_by}: what came before entry {} was exported and removed; that export has to be kept",
            report.first
        ));
    }
    for restore in &report.restores {
        let at = output::time(restore.at);
        text.push(format!(
            "entry {}: restored from a backup at {at}; what was logged in its place before is lost",
            restore.entry
        ));
    }
    match &report.heads {
        None => text.push("Compare the head with what seeders were told: --heads FILE.".to_owned()),
        Some(seen) => {
            text.push(format!(
                "of the heads that seeders were told {} stand in it, {} are of entries outside of it, {} were lost by a \
                 restore from a backup",
                seen.found, seen.outside, seen.lost
            ));
            if seen.revoked > 0 {
                text.push(format!(
                    "{} more were signed by a key that was revoked since and prove nothing; {} of them say something else \
                     than the log",
                    seen.revoked, seen.revoked_differ
                ));
            }
            text.push(match seen.verified {
                true => "The network's keys signed the heads.".to_owned(),
                false => "Who signed the heads was NOT verified: --network JOINLINE_OR_ROOT.".to_owned(),
            });
        }
    }
    Answer::new(serde_json::to_value(&report)?, text.join("\n")).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

fn read_log(path: &std::path::Path) -> Result<std::io::BufReader<std::fs::File>> {
    let file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(std::io::BufReader::new(file))
}
