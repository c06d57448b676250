//! What a file of evidence does not have: whoever makes it may leave out what it likes, and a manager has room for so much.
//! What is left out is not shown to be nothing, and what is there counts without it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::entitlement::Move;
use protocol::evidence::{DeliveryRecord, EvidencePack, Exporter, Report};
use protocol::receipt::{Ack, Completion};
use protocol::ticket::Lease;
use protocol::trust::KeyPurpose;
use protocol::{ChunkSet, Keypair, PeerId, Signed};
use world::{NOW, samples, *};

/// The buyer's first download, and the sale's record.
fn pack() -> EvidencePack {
    let manifest = Signed::sign(&samples::manifest(), &network_key(KeyPurpose::Catalogue));
    let data = protocol::ticket::TransactionData { manifest: manifest.digest(), ..transaction_data() };
    let data = Signed::sign(&data, &network_key(KeyPurpose::Ticket));
    let mut pack = EvidencePack::new(Exporter::Manager, NOW, data.clone());
    pack.key_sets.push(Signed::sign(&key_set(), &root()));
    pack.endorsement = Some(Signed::sign(&endorsement(&data), &merchant()));
    pack.manifest = Some(manifest);
    pack
}

fn lease_of(pack: &EvidencePack, change: impl Fn(&mut Lease)) -> Signed<Lease> {
    let mut lease = lease(&pack.data, pack.endorsement.as_ref().unwrap());
    change(&mut lease);
    Signed::sign(&lease, &network_key(KeyPurpose::Ticket))
}

/// A peer acknowledges and completes all of a delivery.
fn receive(pack: &mut EvidencePack, by: &Keypair, delivery: u32) {
    let manifest = pack.manifest.as_ref().unwrap().digest();
    let mut ack = Ack { manifest, ..ack_of(ChunkSet::from_range(0..3), NOW) };
    ack.delivery.delivery = delivery;
    pack.add_ack(Signed::sign(&ack, by));
    let mut completion = Completion { manifest, ..samples::completion() };
    completion.delivery.delivery = delivery;
    pack.completions.push(Signed::sign(&completion, by));
}

fn record(pack: &mut EvidencePack, change: impl Fn(&mut DeliveryRecord)) {
    let (transaction_data, leases) = (pack.data.digest(), pack.leases.iter().map(Signed::digest).collect());
    let mut record = DeliveryRecord { transaction_data, leases, ..samples::delivery_record() };
    change(&mut record);
    pack.record = Some(Signed::sign(&record, &network_key(KeyPurpose::Settlement)));
}

fn judge(pack: &EvidencePack) -> Report {
    EvidencePack::from_bytes(&pack.to_bytes()).unwrap().verify(&root().peer_id())
}

fn moved(by: &Keypair, to: PeerId, generation: u32) -> Signed<Move> {
    Signed::sign(&Move { network: network(), transaction: transaction(), to, generation, at: NOW }, by)
}

#[test]
fn what_a_holder_signed_counts_without_the_lease_of_that_download() {
    let (phone, tablet, thief) = (key(70), key(71), key(72));
    let mut pack = pack();
    receive(&mut pack, &client(), 1);
    pack.moves = vec![moved(&client(), phone.peer_id(), 1), moved(&phone, tablet.peer_id(), 2)];
    // The phone's was delivery 2; what a renewal took the place of is nowhere, nor is the phone's last lease.
    receive(&mut pack, &phone, 2);
    receive(&mut pack, &tablet, 5);
    pack.leases.push(lease_of(&pack, |l| (l.client, l.generation, l.delivery) = (tablet.peer_id(), 2, 6)));
    let report = judge(&pack);
    assert!(report.ok, "{report:#?}");
    for peer in [&phone, &tablet] {
        let theirs = &report.facts.others[&peer.peer_id()];
        assert_eq!(theirs.acknowledged_bytes, report.facts.content_bytes, "{report:#?}");
        assert!(theirs.completed_at.is_some(), "{report:#?}");
    }
    let said = |peer: &Keypair, how: &str| {
        let said = format!("says {}, {how}", peer.peer_id());
        report.lines.iter().filter(|line| line.claim.contains(&said)).count()
    };
    assert_eq!((said(&phone, "to whom it was given"), said(&tablet, "whom a lease names")), (2, 2), "{report:#?}");
    assert_eq!(report.facts.received.acknowledged_bytes, report.facts.content_bytes);

    // Where the lease is there, it says whose delivery it was; and who never had the purchase counts for nothing.
    for (by, delivery) in [(&phone, 6), (&thief, 2), (&thief, 9)] {
        let mut more = pack.clone();
        receive(&mut more, by, delivery);
        let report = judge(&more);
        let bad = report.lines.iter().filter(|line| line.problem.is_some()).count();
        assert_eq!((report.ok, bad), (false, 2), "{report:#?}");
        assert!(!report.facts.others.contains_key(&thief.peer_id()), "{report:#?}");
    }
}

#[test]
fn that_something_is_not_in_the_file_is_no_fact() {
    let mut whole = pack();
    whole.leases.push(lease_of(&whole, |_| {}));
    receive(&mut whole, &client(), 1);
    record(&mut whole, |_| {});
    let report = judge(&whole);
    assert!(report.ok && report.facts.received.acknowledged_bytes == report.facts.content_bytes, "{report:#?}");
    let mut cut = whole.clone();
    (cut.acks, cut.completions, cut.leases, cut.endorsement) = (Vec::new(), Vec::new(), Vec::new(), None);
    let report = judge(&cut);
    assert!(report.ok, "{report:#?}");
    assert!(report.facts.content_bytes.is_some(), "{report:#?}");
    assert_eq!(report.facts.received, protocol::evidence::Received::default());
    // What the manager says came in stands beside it.
    let recorded = report.facts.record.unwrap();
    assert!(recorded.completed_at.is_some() && recorded.released_at.is_some(), "{recorded:?}");
    assert!(report.lines.iter().all(|line| !line.claim.contains("never")), "{report:#?}");
    // A record that does not hold says nothing.
    let mut forged = cut;
    let forge = forged.record.as_ref().unwrap();
    forged.record = Some(Signed::sign(&forge.peek().unwrap(), &stranger()));
    assert_eq!(judge(&forged).facts.record, None);
}

#[test]
fn a_lease_that_a_later_record_does_not_name_is_marked() {
    let whole = || {
        let mut pack = pack();
        pack.leases.push(lease_of(&pack, |_| {}));
        pack
    };
    let stranger = stranger().peer_id();
    let other = |pack: &EvidencePack| lease_of(pack, |l| (l.client, l.delivery) = (stranger, 7));
    let issued_at = other(&whole()).peek().unwrap().issued_at;
    // Named, or with no record at all, or with one of before it.
    let mut named = whole();
    named.leases.push(other(&named));
    assert!(judge(&named).lines.iter().all(|line| !line.unproven));
    record(&mut named, |_| {});
    assert!(judge(&named).ok && judge(&named).lines.iter().all(|line| !line.unproven));
    let unnamed = |change: &dyn Fn(&mut DeliveryRecord)| {
        let mut pack = whole();
        record(&mut pack, change);
        pack.leases.push(other(&pack));
        let report = judge(&pack);
        assert!(report.ok, "{report:#?}");
        let marked = report.lines.into_iter().filter(|line| line.unproven);
        marked.map(|line| (line.section, line.claim)).collect::<Vec<_>>()
    };
    assert_eq!(unnamed(&|record| record.at = issued_at - 1), []);
    let marked = unnamed(&|_| {});
    assert_eq!((marked.len(), marked[0].0.as_str()), (1, "lease 2"), "{marked:?}");
    assert!(marked[0].1.contains("does not name it: another took its place"), "{marked:?}");
    // A manager that came back from a backup may have forgotten those of before.
    let forgotten = unnamed(&|record| record.restored_at = Some(issued_at + 1));
    assert!(forgotten[0].1.contains("may have forgotten it"), "{forgotten:?}");
    let since = unnamed(&|record| record.restored_at = Some(issued_at));
    assert!(since[0].1.contains("another took its place"), "{since:?}");
}
