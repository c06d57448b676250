//! By whose word a purchase may change hands: the holder's or the merchant's, for one transaction of one network, to a
//! peer that can hold it, and nobody else's.
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
use protocol::{NetworkId, PeerId, RefusalCode, Signed, codec};
use world::samples::{move_word, recovery};
use world::*;

#[test]
fn only_the_holder_moves_a_purchase() {
    let by = |key: &protocol::Keypair, word: &Move| {
        Move::check(&Signed::sign(word, key), &client().peer_id(), &network()).map_err(|refusal| refusal.code)
    };
    assert_eq!(by(&client(), &move_word()), Ok(move_word()));
    for other in [stranger(), merchant(), manager()] {
        assert_eq!(by(&other, &move_word()), Err(RefusalCode::NotEntitled));
    }
    let elsewhere = Move { network: NetworkId::from_bytes([9; 32]), ..move_word() };
    assert_eq!(by(&client(), &elsewhere), Err(RefusalCode::WrongNetwork));
    let to_itself = Move { to: client().peer_id(), ..move_word() };
    assert_eq!(by(&client(), &to_itself), Err(RefusalCode::Malformed));
    // The content key could not be sealed to these: the purchase would be lost.
    for nobody in [[0; 32], [0xff; 32]] {
        let lost = Move { to: PeerId::from_bytes(nobody), ..move_word() };
        assert_eq!(by(&client(), &lost), Err(RefusalCode::Malformed));
    }
    let good = Signed::sign(&move_word(), &client());
    let forged = good.with_body_forged(&Move { to: stranger().peer_id(), ..move_word() });
    assert_eq!(Move::check(&forged, &client().peer_id(), &network()).unwrap_err().code, RefusalCode::NotEntitled);
}

#[test]
fn only_the_merchant_recovers_a_purchase() {
    let by = |key: &protocol::Keypair, word: &Recovery| {
        Recovery::check(&Signed::sign(word, key), &merchant().peer_id(), &network()).map_err(|refusal| refusal.code)
    };
    assert_eq!(by(&merchant(), &recovery()), Ok(recovery()));
    assert_eq!(by(&client(), &recovery()), Err(RefusalCode::NotEntitled));
    let elsewhere = Recovery { network: NetworkId::from_bytes([9; 32]), ..recovery() };
    assert_eq!(by(&merchant(), &elsewhere), Err(RefusalCode::WrongNetwork));
    let lost = Recovery { to: PeerId::from_bytes([0; 32]), ..recovery() };
    assert_eq!(by(&merchant(), &lost), Err(RefusalCode::Malformed));
}

#[test]
fn a_word_of_one_kind_is_none_of_the_other() {
    // The two have the same fields: it is the purpose, signed with them, that tells them apart.
    let word = move_word();
    let Move { network, transaction, to, generation, at } = word.clone();
    let same = Recovery { network, transaction, to, generation, at };
    assert_eq!(codec::encode(&word), codec::encode(&same));
    let signed = codec::encode(&Signed::sign(&word, &merchant()));
    assert!(codec::decode::<Signed<Recovery>>(&signed).is_err());
    let mut relabelled = signed;
    // The purpose is the byte after the version.
    relabelled[1] = protocol::signed::Purpose::Recovery as u8;
    let relabelled: Signed<Recovery> = codec::decode(&relabelled).unwrap();
    let refused = Recovery::check(&relabelled, &merchant().peer_id(), &network).unwrap_err();
    assert_eq!(refused.code, RefusalCode::NotEntitled);
}
