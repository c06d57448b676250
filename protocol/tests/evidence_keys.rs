//! Evidence under several key sets: an older one takes nothing back of what a newer one says, whatever the order in which
//! they stand, and two sets that cannot be of one network's history are not both taken.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::evidence::{EvidencePack, Exporter, KeySets, Report, StatementFile, check_statement_files};
use protocol::root::{RootHandover, commitment};
use protocol::statement::Statement;
use protocol::trust::{KeyPurpose, KeySet, KeyState};
use protocol::{RefusalCode, Signed};
use world::{NOW, samples, *};

const TICKET: KeyPurpose = KeyPurpose::Ticket;

/// The samples' sale, formed at `NOW - HOUR`.
fn report(key_sets: &[Signed<KeySet>]) -> Report {
    let data = Signed::sign(&transaction_data(), &network_key(TICKET));
    let endorsement = Signed::sign(&endorsement(&data), &merchant());
    let mut pack = EvidencePack::new(Exporter::Merchant, NOW, data.clone());
    pack.leases.push(Signed::sign(&lease(&data, &endorsement), &network_key(TICKET)));
    pack.endorsement = Some(endorsement);
    pack.key_sets = key_sets.to_vec();
    EvidencePack::from_bytes(&pack.to_bytes()).unwrap().verify(&root().peer_id())
}

/// A key set of a version and time, with the network's key for a purpose in this state, or without it.
fn set_of(purpose: KeyPurpose, version: u64, issued_at: u64, state: Option<KeyState>) -> KeySet {
    let mut set = KeySet { version, issued_at, ..key_set() };
    let key = network_key(purpose).peer_id();
    match state {
        Some(state) => set.keys.iter_mut().filter(|entry| entry.key == key).for_each(|entry| entry.state = state),
        None => set.keys.retain(|entry| entry.key != key),
    }
    set
}

fn set(version: u64, issued_at: u64, state: Option<KeyState>) -> Signed<KeySet> {
    Signed::sign(&set_of(TICKET, version, issued_at, state), &root())
}

fn retired(at: u64) -> Option<KeyState> {
    Some(KeyState::Retiring { not_issued_after: at, dead_after: u64::MAX })
}

const ACTIVE: Option<KeyState> = Some(KeyState::Active);

#[test]
fn an_older_key_set_takes_nothing_back_of_what_a_newer_one_says() {
    let (long_ago, before) = (NOW - 60 * DAY, NOW - 30 * DAY);
    let old = set(1, long_ago, ACTIVE);
    for (newer, what) in [
        (vec![set(2, before, retired(before))], "retired"),
        (vec![set(2, before, None)], "dropped"),
        (vec![set(2, before, retired(before)), set(3, NOW - 10 * DAY, None)], "retired, then dropped"),
        (vec![set(2, before, Some(KeyState::Revoked))], "revoked"),
        (vec![set(2, before, Some(KeyState::Revoked)), set(3, NOW - 10 * DAY, None)], "revoked, then dropped"),
        // Dropped before the sale, and whatever a set of after it gives as its time.
        (vec![set(2, before, None), set(3, NOW + DAY, None)], "dropped twice"),
    ] {
        let alone = report(&newer);
        assert!(!alone.ok && alone.facts.transaction.is_none(), "{what}: {alone:#?}");
        let mut sets = newer;
        for place in 0..=sets.len() {
            sets.insert(place, old.clone());
            let report = report(&sets);
            assert!(!report.ok && report.facts.transaction.is_none() && !report.facts.released, "{what}: {report:#?}");
            sets.remove(place);
        }
    }
    // With the old one alone it is good, and is said to be so as of that one.
    let report = report(&[old]);
    assert!(report.ok && report.facts.key_set_version == Some(1), "{report:#?}");
}

#[test]
fn what_a_key_signed_in_its_time_is_good_by_every_set_of_its_time_and_after_it() {
    // The sale and its lease were signed about NOW - HOUR.
    let begun = set(2, NOW - 20 * DAY, ACTIVE);
    for (sets, what) in [
        (vec![begun.clone(), set(1, NOW - 60 * DAY, None)], "the set of before the key was made"),
        (vec![set(3, NOW - DAY, retired(NOW)), begun.clone()], "retired with an overlap"),
        (vec![set(3, NOW - DAY, retired(NOW))], "the newest alone, as clients have it"),
        (vec![set(9, NOW + 90 * DAY, None), set(3, NOW, retired(NOW)), begun.clone()], "dropped when it was dead"),
        (vec![set(9, NOW + 90 * DAY, None), begun.clone()], "a node that missed the set by which it was retired"),
    ] {
        for turned in [false, true] {
            let mut sets = sets.clone();
            if turned {
                sets.reverse();
            }
            let report = report(&sets);
            assert!(report.ok && report.facts.released, "{what}: {report:#?}");
        }
    }
}

#[test]
fn statements_in_one_file_are_judged_by_the_key_sets_of_all_that_are_shown_with_it() {
    const SETTLEMENT: KeyPurpose = KeyPurpose::Settlement;
    let first = Statement { number: 1, previous: None, from: 0, ..samples::statement() };
    let signed = Signed::sign(&first, &network_key(SETTLEMENT));
    let keys = |version, issued_at, state| Signed::sign(&set_of(SETTLEMENT, version, issued_at, state), &root());
    let old = keys(1, first.issued_at - 60 * DAY, ACTIVE);
    let file = |sets: &[&Signed<KeySet>], statements: &[&Signed<Statement>]| StatementFile {
        key_sets: sets.iter().map(|set| (*set).clone()).collect(),
        statements: statements.iter().map(|signed| (*signed).clone()).collect(),
    };
    let judge = |files: &[StatementFile]| {
        let (lines, good) = check_statement_files(files, &root().peer_id());
        let bad: Vec<String> = lines.into_iter().filter_map(|line| line.problem).collect();
        (bad, good.len())
    };
    assert_eq!(judge(&[file(&[&old], &[&signed])]), (vec![], 1));
    for state in [retired(first.issued_at - 1), None] {
        let newer = keys(2, first.issued_at - 30 * DAY, state);
        for sets in [[&newer, &old], [&old, &newer]] {
            let (bad, good) = judge(&[file(&sets, &[&signed])]);
            assert_eq!((bad.len(), good), (1, 0), "{bad:?}");
        }
        // In a file of its own as well.
        let (bad, good) = judge(&[file(&[&old], &[&signed]), file(&[&newer], &[])]);
        assert_eq!((bad.len(), good), (1, 0), "{bad:?}");
    }
    // Every file has the sets that prove it: the same one is no second one.
    let next = keys(2, first.issued_at + DAY, retired(first.issued_at));
    assert_eq!(judge(&[file(&[&old], &[&signed]), file(&[&next, &old], &[])]), (vec![], 1));
    let fork = keys(1, first.issued_at - 61 * DAY, ACTIVE);
    let (bad, _) = judge(&[file(&[&old], &[&signed]), file(&[&fork], &[])]);
    assert!(bad.len() == 1 && bad[0].contains("two different key sets of version 1"), "{bad:?}");
}

#[test]
fn key_sets_that_cannot_be_of_one_history_are_not_both_taken() {
    let bad = |sets: &[Signed<KeySet>]| {
        let report = report(sets);
        let bad = report.lines.iter().filter(|line| line.section.starts_with("key set") && line.problem.is_some());
        bad.map(|line| format!("{}: {}", line.section, line.problem.clone().unwrap())).collect::<Vec<_>>()
    };
    let one = set(3, NOW - DAY, ACTIVE);
    let two = bad(&[one.clone(), set(3, NOW - DAY + 1, ACTIVE)]);
    assert!(two.len() == 1 && two[0].contains("key set 2: ") && two[0].contains("version 3: the first"), "{two:?}");

    // The root key handed over in version 4, to the key that version 3 names.
    let (next, thief) = (key(60), key(61));
    let to = |key: &protocol::Keypair| {
        Signed::sign(&RootHandover { network: network(), root: key.peer_id(), at: NOW }, &root())
    };
    let named = KeySet { next_root: Some(commitment(&next.peer_id())), ..set_of(TICKET, 3, NOW - DAY, ACTIVE) };
    let named = Signed::sign(&named, &root());
    let after = |version, key: &protocol::Keypair| {
        let set = set_of(TICKET, version, NOW - DAY, ACTIVE);
        Signed::sign(&KeySet { handovers: vec![to(key)], next_root: None, ..set }, key)
    };
    let handed = after(4, &next);
    assert_eq!(bad(&[handed.clone(), named.clone()]), Vec::<String>::new());
    assert_eq!(bad(&[named.clone(), handed.clone()]), Vec::<String>::new());
    // Another one was named in between, whatever the order and whether that set is in the file.
    let renamed = KeySet { next_root: Some(commitment(&thief.peer_id())), ..set_of(TICKET, 2, NOW - DAY, ACTIVE) };
    let renamed = Signed::sign(&renamed, &root());
    for sets in [&[&handed, &named, &renamed][..], &[&renamed, &handed, &named], &[&handed, &renamed]] {
        let sets: Vec<_> = sets.iter().map(|set| (*set).clone()).collect();
        assert_eq!(bad(&sets), Vec::<String>::new());
    }
    // By the root key that was replaced, in the time after it; by one that was never named; and a fork of the handover.
    let replaced = set(5, NOW - DAY, ACTIVE);
    for (sets, why) in [
        ([handed.clone(), replaced.clone()], "a root key that was replaced"),
        ([replaced, handed.clone()], "a root key that was replaced"),
        ([named, after(4, &thief)], "another key than the one that was named"),
        ([handed, after(5, &thief)], "a root key that was replaced"),
    ] {
        let found = bad(&sets);
        assert!(found.len() == 1 && found[0].contains("key set 2: ") && found[0].contains(why), "{found:?}");
    }

    // What reads heads takes sets one by one, and the same one from every seeder.
    let mut keys = KeySets::new(root().peer_id());
    assert_eq!(keys.add(one.clone()).unwrap(), 3);
    assert_eq!(keys.add(one).unwrap(), 3);
    assert_eq!(keys.add(set(7, NOW, ACTIVE)).unwrap(), 7);
    assert_eq!(keys.add(set(1, NOW, ACTIVE)).unwrap(), 1);
    assert_eq!(keys.add(set(7, NOW + 1, ACTIVE)).unwrap_err().code, RefusalCode::KeyRetired);
    assert_eq!(keys.newest().map(|set| set.version), Some(7));
}
