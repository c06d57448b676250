//! What a command line beside a running seeder can ask of it. Requests are `{"cmd": NAME, …}`; `docs/operations.md` has
//! examples.
//!
//! - `status`: everything an operator looks at first.
//! - `receipts` (`limit`, default 20): the newest receipts and where they are: `queued`, `sent` or `marked`.
//! - `limit` (`upload`, `upload_per_delivery`): bytes per second from now on, 0 for no limit; what is absent stays. Answers
//!   with the limits in force. At the next start those of the configuration hold again.
//! - `statements` (`limit`, default 20): statements of account, after new ones were asked for.
//! - `statement-file` (`path`, `first`, `superseded`): all of them, or those from one on, or those put aside under a restore
//!   number, as a file that proves itself.
//! - `explain` (`id`): what became of one receipt, by the manager's word.
//! - `drain` (`patience_ms`): finishes what runs, refuses new deliveries, hands copies over, brings receipts home, then ends
//!   the process; with progress lines. `drain` with `cancel: true` lets it stay.
//! - `collect`: looks at once whether content has to go for want of room.
//! - `deny` (`add` or `remove`: a content id, or the digest of a manifest that is here): the operator's own deny list; without
//!   either it is only shown. What is denied is removed from disk.
//! - `heads` (`before`: what the answer before named as `next`): what the manager's audit log was, by its signed heartbeats,
//!   a thousand of them in an answer.
//! - `check`: whether others reach this seeder, by the manager's trial and by what the node knows itself.
//! - `scrub`: reads all content again, writes damaged files beside the data anew and drops damaged chunks, which the manager
//!   then orders from others; with progress lines.

use std::sync::Arc;

use delivery::{FileError, VerifyProgress};
use node::{ControlError, ControlServer, ControlStartError, ProgressSender};
use protocol::clock::ClockState;
use protocol::{ContentId, Digest};
use serde_json::{Value, json};
use store::StoreError;

use crate::clock::now_ms;
use crate::context::Seeder;
use crate::denied::DenyError;
use crate::room::Usage;
use crate::tables::{DUE, LINES};
use crate::{drain, heads, network, outbox, reach, scrub, statements};

/// Most receipts in one answer.
const MAX_RECEIPTS: u64 = 1000;
/// Receipts that are due are counted up to here.
const COUNTED_DUE: u64 = 100_000;

/// Serves requests in the seeder's directory.
pub(crate) async fn start(seeder: &Arc<Seeder>, dir: &std::path::Path) -> Result<ControlServer, ControlStartError> {
    let shared = Arc::clone(seeder);
    let handler = move |request: Value, progress: ProgressSender| {
        let seeder = Arc::clone(&shared);
        async move { Box::pin(answer(seeder, request, progress)).await }
    };
    ControlServer::start(&seeder.supervisor, dir, handler).await
}

async fn answer(seeder: Arc<Seeder>, request: Value, progress: ProgressSender) -> Result<Value, ControlError> {
    match request.get("cmd").and_then(Value::as_str) {
        Some("status") => in_background(move || Ok(status(&seeder)?)).await,
        Some("receipts") => {
            let limit = request.get("limit").and_then(Value::as_u64).unwrap_or(20).min(MAX_RECEIPTS);
            in_background(move || Ok(receipts(&seeder, limit)?)).await
        }
        Some("drain") if request.get("cancel").and_then(Value::as_bool) == Some(true) => Ok(drain::cancel(&seeder)),
        Some("drain") => {
            let patience = request.get("patience_ms").and_then(Value::as_u64);
            drain::run(&seeder, patience, &progress).await
        }
        Some("collect") => {
            seeder.wake.collect.notify_one();
            Ok(json!({}))
        }
        Some("check") => Ok(reach::check(&seeder).await),
        Some("deny") => deny(&seeder, &request).await,
        Some("heads") => {
            let number = |at: usize| request.get("before").and_then(|before| before.get(at)).and_then(Value::as_u64);
            let before = number(0).zip(number(1));
            in_background(move || Ok(heads::list(&seeder.db, seeder.network.trust().as_deref(), before)?)).await
        }
        Some("limit") => limit(&seeder, &request),
        Some("statements") => {
            let limit = request.get("limit").and_then(Value::as_u64).unwrap_or(20).min(MAX_RECEIPTS);
            let limit = usize::try_from(limit).unwrap_or(usize::MAX);
            statements::list(&seeder, limit).await.map_err(|error| ControlError::new("internal", error.to_string()))
        }
        Some("statement-file") => statement_file(seeder, &request).await,
        Some("explain") => {
            let id = request.get("id").and_then(Value::as_str).unwrap_or_default().parse();
            let id = id.map_err(|error| ControlError::new("bad-request", format!("receipt id: {error}")))?;
            statements::explain(&seeder, id)
                .await
                .map_err(|error| ControlError::new("not-explained", error.to_string()))
        }
        Some("scrub") => scrub(seeder, progress).await,
        other => {
            let name = other.unwrap_or("none");
            let text = format!(
                "unknown command '{name}'; a seeder knows status, receipts, limit, drain, collect, deny, heads, check and scrub"
            );
            Err(ControlError::new("unknown-command", text))
        }
    }
}

/// How full it is, and whether it is leaving.
fn quota(seeder: &Seeder) -> Value {
    json!({
        "used_inodes": Usage::of(seeder).inodes,
        "max_inodes": seeder.config.max_inodes,
        "high_water_percent": seeder.config.high_water_percent,
        "low_water_percent": seeder.config.low_water_percent,
        "collected_bytes": seeder.counts.collected.get(),
        "drain": seeder.drain.name(),
    })
}

/// The limits in force.
fn limits(seeder: &Seeder) -> Value {
    json!({
        "upload": seeder.upload.process.rate().get(),
        "upload_per_delivery": seeder.upload.per_delivery.get(),
    })
}

fn limit(seeder: &Seeder, request: &Value) -> Result<Value, ControlError> {
    let rates = [("upload", seeder.upload.process.rate()), ("upload_per_delivery", &seeder.upload.per_delivery)];
    let asked = rates.map(|(name, rate)| (name, rate, request.get(name).filter(|value| !value.is_null())));
    // All of it or nothing.
    if let Some((name, ..)) = asked.iter().find(|(_, _, value)| value.is_some_and(|value| value.as_u64().is_none())) {
        return Err(ControlError::new(
            "bad-request",
            format!("{name} is a number of bytes per second, 0 for no limit"),
        ));
    }
    for (name, rate, value) in asked {
        if let Some(value) = value.and_then(Value::as_u64) {
            rate.set(value);
            tracing::info!(limit = name, bytes_per_second = value, "limit changed");
        }
    }
    Ok(limits(seeder))
}

/// Shows the operator's deny list, after a change of it where one is asked for.
async fn deny(seeder: &Arc<Seeder>, request: &Value) -> Result<Value, ControlError> {
    let named = |name: &str| request.get(name).and_then(Value::as_str).map(|text| content_of(seeder, text)).transpose();
    let (add, remove) = (named("add")?, named("remove")?);
    let failed = |error: DenyError| ControlError::new("not-denied", error.to_string());
    let mut changed = false;
    if let Some(id) = add {
        seeder.denied.add(id).await.map_err(failed)?;
        tracing::warn!(content = %id, "denied by the operator");
        // Deliveries that run are cut, what is on disk goes, and the manager learns that it is not here any more.
        seeder.network.look_again();
        seeder.wake.announce.notify_one();
        changed = true;
    }
    if let Some(id) = remove {
        changed = seeder.denied.remove(id).await.map_err(failed)?;
        // It may be ordered here again.
        seeder.wake.sync.notify_one();
    }
    let (configured, added) = seeder.denied.list();
    Ok(json!({"configured": configured, "added": added, "changed": changed}))
}

/// A content by its id, or by the digest of its manifest where it is here.
fn content_of(seeder: &Seeder, text: &str) -> Result<ContentId, ControlError> {
    if let Ok(id) = text.parse::<ContentId>() {
        return Ok(id);
    }
    let held = text.parse::<Digest>().ok().and_then(|digest| seeder.contents.get(&digest));
    held.map(|content| content.manifest().content).ok_or_else(|| {
        let shown: String = text.chars().take(80).collect();
        let why = format!("'{shown}' is neither a content id nor the manifest of a content here; `status` shows both");
        ControlError::new("bad-request", why)
    })
}

async fn in_background(
    work: impl FnOnce() -> Result<Value, Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
) -> Result<Value, ControlError> {
    let failed = |error: String| ControlError::new("internal", error);
    let result = tokio::task::spawn_blocking(work).await.map_err(|error| failed(error.to_string()))?;
    result.map_err(|error| failed(error.to_string()))
}

/// Writes a file, whole or not at all; one that is there is not replaced.
async fn statement_file(seeder: Arc<Seeder>, request: &Value) -> Result<Value, ControlError> {
    let path = request.get("path").and_then(Value::as_str).map(std::path::PathBuf::from);
    let Some(path) = path.filter(|path| path.is_absolute()) else {
        return Err(ControlError::new("bad-request", "the path of a file is missing or not absolute"));
    };
    let number = |name: &str| request.get(name).and_then(Value::as_u64);
    let (first, superseded) = (number("first"), number("superseded"));
    if path.symlink_metadata().is_ok() {
        return Err(not_written(&path, &std::io::Error::from(std::io::ErrorKind::AlreadyExists)));
    }
    let written = tokio::task::spawn_blocking(move || {
        let failed = |error: StoreError| ControlError::new("internal", error.to_string());
        let Some(written) = statements::file(&seeder.db, first, superseded).map_err(failed)? else {
            let why = match (first, superseded) {
                (_, Some(restore)) => format!("no statements were put aside under restore number {restore}"),
                (Some(first), None) => format!("there is no statement {first} here"),
                _ => "there is no statement yet; the manager makes one a day, or when its operator asks".to_owned(),
            };
            return Err(ControlError::new("not-found", why));
        };
        let folder = path.parent().unwrap_or(std::path::Path::new("/"));
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            std::io::Write::write_all(&mut file, &written.bytes)?;
            file.as_file().sync_all()?;
            file.persist_noclobber(&path).map(drop).map_err(|error| error.error)
        };
        write().map_err(|error: std::io::Error| not_written(&path, &error))?;
        Ok(json!({
            "path": path, "statements": written.statements, "first": written.first, "last": written.last,
            "next": written.next, "superseded": superseded, "bytes": written.bytes.len(),
        }))
    });
    written.await.map_err(|error| ControlError::new("internal", error.to_string()))?
}

fn not_written(path: &std::path::Path, error: &std::io::Error) -> ControlError {
    ControlError::new("wrong-state", format!("cannot write {}: {error}", path.display()))
}

/// Also what [`crate::Running::status`] gives.
pub(crate) fn status(seeder: &Seeder) -> Result<Value, StoreError> {
    let now = now_ms();
    let state = outbox::state(&seeder.db)?;
    let due = seeder.db.read(|txn| DUE.len(txn))?.min(COUNTED_DUE);
    let contents: Vec<Value> = seeder
        .contents
        .list()
        .iter()
        .map(|content| {
            json!({
                "manifest": content.digest(),
                "content": content.manifest().content,
                "bytes": content.manifest().length,
                "have_bytes": content.have_bytes(),
                "complete": content.is_complete(),
            })
        })
        .collect();
    let tried = "made good by the seeder itself, or fetched anew, with the manager's help; `willcall seeder scrub` tries it now";
    let damaged: Vec<String> =
        seeder.contents.damaged().iter().map(|(_, damaged)| format!("{damaged}: {tried}")).collect();
    let serving = seeder.network.certificate(now);
    let heartbeat = seeder.network.heartbeat();
    let (deliveries, max) = seeder.deliveries.load();
    let room = seeder.room();
    let clock = seeder.network.clock(now);
    Ok(json!({
        "role": "seeder",
        "peer": seeder.peer,
        "name": seeder.config.name,
        "network": seeder.network.id,
        "addresses": seeder.addresses(),
        "enrolled": seeder.network.is_enrolled() && !seeder.network.is_revoked(),
        "certificate_until": seeder.network.certificate_until(),
        "serving": serving.is_ok(),
        "not_serving_because": serving.err().map(|refusal| refusal.to_string()),
        "managers": seeder.manager.addresses(),
        "heartbeat_age_ms": heartbeat.as_ref().map(|heartbeat| now.saturating_sub(heartbeat.at)),
        "key_set_version": seeder.network.trust().map(|trust| trust.key_set().version),
        "revocation_epoch": seeder.network.revoked().number(),
        "fork": seeder.network.fork(),
        "acquaintances": seeder.acquaintances.count(),
        "clock": clock_json(clock),
        "contents": contents,
        "damaged_contents": damaged,
        "capacity_bytes": seeder.config.capacity,
        "used_bytes": seeder.contents.total_bytes(),
        "free_bytes": room.free,
        "spare_bytes": room.spare,
        "content_dir": seeder.contents.root(),
        "limits": limits(seeder),
        "quota": quota(seeder),
        "deliveries": deliveries,
        "max_deliveries": max,
        "deliveries_begun": seeder.counts.deliveries_begun.get(),
        "chunks_sent": seeder.counts.chunks_sent.get(),
        "bytes_sent": seeder.counts.bytes_sent.get(),
        "replicated_bytes": seeder.counts.replicated.get(),
        "damaged_chunks": seeder.counts.damaged.get(),
        "refusals": seeder.counts.refusals_by_code(),
        "receipts_due": due,
        "batches_made": state.as_ref().map_or(0, |state| state.next - 1),
        "batches_marked": state.as_ref().map_or(0, |state| state.marked),
        "batches_waiting": state.as_ref().map_or(0, |state| state.next - 1 - state.marked),
        "trouble": {
            "manager": seeder.notes.manager.get(),
            "storage": seeder.notes.storage.get(),
            "quota": seeder.notes.quota.get(),
            "receipts": seeder.notes.receipts.get(),
            "announcing": seeder.notes.announcing.get(),
            "connections": seeder.node.turned_away(),
            "clock": network::clock_trouble(clock),
        },
    }))
}

fn clock_json(clock: ClockState) -> Value {
    json!({ "state": clock.as_str(), "off_by_ms": clock.off_by_ms(), "text": clock.to_string() })
}

fn receipts(seeder: &Seeder, limit: u64) -> Result<Value, StoreError> {
    let marked = outbox::state(&seeder.db)?.map_or(0, |state| state.marked);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let (due, lines, total) = seeder.db.read(|txn| {
        let total = DUE.len(txn)?.saturating_add(LINES.len(txn)?);
        Ok::<_, StoreError>((DUE.range(txn, .., limit)?, LINES.range_back(txn, .., limit)?, total))
    })?;
    // One that is due is queued: its transaction is the first part of its key.
    let queued = due.iter().filter_map(|(key, _)| {
        let transaction = protocol::TransactionId::from_bytes(*key.first_chunk::<16>()?);
        Some(json!({ "transaction": transaction, "state": "queued" }))
    });
    let batched = lines.iter().map(|((batch, _), line)| {
        json!({
            "id": line.id,
            "transaction": line.transaction,
            "delivery": line.delivery,
            "chunks": line.chunks,
            "completed": line.completed,
            "at": line.at,
            "batch": batch,
            "state": if *batch <= marked { "marked" } else { "sent" },
        })
    });
    Ok(json!({ "receipts": queued.chain(batched).take(limit).collect::<Vec<_>>(), "total": total }))
}

async fn scrub(seeder: Arc<Seeder>, progress: ProgressSender) -> Result<Value, ControlError> {
    let failed = |error: FileError| ControlError::new("disk-failed", error.to_string());
    let (mut results, mut damaged_chunks, mut to_read, mut incomplete) = (Vec::new(), 0, 0, 0_usize);
    let (mut damaged_files, mut unusable) = (0_usize, 0_usize);
    // By their digests: whoever holds a content keeps it from being removed, and the last one's turn comes in hours.
    let listed: Vec<Digest> = seeder.contents.list().iter().map(|content| content.digest()).collect();
    // Those that cannot be used as they are: made good, they have been read.
    for (digest, damaged) in seeder.contents.damaged() {
        let line = Box::pin(scrub::damaged_line(&seeder, digest, &damaged)).await;
        damaged_files += 1;
        match seeder.contents.get(&digest) {
            None => unusable += 1,
            Some(content) => incomplete += usize::from(!content.is_complete()),
        }
        results.push(line);
    }
    for digest in listed {
        // One that was removed meanwhile is nobody's concern.
        let Some(content) = seeder.contents.get(&digest) else { continue };
        let listed = Arc::clone(&content);
        let (seen, mut seeing) = tokio::sync::watch::channel(None);
        let mut checking = std::pin::pin!(scrub::content(&seeder, content, seen));
        let found = loop {
            tokio::select! {
                found = &mut checking => break found,
                Ok(()) = seeing.changed() => {
                    let Some(VerifyProgress { checked, total, damaged }) = *seeing.borrow_and_update() else { continue };
                    let line = json!({ "manifest": digest, "checked": checked, "total": total, "damaged": damaged });
                    progress.send(line).await;
                }
            }
        };
        let (report, mended) = found.map_err(failed)?;
        damaged_chunks += report.damaged.len();
        damaged_files += mended.files().len();
        to_read += u32::from(!report.whole);
        let complete = !listed.is_removed() && listed.has_all();
        incomplete += usize::from(!complete);
        results.push(json!({
            "manifest": digest,
            "checked": report.checked,
            "damaged": scrub::ranges(&report.damaged),
            "damaged_chunks": report.damaged.len(),
            "damaged_files": mended.files().join(", "),
            // Not damage alone: a copy may have been under way.
            "whole": report.whole && complete,
            "state": match () {
                () if listed.is_removed() => "its files are gone: reported to the manager, to be fetched anew",
                () if !report.whole => "broken off",
                () if !report.damaged.is_empty() => "to be repaired",
                () if !listed.has_all() => "not complete yet",
                () if !mended.is_nothing() => "good: what was damaged beside the data was written anew",
                () => "good",
            },
        }));
    }
    // What is not whole any more is reported, so that the manager has it made whole.
    seeder.wake.sync.notify_one();
    let all = results.len();
    let orders = match seeder.notes.manager.get() {
        None => "the manager is told of it now, and orders what is missing from other seeders".to_owned(),
        Some(trouble) => {
            format!(
                "the manager orders what is missing from other seeders once it is told, and now it is not: {trouble}"
            )
        }
    };
    let mut says = Vec::new();
    if damaged_files > 0 {
        says.push(format!("files beside the data that were damaged: {damaged_files}"));
    }
    if unusable > 0 {
        says.push(format!("contents that cannot be used for that, see their states: {unusable}"));
    }
    says.push(match (damaged_chunks, to_read) {
        (0, 0) if incomplete > 0 => format!(
            "{} is good, and {incomplete} of {all} contents are not complete: {orders}",
            if damaged_files > 0 { "the rest" } else { "what is stored" }
        ),
        (0, 0) if unusable > 0 => "the rest is good".to_owned(),
        (0, 0) if damaged_files > 0 => "they were written anew, and everything that is stored is good".to_owned(),
        (0, 0) => "everything that is stored is good".to_owned(),
        (0, _) => "broken off: not everything was read".to_owned(),
        (damaged, _) => format!("{damaged} chunks are damaged or gone and not served: {orders}"),
    });
    Ok(json!({
        "contents": results, "damaged_chunks": damaged_chunks, "damaged_files": damaged_files, "says": says.join("; "),
    }))
}
