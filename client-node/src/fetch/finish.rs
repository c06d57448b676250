//! The end of a fetch: files out of verified chunks, records for later verification, and one rename.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use delivery::Content;
use protocol::TransactionId;
use protocol::cipher::ContentSecret;
use store::Step;

use super::delivered::{list_of, sum};
use super::run::{Run, millis};
use super::tally::Tally;
use super::{FetchError, FetchOutcome, FetchPhase};
use crate::home::{blocking, now_ms};
use crate::in_place::InPlace;
use crate::layout::{Layout, Unpacked};
use crate::library::{Delivery, DeliveryState, Library};
use crate::place::{PlaceError, clear, place};
use crate::plain::{Plain, Stored, payload};
use crate::shop::printable;
use crate::unpack::{UnpackError, unpack};
use crate::verify::keep_records;

impl Run<'_> {
    /// The files, from chunks that are all here.
    pub(super) async fn unpack(&self, content: &Arc<Content>, secret: &ContentSecret) -> Result<Unpacked, FetchError> {
        if content.body::<InPlace>().is_some() && self.wanted.is_everything() {
            let content = Arc::clone(content);
            let finish = move || content.body::<InPlace>().map_or(Err(UnpackError::Stopped), InPlace::finish);
            let unpacked = blocking(finish).await?;
            self.progress.send_modify(|p| (p.unpacked_bytes, p.plain_bytes) = (unpacked.bytes, unpacked.bytes));
            return Ok(unpacked);
        }
        self.progress.send_modify(|p| {
            p.phase = FetchPhase::Unpacking;
            p.waiting = None;
        });
        let manifest = content.manifest();
        let mut plain = Plain::new(Stored(Arc::clone(content)), manifest, secret).map_err(FetchError::Plain)?;
        let (payload, cancel, progress) = (payload(manifest), self.cancel.clone(), self.progress.clone());
        let (wanted, out, dir) = (self.wanted.clone(), self.out.clone(), unpacked_in(&self.work));
        blocking(move || {
            let listed = plain.list().map_err(UnpackError::Plain)?;
            let selection = wanted.selection(&listed.list)?;
            let layout = Layout::new(dir.clone(), listed, selection, payload);
            let needed = layout.bytes();
            // What an earlier run left there is not needed any more, and takes space.
            clear(&dir)?;
            let free = delivery::free_space(&out)?;
            if free < needed {
                return Err(FetchError::NoSpace { path: out, needed, free });
            }
            progress.send_modify(|p| p.plain_bytes = needed);
            let mut shown = Instant::now();
            let mut report = |bytes| {
                if shown.elapsed() > Duration::from_millis(100) || bytes == needed {
                    shown = Instant::now();
                    progress.send_modify(|p| p.unpacked_bytes = bytes);
                }
                !cancel.is_cancelled()
            };
            match unpack(&mut plain, &layout, &mut report) {
                Err(UnpackError::Stopped) => Err(FetchError::Cancelled),
                other => Ok(other?),
            }
        })
        .await
    }

    /// Is the place of a product of this name free, or taken by this purchase itself? Better asked before all of it came.
    pub(super) async fn check_place(&self, name: &str) -> Result<(), FetchError> {
        let (library, transaction, place) = (self.home.library(), self.transaction, self.out.join(name));
        blocking(move || what_is_there(&library, transaction, &place)).await.map(drop)
    }

    pub(super) async fn put_in_place(
        &self,
        content: Arc<Content>,
        unpacked: Unpacked,
        reported: bool,
        tally: Tally,
    ) -> Result<FetchOutcome, FetchError> {
        let (home, transaction, out, work) = (self.home.clone(), self.transaction, self.out.clone(), self.work.clone());
        let (only, resumed) = (self.options.only.clone(), self.resumed(&content));
        tracing::debug!(%transaction, files = unpacked.files, bytes = unpacked.bytes, "files are whole");
        let outcome = blocking(move || {
            let list = list_of(&unpacked.inventory, content.manifest()).map_err(FetchError::Plain)?;
            keep_records(&home, &content.digest(), &unpacked.inventory, &chaining_values(&content)?)?;
            let to = out.join(unpacked.top.file_name().unwrap_or_default());
            let library = home.library();
            let there = what_is_there(&library, transaction, &to)?;
            let before = library.get(&transaction)?.filter(|_| there.is_some()).map(|before| before.only);
            let sum = sum(&content, &list, before.as_deref(), &only);
            // A run that was to bring more was broken off before this one: it goes on with what it left.
            let left = if sum.chunks.is_superset(&content.have()) { work } else { unpacked_in(&work) };
            // Noted before the rename: a crash right after it must not make a stranger of what was just put there.
            let both: Vec<_> = there.into_iter().chain(inode_of(&unpacked.top)).collect();
            let (inodes, chosen) = (both.clone(), sum.only.clone());
            library.update_step(Step::ClientPlacing, transaction, move |delivery| {
                delivery.inodes.clone_from(&inodes);
                if delivery.state != DeliveryState::Done {
                    delivery.only.clone_from(&chosen);
                }
            })?;
            let kept_aside = place(&unpacked.top, &to, there)?;
            let now = inode_of(&to).filter(|now| both.contains(now));
            let (path, length) = (to.clone(), content.manifest().length);
            library.update_step(Step::ClientDone, transaction, move |delivery| {
                delivery.state = DeliveryState::Done;
                delivery.set_place(&path);
                delivery.inodes = now.into_iter().collect();
                delivery.only.clone_from(&sum.only);
                delivery.reported |= reported;
                delivery.finished_at = now_ms();
                (delivery.files, delivery.plain_bytes) = (sum.files, sum.bytes);
                (delivery.have_bytes, delivery.total_bytes) = (sum.have, length);
                delivery.trouble = None;
            })?;
            if let Err(error) = clear(&left) {
                // The goods are in their place; what is left over is only in the way.
                tracing::warn!(%error, "work folder not removed");
            }
            let delivery = library.get(&transaction)?.ok_or(FetchError::Unknown(transaction, String::new()))?;
            Ok::<_, FetchError>(FetchOutcome { kept_aside, ..outcome_of(transaction, &delivery, to) })
        })
        .await?;
        tracing::info!(step = 11, %transaction, files = outcome.files, path = %outcome.path.display(), "product in its place");
        Ok(FetchOutcome {
            bytes: tally.bytes,
            resumed_from: resumed + self.adopted.load(Ordering::Relaxed),
            duplicate_bytes: tally.duplicate_bytes,
            transfer_ms: millis(tally.duration),
            sources: tally.sources,
            ..outcome
        })
    }
}

/// The folder that a part is made in before it has its place.
fn unpacked_in(work: &Path) -> PathBuf {
    work.join("unpacked")
}

/// Device and inode of what lies at `place`, where that is what an earlier run of this purchase put there.
///
/// # Errors
/// [`PlaceError::Exists`] where it is anything else.
pub(super) fn what_is_there(
    library: &Library,
    transaction: TransactionId,
    place: &Path,
) -> Result<Option<(u64, u64)>, FetchError> {
    let Some(there) = inode_of(place) else { return Ok(None) };
    let known = library.get(&transaction)?.map(|known| known.inodes).unwrap_or_default();
    match known.contains(&there) {
        true => Ok(Some(there)),
        false => Err(FetchError::Place(PlaceError::Exists { path: place.to_owned() })),
    }
}

/// All chaining values; zeros for segments that were not needed.
fn chaining_values(content: &Content) -> Result<Vec<[u8; 32]>, FetchError> {
    let manifest = content.manifest();
    let mut values = Vec::with_capacity(manifest.chunks() as usize);
    for index in 0..manifest.segment_count() {
        match content.segment(index)? {
            Some(segment) => values.extend_from_slice(&segment.values),
            None => values.extend(manifest.segment_chunks(index).map(|_| [0; 32])),
        }
    }
    Ok(values)
}

pub(super) fn inode_of(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

pub(super) fn outcome_of(transaction: TransactionId, delivery: &Delivery, path: PathBuf) -> FetchOutcome {
    FetchOutcome {
        transaction,
        title: printable(&delivery.envelope.title, 200),
        bytes: 0,
        resumed_from: 0,
        duplicate_bytes: 0,
        transfer_ms: 0,
        total_ms: 0,
        first_chunk_ms: None,
        files: delivery.files,
        plain_bytes: delivery.plain_bytes,
        path,
        sources: Vec::new(),
        state: delivery.state,
        reported: delivery.reported,
        already_here: false,
        kept_aside: Vec::new(),
    }
}
