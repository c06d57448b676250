//! A change of hands as a former holder forges it, whose key signs as well as ever: a word counts where the file proves
//! whose the purchase was, and no lease in it says otherwise.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::entitlement::{MAX_GENERATIONS, Move, Recovery};
use protocol::evidence::{EvidencePack, Exporter, Line, Report};
use protocol::ticket::Lease;
use protocol::trust::KeyPurpose;
use protocol::{Keypair, PeerId, Signed};
use world::{NOW, *};

fn holder(number: u8) -> Keypair {
    Keypair::from_seed(&[200 + number; 32])
}

/// Who holds the purchase in each generation: the designated client, two more by moves, the last by recovery.
fn holders() -> [Keypair; 4] {
    [client(), holder(1), holder(2), holder(3)]
}

fn mallory() -> PeerId {
    holder(9).peer_id()
}

fn word(generation: u32, by: &Keypair, to: PeerId) -> Signed<Move> {
    Signed::sign(&Move { network: network(), transaction: transaction(), to, generation, at: NOW }, by)
}

fn recovery(generation: u32, to: PeerId) -> Signed<Recovery> {
    let word = Recovery { network: network(), transaction: transaction(), to, generation, at: NOW };
    Signed::sign(&word, &merchant())
}

/// What the manager has of it: every word, and a lease of the generations named here.
fn pack(generations: &[u32]) -> EvidencePack {
    let data = Signed::sign(&transaction_data(), &network_key(KeyPurpose::Ticket));
    let endorsement = Signed::sign(&endorsement(&data), &merchant());
    let mut pack = EvidencePack::new(Exporter::Manager, NOW, data.clone());
    pack.key_sets.push(Signed::sign(&key_set(), &root()));
    for generation in generations {
        let client = holders()[*generation as usize % 4].peer_id();
        let (generation, delivery) = (*generation, generation + 1);
        let lease = Lease { client, generation, delivery, ..lease(&data, &endorsement) };
        pack.leases.push(Signed::sign(&lease, &network_key(KeyPurpose::Ticket)));
    }
    pack.endorsement = Some(endorsement);
    let [first, second, third, last] = holders();
    pack.moves = vec![word(1, &first, second.peer_id()), word(2, &second, third.peer_id())];
    pack.recoveries = vec![recovery(3, last.peer_id())];
    pack
}

/// The same with these words alone.
fn forged(generations: &[u32], moves: Vec<Signed<Move>>) -> Report {
    let mut pack = pack(generations);
    (pack.moves, pack.recoveries) = (moves, Vec::new());
    checked(&pack)
}

fn checked(pack: &EvidencePack) -> Report {
    EvidencePack::from_bytes(&pack.to_bytes()).unwrap().verify(&root().peer_id())
}

fn line<'a>(report: &'a Report, section: &str) -> &'a Line {
    report.lines.iter().find(|line| line.section == section).unwrap()
}

fn moved(report: &Report) -> Vec<u32> {
    report.facts.moved.iter().map(|moved| moved.generation).collect()
}

/// The one word of it does not hold, and the rest does.
fn assert_refused(report: &Report, why: &str) {
    let bad: Vec<&Line> = report.lines.iter().filter(|line| line.problem.is_some()).collect();
    assert_eq!((bad.len(), moved(report)), (1, vec![]), "{report:#?}");
    assert_eq!(bad[0].section, "move 1");
    assert!(bad[0].problem.as_ref().unwrap().contains(why), "{:?}", bad[0]);
}

/// It holds for what its signer signed, and proves no change of hands.
fn assert_unproven(report: &Report, section: &str, signer: &Keypair) {
    let line = line(report, section);
    assert_eq!((line.problem.as_deref(), line.unproven), (None, true));
    assert!(line.claim.contains("is not proven") && line.claim.contains(&signer.peer_id().to_string()), "{line:?}");
}

#[test]
fn a_genuine_file_is_good_whatever_leases_were_fetched() {
    for leases in [&[3, 2, 1, 0][..], &[3, 1, 0], &[3, 0], &[3], &[0], &[]] {
        let report = checked(&pack(leases));
        assert!(report.ok, "{leases:?}: {report:#?}");
        assert_eq!(moved(&report), [1, 2, 3], "{leases:?}");
    }
}

#[test]
fn a_former_holders_word_counts_for_nothing_where_a_lease_says_who_has_it() {
    let [first, second, ..] = holders();
    let forge = |leases: &[u32], generation, by: &Keypair| forged(leases, vec![word(generation, by, mallory())]);
    let all = [3, 2, 1, 0];
    assert_refused(&forge(&all, 1, &first), "a lease of generation 1 names");
    for generation in [2, 3, 4] {
        assert_refused(&forge(&all, generation, &first), "did not have the purchase then");
    }
    for generation in [MAX_GENERATIONS + 1, 99_999, u32::MAX] {
        assert_refused(&forge(&all, generation, &first), "did not have the purchase then");
    }
    // Who has it last begins no more generations than there are either.
    let [.., last] = holders();
    let far = forge(&all, MAX_GENERATIONS + 1, &last);
    assert_refused(&far, "a purchase has 64 at most");
    // With fewer leases the newest says who had it.
    assert_refused(&forge(&[2, 1, 0], 3, &first), "did not have the purchase then");
    assert_refused(&forge(&[1, 0], 3, &first), "did not have the purchase then");
    assert_refused(&forge(&[3, 1, 0], 3, &second), "a lease of generation 3 names");
    assert_refused(&forge(&[3, 0], 2, &second), "did not have the purchase then");
}

#[test]
fn a_word_after_a_gap_is_said_as_what_was_signed_and_proves_no_change_of_hands() {
    let [first, second, third, last] = holders();
    for leases in [&[0][..], &[]] {
        let report = forged(leases, vec![word(3, &first, mallory())]);
        assert!(report.ok && moved(&report).is_empty(), "{report:#?}");
        assert_unproven(&report, "move 1", &first);
    }
    // Nor do the words that hang on it, until a lease says who has it.
    let chain = vec![word(3, &first, second.peer_id()), word(5, &second, third.peer_id())];
    let report = forged(&[0], chain);
    assert!(report.ok && moved(&report).is_empty(), "{report:#?}");
    assert_unproven(&report, "move 2", &second);
    // A lease became void, and it was moved before anybody asked for the next; of what came then there are leases.
    let mut void = pack(&[3, 0]);
    (void.moves, void.recoveries) = (vec![word(3, &first, last.peer_id()), word(4, &last, mallory())], vec![]);
    let report = checked(&void);
    assert!(report.ok, "{report:#?}");
    assert_unproven(&report, "move 1", &first);
    assert_eq!(moved(&report), [4]);
    // The merchant's word needs no holder's; what another word began is nobody's to begin again.
    let mut pack = pack(&[0]);
    (pack.moves, pack.recoveries) = (vec![word(3, &first, mallory())], vec![recovery(3, last.peer_id())]);
    let report = checked(&pack);
    assert_eq!((report.ok, moved(&report)), (false, vec![3]), "{report:#?}");
    assert!(line(&report, "move 1").problem.as_ref().unwrap().contains("another word began generation 3"));
}

#[test]
fn the_merchants_word_is_measured_by_the_leases_and_the_bound_as_well() {
    for (generation, why) in [(3, "a lease of generation 3 names"), (MAX_GENERATIONS + 1, "a purchase has 64 at most")]
    {
        let mut pack = pack(&[3, 2, 1, 0]);
        pack.recoveries = vec![recovery(generation, mallory())];
        let report = checked(&pack);
        assert!(!report.ok && moved(&report) == [1, 2], "{report:#?}");
        assert!(line(&report, "recovery 1").problem.as_ref().unwrap().contains(why), "{report:#?}");
    }
}
