//! Evidence at the command line: a client's export, and the checks that need nothing but a file and a root key, so that
//! an arbiter can run them on a machine that has never seen the network.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use client_node::{Gathered, LinkOptions};
use protocol::evidence::{EvidencePack, Line, Received, Recorded, StatementFile, check_statement_files};
use protocol::trust::JoinLine;
use protocol::{NetworkId, PeerId, TransactionId};
use serde_json::json;

use super::client::HomeArgs;
use super::new_file::write_whole;
use super::output::{self, Answer};
use super::{Global, text_argument};

/// Flags of `evidence`.
#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// Transaction id
    transaction: TransactionId,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    home: HomeArgs,
}

/// Flags of `verify-evidence`.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The file
    file: PathBuf,
    /// The network: its join line, or its root key; text, @FILE, or - for standard input
    #[arg(long, value_name = "JOINLINE_OR_ROOT")]
    network: String,
}

/// Flags of `verify-statement`.
#[derive(Debug, Args)]
pub(crate) struct VerifyStatementArgs {
    /// The file; where a chain takes several, all of them in order: that they follow each other is checked, too
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The network: its join line, or its root key; text, @FILE, or - for standard input
    #[arg(long, value_name = "JOINLINE_OR_ROOT")]
    network: String,
}

/// `willcall evidence`
pub(crate) async fn client(args: ClientArgs, global: &Global) -> Result<ExitCode> {
    let home = args.home.open()?;
    let options = LinkOptions::default();
    let Gathered { pack, not_renewed } = Box::pin(client_node::evidence(&home, args.transaction, &options)).await?;
    let bytes = pack.to_bytes();
    write_whole(&args.output, &bytes)?;
    let json = json!({
        "path": args.output, "bytes": bytes.len(), "transaction": args.transaction,
        "acknowledgements": pack.acks.len(), "completions": pack.completions.len(), "key_sets": pack.key_sets.len(),
        "not_renewed": not_renewed,
    });
    let mut text = format!("evidence in {}", args.output.display());
    if let Some(why) = not_renewed {
        text.push_str(&format!(
            "\nNOT RENEWED: the ticket here proves nothing under the network's present keys, and no newer lease vouches for \
             it ({why}); ask again, or ask manager or shop for theirs"
        ));
    }
    Answer::new(json, text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// The root key that a join line or a key names.
pub(super) fn root_of(text: &str) -> Result<PeerId> {
    let text = text_argument(text)?;
    if let Ok(root) = text.parse::<PeerId>() {
        return Ok(root);
    }
    let wanted = "--network takes the network's join line, which `willcall manager join` prints, or its root key, which \
                  `willcall manager status` shows as root";
    if text.parse::<NetworkId>().is_ok() {
        bail!("{wanted}; this is the network's id, which is no key to verify anything with");
    }
    let join: JoinLine = text.parse().context(wanted)?;
    Ok(join.root)
}

fn read(path: &Path, most: usize) -> Result<Vec<u8>> {
    use std::io::Read;
    let failed = || format!("cannot read {}", path.display());
    let file = std::fs::File::open(path).with_context(failed)?;
    let mut bytes = Vec::new();
    // One byte more, so that what is too long is seen to be.
    file.take(most as u64 + 1).read_to_end(&mut bytes).with_context(failed)?;
    Ok(bytes)
}

fn shown(line: &Line) -> String {
    let (whose, claim) = (line.claimed_by.as_str(), &line.claim);
    match (&line.problem, &line.vouched_by) {
        (None, None) if line.unproven => format!("?    {whose}: {claim}"),
        (None, None) => format!("ok   {whose}: {claim}"),
        (None, Some(by)) => {
            format!("ok   {whose}: {claim} (the key that signed this was revoked since; {by} vouches for it)")
        }
        (Some(problem), _) => format!("BAD  {}: {}: it does not hold: {problem}", line.section, line.claim),
    }
}

fn code(ok: bool) -> ExitCode {
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `willcall verify-evidence`
pub(crate) fn verify(args: &VerifyArgs, global: &Global) -> Result<ExitCode> {
    let root = root_of(&args.network)?;
    let bytes = read(&args.file, EvidencePack::MAX_BYTES)?;
    let pack = EvidencePack::from_bytes(&bytes).with_context(|| args.file.display().to_string())?;
    let report = pack.verify(&root);
    let mut lines: Vec<String> = report.lines.iter().map(shown).collect();
    let facts = &report.facts;
    lines.push(String::new());
    match (facts.transaction, facts.client) {
        (Some(transaction), Some(client)) => {
            lines.push(format!(
                "Proven of transaction {transaction}, as of key set {}:",
                version(facts.key_set_version)
            ));
            lines.push(format!("  designated client   {client}"));
            lines.push(format!("  product             {}", text(facts.product)));
            lines.push(format!("  manifest            {}", text(facts.manifest)));
            lines.push(format!("  paid, says merchant {}", proven(facts.endorsed)));
            lines.push(format!("  released            {}", proven(facts.released)));
            lines.extend(received(&facts.received, facts.content_bytes));
            for moved in &facts.moved {
                let who = if moved.recovered { "the merchant, by recovery" } else { "its holder" };
                let at = output::time(moved.at);
                lines.push(format!("  moved               to {}, said {who} ({}) at {at}", moved.to, moved.by));
            }
            for (peer, other) in &facts.others {
                match facts.moved.iter().any(|moved| moved.to == *peer) {
                    true => lines.push(format!("  its holder then     {peer}, who signed:")),
                    false => lines.push(format!("  moved, says manager to {peer}, who signed:")),
                }
                lines.extend(received(other, facts.content_bytes).map(|line| format!("  {line}")));
            }
            lines.extend(facts.record.iter().flat_map(recorded));
            let by = when(facts.nothing_acknowledged_by);
            match (facts.nothing_acknowledged_by, facts.nothing_acknowledged_since) {
                (Some(_), None) => lines.push(format!("  nothing came in by  {by}")),
                (Some(_), since) => lines.push(format!("  nothing came in     from {} to {by}", when(since))),
                (None, _) => {}
            }
            if facts.manager_restored_at.is_some() {
                lines.push(format!(
                    "  the manager         came back from a backup at {}, and may have forgotten what came in before",
                    when(facts.manager_restored_at)
                ));
            }
        }
        _ => {
            lines.push("Nothing is proven.".to_owned());
            if report.key_revoked {
                lines.push(
                    "The key that signed the sale was revoked. The manager vouches for it in a file of its own: \
                     willcall manager evidence, or merchant evidence while the manager can be reached."
                        .to_owned(),
                );
            }
        }
    }
    lines.push(verdict(&report.lines));
    Answer::new(serde_json::to_value(&report)?, lines.join("\n")).print(global.json)?;
    Ok(code(report.ok))
}

/// All lines in one.
fn verdict(lines: &[Line]) -> String {
    if lines.iter().any(|line| line.problem.is_some()) {
        return "NOT every line holds.".to_owned();
    }
    match lines.iter().filter(|line| line.unproven).count() {
        0 => "Every line holds.".to_owned(),
        n => format!("Every line holds, and that the signer could say so is NOT proven of {n} of them (?)."),
    }
}

/// What one peer signed to have received.
fn received(received: &Received, content_bytes: Option<u64>) -> [String; 3] {
    let bytes = match (received.acknowledged_bytes, received.last_acknowledged_at, content_bytes) {
        (Some(have), _, Some(all)) => format!("{have} of {all}"),
        (_, None, _) => ABSENT.to_owned(),
        _ => "unknown: the manifest is not in the file".to_owned(),
    };
    [
        format!("  bytes acknowledged  {bytes}"),
        format!("  last acknowledged   {}", when(received.last_acknowledged_at)),
        format!("  completed           {}", when(received.completed_at)),
    ]
}

/// Where it stood by the manager's word: what had happened by then.
fn recorded(record: &Recorded) -> Vec<String> {
    let mut lines = vec![format!("  manager's record    as of {}: {}", output::time(record.at), record.state.as_str())];
    for (what, at) in [
        ("released", record.released_at),
        ("first came in", record.first_at),
        ("completed", record.completed_at),
        ("closed", record.closed_at),
    ] {
        lines.extend(at.map(|at| format!("    {what:<18}{}", output::time(at))));
    }
    lines
}

/// What stands for a thing that the file does not have: whoever made the file may have left it out.
const ABSENT: &str = "not in this file";

fn proven(is: bool) -> &'static str {
    if is { "true" } else { ABSENT }
}

fn version(version: Option<u64>) -> String {
    version.map_or_else(|| "none".to_owned(), |version| version.to_string())
}

fn text(value: Option<impl std::fmt::Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn when(ms: Option<u64>) -> String {
    ms.map_or_else(|| ABSENT.to_owned(), output::time)
}

/// `willcall verify-statement`
pub(crate) fn verify_statement(args: &VerifyStatementArgs, global: &Global) -> Result<ExitCode> {
    let root = root_of(&args.network)?;
    let mut files = Vec::with_capacity(args.files.len());
    for path in &args.files {
        let bytes = read(path, StatementFile::MAX_BYTES)?;
        files.push(StatementFile::from_bytes(&bytes).with_context(|| path.display().to_string())?);
    }
    let (lines, statements) = check_statement_files(&files, &root);
    let ok = lines.iter().all(|line| line.problem.is_none()) && !statements.is_empty();
    let mut shown_lines: Vec<String> = lines.iter().map(shown).collect();
    let mut summary = Vec::new();
    for s in &statements {
        let totals = s.totals();
        if s.restore > 0 && totals.unknown > 0 {
            shown_lines.push(format!(
                "statement {}: {} receipts are of deliveries that the manager does not know; it came back from a backup \
                 (restore number {}) and may have forgotten them",
                s.number, totals.unknown, s.restore
            ));
        }
        for b in &s.balances {
            shown_lines.push(format!(
                "statement {}: {} before {}, credited {}, paid {}, after {} minor units",
                s.number, b.currency, b.before, b.credited, b.paid, b.after
            ));
        }
        summary.push(json!({
            "seeder": s.seeder, "number": s.number, "from": s.from, "until": s.until, "restore": s.restore,
            "totals": totals,
            "receipts": s.receipts.iter().map(|r| json!({
                "receipt": r.receipt, "transaction": r.delivery.map(|d| d.transaction), "at": r.at,
                "chunks": r.chunks, "new_chunks": r.new_chunks, "fate": r.fate.as_str(),
            })).collect::<Vec<_>>(),
            "earnings": s.earnings.iter().map(|e| json!({
                "transaction": e.delivery.transaction, "delivery": e.delivery.delivery, "at": e.at, "bytes": e.bytes,
                "credited_minor": e.credited, "currency": e.currency, "capped": e.capped,
            })).collect::<Vec<_>>(),
            "payments": s.payments.iter().map(|p| json!({
                "at": p.at, "minor": p.minor, "currency": p.currency, "reference": p.reference,
            })).collect::<Vec<_>>(),
            "balances": s.balances.iter().map(|b| json!({
                "currency": b.currency, "before_minor": b.before, "credited_minor": b.credited, "paid_minor": b.paid,
                "after_minor": b.after,
            })).collect::<Vec<_>>(),
        }));
    }
    if let Some(first) = statements.first().filter(|first| first.number > 1) {
        shown_lines.push(format!("The statements before number {} are not in it.", first.number));
    }
    shown_lines.push(if ok { verdict(&lines) } else { "NOT every line holds.".to_owned() });
    Answer::new(json!({"ok": ok, "lines": lines, "statements": summary}), shown_lines.join("\n")).print(global.json)?;
    Ok(code(ok))
}

#[cfg(test)]
mod tests {
    use protocol::evidence::Claimant;

    use super::*;

    fn line(problem: Option<&str>, unproven: bool) -> Line {
        Line {
            claimed_by: Claimant::ClientSigned,
            section: "move 1".to_owned(),
            claim: "a change of hands".to_owned(),
            problem: problem.map(str::to_owned),
            vouched_by: None,
            unproven,
        }
    }

    #[test]
    fn a_word_that_is_not_proven_is_not_among_the_lines_that_hold_without_remark() {
        let (good, open, bad) = (line(None, false), line(None, true), line(Some("forged"), false));
        assert_eq!(verdict(&[good.clone(), good.clone()]), "Every line holds.");
        assert!(verdict(&[good.clone(), open.clone()]).contains("NOT proven of 1 of them"));
        assert_eq!(verdict(&[good.clone(), open.clone(), bad.clone()]), "NOT every line holds.");
        let marks = [good, open, bad].map(|line| shown(&line).split(' ').next().map(str::to_owned));
        assert_eq!(marks, ["ok", "?", "BAD"].map(|mark| Some(mark.to_owned())));
    }
}
