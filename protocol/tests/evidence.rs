//! Evidence as somebody checks it who trusts nobody: whatever is changed in a file, by accident or by somebody who
//! makes the checksums fit again, the check names it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::evidence::{EvidencePack, Exporter, OrderWords};
use protocol::receipt::Ack;
use protocol::signed::Document;
use protocol::ticket::TransactionData;
use protocol::trust::{KeyPurpose, KeyState};
use protocol::{ChunkSet, Digest, Signed};
use world::{NOW, samples, *};

/// A sale with everything that a file can hold.
fn pack() -> EvidencePack {
    let manifest = Signed::sign(&samples::manifest(), &network_key(KeyPurpose::Catalogue));
    let data = TransactionData { manifest: manifest.digest(), ..transaction_data() };
    let data = Signed::sign(&data, &network_key(KeyPurpose::Ticket));
    let endorsement = Signed::sign(&endorsement(&data), &merchant());
    let lease = Signed::sign(&lease(&data, &endorsement), &network_key(KeyPurpose::Ticket));
    let mut pack = EvidencePack::new(Exporter::Merchant, NOW, data.clone());
    pack.key_sets.push(Signed::sign(&key_set(), &root()));
    let ack = |seeder, range: std::ops::Range<u32>| {
        let ack = Ack { manifest: manifest.digest(), seeder, ..ack_of(ChunkSet::from_range(range), NOW) };
        Signed::sign(&ack, &client())
    };
    pack.add_ack(ack(seeder().peer_id(), 0..2));
    pack.add_ack(ack(stranger().peer_id(), 1..3));
    let completion = protocol::receipt::Completion { manifest: manifest.digest(), ..samples::completion() };
    pack.completions.push(Signed::sign(&completion, &client()));
    let record = protocol::evidence::DeliveryRecord { transaction_data: data.digest(), ..samples::delivery_record() };
    pack.record = Some(Signed::sign(&record, &network_key(KeyPurpose::Settlement)));
    pack.manifest = Some(manifest);
    pack.endorsement = Some(endorsement);
    pack.leases.push(lease);
    pack.order = Some(OrderWords {
        order: "order-7".into(),
        body: Digest::from_bytes([8; 32]),
        amount: price(),
        price_salt: salt(1),
        payment_salt: salt(2),
        authorisation: "pi_42".into(),
    });
    pack
}

#[test]
fn a_whole_file_proves_who_got_what_from_whom_and_when() {
    let pack = EvidencePack::from_bytes(&pack().to_bytes()).unwrap();
    let report = pack.verify(&root().peer_id());
    assert!(report.ok, "{report:#?}");
    let facts = report.facts;
    assert_eq!((facts.client, facts.merchant), (Some(client().peer_id()), Some(merchant().peer_id())));
    // Chunk 1 was acknowledged to both, and counts once.
    assert_eq!(facts.acknowledged_bytes, facts.content_bytes);
    assert_eq!(facts.seeders.len(), 2);
    assert_eq!((facts.price, facts.key_set_version), (Some(price()), Some(3)));
    assert!(facts.completed_at.is_some() && facts.endorsed && facts.released);
}

#[test]
fn a_changed_byte_anywhere_is_found() {
    let file = pack().to_bytes();
    for at in 0..file.len() {
        let mut changed = file.clone();
        changed[at] ^= 0x10;
        let error = EvidencePack::from_bytes(&changed).unwrap_err().to_string();
        assert!(at < 16 || error.contains("section"), "byte {at}: {error}");
    }
}

/// The same signature over other bytes, in a file whose checksums fit.
fn forged<T: Document>(signed: &Signed<T>, change: impl Fn(&mut T)) -> Signed<T> {
    let mut document = signed.peek().unwrap();
    change(&mut document);
    signed.with_body_forged(&document)
}

#[test]
fn whoever_makes_the_checksums_fit_again_is_caught_by_the_signatures() {
    let bad = |change: &dyn Fn(&mut EvidencePack)| {
        let mut pack = pack();
        change(&mut pack);
        let report = EvidencePack::from_bytes(&pack.to_bytes()).unwrap().verify(&root().peer_id());
        assert!(!report.ok);
        report.lines.into_iter().filter(|line| line.problem.is_some()).map(|line| line.section).collect::<Vec<_>>()
    };
    assert_eq!(bad(&|p| p.acks[1] = forged(&p.acks[1], |a| a.at += 1)), ["acknowledgement 2"]);
    assert_eq!(bad(&|p| p.acks[0] = Signed::sign(&p.acks[0].peek().unwrap(), &stranger())), ["acknowledgement 1"]);
    assert_eq!(bad(&|p| p.completions[0] = forged(&p.completions[0], |c| c.at += 1)), ["completion 1"]);
    assert_eq!(bad(&|p| p.record = p.record.as_ref().map(|r| forged(r, |r| r.at += 1))), ["delivery record"]);
    assert_eq!(bad(&|p| p.manifest = p.manifest.as_ref().map(|m| forged(m, |m| m.length += 1))), ["manifest"]);
    assert_eq!(bad(&|p| p.leases[0] = forged(&p.leases[0], |l| l.delivery += 1)), ["lease 1"]);
    assert_eq!(
        bad(&|p| p.endorsement = p.endorsement.as_ref().map(|e| forged(e, |e| e.authorised_at += 1))),
        ["endorsement", "lease 1"]
    );
    assert_eq!(bad(&|p| p.data = forged(&p.data, |d| d.client = stranger().peer_id())), ["transaction data", "file"]);
    assert_eq!(bad(&|p| p.order.as_mut().unwrap().amount.minor += 1), ["order", "order"]);
    assert_eq!(bad(&|p| p.order.as_mut().unwrap().authorisation.push('x')), ["order"]);
    // A lease or record of another, real sale.
    let other = Signed::sign(&samples::delivery_record(), &network_key(KeyPurpose::Settlement));
    assert_eq!(bad(&|p| p.record = Some(other.clone())), ["delivery record"]);
}

#[test]
fn a_retired_key_still_proves_what_it_signed_in_its_time_and_a_revoked_one_nothing() {
    let with = |state: KeyState| {
        let (mut pack, mut keys) = (pack(), key_set());
        for entry in keys.keys.iter_mut().filter(|entry| entry.key == network_key(KeyPurpose::Ticket).peer_id()) {
            entry.state = state;
        }
        pack.key_sets = vec![Signed::sign(&keys, &root())];
        pack.verify(&root().peer_id())
    };
    let retired = KeyState::Retiring { not_issued_after: NOW + 1, dead_after: NOW + 2 };
    assert!(with(retired).ok);
    let before = KeyState::Retiring { not_issued_after: NOW - 30 * DAY, dead_after: NOW + 2 };
    assert!(!with(before).ok);
    assert!(!with(KeyState::Revoked).ok);
    // No key set at all: nothing of the manager's is proven.
    let mut none = pack();
    none.key_sets.clear();
    assert!(!none.verify(&root().peer_id()).ok);
}
