//! Files written chunk by chunk as they come: in any order, over any crash, and never taken for good when they are not.

use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use delivery::{Content, ContentStore, WriteError};
use protocol::ChunkSet;
use protocol::manifest::KeyPolicy;
use rand::SeedableRng;
use rand::seq::SliceRandom;

use super::world::{Files, PAYLOAD, Product, World, listing, noise};
use crate::in_place::{InPlace, InPlaceBodies};
use crate::plain::PlainError;

/// A list of files that needs more than one chunk, small files that share a chunk, an empty one, and large ones.
fn files() -> Files {
    let mut files =
        Files::folder("goods").file("large", noise(3 * PAYLOAD + 5, 1)).dir("d").program("d/run", noise(7, 2));
    // Long paths make a long list of few files.
    let mut folder = "d".to_owned();
    for _ in 0..3 {
        folder = format!("{folder}/{}", "x".repeat(250));
        files = files.dir(&folder);
    }
    for n in 0..66 {
        files = files.file(&format!("{folder}/{n:0>250}"), noise(n * 7 % 300, n as u8));
    }
    files.file("empty", vec![]).link("d/link", "run").file("last", noise(2 * PAYLOAD, 3))
}

fn product(files: &Files) -> Product {
    World::new().publish(files, KeyPolicy::AtRelease)
}

struct Fetched {
    dir: tempfile::TempDir,
    product: Product,
    content: Option<Arc<Content>>,
}

impl Fetched {
    fn new(product: Product) -> Fetched {
        let dir = tempfile::tempdir().unwrap();
        let mut fetched = Fetched { dir, product, content: None };
        let content = fetched.store().create(&fetched.product.signed, &fetched.product.manifest).unwrap();
        content.put_segment(0, fetched.product.segments[0].clone()).unwrap();
        fetched.content = Some(content);
        fetched
    }

    fn store(&self) -> ContentStore {
        let bodies = InPlaceBodies::new(self.product.secret.clone(), true);
        ContentStore::open_with(self.dir.path(), Arc::new(bodies)).unwrap()
    }

    fn content(&self) -> &Content {
        self.content.as_ref().unwrap()
    }

    fn write(&self, chunks: impl IntoIterator<Item = u32>) {
        for chunk in chunks {
            self.content().write_verified_chunk(chunk, &mut self.product.chunk(chunk).to_vec()).unwrap();
        }
    }

    /// As after `kill -9`: what is in memory is gone.
    fn kill(&mut self) {
        self.content = None;
        self.content = self.store().get(&self.product.digest);
    }

    fn all(&self) -> std::ops::Range<u32> {
        0..self.product.manifest.chunks()
    }

    fn damaged(&self) -> ChunkSet {
        self.content().verify_all(&mut |_| ControlFlow::Continue(())).unwrap().damaged
    }

    fn file(&self, path: &str) -> PathBuf {
        self.content().folder().join("files/goods").join(path)
    }

    /// The chunks in which a file of this product lies.
    fn chunks_of(&self, files: &Files, path: &str) -> ChunkSet {
        let mut at = (files.pack().len() - files.contents.iter().map(Vec::len).sum::<usize>()) as u64;
        for (entry, contents) in files.list.entries.iter().filter(|e| !is_bare(e)).zip(&files.contents) {
            let end = at + contents.len() as u64;
            if entry.path == path {
                return ChunkSet::from_range((at / PAYLOAD as u64) as u32..end.div_ceil(PAYLOAD as u64) as u32);
            }
            at = end;
        }
        panic!("{path}")
    }

    fn finish(&self, files: &Files) {
        self.content().finish().unwrap();
        let unpacked = self.content().body::<InPlace>().unwrap().finish().unwrap();
        assert_eq!(unpacked.files as usize, files.contents.len());
        assert_eq!(unpacked.bytes, files.contents.iter().map(|contents| contents.len() as u64).sum::<u64>());
        files.assert_in(&unpacked.top);
        assert_eq!(
            listing(unpacked.top.parent().unwrap()).len(),
            files.list.entries.len() + usize::from(!files.list.single_file)
        );
    }
}

fn is_bare(entry: &protocol::pack::Entry) -> bool {
    !matches!(entry.kind, protocol::pack::EntryKind::File { .. })
}

fn bytes_below(dir: &Path) -> u64 {
    let sizes = listing(dir).into_iter().map(|name| std::fs::symlink_metadata(dir.join(name)).unwrap());
    sizes.filter(std::fs::Metadata::is_file).map(|found| found.len()).sum()
}

#[test]
fn chunks_in_any_order_become_the_files_and_are_read_back_as_they_came() {
    let files = files();
    for seed in 0..4 {
        let fetched = Fetched::new(product(&files));
        let mut order: Vec<u32> = fetched.all().collect();
        assert!(order.len() > 6, "a list that ends in a later chunk, and more behind it");
        match seed {
            0 => {}
            1 => order.reverse(),
            _ => order.shuffle(&mut rand::rngs::StdRng::seed_from_u64(seed)),
        }
        let (first, rest) = order.split_at(order.len() / 2);
        fetched.write(first.iter().copied());
        fetched.content().sync().unwrap();
        fetched.write(rest.iter().copied());
        let mut buffer = Vec::new();
        for chunk in fetched.all() {
            fetched.content().read_chunk(chunk, &mut buffer).unwrap();
            assert!(buffer == fetched.product.chunk(chunk), "chunk {chunk} in order {seed}");
        }
        fetched.finish(&files);
        // Once the size of the product, and a few small files beside.
        let extra = bytes_below(fetched.dir.path()) - fetched.product.manifest.length;
        assert!(extra < 2 * files.pack().len() as u64 / 10 + 150_000, "{extra}");
    }
}

#[test]
fn the_edge_products_too() {
    for files in [
        Files::folder("none"),
        Files::folder("goods").dir("d").file("d/empty", vec![]),
        Files::single("one", vec![]),
        Files::single("one", noise(1, 1)),
        Files::single("one", noise(5 * PAYLOAD, 1)),
    ] {
        let fetched = Fetched::new(product(&files));
        fetched.write(fetched.all().rev());
        fetched.finish(&files);
    }
}

#[test]
fn a_killed_fetch_holds_what_was_noted_and_finds_what_was_not() {
    let files = files();
    // Killed before the list is whole, between, and late.
    for (noted, unnoted) in
        [(vec![3, 1], vec![5]), (vec![0, 5], vec![1, 2]), (vec![0, 1, 2], vec![5, 4]), (vec![], vec![0, 1])]
    {
        let mut fetched = Fetched::new(product(&files));
        fetched.write(noted.iter().copied());
        fetched.content().sync().unwrap();
        fetched.write(unnoted.iter().copied());
        fetched.kill();
        let noted: ChunkSet = noted.into_iter().collect();
        let unnoted: ChunkSet = unnoted.into_iter().collect();
        assert_eq!(fetched.content().have(), noted);
        assert_eq!(fetched.content().adopt(&ChunkSet::from_range(fetched.all())).unwrap(), unnoted);
        assert_eq!(fetched.damaged(), ChunkSet::new());
        let rest = ChunkSet::from_range(fetched.all()).difference(&fetched.content().have());
        fetched.write(rest.iter());
        fetched.finish(&files);
        // Killed after the end and before the files are in their place.
        fetched.kill();
        assert!(fetched.content().is_complete());
        fetched.finish(&files);
    }
}

#[test]
fn files_that_were_changed_moved_or_cut_are_found_by_their_chunks_and_mended() {
    type Harm = fn(&Path);
    let files = files();
    let cases: [(&str, Harm); 4] = [
        ("large", |path| {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            (0..4).for_each(|n| file.write_all_at(&[1, 2, 3], n * PAYLOAD as u64).unwrap());
        }),
        ("large", |path| std::fs::rename(path, path.with_extension("away")).unwrap()),
        ("last", |path| std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap()),
        ("d/run", |path| std::fs::remove_dir_all(path.parent().unwrap()).unwrap()),
    ];
    for (path, harm) in cases {
        let mut fetched = Fetched::new(product(&files));
        fetched.write(fetched.all());
        fetched.content().finish().unwrap();
        harm(&fetched.file(path));
        fetched.kill();
        let damaged = fetched.damaged();
        let expected = fetched.chunks_of(&files, path);
        assert!(damaged.is_superset(&expected), "{path}: {damaged:?} and not {expected:?}");
        assert!(path == "d/run" || damaged == expected, "{path}: {damaged:?} and not {expected:?}");
        assert!(!fetched.content().is_complete());
        fetched.write(damaged.iter());
        let _ = std::fs::remove_file(fetched.file(path).with_extension("away"));
        fetched.finish(&files);
    }
    // Gone from under an open file, in the same run.
    let fetched = Fetched::new(product(&files));
    fetched.write(fetched.all());
    std::fs::remove_file(fetched.file("large")).unwrap();
    let error = fetched.content().body::<InPlace>().unwrap().finish().unwrap_err().to_string();
    assert!(error.contains("fetch again"), "{error}");
    fetched.write(fetched.damaged().iter());
    fetched.finish(&files);
}

#[test]
fn what_cannot_be_a_product_is_refused_when_its_first_chunks_come() {
    let outside = Files::folder("goods").file("../evil", noise(3 * PAYLOAD, 1));
    let fetched = Fetched::new(product(&outside));
    let mut first = fetched.product.chunk(0).to_vec();
    let error = fetched.content().write_verified_chunk(0, &mut first).unwrap_err();
    assert!(matches!(error, WriteError::Io(_)), "{error}");
    let trouble = fetched.content().body::<InPlace>().unwrap().trouble();
    assert!(matches!(trouble, Some(PlainError::Pack(_))), "{trouble:?}");
    assert!(!fetched.content().folder().join("files").exists());
}

#[test]
fn ciphertext_that_was_begun_is_gone_on_with_and_another_key_changes_nothing() {
    let files = Files::single("one", noise(3 * PAYLOAD, 1));
    let product = product(&files);
    let dir = tempfile::tempdir().unwrap();
    let store = ContentStore::open(dir.path()).unwrap();
    let content = store.create(&product.signed, &product.manifest).unwrap();
    content.put_segment(0, product.segments[0].clone()).unwrap();
    content.write_verified_chunk(1, &mut product.chunk(1).to_vec()).unwrap();
    content.sync().unwrap();
    drop((content, store));
    let bodies = InPlaceBodies::new(product.secret.clone(), true);
    let store = ContentStore::open_with(dir.path(), Arc::new(bodies)).unwrap();
    let content = store.get(&product.digest).unwrap();
    assert!(content.has(1) && content.body::<InPlace>().is_none());

    let other = InPlaceBodies::new(protocol::cipher::ContentSecret::from_bytes([8; 32]), true);
    let elsewhere = tempfile::tempdir().unwrap();
    let store = ContentStore::open_with(elsewhere.path(), Arc::new(other)).unwrap();
    let content = store.create(&product.signed, &product.manifest).unwrap();
    assert!(content.body::<InPlace>().is_none());
}
