//! Each kind of damage to delivered goods is found and named, and intact ones are never accused.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::manifest::KeyPolicy;

use super::world::{Files, PAYLOAD, Sale, World, noise};
use crate::home::{Home, now_ms};
use crate::layout::{Inventory, Layout};
use crate::library::DeliveryState;
use crate::plain::{Plain, Stored, payload};
use crate::unpack::{Selection, unpack};
use crate::verify::{FileState, VerifyError, VerifyReport, VerifyTarget, keep_records, verify};

struct Delivered {
    dir: tempfile::TempDir,
    home: Home,
    place: PathBuf,
    transaction: protocol::TransactionId,
    digest: protocol::Digest,
}

fn files() -> Files {
    Files::folder("album")
        .file("one", noise(3 * PAYLOAD, 1))
        .file("small a", noise(100, 2))
        .file("small b", noise(100, 3))
        .file("none", vec![])
        .dir("d")
        .program("d/run", noise(PAYLOAD, 4))
        .dir("d/empty")
        .link("d/link", "run")
}

/// As a fetch leaves it.
fn deliver(files: &Files, only: &[&str]) -> Delivered {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let product = world.publish(files, KeyPolicy::AtRelease);
    let home = Home::open(&dir.path().join("home"), None).unwrap();
    let sale = Sale::new(vec![], vec![]);
    let envelope = world.ticket(&product, home.peer_id(), &sale);
    let content = product.stored(&dir.path().join("store"));
    let only: Vec<String> = only.iter().map(|name| (*name).to_owned()).collect();
    let mut plain = Plain::new(Stored(Arc::clone(&content)), &product.manifest, &product.secret).unwrap();
    let listed = plain.list().unwrap();
    let selection = Selection::of(&listed.list, &only).unwrap();
    let out = std::fs::canonicalize(dir.path()).unwrap();
    let layout = Layout::new(out.join("unpacked"), listed, selection, payload(&product.manifest));
    let unpacked = unpack(&mut plain, &layout, &mut |_| true).unwrap();
    keep_records(&home, &product.digest, &unpacked.inventory, &product.values).unwrap();
    home.library().put_ticket(sale.transaction, &envelope, true, now_ms()).unwrap();
    let (signed, place) = (product.signed.clone(), unpacked.top.clone());
    home.library()
        .update(sale.transaction, move |delivery| {
            delivery.state = DeliveryState::Done;
            delivery.manifest = Some(signed.clone());
            delivery.set_place(&place);
            delivery.only = only.clone();
        })
        .unwrap();
    Delivered { home, place: unpacked.top, transaction: sale.transaction, digest: product.digest, dir }
}

impl Delivered {
    async fn verify(&self) -> VerifyReport {
        verify(&self.home, VerifyTarget::Path(self.place.clone()), |_, _| {}).await.unwrap()
    }

    async fn wrong(&self) -> Vec<(String, FileState)> {
        let report = self.verify().await;
        assert_eq!(report.is_good(), report.files.iter().all(|f| f.state == FileState::Ok));
        report.files.into_iter().filter(|f| f.state != FileState::Ok).map(|f| (f.path, f.state)).collect()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.place.join(path)
    }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn intact_goods_are_proven_against_the_manifest() {
    let delivered = deliver(&files(), &[]);
    let report = delivered.verify().await;
    assert!(report.is_good(), "{report:?}");
    assert_eq!((report.files.len(), report.unproven_chunks), (5, 0));
    assert!(report.chunks >= 4);
    assert_eq!(report.extra_count, 0);
    for target in [
        VerifyTarget::Transaction(delivered.transaction),
        VerifyTarget::Path(delivered.place.parent().unwrap().to_owned()),
        VerifyTarget::Moved(delivered.transaction, delivered.place.clone()),
    ] {
        assert!(verify(&delivered.home, target, |_, _| {}).await.unwrap().is_good());
    }
    let single = deliver(&Files::single("x", noise(10, 1)), &[]);
    assert!(single.verify().await.is_good());
    flip(&single.place, 3);
    assert!(!single.verify().await.is_good());
}

#[tokio::test]
async fn each_kind_of_damage_is_found_and_nothing_else_is_accused() {
    type Harm = fn(&Delivered);
    let cases: [(&str, Harm, &str); 10] = [
        ("one", |d| flip(&d.at("one"), 2 * PAYLOAD), "bytes changed"),
        ("small a", |d| flip(&d.at("small a"), 99), "bytes changed"),
        ("small b", |d| std::fs::write(d.at("small b"), [0; 99]).unwrap(), "99 bytes instead of 100"),
        ("one", |d| std::fs::write(d.at("one"), noise(3 * PAYLOAD + 1, 1)).unwrap(), "bytes instead of"),
        ("none", |d| std::fs::write(d.at("none"), "x").unwrap(), "1 bytes instead of 0"),
        (
            "d/run",
            |d| std::fs::set_permissions(d.at("d/run"), std::fs::Permissions::from_mode(0o644)).unwrap(),
            "not executable",
        ),
        (
            "small a",
            |d| {
                std::fs::rename(d.at("small a"), d.dir.path().join("elsewhere")).unwrap();
                std::os::unix::fs::symlink(d.dir.path().join("elsewhere"), d.at("small a")).unwrap();
            },
            "it is a link now",
        ),
        (
            "one",
            |d| {
                std::fs::remove_file(d.at("one")).unwrap();
                std::fs::create_dir(d.at("one")).unwrap();
            },
            "no file any more",
        ),
        (
            "d/link",
            |d| {
                std::fs::remove_file(d.at("d/link")).unwrap();
                std::os::unix::fs::symlink("../one", d.at("d/link")).unwrap();
            },
            "points elsewhere",
        ),
        (
            "d/empty",
            |d| {
                std::fs::remove_dir(d.at("d/empty")).unwrap();
                std::fs::write(d.at("d/empty"), "").unwrap();
            },
            "no folder any more",
        ),
    ];
    for (path, harm, why) in cases {
        let delivered = deliver(&files(), &[]);
        harm(&delivered);
        let wrong = delivered.wrong().await;
        let [(found, FileState::Damaged(reason))] = wrong.as_slice() else { panic!("{path}: {wrong:?}") };
        assert_eq!(found, path);
        assert!(reason.contains(why), "{path}: {reason}");
    }
}

#[tokio::test]
async fn missing_and_extra_files_are_told_apart() {
    let delivered = deliver(&files(), &[]);
    std::fs::remove_file(delivered.at("small a")).unwrap();
    std::fs::remove_file(delivered.at("none")).unwrap();
    std::fs::remove_file(delivered.at("d/link")).unwrap();
    std::fs::create_dir(delivered.at("mine")).unwrap();
    std::fs::write(delivered.at("mine/notes"), "x").unwrap();
    std::fs::write(delivered.at("d/more"), "x").unwrap();
    let missing: Vec<_> = delivered.wrong().await;
    let expected = ["small a", "none", "d/link"].map(|path| (path.to_owned(), FileState::Missing));
    assert_eq!(missing, expected);
    let report = delivered.verify().await;
    assert_eq!(report.extra, ["d/more", "mine"]);
    assert_eq!(report.extra_count, 2);
}

#[tokio::test]
async fn a_tampered_record_does_not_hide_damage() {
    let delivered = deliver(&files(), &[]);
    // The damage, and a note at home that calls it right: the signed manifest still does not fit.
    flip(&delivered.at("small a"), 5);
    let hash = *blake3::hash(&std::fs::read(delivered.at("small a")).unwrap()).as_bytes();
    let path = delivered.home.content_dir(&delivered.digest).join(crate::verify::INVENTORY);
    let mut inventory: Inventory = protocol::codec::decode(&std::fs::read(&path).unwrap()).unwrap();
    let sold = *blake3::hash(&noise(100, 2)).as_bytes();
    let noted = inventory.parts.iter_mut().find(|part| **part == Some(sold)).unwrap();
    *noted = Some(hash);
    std::fs::write(&path, protocol::codec::encode(&inventory)).unwrap();
    let wrong = delivered.wrong().await;
    assert!(wrong.iter().any(|(path, _)| path == "small a"), "{wrong:?}");

    for name in [crate::verify::INVENTORY, crate::verify::SEGMENTS] {
        let delivered = deliver(&files(), &[]);
        let record = delivered.home.content_dir(&delivered.digest).join(name);
        flip(&record, 40);
        let target = VerifyTarget::Path(delivered.place.clone());
        let result = verify(&delivered.home, target.clone(), |_, _| {}).await;
        assert!(result.as_ref().map_or_else(|e| matches!(e, VerifyError::NoRecord { .. }), |r| !r.is_good()));
        std::fs::remove_file(&record).unwrap();
        let error = verify(&delivered.home, target, |_, _| {}).await.unwrap_err();
        assert!(error.to_string().contains("fetch again"), "{error}");
    }
}

#[tokio::test]
async fn a_chosen_part_is_verified_as_far_as_it_goes() {
    let delivered = deliver(&files(), &["one"]);
    let report = delivered.verify().await;
    assert!(report.is_good(), "{report:?}");
    assert_eq!(report.count(|state| *state == FileState::NotFetched), 4);
    assert!(report.chunks >= 2 && report.unproven_chunks >= 1);
    flip(&delivered.at("one"), 3 * PAYLOAD - 1);
    assert_eq!(delivered.verify().await.count(|state| matches!(state, FileState::Damaged(_))), 1);
}

#[tokio::test]
async fn unknown_places_are_refused_with_the_known_ones() {
    let delivered = deliver(&files(), &[]);
    let elsewhere = tempfile::tempdir().unwrap();
    let error = verify(&delivered.home, VerifyTarget::Path(elsewhere.path().to_owned()), |_, _| {}).await.unwrap_err();
    assert!(error.to_string().contains(&delivered.place.display().to_string()), "{error}");
    std::fs::remove_dir_all(&delivered.place).unwrap();
    let report = delivered.verify().await;
    assert_eq!(report.count(|state| *state == FileState::Missing), 8);
}
