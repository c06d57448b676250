//! Chaining values on disk need no note of which are there: each segment proves itself against the manifest whenever it
//! is read, so a half-written one is the same as an absent one.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::manifest::{Manifest, SEGMENT_CHUNKS, Segment};

use super::disk::{self, At, FileError};

pub(super) const SEGMENTS: &str = "segments";
const VALUE: u64 = 32;
/// Segments kept in memory per content: 64 of 32 KiB cover 64 GiB of content at the usual chunk size. Beyond that the
/// one read longest ago is dropped and read again when it is needed.
const CACHED: usize = 64;

/// The chaining values of one content.
#[derive(Debug)]
pub(super) struct Segments {
    path: PathBuf,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    recent: VecDeque<(u32, Arc<Segment>)>,
    // Those found absent or damaged, so that each lookup does not read the disk.
    absent: std::collections::BTreeSet<u32>,
}

pub(super) fn make_file(folder: &Path, manifest: &Manifest) -> Result<(), FileError> {
    let path = folder.join(SEGMENTS);
    let file = File::create_new(&path).at(&path, "make")?;
    file.set_len(u64::from(manifest.chunks()) * VALUE).at(&path, "make")
}

/// Writes all values at once.
pub(super) fn write_file(folder: &Path, values: &[[u8; 32]]) -> Result<(), FileError> {
    disk::write_new(&folder.join(SEGMENTS), values.as_flattened())
}

impl Segments {
    pub(super) fn new(folder: &Path) -> Self {
        Segments { path: folder.join(SEGMENTS), cache: Mutex::default() }
    }

    pub(super) fn get(&self, manifest: &Manifest, index: u32) -> Result<Option<Arc<Segment>>, FileError> {
        {
            let cache = self.cache();
            if let Some((_, segment)) = cache.recent.iter().find(|(i, _)| *i == index) {
                return Ok(Some(Arc::clone(segment)));
            }
            if cache.absent.contains(&index) {
                return Ok(None);
            }
        }
        // Read without the lock: two who read the same at once do no harm.
        let read = self.read(manifest, index)?;
        let mut cache = self.cache();
        if let Some(segment) = &read {
            cache.remember(index, Arc::clone(segment));
            return Ok(read);
        }
        // Stored since it was read.
        let stored = cache.recent.iter().find(|(i, _)| *i == index).map(|(_, segment)| Arc::clone(segment));
        if stored.is_none() {
            cache.absent.insert(index);
        }
        Ok(stored)
    }

    fn read(&self, manifest: &Manifest, index: u32) -> Result<Option<Arc<Segment>>, FileError> {
        let segment = self.read_unchecked(manifest, index)?;
        Ok(segment.filter(|segment| manifest.check_segment(index, segment).is_ok()).map(Arc::new))
    }

    /// What lies on disk in the place of a segment, whatever it is.
    pub(super) fn read_unchecked(&self, manifest: &Manifest, index: u32) -> Result<Option<Segment>, FileError> {
        let chunks = manifest.segment_chunks(index);
        if chunks.is_empty() {
            return Ok(None);
        }
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.at(&self.path, "read")?,
        };
        let mut segment = Segment { values: vec![[0; 32]; chunks.len()] };
        // A bad sector is the same as a file that was cut off.
        match file.read_exact_at(segment.values.as_flattened_mut(), offset(index)).at(&self.path, "read") {
            Ok(()) => Ok(Some(segment)),
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A segment that was read or stored before, whatever became of it on disk since.
    pub(super) fn in_memory(&self, index: u32) -> Option<Arc<Segment>> {
        let cache = self.cache();
        cache.recent.iter().find(|(i, _)| *i == index).map(|(_, segment)| Arc::clone(segment))
    }

    /// Stores a segment that was checked against the manifest.
    pub(super) fn put(&self, index: u32, segment: Segment) -> Result<(), FileError> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&self.path);
        let file = file.at(&self.path, "write")?;
        file.write_all_at(segment.values.as_flattened(), offset(index)).at(&self.path, "write")?;
        let mut cache = self.cache();
        cache.absent.remove(&index);
        cache.remember(index, Arc::new(segment));
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<(), FileError> {
        File::open(&self.path).and_then(|file| file.sync_data()).at(&self.path, "sync")
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache {
    fn remember(&mut self, index: u32, segment: Arc<Segment>) {
        self.recent.retain(|(i, _)| *i != index);
        self.recent.push_back((index, segment));
        if self.recent.len() > CACHED {
            self.recent.pop_front();
        }
    }
}

fn offset(index: u32) -> u64 {
    u64::from(index) * u64::from(SEGMENT_CHUNKS) * VALUE
}
