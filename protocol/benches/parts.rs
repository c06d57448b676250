//! What one delivery costs in computation, part by part, each beside the primitive that it cannot do without in the same
//! run: where a part grows past its primitive, something was added that nobody asked for.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

#[path = "../tests/world/mod.rs"]
mod world;

use std::hint::black_box;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ed25519_dalek::{Signer, SigningKey};
use protocol::cipher::{ContentSecret, FrameCipher, TAG_LEN};
use protocol::deliver::{ClientMessage, Credential, SeederMessage};
use protocol::manifest::{DEFAULT_CHUNK_SIZE, chunk_value};
use protocol::receipt::{Ack, Receipt, ReceiptBatch, SealedBatch};
use protocol::settling::{Counting, Layout};
use protocol::ticket::{Lease, Ticket};
use protocol::trust::{KeyPurpose, RevocationState};
use protocol::{ChunkSet, ContentId, PeerId, Signed, codec};
use world::*;

const CHUNK: usize = DEFAULT_CHUNK_SIZE as usize;

/// The seeder's check of a ticket from its bytes, and the three Ed25519 verifications in it alone.
fn ticket(c: &mut Criterion) {
    let mut group = c.benchmark_group("ticket");
    let (trust, revoked) = (trust(), RevocationState::default());
    // The most that a lease lists: what a launch day's tickets look like.
    let ticket = Parts { change_lease: with_all_sources, ..Parts::default() }.ticket();
    let bytes = codec::encode(&ticket);
    let admission = admission(&trust, &revoked);
    group.bench_function("check", |b| {
        b.iter(|| {
            let ticket: Ticket = codec::decode(black_box(&bytes)).unwrap();
            ticket.check(&admission).unwrap()
        });
    });
    // The same number of signatures over messages of the same lengths.
    let lengths = [
        codec::encode(&ticket.data).len(),
        codec::encode(ticket.endorsement.as_ref().unwrap()).len(),
        codec::encode(&ticket.lease).len(),
    ];
    let signed: Vec<_> = lengths
        .iter()
        .enumerate()
        .map(|(i, length)| {
            let (key, message) = (SigningKey::from_bytes(&[i as u8 + 1; 32]), vec![7; *length]);
            let signature = key.sign(&message);
            (key.verifying_key().to_bytes(), message, signature)
        })
        .collect();
    group.bench_function("its Ed25519 verifications alone", |b| {
        b.iter(|| {
            for (key, message, signature) in &signed {
                let key = ed25519_dalek::VerifyingKey::from_bytes(black_box(key)).unwrap();
                key.verify_strict(message, signature).unwrap();
            }
        });
    });
    group.finish();
}

fn with_all_sources(lease: &mut Lease) {
    lease.sources = (0..Lease::MAX_SOURCES).map(|n| PeerId::from_bytes([n as u8; 32])).collect();
}

/// What a client computes for a chunk, and the primitives.
fn chunk(c: &mut Criterion) {
    let mut group = c.benchmark_group("chunk of 1 MiB");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    let cipher = FrameCipher::new(&ContentSecret::from_bytes([3; 32]), ContentId::from_bytes([4; 16]), 9).unwrap();
    let mut sealed = vec![5; CHUNK - TAG_LEN];
    cipher.seal(2, &mut sealed).unwrap();
    let value = chunk_value(2 * CHUNK as u64, &sealed, false);
    group.bench_function("verify", |b| {
        b.iter(|| assert_eq!(chunk_value(2 * CHUNK as u64, black_box(&sealed), false), value));
    });
    group.bench_function("verify and open", |b| {
        b.iter_batched_ref(
            || sealed.clone(),
            |bytes| {
                assert_eq!(chunk_value(2 * CHUNK as u64, bytes, false), value);
                cipher.open(2, bytes).unwrap().len()
            },
            BatchSize::LargeInput,
        );
    });
    group.bench_function("seal", |b| {
        b.iter_batched_ref(|| vec![5; CHUNK - TAG_LEN], |bytes| cipher.seal(2, bytes).unwrap(), BatchSize::LargeInput);
    });
    group.bench_function("BLAKE3 alone", |b| b.iter(|| blake3::hash(black_box(&sealed))));
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[3; 32]).unwrap());
    group.bench_function("AES-256-GCM alone", |b| {
        b.iter_batched_ref(
            || vec![5; CHUNK - TAG_LEN],
            |bytes| {
                let nonce = Nonce::assume_unique_for_key([0; 12]);
                key.seal_in_place_separate_tag(nonce, Aad::empty(), bytes).unwrap()
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

/// Messages of a delivery: the header of each chunk, an acknowledgement, a ticket.
fn messages(c: &mut Criterion) {
    let mut group = c.benchmark_group("codec");
    let header = codec::encode(&SeederMessage::Chunk { index: 77, length: DEFAULT_CHUNK_SIZE });
    group.bench_function("chunk header, encode", |b| {
        b.iter(|| codec::encode(&SeederMessage::Chunk { index: black_box(77), length: DEFAULT_CHUNK_SIZE }));
    });
    group.bench_function("chunk header, decode", |b| {
        b.iter(|| codec::decode::<SeederMessage>(black_box(&header)).unwrap());
    });
    let ack = codec::encode(&ClientMessage::Ack(Signed::sign(&ack_of(scattered(256), NOW), &client())));
    group.bench_function("acknowledgement of 256 ranges, decode", |b| {
        b.iter(|| codec::decode::<ClientMessage>(black_box(&ack)).unwrap());
    });
    let hello = ClientMessage::Hello { credential: Credential::Ticket(Box::new(world::ticket())), last_ack: None };
    let bytes = codec::encode(&hello);
    group.bench_function("hello with its ticket, decode", |b| {
        b.iter(|| codec::decode::<ClientMessage>(black_box(&bytes)).unwrap());
    });
    group.finish();
}

fn scattered(ranges: u32) -> ChunkSet {
    let mut set = ChunkSet::new();
    (0..ranges).for_each(|i| set.insert_range(i * 3..i * 3 + 2));
    set
}

/// A batch of receipts as the manager takes it in: opened, every acknowledgement verified.
fn receipts(c: &mut Criterion) {
    const RECEIPTS: u64 = 32;
    let mut group = c.benchmark_group("receipts");
    group.throughput(Throughput::Elements(RECEIPTS));
    let receipt =
        Receipt { ack: Signed::sign(&ack_of(scattered(4), NOW), &client()), completion: None, ..samples::receipt() };
    let batch = ReceiptBatch { receipts: vec![receipt; RECEIPTS as usize] };
    let sealing = network_key(KeyPurpose::ReceiptSealing);
    let place = samples::outbox_place();
    let signed = SealedBatch::seal(&batch, &place, &seeder(), sealing.peer_id(), NOW, &mut Fixed::new(1)).unwrap();
    let bytes = codec::encode(&signed);
    let (client, seeder, network, manifest) = (client().peer_id(), seeder().peer_id(), network(), manifest_digest());
    group.bench_function("a batch of 32, opened and verified", |b| {
        b.iter(|| {
            let signed: Signed<SealedBatch> = codec::decode(black_box(&bytes)).unwrap();
            let batch = signed.verify(&seeder).unwrap().open(&sealing).unwrap();
            for receipt in &batch.receipts {
                Ack::check(&receipt.ack, &client, &network, delivery(), &manifest, &seeder).unwrap();
            }
        });
    });
    let key = SigningKey::from_bytes(&[9; 32]);
    let message = vec![7; codec::encode(&ack_of(scattered(4), NOW)).len()];
    let (public, signature) = (key.verifying_key().to_bytes(), key.sign(&message));
    group.bench_function("their Ed25519 verifications alone", |b| {
        b.iter(|| {
            for _ in 0..=RECEIPTS {
                let key = ed25519_dalek::VerifyingKey::from_bytes(black_box(&public)).unwrap();
                key.verify_strict(black_box(&message), &signature).unwrap();
            }
        });
    });
    group.finish();
}

/// Closing a delivery of 10 GiB that 8 seeders served in stripes, down to every seeder's line.
fn settling(c: &mut Criterion) {
    let layout = Layout { length: 10 << 30, chunk_size: DEFAULT_CHUNK_SIZE };
    let mut counting = Counting::default();
    for n in 0..8_u32 {
        let mut chunks = ChunkSet::new();
        (0..200).for_each(|i| chunks.insert_range((i * 8 + n) * 6..(i * 8 + n) * 6 + 7));
        counting.accept(&layout, key(100 + n as u8).peer_id(), &chunks);
    }
    c.bench_function("ledger: shares of a delivery by 8 seeders", |b| {
        b.iter(|| black_box(&counting).payouts(&layout, 12_000, u64::MAX));
    });
}

criterion_group!(benches, ticket, chunk, messages, receipts, settling);
criterion_main!(benches);
