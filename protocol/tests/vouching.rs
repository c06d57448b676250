//! Evidence after a key was revoked: what a document of another key names by its digest is proven, nothing that a thief can
//! make is, and what is left without a voucher is called unproven.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::evidence::{DeliveryRecord, EvidencePack, Exporter, Line, NonDelivery, Report};
use protocol::receipt::{Ack, Completion};
use protocol::ticket::{Lease, TransactionData};
use protocol::trust::{KeyEntry, KeyPurpose, KeySet, KeyState};
use protocol::{ChunkSet, Keypair, Signed, TransactionId};
use world::{NOW, samples, *};

/// The ticket key that took the place of the stolen one.
fn newer_key() -> Keypair {
    key(90)
}

/// The key set after the theft.
fn after(revoked: &[KeyPurpose]) -> Signed<KeySet> {
    let mut keys = key_set();
    for purpose in revoked {
        let key = network_key(*purpose).peer_id();
        keys.keys.iter_mut().filter(|entry| entry.key == key).for_each(|entry| entry.state = KeyState::Revoked);
    }
    let newer = KeyEntry { purpose: KeyPurpose::Ticket, key: newer_key().peer_id(), state: KeyState::Active };
    keys.keys.push(newer);
    keys.version += 1;
    Signed::sign(&keys, &root())
}

/// A delivered sale as the manager exports it, under key sets where these keys were revoked.
fn pack(revoked: &[KeyPurpose]) -> EvidencePack {
    let (ticket, settlement) = (network_key(KeyPurpose::Ticket), network_key(KeyPurpose::Settlement));
    let manifest = Signed::sign(&samples::manifest(), &network_key(KeyPurpose::Catalogue));
    let data = TransactionData { manifest: manifest.digest(), ..transaction_data() };
    let data = Signed::sign(&data, &ticket);
    let endorsement = Signed::sign(&endorsement(&data), &merchant());
    let lease = Signed::sign(&lease(&data, &endorsement), &ticket);
    let mut pack = EvidencePack::new(Exporter::Manager, NOW, data.clone());
    pack.key_sets.push(after(revoked));
    let ack = Ack { manifest: manifest.digest(), ..ack_of(ChunkSet::from_range(0..3), NOW) };
    pack.add_ack(Signed::sign(&ack, &client()));
    let completion = Completion { manifest: manifest.digest(), ..samples::completion() };
    pack.completions.push(Signed::sign(&completion, &client()));
    let (transaction_data, leases) = (data.digest(), vec![lease.digest()]);
    let record = DeliveryRecord { transaction_data, leases, ..samples::delivery_record() };
    pack.record = Some(Signed::sign(&record, &settlement));
    pack.manifest = Some(manifest);
    pack.endorsement = Some(endorsement);
    pack.leases.push(lease);
    pack
}

fn judge(pack: &EvidencePack) -> Report {
    EvidencePack::from_bytes(&pack.to_bytes()).unwrap().verify(&root().peer_id())
}

fn line<'a>(report: &'a Report, section: &str) -> &'a Line {
    report.lines.iter().find(|line| line.section == section).unwrap()
}

/// Sections that do not hold.
fn bad(report: &Report) -> Vec<&str> {
    report.lines.iter().filter(|line| line.problem.is_some()).map(|line| line.section.as_str()).collect()
}

fn proves_nothing(report: &Report) {
    assert!(!report.ok && report.facts.transaction.is_none(), "{report:#?}");
    assert!(
        report.facts.received.acknowledged_bytes.is_none() && report.facts.received.completed_at.is_none(),
        "{report:#?}"
    );
}

#[test]
fn the_delivery_record_vouches_for_the_sale_and_its_leases_and_the_sale_for_its_manifest() {
    for revoked in [vec![KeyPurpose::Ticket], vec![KeyPurpose::Ticket, KeyPurpose::Catalogue]] {
        let report = judge(&pack(&revoked));
        assert!(report.ok && !report.key_revoked, "{report:#?}");
        assert_eq!(report.facts.received.acknowledged_bytes, report.facts.content_bytes);
        assert!(report.facts.received.completed_at.is_some() && report.facts.released);
        // It is said which lines hold by another key's word alone.
        let by = |section: &str| line(&report, section).vouched_by.clone();
        let record = Some("the delivery record".to_owned());
        assert_eq!((by("transaction data"), by("lease 1")), (record.clone(), record));
        let sale = revoked.contains(&KeyPurpose::Catalogue).then(|| "the transaction data".to_owned());
        assert_eq!((by("manifest"), by("acknowledgement 1"), by("delivery record")), (sale, None, None));
    }
    let report = judge(&pack(&[]));
    assert!(report.ok && report.lines.iter().all(|line| line.vouched_by.is_none()), "{report:#?}");
}

#[test]
fn without_a_voucher_nothing_hangs_on_a_revoked_key() {
    let mut alone = pack(&[KeyPurpose::Ticket]);
    alone.record = None;
    let report = judge(&alone);
    proves_nothing(&report);
    assert!(report.key_revoked);
    assert!(
        line(&report, "transaction data").problem.as_ref().unwrap().contains("no other document in the file vouches")
    );
    // A record whose own key was revoked is none, whatever time it gives.
    proves_nothing(&judge(&pack(&[KeyPurpose::Ticket, KeyPurpose::Settlement])));
    // The merchant's word for it is the merchant's.
    assert!(alone.endorsement.is_some());

    // The manager's word that nothing came in names the sale, and no lease.
    let mut nothing = alone.clone();
    let word = NonDelivery { transaction_data: alone.data.digest(), ..samples::non_delivery() };
    nothing.non_delivery = Some(Signed::sign(&word, &network_key(KeyPurpose::Settlement)));
    let report = judge(&nothing);
    assert_eq!(line(&report, "transaction data").vouched_by.as_deref(), Some("the non-delivery"));
    assert_eq!((bad(&report), report.facts.released), (vec!["lease 1"], false));
    // So does a newer lease; what the client signed then is proven, and the older lease is not.
    let mut renewed = alone;
    let lease = renewed.leases[0].peek().unwrap();
    renewed.leases.push(Signed::sign(&lease, &newer_key()));
    let report = judge(&renewed);
    assert_eq!(line(&report, "transaction data").vouched_by.as_deref(), Some("lease 2"));
    assert_eq!(bad(&report), ["lease 1"]);
    assert!(report.facts.released && report.facts.received.completed_at.is_some());
    assert_eq!(report.facts.received.acknowledged_bytes, report.facts.content_bytes);
}

#[test]
fn whoever_stole_the_ticket_key_forges_nothing_with_true_records_at_hand() {
    let stolen = network_key(KeyPurpose::Ticket);
    let thief = stranger();
    let whole = pack(&[KeyPurpose::Ticket]);
    let forge = |change: &dyn Fn(&mut TransactionData)| {
        let mut data = whole.data.peek().unwrap();
        change(&mut data);
        Signed::sign(&data, &stolen)
    };
    // A sale to the thief, or another one of the same client, beside everything true of a real sale.
    for data in [
        forge(&|data| data.client = thief.peer_id()),
        forge(&|data| data.formed_at -= DAY),
        forge(&|data| data.transaction = TransactionId::from_bytes([66; 16])),
    ] {
        let mut forged = whole.clone();
        let lease = Lease { transaction_data: data.digest(), ..whole.leases[0].peek().unwrap() };
        forged.data = data;
        proves_nothing(&judge(&forged));
        // With leases of its own as well: they are under the stolen key.
        forged.leases.push(Signed::sign(&lease, &stolen));
        proves_nothing(&judge(&forged));
        // Under any key but the network's.
        forged.leases.push(Signed::sign(&lease, &thief));
        proves_nothing(&judge(&forged));
    }
    // Over the true sale: a lease to the thief, with what the thief acknowledged under it.
    let mut forged = whole.clone();
    let lease = Lease { client: thief.peer_id(), delivery: 7, ..whole.leases[0].peek().unwrap() };
    forged.leases.push(Signed::sign(&lease, &stolen));
    let mut ack = whole.acks[0].peek().unwrap();
    (ack.delivery.delivery, ack.seeder) = (7, thief.peer_id());
    forged.add_ack(Signed::sign(&ack, &thief));
    let mut completion = whole.completions[0].peek().unwrap();
    (completion.delivery.delivery, completion.at) = (7, 1);
    forged.completions.push(Signed::sign(&completion, &thief));
    let report = judge(&forged);
    assert_eq!(bad(&report), ["lease 2", "acknowledgement 2", "completion 2"]);
    assert_eq!(report.facts.seeders.len(), 1);
    assert!(report.facts.received.completed_at.is_some_and(|at| at > 1));
    // The same bytes under the stolen key again are another document, which no record names: but they are the same bytes.
    let signed_again = Signed::sign(&whole.data.peek().unwrap(), &stolen);
    assert_eq!(signed_again.digest(), whole.data.digest(), "a signature is a function of key and bytes");
    // A record by the stolen key, or about another network's sale, is none.
    let mut foreign = whole.clone();
    let record = whole.record.as_ref().unwrap().peek().unwrap();
    foreign.record = Some(Signed::sign(&record, &stolen));
    proves_nothing(&judge(&foreign));
    let mut elsewhere = whole.clone();
    elsewhere.data = forge(&|data| data.network = protocol::NetworkId::from_bytes([5; 32]));
    let record = DeliveryRecord { transaction_data: elsewhere.data.digest(), ..record };
    elsewhere.record = Some(Signed::sign(&record, &network_key(KeyPurpose::Settlement)));
    proves_nothing(&judge(&elsewhere));
}
