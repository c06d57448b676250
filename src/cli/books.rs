//! The books of a manager: the ledger, statements of account, and what is to be paid out.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use protocol::{Amount, Currency};
use serde_json::{Value, json};

use super::Global;
use super::daemon::{self, ask};
use super::facts::{listed, page};
use super::manager::DirArgs;
use super::new_file::new_place;
use super::output::{self, Answer, field, rows};

/// Flags of `ledger`.
#[derive(Debug, Args)]
pub(crate) struct LedgerArgs {
    /// How many postings, 1000 at most
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1000))]
    limit: u64,
    /// Only postings before this number
    #[arg(long, value_name = "NUMBER")]
    before: Option<u64>,
    #[command(flatten)]
    dir: DirArgs,
}

/// Commands about statements.
#[derive(Debug, Subcommand)]
pub(crate) enum Statements {
    /// Make statements now of whatever is in none yet
    Make(StatementArgs),
    /// List the newest statement of each seeder, or all of one
    List(StatementArgs),
    /// Write a seeder's statements into a file that proves itself
    Export(StatementFileArgs),
}

/// Flags of commands about statements.
#[derive(Debug, Args)]
pub(crate) struct StatementArgs {
    /// Only of this seeder
    #[arg(long, value_name = "PEER")]
    seeder: Option<protocol::PeerId>,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `statements export`.
#[derive(Debug, Args)]
pub(crate) struct StatementFileArgs {
    /// The seeder
    seeder: protocol::PeerId,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// From this number on
    #[arg(long, default_value_t = 1)]
    first: u64,
    #[command(flatten)]
    dir: DirArgs,
}

/// Flags of `payouts`.
#[derive(Debug, Args)]
pub(crate) struct PayoutArgs {
    /// Comma-separated values, for a spreadsheet or a bank
    #[arg(long)]
    csv: bool,
    #[command(flatten)]
    dir: DirArgs,
}

/// Makes, lists or exports statements.
pub(crate) async fn statements(command: Statements, global: &Global) -> Result<ExitCode> {
    match command {
        Statements::Make(args) => {
            let request = json!({"cmd": "statements-make", "seeder": args.seeder});
            let text = |a: &Value| {
                let made = listed(a, "made", &["seeder", "first", "last"]);
                let is_failed = a["failed"].as_array().is_some_and(|failed| !failed.is_empty());
                if is_failed { format!("{made}\n{}", listed(a, "failed", &["seeder", "error"])) } else { made }
            };
            ask(&args.dir.path(), request, global, text).await
        }
        Statements::List(args) => {
            let request = json!({"cmd": "statements", "seeder": args.seeder});
            let text = |a: &Value| statements_text(a, &["seeder"]);
            daemon::ask_all(&args.dir.path(), request, "statements", global, text).await
        }
        Statements::Export(args) => {
            let path = new_place(&args.output)?;
            let request = json!({"cmd": "statement-file", "seeder": args.seeder, "first": args.first, "path": path});
            ask(&args.dir.path(), request, global, super::seeder::statements_written).await
        }
    }
}

/// Every page of what is to be paid out.
pub(crate) async fn payouts(args: &PayoutArgs, global: &Global) -> Result<ExitCode> {
    let columns =
        ["seeder", "currency", "stated_minor", "owed_minor", "carried_micros", "statement", "statement_until"];
    let lines = daemon::call_all(&args.dir.path(), json!({"cmd": "payouts"}), "payouts").await?;
    let answer = json!({ "payouts": lines });
    let text = match args.csv {
        // Peer IDs, currency codes and numbers: nothing in them needs quotes.
        true => {
            let row = |line: &Value| columns.map(|column| field(line, column)).join(",");
            std::iter::once(columns.join(",")).chain(lines.iter().map(row)).collect::<Vec<_>>().join("\n")
        }
        false => listed(&answer, "payouts", &columns),
    };
    Answer::new(answer, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Shows the ledger.
pub(crate) async fn ledger(args: &LedgerArgs, global: &Global) -> Result<ExitCode> {
    let request = json!({"cmd": "ledger", "limit": args.limit, "before": args.before});
    ask(&args.dir.path(), request, global, ledger_text).await
}

/// Minor units as people write them, in the currency that stands beside: `-99.99`. As they are where that is not known.
pub(crate) fn minor_amount(minor: i64, beside: &Value) -> String {
    let currency = beside.get("currency").and_then(|code| serde_json::from_value::<Currency>(code.clone()).ok());
    let Some(currency) = currency else { return minor.to_string() };
    let amount = Amount { minor: minor.unsigned_abs(), currency }.to_string();
    let number = amount.split(' ').next().unwrap_or_default();
    format!("{}{number}", if minor < 0 { "-" } else { "" })
}

/// Statements as a table, `first` columns before the others: receipts are counted, and pay is shown as money.
pub(crate) fn statements_text(answer: &Value, first: &[&str]) -> String {
    const COLUMNS: [&str; 9] =
        ["number", "until", "accepted", "duplicate", "unknown", "rejected", "paid_deliveries", "capped", "credited"];
    let mut shown = answer.clone();
    let statements = shown.get_mut("statements").and_then(Value::as_array_mut);
    for statement in statements.into_iter().flatten().filter_map(Value::as_object_mut) {
        let balances = statement.get("balances").and_then(Value::as_array);
        let credited = |balance: &Value| {
            let minor = balance.get("credited_minor").and_then(Value::as_i64).unwrap_or_default();
            format!("{} {}", minor_amount(minor, balance), field(balance, "currency"))
        };
        let credited: Vec<String> = balances.into_iter().flatten().map(credited).collect();
        let credited = (!credited.is_empty()).then(|| credited.join(", "));
        statement.insert("credited".to_owned(), json!(credited));
    }
    listed(&shown, "statements", &[first, &COLUMNS].concat())
}

/// What a merchant has and may come to owe.
pub(crate) fn credit_text(answer: &Value) -> String {
    let mut shown = answer.clone();
    for name in ["due", "earned", "open", "owed", "deposit", "promised", "limit"] {
        if let Some(value) = shown.get_mut(name)
            && let Some(minor) = value.as_i64()
        {
            *value = json!(minor_amount(minor, answer));
        }
    }
    page(&shown)
}

fn ledger_text(answer: &Value) -> String {
    let mut entries = Vec::new();
    for posting in rows(answer, "postings") {
        for entry in rows(posting, "entries") {
            let minor = entry.get("minor").and_then(Value::as_i64).unwrap_or_default();
            let amount = minor_amount(minor.saturating_abs(), entry);
            let (debit, credit) = if minor > 0 { (amount, String::new()) } else { (String::new(), amount) };
            entries.push(vec![
                field(posting, "memo"),
                field(entry, "account"),
                debit,
                credit,
                field(entry, "currency"),
            ]);
        }
    }
    let balances = rows(answer, "accounts")
        .iter()
        .map(|b| {
            let minor = b.get("minor").and_then(Value::as_i64).unwrap_or_default();
            vec![field(b, "account"), minor_amount(minor, b), field(b, "currency")]
        })
        .collect();
    let trial = rows(answer, "trial_balance")
        .iter()
        .map(|t| {
            format!(
                "{}: debits {} credits {} balanced {}",
                field(t, "currency"),
                minor_amount(t.get("debit").and_then(Value::as_i64).unwrap_or_default(), t),
                minor_amount(t.get("credit").and_then(Value::as_i64).unwrap_or_default(), t),
                field(t, "balanced")
            )
        })
        .collect::<Vec<_>>();
    let (shown, number) =
        (rows(answer, "postings").len() as u64, |name: &str| answer.get(name).and_then(Value::as_u64));
    let total = number("posting_count").unwrap_or_default();
    let cut = match number("next") {
        Some(next) => format!("\n{shown} of {total} postings; older ones: --before {next}, more at once: --limit 1000"),
        None if shown < total => format!("\nthe oldest {shown} of {total} postings"),
        None => String::new(),
    };
    let left_out = number("accounts_left_out").filter(|left_out| *left_out > 0);
    let left_out = left_out.map(|count| format!("\n{count} accounts are not shown; `manager payouts` has all seeders"));
    format!(
        "{}{cut}\n\n{}{}\n\n{}",
        output::table(&["posting", "account", "debit", "credit", "currency"], entries),
        output::table(&["account", "balance", "currency"], balances),
        left_out.unwrap_or_default(),
        trial.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_statement_pays_is_shown_as_money() {
        let balances = json!([
            {"currency": "USD", "credited_minor": 240}, {"currency": "JPY", "credited_minor": 7},
        ]);
        let answer = json!({"statements": [
            {"number": 1, "accepted": 24, "paid_deliveries": 2, "balances": balances}, {"number": 2, "balances": []},
        ]});
        let text = statements_text(&answer, &[]);
        let ends: Vec<&str> = text.lines().map(|line| line.rsplit("  ").next().unwrap_or_default().trim()).collect();
        assert_eq!(ends, ["credited", "2.40 USD, 7 JPY", "-"], "{text}");
        assert!(!text.contains("earnings"), "{text}");
    }
}
