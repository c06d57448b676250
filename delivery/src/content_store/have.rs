//! The note of which chunks are on disk. It is the one file that nothing else vouches for, so it carries a checksum; and
//! it is a bitmap, because a set that fills up in any order may need more ranges than it has chunks to show for.

use std::path::Path;

use protocol::ChunkSet;

use super::disk::{self, FileError};
use super::error::{ContentError, Damaged};

/// Last byte: the version.
const MAGIC: [u8; 8] = *b"WCHAVE\0\x01";
const CHECKSUM: usize = 32;

/// The set as it can be sent: at most [`ChunkSet::MAX_RANGES`] ranges, the longest ones.
pub fn sendable(set: &ChunkSet) -> ChunkSet {
    if set.range_count() <= ChunkSet::MAX_RANGES {
        return set.clone();
    }
    let mut ranges: Vec<_> = set.ranges().collect();
    ranges.sort_by_key(|range| std::cmp::Reverse(range.len()));
    ranges.truncate(ChunkSet::MAX_RANGES);
    let mut cut = ChunkSet::new();
    ranges.into_iter().for_each(|range| cut.insert_range(range));
    cut
}

/// Makes the note of a content of which nothing is here, and the room for the next one: what came before a disk was full
/// is to be noted all the same, or it would be fetched again.
pub(super) fn make(path: &Path, chunks: u32) -> Result<(), FileError> {
    let nothing = encode(chunks, &ChunkSet::new());
    disk::write_new(path, &nothing)?;
    disk::write_new(&disk::spare(path), &nothing)
}

pub(super) fn save(path: &Path, chunks: u32, set: &ChunkSet) -> Result<(), FileError> {
    disk::replace(path, &encode(chunks, set))
}

/// Gives back the room that [`make`] took: nothing more is to come.
pub(super) fn close(path: &Path) -> Result<(), FileError> {
    disk::remove(&disk::spare(path))
}

fn encode(chunks: u32, set: &ChunkSet) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&chunks.to_le_bytes());
    let start = bytes.len();
    bytes.resize(start + bitmap_len(chunks), 0);
    for chunk in set.iter() {
        if let Some(byte) = bytes.get_mut(start + (chunk / 8) as usize) {
            *byte |= 1 << (chunk % 8);
        }
    }
    bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
    bytes
}

/// Absent: nothing is held.
pub(super) fn load(path: &Path, chunks: u32) -> Result<ChunkSet, ContentError> {
    let expected = MAGIC.len() + 4 + bitmap_len(chunks) + CHECKSUM;
    let Some(bytes) = disk::read_small(path, expected)? else { return Ok(ChunkSet::new()) };
    let damaged = |what: &str| ContentError::Damaged(Damaged { file: path.to_owned(), what: what.to_owned() });
    if bytes.len() != expected {
        return Err(damaged("its length does not fit the content"));
    }
    let (body, checksum) = bytes.split_at_checked(expected - CHECKSUM).unwrap_or_default();
    if blake3::hash(body).as_bytes() != checksum {
        return Err(damaged("its checksum does not fit"));
    }
    let bitmap = body
        .strip_prefix(&MAGIC)
        .and_then(|rest| rest.strip_prefix(&chunks.to_le_bytes()))
        .ok_or_else(|| damaged("it is of another version or content"))?;
    let is_set = |chunk: &u32| bitmap.get((chunk / 8) as usize).is_some_and(|byte| byte >> (chunk % 8) & 1 == 1);
    let mut set = ChunkSet::new();
    let mut next = 0;
    // Runs, not single chunks: a complete content is one insertion.
    while let Some(start) = (next..chunks).find(is_set) {
        next = (start..chunks).find(|chunk| !is_set(chunk)).unwrap_or(chunks);
        set.insert_range(start..next);
    }
    Ok(set)
}

fn bitmap_len(chunks: u32) -> usize {
    chunks.div_ceil(8) as usize
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_saved_is_loaded(chunks in 1u32..70, held in prop::collection::vec(0u32..70, 0..70)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("have");
            let set: ChunkSet = held.into_iter().filter(|chunk| *chunk < chunks).collect();
            save(&path, chunks, &set).unwrap();
            prop_assert_eq!(load(&path, chunks).unwrap(), set);
        }
    }

    /// A file that is written over needs no room: the two that were made with the content are used in turn.
    #[cfg(target_os = "linux")]
    #[test]
    fn it_is_written_where_there_is_room_already() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("have");
        make(&path, 100_000).unwrap();
        let inodes = || [path.clone(), disk::spare(&path)].map(|file| std::fs::metadata(file).unwrap().ino());
        let [first, second] = inodes();
        for round in 1..4 {
            save(&path, 100_000, &ChunkSet::from_range(0..round)).unwrap();
            let expected = if round % 2 == 1 { [second, first] } else { [first, second] };
            assert_eq!(inodes(), expected);
            assert_eq!(load(&path, 100_000).unwrap(), ChunkSet::from_range(0..round));
        }
        close(&path).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_sent_keeps_the_longest_runs() {
        let mut set: ChunkSet = (0..300).map(|i| i * 2).collect();
        set.insert_range(1000..2000);
        let cut = sendable(&set);
        assert_eq!(cut.range_count(), ChunkSet::MAX_RANGES);
        assert!(set.is_superset(&cut));
        assert!(cut.contains(1500));
    }
}
