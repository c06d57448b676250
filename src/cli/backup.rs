//! `backup` and `restore` of the two roles whose state nobody else has: the manager and the merchant.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::json;
use store::Restored;

use super::daemon::ask;
use super::output::{Answer, field};
use super::{Global, new_file};

/// What nobody sends a restored manager again.
pub(super) const BOOK_AGAIN: &str = "Before the next payout: book every payment made since the backup again, with the same \
                                     reference (`willcall manager payment … --again`; the audit log exported before has \
                                     them)";

/// Flags of `backup`.
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// File to write, readable by its owner only
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace a file that is there, once the new one is whole
    #[arg(long)]
    replace: bool,
    /// Data folder [default: the user's data folder]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Flags of `restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// A file that `backup` wrote
    file: PathBuf,
    /// Data folder; made if there is none. Files in it stay, and its database must be gone [default: the user's data
    /// folder]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

fn folder(dir: Option<&PathBuf>, role: &str) -> PathBuf {
    dir.cloned().unwrap_or_else(|| super::default_dir(role))
}

/// Has a running node write its backup.
pub(crate) async fn backup(role: &str, args: BackupArgs, global: &Global) -> Result<ExitCode> {
    let request = json!({"cmd": "backup", "path": new_file::place(&args.output)?, "replace": args.replace});
    let text = |a: &serde_json::Value| {
        format!(
            "{} records and the keys in {}\nKeep it as safe as the keys themselves.",
            field(a, "records"),
            field(a, "path")
        )
    };
    ask(&folder(args.dir.as_ref(), role), request, global, text).await
}

/// `willcall manager restore`
pub(crate) fn manager(args: &RestoreArgs, global: &Global) -> Result<ExitCode> {
    let dir = folder(args.dir.as_ref(), "manager");
    let (restored, number) = manager_node::restore_backup(&args.file, &dir)?;
    let more = format!("restore number {number}: seeders will send again what the backup may lack\n{BOOK_AGAIN}");
    report("manager", &dir, &restored, Some((number, more)), global)
}

/// `willcall merchant restore`
pub(crate) fn merchant(args: &RestoreArgs, global: &Global) -> Result<ExitCode> {
    let dir = folder(args.dir.as_ref(), "merchant");
    let restored = merchant_node::restore_backup(&args.file, &dir)?;
    report("merchant", &dir, &restored, None, global)
}

fn report(
    role: &str,
    dir: &Path,
    restored: &Restored,
    number: Option<(u64, String)>,
    global: &Global,
) -> Result<ExitCode> {
    let mut lines = vec![format!("{} records, {} files in {}", restored.records, restored.files.len(), dir.display())];
    lines.extend(restored.kept.iter().map(|kept| format!("was there and stays: {}", kept.display())));
    let restore = number.as_ref().map(|(number, _)| *number);
    lines.extend(number.map(|(_, text)| text));
    lines.push(format!("Next: willcall {role} run --dir {}", dir.display()));
    let json = json!({
        "dir": dir, "records": restored.records, "files": restored.files, "kept": restored.kept, "restore": restore,
    });
    Answer::new(json, lines.join("\n")).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}
