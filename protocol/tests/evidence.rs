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

use protocol::entitlement::{Move, Recovery};
use protocol::evidence::{
    DeliveryRecord, EvidenceError, EvidencePack, Exporter, NonDelivery, OrderWords, StatementFile,
};
use protocol::receipt::Ack;
use protocol::sections::{Format, Section};
use protocol::signed::Document;
use protocol::ticket::{Lease, TransactionData};
use protocol::trust::{KeyPurpose, KeyState};
use protocol::utc::Utc;
use protocol::{ChunkSet, Digest, Signed, TransactionId};
use world::{NOW, samples, *};

/// A sale with everything that a file can hold.
fn pack() -> EvidencePack {
    pack_of(transaction())
}

/// Everything about another sale of the same network, product and parties.
fn other_pack() -> EvidencePack {
    pack_of(TransactionId::from_bytes([77; 16]))
}

fn pack_of(transaction: TransactionId) -> EvidencePack {
    let manifest = Signed::sign(&samples::manifest(), &network_key(KeyPurpose::Catalogue));
    let data = TransactionData { manifest: manifest.digest(), transaction, ..transaction_data() };
    let data = Signed::sign(&data, &network_key(KeyPurpose::Ticket));
    let endorsement = Signed::sign(&endorsement(&data), &merchant());
    let lease = Signed::sign(&lease(&data, &endorsement), &network_key(KeyPurpose::Ticket));
    let mut pack = EvidencePack::new(Exporter::Merchant, NOW, data.clone());
    pack.key_sets.push(Signed::sign(&key_set(), &root()));
    let ack = |seeder, range: std::ops::Range<u32>| {
        let mut ack = Ack { manifest: manifest.digest(), seeder, ..ack_of(ChunkSet::from_range(range), NOW) };
        ack.delivery.transaction = transaction;
        Signed::sign(&ack, &client())
    };
    pack.add_ack(ack(seeder().peer_id(), 0..2));
    pack.add_ack(ack(stranger().peer_id(), 1..3));
    let mut completion = protocol::receipt::Completion { manifest: manifest.digest(), ..samples::completion() };
    completion.delivery.transaction = transaction;
    pack.completions.push(Signed::sign(&completion, &client()));
    let transaction_data = data.digest();
    let record = DeliveryRecord { transaction, transaction_data, ..samples::delivery_record() };
    pack.record = Some(Signed::sign(&record, &network_key(KeyPurpose::Settlement)));
    pack.non_delivery = Some(non_delivery_of(&pack, NOW));
    pack.manifest = Some(manifest);
    pack.endorsement = Some(endorsement);
    pack.leases.push(lease);
    let (network, to) = (network(), stranger().peer_id());
    pack.moves.push(Signed::sign(&Move { network, transaction, to, generation: 1, at: NOW }, &client()));
    let back = Recovery { network, transaction, to: client().peer_id(), generation: 2, at: NOW + 1 };
    pack.recoveries.push(Signed::sign(&back, &merchant()));
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
fn what_another_peer_signed_is_not_the_designated_clients() {
    let mut pack = pack();
    let lease = pack.leases[0].peek().unwrap();
    let (next, other) = (lease.delivery + 1, stranger());
    let moved = Lease { client: other.peer_id(), delivery: next, ..lease };
    pack.leases.push(Signed::sign(&moved, &network_key(KeyPurpose::Ticket)));
    // The designated client never had anything; all of it is the other's.
    for signed in std::mem::take(&mut pack.acks) {
        let mut ack = signed.peek().unwrap();
        ack.delivery.delivery = next;
        pack.add_ack(Signed::sign(&ack, &other));
    }
    for signed in std::mem::take(&mut pack.completions) {
        let mut completion = signed.peek().unwrap();
        completion.delivery.delivery = next;
        pack.completions.push(Signed::sign(&completion, &other));
    }
    let report = pack.verify(&root().peer_id());
    let facts = report.facts;
    assert_eq!(facts.client, Some(client().peer_id()));
    // Not that it had nothing: of that there is nothing in the file.
    assert_eq!((facts.received.acknowledged_bytes, facts.received.completed_at), (None, None));
    assert_eq!(facts.received.last_acknowledged_at, None);
    let (peer, others) = facts.others.iter().next().unwrap();
    assert_eq!((peer, facts.others.len()), (&other.peer_id(), 1));
    assert_eq!(others.acknowledged_bytes, facts.content_bytes);
    assert!(others.completed_at.is_some() && others.last_acknowledged_at.is_some());
    assert!(facts.seeders.iter().all(|share| share.client == other.peer_id()) && facts.seeders.len() == 2);
    let who = format!("says {}, whom a lease names", other.peer_id());
    let said: Vec<_> = report.lines.iter().filter(|line| line.claim.contains(&who)).collect();
    assert_eq!(said.len(), 3, "two acknowledgements and a completion: {said:#?}");
}

#[test]
fn who_gave_it_to_whom_is_proven_by_their_own_words() {
    let report = pack().verify(&root().peer_id());
    let moved = |report: &protocol::evidence::Report| {
        report.facts.moved.iter().map(|m| (m.generation, m.by, m.recovered, m.to)).collect::<Vec<_>>()
    };
    let [buyer, other, shop] = [client().peer_id(), stranger().peer_id(), merchant().peer_id()];
    assert_eq!(moved(&report), [(1, buyer, false, other), (2, shop, true, buyer)]);
    assert!(report.ok, "{report:#?}");
    let word = |generation, by: &protocol::Keypair, to| {
        let (network, transaction) = (network(), transaction());
        Signed::sign(&Move { network, transaction, to, generation, at: NOW }, by)
    };
    let with = |moves: Vec<Signed<Move>>| {
        let mut pack = pack();
        (pack.moves, pack.recoveries) = (moves, Vec::new());
        EvidencePack::from_bytes(&pack.to_bytes()).unwrap().verify(&root().peer_id())
    };
    // From hand to hand, in whatever order they stand.
    let far = protocol::Keypair::from_seed(&[99; 32]);
    let hands = with(vec![word(3, &far, buyer), word(1, &client(), other), word(2, &stranger(), far.peer_id())]);
    assert!(hands.ok, "{hands:#?}");
    assert_eq!(moved(&hands).iter().map(|m| m.3).collect::<Vec<_>>(), [other, far.peer_id(), buyer]);
    // Who has it no more, or never had it, gives nothing; and no generation begins twice.
    let twice = with(vec![word(1, &client(), other), word(2, &client(), far.peer_id())]);
    assert!(!twice.ok && moved(&twice).len() == 1, "{twice:#?}");
    let fork = with(vec![word(1, &client(), other), word(1, &client(), far.peer_id())]);
    assert!(!fork.ok && moved(&fork).len() == 1, "{fork:#?}");
    let thief = with(vec![word(1, &far, other)]);
    assert!(!thief.ok && moved(&thief).is_empty(), "{thief:#?}");
    let line = thief.lines.iter().find(|line| line.section == "move 1").unwrap();
    assert!(line.problem.as_ref().unwrap().contains("did not have the purchase"), "{line:?}");
}

fn non_delivery_of(pack: &EvidencePack, by: u64) -> Signed<NonDelivery> {
    let transaction = pack.data.peek().unwrap().transaction;
    let word = NonDelivery { transaction, transaction_data: pack.data.digest(), by, ..samples::non_delivery() };
    Signed::sign(&NonDelivery { issued_at: NOW + DAY, ..word }, &network_key(KeyPurpose::Settlement))
}

#[test]
fn a_whole_file_proves_who_got_what_from_whom_and_when() {
    let pack = EvidencePack::from_bytes(&pack().to_bytes()).unwrap();
    let report = pack.verify(&root().peer_id());
    assert!(report.ok, "{report:#?}");
    let facts = report.facts;
    assert_eq!((facts.client, facts.merchant), (Some(client().peer_id()), Some(merchant().peer_id())));
    // Chunk 1 was acknowledged to both, and counts once.
    assert_eq!(facts.received.acknowledged_bytes, facts.content_bytes);
    assert_eq!(facts.seeders.len(), 2);
    assert_eq!((facts.price, facts.key_set_version), (Some(price()), Some(3)));
    assert!(facts.received.completed_at.is_some() && facts.endorsed && facts.released);
    // When the manager says where the sale stands is not when it came to stand there.
    let record = report.lines.iter().find(|line| line.section == "delivery record").unwrap();
    assert!(record.claim.starts_with(&format!("as of {}, the order", Utc(NOW + DAY))), "{}", record.claim);
    assert!(record.claim.contains(": delivered; released at"), "{}", record.claim);
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
        ["endorsement", "lease 1", "order"]
    );
    assert_eq!(bad(&|p| p.data = forged(&p.data, |d| d.client = stranger().peer_id())), ["transaction data", "file"]);
    assert_eq!(bad(&|p| p.order.as_mut().unwrap().amount.minor += 1), ["order", "order"]);
    assert_eq!(bad(&|p| p.order.as_mut().unwrap().authorisation.push('x')), ["order"]);
    // Another order of the same price and payment is not the one that the manager's record names.
    assert_eq!(bad(&|p| p.order.as_mut().unwrap().body = Digest::from_bytes([9; 32])), ["order"]);
    assert_eq!(bad(&|p| p.moves[0] = forged(&p.moves[0], |m| m.to = seeder().peer_id())), ["move 1"]);
    assert_eq!(bad(&|p| p.moves[0] = Signed::sign(&p.moves[0].peek().unwrap(), &merchant())), ["move 1"]);
    assert_eq!(bad(&|p| p.recoveries[0] = Signed::sign(&p.recoveries[0].peek().unwrap(), &client())), ["recovery 1"]);
    // A lease or record of another, real sale.
    let other = Signed::sign(&samples::delivery_record(), &network_key(KeyPurpose::Settlement));
    assert_eq!(bad(&|p| p.record = Some(other.clone())), ["delivery record"]);
}

/// The frame without any rule of what is in it: whoever forges a file makes the checksums fit.
const FRAME: Format =
    Format { magic: b"willcall evid 1\n", what: "evidence file", names: &[], max_bytes: 1 << 20, max_sections: 256 };

/// Length of a section without bytes, which is how a file ends.
const END: usize = 1 + 4 + 32;

/// Kinds of which a file has several, and shows each.
const SEVERAL: [u8; 6] = [2, 5, 7, 8, 12, 13];

#[test]
fn nothing_of_another_file_can_be_spliced_in_unseen() {
    let (mine, theirs) = (pack().to_bytes(), other_pack().to_bytes());
    let (mine, theirs) = (FRAME.read(&mine).unwrap(), FRAME.read(&theirs).unwrap());
    let judge = |sections: &[Section]| {
        EvidencePack::from_bytes(&FRAME.write(sections)).map(|pack| pack.verify(&root().peer_id()))
    };
    let whole = judge(&mine).unwrap();
    assert!(whole.ok && mine.iter().map(|section| section.kind).collect::<std::collections::BTreeSet<_>>().len() == 13);
    let shown = |section: &Section| if section.kind == 11 { 2 } else { 1 };
    for foreign in &theirs {
        for at in 0..=mine.len() {
            let mut spliced = mine.clone();
            spliced.insert(at, foreign.clone());
            let what = format!("kind {} at {at}", foreign.kind);
            match judge(&spliced) {
                Err(EvidenceError::Second { .. } | EvidenceError::Again { .. } | EvidenceError::Order { .. }) => {}
                Err(error) => panic!("{what}: {error}"),
                // One more of a kind of which there may be more: it has a line of its own.
                Ok(report) => {
                    assert!(SEVERAL.contains(&foreign.kind), "{what}");
                    assert_eq!(report.lines.len(), whole.lines.len() + 1, "{what}: {:#?}", report.lines);
                    assert!(!report.ok, "{what}: a line of another sale holds");
                }
            }
            // In the place of one of the same kind: what is shown of it says so.
            if mine.get(at).is_some_and(|own| own.kind == foreign.kind && own != foreign) {
                spliced.remove(at + 1);
                let report = judge(&spliced).unwrap();
                assert!(!report.ok, "{what}: {:#?}", report.lines);
            }
        }
    }
    for (at, own) in mine.iter().enumerate() {
        for to in 0..=mine.len() {
            let mut twice = mine.clone();
            twice.insert(to, own.clone());
            assert!(judge(&twice).is_err(), "kind {} of {at} again at {to}", own.kind);
        }
        let mut moved = mine.clone();
        let own = moved.remove(at);
        match judge(&moved) {
            Err(EvidenceError::Incomplete(_)) => assert!([1, 3].contains(&own.kind)),
            Err(error) => panic!("without {at}: {error}"),
            Ok(report) => assert!(report.lines.len() <= whole.lines.len() - shown(&own), "without {at}"),
        }
        for to in (0..mine.len()).filter(|to| mine[*to].kind != own.kind) {
            let mut swapped = mine.clone();
            swapped.swap(at, to);
            assert!(matches!(judge(&swapped), Err(EvidenceError::Order { .. })), "{at} and {to}");
        }
    }
}

#[test]
fn a_file_has_no_room_for_bytes_that_its_check_does_not_show() {
    let sections = FRAME.read(&pack().to_bytes()).unwrap();
    let refused = |sections: &[Section]| EvidencePack::from_bytes(&FRAME.write(sections)).unwrap_err().to_string();
    for kind in [14, 99, 255] {
        let mut more = sections.clone();
        more.push(Section { kind, bytes: b"a note".to_vec() });
        assert!(refused(&more).contains("does not know"), "{}", refused(&more));
    }
    for at in 0..sections.len() {
        let mut longer = sections.clone();
        longer[at].bytes.push(0);
        assert!(refused(&longer).contains("left over"), "{at}: {}", refused(&longer));
    }
    // The same number, written longer: `about` is version, exporter, time as a prefix and eight bytes, left out.
    let mut other_form = sections.clone();
    assert_eq!(other_form[0].bytes.pop(), Some(0));
    other_form[0].bytes.extend([251, 0, 0]);
    assert!(refused(&other_form).contains("the one way"), "{}", refused(&other_form));
    // In the mark at the end, and after it.
    let mut more = sections.clone();
    more.push(Section { kind: 0, bytes: b"a note".to_vec() });
    let file = FRAME.write(&more);
    assert!(EvidencePack::from_bytes(&file[..file.len() - END]).unwrap_err().to_string().contains("follow the end"));
    assert!(EvidencePack::from_bytes(&file).is_err());
    // A name that would draw lines of its own.
    let mut drawn = pack();
    drawn.order.as_mut().unwrap().order = "7\nok   the client signed: all".to_owned();
    let lines = EvidencePack::from_bytes(&drawn.to_bytes()).unwrap().verify(&root().peer_id()).lines;
    assert!(lines.iter().all(|line| !line.claim.contains('\n')), "{lines:#?}");
    drawn.order.as_mut().unwrap().order = "7".repeat(OrderWords::MAX_ORDER + 1);
    assert!(!drawn.verify(&root().peer_id()).ok);

    // Statements are files of the same frame.
    let statement = Signed::sign(&samples::statement(), &network_key(KeyPurpose::Settlement));
    let keys = Signed::sign(&key_set(), &root());
    let file = StatementFile { key_sets: vec![keys], statements: vec![statement] };
    let frame = Format { magic: b"willcall stmt 1\n", ..FRAME };
    let sections = frame.read(&file.to_bytes()).unwrap();
    let read = |sections: &[Section]| StatementFile::from_bytes(&frame.write(sections));
    assert_eq!(read(&sections).unwrap(), file);
    let [keys, statement] = <[Section; 2]>::try_from(sections).unwrap();
    let (one, two) = (keys.clone(), statement.clone());
    assert!(matches!(read(&[two.clone(), one.clone()]), Err(EvidenceError::Order { .. })));
    assert!(matches!(read(&[one.clone(), two.clone(), two]), Err(EvidenceError::Again { .. })));
    assert!(matches!(read(&[one.clone(), one, statement]), Err(EvidenceError::Again { .. })));
}

#[test]
fn several_acknowledgements_of_one_seeder_are_one_share() {
    let mut pack = pack();
    let older = forged_and_signed(&pack.acks[0], |ack| (ack.chunks, ack.at) = (ChunkSet::from_range(0..1), NOW - 5));
    pack.add_ack(older);
    let report = EvidencePack::from_bytes(&pack.to_bytes()).unwrap().verify(&root().peer_id());
    assert!(report.ok);
    let mut chunks: Vec<u32> = report.facts.seeders.iter().map(|share| share.chunks).collect();
    chunks.sort_unstable();
    assert_eq!((chunks.as_slice(), report.facts.received.last_acknowledged_at), ([2, 2].as_slice(), Some(NOW)));
}

/// What the client signed, with a change that it signed as well.
fn forged_and_signed(signed: &Signed<Ack>, change: impl Fn(&mut Ack)) -> Signed<Ack> {
    let mut ack = signed.peek().unwrap();
    change(&mut ack);
    Signed::sign(&ack, &client())
}

#[test]
fn that_nothing_came_in_holds_only_for_the_time_that_the_manager_knows_of() {
    let with = |restored_at: Option<u64>, by: u64, first_at: Option<u64>| {
        let mut pack = pack();
        let key = network_key(KeyPurpose::Settlement);
        let word = NonDelivery { restored_at, ..non_delivery_of(&pack, by).peek().unwrap() };
        pack.non_delivery = Some(Signed::sign(&word, &key));
        let record = DeliveryRecord { first_at, restored_at, ..pack.record.unwrap().peek().unwrap() };
        pack.record = Some(Signed::sign(&record, &key));
        pack.verify(&root().peer_id())
    };
    let report = with(None, NOW, Some(NOW + 2));
    assert!(report.ok && report.facts.nothing_acknowledged_by == Some(NOW), "{report:#?}");
    assert_eq!(report.facts.nothing_acknowledged_since, None);
    let report = with(Some(NOW - 5), NOW, Some(NOW + 2));
    assert!(report.ok && report.facts.nothing_acknowledged_since == Some(NOW - 5), "{report:#?}");
    assert_eq!(report.facts.manager_restored_at, Some(NOW - 5));
    for line in ["non-delivery", "delivery record"] {
        let line = report.lines.iter().find(|found| found.section == line).unwrap();
        assert!(line.claim.contains("came back from a backup"), "{line:?}");
    }
    // Of the time before it says nothing, and against its own record neither.
    for bad in [with(Some(NOW + 1), NOW, Some(NOW + 2)), with(None, NOW, Some(NOW)), with(None, NOW + 2, Some(NOW + 2))]
    {
        assert!(!bad.ok && bad.facts.nothing_acknowledged_by.is_none(), "{bad:#?}");
    }
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

#[test]
fn a_file_of_statements_takes_as_many_bytes_as_it_may_and_can_be_read() {
    // As large as a statement gets, nearly: every line with a long reason.
    let mut large = samples::statement();
    let line = large.receipts.pop().unwrap();
    large.receipts = vec![line; 1024];
    let size = Signed::sign(&large, &network_key(KeyPurpose::Settlement)).body().len() + 256;
    let most = 56 * 1024 * 1024 / size;
    assert!(most < StatementFile::MOST, "the bytes are the bound here: {most} of {size}");
    let statement = |number: u64| {
        let statement = protocol::statement::Statement { number, ..large.clone() };
        Ok::<_, std::convert::Infallible>(Signed::sign(&statement, &network_key(KeyPurpose::Settlement)))
    };
    let (file, more) = StatementFile::of(Vec::new(), (1..=most as u64).map(statement)).unwrap();
    assert_eq!((file.statements.len(), more), (most, false));
    let (file, more) = StatementFile::of(Vec::new(), (1..=most as u64 + 2).map(statement)).unwrap();
    assert_eq!((file.statements.len(), more), (most, true), "the rest goes into another one");
    let bytes = file.to_bytes();
    assert!(bytes.len() <= StatementFile::MAX_BYTES, "{}", bytes.len());
    assert_eq!(StatementFile::from_bytes(&bytes).unwrap(), file);
}
