//! Turns scanned files into encrypted chunks with a fixed amount of memory, however large they are: one thread reads and
//! encrypts, this one hashes and stores, and three chunk buffers go round between them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use protocol::cipher::{CipherError, ContentSecret, FrameCipher, TAG_LEN};
use protocol::manifest::{self, MAX_CHUNKS, SEGMENT_CHUNKS, Segment};
use protocol::{ContentId, Digest, pack};

use super::scan::{Scan, Stamp};

/// Chunk buffers: one being filled, one being stored, one between.
const BUFFERS: usize = 3;

/// How a content is laid out, known before a byte is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Bytes before encryption.
    pub(crate) plain: u64,
    /// Bytes of ciphertext.
    pub(crate) cipher: u64,
    /// Frames, which are chunks.
    pub(crate) frames: u32,
    /// Bytes of a chunk.
    pub(crate) chunk_size: u32,
}

impl Layout {
    /// The layout of `plain` bytes, at least one, in chunks of `chunk_size`; `None` past the most chunks.
    pub(crate) fn new(plain: u64, chunk_size: u32) -> Option<Self> {
        let payload = u64::from(chunk_size).checked_sub(TAG_LEN as u64).filter(|payload| *payload > 0)?;
        let frames = u32::try_from(plain.div_ceil(payload)).ok().filter(|n| (1..=MAX_CHUNKS).contains(n))?;
        let cipher = plain.checked_add(u64::from(frames) * TAG_LEN as u64)?;
        Some(Layout { plain, cipher, frames, chunk_size })
    }

    fn payload(&self) -> usize {
        self.chunk_size as usize - TAG_LEN
    }
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packed {
    /// Chaining values of the chunks in order.
    pub(crate) values: Vec<[u8; 32]>,
    /// Digests of the segments of chaining values.
    pub(crate) segments: Vec<Digest>,
    /// BLAKE3 of the ciphertext.
    pub(crate) root: Digest,
}

/// Why packing stopped.
#[derive(Debug, thiserror::Error)]
pub enum PackingError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file is not what it was when the list was made.
    #[error("{} changed while it was being read ({what}); publish it again when nobody writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What is different.
        what: &'static str,
    },
    /// A chunk could not be stored.
    #[error("cannot store the content: {0}")]
    Store(String),
    /// The cipher failed.
    #[error(transparent)]
    Cipher(#[from] CipherError),
    /// Nobody waits for the publication any more.
    #[error("the publication was stopped; nothing of it is left")]
    Stopped,
    /// The encrypting thread could not be started or ended without a word.
    #[error("the encrypting thread failed: {0}")]
    Thread(String),
}

/// Packs, encrypts and hashes; `store` gets the chunks in order, `progress` the number of ciphertext bytes stored so
/// far. Blocks.
pub(crate) fn pack(
    scan: &Scan,
    layout: Layout,
    (secret, content): (&ContentSecret, ContentId),
    stop: &AtomicBool,
    mut store: impl FnMut(u32, &[u8]) -> Result<(), String>,
    mut progress: impl FnMut(u64),
) -> Result<Packed, PackingError> {
    let cipher = FrameCipher::new(secret, content, layout.frames).ok_or(CipherError::Seal(0))?;
    thread::scope(|scope| {
        let (sealed_out, sealed) = sync_channel::<Vec<u8>>(1);
        let (empty_out, empty) = sync_channel::<Vec<u8>>(BUFFERS);
        for _ in 0..BUFFERS {
            // The channel holds them all.
            let _ = empty_out.send(Vec::with_capacity(layout.chunk_size as usize));
        }
        let reader = thread::Builder::new()
            .name("publish reader".to_owned())
            .spawn_scoped(scope, move || Frames { layout, cipher, next: 0, sealed: sealed_out, empty, stop }.run(scan))
            .map_err(|e| PackingError::Thread(e.to_string()))?;
        let stored = store_chunks(layout, sealed, empty_out, &mut store, &mut progress);
        let read = reader.join().map_err(|_| PackingError::Thread("it panicked".to_owned()))?;
        // When storing failed, the reader only saw its channel close.
        let values = stored?;
        read?;
        finish(values, layout)
    })
}

fn store_chunks(
    layout: Layout,
    sealed: Receiver<Vec<u8>>,
    empty: SyncSender<Vec<u8>>,
    store: &mut impl FnMut(u32, &[u8]) -> Result<(), String>,
    progress: &mut impl FnMut(u64),
) -> Result<Vec<[u8; 32]>, PackingError> {
    let mut values = Vec::with_capacity(layout.frames as usize);
    let mut done = 0u64;
    for (index, chunk) in (0u32..).zip(sealed) {
        values.push(manifest::chunk_value(done, &chunk, layout.frames == 1));
        store(index, &chunk).map_err(PackingError::Store)?;
        done += chunk.len() as u64;
        progress(done);
        // A reader that has ended needs no more buffers.
        let _ = empty.send(chunk);
    }
    Ok(values)
}

fn finish(values: Vec<[u8; 32]>, layout: Layout) -> Result<Packed, PackingError> {
    let root = manifest::content_root(&values, layout.cipher, layout.chunk_size)
        .ok_or_else(|| PackingError::Thread(format!("{} of {} chunks came", values.len(), layout.frames)))?;
    let segments =
        values.chunks(SEGMENT_CHUNKS as usize).map(|part| Segment { values: part.to_vec() }.digest()).collect();
    Ok(Packed { values, segments, root })
}

/// The reading and encrypting side.
struct Frames<'a> {
    layout: Layout,
    cipher: FrameCipher,
    next: u32,
    sealed: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
    stop: &'a AtomicBool,
}

impl Frames<'_> {
    fn run(mut self, scan: &Scan) -> Result<(), PackingError> {
        let mut frame = self.buffer()?;
        let header = pack::header(scan.list_bytes.len() as u64);
        frame = self.feed(frame, &header)?;
        frame = self.feed(frame, &scan.list_bytes)?;
        for (path, stamp) in &scan.files {
            frame = self.file(frame, path, stamp)?;
        }
        // A pack is never empty, and `feed` seals a full frame only when more follows: the last one is left.
        self.seal(frame)
    }

    fn buffer(&self) -> Result<Vec<u8>, PackingError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(PackingError::Stopped);
        }
        let mut buffer = self.empty.recv().map_err(|_| PackingError::Stopped)?;
        buffer.clear();
        Ok(buffer)
    }

    /// Room in the frame, after making some if there is none.
    fn with_room(&mut self, frame: Vec<u8>) -> Result<(Vec<u8>, usize), PackingError> {
        let payload = self.layout.payload();
        if frame.len() < payload {
            let room = payload - frame.len();
            return Ok((frame, room));
        }
        self.seal(frame)?;
        Ok((self.buffer()?, payload))
    }

    fn feed(&mut self, mut frame: Vec<u8>, mut bytes: &[u8]) -> Result<Vec<u8>, PackingError> {
        while !bytes.is_empty() {
            let room;
            (frame, room) = self.with_room(frame)?;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            frame.extend_from_slice(now);
            bytes = later;
        }
        Ok(frame)
    }

    fn file(&mut self, mut frame: Vec<u8>, path: &Path, stamp: &Stamp) -> Result<Vec<u8>, PackingError> {
        let failed = |source| PackingError::Read { path: path.to_owned(), source };
        let changed = |what| PackingError::Changed { path: path.to_owned(), what };
        let mut file = open(path).map_err(failed)?;
        let check = |file: &File| {
            let metadata = file.metadata().map_err(failed)?;
            match Stamp::of(&metadata) {
                _ if !metadata.is_file() => Err(changed("it is another file now")),
                now if now == *stamp => Ok(()),
                now if now.size != stamp.size => Err(changed("it has another size")),
                _ => Err(changed("it was written to or replaced")),
            }
        };
        check(&file)?;
        let mut left = stamp.size;
        while left > 0 {
            let room;
            (frame, room) = self.with_room(frame)?;
            let want = u64::try_from(room).unwrap_or(u64::MAX).min(left);
            let got = (&mut file).take(want).read_to_end(&mut frame).map_err(failed)?;
            if (got as u64) < want {
                return Err(changed("it became shorter"));
            }
            left -= want;
        }
        if file.read(&mut [0]).map_err(failed)? != 0 {
            return Err(changed("it grew"));
        }
        check(&file)?;
        Ok(frame)
    }

    fn seal(&mut self, mut frame: Vec<u8>) -> Result<(), PackingError> {
        self.cipher.seal(self.next, &mut frame)?;
        self.next = self.next.saturating_add(1);
        self.sealed.send(frame).map_err(|_| PackingError::Stopped)
    }
}

/// Opens what the scan saw as a regular file; should something else lie there now, this neither follows nor waits.
fn open(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path)
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]
mod tests {
    use super::*;
    use crate::publish::scan::scan;
    use protocol::manifest::MIN_CHUNK_SIZE;
    use protocol::pack::{FileList, HEADER_LEN};
    use std::fs;

    const CHUNK: usize = MIN_CHUNK_SIZE as usize;
    const PAYLOAD: usize = CHUNK - TAG_LEN;

    /// All of it, with the chunks.
    type Whole = (Scan, Layout, Packed, Vec<Vec<u8>>);

    fn pack_path(path: &Path) -> Result<Whole, PackingError> {
        let scan = scan(path, Path::new("/nowhere")).unwrap();
        pack_scan(scan)
    }

    fn pack_scan(scan: Scan) -> Result<Whole, PackingError> {
        let layout = Layout::new(scan.plain_len(), MIN_CHUNK_SIZE).unwrap();
        let secret = ContentSecret::from_bytes([5; 32]);
        let (mut chunks, mut seen) = (Vec::new(), 0);
        let keep = |index: u32, chunk: &[u8]| {
            assert_eq!(index as usize, chunks.len());
            chunks.push(chunk.to_vec());
            Ok(())
        };
        let content = (&secret, ContentId::from_bytes([6; 16]));
        let packed = pack(&scan, layout, content, &AtomicBool::new(false), keep, |done| seen = done)?;
        assert_eq!(seen, layout.cipher);
        Ok((scan, layout, packed, chunks))
    }

    /// Decrypts with `protocol` alone and returns the list and the files' bytes.
    fn unpack(layout: Layout, chunks: &[Vec<u8>]) -> (FileList, Vec<u8>) {
        let (secret, content) = (ContentSecret::from_bytes([5; 32]), ContentId::from_bytes([6; 16]));
        let cipher = FrameCipher::new(&secret, content, layout.frames).unwrap();
        let mut plain = Vec::new();
        for (index, chunk) in chunks.iter().enumerate() {
            plain.extend_from_slice(cipher.open(index as u32, &mut chunk.clone()).unwrap());
        }
        let list_len = pack::read_header(plain[..HEADER_LEN].try_into().unwrap()).unwrap() as usize;
        let (list, files) = plain[HEADER_LEN..].split_at(list_len);
        (protocol::codec::decode(list).unwrap(), files.to_vec())
    }

    fn check(path: &Path, expected: &[u8]) -> (Layout, usize) {
        let (scan, layout, packed, chunks) = pack_path(path).unwrap();
        let all = chunks.concat();
        assert_eq!(all.len() as u64, layout.cipher);
        assert_eq!(packed.root.as_bytes(), blake3::hash(&all).as_bytes());
        assert!(chunks.iter().rev().skip(1).all(|chunk| chunk.len() == CHUNK));
        let (list, files) = unpack(layout, &chunks);
        assert_eq!(list, scan.list);
        assert!(files == expected, "contents differ for {}", path.display());
        (layout, scan.list_bytes.len())
    }

    #[test]
    fn sizes_at_the_edges_come_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, b"").unwrap();
        let (layout, list_len) = check(&path, b"");
        assert_eq!(layout.frames, 1);
        // The list's length changes with the number of digits of the size; aim for the exact edge of the pack.
        let overhead = HEADER_LEN + list_len;
        let mut frames = Vec::new();
        for size in [1, PAYLOAD - 1, PAYLOAD, PAYLOAD + 1]
            .into_iter()
            .chain(PAYLOAD - overhead - 6..PAYLOAD - overhead + 3)
            .chain(2 * PAYLOAD - overhead - 6..2 * PAYLOAD - overhead + 3)
            .chain([3 * CHUNK + 7])
        {
            let bytes: Vec<u8> = (0..size).map(|i| (i * 7 % 253) as u8).collect();
            fs::write(&path, &bytes).unwrap();
            let (layout, _) = check(&path, &bytes);
            frames.push((layout.plain as usize % PAYLOAD, layout.frames));
        }
        for edge in [PAYLOAD - 1, 0, 1] {
            assert!(frames.iter().any(|(rest, _)| *rest == edge), "no pack with {edge} bytes in its last frame");
        }
    }

    #[test]
    fn two_thousand_small_files_and_an_empty_folder() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("many");
        fs::create_dir_all(root.join("sub/empty")).unwrap();
        let mut expected = Vec::new();
        for n in 0..2000u32 {
            let bytes = vec![n as u8; (n % 300) as usize];
            fs::write(root.join(format!("sub/{n:04}")), &bytes).unwrap();
            expected.extend_from_slice(&bytes);
        }
        check(&root, &expected);
        check(&root.join("sub/empty"), b"");
    }

    #[test]
    fn a_file_that_changes_or_goes_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("album");
        fs::create_dir(&root).unwrap();
        let file = root.join("track");
        let scanned = || {
            fs::write(&file, vec![1; 1000]).unwrap();
            scan(&root, Path::new("/nowhere")).unwrap()
        };
        let error = |scan: Scan| pack_scan(scan).unwrap_err().to_string();

        let scan = scanned();
        fs::write(&file, vec![1; 1001]).unwrap();
        let text = error(scan);
        assert!(text.contains("track changed while it was being read (it has another size)"), "{text}");

        let scan = scanned();
        fs::write(root.join("other"), vec![2; 1000]).unwrap();
        fs::rename(root.join("other"), &file).unwrap();
        assert!(error(scan).contains("track changed"));

        let scan = scanned();
        fs::remove_file(&file).unwrap();
        let text = error(scan);
        assert!(text.contains("cannot read") && text.contains("track"), "{text}");

        let scan = scanned();
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
        assert!(error(scan).contains("track"));
        fs::remove_file(&file).unwrap();
    }

    #[test]
    fn stopping_and_a_full_disk_end_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, vec![0; 10 * CHUNK]).unwrap();
        let scan = scan(&path, Path::new("/nowhere")).unwrap();
        let layout = Layout::new(scan.plain_len(), MIN_CHUNK_SIZE).unwrap();
        let secret = ContentSecret::from_bytes([5; 32]);
        let content = (&secret, ContentId::from_bytes([6; 16]));
        let stop = AtomicBool::new(false);
        let full = |index: u32, _: &[u8]| if index < 2 { Ok(()) } else { Err("no space left".to_owned()) };
        let error = pack(&scan, layout, content, &stop, full, |_| {}).unwrap_err();
        assert!(matches!(error, PackingError::Store(ref why) if why == "no space left"), "{error}");

        let error = pack(&scan, layout, content, &stop, |_, _| Ok(()), |_| stop.store(true, Ordering::Relaxed));
        assert!(matches!(error, Err(PackingError::Stopped)));
    }

    #[test]
    fn layouts_have_their_limits() {
        assert_eq!(Layout::new(0, MIN_CHUNK_SIZE), None);
        assert_eq!(Layout::new(u64::MAX, MIN_CHUNK_SIZE), None);
        let most = PAYLOAD as u64 * u64::from(MAX_CHUNKS);
        assert_eq!(Layout::new(most, MIN_CHUNK_SIZE).unwrap().frames, MAX_CHUNKS);
        assert_eq!(Layout::new(most + 1, MIN_CHUNK_SIZE), None);
    }
}
