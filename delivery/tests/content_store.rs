//! What the store promises about crashes, full disks and damaged files, tried out on real files.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]

mod fixture;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};

use fixture::{CHUNK, Product, World, listing};
use protocol::manifest::{MAX_CHUNK_SIZE, MAX_CHUNKS, Manifest, Segment};
use protocol::{ChunkSet, Digest, Signed};
use willcall_delivery::{
    Bodies, Body, Ciphertext, Content, ContentError, ContentStore, CreateError, FRESH_MS, FileError, FinishError,
    ReadError, ReadSegmentError, ReadVerifiedError, SegmentError, WriteError, free_space,
};

fn setup(chunks: usize) -> (tempfile::TempDir, ContentStore, Product) {
    let folder = tempfile::tempdir().unwrap();
    let store = ContentStore::open(folder.path().join("contents")).unwrap();
    let product = World::new().product(chunks * CHUNK - 1);
    (folder, store, product)
}

fn reopened(store: ContentStore) -> ContentStore {
    let root = store.root().to_owned();
    drop(store);
    ContentStore::open(root).unwrap()
}

fn set(range: std::ops::Range<u32>) -> ChunkSet {
    ChunkSet::from_range(range)
}

#[test]
fn published_content_is_read_back_at_the_edge_lengths() {
    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let mut store = ContentStore::open(folder.path()).unwrap();
    let lengths = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 7];
    let products: Vec<Product> = lengths.iter().map(|length| world.product(*length)).collect();
    for product in &products {
        let content = product.publish(&store);
        product.assert_equals(&content);
        assert!(Arc::ptr_eq(&content, &product.publish(&store)), "published twice, there once");
    }
    store = reopened(store);
    assert_eq!(store.list().len(), lengths.len());
    assert_eq!(store.total_bytes(), lengths.iter().map(|length| *length as u64).sum::<u64>());
    for product in &products {
        let content = store.get(&product.digest).unwrap();
        product.assert_equals(&content);
        assert_eq!(content.manifest(), &product.manifest);
        assert_eq!(*content.segment(0).unwrap().unwrap(), product.segments[0]);
        assert_eq!(content.segment(1).unwrap(), None);
        assert!(store.remove(&product.digest).unwrap());
        assert!(!store.remove(&product.digest).unwrap());
    }
    assert_eq!(listing(folder.path()), Vec::<String>::new());
    assert!(free_space(folder.path()).unwrap() > 0);
}

#[test]
fn a_writer_that_is_dropped_or_lied_to_leaves_nothing() {
    let (_folder, store, product) = setup(2);
    let mut writer = store.writer(0).unwrap();
    writer.append_chunk(product.chunk(0)).unwrap();
    drop(writer);
    let mut short = store.writer(10 * CHUNK as u64).unwrap();
    short.append_chunk(product.chunk(0)).unwrap();
    let error = short.finish(product.values.clone(), &product.signed, &product.manifest).unwrap_err();
    assert!(matches!(error, FinishError::Length { .. }), "{error}");
    let mut other = store.writer(0).unwrap();
    other.append_chunk(product.chunk(0)).unwrap();
    other.append_chunk(product.chunk(1)).unwrap();
    let mut values = product.values.clone();
    values.swap(0, 1);
    let error = other.finish(values, &product.signed, &product.manifest).unwrap_err();
    assert!(matches!(error, FinishError::Manifest(_)), "{error}");
    assert_eq!(listing(store.root()), Vec::<String>::new());
}

#[test]
fn what_a_killed_process_left_unfinished_is_removed_and_strangers_files_are_not() {
    let (_folder, store, product) = setup(2);
    let content = product.publish(&store);
    let mut writer = store.writer(0).unwrap();
    writer.append_chunk(product.chunk(0)).unwrap();
    // No destructor of a killed process runs: put back what this one's took away.
    let names = listing(store.root());
    let left = names.iter().find(|name| name.ends_with("/content") && !name.starts_with(&product.digest.to_string()));
    let left = store.root().join(left.unwrap());
    drop(writer);
    fs::create_dir(left.parent().unwrap()).unwrap();
    fs::write(&left, product.chunk(0)).unwrap();
    fs::write(store.root().join("notes.txt"), "mine").unwrap();
    let store = reopened(store);
    assert!(!left.parent().unwrap().exists());
    assert!(store.root().join("notes.txt").exists());
    product.assert_equals(&content);
}

#[test]
fn one_process_sees_one_store_in_one_folder() {
    let (_folder, store, product) = setup(2);
    let same = ContentStore::open(store.root().join("../contents")).unwrap();
    let content = product.publish(&store);
    assert!(Arc::ptr_eq(&content, &same.get(&product.digest).unwrap()));
}

#[test]
fn chunks_are_taken_only_when_they_verify() {
    let (_folder, store, product) = setup(3);
    let content = store.create(&product.signed, &product.manifest).unwrap();
    let error = content.write_verified_chunk(0, &mut product.chunk(0).to_vec()).unwrap_err();
    assert!(matches!(error, WriteError::NoChainingValue(0)), "{error}");
    let error = content.put_segment(0, Segment { values: vec![[0; 32]; 3] }).unwrap_err();
    assert!(matches!(error, SegmentError::Refused(_)), "{error}");
    content.put_segment(0, product.segments[0].clone()).unwrap();
    for bad in [product.chunk(1), &product.chunk(0)[1..], b""] {
        let error = content.write_verified_chunk(0, &mut bad.to_vec()).unwrap_err();
        assert!(matches!(error, WriteError::Mismatch(0)), "{error}");
    }
    assert!(content.write_verified_chunk(3, &mut []).is_err(), "past the end");
    assert!(matches!(content.read_chunk(0, &mut Vec::new()), Err(ReadError::NotHeld(0))));
    assert!(content.write_verified_chunk(1, &mut product.chunk(1).to_vec()).unwrap());
    assert!(!content.write_verified_chunk(1, &mut product.chunk(1).to_vec()).unwrap(), "not new");
    assert!(matches!(content.finish(), Err(FinishError::Missing(2))));
    assert_eq!((content.have(), content.have_bytes()), (set(1..2), CHUNK as u64));
    for index in [0, 2] {
        content.write_verified_chunk(index, &mut product.chunk(index).to_vec()).unwrap();
    }
    assert!(content.has_all() && !content.is_complete());
    content.finish().unwrap();
    product.assert_equals(&store.create(&product.signed, &product.manifest).unwrap());
    product.assert_equals(&reopened(store).get(&product.digest).unwrap());
}

#[test]
fn a_partial_content_goes_on_where_it_was_synced_and_what_was_written_after_is_found() {
    let (_folder, mut store, product) = setup(6);
    let content = product.create(&store);
    for index in 0..3 {
        content.write_verified_chunk(index, &mut product.chunk(index).to_vec()).unwrap();
    }
    content.sync().unwrap();
    for index in 3..5 {
        content.write_verified_chunk(index, &mut product.chunk(index).to_vec()).unwrap();
    }
    drop(content);
    store = reopened(store);
    let content = store.create(&product.signed, &product.manifest).unwrap();
    assert_eq!(content.have(), set(0..3), "written and not noted is not held");
    assert_eq!(content.adopt(&set(0..6)).unwrap(), set(3..5));
    assert_eq!(content.have(), set(0..5));
    content.write_verified_chunk(5, &mut product.chunk(5).to_vec()).unwrap();
    content.finish().unwrap();
    product.assert_equals(&content);
}

#[test]
fn damaged_metadata_are_refused_by_name_and_the_rest_stays_usable() {
    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let mut store = ContentStore::open(folder.path()).unwrap();
    let products: Vec<Product> = (1..=4).map(|n| world.product(n * CHUNK)).collect();
    for product in &products {
        let content = product.create(&store);
        content.write_verified_chunk(0, &mut product.chunk(0).to_vec()).unwrap();
        content.sync().unwrap();
    }
    let file = |n: usize, name: &str| folder.path().join(products[n].digest.to_string()).join(name);
    let mut have = fs::read(file(0, "have")).unwrap();
    have[12] ^= 1;
    fs::write(file(0, "have"), have).unwrap();
    fs::write(file(1, "manifest"), b"nonsense").unwrap();
    fs::write(file(2, "content"), b"short").unwrap();
    store = reopened(store);
    assert_eq!(store.list().len(), 1);
    let damaged = store.damaged();
    for (n, name) in [(0, "have"), (1, "manifest"), (2, "content")] {
        let (_, found) = damaged.iter().find(|(digest, _)| *digest == products[n].digest).unwrap();
        assert_eq!(found.file, file(n, name));
        assert!(found.to_string().contains(" is damaged: "), "{found}");
        let error = store.create(&products[n].signed, &products[n].manifest).unwrap_err();
        assert!(matches!(error, CreateError::Damaged(_)), "{error}");
    }
    let recovered = store.recover(&products[0].digest).unwrap();
    assert_eq!(recovered.have(), set(0..1));
    assert!(store.recover(&products[1].digest).is_err());
    assert!(store.remove(&products[1].digest).unwrap());
    assert!(store.remove(&products[2].digest).unwrap());
    store = reopened(store);
    assert_eq!((store.list().len(), store.damaged().len()), (2, 0));
    assert_eq!(store.get(&products[0].digest).unwrap().have(), set(0..1));
}

#[cfg(target_os = "linux")]
#[test]
fn metadata_that_cannot_be_read_cost_one_content_and_not_the_others() {
    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let mut store = ContentStore::open(folder.path()).unwrap();
    let products: Vec<Product> = (1..=3).map(|n| world.product(n * CHUNK)).collect();
    for product in &products {
        let content = product.create(&store);
        content.write_verified_chunk(0, &mut product.chunk(0).to_vec()).unwrap();
        content.sync().unwrap();
    }
    let file = |n: usize, name: &str| folder.path().join(products[n].digest.to_string()).join(name);
    // Reading what nothing is mapped to fails as a bad sector does.
    for (n, name) in [(1, "have"), (2, "manifest")] {
        fs::remove_file(file(n, name)).unwrap();
        std::os::unix::fs::symlink("/proc/self/mem", file(n, name)).unwrap();
    }
    store = reopened(store);
    assert_eq!(store.list().len(), 1);
    let damaged = store.damaged();
    for (n, name) in [(1, "have"), (2, "manifest")] {
        let (_, found) = damaged.iter().find(|(digest, _)| *digest == products[n].digest).unwrap();
        assert_eq!(found.file, file(n, name));
    }
    assert_eq!(store.recover(&products[1].digest).unwrap().have(), set(0..1));
    let error = store.recover(&products[2].digest).unwrap_err();
    assert!(matches!(error, ContentError::Damaged(_)), "{error}");
    let restored = store.restore(&products[2].signed, &products[2].manifest, &|| true).unwrap();
    assert_eq!(restored.have(), set(0..1));
    store = reopened(store);
    assert_eq!((store.list().len(), store.damaged().len()), (3, 0));
}

#[test]
fn what_is_damaged_beside_the_data_is_made_good_and_costs_no_chunk() {
    let (_folder, mut store, product) = setup(5);
    let path = |store: &ContentStore, name: &str| store.root().join(product.digest.to_string()).join(name);
    let damage = |store: &ContentStore, name: &str, at: u64| {
        let file = fs::OpenOptions::new().write(true).open(path(store, name)).unwrap();
        file.write_all_at(b"garbage!", at).unwrap();
    };
    let content = product.publish(&store);
    let sound = ["manifest", "segments"].map(|name| fs::read(path(&store, name)).unwrap());
    assert!(content.mend(&|| true).unwrap().is_nothing());
    drop(content);

    // The list across two chunks, and a third chunk: what the manifest vouches for is found all the same.
    store = reopened(store);
    damage(&store, "segments", 28);
    damage(&store, "content", 3 * CHUNK as u64);
    let content = store.get(&product.digest).unwrap();
    let mended = content.mend(&|| true).unwrap();
    assert_eq!((mended.files(), &mended.lost), (vec!["segments"], &Vec::new()));
    assert_eq!(content.verify_all(&mut |_| ControlFlow::Continue(())).unwrap().damaged, set(3..4));
    content.write_verified_chunk(3, &mut product.chunk(3).to_vec()).unwrap();
    content.finish().unwrap();
    fs::remove_file(path(&store, "segments")).unwrap();
    damage(&store, "manifest", 50);
    assert_eq!(content.mend(&|| true).unwrap().files(), ["manifest", "segments"]);
    assert_eq!(["manifest", "segments"].map(|name| fs::read(path(&store, name)).unwrap()), sound);
    assert_eq!(listing(content.folder()), ["complete", "content", "have", "manifest", "segments"]);
    drop(content);

    // After a restart nothing is in memory.
    damage(&store, "manifest", 50);
    damage(&store, "segments", 100);
    store = reopened(store);
    assert_eq!((store.list().len(), store.damaged().len()), (0, 1));
    assert!(store.total_bytes() >= product.bytes.len() as u64);
    assert!(store.restore(&product.signed, &product.manifest, &|| false).is_err(), "broken off");
    assert_eq!(store.damaged().len(), 1);
    let content = store.restore(&product.signed, &product.manifest, &|| true).unwrap();
    content.finish().unwrap();
    product.assert_equals(&content);
    drop(content);
    assert_eq!(store.total_bytes(), product.bytes.len() as u64);

    // The note of what is held, which a complete content does without.
    let content = store.get(&product.digest).unwrap();
    content.forget(&set(4..5)).unwrap();
    damage(&store, "have", 8);
    assert_eq!(content.mend(&|| true).unwrap().files(), ["have"]);
    drop(content);
    store = reopened(store);
    assert_eq!(store.get(&product.digest).unwrap().have(), set(0..4));

    // Nothing to go by: the place is made anew.
    fs::write(path(&store, "content"), b"short").unwrap();
    store = reopened(store);
    assert_eq!(store.restore(&product.signed, &product.manifest, &|| true).unwrap().have(), ChunkSet::new());
    assert_eq!((store.list().len(), store.damaged().len()), (1, 0));
}

/// Keeps bytes as usual; whoever reads the first chunk says so, and waits until the gate's other end is gone.
#[derive(Debug)]
struct Gated {
    bytes: Ciphertext,
    gate: Arc<Mutex<mpsc::Receiver<()>>>,
    waits: mpsc::Sender<()>,
}

#[derive(Debug)]
struct GatedBody {
    body: Arc<dyn Body>,
    gate: Arc<Mutex<mpsc::Receiver<()>>>,
    waits: mpsc::Sender<()>,
}

impl Bodies for Gated {
    fn make(&self, folder: &Path, manifest: &Manifest) -> Result<(), FileError> {
        self.bytes.make(folder, manifest)
    }

    fn open(&self, folder: &Path, manifest: &Manifest) -> Result<Arc<dyn Body>, ContentError> {
        let (gate, waits) = (Arc::clone(&self.gate), self.waits.clone());
        Ok(Arc::new(GatedBody { body: self.bytes.open(folder, manifest)?, gate, waits }))
    }
}

impl Body for GatedBody {
    fn read(&self, chunk: u32, buffer: &mut Vec<u8>) -> Result<(), FileError> {
        if chunk == 0 {
            let _ = self.waits.send(());
            let _ = self.gate.lock().unwrap().recv();
        }
        self.body.read(chunk, buffer)
    }

    fn write(&self, chunk: u32, bytes: &mut [u8]) -> Result<(), FileError> {
        self.body.write(chunk, bytes)
    }

    fn sync(&self) -> Result<(), FileError> {
        self.body.sync()
    }
}

#[test]
fn while_one_makes_chaining_values_good_the_others_come_again_later_and_no_chunk_is_lost_by_it() {
    let (_folder, store, product) = setup(3);
    product.publish(&store);
    let root = store.root().to_owned();
    drop(store);
    fs::write(root.join(product.digest.to_string()).join("segments"), b"cut off").unwrap();
    let ((open, gate), (waits, waiting)) = (mpsc::channel(), mpsc::channel());
    let bodies = Gated { bytes: Ciphertext::default(), gate: Arc::new(Mutex::new(gate)), waits };
    let store = ContentStore::open_with(root, Arc::new(bodies)).unwrap();
    let content = store.get(&product.digest).unwrap();

    let first = Arc::clone(&content);
    let mending = std::thread::spawn(move || first.segment_now(0).unwrap());
    waiting.recv_timeout(fixture::LIMIT).unwrap();
    assert!(content.segment_in_memory(0).is_none());
    let later = content.segment_now(0).unwrap_err();
    assert!(matches!(later, ReadSegmentError::Mending(_)), "{later}");
    let later = content.read_verified(1, &mut Vec::new(), unix_ms()).unwrap_err();
    assert!(matches!(later, ReadVerifiedError::Mending(_)), "{later}");
    drop(open);
    assert_eq!(*mending.join().unwrap().unwrap(), product.segments[0]);
    assert!(content.read_verified(1, &mut Vec::new(), unix_ms()).unwrap());
    assert!(content.segment_in_memory(0).is_some());
    product.assert_equals(&content);
}

#[test]
fn chaining_values_that_went_bad_before_all_of_it_came_are_no_end_of_it() {
    // More of them than are doubted, so that bad data beside them cannot be told from good.
    let (_folder, mut store, product) = setup(13);
    let content = product.create(&store);
    for chunk in 0..13 {
        content.write_verified_chunk(chunk, &mut product.chunk(chunk).to_vec()).unwrap();
    }
    content.sync().unwrap();
    let folder = content.folder().to_owned();
    drop(content);
    let damage = |name: &str, bytes: &[u8]| {
        let file = fs::OpenOptions::new().write(true).open(folder.join(name)).unwrap();
        file.write_all_at(bytes, 0).unwrap();
    };
    damage("segments", b"garbage!");
    store = reopened(store);
    let content = store.get(&product.digest).unwrap();
    content.finish().unwrap();
    product.assert_equals(&content);
    content.forget(&set(12..13)).unwrap();
    content.write_verified_chunk(12, &mut product.chunk(12).to_vec()).unwrap();
    content.sync().unwrap();
    drop(content);

    damage("segments", &[7; 13 * 32]);
    damage("content", b"garbage!");
    store = reopened(store);
    let content = store.get(&product.digest).unwrap();
    assert!(matches!(content.finish(), Err(FinishError::Missing(13))));
    assert_eq!(content.have(), ChunkSet::new());
    content.put_segment(0, product.segments[0].clone()).unwrap();
    for chunk in 0..13 {
        content.write_verified_chunk(chunk, &mut product.chunk(chunk).to_vec()).unwrap();
    }
    content.finish().unwrap();
    product.assert_equals(&content);
}

#[test]
fn verification_forgets_damaged_chunks_and_they_can_be_fetched_again() {
    let (_folder, store, product) = setup(5);
    let content = product.publish(&store);
    let path = content.folder().join("content");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"x", 2 * CHUNK as u64 + 77).unwrap();
    let mut calls = 0;
    let report = content
        .verify_all(&mut |progress| {
            calls += 1;
            assert_eq!((progress.checked, progress.total), (calls, 5));
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((report.checked, report.damaged, report.whole), (5, set(2..3), true));
    assert!(!content.is_complete());
    let store = reopened(store);
    let content = store.get(&product.digest).unwrap();
    assert_eq!(content.have(), set(0..5).difference(&set(2..3)));
    content.write_verified_chunk(2, &mut product.chunk(2).to_vec()).unwrap();
    content.finish().unwrap();
    product.assert_equals(&content);
    let broken_off = content.verify_all(&mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!((broken_off.checked, broken_off.whole), (1, false));
}

#[test]
fn a_damaged_chunk_is_not_held_even_where_that_cannot_be_noted() {
    let (_folder, store, product) = setup(3);
    let content = product.publish(&store);
    // In the place of the file that the note is to be written to.
    let in_the_way = content.folder().join("have.new");
    fs::create_dir(&in_the_way).unwrap();
    content.forget(&set(1..2)).unwrap_err();
    assert_eq!((content.have(), content.is_complete()), (set(0..3).difference(&set(1..2)), false));
    assert!(matches!(content.read_verified(1, &mut Vec::new(), unix_ms()), Err(ReadVerifiedError::Read(_))));
    fs::remove_dir(&in_the_way).unwrap();
    content.write_verified_chunk(1, &mut product.chunk(1).to_vec()).unwrap();
    content.finish().unwrap();
    product.assert_equals(&reopened(store).get(&product.digest).unwrap());
}

#[test]
fn too_little_space_is_found_before_anything_is_written() {
    let (_folder, store, product) = setup(1);
    let mut manifest = product.manifest.clone();
    manifest.chunk_size = MAX_CHUNK_SIZE;
    manifest.length = u64::from(MAX_CHUNKS) * u64::from(MAX_CHUNK_SIZE);
    manifest.segments = vec![Digest::from_bytes([0; 32]); 1024];
    let signed = Signed::sign(&manifest, &fixture::keypair(1));
    let CreateError::NoSpace(full) = store.create(&signed, &manifest).unwrap_err() else { panic!("4 TiB are free") };
    assert!(full.needed > manifest.length && full.free < full.needed);
    assert_eq!(full.path, store.root());
    assert!(full.to_string().contains(&full.free.to_string()), "{full}");
    assert!(matches!(store.writer(manifest.length), Err(CreateError::NoSpace(_))));
    assert_eq!(listing(store.root()), Vec::<String>::new());
}

#[test]
fn a_disk_that_becomes_full_costs_nothing_that_is_stored() {
    let (_folder, store, product) = setup(3);
    let content = product.create(&store);
    content.write_verified_chunk(0, &mut product.chunk(0).to_vec()).unwrap();
    content.sync().unwrap();
    let (path, aside) = (content.folder().join("content"), content.folder().join("aside"));
    drop(content);
    // Opened again, so that the file is opened anew for the next write: then it is one that is always full.
    let store = reopened(store);
    let content = store.get(&product.digest).unwrap();
    fs::rename(&path, &aside).unwrap();
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let error = content.write_verified_chunk(1, &mut product.chunk(1).to_vec()).unwrap_err();
    let WriteError::DiskFull { path: named, needed } = &error else { panic!("{error}") };
    assert_eq!((named.as_path(), *needed), (content.folder(), 2 * CHUNK as u64 - 1));
    assert_eq!(content.have(), set(0..1));
    fs::remove_file(&path).unwrap();
    fs::rename(&aside, &path).unwrap();
    let store = reopened(store);
    let content: Arc<Content> = store.get(&product.digest).unwrap();
    for index in 1..3 {
        content.write_verified_chunk(index, &mut product.chunk(index).to_vec()).unwrap();
    }
    content.finish().unwrap();
    product.assert_equals(&content);
}

#[test]
fn a_chunk_is_verified_again_after_a_minute_and_whenever_its_file_was_touched() {
    let (folder, store, product) = setup(3);
    let content = product.publish(&store);
    let started = unix_ms();
    let mut buffer = Vec::new();
    let mut read = |chunk, after| content.read_verified(chunk, &mut buffer, started + after);
    assert!(read(0, 0).unwrap());
    assert!(read(0, 1).unwrap(), "it was just written: a change could not be told by the file's times");
    let (settled, later) = (60_000, 60_001);
    assert!(read(0, settled).unwrap());
    assert!(!read(0, later).unwrap());
    assert!(read(1, later).unwrap(), "of another chunk that says nothing");
    assert!(read(0, settled + FRESH_MS).unwrap());
    assert!(!read(0, later + FRESH_MS).unwrap());

    let path = store.root().join(product.digest.to_string()).join("content");
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 5).unwrap();
    assert!(matches!(read(0, later + FRESH_MS), Err(ReadVerifiedError::Damaged(0))));
    file.write_all_at(&byte, 5).unwrap();
    assert!(read(0, later + FRESH_MS).unwrap(), "the file is another one than that which was verified");
    assert!(!read(0, later + FRESH_MS).unwrap());
    file.set_len(CHUNK as u64 - 1).unwrap();
    assert!(matches!(read(2, later + FRESH_MS), Err(ReadVerifiedError::Damaged(2))), "cut off");
    drop(folder);
}

#[test]
fn parts_of_a_chunk_are_what_was_verified_of_it() {
    let (_folder, store, product) = setup(2);
    let content = product.publish(&store);
    let (mut part, mut whole, now) = (Vec::new(), Vec::new(), unix_ms() + 60_000);
    let mut read = |chunk, from, most, now| {
        let verified = content.read_verified_part(chunk, from, most, (&mut part, &mut whole), now)?;
        Ok::<_, ReadVerifiedError>((verified, part.clone()))
    };
    let most = CHUNK as u32 / 3;
    for chunk in 0..2 {
        let (mut from, mut got, mut verified) = (0, Vec::new(), Vec::new());
        loop {
            let (now_verified, bytes) = read(chunk, from, most, now).unwrap();
            if bytes.is_empty() {
                break;
            }
            from += bytes.len() as u32;
            verified.push(now_verified);
            got.extend(bytes);
        }
        assert!(got == product.chunk(chunk));
        assert_eq!(verified.iter().filter(|now| **now).count(), 1, "once for all parts");
    }
    assert!(read(0, u32::MAX, 9, now).unwrap().1.is_empty());

    let path = store.root().join(product.digest.to_string()).join("content");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[product.chunk(0)[CHUNK - 1] ^ 1], CHUNK as u64 - 1).unwrap();
    assert!(matches!(read(0, 0, most, now), Err(ReadVerifiedError::Damaged(0))), "damage in another part");
    assert!(read(1, 0, most, now + FRESH_MS).unwrap().0, "later it is verified again");
}

fn unix_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_millis() as u64
}

#[test]
fn removed_content_is_no_longer_read_or_written() {
    let (_folder, store, product) = setup(2);
    let content = product.publish(&store);
    content.read_chunk(0, &mut Vec::new()).unwrap();
    store.remove(&product.digest).unwrap();
    assert!(content.is_removed());
    assert!(matches!(content.read_chunk(0, &mut Vec::new()), Err(ReadError::Removed)));
    assert!(matches!(content.write_verified_chunk(0, &mut product.chunk(0).to_vec()), Err(WriteError::Removed)));
    assert!(store.get(&product.digest).is_none());
    product.assert_equals(&product.publish(&store));
}

#[test]
fn a_whole_content_gets_a_further_name_and_loses_nothing_by_it() {
    let (_folder, store, product) = setup(3);
    let held = product.publish(&store);
    let again = protocol::manifest::Manifest { published_at: 77, ..held.manifest().clone() };
    let signed = Signed::sign(&again, &protocol::Keypair::from_seed(&[5; 32]));
    let named = store.name_again(&held, &signed, &again).unwrap();
    product.assert_equals(&named);
    assert!(named.is_complete() && named.digest() == signed.digest());
    store.remove(&held.digest()).unwrap();
    let store = reopened(store);
    product.assert_equals(&store.get(&signed.digest()).unwrap());
    // Other bytes are no further name of these.
    let named = store.get(&signed.digest()).unwrap();
    let other = protocol::manifest::Manifest { root: Digest::from_bytes([9; 32]), ..again };
    let signed = Signed::sign(&other, &protocol::Keypair::from_seed(&[5; 32]));
    assert!(matches!(store.name_again(&named, &signed, &other), Err(FinishError::Manifest(_))));
}
