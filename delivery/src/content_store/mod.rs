//! Content must survive kill -9, full disks and bad sectors without ever passing off damaged bytes as good ones. So
//! there is one folder per content, named by the digest of its signed manifest, in which data come first and the note
//! that they are there comes second; and everything else in the folder proves itself against that digest.
//!
//! ```text
//! <root>/<hex digest of the signed manifest>/
//!     manifest    the signed manifest's bytes
//!     content     ciphertext: preallocated, each chunk written in its place; or what another [`Body`] keeps instead
//!     segments    chaining values, 32 bytes a chunk, in order; a segment counts when it fits the manifest
//!     have        which chunks are verified and synced; absent: none
//!     complete    empty; present once all of it is there and was checked against the content root
//! ```
//!
//! Everything here blocks: call it on blocking threads.

mod body;
mod content;
mod disk;
mod error;
mod freshness;
mod have;
mod mend;
mod segments;
mod verify;
mod writer;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use protocol::manifest::Manifest;
use protocol::{Digest, Signed};
use store::Step;

pub use body::{Bodies, Body, Ciphertext};
pub(crate) use content::bytes_of;
pub use content::{Content, noted};
pub use disk::{FileError, Lacks, free_inodes, free_space, reserve};
pub use error::{
    ContentError, CreateError, Damaged, FinishError, Mending, NoSpace, ReadError, ReadSegmentError, ReadVerifiedError,
    SegmentError, SyncError, WriteError,
};
pub use freshness::{FRESH_MS, Stamp};
pub use have::sendable;
pub use mend::Mended;
pub use verify::{VerifyProgress, VerifyReport};
pub use writer::ContentWriter;

use disk::At;

/// Folders that are being made or taken apart begin with this; what a killed process leaves of them is removed at the
/// next [`ContentStore::open`].
const UNFINISHED: &str = ".unfinished-";

/// The stores that are open in this process: a manager and its origin share one, and each sees what the other adds.
static OPENED: Mutex<BTreeMap<PathBuf, Weak<Inner>>> = Mutex::new(BTreeMap::new());

/// All contents below one folder. One process may have it open at a time; the role's lock on its folder sees to that.
/// Within the process every store of one folder is the same one.
#[derive(Clone, Debug)]
pub struct ContentStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    entries: Mutex<Entries>,
    bodies: Arc<dyn Bodies>,
    // One recovery at a time.
    recovering: Mutex<()>,
}

#[derive(Debug, Default)]
struct Entries {
    good: BTreeMap<Digest, Arc<Content>>,
    damaged: BTreeMap<Digest, Hurt>,
    made: u64,
}

/// A content that cannot be used as it is.
#[derive(Debug)]
struct Hurt {
    why: Damaged,
    // What lies there: no manifest says it.
    bytes: u64,
}

impl ContentStore {
    /// Opens the store at `root`, making the folder if there is none, and removes what a killed process left
    /// unfinished. A content whose metadata are damaged does not keep the others from being used: it is listed by
    /// [`ContentStore::damaged`] and refused by name.
    ///
    /// # Errors
    /// [`FileError`] when the folder itself cannot be read or made.
    pub fn open(root: impl Into<PathBuf>) -> Result<ContentStore, FileError> {
        Self::open_with(root, Arc::new(Ciphertext::default()))
    }

    /// As [`ContentStore::open`], with the bytes kept in another way. Where the folder is open already, `bodies` has no
    /// say.
    ///
    /// # Errors
    /// As [`ContentStore::open`].
    pub fn open_with(root: impl Into<PathBuf>, bodies: Arc<dyn Bodies>) -> Result<ContentStore, FileError> {
        let root = root.into();
        fs::create_dir_all(&root).at(&root, "make the folder")?;
        let root = fs::canonicalize(&root).at(&root, "find the folder")?;
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inner) = opened.get(&root).and_then(Weak::upgrade) {
            return Ok(ContentStore { inner });
        }
        let mut entries = Entries::default();
        for entry in fs::read_dir(&root).at(&root, "list the folder")? {
            let path = entry.at(&root, "list the folder")?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if name.starts_with(UNFINISHED) {
                tracing::info!(path = %path.display(), "removing what an interrupted process left");
                fs::remove_dir_all(&path).at(&path, "remove the unfinished folder")?;
                continue;
            }
            // Other names belong to others: a client keeps its own files beside.
            let Ok(digest) = name.parse::<Digest>() else { continue };
            match Content::open(&path, digest, &*bodies).map_err(ContentError::or_damaged) {
                Ok(content) => drop(entries.good.insert(digest, Arc::new(content))),
                Err(ContentError::File(error)) => return Err(error),
                Err(ContentError::Damaged(damaged)) => {
                    tracing::warn!(content = %digest, %damaged, "content left out");
                    let bytes = match disk::bytes_in(&path) {
                        Err(error) if error.is_damage() => 0,
                        bytes => bytes?,
                    };
                    entries.damaged.insert(digest, Hurt { why: damaged, bytes });
                }
            }
        }
        let (entries, recovering) = (Mutex::new(entries), Mutex::default());
        let inner = Arc::new(Inner { root: root.clone(), entries, bodies, recovering });
        opened.retain(|_, other| other.strong_count() > 0);
        opened.insert(root, Arc::downgrade(&inner));
        Ok(ContentStore { inner })
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// All usable contents, complete or not, in the order of their digests.
    pub fn list(&self) -> Vec<Arc<Content>> {
        self.entries().good.values().cloned().collect()
    }

    /// Those of [`ContentStore::list`] that nobody uses at this moment.
    pub fn unused(&self) -> Vec<Arc<Content>> {
        self.entries().good.values().filter(|content| Arc::strong_count(content) == 1).cloned().collect()
    }

    /// Contents whose metadata are damaged, and how. [`ContentStore::restore`], [`ContentStore::recover`] or
    /// [`ContentStore::remove`] them.
    pub fn damaged(&self) -> Vec<(Digest, Damaged)> {
        self.entries().damaged.iter().map(|(digest, hurt)| (*digest, hurt.why.clone())).collect()
    }

    /// Bytes that lie there of a content whose metadata are damaged; 0 where there is none.
    pub fn damaged_bytes(&self, digest: &Digest) -> u64 {
        self.entries().damaged.get(digest).map_or(0, |hurt| hurt.bytes)
    }

    /// The content of a signed manifest's digest.
    pub fn get(&self, digest: &Digest) -> Option<Arc<Content>> {
        self.entries().good.get(digest).cloned()
    }

    /// Bytes that all contents take or will take: their full lengths, as they are preallocated, and what lies there of
    /// those that are damaged.
    pub fn total_bytes(&self) -> u64 {
        let entries = self.entries();
        let good: u64 = entries.good.values().map(|content| content.manifest().length).sum();
        good.saturating_add(entries.damaged.values().map(|hurt| hurt.bytes).sum())
    }

    /// The place for a content that is to be fetched. Where there is one already, with whatever it holds, it is that
    /// one. The signature of the manifest must have been checked.
    ///
    /// # Errors
    /// [`CreateError::NoSpace`] before anything is written when the disk is too full; nothing is left behind on errors.
    pub fn create(&self, signed: &Signed<Manifest>, manifest: &Manifest) -> Result<Arc<Content>, CreateError> {
        let digest = signed.digest();
        if let Some(found) = self.known(&digest)? {
            return Ok(found);
        }
        error::check_pair(signed, manifest)?;
        let unfinished = self.unfinished(self.inner.bodies.needs(manifest))?;
        self.inner.bodies.make(&unfinished.path, manifest)?;
        segments::make_file(&unfinished.path, manifest)?;
        have::make(&unfinished.path.join(content::HAVE), manifest.chunks())?;
        disk::write_new(&unfinished.path.join(content::MANIFEST), &protocol::codec::encode(signed))?;
        self.adopt(unfinished, digest)
    }

    /// A writer for a content that is being published, of about `expected` bytes.
    ///
    /// # Errors
    /// As [`ContentStore::create`].
    pub fn writer(&self, expected: u64) -> Result<ContentWriter, CreateError> {
        let unfinished = self.unfinished(expected)?;
        ContentWriter::start(self.clone(), unfinished, expected)
    }

    /// Forgets a content and deletes its files, damaged ones included. Whoever still uses it gets
    /// [`ReadError::Removed`] or [`WriteError::Removed`] from now on. False when there was none.
    ///
    /// # Errors
    /// [`FileError`] when the files cannot be deleted; the content is not served any more all the same.
    pub fn remove(&self, digest: &Digest) -> Result<bool, FileError> {
        self.remove_if(digest, |_| true)
    }

    /// As [`ContentStore::remove`], unless somebody uses it at this moment: whoever was given it by this store and has not
    /// dropped it yet. False when it is in use, or when there was none.
    ///
    /// # Errors
    /// As [`ContentStore::remove`].
    pub fn remove_unused(&self, digest: &Digest) -> Result<bool, FileError> {
        // Handed out under the same lock, so that nobody can begin to use it between the look and the removal.
        self.remove_if(digest, |content| Arc::strong_count(content) == 1)
    }

    fn remove_if(&self, digest: &Digest, may_go: impl FnOnce(&Arc<Content>) -> bool) -> Result<bool, FileError> {
        let path = self.folder(digest);
        let away = {
            let mut entries = self.entries();
            if entries.good.get(digest).is_some_and(|content| !may_go(content)) {
                return Ok(false);
            }
            let content = entries.good.remove(digest);
            if content.is_none() && entries.damaged.remove(digest).is_none() {
                return Ok(false);
            }
            if let Some(content) = content {
                content.mark_removed();
            }
            entries.next_name(&self.inner.root)
        };
        // A rename is one step: the content is there or not, whenever the power fails.
        match fs::rename(&path, &away) {
            // Somebody else deleted it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
            renamed => renamed.at(&path, "remove the content")?,
        }
        disk::sync_folder(&self.inner.root)?;
        fs::remove_dir_all(&away).at(&away, "remove the content")?;
        Ok(true)
    }

    /// Makes a content with a damaged note of what it holds usable again: all its data are read and checked, and what
    /// verifies is kept. The manifest itself must be sound.
    ///
    /// # Errors
    /// [`ContentError`] when the manifest is damaged too: [`ContentStore::restore`] it then, or remove the content and
    /// fetch it again.
    pub fn recover(&self, digest: &Digest) -> Result<Arc<Content>, ContentError> {
        self.recover_one(&self.recovering(), digest, &|| true)
    }

    /// Makes a damaged content usable again by its manifest, whose signature must have been checked: what verifies of the
    /// data is kept. Where they cannot be told apart at all, the place is made anew, with nothing in it. It is broken off
    /// once `go_on` says so, with the content as damaged as before.
    ///
    /// # Errors
    /// [`CreateError`].
    pub fn restore(
        &self,
        signed: &Signed<Manifest>,
        manifest: &Manifest,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Arc<Content>, CreateError> {
        error::check_pair(signed, manifest)?;
        let (one, digest) = (self.recovering(), signed.digest());
        let folder = self.folder(&digest);
        if self.entries().damaged.contains_key(&digest) && folder.try_exists().at(&folder, "look for")? {
            mend::write_manifest(&folder, signed)?;
        }
        match self.recover_one(&one, &digest, go_on) {
            Err(ContentError::Damaged(damaged)) if go_on() => {
                tracing::warn!(content = %digest, %damaged, "nothing of this content can be used: its place is made anew");
                self.remove(&digest)?;
                self.create(signed, manifest)
            }
            recovered => Ok(recovered?),
        }
    }

    // Guards no data.
    fn recovering(&self) -> MutexGuard<'_, ()> {
        self.inner.recovering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recover_one(
        &self,
        _one: &MutexGuard<'_, ()>,
        digest: &Digest,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Arc<Content>, ContentError> {
        if let Some(content) = self.get(digest) {
            return Ok(content);
        }
        let content = Content::open_unnoted(&self.folder(digest), *digest, &*self.inner.bodies);
        let content = content.map_err(ContentError::or_damaged)?;
        content.mend(go_on)?;
        let report =
            content.verify_all(&mut |_| if go_on() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) });
        if !report?.whole || !go_on() {
            let what = "its check was broken off".to_owned();
            return Err(Damaged { file: content.folder().to_owned(), what }.into());
        }
        match content.sync() {
            Err(SyncError::File(error)) => return Err(error.into()),
            Ok(()) | Err(SyncError::Removed) => {}
        }
        let content = Arc::new(content);
        let mut entries = self.entries();
        entries.damaged.remove(digest);
        entries.good.insert(*digest, Arc::clone(&content));
        Ok(content)
    }

    fn known(&self, digest: &Digest) -> Result<Option<Arc<Content>>, CreateError> {
        let entries = self.entries();
        match entries.damaged.get(digest) {
            Some(hurt) => Err(CreateError::Damaged(hurt.why.clone())),
            None => Ok(entries.good.get(digest).cloned()),
        }
    }

    fn folder(&self, digest: &Digest) -> PathBuf {
        self.inner.root.join(digest.to_string())
    }

    fn unfinished(&self, needed: u64) -> Result<Unfinished, CreateError> {
        let root = &self.inner.root;
        let free = free_space(root)?;
        // Metadata and the file system's own needs: chaining values are at most 1/2048 of the content.
        let needed = needed.saturating_add(needed / 1024).saturating_add(64 * 1024);
        if free < needed {
            return Err(CreateError::NoSpace(NoSpace { path: root.clone(), needed, free }));
        }
        let path = self.entries().next_name(root);
        fs::create_dir(&path).at(&path, "make the folder")?;
        Ok(Unfinished { path, kept: false })
    }

    /// Moves a finished folder into its place and opens it.
    fn adopt(&self, mut unfinished: Unfinished, digest: Digest) -> Result<Arc<Content>, CreateError> {
        let path = self.folder(&digest);
        disk::sync_folder(&unfinished.path)?;
        // Held over the rename, so that of two who make the same content one is first and the other finds it.
        let mut entries = self.entries();
        if let Some(first) = entries.good.get(&digest) {
            return Ok(Arc::clone(first));
        }
        Step::ContentMade.before();
        fs::rename(&unfinished.path, &path).at(&path, "move the new content into its place")?;
        unfinished.kept = true;
        disk::sync_folder(&self.inner.root)?;
        Step::ContentMade.after();
        let content = Arc::new(Content::open(&path, digest, &*self.inner.bodies)?);
        entries.good.insert(digest, Arc::clone(&content));
        Ok(content)
    }

    // A thread that panicked while it held this lock was between two map operations.
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.inner.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn next_name(&mut self, root: &Path) -> PathBuf {
        self.made += 1;
        root.join(format!("{UNFINISHED}{}-{}", std::process::id(), self.made))
    }
}

/// A folder that is deleted unless it is moved into its place.
#[derive(Debug)]
struct Unfinished {
    path: PathBuf,
    kept: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "unfinished folder left; the next start removes it");
        }
    }
}
