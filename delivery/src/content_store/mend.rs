//! Beside its data a content has files that everything in it is told by: the manifest, the note of what is held, the
//! chaining values. A process that has them in memory does not notice when they go bad on disk, and the next one cannot
//! use the content. They are made good from what is in memory, or from the data: the manifest vouches for both.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, MutexGuard};

use protocol::codec::{self, Wire};
use protocol::manifest::{Manifest, Segment, chunk_value};
use protocol::{ChunkSet, Signed};

use super::content::{Content, MANIFEST};
use super::disk::{self, FileError};

/// Chaining values on disk that are not those of the data: up to so many, either may be the bad one of each pair.
const DOUBTFUL: usize = 10;

/// What lay on disk otherwise than it was written, beside the data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mended {
    /// The manifest's file was written anew.
    pub manifest: bool,
    /// The note of what is held was written anew.
    pub note: bool,
    /// Segments of chaining values that were written anew.
    pub segments: Vec<u32>,
    /// Segments that could not be: too much of the data for them is damaged, too.
    pub lost: Vec<u32>,
}

impl Mended {
    /// Was everything as it was written?
    pub fn is_nothing(&self) -> bool {
        *self == Mended::default()
    }

    /// The files that were not as they were written.
    pub fn files(&self) -> Vec<&'static str> {
        let segments = !self.segments.is_empty() || !self.lost.is_empty();
        let all = [(self.manifest, MANIFEST), (self.note, super::content::HAVE), (segments, super::segments::SEGMENTS)];
        all.into_iter().filter_map(|(hurt, file)| hurt.then_some(file)).collect()
    }
}

impl Content {
    /// Compares the files beside the data with what they have to be, and writes anew what is not. For as long as `go_on`
    /// says so: it is asked before each chunk that is read for it.
    ///
    /// # Errors
    /// [`FileError`] when something cannot be read or written.
    pub fn mend(&self, go_on: &dyn Fn() -> bool) -> Result<Mended, FileError> {
        let mut mended = Mended::default();
        if self.is_removed() {
            return Ok(mended);
        }
        mended.manifest = write_manifest(self.folder(), self.signed_manifest())?;
        mended.note = self.mend_note()?;
        let held = self.have();
        for index in 0..self.manifest().segment_count() {
            if !go_on() {
                break;
            }
            let lies = self.segments.read_unchecked(self.manifest(), index)?;
            if lies.as_ref().is_some_and(|segment| self.manifest().check_segment(index, segment).is_ok()) {
                continue;
            }
            let remembered = self.segments.in_memory(index).map(|segment| (*segment).clone());
            // Of a content that is still coming it may not be here yet, and then nothing of it is.
            let chunks = ChunkSet::from_range(self.manifest().segment_chunks(index));
            if remembered.is_none() && held.intersection(&chunks).is_empty() {
                continue;
            }
            let found = match remembered {
                None => self.segment_of_data(index, lies, go_on)?,
                found => found,
            };
            match found {
                Some(segment) => {
                    self.segments.put(index, segment)?;
                    mended.segments.push(index);
                }
                None if go_on() => mended.lost.push(index),
                None => {}
            }
        }
        if !mended.segments.is_empty() {
            self.segments.sync()?;
        }
        Ok(mended)
    }

    /// A segment that lies damaged and that is needed now. One at a time: the data are read for it once.
    pub(super) fn segment_again(
        &self,
        index: u32,
        mut lost: MutexGuard<'_, BTreeSet<u32>>,
    ) -> Result<Option<Arc<Segment>>, FileError> {
        if let Some(found) = self.segments.in_memory(index) {
            return Ok(Some(found));
        }
        if self.is_removed() || lost.contains(&index) {
            return Ok(None);
        }
        let lies = self.segments.read_unchecked(self.manifest(), index)?;
        let Some(segment) = self.segment_of_data(index, lies, &|| true)? else {
            tracing::warn!(content = %self.digest(), segment = index, "chaining values are damaged, and the data with them");
            lost.insert(index);
            return Ok(None);
        };
        tracing::warn!(content = %self.digest(), segment = index, "damaged chaining values were written anew");
        self.segments.put(index, segment)?;
        Ok(self.segments.in_memory(index))
    }

    /// A segment by the data that it is of. Where `lies`, which was found in its place, says otherwise of a few chunks,
    /// either may be damaged: what the manifest vouches for is the one that is right.
    fn segment_of_data(
        &self,
        index: u32,
        lies: Option<Segment>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Segment>, FileError> {
        let manifest = self.manifest();
        let fits = |segment: &Segment| manifest.check_segment(index, segment).is_ok();
        let mut segment = Segment::default();
        let mut buffer = Vec::new();
        for chunk in manifest.segment_chunks(index) {
            if !go_on() {
                return Ok(None);
            }
            let value = match self.read_unchecked(chunk, &mut buffer) {
                Ok(()) => chunk_value(manifest.chunk_offset(chunk), &buffer, manifest.chunks() == 1),
                Err(error) if error.is_damage() => [0; 32],
                Err(error) => return Err(error),
            };
            segment.values.push(value);
        }
        if fits(&segment) {
            return Ok(Some(segment));
        }
        let Some(lies) = lies else { return Ok(None) };
        let pairs = segment.values.iter().zip(&lies.values).enumerate();
        let doubtful: Vec<(usize, [u8; 32])> =
            pairs.filter(|(_, (read, lies))| read != lies).map(|(at, (_, lies))| (at, *lies)).collect();
        if doubtful.len() > DOUBTFUL {
            return Ok(None);
        }
        for choice in 1..1_u32 << doubtful.len() {
            let mut tried = segment.clone();
            for (n, (at, value)) in doubtful.iter().enumerate() {
                if choice >> n & 1 == 1
                    && let Some(place) = tried.values.get_mut(*at)
                {
                    *place = *value;
                }
            }
            if fits(&tried) {
                return Ok(Some(tried));
            }
        }
        Ok(None)
    }
}

/// Writes the manifest's file where something else lies in its place, or nothing. True when it did.
pub(super) fn write_manifest(folder: &Path, signed: &Signed<Manifest>) -> Result<bool, FileError> {
    let (path, bytes) = (folder.join(MANIFEST), codec::encode(signed));
    let lies = match disk::read_small(&path, <Signed<Manifest>>::MAX) {
        Err(error) if error.is_damage() => None,
        read => read?,
    };
    if lies.is_some_and(|lies| lies == bytes) {
        return Ok(false);
    }
    disk::replace(&path, &bytes)?;
    // What it was exchanged for.
    disk::remove(&disk::spare(&path))?;
    Ok(true)
}
