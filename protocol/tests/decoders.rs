//! Every decoder is the first thing that a stranger's bytes meet: none may panic or allocate without bound, what was
//! encoded must come back the same, and the largest legal value of every type must fit its own limit.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use proptest::prelude::*;
use protocol::api::*;
use protocol::codec::{self, Wire};
use protocol::deliver::{ClientMessage, Credential, SeederMessage};
use protocol::ids::{Address, ContentId, PeerAddrs};
use protocol::manifest::{MAX_CHUNKS, Manifest, SEGMENT_CHUNKS, Segment};
use protocol::pack::{Entry, EntryKind, FileList, MAX_ENTRIES, read_header};
use protocol::receipt::{Ack, ReceiptBatch, SealedBatch};
use protocol::replication::Placement;
use protocol::serving::ServeAccount;
use protocol::ticket::{Lease, Ticket, TicketEnvelope, TransactionData};
use protocol::trust::{JoinLine, KeyEntry, KeyPurpose, KeySet, KeyState, Moved, RevocationEpoch, Revocations};
use protocol::{ChunkSet, Digest, Refusal, RefusalCode, Signed};
use world::samples::{self, Sample};
use world::*;

fn all_samples() -> Vec<Sample> {
    samples::all().into_iter().flat_map(|group| group.samples).collect()
}

/// Whatever a decoder takes, it writes in one form.
fn take(sample: &Sample, bytes: &[u8]) {
    if let Ok(written) = (sample.again)(bytes) {
        assert!(written.len() <= sample.max, "{}: grew past its limit", sample.name);
        assert_eq!((sample.again)(&written).as_ref(), Ok(&written), "{}", sample.name);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    #[test]
    fn random_bytes_are_refused_or_read_but_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut versioned = vec![1];
        versioned.extend_from_slice(&bytes);
        for sample in all_samples() {
            take(&sample, &bytes);
            take(&sample, &versioned);
        }
    }

    #[test]
    fn damaged_messages_are_refused_or_read_but_never_panic(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), kind in 0u8..4, len in 0usize..12,
    ) {
        for sample in all_samples() {
            let mut bytes = sample.bytes.clone();
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.truncate(at),
                2 => { bytes.splice(at..at, std::iter::repeat_n(byte, len)); }
                _ => { bytes.drain(at..(at + len).min(sample.bytes.len())); }
            }
            take(&sample, &bytes);
        }
    }

    #[test]
    fn every_message_decodes_to_what_was_encoded(
        chunks in prop::collection::btree_set(0u32..MAX_CHUNKS, 0..200),
        ms in any::<u64>(), n in any::<u32>(), text in "\\PC{0,60}", some in any::<bool>(),
    ) {
        fn same<T: Wire + PartialEq + std::fmt::Debug>(value: T) -> Result<(), TestCaseError> {
            prop_assert_eq!(codec::decode::<T>(&codec::encode(&value)).unwrap(), value);
            Ok(())
        }
        let chunks: ChunkSet = chunks.into_iter().collect();
        let ack = Signed::sign(&ack_of(chunks.clone(), ms), &client());
        let ticket = Parts { data: TransactionData { formed_at: ms, ..transaction_data() }, ..Parts::default() }.ticket();
        let credential = Credential::Ticket(Box::new(ticket.clone()));
        same(ticket)?;
        same(ack.clone())?;
        same(ClientMessage::Hello { credential, last_ack: some.then(|| ack.clone()) })?;
        same(ClientMessage::Want { chunks: chunks.clone() })?;
        same(ClientMessage::Meta { segment: some.then_some(n) })?;
        same(SeederMessage::Welcome {
            delivery: delivery(), held: chunks, ack: some.then(|| ack.clone()), window: n, outstanding: n / 2,
        })?;
        same(SeederMessage::Refusal(Refusal::new(RefusalCode::Idle, text.clone()).retry_after(ms).at(ms)))?;
        same(SeederMessage::Chunk { index: n, length: n })?;
        same(ServeAccount { noted: n, honoured: n, ack: Some(ack), first_at: ms, last_at: ms, forgiven: n, ..ServeAccount::default() })?;
        same(MailboxRequest::Complain { transaction: transaction(), seeder: seeder().peer_id(), chunk: n })?;
        same(SalesRequest::Enrol { token: salt(1), name: text.clone(), held: None })?;
        same(FileList {
            name: text.clone(),
            single_file: some,
            entries: vec![Entry { path: text, kind: EntryKind::File { size: ms, executable: some } }],
        })?;
    }

    #[test]
    fn headers_of_packs_are_read_or_refused(bytes in any::<[u8; 16]>()) {
        let _ = read_header(&bytes);
    }
}

#[test]
fn cut_off_anywhere_no_message_is_whole() {
    for sample in all_samples() {
        for end in 0..sample.bytes.len() {
            assert!((sample.again)(&sample.bytes[..end]).is_err(), "{} cut at {end}", sample.name);
        }
        let mut longer = sample.bytes.clone();
        longer.push(0);
        assert!((sample.again)(&longer).is_err(), "{} with one byte more", sample.name);
    }
}

#[test]
fn lengths_that_lie_are_refused_before_anything_is_allocated() {
    // Each length prefix in turn claims 2^63 elements.
    for sample in all_samples() {
        for at in 1..sample.bytes.len().min(400) {
            let mut bytes = sample.bytes.clone();
            bytes.splice(at..at + 1, [253, 0, 0, 0, 0, 0, 0, 0, 128]);
            take(&sample, &bytes);
        }
    }
}

fn fits<T: Wire + PartialEq + std::fmt::Debug>(what: &str, value: &T) {
    let bytes = codec::encode(value);
    assert!(bytes.len() <= T::MAX, "{what}: {} bytes, limit {}", bytes.len(), T::MAX);
    assert!(codec::decode::<T>(&bytes).as_ref() == Ok(value), "{what} does not come back");
}

/// 256 ranges whose numbers take the most bytes.
fn widest_set() -> ChunkSet {
    (0..256u32).map(|i| MAX_CHUNKS - 1 - 2 * i).collect()
}

fn widest_ack() -> Signed<Ack> {
    Signed::sign(&ack_of(widest_set(), u64::MAX), &client())
}

fn widest_ticket() -> Ticket {
    Parts {
        change_lease: |l| {
            l.sources = vec![seeder().peer_id(); Lease::MAX_SOURCES];
            (l.generation, l.delivery, l.allowance) = (u32::MAX, u32::MAX, u64::MAX);
            (l.rate, l.ceiling, l.end, l.staleness) = (u64::MAX, u64::MAX, u64::MAX, u64::MAX);
        },
        ..Parts::default()
    }
    .ticket()
}

/// As many addresses of the greatest length as one peer can bring.
fn widest_addrs(n: u8) -> PeerAddrs {
    let long = Address::new(&format!("/dns4/{}", "x".repeat(250))).unwrap();
    let short = Address::new(&format!("/dns4/{}", "x".repeat(50))).unwrap();
    let both = [PeerAddrs::new(key(n).peer_id(), vec![long; 16]), PeerAddrs::new(key(n).peer_id(), vec![short; 99])];
    both.into_iter().max_by_key(|addrs| addrs.addrs.iter().map(|a| a.as_str().len() + 1).sum::<usize>()).unwrap()
}

fn widest_envelope() -> TicketEnvelope {
    TicketEnvelope {
        ticket: widest_ticket(),
        sources: (0..32).map(widest_addrs).collect(),
        join: JoinLine { managers: (0..8).map(widest_addrs).collect(), ..samples::join_line().public() },
        title: "é".repeat(100),
        ..samples::envelope()
    }
}

#[test]
fn the_largest_of_everything_fits_its_limit() {
    let ticket_key = network_key(KeyPurpose::Ticket);
    let entry = KeyEntry {
        purpose: KeyPurpose::Ticket,
        key: ticket_key.peer_id(),
        state: KeyState::Retiring { not_issued_after: u64::MAX, dead_after: u64::MAX },
    };
    let handovers = vec![Signed::sign(&samples::handover(), &root()); protocol::root::RootHandover::MAX];
    let keys =
        KeySet { keys: vec![entry; KeySet::MAX_KEYS], managers: vec![key(1).peer_id(); 16], handovers, ..key_set() };
    fits("key set", &Signed::sign(&keys, &root()));
    let added = Revocations {
        transactions: vec![transaction(); 1024],
        peers: vec![key(1).peer_id(); 1024],
        contents: vec![ContentId::from_bytes([1; 16]); 1024],
        moved: vec![Moved { transaction: transaction(), generation: u32::MAX }; 1024],
    };
    let epoch = Signed::sign(&RevocationEpoch { added, ..samples::epoch() }, &ticket_key);
    fits("revocation epoch", &epoch);
    // Of the largest, of the smallest, and of the largest behind small ones.
    let small = Signed::sign(&RevocationEpoch { added: Revocations::default(), ..samples::epoch() }, &ticket_key);
    for (head, then) in [(0, &epoch), (usize::MAX, &epoch), (20, &epoch)] {
        let mut page = EpochsPage::default();
        let mut next = std::iter::repeat_n(&small, head).chain(std::iter::repeat(then)).cloned();
        while page.add(next.next().unwrap()).is_continue() {}
        let page = page.into_epochs();
        assert!((1..=MeshResponse::EPOCHS_PAGE).contains(&page.len()), "{}", page.len());
        fits("page of epochs", &MeshResponse::Epochs(page));
    }
    let manifest = Manifest { segments: vec![Digest::from_bytes([1; 32]); 1024], ..samples::manifest() };
    let manifest = Signed::sign(&manifest, &ticket_key);
    fits("manifest", &manifest);
    fits("manifest on a stream", &SeederMessage::Manifest(manifest.clone()));
    fits("manifest in an answer", &MeshResponse::Manifest(manifest));
    let segment = Segment { values: vec![[0xff; 32]; SEGMENT_CHUNKS as usize] };
    fits("segment", &segment);
    fits("segment on a stream", &SeederMessage::Segment { index: u32::MAX, segment });
    fits("ack", &widest_ack());
    fits("ticket", &widest_ticket());
    let credential = Credential::Ticket(Box::new(widest_ticket()));
    fits("hello", &ClientMessage::Hello { credential, last_ack: Some(widest_ack()) });
    let completion = samples::receipt().completion;
    fits("finish", &ClientMessage::Finish { ack: Some(widest_ack()), completion: completion.clone() });
    fits("want", &ClientMessage::Want { chunks: widest_set() });
    let (ack, u) = (Some(widest_ack()), u32::MAX);
    fits(
        "welcome",
        &SeederMessage::Welcome { delivery: delivery(), held: widest_set(), ack, window: u, outstanding: u },
    );
    let (ack, ms) = (Some(widest_ack()), u64::MAX);
    fits(
        "account",
        &ServeAccount {
            noted: u,
            honoured: u,
            ack,
            completion,
            first_at: ms,
            last_at: ms,
            forgiven: u,
            forgiven_at: ms,
        },
    );
    let receipt = protocol::receipt::Receipt { ack: widest_ack(), ..samples::receipt() };
    fits("receipt", &receipt);

    fits("join line", &JoinLine { managers: (0..8).map(widest_addrs).collect(), ..samples::join_line() });
    fits("envelope", &widest_envelope());
    assert_eq!(widest_envelope().to_string().parse::<TicketEnvelope>().unwrap(), widest_envelope());
    fits("envelope in an answer", &MailboxResponse::Ticket(Box::new(widest_envelope())));
    let policy = protocol::manifest::KeyPolicy::AtRelease;
    fits("released", &SalesResponse::Released { ticket: Box::new(widest_envelope()), policy });
    let placement = Placement { sources: (0..32).map(widest_addrs).collect(), ..samples::placement() };
    fits("placement", &placement);
    fits("placements", &MeshResponse::Placements(vec![placement; MeshResponse::PLACEMENTS_PAGE]));
    let report = SeederReport {
        addrs: vec![Address::new(&format!("/dns4/{}", "x".repeat(250))).unwrap(); 16],
        held: vec![manifest_digest(); SeederReport::MAX_HELD],
        damaged: vec![manifest_digest(); SeederReport::MAX_DAMAGED],
        first: true,
        capacity: u64::MAX,
        free: u64::MAX,
        spare: u64::MAX,
        leaving: true,
        moving: vec![manifest_digest(); SeederReport::MAX_MOVING],
        unwanted: vec![manifest_digest(); SeederReport::MAX_UNWANTED],
        deliveries: u32::MAX,
        max_deliveries: u32::MAX,
        turned_away: u32::MAX,
        now: u64::MAX,
    };
    fits("report", &MeshRequest::Report(report));
    let digest = manifest_digest();
    let kept = Kept { manifest: digest, copies: u32::MAX, wanted: u32::MAX, because: KeptBecause::NobodyElse };
    let contents = vec![digest; SeederReport::MAX_HELD];
    fits("released", &MeshResponse::Released { contents, kept: vec![kept; SeederReport::MAX_HELD] });
    fits("status", &SalesRequest::Status { transactions: vec![transaction(); 256] });
    let state = TransactionState::Refunded;
    let taken =
        TakenBack { number: u64::MAX, transaction: transaction(), order: "x".repeat(64), state, captured: true };
    let sales = vec![taken; SalesResponse::TAKEN_BACK_PAGE];
    fits("taken-back", &SalesResponse::TakenBack { restore: u64::MAX, sales });
}

#[test]
fn a_batch_of_the_largest_size_travels_by_gossip() {
    // Receipts as wide as an honest long delivery makes them, until the batch's limit.
    let mut batch = ReceiptBatch { receipts: Vec::new() };
    let receipt = protocol::receipt::Receipt { ack: widest_ack(), ..samples::receipt() };
    while codec::encode(&batch).len() + codec::encode(&receipt).len() <= ReceiptBatch::MAX_BYTES {
        batch.receipts.push(receipt.clone());
    }
    let to = network_key(KeyPurpose::ReceiptSealing);
    let batch = SealedBatch::seal(&batch, &samples::outbox_place(), &seeder(), to.peer_id(), NOW, &mut Fixed::new(5));
    let batch = batch.unwrap();
    assert!(batch.peek().unwrap().open(&to).unwrap().receipts.len() > 10);
    let certificate = Signed::sign(&samples::seeder_cert(), &network_key(KeyPurpose::Enrolment));
    fits("gossiped batch", &GossipedBatch { certificate, batch: batch.clone() });
    fits("batch in a request", &MeshRequest::Receipts(batch));
}

#[test]
fn the_longest_list_of_files_comes_back() {
    for kind in [EntryKind::Folder, EntryKind::File { size: 0, executable: false }] {
        let entry = |i: usize| Entry { path: format!("{i:x}"), kind: kind.clone() };
        let entries = (0..MAX_ENTRIES).map(entry).collect();
        fits("list of files", &FileList { name: "x".into(), single_file: false, entries });
    }
}
