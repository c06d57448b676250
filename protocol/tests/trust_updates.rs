//! How a node's trust grows old and is renewed: newer key sets and epochs replace older ones, and two of one number are
//! a fork of which the first stays.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::api::{GossipedBatch, is_to_blame, receipts_topic};
use protocol::certificate::{MerchantCert, SeederCert};
use protocol::receipt::SealedBatch;
use protocol::replication::ReplicationOrder;
use protocol::trust::{
    DEFAULT_CLOCK_GRACE_MS, Heartbeat, KeyPurpose, KeySet, KeyState, Moved, RevocationEpoch, RevocationState,
    Revocations, Trust, Update, check_time,
};
use protocol::{Digest, NetworkId, RefusalCode, Signed};
use world::samples::{heartbeat, mark, merchant_cert, order, sealed_batch, seeder_cert};
use world::*;

fn signed(keys: &KeySet) -> Signed<KeySet> {
    Signed::sign(keys, &root())
}

#[test]
fn a_newer_key_set_replaces_an_older_one_and_never_back() {
    let mut trust = trust();
    let newer = signed(&KeySet { version: 4, ..key_set() });
    assert_eq!(trust.update(signed(&key_set())).unwrap(), Update::NotNewer);
    assert_eq!(trust.update(newer.clone()).unwrap(), Update::Taken);
    assert_eq!(trust.update(newer.clone()).unwrap(), Update::NotNewer);
    assert_eq!(trust.update(signed(&key_set())).unwrap(), Update::NotNewer);
    assert_eq!(trust.signed_key_set(), &newer);
    assert_eq!(trust.update(signed(&KeySet { version: 90, ..key_set() })).unwrap(), Update::Taken);
    assert_eq!(trust.key_set().version, 90);
}

#[test]
fn two_key_sets_of_one_version_are_a_fork_and_the_first_stays() {
    let mut trust = trust();
    let fork = signed(&KeySet { gossip_shards: 5, ..key_set() });
    let refusal = trust.update(fork).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::KeyRetired);
    assert!(refusal.detail.contains("two different key sets of version 3"), "{refusal}");
    assert_eq!(trust.key_set(), &key_set());
}

#[test]
fn a_manager_takes_the_key_set_of_its_version_that_was_made_before_its_own() {
    let mut trust = trust();
    let at = |issued_at, gossip_shards| signed(&KeySet { issued_at, gossip_shards, ..key_set() });
    let held = key_set().issued_at;
    assert_eq!(trust.update_from_others(at(held, 7)).unwrap(), Update::NotNewer);
    assert_eq!(trust.update_from_others(at(held + 1, 7)).unwrap(), Update::NotNewer);
    assert_eq!(trust.update_from_others(at(held - 1, 7)).unwrap(), Update::Taken);
    assert_eq!(trust.key_set().gossip_shards, 7);
    // Not back: everybody's is the first.
    assert_eq!(trust.update_from_others(signed(&key_set())).unwrap(), Update::NotNewer);
    let older = KeySet { version: key_set().version - 1, issued_at: 1, ..key_set() };
    assert_eq!(trust.update_from_others(signed(&older)).unwrap(), Update::NotNewer);
    let newer = KeySet { version: key_set().version + 1, ..key_set() };
    assert_eq!(trust.update_from_others(signed(&newer)).unwrap(), Update::Taken);
    let forged = Signed::sign(&KeySet { version: 90, ..key_set() }, &stranger());
    assert_eq!(trust.update_from_others(forged).unwrap_err().code, RefusalCode::BadManagerSignature);
}

#[test]
fn only_the_root_key_makes_key_sets_and_only_for_its_network() {
    let mut trust = trust();
    let newer = KeySet { version: 4, ..key_set() };
    for key in [stranger(), manager(), network_key(KeyPurpose::Ticket)] {
        let refusal = trust.update(Signed::sign(&newer, &key)).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::BadManagerSignature);
        assert!(Trust::new(root().peer_id(), Signed::sign(&newer, &key), 0).is_err());
    }
    let foreign = KeySet { network: NetworkId::from_bytes([1; 32]), version: 4, ..key_set() };
    assert_eq!(trust.update(signed(&foreign)).unwrap_err().code, RefusalCode::WrongNetwork);
    let crowded = KeySet { version: 4, keys: vec![key_set().keys[0].clone(); KeySet::MAX_KEYS + 1], ..key_set() };
    assert_eq!(trust.update(signed(&crowded)).unwrap_err().code, RefusalCode::TooLarge);
    let full = KeySet { version: 4, keys: vec![key_set().keys[0].clone(); KeySet::MAX_KEYS], ..key_set() };
    assert_eq!(trust.update(signed(&full)).unwrap(), Update::Taken);
}

#[test]
fn each_key_signs_for_its_purpose_only() {
    let trust = trust();
    for purpose in KeyPurpose::ALL {
        let by = network_key(purpose);
        let heartbeat = trust.open(&Signed::sign(&heartbeat(), &by), KeyPurpose::Revocation, |h| h.at, NOW);
        assert_eq!(heartbeat.is_ok(), purpose == KeyPurpose::Revocation, "{purpose:?}");
        let mark = trust.open(&Signed::sign(&mark(), &by), KeyPurpose::Settlement, |m| m.at, NOW);
        assert_eq!(mark.is_ok(), purpose == KeyPurpose::Settlement, "{purpose:?}");
        // A caller that names the wrong purpose gets nothing either.
        let wrong = trust.open(&Signed::sign(&self::heartbeat(), &by), purpose, |h: &Heartbeat| h.at, NOW);
        assert_eq!(wrong.is_ok(), purpose == KeyPurpose::Revocation, "{purpose:?}");
    }
    assert_eq!(trust.active_key(KeyPurpose::Ticket), Some(network_key(KeyPurpose::Ticket).peer_id()));
}

#[test]
fn signs_of_life_of_another_network_are_refused_even_under_a_shared_key() {
    let by = network_key(KeyPurpose::Revocation);
    let foreign = Heartbeat { network: NetworkId::from_bytes([1; 32]), ..heartbeat() };
    let refusal = trust().open(&Signed::sign(&foreign, &by), KeyPurpose::Revocation, |h| h.at, NOW).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::WrongNetwork);
}

fn epoch(number: u64, previous: Option<Digest>, n: u8) -> RevocationEpoch {
    let added = Revocations { peers: vec![key(n).peer_id()], ..Revocations::default() };
    RevocationEpoch { network: network(), number, previous, at: NOW, added }
}

fn digest(epoch: &RevocationEpoch) -> Digest {
    Signed::sign(epoch, &network_key(KeyPurpose::Revocation)).digest()
}

#[test]
fn epochs_are_applied_in_order_without_gaps_and_without_forks() {
    let mut state = RevocationState::default();
    let first = epoch(1, None, 101);
    let second = epoch(2, Some(digest(&first)), 102);
    let third = epoch(3, Some(digest(&second)), 103);

    assert_eq!(state.apply(digest(&second), &second).unwrap_err().code, RefusalCode::StaleRevocations);
    assert_eq!(state.apply(digest(&first), &first).unwrap(), Update::Taken);
    assert_eq!(state.apply(digest(&third), &third).unwrap_err().code, RefusalCode::StaleRevocations);
    assert_eq!(state.apply(digest(&second), &second).unwrap(), Update::Taken);
    assert_eq!(state.apply(digest(&second), &second).unwrap(), Update::NotNewer);
    assert_eq!(state.apply(digest(&first), &first).unwrap(), Update::NotNewer);

    let fork = epoch(2, Some(digest(&first)), 104);
    assert_eq!(state.apply(digest(&fork), &fork).unwrap_err().code, RefusalCode::BadManagerSignature);
    let child_of_fork = epoch(3, Some(digest(&fork)), 105);
    assert_eq!(state.apply(digest(&child_of_fork), &child_of_fork).unwrap_err().code, RefusalCode::BadManagerSignature);
    let orphan = epoch(3, None, 106);
    assert_eq!(state.apply(digest(&orphan), &orphan).unwrap_err().code, RefusalCode::BadManagerSignature);

    assert_eq!(state.apply(digest(&third), &third).unwrap(), Update::Taken);
    assert_eq!((state.number(), state.last()), (3, Some(digest(&third))));
    for (n, revoked) in [(101, true), (102, true), (103, true), (104, false), (105, false), (106, false)] {
        assert_eq!(state.has_peer(&key(n).peer_id()), revoked, "{n}");
    }
}

#[test]
fn a_restored_manager_begins_a_new_chain_that_everybody_follows() {
    let mut state = RevocationState::default();
    let (first, anew) = (epoch(1, None, 101), epoch(1_795_000_000, None, 102));
    let after = epoch(1_795_000_001, Some(digest(&anew)), 103);
    state.apply(digest(&first), &first).unwrap();
    assert_eq!(state.apply(digest(&anew), &anew).unwrap(), Update::Taken);
    assert_eq!(state.apply(digest(&after), &after).unwrap(), Update::Taken);
    assert_eq!(state.apply(digest(&anew), &anew).unwrap(), Update::NotNewer);
    let all = state.all();
    assert_eq!(all.peers.len(), 3, "what was revoked before stays revoked");
}

#[test]
fn a_purchase_never_moves_back_to_an_older_generation() {
    let mut state = RevocationState::default();
    let mut previous = None;
    for (number, generation) in [(1, 2), (2, 5), (3, 3)] {
        let moved = vec![Moved { transaction: transaction(), generation }];
        let epoch =
            RevocationEpoch { added: Revocations { moved, ..Revocations::default() }, ..epoch(number, previous, 101) };
        previous = Some(digest(&epoch));
        state.apply(digest(&epoch), &epoch).unwrap();
    }
    assert!(state.has_moved_on(&transaction(), 4) && !state.has_moved_on(&transaction(), 5));
    assert!(!state.has_transaction(&transaction()), "it is not revoked");
    assert_eq!(state.all().moved, [Moved { transaction: transaction(), generation: 5 }]);
    assert!(!state.has_moved_on(&protocol::TransactionId::from_bytes([9; 16]), 0), "others did not move");
}

#[test]
fn the_first_epoch_has_none_before_it_and_the_last_number_does_no_harm() {
    let mut state = RevocationState::default();
    let grafted = epoch(1, Some(Digest::from_bytes([1; 32])), 101);
    assert_eq!(state.apply(digest(&grafted), &grafted).unwrap_err().code, RefusalCode::BadManagerSignature);
    let far = epoch(u64::MAX, None, 101);
    assert_eq!(state.apply(digest(&far), &far).unwrap_err().code, RefusalCode::StaleRevocations);
    let mut crowded = epoch(1, None, 101);
    crowded.added.peers = vec![key(1).peer_id(); RevocationEpoch::MAX_ENTRIES + 1];
    assert_eq!(state.apply(digest(&crowded), &crowded).unwrap_err().code, RefusalCode::TooLarge);
    assert_eq!(state.number(), 0);
}

#[test]
fn certificates_are_good_for_their_holder_and_time_only() {
    let (trust, mut revoked) = (trust(), RevocationState::default());
    let by = network_key(KeyPurpose::Enrolment);
    let (me, cert) = (seeder().peer_id(), seeder_cert());
    let check = |cert: &SeederCert, peer, revoked: &RevocationState, now| {
        SeederCert::check(&Signed::sign(cert, &by), &peer, &trust, revoked, now).map_err(|r| r.code)
    };
    assert_eq!(check(&cert, me, &revoked, NOW).unwrap(), cert);
    assert_eq!(check(&cert, stranger().peer_id(), &revoked, NOW), Err(RefusalCode::NotEnrolled));
    let foreign = SeederCert { network: NetworkId::from_bytes([1; 32]), ..cert.clone() };
    assert_eq!(check(&foreign, me, &revoked, NOW), Err(RefusalCode::WrongNetwork));
    assert_eq!(check(&cert, me, &revoked, cert.until + 600_001), Err(RefusalCode::Expired));
    assert_eq!(check(&cert, me, &revoked, cert.from - 600_001), Err(RefusalCode::NotYetValid));
    let mut added = epoch(1, None, 13);
    added.added.peers.push(merchant().peer_id());
    revoked.apply(digest(&added), &added).unwrap();
    assert_eq!(check(&cert, me, &revoked, NOW), Err(RefusalCode::Revoked));
    let merchant_of = |cert: &MerchantCert, revoked: &RevocationState| {
        MerchantCert::check(&Signed::sign(cert, &by), &merchant().peer_id(), &trust, revoked, NOW).map_err(|r| r.code)
    };
    assert!(merchant_of(&merchant_cert(), &RevocationState::default()).is_ok());
    assert_eq!(merchant_of(&merchant_cert(), &revoked), Err(RefusalCode::Revoked));
}

#[test]
fn a_replication_order_is_judged_like_a_ticket() {
    let (trust, revoked) = (trust(), RevocationState::default());
    let by = network_key(KeyPurpose::Ticket);
    let judge = |order: &ReplicationOrder, by: &protocol::Keypair, now| {
        let admission = protocol::ticket::Admission { now, ..admission(&trust, &revoked) };
        ReplicationOrder::check(&Signed::sign(order, by), &admission).map(drop).map_err(|r| r.code)
    };
    let good = order();
    assert_eq!(judge(&good, &by, NOW), Ok(()));
    let foreign = ReplicationOrder { network: NetworkId::from_bytes([1; 32]), ..good.clone() };
    assert_eq!(judge(&foreign, &by, NOW), Err(RefusalCode::WrongNetwork));
    let others = ReplicationOrder { seeder: stranger().peer_id(), ..good.clone() };
    assert_eq!(judge(&others, &by, NOW), Err(RefusalCode::WrongClient));
    assert_eq!(judge(&good, &by, NOW + DAY + 600_001), Err(RefusalCode::Expired));
    assert_eq!(judge(&good, &by, NOW - HOUR - 600_001), Err(RefusalCode::NotYetValid));
    assert_eq!(judge(&good, &stranger(), NOW), Err(RefusalCode::UnknownKey));
    assert_eq!(judge(&good, &revoked_key(), NOW), Err(RefusalCode::KeyRetired));
    let forged = Signed::sign(&good, &by).with_body_forged(&ReplicationOrder { ceiling: u64::MAX, ..good.clone() });
    let refusal = ReplicationOrder::check(&forged, &admission(&trust, &revoked)).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::BadManagerSignature);
}

#[test]
fn time_is_judged_with_the_grace_at_both_ends_and_never_overflows() {
    let grace = DEFAULT_CLOCK_GRACE_MS;
    for (from, until, now, expected) in [
        (1_000_000, 2_000_000, 400_000, None),
        (1_000_000, 2_000_000, 399_999, Some(RefusalCode::NotYetValid)),
        (1_000_000, 2_000_000, 2_600_000, None),
        (1_000_000, 2_000_000, 2_600_001, Some(RefusalCode::Expired)),
        (0, u64::MAX, u64::MAX, None),
        (0, 0, u64::MAX, Some(RefusalCode::Expired)),
        (u64::MAX, u64::MAX, 0, Some(RefusalCode::NotYetValid)),
        (u64::MAX, 0, u64::MAX, Some(RefusalCode::Expired)),
    ] {
        let result = check_time("thing", from, until, now, grace).map_err(|r| r.code);
        assert_eq!(result.err(), expected, "{from} {until} {now}");
    }
}

#[test]
fn a_certificate_holds_no_longer_than_the_word_of_the_key_that_signed_it() {
    let (cert, by) = (seeder_cert(), network_key(KeyPurpose::Enrolment).peer_id());
    let with = |state: KeyState| {
        let mut set = trust().key_set().clone();
        set.version += 1;
        set.keys.iter_mut().filter(|entry| entry.key == by).for_each(|entry| entry.state = state);
        let mut trust = trust();
        trust.update(Signed::sign(&set, &root())).unwrap();
        trust
    };
    let merchant = MerchantCert { from: cert.from, until: cert.until, ..merchant_cert() };
    let holds = |state| {
        let trust = with(state);
        assert_eq!(merchant.holds_until(&by, &trust), cert.holds_until(&by, &trust));
        (cert.holds_until(&by, &trust), cert.is_due(&by, &trust, NOW))
    };
    assert_eq!(holds(KeyState::Active), (cert.until, false));
    let retiring = |not_issued_after, dead_after| KeyState::Retiring { not_issued_after, dead_after };
    assert_eq!(holds(retiring(cert.from, u64::MAX)), (cert.until, false));
    assert_eq!(holds(retiring(cert.from, NOW + 1)), (NOW + 1, true));
    assert_eq!(holds(retiring(cert.from - 1, u64::MAX)), (0, true));
    assert_eq!(holds(KeyState::Revoked), (0, true));
    assert_eq!(cert.holds_until(&stranger().peer_id(), &trust()), 0);
    assert!(cert.is_due(&by, &trust(), cert.until - 1));
}

#[test]
fn who_passes_a_batch_on_is_not_blamed_for_keys_that_it_heard_of_earlier_or_later() {
    let certificate = Signed::sign(&seeder_cert(), &network_key(KeyPurpose::Enrolment));
    let topic = receipts_topic(&network(), &seeder().peer_id(), key_set().gossip_shards);
    let judge = |gossiped: &GossipedBatch, topic: &str, trust: &Trust| {
        gossiped.check(topic, trust, &RevocationState::default(), NOW).map_err(|refusal| refusal.code)
    };
    let blamed = |code: Result<_, RefusalCode>| is_to_blame(code.unwrap_err());
    let good = GossipedBatch { certificate, batch: sealed_batch() };
    assert_eq!(judge(&good, &topic, &trust()), Ok(seeder().peer_id()));
    // Sealed, or certified, by a key of the next key set; or certified by one that this member knows to be void.
    let next = stranger().peer_id();
    let sealed = Signed::sign(&SealedBatch { sealed_to: next, ..good.batch.peek().unwrap() }, &seeder());
    let sealed = GossipedBatch { batch: sealed, ..good.clone() };
    assert_eq!(judge(&sealed, &topic, &trust()), Err(RefusalCode::UnknownKey));
    let enrolled = GossipedBatch { certificate: Signed::sign(&seeder_cert(), &stranger()), ..good.clone() };
    assert_eq!(judge(&enrolled, &topic, &trust()), Err(RefusalCode::UnknownKey));
    let mut set = key_set();
    set.keys.iter_mut().for_each(|entry| entry.state = KeyState::Revoked);
    let newer = Trust::new(root().peer_id(), signed(&set), DEFAULT_CLOCK_GRACE_MS).unwrap();
    assert_eq!(judge(&good, &topic, &newer), Err(RefusalCode::KeyRetired));
    for (gossiped, trust) in [(&sealed, &trust()), (&enrolled, &trust()), (&good, &newer)] {
        assert!(!blamed(judge(gossiped, &topic, trust)));
    }
    // What everybody can see.
    assert_eq!(judge(&good, "/other", &trust()), Err(RefusalCode::Malformed));
    let forged = GossipedBatch { batch: Signed::sign(&good.batch.peek().unwrap(), &stranger()), ..good.clone() };
    assert_eq!(judge(&forged, &topic, &trust()), Err(RefusalCode::NotEnrolled));
    let others = Signed::sign(&SealedBatch { seeder: next, ..good.batch.peek().unwrap() }, &seeder());
    let others = GossipedBatch { batch: others, ..good.clone() };
    assert_eq!(judge(&others, &topic, &trust()), Err(RefusalCode::BadReceipt));
    assert!([&forged, &others].iter().all(|gossiped| blamed(judge(gossiped, &topic, &trust()))));
}
