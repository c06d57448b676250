//! Reading contents again from end to end: when the operator asks for it, and by itself where a chunk was found damaged,
//! since a disk that lost one seldom lost only that.

use std::collections::BTreeSet;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use delivery::{Content, Damaged, FileError, Mended, VerifyProgress, VerifyReport};
use protocol::{ChunkSet, Digest};
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

use crate::clock::jittered;
use crate::context::Seeder;
use crate::replication::{MadeGood, make_good};

/// Damaged contents that cannot be made good are tried again after this, milliseconds.
const AGAIN_MS: u64 = 30_000;

/// Contents that a chunk was found damaged of, and that are to be read from end to end. As many as are stored at most.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    waiting: Mutex<BTreeSet<Digest>>,
    added: Notify,
}

impl Suspects {
    pub(crate) fn add(&self, content: Digest) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(content);
        self.added.notify_one();
    }

    fn first(&self) -> Option<Digest> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).first().copied()
    }

    fn remove(&self, content: &Digest) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(content);
    }
}

/// Reads suspect contents, one after the other, until the node stops.
pub(crate) async fn look_into(seeder: Arc<Seeder>) -> Result<(), std::convert::Infallible> {
    let token = seeder.supervisor.token();
    loop {
        while let Some(digest) = seeder.suspects.first() {
            if token.is_cancelled() {
                return Ok(());
            }
            if let Some(suspect) = seeder.contents.get(&digest) {
                match content(&seeder, suspect, watch::Sender::new(None)).await {
                    Ok((report, _)) => {
                        let (checked, damaged) = (report.checked, report.damaged.len());
                        tracing::warn!(content = %digest, checked, damaged, "a damaged content was read again");
                    }
                    Err(error) => {
                        tracing::error!(content = %digest, %error, "a damaged content cannot be read again");
                        seeder.notes.storage.set(error.to_string());
                    }
                }
            }
            // After it: what deliveries found meanwhile was found by this, too, or is not held any more.
            seeder.suspects.remove(&digest);
            // The manager has it made whole.
            seeder.wake.sync.notify_one();
        }
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = seeder.suspects.added.notified() => {}
        }
    }
}

/// Makes those contents good whose files beside the data are damaged, as far as it can, until there are none or the node
/// stops. They are found when the store is opened, and never later.
pub(crate) async fn mend_damaged(seeder: Arc<Seeder>) -> Result<(), std::convert::Infallible> {
    let token = seeder.supervisor.token();
    loop {
        let found = seeder.contents.damaged();
        if found.is_empty() {
            token.cancelled().await;
            return Ok(());
        }
        for (digest, damaged) in found {
            if token.is_cancelled() {
                return Ok(());
            }
            Box::pin(mend(&seeder, digest, &damaged)).await;
        }
        if seeder.contents.damaged().is_empty() {
            continue;
        }
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = tokio::time::sleep(Duration::from_millis(jittered(AGAIN_MS))) => {}
        }
    }
}

/// Makes one damaged content good, and says what became of it.
async fn mend(seeder: &Arc<Seeder>, digest: Digest, damaged: &Damaged) -> MadeGood {
    let made = make_good(seeder, digest).await;
    match &made {
        MadeGood::Kept(_) => {
            seeder.notes.storage.clear();
            seeder.wake.announce.notify_one();
            seeder.wake.sync.notify_one();
        }
        MadeGood::Removed(why) => tracing::warn!(content = %digest, %damaged, why, "a damaged content was removed"),
        MadeGood::NotYet(reason) => {
            tracing::warn!(content = %digest, %damaged, reason, "a damaged content is not made good yet");
            seeder.notes.storage.set(format!("content {digest}: {damaged}, and it is not made good yet: {reason}"));
        }
    }
    made
}

/// The same for a scrub: its line of the answer.
pub(crate) async fn damaged_line(seeder: &Arc<Seeder>, digest: Digest, damaged: &Damaged) -> Value {
    let made = Box::pin(mend(seeder, digest, damaged)).await;
    let (checked, missing, whole, state) = match made {
        MadeGood::Kept(content) if content.is_complete() => {
            (content.manifest().chunks(), ChunkSet::new(), true, "made good: all of it is kept".to_owned())
        }
        MadeGood::Kept(content) => {
            let chunks = content.manifest().chunks();
            let missing = ChunkSet::from_range(0..chunks).difference(&content.have());
            (chunks, missing, false, "made good, and what is missing is reported to the manager".to_owned())
        }
        MadeGood::Removed(why) => (0, ChunkSet::new(), false, format!("removed: {why}")),
        MadeGood::NotYet(why) => (0, ChunkSet::new(), false, format!("cannot be used, and is tried again: {why}")),
    };
    let file = damaged.file.file_name().map_or_else(|| "its folder".into(), |name| name.to_string_lossy());
    json!({
        "manifest": digest,
        "checked": checked,
        "damaged": ranges(&missing),
        "damaged_chunks": missing.len(),
        "damaged_files": file,
        "whole": whole,
        "state": state,
        "error": damaged.to_string(),
    })
}

/// Chunks for people: `4, 100 to 262`.
pub(crate) fn ranges(chunks: &ChunkSet) -> String {
    let range = |range: Range<u32>| match range.end.saturating_sub(1) {
        last if last == range.start => last.to_string(),
        last => format!("{} to {last}", range.start),
    };
    chunks.ranges().map(range).collect::<Vec<_>>().join(", ")
}

/// Reads a content from end to end, after the files beside its data were compared with what they have to be and made good.
/// Damaged chunks are counted and not held any more; a content whose files are gone is not held at all, so that it is
/// placed here anew. Broken off when the node stops.
pub(crate) async fn content(
    seeder: &Arc<Seeder>,
    content: Arc<Content>,
    seen: watch::Sender<Option<VerifyProgress>>,
) -> Result<(VerifyReport, Mended), FileError> {
    let (shared, path) = (Arc::clone(seeder), content.folder().to_owned());
    let checking = tokio::task::spawn_blocking(move || {
        let (digest, token) = (content.digest(), shared.supervisor.token());
        if !content.is_in_place()? {
            tracing::error!(content = %digest, "the files of this content are gone: it is not held any more");
            let damaged = content.have();
            shared.served.forget(&digest);
            shared.contents.remove(&digest)?;
            let report = VerifyReport { checked: damaged.len(), damaged, whole: true };
            return Ok((report, Mended::default()));
        }
        let mended = content.mend(&|| !token.is_cancelled())?;
        if !mended.is_nothing() {
            tracing::warn!(content = %digest, files = ?mended.files(), ?mended, "damaged files beside the data");
        }
        let report = content.verify_all(&mut |so_far| {
            seen.send_replace(Some(so_far));
            if token.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok((report, mended))
    });
    let (report, mended) = match checking.await {
        Ok(found) => found?,
        // Only a panic in there.
        Err(error) => return Err(FileError { path, doing: "check", source: std::io::Error::other(error) }),
    };
    seeder.counts.damaged.inc_by(u64::from(report.damaged.len()));
    Ok((report, mended))
}
