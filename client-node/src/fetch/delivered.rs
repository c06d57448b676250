//! What earlier runs put in its place is the nearest seeder: before anything is asked for, intact chunks are read back out
//! of the delivered files, so that only what is damaged, missing or was never chosen comes over the network.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use delivery::{Content, ContentStore, CreateError, Progress, SyncError, WriteError};
use protocol::cipher::{ContentSecret, FrameCipher, TAG_LEN};
use protocol::manifest::{Manifest, SEGMENT_CHUNKS, Segment};
use protocol::pack::{self, EntryKind, FileList};
use protocol::{ChunkSet, Digest, Signed, TransactionId};
use tokio_util::sync::CancellationToken;

use super::finish::{inode_of, outcome_of, what_is_there};
use super::key::open_grant;
use super::run::{Reporter, Run, until};
use super::ticket::Checked;
use super::{FetchError, FetchOptions, FetchOutcome, FetchPhase, MOST_NAMED};
use crate::home::{Home, blocking};
use crate::in_place::{InPlace, InPlaceBodies};
use crate::layout::{Inventory, Layout};
use crate::library::{Delivery, DeliveryState};
use crate::place::{clear, work_dir};
use crate::plain::{Listed, PlainError, listed, payload, plain_length};
use crate::unpack::{Selection, UnpackError, is_below, selects};
use crate::verify::{FileState, VerifyError, look_over, read_inventory, read_values};

/// How often it is told how far reading is.
const SHOWN_EVERY: Duration = Duration::from_millis(100);

/// Which part of a product a run is to bring.
#[derive(Clone, Debug)]
pub(super) enum Wanted {
    /// All of it.
    Everything,
    /// What these name: paths, folders, patterns.
    Named(Vec<String>),
    /// These entries, and what is in those of them that are folders: all else that was asked for is in its place, sound.
    Mending(Arc<HashSet<String>>),
}

impl Wanted {
    pub(super) fn of(only: &[String]) -> Wanted {
        if only.is_empty() { Wanted::Everything } else { Wanted::Named(only.to_vec()) }
    }

    pub(super) fn is_everything(&self) -> bool {
        matches!(self, Wanted::Everything)
    }

    pub(super) fn selection(&self, list: &FileList) -> Result<Selection, UnpackError> {
        match self {
            Wanted::Everything => Ok(Selection::all()),
            Wanted::Named(only) => Selection::of(list, only),
            Wanted::Mending(paths) => Ok(Selection::where_is(list, |path| is_below(path, paths))),
        }
    }
}

/// What is to be done, after a look at what earlier runs delivered into the folder.
pub(super) enum Standing {
    /// Nothing: what is asked for is there, and sound.
    Here(Box<FetchOutcome>),
    /// This much is to come.
    Wanting(Wanted),
}

/// Looks at what was delivered into this folder before: all of it is read, which may take long.
pub(super) async fn standing(
    home: &Home,
    transaction: TransactionId,
    out: &Path,
    options: &FetchOptions,
    progress: &Reporter,
    cancel: &CancellationToken,
) -> Result<Standing, FetchError> {
    let (home, out, only) = (home.clone(), out.to_owned(), options.only.clone());
    let (progress, cancel) = (progress.clone(), cancel.clone());
    blocking(move || {
        let all = Standing::Wanting(Wanted::of(&only));
        let Some(delivery) = home.library().get(&transaction)? else { return Ok(all) };
        let Some(path) = delivery.place().filter(|path| path.parent() == Some(&out)) else { return Ok(all) };
        if delivery.state != DeliveryState::Done || inode_of(&path).is_none() {
            return Ok(all);
        }
        let looked = look_over(&home, transaction, &delivery, path.clone(), reading(&progress, &cancel));
        progress.send_modify(|p| (p.phase, p.transfer) = (FetchPhase::Preparing, Progress::default()));
        let (report, list) = match looked {
            Ok(found) => found,
            Err(VerifyError::Stopped) => return Err(FetchError::Cancelled),
            // Of what cannot be verified everything is asked for; chunks that fit are still taken from it.
            Err(_) => return Ok(all),
        };
        // Names what is not in the product.
        let asked = Selection::of(&list, &only)?;
        // A part that grows to the whole is completed as one, and the manager told so.
        if only.is_empty() && !delivery.only.is_empty() {
            return Ok(all);
        }
        let bad = report.files.into_iter().filter(|file| file.state != FileState::Ok);
        let mut bad: HashSet<String> = bad.map(|file| file.path).collect();
        let chosen = |path: &str| delivery.only.is_empty() || delivery.only.iter().any(|only| selects(only, path));
        bad.extend(list.entries.iter().map(|entry| &entry.path).filter(|path| !chosen(path)).cloned());
        let entries = list.entries.iter().enumerate().filter(|(index, _)| asked.has(*index));
        let (mut needed, mut total, mut wanting) = (0, 0, HashSet::new());
        for (_, entry) in entries {
            let size = if let EntryKind::File { size, .. } = entry.kind { size } else { 0 };
            total += size;
            if is_below(&entry.path, &bad) {
                needed += size;
                wanting.insert(entry.path.clone());
            }
        }
        Ok(match wanting.is_empty() {
            true => Standing::Here(Box::new(FetchOutcome {
                already_here: true,
                ..outcome_of(transaction, &delivery, path)
            })),
            // Where most of it is gone, it is decrypted as it comes, which takes less space than a part does.
            false if only.is_empty() && needed > total / 2 => all,
            false => Standing::Wanting(Wanted::Mending(Arc::new(wanting))),
        })
    })
    .await
}

/// Tells how much of what was delivered is read, until the fetch is stopped.
fn reading(progress: &Reporter, cancel: &CancellationToken) -> impl FnMut(u64, u64) -> ControlFlow<()> {
    let mut shown = Instant::now();
    progress.send_modify(|p| p.phase = FetchPhase::Checking);
    move |done, total| {
        if shown.elapsed() > SHOWN_EVERY {
            shown = Instant::now();
            progress.send_modify(|p| (p.transfer.have_bytes, p.transfer.total_bytes) = (done, total));
        }
        until(cancel)
    }
}

/// A run that was killed after its goods were in their place left its work folder behind: where nothing is to come, nothing
/// of it is needed. One that was to bring more than what is here keeps it, whatever parts came in the meantime.
pub(super) async fn clear_away(
    home: &Home,
    transaction: TransactionId,
    out: &Path,
    options: &FetchOptions,
) -> Result<(), FetchError> {
    let (library, work, everything) = (home.library(), work_dir(out, transaction), options.only.is_empty());
    let (home, out) = (home.clone(), out.to_owned());
    blocking(move || {
        let Some(delivery) = library.get(&transaction)? else { return Ok(()) };
        let ended = delivery.last_run_ended();
        if !(everything || ended) || (ended && delivery.trouble.is_none() && !work.exists()) {
            return Ok(());
        }
        if everything || !holds_more(&home, transaction, &delivery, (&out, &work))? {
            clear(&work)?;
        }
        Ok(library.update(transaction, |delivery| {
            delivery.trouble = None;
            delivery.started_at = delivery.started_at.min(delivery.finished_at);
        })?)
    })
    .await
}

/// Is there in a work folder what does not lie in its place yet?
fn holds_more(
    home: &Home,
    transaction: TransactionId,
    delivery: &Delivery,
    (out, work): (&Path, &Path),
) -> Result<bool, FetchError> {
    let Some(manifest) = delivery.manifest.as_ref().map(Signed::digest).filter(|_| work.exists()) else {
        return Ok(false);
    };
    let secret = open_grant(home.keypair(), delivery);
    let delivered = Delivered::find(home, transaction, &manifest, out, secret.clone())?;
    // Without its records nobody can say.
    let (Some(delivered), Some(secret)) = (delivered, secret) else { return Ok(true) };
    let store = ContentStore::open_with(work, Arc::new(InPlaceBodies::new(secret, false)))?;
    let placed = delivered.chunks(&Wanted::of(&delivery.only))?;
    Ok(store.get(&manifest).is_some_and(|content| !placed.is_superset(&content.have())))
}

/// What the library says of a place that several runs may have brought something to.
pub(super) struct Sum {
    /// What was chosen of it, by all of them; empty for everything.
    pub(super) only: Vec<String>,
    pub(super) files: u32,
    pub(super) bytes: u64,
    /// Ciphertext bytes of these files.
    pub(super) have: u64,
    /// The chunks that they lie in, and the list of files.
    pub(super) chunks: ChunkSet,
}

/// What one run brought, `only`, and with `before` what lay in its place from earlier ones.
pub(super) fn sum(content: &Content, list: &Listed, before: Option<&[String]>, only: &[String]) -> Sum {
    let manifest = content.manifest();
    let only = match before {
        Some(before) if before.is_empty() || only.is_empty() => Vec::new(),
        Some(before) => union(before, only),
        None => only.to_vec(),
    };
    let selection = Selection::of(&list.list, &only).unwrap_or_else(|_| Selection::all());
    let chosen = list.list.entries.iter().enumerate().filter(|(index, _)| selection.has(*index));
    let sizes = chosen.filter_map(|(_, entry)| match entry.kind {
        EntryKind::File { size, .. } => Some(size),
        _ => None,
    });
    let (files, bytes) = sizes.fold((0, 0), |(files, bytes), size| (files + 1, bytes + size));
    let layout = Layout::new(PathBuf::new(), list.clone(), selection, payload(manifest));
    let chunks = layout.chunks().union(&head_chunks(list.head, manifest));
    let have = if only.is_empty() { manifest.length } else { content.bytes_of(&chunks) };
    Sum { only, files, bytes, have, chunks }
}

/// The names of what came are kept, to know what belongs there: before anything comes, can they be?
pub(super) async fn check_names(home: &Home, transaction: TransactionId, only: &[String]) -> Result<(), FetchError> {
    if only.is_empty() {
        return Ok(());
    }
    let (library, only) = (home.library(), only.to_vec());
    blocking(move || {
        let names = match library.get(&transaction)? {
            Some(known) if known.state == DeliveryState::Done && known.only.is_empty() => Vec::new(),
            Some(known) if known.state == DeliveryState::Done => union(&known.only, &only),
            _ => only,
        };
        // With the length that stands before each.
        let bytes: usize = names.iter().map(|name| name.len() + size_of::<u32>()).sum();
        if bytes > MOST_NAMED { Err(FetchError::TooManyNames) } else { Ok(()) }
    })
    .await
}

/// All that either names, without what another one of them stands for.
fn union(before: &[String], only: &[String]) -> Vec<String> {
    let mut all: Vec<String> = before.to_vec();
    for new in only {
        if !all.iter().any(|known| selects(known, new)) {
            all.retain(|known| !selects(new, known));
            all.push(new.clone());
        }
    }
    all
}

/// The list of an inventory, checked.
pub(super) fn list_of(inventory: &Inventory, manifest: &Manifest) -> Result<Listed, PlainError> {
    let mut head = pack::header(inventory.list.len() as u64).to_vec();
    head.extend_from_slice(&inventory.list);
    listed(&head, plain_length(manifest))
}

fn head_chunks(head: u64, manifest: &Manifest) -> ChunkSet {
    ChunkSet::from_range(0..u32::try_from(head.div_ceil(payload(manifest))).unwrap_or(u32::MAX).min(manifest.chunks()))
}

/// A delivery of this purchase that lies where the next one is to be put.
pub(super) struct Delivered {
    out: PathBuf,
    listed: Listed,
    signed: Signed<Manifest>,
    manifest: Manifest,
    values: Vec<Option<[u8; 32]>>,
    secret: ContentSecret,
}

impl Delivered {
    /// What lies there of the same content, if anything does and this home has its records.
    pub(super) fn find(
        home: &Home,
        transaction: TransactionId,
        digest: &Digest,
        out: &Path,
        secret: Option<ContentSecret>,
    ) -> Result<Option<Delivered>, FetchError> {
        let library = home.library();
        let delivery: Option<Delivery> = library.get(&transaction)?;
        let signed = delivery.and_then(|delivery| delivery.manifest).filter(|signed| signed.digest() == *digest);
        let (Some(signed), Some(secret)) = (signed, secret) else { return Ok(None) };
        let Some(manifest) = signed.peek().ok().filter(|manifest| manifest.check(manifest.network).is_ok()) else {
            return Ok(None);
        };
        let folder = home.content_dir(digest);
        let records = read_inventory(&folder).and_then(|(inventory, _)| {
            let values = read_values(&folder, &manifest, true)?;
            Ok((inventory, values))
        });
        let Ok((inventory, values)) = records else { return Ok(None) };
        let Ok(listed) = list_of(&inventory, &manifest) else { return Ok(None) };
        let place = out.join(&listed.list.name);
        if what_is_there(&library, transaction, &place)?.is_none() {
            return Ok(None);
        }
        Ok(Some(Delivered { out: out.to_owned(), listed, signed, manifest, values, secret }))
    }

    /// The chunks with the bytes of what is chosen, and those with the list of files.
    pub(super) fn chunks(&self, wanted: &Wanted) -> Result<ChunkSet, FetchError> {
        if wanted.is_everything() {
            return Ok(ChunkSet::from_range(0..self.manifest.chunks()));
        }
        let chosen = self.layout(wanted.selection(&self.listed.list)?).chunks();
        Ok(chosen.union(&head_chunks(self.listed.head, &self.manifest)))
    }

    fn layout(&self, selection: Selection) -> Layout {
        self.layout_in(self.out.clone(), selection)
    }

    fn layout_in(&self, dir: PathBuf, selection: Selection) -> Layout {
        Layout::new(dir, self.listed.clone(), selection, payload(&self.manifest))
    }

    /// Takes over what is intact of these chunks; returns which. What cannot be read, or does not fit, is not.
    pub(super) fn give(
        &self,
        store: &ContentStore,
        needed: &ChunkSet,
        progress: &Reporter,
        cancel: &CancellationToken,
    ) -> Result<ChunkSet, FetchError> {
        let mut given = ChunkSet::new();
        let content = match store.create(&self.signed, &self.manifest) {
            Ok(content) => content,
            // The transfer names what keeps it from being made, or mends it.
            Err(CreateError::File(error)) => return Err(error.into()),
            Err(_) => return Ok(given),
        };
        let cipher = FrameCipher::new(&self.secret, self.manifest.content, self.manifest.chunks());
        let Some(cipher) = cipher else { return Ok(given) };
        // A run that ended while it put its files in place has some of a chunk's here and some there.
        let delivered = self.layout(Selection::all());
        let begun = content.body::<InPlace>().map(|body| self.layout_in(body.files(), Selection::all()));
        let sources: Vec<&Layout> = std::iter::once(&delivered).chain(&begun).collect();
        let total = content.bytes_of(needed);
        let (mut shown, mut frame) = (Instant::now(), Vec::new());
        'chunks: for chunk in needed.difference(&content.have()).iter() {
            if cancel.is_cancelled() {
                break;
            }
            if content.chaining_value(chunk)?.is_none() && !self.put_segment(&content, chunk / SEGMENT_CHUNKS) {
                continue;
            }
            for from in &sources {
                frame.resize((self.manifest.chunk_len(chunk) as usize).saturating_sub(TAG_LEN), 0);
                if from.read_or(Some(&delivered), chunk, &mut frame).is_err() || cipher.seal(chunk, &mut frame).is_err()
                {
                    continue;
                }
                match content.write_verified_chunk(chunk, &mut frame) {
                    Ok(_) => {
                        given.insert(chunk);
                        break;
                    }
                    Err(WriteError::Mismatch(_) | WriteError::NoChainingValue(_)) => {}
                    // With the rest still to come, the transfer says it.
                    Err(WriteError::DiskFull { .. } | WriteError::Removed) => break 'chunks,
                    Err(WriteError::Io(error)) => return Err(error.into()),
                }
            }
            if shown.elapsed() > SHOWN_EVERY {
                shown = Instant::now();
                let have = content.bytes_of(&content.have().intersection(needed));
                progress.send_modify(|p| (p.transfer.have_bytes, p.transfer.total_bytes) = (have, total));
            }
        }
        if given.is_empty() {
            return Ok(given);
        }
        match content.sync() {
            Err(SyncError::File(error)) => return Err(error.into()),
            Ok(()) | Err(SyncError::Removed) => {}
        }
        if content.has_all()
            && let Err(error) = content.finish()
        {
            tracing::warn!(%error, "all of it was taken over, and it is not whole");
        }
        tracing::info!(chunks = given.len(), "taken over from what was delivered before");
        Ok(given)
    }

    fn put_segment(&self, content: &Content, index: u32) -> bool {
        let range = self.manifest.segment_chunks(index);
        let values = self.values.get(range.start as usize..range.end as usize).unwrap_or_default();
        let values: Option<Vec<[u8; 32]>> = values.iter().copied().collect();
        values.is_some_and(|values| content.put_segment(index, Segment { values }).is_ok())
    }
}

impl Run<'_> {
    /// Takes over what is intact in the files that earlier runs delivered.
    pub(super) async fn take_over(&self) -> Result<(), FetchError> {
        let Some(delivered) = self.delivered.clone() else { return Ok(()) };
        let (needed, asked) = (delivered.chunks(&self.wanted)?, delivered.chunks(&Wanted::of(&self.options.only))?);
        let (store, progress, cancel) = (self.store.clone(), self.progress.clone(), self.cancel.clone());
        progress.send_modify(|p| p.phase = FetchPhase::Fetching);
        let sound = blocking(move || {
            let given = delivered.give(&store, &needed, &progress, &cancel)?;
            // What was asked for and is not to come lies in its place, sound.
            Ok::<_, FetchError>(asked.difference(&needed).union(&given))
        })
        .await?;
        if self.cancel.is_cancelled() {
            return Err(FetchError::Cancelled);
        }
        let mut earlier = self.earlier();
        earlier.sound = earlier.sound.union(&sound);
        Ok(())
    }

    /// Is all of it here that this run is to bring, as far as that is known before the list came?
    pub(super) fn has_all_wanted(&self, checked: &Checked) -> Result<bool, FetchError> {
        let (Some(delivered), Some(content)) = (&self.delivered, self.store.get(&checked.manifest)) else {
            return Ok(false);
        };
        Ok(content.have().is_superset(&delivered.chunks(&self.wanted)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_without_what_another_stands_for() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(union(&names(&["a"]), &names(&["b", "a"])), names(&["a", "b"]));
        assert_eq!(union(&names(&["art/x", "b"]), &names(&["art"])), names(&["b", "art"]));
        assert_eq!(union(&names(&["art"]), &names(&["art/x", "*.flac"])), names(&["art", "*.flac"]));
    }
}
