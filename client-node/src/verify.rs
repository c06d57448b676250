//! Are these still the files that were sold? They are packed and encrypted again, frame by frame, and compared with
//! what the network's catalogue signed; so the answer rests on the signature and not on this machine's notes, which
//! only tell two small files in one chunk apart.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use protocol::cipher::FrameCipher;
use protocol::codec::{self, Wire};
use protocol::manifest::{Manifest, SEGMENT_CHUNKS, Segment};
use protocol::pack::{self, Entry, EntryKind, FileList};
use protocol::{Digest, TransactionId};

use crate::fetch::open_grant;
use crate::home::{FileError, Home, as_text, blocking, read_file};
use crate::layout::Inventory;
use crate::library::{Delivery, DeliveryState, LibraryError};
use crate::plain::payload;
use crate::unpack::selects;

/// Names of files that do not belong there which are listed; further ones are counted.
const MAX_EXTRA: usize = 1000;

/// What is to be verified.
#[derive(Clone, Debug)]
pub enum VerifyTarget {
    /// What lies there, or in that folder.
    Path(PathBuf),
    /// What this transaction delivered, where it was put.
    Transaction(TransactionId),
    /// What this transaction delivered, which was moved there since.
    Moved(TransactionId, PathBuf),
}

/// How one file fares.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "state", content = "why")]
pub enum FileState {
    /// As it was sold.
    Ok,
    /// Changed.
    Damaged(String),
    /// Gone.
    Missing,
    /// Was never chosen to be fetched.
    NotFetched,
}

/// One file, folder or link.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FileReport {
    /// Its path in the product.
    pub path: String,
    /// How it fares.
    #[serde(flatten)]
    pub state: FileState,
}

/// What a verification found.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct VerifyReport {
    /// Whose goods.
    pub transaction: TransactionId,
    /// Where they are.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Every file, and the folders and links that are not as they were sold, in the order of the product's list.
    pub files: Vec<FileReport>,
    /// What lies there and was not sold, at most 1,000 names.
    pub extra: Vec<String>,
    /// How many there are of them.
    pub extra_count: usize,
    /// Chunks compared with the signed manifest.
    pub chunks: u32,
    /// Chunks that could not be, because parts of them were never fetched: their files were compared with what they
    /// hashed to when they came.
    pub unproven_chunks: u32,
    /// Bytes read.
    pub bytes: u64,
}

impl VerifyReport {
    /// Is everything that was fetched there and as it was sold? Extra files do not count against it.
    pub fn is_good(&self) -> bool {
        self.files.iter().all(|file| matches!(file.state, FileState::Ok | FileState::NotFetched))
    }

    /// Number of files in this state.
    pub fn count(&self, state: impl Fn(&FileState) -> bool) -> usize {
        self.files.iter().filter(|file| state(&file.state)).count()
    }
}

/// Why nothing could be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The library has nothing there.
    #[error("nothing at {} was delivered to this home{}; give the path that `fetch` printed", path.display(), hint(known))]
    Unknown {
        /// The path.
        path: PathBuf,
        /// Places of deliveries.
        known: Vec<PathBuf>,
    },
    /// Several deliveries lie in that folder.
    #[error("several deliveries lie in {}; name one of them: {}", path.display(), names(found))]
    Several {
        /// The folder.
        path: PathBuf,
        /// Their places.
        found: Vec<PathBuf>,
    },
    /// There is no such delivery, or it is not done.
    #[error("transaction {0} has not been delivered to this home; run: fetch {0}")]
    NotDelivered(TransactionId),
    /// What is needed for the comparison is gone from the home or damaged.
    #[error("{} is missing or damaged, and without it nothing can be compared; fetch again to restore it", path.display())]
    NoRecord {
        /// The file.
        path: PathBuf,
    },
    /// The key in the ticket does not open, or is not the manifest's.
    #[error("the content key of this delivery cannot be opened with this home's key")]
    NoKey,
    /// Whoever asked wants no answer any more.
    #[error("stopped")]
    Stopped,
    /// The library failed.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
}

fn hint(known: &[PathBuf]) -> String {
    if known.is_empty() { String::new() } else { format!(" (known: {})", names(known)) }
}

fn names(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths.iter().take(8).map(|path| path.display().to_string()).collect();
    shown.join(", ")
}

/// Verifies what was delivered. `progress` is told bytes read so far and bytes in all, on another thread.
///
/// # Errors
/// [`VerifyError`] when there is nothing to compare; damaged files are no error but what the report is for.
pub async fn verify(
    home: &Home,
    target: VerifyTarget,
    mut progress: impl FnMut(u64, u64) + Send + 'static,
) -> Result<VerifyReport, VerifyError> {
    let home = home.clone();
    blocking(move || {
        let (transaction, delivery, path) = find(&home, target)?;
        let progress = move |done, total| {
            progress(done, total);
            ControlFlow::Continue(())
        };
        look_over(&home, transaction, &delivery, path, progress).map(|(report, _)| report)
    })
    .await
}

fn find(home: &Home, target: VerifyTarget) -> Result<(TransactionId, Delivery, PathBuf), VerifyError> {
    let delivered = |transaction: TransactionId| -> Result<Delivery, VerifyError> {
        let found = home.library().get(&transaction)?;
        found.filter(|d| d.state == DeliveryState::Done).ok_or(VerifyError::NotDelivered(transaction))
    };
    match target {
        VerifyTarget::Moved(transaction, path) => Ok((transaction, delivered(transaction)?, path)),
        VerifyTarget::Transaction(transaction) => {
            let delivery = delivered(transaction)?;
            let path = delivery.place().ok_or(VerifyError::NotDelivered(transaction))?;
            Ok((transaction, delivery, path))
        }
        VerifyTarget::Path(path) => {
            let all = home.library().list()?;
            let done = all.into_iter().filter(|(_, d)| d.state == DeliveryState::Done);
            let placed: Vec<_> = done.filter_map(|(id, d)| d.place().map(|place| (id, d, place))).collect();
            // A top entry that is gone has no canonical path of its own, but its folder has.
            let wanted = canonical(&path).unwrap_or_else(|| path.clone());
            if let Some(found) = placed.iter().find(|(.., place)| *place == wanted) {
                return Ok(found.clone());
            }
            let inside: Vec<_> = placed.iter().filter(|(.., place)| place.parent() == Some(&wanted)).collect();
            match inside.as_slice() {
                [one] => Ok((*one).clone()),
                [] => {
                    let known = placed.into_iter().map(|(.., place)| place).collect();
                    Err(VerifyError::Unknown { path, known })
                }
                several => {
                    let found = several.iter().map(|(.., place)| place.clone()).collect();
                    Err(VerifyError::Several { path, found })
                }
            }
        }
    }
}

fn canonical(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::canonicalize(path).ok().or_else(|| Some(fs::canonicalize(parent).ok()?.join(name)))
}

/// How what was delivered to `path` fares, and the product's list. `progress` is told bytes read so far and bytes in all, and
/// may end it. Blocks.
pub(crate) fn look_over(
    home: &Home,
    transaction: TransactionId,
    delivery: &Delivery,
    path: PathBuf,
    progress: impl FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(VerifyReport, FileList), VerifyError> {
    let not_delivered = || VerifyError::NotDelivered(transaction);
    let signed = delivery.manifest.as_ref().ok_or_else(not_delivered)?;
    let data = delivery.envelope.ticket.data.peek().map_err(|_| not_delivered())?;
    let manifest = signed.peek().map_err(|_| not_delivered())?;
    if signed.digest() != data.manifest || manifest.check(data.network).is_err() {
        return Err(not_delivered());
    }
    let secret = open_grant(home.keypair(), delivery).filter(|secret| secret.commitment() == manifest.key_commitment);
    let secret = secret.ok_or(VerifyError::NoKey)?;
    let cipher = FrameCipher::new(&secret, manifest.content, manifest.chunks()).ok_or(VerifyError::NoKey)?;
    let folder = home.content_dir(&data.manifest);
    let (inventory, list) = read_inventory(&folder)?;
    let values = read_values(&folder, &manifest, !delivery.only.is_empty())?;

    let mut reader = Reader::new(&path, &list, &inventory, &delivery.only, payload(&manifest));
    let checked = reader.run(&manifest, &cipher, &values, progress)?;
    if checked.bad_head {
        return Err(VerifyError::NoRecord { path: folder.join(INVENTORY) });
    }
    let (extra, extra_count) = extra_entries(&path, &list);
    let report = VerifyReport {
        transaction,
        path,
        files: reader.reports(&checked.bad)?,
        extra,
        extra_count,
        chunks: checked.compared,
        unproven_chunks: checked.unproven,
        bytes: reader.read,
    };
    Ok((report, list))
}

pub(crate) const INVENTORY: &str = "files";
pub(crate) const SEGMENTS: &str = "segments";

pub(crate) fn read_inventory(folder: &Path) -> Result<(Inventory, FileList), VerifyError> {
    let path = folder.join(INVENTORY);
    let bytes = read_file(&path, <Inventory as Wire>::MAX)?;
    let inventory = bytes.and_then(|bytes| codec::decode::<Inventory>(&bytes).ok());
    let both = inventory.and_then(|inventory| {
        let list: FileList = codec::decode(&inventory.list).ok()?;
        list.check().is_ok().then_some((inventory, list))
    });
    both.ok_or(VerifyError::NoRecord { path })
}

/// The chaining value of each chunk, as far as it is known.
pub(crate) fn read_values(
    folder: &Path,
    manifest: &Manifest,
    partial: bool,
) -> Result<Vec<Option<[u8; 32]>>, VerifyError> {
    let path = folder.join(SEGMENTS);
    let expected = manifest.chunks() as usize * 32;
    let bytes = read_file(&path, expected)?.filter(|bytes| bytes.len() == expected);
    let values = bytes.map(|bytes| bytes.as_chunks::<32>().0.to_vec()).ok_or_else(|| no_record(&path))?;
    let mut checked = Vec::with_capacity(values.len());
    for (index, part) in (0..manifest.segment_count()).zip(values.chunks(SEGMENT_CHUNKS as usize)) {
        let segment = Segment { values: part.to_vec() };
        match manifest.check_segment(index, &segment) {
            Ok(()) => checked.extend(segment.values.into_iter().map(Some)),
            // Where only some files were fetched, not all segments were.
            Err(_) if partial => checked.extend(part.iter().map(|_| None)),
            Err(_) => return Err(no_record(&path)),
        }
    }
    Ok(checked)
}

fn no_record(path: &Path) -> VerifyError {
    VerifyError::NoRecord { path: path.to_owned() }
}

/// A file as the pack sees it.
struct Part<'a> {
    entry: &'a Entry,
    size: u64,
    chosen: bool,
    problem: Option<FileState>,
}

/// The pack, read again out of the files; absent bytes read as zeros.
struct Reader<'a> {
    root: PathBuf,
    head: Vec<u8>,
    list: &'a FileList,
    only: &'a [String],
    parts: Vec<Part<'a>>,
    /// What the parts of files hashed to in the chunks that they share.
    recorded: std::slice::Iter<'a, Option<[u8; 32]>>,
    payload: u64,
    read: u64,
    current: Option<(usize, Option<File>)>,
}

struct Checked {
    compared: u32,
    unproven: u32,
    /// For each chunk that does not fit, the files in it: an index range into the parts.
    bad: Vec<(usize, usize)>,
    /// A chunk with nothing but the list in it does not fit: the list kept at home is not the one published.
    bad_head: bool,
}

impl<'a> Reader<'a> {
    fn new(path: &Path, list: &'a FileList, inventory: &'a Inventory, only: &'a [String], payload: u64) -> Self {
        // A single file may have been renamed by its owner: its root is found through the name that it has now.
        let root = path.to_owned();
        let mut head = pack::header(inventory.list.len() as u64).to_vec();
        head.extend_from_slice(&inventory.list);
        let parts = list.entries.iter().filter_map(|entry| match entry.kind {
            EntryKind::File { size, .. } => {
                Some(Part { entry, size, chosen: is_chosen(only, &entry.path), problem: None })
            }
            _ => None,
        });
        let (parts, recorded) = (parts.collect(), inventory.parts.iter());
        Reader { root, head, list, only, parts, recorded, payload, read: 0, current: None }
    }

    fn path_of(&self, entry: &Entry) -> PathBuf {
        if self.list.single_file { self.root.clone() } else { self.root.join(&entry.path) }
    }

    fn run(
        &mut self,
        manifest: &Manifest,
        cipher: &FrameCipher,
        values: &[Option<[u8; 32]>],
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Checked, VerifyError> {
        let total: u64 = self.parts.iter().filter(|part| part.chosen).map(|part| part.size).sum();
        let mut checked = Checked { compared: 0, unproven: 0, bad: Vec::new(), bad_head: false };
        let mut frame = Vec::new();
        let (mut part, mut within) = (0, 0);
        let mut head = 0;
        let mut shares = Vec::new();
        for (chunk, value) in (0..manifest.chunks()).zip(values) {
            frame.clear();
            let room = usize::try_from(self.payload).unwrap_or(0);
            let from_head = self.head.get(head..).unwrap_or_default();
            let take = from_head.len().min(room);
            frame.extend_from_slice(from_head.get(..take).unwrap_or_default());
            head += take;
            let mut known = true;
            shares.clear();
            while frame.len() < room && part < self.parts.len() {
                let (start, take) = (frame.len(), (room - frame.len()) as u64);
                let (taken, is_known) = self.read_part(part, within, take, &mut frame)?;
                known &= is_known;
                within += taken;
                if taken > 0 {
                    shares.push((part, start..frame.len()));
                }
                if self.parts.get(part).is_some_and(|part| within >= part.size) {
                    self.finish_part(part)?;
                    part += 1;
                    within = 0;
                }
            }
            if progress(self.read, total).is_break() {
                return Err(VerifyError::Stopped);
            }
            self.compare_shares(&shares, &frame);
            let (true, Some(value)) = (known, value) else {
                checked.unproven += 1;
                continue;
            };
            checked.compared += 1;
            let sealed = cipher.seal(chunk, &mut frame).is_ok();
            if !sealed || !manifest.verifies(chunk, value, &frame) {
                match (shares.first(), shares.last()) {
                    (Some((first, _)), Some((last, _))) => checked.bad.push((*first, *last)),
                    _ => checked.bad_head = true,
                }
            }
        }
        // Empty files at the very end have no bytes that a chunk could hold.
        while part < self.parts.len() {
            self.finish_part(part)?;
            part += 1;
        }
        Ok(checked)
    }

    /// Where several files have bytes in a chunk, their records tell which one was changed.
    fn compare_shares(&mut self, shares: &[(usize, std::ops::Range<usize>)], frame: &[u8]) {
        if shares.len() < 2 {
            return;
        }
        for (part, range) in shares {
            let recorded = self.recorded.next().copied().flatten();
            let Some(part) = self.parts.get_mut(*part).filter(|part| part.chosen && part.problem.is_none()) else {
                continue;
            };
            let hash = frame.get(range.clone()).map(|bytes| *blake3::hash(bytes).as_bytes());
            if recorded.is_some() && recorded != hash {
                part.problem = Some(damaged("its bytes changed"));
            }
        }
    }

    /// Appends bytes of a part; how many, and whether they are known at all.
    fn read_part(
        &mut self,
        index: usize,
        within: u64,
        most: u64,
        frame: &mut Vec<u8>,
    ) -> Result<(u64, bool), VerifyError> {
        if self.current.as_ref().is_none_or(|(open, _)| *open != index) {
            let file = self.open_part(index)?;
            self.current = Some((index, file));
        }
        let Some(part) = self.parts.get_mut(index) else { return Ok((0, true)) };
        let take = most.min(part.size.saturating_sub(within));
        let end = frame.len() + usize::try_from(take).unwrap_or(0);
        if let Some((_, Some(file))) = &mut self.current {
            match file.by_ref().take(take).read_to_end(frame) {
                Ok(read) => self.read += read as u64,
                Err(error) => part.problem = Some(FileState::Damaged(format!("it cannot be read: {error}"))),
            }
        }
        frame.resize(end, 0);
        Ok((take, part.chosen))
    }

    fn open_part(&mut self, index: usize) -> Result<Option<File>, VerifyError> {
        let Some(part) = self.parts.get(index) else { return Ok(None) };
        if !part.chosen {
            return Ok(None);
        }
        let path = self.path_of(part.entry);
        let executable = matches!(part.entry.kind, EntryKind::File { executable: true, .. });
        let size = part.size;
        // Not through a link: it was a file when it was sold. Not blocking: a pipe may have taken its place.
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let flags = i32::try_from(flags.bits()).unwrap_or(0);
        let opened = fs::OpenOptions::new().read(true).custom_flags(flags).open(&path);
        let (file, problem) = match opened.and_then(|file| Ok((file.metadata()?, file))) {
            Ok((found, _)) if !found.is_file() => (None, Some(damaged("it is no file any more"))),
            Ok((found, file)) if found.len() != size => {
                (Some(file), Some(damaged(&format!("it has {} bytes instead of {size}", found.len()))))
            }
            Ok((found, file)) if executable && found.permissions().mode() & 0o100 == 0 => {
                (Some(file), Some(damaged("it is not executable any more")))
            }
            Ok((_, file)) => (Some(file), None),
            Err(error) if is_absent(&error) => (None, Some(FileState::Missing)),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
                (None, Some(damaged("it is a link now, not the file that was sold")))
            }
            Err(error) => (None, Some(damaged(&format!("it cannot be read: {error}")))),
        };
        if let Some(part) = self.parts.get_mut(index) {
            part.problem = problem;
        }
        Ok(file)
    }

    fn finish_part(&mut self, index: usize) -> Result<(), VerifyError> {
        // An empty file was never opened for its bytes.
        if self.current.as_ref().is_none_or(|(open, _)| *open != index) {
            self.open_part(index)?;
        }
        self.current = None;
        Ok(())
    }

    fn reports(&mut self, bad: &[(usize, usize)]) -> Result<Vec<FileReport>, VerifyError> {
        for (first, last) in bad {
            let Some(parts) = self.parts.get_mut(*first..=*last) else { continue };
            // A file that is known to be wrong explains it; otherwise each in the chunk may be the one.
            if parts.iter().all(|part| part.problem.is_none()) {
                let why =
                    if parts.len() == 1 { "its bytes changed" } else { "its bytes do not fit the signed manifest" };
                parts.iter_mut().for_each(|part| part.problem = Some(damaged(why)));
            }
        }
        let mut files: std::collections::HashMap<&str, FileState> = std::collections::HashMap::new();
        for part in &self.parts {
            let state = match (&part.problem, part.chosen) {
                (_, false) => FileState::NotFetched,
                (Some(problem), true) => problem.clone(),
                (None, true) => FileState::Ok,
            };
            files.insert(&part.entry.path, state);
        }
        let mut reports = Vec::new();
        for entry in &self.list.entries {
            let state = match &entry.kind {
                EntryKind::File { .. } => files.remove(entry.path.as_str()),
                _ if !is_chosen(self.only, &entry.path) => None,
                EntryKind::Folder => check_folder(&self.path_of(entry)),
                EntryKind::Link { target } => check_link(&self.path_of(entry), target),
            };
            if let Some(state) = state {
                reports.push(FileReport { path: entry.path.clone(), state });
            }
        }
        Ok(reports)
    }
}

fn is_chosen(only: &[String], path: &str) -> bool {
    only.is_empty() || only.iter().any(|wanted| selects(wanted, path))
}

fn damaged(why: &str) -> FileState {
    FileState::Damaged(why.to_owned())
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn check_folder(path: &Path) -> Option<FileState> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => None,
        Ok(_) => Some(damaged("it is no folder any more")),
        Err(_) => Some(FileState::Missing),
    }
}

fn check_link(path: &Path, target: &str) -> Option<FileState> {
    match fs::read_link(path) {
        Ok(found) if found == Path::new(target) => None,
        Ok(_) => Some(damaged("it points elsewhere")),
        Err(error) if is_absent(&error) => Some(FileState::Missing),
        Err(_) => Some(damaged("it is no link any more")),
    }
}

/// What lies in the product's folder and is not in its list. Folders are not entered through links.
fn extra_entries(root: &Path, list: &FileList) -> (Vec<String>, usize) {
    if list.single_file {
        return (Vec::new(), 0);
    }
    let known: HashSet<&str> = list.entries.iter().map(|entry| entry.path.as_str()).collect();
    let (mut names, mut count) = (Vec::new(), 0);
    let mut folders = vec![(root.to_owned(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        // A folder that cannot be read is reported by the files in it.
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let path = format!("{prefix}{}", name.to_string_lossy());
            if name.to_str().is_none() || !known.contains(path.as_str()) {
                count += 1;
                if names.len() < MAX_EXTRA {
                    names.push(path);
                }
            } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push((entry.path(), format!("{path}/")));
            }
        }
    }
    names.sort();
    (names, count)
}

/// Keeps what verification needs later, durably, with what is known from runs that brought other files of it.
pub(crate) fn keep_records(
    home: &Home,
    manifest: &Digest,
    inventory: &Inventory,
    values: &[[u8; 32]],
) -> Result<(), FileError> {
    let folder = home.content_dir(manifest);
    crate::home::make_private_dir(&folder)?;
    let (mut inventory, mut values) = (inventory.clone(), values.to_vec());
    // Of the same content both say the same, as far as they say anything; what is damaged shows by the manifest.
    if let Ok((before, _)) = read_inventory(&folder)
        && before.list == inventory.list
    {
        for (part, known) in inventory.parts.iter_mut().zip(before.parts) {
            *part = part.or(known);
        }
    }
    let known = read_file(&folder.join(SEGMENTS), values.len() * 32)?.unwrap_or_default();
    for (value, known) in values.iter_mut().zip(known.as_chunks::<32>().0) {
        if *value == [0; 32] {
            *value = *known;
        }
    }
    crate::home::replace_file(&folder.join(SEGMENTS), values.as_flattened(), true)?;
    crate::home::replace_file(&folder.join(INVENTORY), &codec::encode(&inventory), true)
}
