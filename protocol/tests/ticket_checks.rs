//! The ticket's checks as a table: each ticket is wrong in exactly one way and gets exactly that name; and where two
//! things are wrong, the cheaper check, which stands earlier in the list, gives the name.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::codec;
use protocol::signed::Document;
use protocol::ticket::{Admission, Lease, Ticket};
use protocol::trust::{KeyPurpose, Moved, RevocationEpoch, RevocationState, Revocations, Trust};
use protocol::{Digest, NetworkId, PeerId, Refusal, RefusalCode, Signed};
use world::*;

use RefusalCode as C;

/// What is presented, and to whom.
struct Case {
    bytes: Vec<u8>,
    admit: fn(&mut Admission<'_>),
    revoked: Option<fn() -> RevocationEpoch>,
}

impl Case {
    fn of(ticket: &Ticket) -> Self {
        Case { bytes: codec::encode(ticket), admit: |_| {}, revoked: None }
    }

    fn parts(change: impl FnOnce(&mut Parts)) -> Self {
        let mut parts = Parts::default();
        change(&mut parts);
        Case::of(&parts.ticket())
    }

    fn admitted_by(mut self, admit: fn(&mut Admission<'_>)) -> Self {
        self.admit = admit;
        self
    }

    fn revoked(mut self) -> Self {
        self.revoked = Some(revoke_the_transaction);
        self
    }

    fn moved_on(mut self) -> Self {
        self.revoked = Some(begin_generation_two);
        self
    }

    fn judge(&self) -> Result<(), Refusal> {
        let trust = trust();
        let mut revoked = RevocationState::default();
        if let Some(epoch) = self.revoked {
            revoked.apply(Digest::from_bytes([1; 32]), &epoch()).unwrap();
        }
        let mut admission = admission(&trust, &revoked);
        (self.admit)(&mut admission);
        let ticket: Ticket = codec::decode(&self.bytes)?;
        ticket.check(&admission).map(drop)
    }
}

fn revoke_the_transaction() -> RevocationEpoch {
    let added = Revocations { transactions: vec![transaction()], ..Revocations::default() };
    RevocationEpoch { network: network(), number: 1, previous: None, at: NOW, added }
}

fn begin_generation_two() -> RevocationEpoch {
    let moved = vec![Moved { transaction: transaction(), generation: 2 }];
    RevocationEpoch { added: Revocations { moved, ..Revocations::default() }, ..revoke_the_transaction() }
}

/// The same document with one bit of the signature turned over.
fn forged<T: Document>(signed: &Signed<T>) -> Signed<T>
where
    Signed<T>: codec::Wire,
{
    let mut bytes = codec::encode(signed);
    *bytes.last_mut().unwrap() ^= 1;
    codec::decode(&bytes).unwrap()
}

fn unendorsed() -> Ticket {
    Ticket { endorsement: None, ..ticket() }
}

fn many_sources() -> Case {
    Case::parts(|p| p.change_lease = |l| l.sources = vec![seeder().peer_id(); Lease::MAX_SOURCES + 1])
}

fn other_network(p: &mut Parts) {
    p.data.network = NetworkId::from_bytes([9; 32]);
}

const STALE: fn(&mut Admission<'_>) = |a| a.informed = Some(NOW - 2 * DAY);
const LATE: fn(&mut Admission<'_>) = |a| a.now = NOW + 8 * DAY;

/// One fault each, in the order of the checks.
fn single_faults() -> Vec<(C, &'static str, Case)> {
    let raw = |bytes| Case { bytes, admit: |_| {}, revoked: None };
    let good = codec::encode(&ticket());
    let mut other_version = good.clone();
    other_version[0] = 2;
    let mut trailing = good.clone();
    trailing.push(0);
    vec![
        (C::TooLarge, "longer than any ticket", raw(vec![1; 4097])),
        (C::Malformed, "cut off", raw(good[..good.len() - 1].to_vec())),
        (C::Malformed, "something after its end", raw(trailing)),
        (C::Malformed, "empty", raw(Vec::new())),
        (C::Malformed, "more sources than a lease may list", many_sources()),
        (C::UnsupportedVersion, "a later version", raw(other_version)),
        (C::WrongNetwork, "another network's", Case::parts(other_network)),
        (C::WrongClient, "shown by a thief", Case::of(&ticket()).admitted_by(|a| a.peer = stranger().peer_id())),
        (C::WrongClient, "moved to another device", Case::parts(|p| p.change_lease = |l| l.client = key(99).peer_id())),
        (C::NotYetValid, "begins after the grace", Case::parts(|p| p.change_lease = |l| l.start = NOW + 601_000)),
        (C::Expired, "over, and so is the grace", Case::of(&ticket()).admitted_by(|a| a.now = NOW + 7 * DAY + 600_001)),
        (
            C::Expired,
            "over, and so is the continuation",
            Case::of(&ticket()).admitted_by(|a| (a.now, a.continuation_ms) = (NOW + 9 * DAY + 600_001, 2 * DAY)),
        ),
        (C::BadEndorsement, "no endorsement", Case::of(&unendorsed())),
        (
            C::BadEndorsement,
            "an endorsement with a forged signature",
            Case::of(&Ticket { endorsement: ticket().endorsement.as_ref().map(forged), ..ticket() }),
        ),
        (C::BadEndorsement, "endorsed by a stranger", Case::parts(|p| p.merchant_key = stranger())),
        (C::BadEndorsement, "endorsed by the client", Case::parts(|p| p.merchant_key = client())),
        (
            C::BadEndorsement,
            "an endorsement of another sale",
            Case::parts(|p| p.change_endorsement = |e| e.transaction_data = Digest::from_bytes([1; 32])),
        ),
        (
            C::BadEndorsement,
            "a lease that names another endorsement",
            Case::parts(|p| p.change_lease = |l| l.endorsement = Digest::from_bytes([1; 32])),
        ),
        (C::UnknownKey, "a lease signed by a stranger", Case::parts(|p| p.lease_key = stranger())),
        (C::UnknownKey, "a lease signed by the merchant", Case::parts(|p| p.lease_key = merchant())),
        (
            C::UnknownKey,
            "a lease signed by the network's key for certificates",
            Case::parts(|p| p.lease_key = network_key(KeyPurpose::Enrolment)),
        ),
        (C::UnknownKey, "a sale signed by a stranger", Case::parts(|p| p.data_key = stranger())),
        (C::KeyRetired, "a lease of a retired key", Case::parts(|p| p.lease_key = retired_key())),
        (C::KeyRetired, "a lease of a revoked key", Case::parts(|p| p.lease_key = revoked_key())),
        (
            C::BadManagerSignature,
            "a lease with a forged signature",
            Case::of(&Ticket { lease: forged(&ticket().lease), ..ticket() }),
        ),
        (
            C::BadManagerSignature,
            "a lease for another sale",
            Case::parts(|p| p.change_lease = |l| l.transaction_data = Digest::from_bytes([1; 32])),
        ),
        (C::Revoked, "a revoked transaction", Case::of(&ticket()).revoked()),
        (C::Revoked, "a generation of before a move", Case::of(&ticket()).moved_on()),
        (
            C::Revoked,
            "a generation between two moves",
            Case::parts(|p| p.change_lease = |l| l.generation = 1).moved_on(),
        ),
        (C::StaleRevocations, "a seeder that was cut off for days", Case::of(&ticket()).admitted_by(STALE)),
        (
            C::StaleRevocations,
            "a seeder that never heard the manager",
            Case::of(&ticket()).admitted_by(|a| a.informed = None),
        ),
    ]
}

#[test]
fn one_fault_has_one_name() {
    let mut last = C::TooLarge;
    for (code, what, case) in single_faults() {
        assert!(code >= last, "the table stands in the order of the checks: {what}");
        last = code;
        match case.judge() {
            Err(refusal) => assert_eq!(refusal.code, code, "{what}: {refusal}"),
            Ok(()) => panic!("admitted: {what}"),
        }
    }
}

#[test]
fn of_two_faults_the_earlier_check_gives_the_name() {
    let thief: fn(&mut Admission<'_>) = |a| a.peer = stranger().peer_id();
    let cases: Vec<(C, C, Case)> = vec![
        (C::Malformed, C::WrongNetwork, {
            Case::parts(|p| {
                other_network(p);
                p.change_lease = |l| l.sources = vec![seeder().peer_id(); Lease::MAX_SOURCES + 1];
            })
        }),
        (C::WrongNetwork, C::WrongClient, Case::parts(other_network).admitted_by(thief)),
        (C::WrongClient, C::NotYetValid, Case::parts(|p| p.change_lease = |l| l.start = NOW + DAY).admitted_by(thief)),
        (
            C::WrongClient,
            C::Expired,
            Case::of(&ticket()).admitted_by(|a| {
                (a.peer, a.now) = (stranger().peer_id(), NOW + 8 * DAY);
            }),
        ),
        (
            C::NotYetValid,
            C::BadEndorsement,
            Case::parts(|p| (p.merchant_key, p.change_lease) = (stranger(), |l: &mut Lease| l.start = NOW + DAY)),
        ),
        (C::Expired, C::BadEndorsement, Case::of(&unendorsed()).admitted_by(LATE)),
        (C::BadEndorsement, C::UnknownKey, Case::parts(|p| (p.merchant_key, p.lease_key) = (stranger(), stranger()))),
        (
            C::BadEndorsement,
            C::BadManagerSignature,
            Case::of(&Ticket { endorsement: None, lease: forged(&ticket().lease), ..ticket() }),
        ),
        (C::UnknownKey, C::KeyRetired, Case::parts(|p| (p.data_key, p.lease_key) = (stranger(), retired_key()))),
        (C::UnknownKey, C::BadManagerSignature, {
            let ticket = Parts { data_key: stranger(), ..Parts::default() }.ticket();
            Case::of(&Ticket { lease: forged(&ticket.lease), ..ticket })
        }),
        (C::KeyRetired, C::BadManagerSignature, {
            let ticket = Parts { lease_key: retired_key(), ..Parts::default() }.ticket();
            Case::of(&Ticket { lease: forged(&ticket.lease), ..ticket })
        }),
        (C::KeyRetired, C::Revoked, Case::parts(|p| p.lease_key = revoked_key()).revoked()),
        (
            C::BadManagerSignature,
            C::Revoked,
            Case::of(&Ticket { lease: forged(&ticket().lease), ..ticket() }).revoked(),
        ),
        (C::Revoked, C::StaleRevocations, Case::of(&ticket()).revoked().admitted_by(STALE)),
    ];
    for (earlier, later, case) in cases {
        assert!(earlier < later);
        assert_eq!(case.judge().unwrap_err().code, earlier, "{earlier} and {later}");
    }
}

#[test]
fn a_good_ticket_passes_to_the_edge_of_every_limit() {
    let ticket = ticket();
    let (trust, revoked) = (trust(), RevocationState::default());
    let check = |change: &dyn Fn(&mut Admission<'_>)| {
        let mut admission = admission(&trust, &revoked);
        change(&mut admission);
        ticket.check(&admission)
    };
    let admitted = check(&|_| {}).unwrap();
    assert!(admitted.listed);
    assert_eq!(admitted.data, transaction_data());
    assert!(!check(&|a| a.seeder = stranger().peer_id()).unwrap().listed);
    check(&|a| a.now = NOW - HOUR + 2000 - 600_000).unwrap();
    check(&|a| (a.now, a.informed) = (NOW + 7 * DAY + 600_000, Some(NOW + 7 * DAY))).unwrap();
    check(&|a| {
        (a.now, a.continuation_ms) = (NOW + 9 * DAY + 600_000, 2 * DAY);
        a.informed = Some(a.now);
    })
    .unwrap();
    check(&|a| a.informed = Some(NOW - DAY - 600_000)).unwrap();
    // A clock ahead of the seeder's own is no reason either.
    check(&|a| a.informed = Some(NOW + DAY)).unwrap();
}

#[test]
fn a_lease_that_does_not_ask_for_freshness_needs_none() {
    let case = Case::parts(|p| p.change_lease = |l| l.staleness = 0);
    case.admitted_by(|a| a.informed = None).judge().unwrap();
}

#[test]
fn the_generation_that_a_move_began_is_served() {
    for change in [|l: &mut Lease| l.generation = 2, |l: &mut Lease| l.generation = 3] {
        Case::parts(|p| p.change_lease = change).moved_on().judge().unwrap();
    }
}

#[test]
fn refusals_for_time_carry_the_refusers_clock() {
    let refusal = Case::of(&ticket()).admitted_by(LATE).judge().unwrap_err();
    assert_eq!(refusal.now, NOW + 8 * DAY);
    assert!(refusal.detail.contains("86400 s ago"), "{refusal}");
}

#[test]
fn a_purchase_outlives_the_key_that_signed_it() {
    // The sale was signed by keys that are dead now; a lease of a living key names it, and so vouches for it.
    for old in [retired_key(), revoked_key()] {
        Case::parts(|p| p.data_key = old).judge().unwrap();
    }
    // The signature still has to be there.
    let ticket = Parts { data_key: retired_key(), ..Parts::default() }.ticket();
    let case = Case::of(&Ticket { data: forged(&ticket.data), ..ticket });
    assert!(case.judge().is_err());
}

#[test]
fn what_the_merchant_holds_before_release_opens_nothing() {
    // Whatever the merchant (or merchant and client together) sign in place of the lease, it is not the manager's.
    let everybody: Vec<PeerId> = vec![merchant().peer_id(), client().peer_id()];
    for n in [11, 12] {
        let case = Case::parts(|p| p.lease_key = key(n));
        assert_eq!(case.judge().unwrap_err().code, C::UnknownKey, "{everybody:?}");
        // Nor does it help to claim the manager's key.
        let lease = ticket().lease.with_body_forged(&Lease { end: NOW + 999 * DAY, ..ticket().lease.peek().unwrap() });
        let case = Case::of(&Ticket { lease, ..ticket() });
        assert_eq!(case.judge().unwrap_err().code, C::BadManagerSignature);
    }
}

#[test]
fn a_key_that_retires_is_good_until_its_day_for_what_it_issued_before() {
    use protocol::trust::{DEFAULT_CLOCK_GRACE_MS, KeyState};
    let purpose = KeyPurpose::Ticket;
    let check = |state, at| {
        let mut keys = key_set();
        keys.keys.iter_mut().find(|k| k.purpose == purpose).unwrap().state = state;
        let trust = Trust::new(root().peer_id(), Signed::sign(&keys, &root()), DEFAULT_CLOCK_GRACE_MS).unwrap();
        let revoked = RevocationState::default();
        ticket().check(&Admission { now: at, informed: Some(at), ..admission(&trust, &revoked) }).map(drop)
    };
    let issued = NOW - HOUR + 2000;
    let state = |not_issued_after| KeyState::Retiring { not_issued_after, dead_after: NOW + DAY };
    check(state(issued), NOW + DAY - 1).unwrap();
    assert_eq!(check(state(issued), NOW + DAY).unwrap_err().code, C::KeyRetired);
    assert_eq!(check(state(issued - 1), NOW).unwrap_err().code, C::KeyRetired);
}
