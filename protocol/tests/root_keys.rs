//! A root key hands over to the next: nodes that hold an older key set follow, newcomers with the oldest join line do, and
//! nobody else's key takes the network.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::root::{RootHandover, commitment, root_after};
use protocol::trust::{KeySet, Trust, Update};
use protocol::{Keypair, NetworkId, RefusalCode, Signed};
use world::*;

fn handover(by: &Keypair, to: &Keypair) -> Signed<RootHandover> {
    Signed::sign(&RootHandover { network: network(), root: to.peer_id(), at: NOW }, by)
}

fn trust_in(set: &KeySet, by: &Keypair) -> Result<Trust, RefusalCode> {
    Trust::new(root().peer_id(), Signed::sign(set, by), 0).map_err(|refusal| refusal.code)
}

/// The world's key set, with a version, handovers and no named successor.
fn set(version: u64, handovers: Vec<Signed<RootHandover>>) -> KeySet {
    KeySet { version, handovers, next_root: None, ..key_set() }
}

#[test]
fn the_network_goes_on_under_its_name_through_several_roots() {
    let (second, third) = (key(40), key(41));
    let mut trust = trust_in(&set(3, vec![]), &root()).unwrap();
    let once = set(4, vec![handover(&root(), &second)]);
    assert_eq!(trust.update(Signed::sign(&once, &second)).unwrap(), Update::Taken);
    let twice = set(9, vec![handover(&root(), &second), handover(&second, &third)]);
    assert_eq!(trust.update(Signed::sign(&twice, &third)).unwrap(), Update::Taken);
    assert_eq!((trust.network(), trust.root()), (network(), root().peer_id()));
    assert_eq!(trust.signed_key_set().signer(), third.peer_id());
    // A newcomer needs nothing but the newest set and the line of the first day.
    assert_eq!(trust_in(&twice, &third).unwrap().network(), network());
    // An older set is old; a newer one of a root that was replaced is somebody else's.
    assert_eq!(trust.update(Signed::sign(&once, &second)).unwrap(), Update::NotNewer);
    for (stale, by) in [(set(10, vec![]), root()), (set(10, vec![handover(&root(), &second)]), second)] {
        let refused = trust.update(Signed::sign(&stale, &by)).unwrap_err();
        assert_eq!(refused.code, RefusalCode::KeyRetired, "{refused}");
    }
    assert_eq!(trust.key_set().version, 9);
}

#[test]
fn only_the_root_in_force_hands_over_and_only_its_own_network() {
    let (second, thief) = (key(40), stranger());
    let by_thief = set(4, vec![handover(&thief, &thief)]);
    assert_eq!(trust_in(&by_thief, &thief).unwrap_err(), RefusalCode::BadManagerSignature);
    // The right handover, and another key that signs.
    let good = set(4, vec![handover(&root(), &second)]);
    for wrong in [thief, root()] {
        assert_eq!(trust_in(&good, &wrong).unwrap_err(), RefusalCode::BadManagerSignature);
    }
    let foreign = RootHandover { network: NetworkId::from_bytes([9; 32]), root: second.peer_id(), at: NOW };
    let foreign = set(4, vec![Signed::sign(&foreign, &root())]);
    assert_eq!(trust_in(&foreign, &second).unwrap_err(), RefusalCode::WrongNetwork);
    let many = vec![handover(&root(), &second); RootHandover::MAX + 1];
    assert_eq!(root_after(&root().peer_id(), &many).unwrap_err().code, RefusalCode::TooLarge);
}

#[test]
fn a_root_that_was_named_is_the_only_one_that_follows() {
    let (named, thief) = (key(40), stranger());
    let held = KeySet { next_root: Some(commitment(&named.peer_id())), ..set(3, vec![]) };
    let mut trust = trust_in(&held, &root()).unwrap();
    // Whoever stole the root key can sign a handover to himself, and nobody who knows the name follows him.
    let stolen = set(4, vec![handover(&root(), &thief)]);
    let refused = trust.update(Signed::sign(&stolen, &thief)).unwrap_err();
    assert_eq!(refused.code, RefusalCode::BadManagerSignature, "{refused}");
    let right = set(5, vec![handover(&root(), &named)]);
    assert_eq!(trust.update(Signed::sign(&right, &named)).unwrap(), Update::Taken);
}

#[test]
fn a_handover_that_is_taken_back_or_changed_is_not_followed() {
    let (second, other) = (key(40), key(41));
    let mut trust = trust_in(&set(4, vec![handover(&root(), &second)]), &second).unwrap();
    let changed = set(5, vec![handover(&root(), &other)]);
    assert_eq!(trust.update(Signed::sign(&changed, &other)).unwrap_err().code, RefusalCode::KeyRetired);
    let back = set(5, vec![]);
    assert_eq!(trust.update(Signed::sign(&back, &root())).unwrap_err().code, RefusalCode::KeyRetired);
}
