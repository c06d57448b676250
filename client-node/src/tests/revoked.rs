//! What was revoked, in a network that revokes much: it is caught up with, kept in few files, and read again without
//! believing what the disk made of it.

use std::path::{Path, PathBuf};

use protocol::codec;
use protocol::trust::{RevocationEpoch, RevocationState, Revocations, Trust};
use protocol::{RefusalCode, Signed};

use super::fetching::Client;
use super::network::Vice;
use super::voided::begun;
use super::world::World;
use crate::home::now_ms;
use crate::networks::Networks;

struct Remembered {
    _dir: tempfile::TempDir,
    networks: Networks,
    epochs: PathBuf,
    world: World,
    trust: Trust,
}

impl Remembered {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new();
        let networks = Networks::new(dir.path().join("networks"));
        let epochs = dir.path().join("networks").join(world.network.to_string()).join("epochs");
        let trust = Trust::new(world.root.peer_id(), world.key_set(1, &[]), 1000).unwrap();
        Remembered { _dir: dir, networks, epochs, world, trust }
    }

    fn read(&self) -> RevocationState {
        self.networks.revocations(&self.trust, now_ms()).unwrap()
    }

    fn take(&self, epochs: &[Signed<RevocationEpoch>]) -> usize {
        let taken = self.networks.take_epochs(self.read(), &self.trust, epochs, now_ms()).unwrap();
        assert!(taken.refused.is_none());
        taken.epochs.len()
    }

    fn files(&self) -> Vec<String> {
        let name = |entry: std::fs::DirEntry| entry.file_name().into_string().unwrap();
        let mut names: Vec<String> = std::fs::read_dir(&self.epochs).unwrap().flatten().map(name).collect();
        names.sort();
        names
    }
}

/// Replaces bytes in a file by others of the same length.
fn replace(path: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    bytes[at..at + from.len()].copy_from_slice(to);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn epochs_share_files_and_those_that_earlier_builds_kept_one_by_one_are_read_and_brought_in() {
    let home = Remembered::new();
    let chain = home.world.epochs(600);
    std::fs::create_dir_all(&home.epochs).unwrap();
    for (number, epoch) in (1u64..).zip(&chain[..300]) {
        std::fs::write(home.epochs.join(format!("{number:020}")), codec::encode(epoch)).unwrap();
    }
    assert_eq!(home.read().number(), 300, "as an earlier build left it");
    assert_eq!(home.take(&chain[300..301]), 1);
    assert_eq!(home.files().len(), 2, "{:?}", home.files());
    assert_eq!(home.take(&chain[200..]), 299, "those that are known are passed over");
    assert_eq!(home.files().len(), 3);
    let state = home.read();
    assert_eq!((state.number(), state.last()), (600, chain.last().map(Signed::digest)));
    assert_eq!(state.all().contents.len(), 600);
    // What follows on one that is refused is not kept; what came before it is.
    let lost = home.world.next_epoch(&[&chain[..], &chain[..]].concat(), Revocations::default());
    let next = home.world.next_epoch(&chain, Revocations::default());
    let taken = home.networks.take_epochs(state.place(), &home.trust, &[next, lost], now_ms()).unwrap();
    assert_eq!((taken.epochs.len(), taken.refused.unwrap().code), (1, RefusalCode::StaleRevocations));
    assert_eq!(home.read().number(), 601);
}

#[test]
fn what_the_disk_made_of_an_epoch_is_not_believed_and_is_asked_for_again() {
    let home = Remembered::new();
    let chain = home.world.epochs(40);
    for hurt in [0, 20, 39] {
        home.take(&chain);
        assert_eq!(home.read().number(), 40);
        let content = chain[hurt].peek().unwrap().added.contents[0];
        replace(&home.epochs.join(format!("page-{:020}", 0)), content.as_bytes(), &[7; 16]);
        let state = home.read();
        assert_eq!(state.number(), hurt as u64, "those before it hold");
        assert_eq!(state.all().contents.len(), hurt);
        assert_eq!(home.take(&chain[hurt..]), 40 - hurt);
        assert_eq!((home.read().number(), home.files().len()), (40, 1));
    }
}

#[test]
fn more_epochs_than_are_remembered_count_all_the_same_and_take_no_more_files() {
    let home = Remembered::new();
    let chain = home.world.epochs(256);
    home.take(&chain[..200]);
    for page in 1000..1000 + 4095 {
        std::fs::write(home.epochs.join(format!("page-{page:020}")), "").unwrap();
    }
    assert_eq!(home.take(&chain[200..]), 56);
    assert_eq!((home.files().len(), home.read().number()), (4096, 255), "that of 256 would be one more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_taken_down_is_found_behind_more_epochs_than_come_in_one_answer() {
    let client = Client::new();
    let (net, ticket) = begun(&client, Vice::Lacks).await;
    net.manager.tickets.lock().unwrap().push(ticket.clone());
    client.fetch(&ticket).await.unwrap_err();
    let mut chain = net.world.epochs(300);
    let contents = vec![net.product.manifest.content];
    chain.push(net.world.next_epoch(&chain, Revocations { contents, ..Revocations::default() }));
    *net.manager.epochs.lock().unwrap() = chain;
    let error = client.fetch(&ticket).await.unwrap_err();
    assert!(error.to_string().contains("taken down"), "{error}");
    net.stop().await;
}
