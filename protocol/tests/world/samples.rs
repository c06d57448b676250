//! One fixed value of every document and message, each variant of an enum once: the golden vectors are their bytes, and
//! the decoder tests begin with them.

use protocol::api::*;
use protocol::certificate::{MerchantCert, SeederCert};
use protocol::cipher::ContentSecret;
use protocol::codec::{self, Wire};
use protocol::deliver::{ClientMessage, Credential, SeederMessage};
use protocol::entitlement::{Move, Recovery};
use protocol::evidence::{DeliveryRecord, NonDelivery};
use protocol::ids::{Address, ContentId};
use protocol::manifest::{KeyPolicy, Manifest, Segment, chunk_value};
use protocol::pack::{Entry, EntryKind, FileList};
use protocol::receipt::{Completion, Mark, OutboxPlace, Receipt, ReceiptBatch, SealedBatch};
use protocol::replication::{Placement, ReplicationOrder};
use protocol::root::RootHandover;
use protocol::serving::ServeAccount;
use protocol::signed::Document;
use protocol::statement::{
    BalanceLine, Covered, EarningLine, Explanation, PaymentLine, ReceiptFate, ReceiptLine, Statement, Unlisted,
};
use protocol::ticket::{KeyGrant, TicketEnvelope};
use protocol::trust::{
    AuditHead, Heartbeat, Invitation, InvitedRole, JoinLine, KeySet, Moved, RevocationEpoch, Revocations,
};
use protocol::{Refusal, RefusalCode};

use super::*;

/// One encoded value with the decoder of its type.
pub struct Sample {
    /// Type and variant.
    pub name: String,
    pub bytes: Vec<u8>,
    /// Decodes and encodes again.
    pub again: fn(&[u8]) -> Result<Vec<u8>, codec::CodecError>,
    pub max: usize,
}

fn sample<T: Wire>(name: &str, value: &T) -> Sample {
    Sample {
        name: name.to_owned(),
        bytes: codec::encode(value),
        again: |bytes| codec::decode::<T>(bytes).map(|value| codec::encode(&value)),
        max: T::MAX,
    }
}

/// A document: its own bytes, which are what is signed, and the signed form.
fn document<T: Document>(out: &mut Vec<Group>, file: &'static str, value: &T, by: &Keypair)
where
    Signed<T>: Wire,
{
    let signed = Signed::sign(value, by);
    let samples = vec![sample("body", value), sample("signed", &signed)];
    out.push(Group { file, samples });
}

/// The samples that stand in one vector file.
pub struct Group {
    pub file: &'static str,
    pub samples: Vec<Sample>,
}

pub fn chunks(ranges: &[(u32, u32)]) -> ChunkSet {
    let mut set = ChunkSet::new();
    ranges.iter().for_each(|(start, end)| set.insert_range(*start..*end));
    set
}

pub fn heartbeat() -> Heartbeat {
    Heartbeat {
        network: network(),
        at: NOW,
        epoch: 2,
        key_set_version: 3,
        key_set: Signed::sign(&key_set(), &root()).digest(),
        restore: 1,
        audit: Some(AuditHead { number: 17, digest: Digest::from_bytes([10; 32]) }),
    }
}

pub fn epoch() -> RevocationEpoch {
    RevocationEpoch {
        network: network(),
        number: 2,
        previous: Some(Digest::from_bytes([9; 32])),
        at: NOW,
        added: Revocations {
            transactions: vec![transaction()],
            peers: vec![stranger().peer_id()],
            contents: vec![ContentId::from_bytes([5; 16])],
            moved: vec![Moved { transaction: transaction(), generation: 2 }],
        },
    }
}

pub fn merchant_cert() -> MerchantCert {
    MerchantCert {
        network: network(),
        merchant: merchant().peer_id(),
        name: "Records & Co.".into(),
        from: NOW - DAY,
        until: NOW + 365 * DAY,
    }
}

pub fn seeder_cert() -> SeederCert {
    SeederCert {
        network: network(),
        seeder: seeder().peer_id(),
        name: "shed".into(),
        capacity: 1 << 40,
        from: NOW - DAY,
        until: NOW + 365 * DAY,
    }
}

pub fn segment() -> Segment {
    Segment { values: (0u64..3).map(|i| chunk_value(i << 16, &[i as u8; 1 << 16], false)).collect() }
}

pub fn manifest() -> Manifest {
    Manifest {
        network: network(),
        content: ContentId::from_bytes([5; 16]),
        root: Digest::from_bytes([6; 32]),
        length: 3 << 16,
        chunk_size: 1 << 16,
        segments: vec![segment().digest()],
        key_commitment: ContentSecret::from_bytes([7; 32]).commitment(),
        policy: KeyPolicy::OnCompletion,
        published_at: NOW - 30 * DAY,
    }
}

pub fn order() -> ReplicationOrder {
    ReplicationOrder {
        network: network(),
        order: transaction(),
        manifest: manifest_digest(),
        seeder: client().peer_id(),
        issued_at: NOW - HOUR,
        until: NOW + DAY,
        allowance: 900 * MIB,
        rate: 2_000,
        currency: Currency::USD,
        ceiling: 1_800_000,
    }
}

pub fn completion() -> Completion {
    Completion { network: network(), delivery: delivery(), manifest: manifest_digest(), at: NOW + 9000 }
}

pub fn receipt() -> Receipt {
    Receipt {
        ack: Signed::sign(&ack_of(chunks(&[(0, 40), (300, 301)]), NOW + 8000), &client()),
        completion: Some(Signed::sign(&completion(), &client())),
        first_at: NOW + 1,
        last_at: NOW + 8001,
    }
}

pub fn outbox_place() -> OutboxPlace {
    OutboxPlace { network: network(), incarnation: salt(3), number: 1, previous: Digest::from_bytes([0; 32]) }
}

pub fn sealed_batch() -> Signed<SealedBatch> {
    let batch = ReceiptBatch { receipts: vec![receipt()] };
    let to = network_key(KeyPurpose::ReceiptSealing).peer_id();
    SealedBatch::seal(&batch, &outbox_place(), &seeder(), to, NOW + 9500, &mut Fixed::new(1)).unwrap()
}

pub fn mark() -> Mark {
    Mark {
        network: network(),
        seeder: seeder().peer_id(),
        incarnation: salt(3),
        number: 1,
        running: sealed_batch().peek().unwrap().running(),
        restore: 1,
        at: NOW + 9600,
    }
}

fn receipt_line(fate: ReceiptFate) -> ReceiptLine {
    ReceiptLine {
        receipt: receipt().id(),
        delivery: Some(delivery()),
        at: NOW + 9600,
        chunks: 41,
        new_chunks: 41,
        fate,
    }
}

fn earning_line() -> EarningLine {
    EarningLine {
        delivery: delivery(),
        at: NOW + 9700,
        bytes: 41 * MIB,
        parts: u128::from(41 * MIB) * 12_000,
        currency: Currency::USD,
        credited: 0,
        capped: false,
    }
}

pub fn statement() -> Statement {
    let earned = earning_line().parts;
    let rejected = ReceiptFate::Rejected { code: RefusalCode::BadAck, reason: "it names another seeder".into() };
    let balance = BalanceLine {
        currency: Currency::USD,
        before: 300,
        carried_before: 0,
        earned,
        credited: 0,
        paid: 250,
        after: 50,
        carried_after: earned,
    };
    Statement {
        network: network(),
        seeder: seeder().peer_id(),
        number: 1,
        previous: None,
        from: 0,
        until: NOW + DAY,
        issued_at: NOW + DAY,
        restore: 1,
        receipts: vec![receipt_line(ReceiptFate::Accepted), receipt_line(rejected)],
        unlisted: Unlisted { duplicate: 7, rejected: 0 },
        earnings: vec![earning_line()],
        payments: vec![PaymentLine { at: NOW, minor: 250, currency: Currency::USD, reference: "transfer 17".into() }],
        balances: vec![balance],
        covered: vec![Covered { incarnation: salt(3), number: 1 }],
    }
}

pub fn delivery_record() -> DeliveryRecord {
    DeliveryRecord {
        network: network(),
        transaction: transaction(),
        transaction_data: ticket().data.digest(),
        order: Digest::from_bytes([8; 32]),
        state: TransactionState::Delivered,
        at: NOW + DAY,
        released_at: Some(NOW - HOUR + 2000),
        first_at: Some(NOW + 2),
        completed_at: Some(NOW + 9000),
        closed_at: None,
        restored_at: None,
        leases: vec![ticket().lease.digest()],
    }
}

pub fn non_delivery() -> NonDelivery {
    NonDelivery {
        network: network(),
        transaction: transaction(),
        transaction_data: ticket().data.digest(),
        by: NOW,
        issued_at: NOW + 1,
        restored_at: Some(NOW - 1000),
    }
}

pub fn move_word() -> Move {
    Move { network: network(), transaction: transaction(), to: key(20).peer_id(), generation: 1, at: NOW }
}

pub fn recovery() -> Recovery {
    Recovery { network: network(), transaction: transaction(), to: key(20).peer_id(), generation: 2, at: NOW }
}

pub fn handover() -> RootHandover {
    RootHandover { network: network(), root: key(30).peer_id(), at: NOW }
}

pub fn join_line() -> JoinLine {
    let invitation = Invitation { role: InvitedRole::Seeder, token: salt(4) };
    JoinLine { root: root().peer_id(), managers: vec![addrs(manager().peer_id())], invitation: Some(invitation) }
}

pub fn key_grant() -> KeyGrant {
    let lease = ticket().lease.peek().unwrap();
    KeyGrant::seal(&ContentSecret::from_bytes([7; 32]), &transaction_data(), &lease, &mut Fixed::new(2)).unwrap()
}

pub fn envelope() -> TicketEnvelope {
    TicketEnvelope {
        ticket: ticket(),
        grant: Some(key_grant()),
        join: join_line().public(),
        sources: vec![addrs(seeder().peer_id())],
        title: "An Album — Ünïcode".into(),
    }
}

pub fn placement() -> Placement {
    Placement {
        order: Signed::sign(&order(), &network_key(KeyPurpose::Ticket)),
        sources: vec![addrs(seeder().peer_id())],
    }
}

pub fn file_list() -> FileList {
    let entry = |path: &str, kind| Entry { path: path.into(), kind };
    FileList {
        name: "album".into(),
        single_file: false,
        entries: vec![
            entry("art", EntryKind::Folder),
            entry("art/cover.png", EntryKind::File { size: 123_456, executable: false }),
            entry("latest", EntryKind::Link { target: "art/cover.png".into() }),
            entry("play", EntryKind::File { size: 7, executable: true }),
        ],
    }
}

pub fn refusal() -> Refusal {
    Refusal::new(RefusalCode::Expired, "the ticket ended 20 s ago by this node's clock").retry_after(1500).at(NOW)
}

/// Every signed document, in the order of [`protocol::signed::Purpose`].
pub fn documents() -> Vec<Group> {
    use KeyPurpose as K;
    let mut out = Vec::new();
    let (data, ticket_key) = (Signed::sign(&transaction_data(), &network_key(K::Ticket)), network_key(K::Ticket));
    let endorsed = Signed::sign(&endorsement(&data), &merchant());
    document(
        &mut out,
        "key-set",
        &KeySet { handovers: vec![Signed::sign(&handover(), &root())], ..key_set() },
        &key(30),
    );
    document(&mut out, "heartbeat", &heartbeat(), &network_key(K::Revocation));
    document(&mut out, "revocation-epoch", &epoch(), &network_key(K::Revocation));
    document(&mut out, "merchant-cert", &merchant_cert(), &network_key(K::Enrolment));
    document(&mut out, "seeder-cert", &seeder_cert(), &network_key(K::Enrolment));
    document(&mut out, "manifest", &manifest(), &network_key(K::Catalogue));
    document(&mut out, "transaction-data", &transaction_data(), &ticket_key);
    document(&mut out, "endorsement", &endorsement(&data), &merchant());
    document(&mut out, "lease", &lease(&data, &endorsed), &ticket_key);
    document(&mut out, "replication-order", &order(), &ticket_key);
    document(&mut out, "ack", &ack_of(chunks(&[(0, 40), (300, 301)]), NOW + 8000), &client());
    document(&mut out, "completion", &completion(), &client());
    document(&mut out, "receipt-batch", &sealed_batch().peek().unwrap(), &seeder());
    document(&mut out, "mark", &mark(), &network_key(K::Settlement));
    document(&mut out, "statement", &statement(), &network_key(K::Settlement));
    document(&mut out, "delivery-record", &delivery_record(), &network_key(K::Settlement));
    document(&mut out, "non-delivery", &non_delivery(), &network_key(K::Settlement));
    document(&mut out, "move", &move_word(), &client());
    document(&mut out, "recovery", &recovery(), &merchant());
    document(&mut out, "root-handover", &handover(), &root());
    out
}

/// Every message and every unsigned record that leaves a process.
pub fn messages() -> Vec<Group> {
    let group = |file, samples| Group { file, samples };
    vec![
        group("ticket", vec![sample("ticket", &ticket()), sample("envelope", &envelope())]),
        group("join-line", vec![sample("join-line", &join_line())]),
        group("file-list", vec![sample("file-list", &file_list())]),
        group("segment", vec![sample("segment", &segment())]),
        group(
            "receipt",
            vec![sample("receipt", &receipt()), sample("batch", &ReceiptBatch { receipts: vec![receipt()] })],
        ),
        group("placement", vec![sample("placement", &placement())]),
        group("deliver-client", client_messages()),
        group("deliver-seeder", seeder_messages()),
        group("sales", sales()),
        group("mailbox", mailbox()),
        group("mesh", mesh()),
        group("seeder-calls", seeder_calls()),
        group("gossip", gossip()),
        group("serve-account", vec![sample("serve-account", &serve_account())]),
    ]
}

pub fn all() -> Vec<Group> {
    documents().into_iter().chain(messages()).collect()
}

fn serve_account() -> ServeAccount {
    let receipt = receipt();
    ServeAccount {
        noted: 44,
        honoured: 5,
        ack: Some(receipt.ack),
        completion: receipt.completion,
        first_at: receipt.first_at,
        last_at: receipt.last_at,
        forgiven: 2,
        forgiven_at: receipt.last_at + 1,
    }
}

fn client_messages() -> Vec<Sample> {
    let ack = receipt().ack;
    let order = Credential::Order(Box::new(placement().order));
    let ticket = Credential::Ticket(Box::new(ticket()));
    let hello = ClientMessage::Hello { credential: ticket, last_ack: Some(ack.clone()) };
    let replicate = ClientMessage::Hello { credential: order, last_ack: None };
    let finish = ClientMessage::Finish { ack: Some(ack.clone()), completion: receipt().completion };
    let set = || chunks(&[(0, 16), (40, 41)]);
    vec![
        sample("hello-ticket", &hello),
        sample("hello-order", &replicate),
        sample("meta-manifest", &ClientMessage::Meta { segment: None }),
        sample("meta-segment", &ClientMessage::Meta { segment: Some(7) }),
        sample("want", &ClientMessage::Want { chunks: set() }),
        sample("cancel", &ClientMessage::Cancel { chunks: set() }),
        sample("ack", &ClientMessage::Ack(ack)),
        sample("finish", &finish),
    ]
}

fn seeder_messages() -> Vec<Sample> {
    let greeting = SeederMessage::Greeting {
        certificate: Signed::sign(&seeder_cert(), &network_key(KeyPurpose::Enrolment)),
        now: NOW,
        load: (3, 64),
    };
    let welcome = SeederMessage::Welcome {
        delivery: delivery(),
        held: chunks(&[(0, 1000)]),
        ack: Some(receipt().ack),
        window: 21,
        outstanding: 3,
    };
    let manifest = Signed::sign(&manifest(), &network_key(KeyPurpose::Catalogue));
    vec![
        sample("greeting", &greeting),
        sample("welcome", &welcome),
        sample("window", &SeederMessage::Window { window: 21, outstanding: 3 }),
        sample("refusal", &SeederMessage::Refusal(refusal())),
        sample("manifest", &SeederMessage::Manifest(manifest)),
        sample("segment", &SeederMessage::Segment { index: 0, segment: segment() }),
        sample("cancelled", &SeederMessage::Cancelled { chunks: chunks(&[(40, 41)]) }),
        sample("chunk", &SeederMessage::Chunk { index: 40, length: 1 << 20 }),
        sample("finished", &SeederMessage::Finished),
    ]
}

fn sales() -> Vec<Sample> {
    let reserve = Reserve {
        order: "order-7".into(),
        body: Digest::from_bytes([8; 32]),
        product: product(),
        client: client().peer_id(),
        price: price(),
        salt: salt(1),
        payment: endorsement(&ticket().data).payment,
    };
    let info = ProductInfo {
        id: product(),
        title: "An Album".into(),
        price: price(),
        manifest: manifest_digest(),
        policy: KeyPolicy::AtRelease,
        plain_bytes: 123_463,
        content_bytes: 3 << 16,
        files: 2,
    };
    let transaction = transaction();
    let release = SalesRequest::Release { transaction, endorsement: ticket().endorsement.unwrap() };
    let released = SalesResponse::Released { ticket: Box::new(envelope()), policy: KeyPolicy::AtRelease };
    let cert = Signed::sign(&merchant_cert(), &network_key(KeyPurpose::Enrolment));
    let state = TransactionState::Refunded;
    let taken = TakenBack { number: 7, transaction, order: "order-7".into(), state, captured: true };
    vec![
        sample(
            "enrol",
            &SalesRequest::Enrol { token: salt(4), name: "Records & Co.".into(), held: Some(cert.clone()) },
        ),
        sample("products", &SalesRequest::Products { after: Some(product()) }),
        sample("reserve", &SalesRequest::Reserve(reserve)),
        sample("release", &release),
        sample("cancel", &SalesRequest::Cancel { transaction }),
        sample("refund", &SalesRequest::Refund { transaction }),
        sample("status", &SalesRequest::Status { transactions: vec![transaction] }),
        sample("evidence", &SalesRequest::Evidence { transaction }),
        sample("enrolled", &SalesResponse::Enrolled(cert)),
        sample("product-list", &SalesResponse::Products(vec![info])),
        sample("reserved", &SalesResponse::Reserved { data: ticket().data, expires_at: NOW + 900_000 }),
        sample("released", &released),
        sample("state", &SalesResponse::State(TransactionState::Cancelled)),
        sample("states", &SalesResponse::States(vec![Some(TransactionState::Delivering), None])),
        sample("refused", &SalesResponse::Refused(refusal())),
        sample("evidence-answer", &SalesResponse::Evidence(b"a file of evidence".to_vec())),
        sample("holder", &SalesRequest::Holder { transaction }),
        sample("recover", &SalesRequest::Recover { word: Signed::sign(&recovery(), &merchant()) }),
        sample("holder-answer", &SalesResponse::Holder { client: client().peer_id(), generation: 2 }),
        sample("taken-back", &SalesRequest::TakenBack { after: 6 }),
        sample("captured", &SalesRequest::Captured { transactions: vec![transaction] }),
        sample("taken-back-answer", &SalesResponse::TakenBack { restore: 1_764_000_000, sales: vec![taken] }),
    ]
}

fn mailbox() -> Vec<Sample> {
    let transaction = transaction();
    let item = MailItem {
        transaction,
        title: "An Album".into(),
        state: TransactionState::Released,
        released_at: NOW,
        plain_bytes: 123_463,
        generation: 1,
    };
    let complete = MailboxRequest::Complete { completion: receipt().completion.unwrap() };
    let complain = MailboxRequest::Complain { transaction, seeder: seeder().peer_id(), chunk: 9 };
    vec![
        sample("list", &MailboxRequest::List { before: None }),
        sample("ticket", &MailboxRequest::Ticket { transaction, instead_of: None }),
        sample("ticket-instead", &MailboxRequest::Ticket { transaction, instead_of: Some(2) }),
        sample("complete", &complete),
        sample("complain", &complain),
        sample("move", &MailboxRequest::Move { word: Signed::sign(&move_word(), &client()) }),
        sample("items", &MailboxResponse::List(vec![item])),
        sample("ticket-envelope", &MailboxResponse::Ticket(Box::new(envelope()))),
        sample("completed", &MailboxResponse::Completed { grant: Some(key_grant()) }),
        sample("noted", &MailboxResponse::Noted),
        sample("refused", &MailboxResponse::Refused(refusal())),
        sample("moved", &MailboxResponse::Moved { generation: 1 }),
    ]
}

fn mesh() -> Vec<Sample> {
    let statement = Signed::sign(&statement(), &network_key(KeyPurpose::Settlement));
    let explanation = Explanation {
        line: receipt_line(ReceiptFate::Accepted),
        repeats: 2,
        statement: Some(1),
        earning: Some(earning_line()),
        due_at: None,
        restored_at: Some(NOW - 1000),
    };
    let address = Address::new("/ip4/192.0.2.1/tcp/4001").unwrap();
    let reach = vec![(address.clone(), None), (address.clone(), Some("connection refused".into()))];
    let report = SeederReport {
        addrs: vec![Address::new("/ip4/192.0.2.1/udp/4001/quic-v1").unwrap()],
        held: vec![manifest_digest()],
        damaged: vec![Digest::from_bytes([9; 32])],
        first: true,
        capacity: 1 << 40,
        free: 1 << 39,
        spare: 1 << 38,
        leaving: true,
        moving: vec![Digest::from_bytes([8; 32])],
        unwanted: vec![Digest::from_bytes([7; 32])],
        deliveries: 3,
        max_deliveries: 256,
        turned_away: 2,
        now: NOW,
    };
    let manifest_kept = Digest::from_bytes([9; 32]);
    let kept = Kept { manifest: manifest_kept, copies: 1, wanted: 3, because: KeptBecause::NoRoom };
    let revocation = network_key(KeyPurpose::Revocation);
    let cert = Signed::sign(&seeder_cert(), &network_key(KeyPurpose::Enrolment));
    let introduce = MeshRequest::Introduce { certificate: cert.clone(), addrs: vec![address.clone()] };
    let introduced = MeshResponse::Introduced { certificate: cert.clone(), addrs: vec![address] };
    let manifest = Signed::sign(&manifest(), &network_key(KeyPurpose::Catalogue));
    vec![
        sample("key-set", &MeshRequest::KeySet),
        sample("heartbeat", &MeshRequest::Heartbeat),
        sample("epochs", &MeshRequest::Epochs { after: 1 }),
        sample(
            "enrol",
            &MeshRequest::Enrol { token: salt(4), name: "shed".into(), capacity: 1 << 40, held: Some(cert.clone()) },
        ),
        sample("report", &MeshRequest::Report(report)),
        sample("receipts", &MeshRequest::Receipts(sealed_batch())),
        sample("manifest", &MeshRequest::Manifest { digest: manifest_digest() }),
        sample("key-set-answer", &MeshResponse::KeySet(Signed::sign(&key_set(), &root()))),
        sample("heartbeat-answer", &MeshResponse::Heartbeat(Signed::sign(&heartbeat(), &revocation))),
        sample("epochs-answer", &MeshResponse::Epochs(vec![Signed::sign(&epoch(), &revocation)])),
        sample("enrolled", &MeshResponse::Enrolled(cert)),
        sample("placements", &MeshResponse::Placements(vec![placement()])),
        sample("mark", &MeshResponse::Mark(Signed::sign(&mark(), &network_key(KeyPurpose::Settlement)))),
        sample("manifest-answer", &MeshResponse::Manifest(manifest)),
        sample("refused", &MeshResponse::Refused(refusal())),
        sample("statement", &MeshRequest::Statement { after: 0 }),
        sample("explain", &MeshRequest::Explain { receipt: receipt().id() }),
        sample("release", &MeshRequest::Release { contents: vec![manifest_digest()], hand_over: true }),
        sample("dial-back", &MeshRequest::DialBack),
        sample("statement-answer", &MeshResponse::Statement(Some(Box::new(statement)))),
        sample("explained", &MeshResponse::Explained(Box::new(explanation))),
        sample("released", &MeshResponse::Released { contents: vec![manifest_digest()], kept: vec![kept] }),
        sample("reach", &MeshResponse::Reach(reach)),
        sample("introduce", &introduce),
        sample("introduced", &introduced),
        sample("stopping", &MeshRequest::Stopping),
        sample("noted", &MeshResponse::Noted),
        sample("newer-key-set", &MeshRequest::NewerKeySet(Box::new(Signed::sign(&key_set(), &root())))),
    ]
}

fn seeder_calls() -> Vec<Sample> {
    let revocation = network_key(KeyPurpose::Revocation);
    vec![
        sample("nudge", &SeederRequest::Nudge),
        sample("noted", &SeederResponse::Noted),
        sample("refused", &SeederResponse::Refused(refusal())),
        sample("epochs", &SeederRequest::Epochs { after: 1 }),
        sample("epochs-answer", &SeederResponse::Epochs(vec![Signed::sign(&epoch(), &revocation)])),
    ]
}

fn gossip() -> Vec<Sample> {
    let revocation = network_key(KeyPurpose::Revocation);
    let certificate = Signed::sign(&seeder_cert(), &network_key(KeyPurpose::Enrolment));
    vec![
        sample("news-heartbeat", &News::Heartbeat(Signed::sign(&heartbeat(), &revocation))),
        sample("news-key-set", &News::KeySet(Signed::sign(&key_set(), &root()))),
        sample("news-epoch", &News::Epoch(Signed::sign(&epoch(), &revocation))),
        sample("news-mark", &News::Mark(Signed::sign(&mark(), &network_key(KeyPurpose::Settlement)))),
        sample("batch", &GossipedBatch { certificate, batch: sealed_batch() }),
    ]
}
