//! A signature is good for one purpose, one key and the exact bytes, and a sealed key for one client of one sale:
//! whatever is signed or sealed for one thing must be worthless for every other.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::api::{GossipedBatch, MeshRequest};
use protocol::certificate::{MerchantCert, SeederCert};
use protocol::cipher::ContentSecret;
use protocol::codec;
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

/// Decodes and verifies as one kind of document.
type Verify = fn(&[u8]) -> Result<(), String>;

fn verify<T: Document>(bytes: &[u8]) -> Result<(), String>
where
    Signed<T>: codec::Wire,
{
    let signed: Signed<T> = codec::decode(bytes).map_err(|e| e.to_string())?;
    signed.verify(&signed.signer()).map(drop).map_err(|e| e.to_string())
}

/// In the order of the purposes, which is their wire form.
const KINDS: [Verify; 20] = [
    verify::<KeySet>,
    verify::<Heartbeat>,
    verify::<RevocationEpoch>,
    verify::<MerchantCert>,
    verify::<SeederCert>,
    verify::<Manifest>,
    verify::<TransactionData>,
    verify::<Endorsement>,
    verify::<Lease>,
    verify::<ReplicationOrder>,
    verify::<Ack>,
    verify::<Completion>,
    verify::<SealedBatch>,
    verify::<Mark>,
    verify::<Statement>,
    verify::<DeliveryRecord>,
    verify::<NonDelivery>,
    verify::<Move>,
    verify::<Recovery>,
    verify::<RootHandover>,
];

/// The signed form of every document: version, purpose, signer, body, signature.
fn all_signed() -> Vec<(&'static str, Vec<u8>)> {
    documents().into_iter().map(|group| (group.file, group.samples.into_iter().nth(1).unwrap().bytes)).collect()
}

#[test]
fn a_signature_for_one_purpose_is_refused_for_every_other() {
    let signed = all_signed();
    assert_eq!(signed.len(), KINDS.len());
    for (purpose, (name, bytes)) in signed.iter().enumerate() {
        assert_eq!(usize::from(bytes[1]), purpose, "{name}: the purpose is the byte after the version");
        for (other, verify) in KINDS.iter().enumerate() {
            let mut relabelled = bytes.clone();
            relabelled[1] = other as u8;
            if other == purpose {
                verify(bytes).unwrap();
                continue;
            }
            let plain = verify(bytes).unwrap_err();
            assert!(plain.contains("another purpose") || plain.contains("are allowed"), "{name} as {other}: {plain}");
            let relabelled = verify(&relabelled).unwrap_err();
            let signature = relabelled.contains("the signature does not verify");
            // A large document under the purpose of a small one ends at that one's limit, before its signature.
            let too_large = relabelled.contains("are allowed") || relabelled.contains("LimitExceeded");
            assert!(signature || too_large, "{name} relabelled as {other}: {relabelled}");
        }
    }
}

#[test]
fn the_signed_bytes_are_domain_purpose_and_body() {
    // Written out once more, independently of the crate's own code.
    for (name, bytes) in all_signed() {
        let key = ed25519_dalek::VerifyingKey::from_bytes(bytes[2..34].try_into().unwrap()).unwrap();
        let signature = ed25519_dalek::Signature::from_slice(&bytes[bytes.len() - 64..]).unwrap();
        let length = if bytes[34] == 251 { 3 } else { 1 };
        let body = &bytes[34 + length..bytes.len() - 64];
        let message = [b"willcall signature 1".as_slice(), &bytes[1..2], body].concat();
        key.verify_strict(&message, &signature).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn every_bit_of_a_signed_document_counts() {
    for ((name, bytes), verify) in all_signed().into_iter().zip(KINDS) {
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
