//! Reading contents again from end to end: when the operator asks for it, and by itself where a chunk was found damaged,
//! since a disk that lost one seldom lost only that.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use delivery::{Content, FileError, VerifyProgress, VerifyReport};
use protocol::Digest;
use tokio::sync::{Notify, watch};

use crate::context::Seeder;

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
                    Ok(report) => {
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

/// Reads a content from end to end. Damaged chunks are counted and not held any more; a content whose files are gone is not
/// held at all, so that it is placed here anew. Broken off when the node stops.
pub(crate) async fn content(
    seeder: &Arc<Seeder>,
    content: Arc<Content>,
    seen: watch::Sender<Option<VerifyProgress>>,
) -> Result<VerifyReport, FileError> {
    let (shared, path) = (Arc::clone(seeder), content.folder().to_owned());
    let checking = tokio::task::spawn_blocking(move || {
        if !content.is_in_place()? {
            tracing::error!(content = %content.digest(), "the files of this content are gone: it is not held any more");
            let damaged = content.have();
            shared.served.forget(&content.digest());
            shared.contents.remove(&content.digest())?;
            return Ok(VerifyReport { checked: damaged.len(), damaged, whole: true });
        }
        content.verify_all(&mut |so_far| {
            seen.send_replace(Some(so_far));
            if shared.supervisor.token().is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    });
    let report = match checking.await {
        Ok(report) => report?,
        // Only a panic in there.
        Err(error) => return Err(FileError { path, doing: "check", source: std::io::Error::other(error) }),
    };
    seeder.counts.damaged.inc_by(u64::from(report.damaged.len()));
    Ok(report)
}
