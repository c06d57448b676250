//! Packs made by an honest publisher come out as they went in; packs made by anybody else end in an error, and nothing
//! of them is ever outside of the folder.

use std::path::Path;

use protocol::cipher::ContentSecret;
use protocol::manifest::KeyPolicy;
use protocol::pack::{EntryKind, HEADER_LEN, MAGIC};

use super::world::{CHUNK, Files, PAYLOAD, Product, World, listing, noise};
use crate::layout::{Layout, Unpacked};
use crate::plain::{Frames, Plain, PlainError, payload};
use crate::unpack::{Selection, UnpackError, unpack};

struct Memory<'a>(&'a Product);

impl Frames for Memory<'_> {
    fn read(&mut self, frame: u32, buffer: &mut Vec<u8>) -> Result<(), PlainError> {
        buffer.clear();
        buffer.extend_from_slice(self.0.chunk(frame));
        Ok(())
    }

    fn is_intact(&self, frame: u32, buffer: &[u8]) -> bool {
        self.0.manifest.verifies(frame, &self.0.values[frame as usize], buffer)
    }
}

fn unpack_with(product: &Product, secret: &ContentSecret, only: &[&str], dir: &Path) -> Result<Unpacked, UnpackError> {
    let mut plain = Plain::new(Memory(product), &product.manifest, secret)?;
    let listed = plain.list()?;
    let only: Vec<String> = only.iter().map(|name| (*name).to_owned()).collect();
    let selection = Selection::of(&listed.list, &only)?;
    let layout = Layout::new(dir.to_owned(), listed, selection, payload(&product.manifest));
    unpack(&mut plain, &layout, &mut |_| true)
}

fn unpack_all(product: &Product, dir: &Path) -> Result<Unpacked, UnpackError> {
    unpack_with(product, &product.secret, &[], dir)
}

#[test]
fn every_edge_of_the_frames_comes_out_as_it_went_in() {
    let world = World::new();
    let head = Files::single("x", vec![]).pack().len();
    // Contents such that the file, and then the whole pack, ends just before, at and after a frame's end.
    let sizes = [0, 1, PAYLOAD - 1, PAYLOAD, PAYLOAD + 1, CHUNK, 3 * PAYLOAD, 3 * PAYLOAD + 7];
    let fitted = [PAYLOAD - head - 1, PAYLOAD - head, PAYLOAD - head + 1, 2 * PAYLOAD - head];
    for size in sizes.into_iter().chain(fitted) {
        let files = Files::single("x", noise(size, 1));
        let product = world.publish(&files, KeyPolicy::AtRelease);
        let dir = tempfile::tempdir().unwrap();
        let unpacked = unpack_all(&product, &dir.path().join("unpacked")).unwrap();
        assert_eq!((unpacked.files, unpacked.bytes), (1, size as u64));
        files.assert_in(&unpacked.top);
    }
}

#[test]
fn names_modes_links_and_empty_folders_are_kept() {
    let files = Files::folder("An album")
        .file("a b\nc", noise(10, 1))
        .dir("日本")
        .file("日本/… -rf *", noise(PAYLOAD * 2, 2))
        .dir("empty")
        .dir("bin")
        .program("bin/run", noise(1, 3))
        .link("bin/again", "run")
        .link("up", "日本/… -rf *")
        .file("nothing", vec![])
        .file("e\u{301}", noise(3, 4));
    let product = World::new().publish(&files, KeyPolicy::AtRelease);
    let dir = tempfile::tempdir().unwrap();
    let unpacked = unpack_all(&product, &dir.path().join("unpacked")).unwrap();
    assert_eq!(unpacked.top, dir.path().join("unpacked").join("An album"));
    assert_eq!(unpacked.files, 5);
    files.assert_in(&unpacked.top);
    assert_eq!(listing(&unpacked.top).len(), files.list.entries.len());
}

#[test]
fn many_small_files_and_an_empty_product() {
    let mut files = Files::folder("many");
    for n in 0..600 {
        files = files.file(&format!("{n}"), noise(n % 7, n as u8));
    }
    let dir = tempfile::tempdir().unwrap();
    let product = World::new().publish(&files, KeyPolicy::AtRelease);
    files.assert_in(&unpack_all(&product, &dir.path().join("many")).unwrap().top);
    let product = World::new().publish(&Files::folder("none"), KeyPolicy::AtRelease);
    assert_eq!(listing(&unpack_all(&product, &dir.path().join("none")).unwrap().top), Vec::<String>::new());
}

#[test]
fn only_what_is_chosen_comes_out() {
    let files = Files::folder("p")
        .file("read me", noise(5, 1))
        .dir("disc 1")
        .file("disc 1/01.flac", noise(PAYLOAD, 2))
        .file("disc 1/02.flac", noise(9, 3))
        .dir("disc 2")
        .file("disc 2/01.mp3", noise(2 * PAYLOAD, 4));
    let product = World::new().publish(&files, KeyPolicy::AtRelease);
    let cases: [(&[&str], &[&str]); 4] = [
        (&["disc 1/"], &["disc 1", "disc 1/01.flac", "disc 1/02.flac"]),
        (&["*.mp3"], &["disc 2", "disc 2/01.mp3"]),
        (&["disc ?/01.*"], &["disc 1", "disc 1/01.flac", "disc 2", "disc 2/01.mp3"]),
        (&["read me", "disc 1/02.flac"], &["disc 1", "disc 1/02.flac", "read me"]),
    ];
    for (only, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let unpacked = unpack_with(&product, &product.secret, only, &dir.path().join("u")).unwrap();
        assert_eq!(listing(&unpacked.top), expected, "{only:?}");
        let chosen = std::fs::read(unpacked.top.join(expected[expected.len() - 1])).unwrap();
        assert!(files.contents.contains(&chosen));
    }
    let dir = tempfile::tempdir().unwrap();
    let error = unpack_with(&product, &product.secret, &["disc 3"], &dir.path().join("u")).unwrap_err().to_string();
    assert!(error.contains("'disc 3'") && error.contains("'read me'"), "{error}");
}

/// What a hostile or broken publisher could sign.
#[test]
fn hostile_packs_end_in_an_error_and_leave_nothing_outside() {
    let world = World::new();
    let bad = |files: Files| files.pack();
    let lies = |size| {
        let mut files = Files::folder("p").file("x", noise(100, 1));
        files.list.entries[0].kind = EntryKind::File { size, executable: false };
        files.pack()
    };
    let good = Files::folder("p").file("x", noise(PAYLOAD, 1)).pack();
    let mut other_magic = good.clone();
    other_magic[7] = 2;
    let mut long_list = good.clone();
    long_list[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut list_past_the_end = good.clone();
    list_past_the_end[8..16].copy_from_slice(&((good.len() - HEADER_LEN + 1) as u64).to_le_bytes());
    let packs: Vec<(&str, Vec<u8>)> = vec![
        ("above", bad(Files::folder("p").file("../evil", noise(3, 1)))),
        ("absolute", bad(Files::folder("p").file("/tmp/evil", noise(3, 1)))),
        ("name above", bad(Files::folder("..").file("evil", noise(3, 1)))),
        ("name with a slash", bad(Files::folder("../evil"))),
        ("single above", bad(Files::single("../evil", noise(3, 1)))),
        ("link out", bad(Files::folder("p").link("l", "../../etc"))),
        ("absolute link", bad(Files::folder("p").link("l", "/etc"))),
        ("file through a link", bad(Files::folder("p").link("l", "d").file("l/evil", noise(3, 1)))),
        ("up again behind a link", bad(Files::folder("p").dir("d").link("d/l", "..").link("out", "d/l/../evil"))),
        ("twice", bad(Files::folder("p").file("x", noise(3, 1)).file("x", noise(3, 1)))),
        ("merged", bad(Files::folder("p").file("x", noise(3, 1)).file("X", noise(3, 1)))),
        ("longer than it is", lies(101)),
        ("shorter than it is", lies(99)),
        ("overflow", lies(u64::MAX)),
        ("truncated", good[..good.len() - 1].to_vec()),
        ("trailing", [good.clone(), vec![0]].concat()),
        ("other magic", other_magic),
        ("long list", long_list),
        ("list past the end", list_past_the_end),
        ("header only", MAGIC.to_vec()),
        ("noise", noise(3 * PAYLOAD, 9)),
    ];
    for (what, pack) in packs {
        let product = world.publish_bytes(&pack, KeyPolicy::AtRelease);
        let dir = tempfile::tempdir().unwrap();
        let error = unpack_all(&product, &dir.path().join("unpacked")).expect_err(what);
        assert!(matches!(error, UnpackError::Plain(PlainError::Pack(_))), "{what}: {error}");
        assert_eq!(listing(dir.path()), Vec::<String>::new(), "{what}");
    }
}

#[test]
fn links_through_links_that_stay_inside_are_fine() {
    let files = Files::folder("app")
        .dir("versions")
        .dir("versions/A")
        .file("versions/A/lib", noise(3, 1))
        .link("versions/current", "A")
        .link("lib", "versions/current/lib")
        .link("versions/up", "../versions/./A");
    let product = World::new().publish(&files, KeyPolicy::AtRelease);
    let dir = tempfile::tempdir().unwrap();
    let unpacked = unpack_all(&product, &dir.path().join("u")).unwrap();
    files.assert_in(&unpacked.top);
    assert_eq!(std::fs::read(unpacked.top.join("lib")).unwrap(), noise(3, 1));
}

#[test]
fn wrong_keys_and_wrong_frames_have_their_own_names() {
    let world = World::new();
    let files = Files::single("x", noise(2 * PAYLOAD, 1));
    let mut product = world.publish(&files, KeyPolicy::AtRelease);
    let dir = tempfile::tempdir().unwrap();
    let other = ContentSecret::from_bytes([8; 32]);
    let error = unpack_with(&product, &other, &[], &dir.path().join("u")).unwrap_err();
    assert!(matches!(error, UnpackError::Plain(PlainError::WrongKey)), "{error}");

    // Damaged after it was verified.
    product.bytes[CHUNK + 5] ^= 1;
    let error = unpack_all(&product, &dir.path().join("u")).unwrap_err();
    assert!(matches!(error, UnpackError::Plain(PlainError::Damaged(1))), "{error}");

    // Published so: the manifest vouches for a frame that does not authenticate.
    product.values[1] = protocol::manifest::chunk_value(CHUNK as u64, product.chunk(1), false);
    let error = unpack_all(&product, &dir.path().join("u")).unwrap_err();
    assert!(matches!(error, UnpackError::Plain(PlainError::Cipher(_))), "{error}");
}

#[test]
fn what_an_earlier_run_left_is_replaced_and_stopping_stops() {
    let files = Files::single("x", noise(4 * PAYLOAD, 1));
    let product = World::new().publish(&files, KeyPolicy::AtRelease);
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("u");
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("x"), "half").unwrap();
    std::fs::write(target.join("y"), "older").unwrap();
    let mut plain = Plain::new(Memory(&product), &product.manifest, &product.secret).unwrap();
    let listed = plain.list().unwrap();
    let layout = Layout::new(target.clone(), listed, Selection::all(), payload(&product.manifest));
    let stopped = unpack(&mut plain, &layout, &mut |bytes| bytes < PAYLOAD as u64);
    assert!(matches!(stopped, Err(UnpackError::Stopped)));
    let unpacked = unpack_all(&product, &target).unwrap();
    files.assert_in(&unpacked.top);
    assert_eq!(listing(&target), ["x"]);
}
