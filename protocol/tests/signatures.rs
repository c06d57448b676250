//! A signature is good for one purpose, one key and the exact bytes, and a sealed key for one client of one sale:
//! whatever is signed or sealed for one thing must be worthless for every other.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout
)]

extern crate willcall_protocol as protocol;

mod world;

use std::collections::BTreeMap;

use protocol::api::{GossipedBatch, MeshRequest};
use protocol::certificate::{MerchantCert, SeederCert};
use protocol::cipher::ContentSecret;
use protocol::codec::{self, Wire};
use protocol::entitlement::{Move, Recovery};
use protocol::evidence::{DeliveryRecord, NonDelivery};
use protocol::keys::SealError;
use protocol::manifest::Manifest;
use protocol::receipt::{Ack, Completion, DeliveryId, Mark, SealedBatch};
use protocol::replication::ReplicationOrder;
use protocol::root::RootHandover;
use protocol::signed::{Document, SignatureError};
use protocol::statement::Statement;
use protocol::ticket::{Endorsement, KeyGrant, Lease, TransactionData};
use protocol::trust::{Heartbeat, KeyPurpose, KeySet, RevocationEpoch};
use protocol::{ChunkSet, Digest, NetworkId, PeerId, RefusalCode, Signed, TransactionId};
use world::samples::{chunks, documents, key_grant, sealed_batch};
use world::*;

/// One kind of document, as a node reads it.
struct Kind {
    /// Decodes and verifies.
    verify: fn(&[u8]) -> Result<(), String>,
    /// Longest signed form, and longest body in it, bytes.
    longest: usize,
    longest_body: usize,
}

const fn kind<T: Document>() -> Kind
where
    Signed<T>: codec::Wire,
{
    Kind { verify: verify::<T>, longest: <Signed<T> as codec::Wire>::MAX, longest_body: T::MAX }
}

fn verify<T: Document>(bytes: &[u8]) -> Result<(), String>
where
    Signed<T>: codec::Wire,
{
    let signed: Signed<T> = codec::decode(bytes).map_err(|e| e.to_string())?;
    signed.verify(&signed.signer()).map(drop).map_err(|e| e.to_string())
}

/// In the order of the purposes, which is their wire form.
const KINDS: [Kind; 20] = [
    kind::<KeySet>(),
    kind::<Heartbeat>(),
    kind::<RevocationEpoch>(),
    kind::<MerchantCert>(),
    kind::<SeederCert>(),
    kind::<Manifest>(),
    kind::<TransactionData>(),
    kind::<Endorsement>(),
    kind::<Lease>(),
    kind::<ReplicationOrder>(),
    kind::<Ack>(),
    kind::<Completion>(),
    kind::<SealedBatch>(),
    kind::<Mark>(),
    kind::<Statement>(),
    kind::<DeliveryRecord>(),
    kind::<NonDelivery>(),
    kind::<Move>(),
    kind::<Recovery>(),
    kind::<RootHandover>(),
];

/// Version, purpose, signer, length (three bytes from 251 on) and signature are not the body.
fn body_of(bytes: &[u8]) -> &[u8] {
    let length = if bytes[34] == 251 { 3 } else { 1 };
    &bytes[34 + length..bytes.len() - 64]
}

/// The signed form of every document: version, purpose, signer, body, signature.
fn all_signed() -> Vec<(&'static str, Vec<u8>)> {
    documents().into_iter().map(|group| (group.file, group.samples.into_iter().nth(1).unwrap().bytes)).collect()
}

#[test]
fn a_signature_for_one_purpose_is_refused_for_every_other() {
    let signed = all_signed();
    assert_eq!(signed.len(), KINDS.len());
    let mut reasons = BTreeMap::new();
    for (purpose, (name, bytes)) in signed.iter().enumerate() {
        assert_eq!(usize::from(bytes[1]), purpose, "{name}: the purpose is the byte after the version");
        for (other, kind) in KINDS.iter().enumerate() {
            if other == purpose {
                (kind.verify)(bytes).unwrap();
                continue;
            }
            let mut relabelled = bytes.clone();
            relabelled[1] = other as u8;
            // A large document where a small one is expected ends at that one's limit, before anything in it is read.
            let (plain, reason) = if bytes.len() > kind.longest {
                ("are allowed", "are allowed")
            } else if body_of(bytes).len() > kind.longest_body {
                ("another purpose", "longer than its kind may be")
            } else {
                ("another purpose", "the signature does not verify")
            };
            let error = (kind.verify)(bytes).unwrap_err();
            assert!(error.contains(plain), "{name} as {other}: {error}");
            let error = (kind.verify)(&relabelled).unwrap_err();
            assert!(error.contains(reason), "{name} relabelled as {other}: {error}");
            *reasons.entry(reason).or_insert(0) += 1;
        }
    }
    println!("{reasons:?}");
    assert_eq!(reasons.values().sum::<usize>(), KINDS.len() * (KINDS.len() - 1));
    assert!(reasons["the signature does not verify"] > KINDS.len() * KINDS.len() / 2, "most end at the signature");
}

#[test]
fn a_body_one_byte_too_long_for_its_kind_is_refused_although_the_whole_would_fit() {
    // The signed form has room for the longest length that a codec may write, which short documents do not need.
    let mut bytes = codec::encode(&Signed::sign(&world::samples::completion(), &client()));
    let body = vec![1; Completion::MAX + 1];
    bytes.splice(34..bytes.len() - 64, [&[251][..], &(body.len() as u16).to_le_bytes(), &body].concat());
    assert!(bytes.len() <= <Signed<Completion> as codec::Wire>::MAX);
    assert!(verify::<Completion>(&bytes).unwrap_err().contains("longer than its kind may be"));
}

#[test]
fn the_signed_bytes_are_domain_purpose_and_body() {
    // Written out once more, independently of the crate's own code.
    for (name, bytes) in all_signed() {
        let key = ed25519_dalek::VerifyingKey::from_bytes(bytes[2..34].try_into().unwrap()).unwrap();
        let signature = ed25519_dalek::Signature::from_slice(&bytes[bytes.len() - 64..]).unwrap();
        let message = [b"willcall signature 1".as_slice(), &bytes[1..2], body_of(&bytes)].concat();
        key.verify_strict(&message, &signature).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn every_bit_of_a_signed_document_counts() {
    for ((name, bytes), Kind { verify, .. }) in all_signed().into_iter().zip(KINDS) {
        for bit in 0..bytes.len() * 8 {
            // All bits of short documents, every seventh of long ones.
            if bytes.len() > 300 && bit % 7 != 0 {
                continue;
            }
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(verify(&changed).is_err(), "{name}: bit {bit}");
        }
    }
}

#[test]
fn a_document_of_another_signer_says_whose_it_is() {
    let signed = Signed::sign(&transaction_data(), &stranger());
    let (expected, found) = (manager().peer_id(), stranger().peer_id());
    assert_eq!(signed.verify(&expected), Err(SignatureError::Signer { expected, found }));
}

#[test]
fn a_weak_key_signs_nothing() {
    // The identity point: under lax verification one signature fits many messages.
    let mut identity = [0u8; 32];
    identity[0] = 1;
    let mut bytes = codec::encode(&Signed::sign(&world::samples::completion(), &client()));
    bytes[2..34].copy_from_slice(&identity);
    let at = bytes.len() - 64;
    bytes[at..].fill(0);
    bytes[at] = 1;
    let signed: Signed<Completion> = codec::decode(&bytes).unwrap();
    assert_eq!(signed.verify(&PeerId::from_bytes(identity)), Err(SignatureError::Invalid));
}

#[test]
fn a_key_grant_opens_for_its_client_generation_and_sale_only() {
    let (grant, data, lease) = (key_grant(), transaction_data(), ticket().lease.peek().unwrap());
    let opened = grant.open(&client(), &data, &lease).unwrap();
    assert_eq!(opened.as_bytes(), ContentSecret::from_bytes([7; 32]).as_bytes());

    let refused = |client: &protocol::Keypair, data: &TransactionData, lease: &Lease| {
        assert_eq!(grant.open(client, data, lease).unwrap_err(), SealError::Open);
    };
    refused(&stranger(), &data, &lease);
    refused(&client(), &data, &Lease { generation: 1, ..lease.clone() });
    refused(&client(), &TransactionData { transaction: TransactionId::new(NOW, [0; 10]), ..data.clone() }, &lease);
    refused(&client(), &TransactionData { manifest: Digest::from_bytes([1; 32]), ..data.clone() }, &lease);
    refused(&client(), &TransactionData { network: NetworkId::from_bytes([1; 32]), ..data.clone() }, &lease);
    // Renewal of the lease does not change what the grant is bound to.
    grant.open(&client(), &data, &Lease { end: NOW + 90 * DAY, delivery: 2, ..lease.clone() }).unwrap();

    // A lease for a key that nobody can hold gets no grant.
    let nobody = Lease { client: PeerId::from_bytes([0; 32]), ..lease };
    let secret = ContentSecret::from_bytes([7; 32]);
    assert_eq!(KeyGrant::seal(&secret, &data, &nobody, &mut Fixed::new(3)).unwrap_err(), SealError::BadKey);
}

#[test]
fn a_batch_of_receipts_opens_at_its_place_only() {
    let signed = sealed_batch();
    let batch = signed.verify(&seeder().peer_id()).unwrap();
    let manager = network_key(KeyPurpose::ReceiptSealing);
    assert_eq!(batch.open(&manager).unwrap().receipts, vec![world::samples::receipt()]);
    for moved in [
        SealedBatch { number: 2, ..batch.clone() },
        SealedBatch { incarnation: salt(9), ..batch.clone() },
        SealedBatch { seeder: stranger().peer_id(), ..batch.clone() },
        SealedBatch { network: NetworkId::from_bytes([1; 32]), ..batch.clone() },
        SealedBatch { sealed: batch.sealed[..40].to_vec(), ..batch.clone() },
    ] {
        assert_eq!(moved.open(&manager).unwrap_err().code, RefusalCode::BadReceipt);
    }
    assert_eq!(batch.open(&network_key(KeyPurpose::Settlement)).unwrap_err().code, RefusalCode::BadReceipt);
    // The mesh may not read it, but sees whose it is.
    let certificate = Signed::sign(&world::samples::seeder_cert(), &network_key(KeyPurpose::Enrolment));
    let gossiped = codec::encode(&GossipedBatch { certificate, batch: signed.clone() });
    let receipt_bytes = codec::encode(&world::samples::receipt());
    assert!(!gossiped.windows(64).any(|w| receipt_bytes.windows(64).any(|r| r == w)));
    assert!(codec::decode::<MeshRequest>(&codec::encode(&MeshRequest::Receipts(signed))).is_ok());
}

#[test]
fn the_running_hash_ties_each_batch_to_all_before_it() {
    let batch = sealed_batch().peek().unwrap();
    let running = batch.running();
    for other in [
        SealedBatch { previous: Digest::from_bytes([1; 32]), ..batch.clone() },
        SealedBatch { number: 2, ..batch.clone() },
        SealedBatch { sealed: vec![0; 48], ..batch.clone() },
    ] {
        assert_ne!(other.running(), running);
    }
}

#[test]
fn an_acknowledgement_is_for_one_delivery_from_one_seeder() {
    let good = ack_of(chunks(&[(0, 3)]), NOW);
    let check = |ack: &Ack, by: &protocol::Keypair| {
        let (network, manifest, seeder) = (network(), manifest_digest(), seeder().peer_id());
        let signed = Signed::sign(ack, by);
        Ack::check(&signed, &client().peer_id(), &network, delivery(), &manifest, &seeder).map_err(|r| r.code)
    };
    assert_eq!(check(&good, &client()).unwrap(), good);
    let second = DeliveryId { delivery: 2, ..delivery() };
    for (what, bad) in [
        ("network", Ack { network: NetworkId::from_bytes([1; 32]), ..good.clone() }),
        ("delivery", Ack { delivery: second, ..good.clone() }),
        ("manifest", Ack { manifest: Digest::from_bytes([1; 32]), ..good.clone() }),
        ("seeder", Ack { seeder: stranger().peer_id(), ..good.clone() }),
    ] {
        assert_eq!(check(&bad, &client()), Err(RefusalCode::BadAck), "{what}");
    }
    assert_eq!(check(&good, &seeder()), Err(RefusalCode::BadAck), "a seeder signs for itself");
    assert_eq!(check(&Ack { chunks: ChunkSet::new(), ..good.clone() }, &client()).unwrap().chunks.len(), 0);

    let done = world::samples::completion();
    let check = |done: &Completion, by: &protocol::Keypair| {
        Completion::check(&Signed::sign(done, by), &client().peer_id(), &network(), delivery(), &manifest_digest())
            .map_err(|r| r.code)
    };
    assert_eq!(check(&done, &client()).unwrap(), done);
    assert_eq!(check(&done, &seeder()), Err(RefusalCode::BadReceipt));
    assert_eq!(check(&Completion { delivery: second, ..done }, &client()), Err(RefusalCode::BadReceipt));
}
