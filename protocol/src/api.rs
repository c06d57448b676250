//! What merchants, clients and seeders ask of the manager: one request and one response frame on a stream of its own.
//! Whoever asks is the peer that the connection proves; no request names its sender.

mod epochs;
mod gossiped;
mod sales;

pub use epochs::EpochsPage;
pub use gossiped::is_to_blame;
pub use sales::{ProductInfo, Reserve, SalesRequest, SalesResponse, TakenBack};

use bincode::{Decode, Encode};

use crate::certificate::SeederCert;
use crate::entitlement::Move;
use crate::ids::{Address, Digest, Nonce, PeerAddrs, PeerId, TransactionId};
use crate::manifest::Manifest;
use crate::ranges::ChunkSet;
use crate::receipt::{Completion, Mark, SealedBatch};
use crate::refusal::Refusal;
use crate::replication::Placement;
use crate::signed::Signed;
use crate::statement::{Explanation, Statement};
use crate::ticket::{KeyGrant, TicketEnvelope};
use crate::trust::{Heartbeat, JoinLine, KeySet, RevocationEpoch};
use crate::wire;

/// Merchants to the manager.
pub const SALES_PROTOCOL: &str = "/willcall/sales/1";
/// Clients to the manager.
pub const MAILBOX_PROTOCOL: &str = "/willcall/mailbox/1";
/// Seeders to the manager; and, for what is public, anybody to the manager or to any seeder.
pub const MESH_PROTOCOL: &str = "/willcall/mesh/1";

/// An answer to a call, which may always be a no: also from a service that is too busy to look at the question.
pub trait Answer: crate::codec::Wire {
    /// The answer that refuses.
    fn refused(refusal: Refusal) -> Self;

    /// The refusal, where it is one.
    fn refusal(&self) -> Option<&Refusal>;
}

/// Where a transaction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TransactionState {
    /// Formed, not yet released.
    Reserved,
    /// The ticket exists.
    Released,
    /// At least one receipt came in.
    Delivering,
    /// Everything was acknowledged, or the client signed the completion.
    Delivered,
    /// Paid out.
    Settled,
    /// Not released in time.
    Expired,
    /// Taken back by the merchant before release.
    Cancelled,
    /// Taken back by the manager.
    Revoked,
    /// Money given back; delivery stopped.
    Refunded,
}

impl TransactionState {
    /// The name in JSON and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            TransactionState::Reserved => "reserved",
            TransactionState::Released => "released",
            TransactionState::Delivering => "delivering",
            TransactionState::Delivered => "delivered",
            TransactionState::Settled => "settled",
            TransactionState::Expired => "expired",
            TransactionState::Cancelled => "cancelled",
            TransactionState::Revoked => "revoked",
            TransactionState::Refunded => "refunded",
        }
    }
}

/// Asked by clients.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum MailboxRequest {
    /// Tickets for this peer, newest first, older than the given one.
    List {
        /// Last of the page before.
        before: Option<TransactionId>,
    },
    /// One ticket, with a lease that is good now: also how a lease is renewed.
    Ticket {
        /// Which.
        transaction: TransactionId,
        /// The delivery that cannot go on, since what was acknowledged in it is lost and no seeder's window has room for it
        /// again: a further one takes its place. Of an earlier one it says nothing.
        instead_of: Option<u32>,
    },
    /// The whole ciphertext is here: for `on-completion` products the key comes back.
    Complete {
        /// The signed word.
        completion: Signed<Completion>,
    },
    /// A seeder sent a chunk that does not verify: a hint, not a proof.
    Complain {
        /// In which transaction.
        transaction: TransactionId,
        /// Who sent it.
        seeder: PeerId,
        /// Which chunk.
        chunk: u32,
    },
    /// Hands a purchase on to another peer. Repeating it gives the first answer, though the purchase is gone by then.
    Move {
        /// The signed word.
        word: Signed<Move>,
    },
}

/// One line of an inbox.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MailItem {
    /// Which.
    pub transaction: TransactionId,
    /// What was bought.
    pub title: String,
    /// Where it stands.
    pub state: TransactionState,
    /// When it was released, unix milliseconds.
    pub released_at: u64,
    /// Bytes of all files.
    pub plain_bytes: u64,
    /// Counts up with each move to another peer: tells a ticket of before from one of now.
    pub generation: u32,
}

/// Answers to clients.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum MailboxResponse {
    /// To [`MailboxRequest::List`]; fewer than [`MailboxResponse::PAGE`] means that was all.
    List(Vec<MailItem>),
    /// To [`MailboxRequest::Ticket`].
    Ticket(Box<TicketEnvelope>),
    /// To [`MailboxRequest::Complete`].
    Completed {
        /// The content key, where it was held back until now.
        grant: Option<KeyGrant>,
    },
    /// To [`MailboxRequest::Complain`].
    Noted,
    /// No.
    Refused(Refusal),
    /// To [`MailboxRequest::Move`]: the new peer finds its ticket in its own mailbox.
    Moved {
        /// The generation that began.
        generation: u32,
    },
}

impl MailboxResponse {
    /// Lines in a full page.
    pub const PAGE: usize = 100;
}

/// A seeder's report on itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct SeederReport {
    /// Where it can be reached, the most useful first: the manager takes 16 of them.
    pub addrs: Vec<Address>,
    /// Contents held in whole, by the digest of their signed manifest; at most [`SeederReport::MAX_HELD`], further ones
    /// in a report that follows.
    pub held: Vec<Digest>,
    /// Contents of which a part is missing or was found damaged, to be made whole again; at most
    /// [`SeederReport::MAX_DAMAGED`]. Said in the last part of a report: until then they may count as held.
    pub damaged: Vec<Digest>,
    /// True in the first part of a report: what was reported before is forgotten.
    pub first: bool,
    /// Bytes that it offers in all, by its configuration of now: its share of the network's copies goes by that.
    pub capacity: u64,
    /// Bytes that may still be placed here where copies are missing. It ends below the mark from which the seeder removes
    /// content.
    pub free: u64,
    /// Bytes that it takes in addition although there are copies enough: its share of what others hold. It ends at the mark
    /// down to which the seeder removes content, so that nothing goes for the sake of what was not needed.
    pub spare: u64,
    /// It leaves: what it asked to hand over (`Release`) stays meant. False takes all of that back, but for `moving`.
    pub leaving: bool,
    /// Contents that it wants to be rid of for want of room, and that have no copies enough elsewhere; at most
    /// [`SeederReport::MAX_MOVING`]. Said in each report as long as it is so.
    pub moving: Vec<Digest>,
    /// Contents that were ordered here and that it will not have, by its operator's own deny list; at most
    /// [`SeederReport::MAX_UNWANTED`], the newest. Said in each report as long as it is so: they are ordered elsewhere.
    pub unwanted: Vec<Digest>,
    /// Deliveries under way …
    pub deliveries: u32,
    /// … and how many there may be.
    pub max_deliveries: u32,
    /// Clients turned away as overloaded since the report before.
    pub turned_away: u32,
    /// The seeder's clock, unix milliseconds: many of them tell a manager whose own clock is off, and one that is off beyond
    /// the grace that this seeder refuses everybody. 0 says nothing.
    pub now: u64,
}

impl SeederReport {
    /// Contents in one message.
    pub const MAX_HELD: usize = 1024;
    /// Damaged contents in one message; the rest follows when these are whole.
    pub const MAX_DAMAGED: usize = 64;
    /// Contents to be copied elsewhere in one message; the rest follow when these are gone.
    pub const MAX_MOVING: usize = 32;
    /// Contents that it will not have in one message: as many as there are orders in a seeder's queue.
    pub const MAX_UNWANTED: usize = 256;
}

/// Asked by seeders; the first three by anybody.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum MeshRequest {
    /// The key set in force.
    KeySet,
    /// The newest heartbeat.
    Heartbeat,
    /// Revocation epochs after the given number, in order, as many as an [`EpochsPage`] takes; none means that was all.
    Epochs {
        /// Last one held.
        after: u64,
    },
    /// Uses an invitation.
    Enrol {
        /// From the join line.
        token: Nonce,
        /// For people, at most 64 bytes.
        name: String,
        /// Bytes offered.
        capacity: u64,
        /// Its certificate: a manager that came back from a backup from before takes it back by that.
        held: Option<Signed<SeederCert>>,
    },
    /// Says what it holds; the answer is what it is to fetch.
    Report(SeederReport),
    /// Receipts, directly.
    Receipts(Signed<SealedBatch>),
    /// The signed manifest that a ticket or order names.
    Manifest {
        /// Its digest.
        digest: Digest,
    },
    /// The statement of this seeder after the given number.
    Statement {
        /// Last one held, 0 for none.
        after: u64,
    },
    /// What became of a receipt of this seeder.
    Explain {
        /// [`crate::receipt::Receipt::id`].
        receipt: Digest,
    },
    /// May it let go of these, by the digest of their signed manifest? At most [`SeederReport::MAX_HELD`].
    Release {
        /// Which.
        contents: Vec<Digest>,
        /// It wants to be rid of them: copies of those that may not go yet are to be made elsewhere.
        hand_over: bool,
    },
    /// Can others reach it? The manager tries, as a stranger, at the addresses of its last report.
    DialBack,
    /// One seeder to another: this is my enrolment, and there I am. So seeders of the DHT know each other without a
    /// manager.
    Introduce {
        /// The asking seeder's.
        certificate: Signed<SeederCert>,
        /// Where it is reached, at most [`PeerAddrs::MAX_ADDRS`].
        addrs: Vec<Address>,
    },
    /// It stops in order: until its next report no client is sent there.
    Stopping,
    /// A key set that the manager does not have, or numbered again: it came back from a backup from before. It proves itself,
    /// and may come from anybody.
    NewerKeySet(Box<Signed<KeySet>>),
}

/// A copy that may not go yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Kept {
    /// Digest of the signed manifest.
    pub manifest: Digest,
    /// Whole copies at others that are there …
    pub copies: u32,
    /// … and how many there have to be.
    pub wanted: u32,
    /// Why there are no more.
    pub because: KeptBecause,
}

/// What a copy that may not go waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum KeptBecause {
    /// Another seeder is to make a copy, or can.
    UnderWay,
    /// No other seeder has room for it.
    NoRoom,
    /// There is no other seeder.
    NobodyElse,
}

impl KeptBecause {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            KeptBecause::UnderWay => "another seeder is to make the copy",
            KeptBecause::NoRoom => "no other seeder has room for it",
            KeptBecause::NobodyElse => "there is no other seeder",
        }
    }
}

/// Answers to seeders.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum MeshResponse {
    /// To [`MeshRequest::KeySet`].
    KeySet(Signed<KeySet>),
    /// To [`MeshRequest::Heartbeat`].
    Heartbeat(Signed<Heartbeat>),
    /// To [`MeshRequest::Epochs`].
    Epochs(Vec<Signed<RevocationEpoch>>),
    /// To [`MeshRequest::Enrol`]. Repeating it by the same peer gives the same answer.
    Enrolled(Signed<SeederCert>),
    /// To [`MeshRequest::Report`]: at most [`MeshResponse::PLACEMENTS_PAGE`]; report again when they are done.
    Placements(Vec<Placement>),
    /// To [`MeshRequest::Receipts`].
    Mark(Signed<Mark>),
    /// To [`MeshRequest::Manifest`].
    Manifest(Signed<Manifest>),
    /// No.
    Refused(Refusal),
    /// To [`MeshRequest::Statement`]; absent when there is none after that number.
    Statement(Option<Box<Signed<Statement>>>),
    /// To [`MeshRequest::Explain`].
    Explained(Box<Explanation>),
    /// To [`MeshRequest::Release`].
    Released {
        /// Those that have enough other copies, and do not count as held by it any more.
        contents: Vec<Digest>,
        /// The others, and what they wait for.
        kept: Vec<Kept>,
    },
    /// To [`MeshRequest::DialBack`]: each address, and why nobody answered there or `None`. The reason has at most
    /// [`Refusal::MAX_DETAIL`] bytes.
    Reach(Vec<(Address, Option<String>)>),
    /// To [`MeshRequest::Introduce`]: the same of the one that answers.
    Introduced {
        /// The answering seeder's.
        certificate: Signed<SeederCert>,
        /// Where it is reached, at most [`PeerAddrs::MAX_ADDRS`].
        addrs: Vec<Address>,
    },
    /// To [`MeshRequest::Stopping`] and [`MeshRequest::NewerKeySet`].
    Noted,
}

impl MeshResponse {
    /// Most epochs in one answer …
    pub const EPOCHS_PAGE: usize = 256;
    /// … and their bytes, unless it is one alone: a slow line has to bring them within one call.
    pub const EPOCHS_BYTES: usize = 128 * 1024;
    /// Placements in one answer.
    pub const PLACEMENTS_PAGE: usize = 8;
}

wire! {
    MailboxRequest => 4 * 1024,
    MailboxResponse => 128 * 1024,
    MeshRequest => 96 * 1024,
    MeshResponse => 512 * 1024,
}

/// The manager to seeders.
pub const SEEDER_PROTOCOL: &str = "/willcall/seeder/1";

/// Asked by managers of seeders.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum SeederRequest {
    /// Placements, keys or revocations changed: report now instead of at the next regular time.
    Nudge,
    /// Revocation epochs that the seeder holds after the given number, in order, as many as an [`EpochsPage`] takes: a
    /// manager that came back from a backup asks for what it no longer knows.
    Epochs {
        /// Last one known.
        after: u64,
    },
}

/// Answers to managers.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum SeederResponse {
    /// A report follows.
    Noted,
    /// No.
    Refused(Refusal),
    /// To [`SeederRequest::Epochs`].
    Epochs(Vec<Signed<RevocationEpoch>>),
}

wire! {
    SeederRequest => 1024,
    SeederResponse => 512 * 1024,
}

macro_rules! answers {
    ($($ty:ident),+) => {
        $(impl Answer for $ty {
            fn refused(refusal: Refusal) -> Self {
                $ty::Refused(refusal)
            }

            fn refusal(&self) -> Option<&Refusal> {
                match self {
                    $ty::Refused(refusal) => Some(refusal),
                    _ => None,
                }
            }
        })+
    };
}

answers!(SalesResponse, MailboxResponse, MeshResponse, SeederResponse);

/// What travels on the news topic of the mesh: signed, so that it may come from anybody.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum News {
    /// The manager lives.
    Heartbeat(Signed<Heartbeat>),
    /// New keys.
    KeySet(Signed<KeySet>),
    /// New revocations.
    Epoch(Signed<RevocationEpoch>),
    /// Receipts have arrived.
    Mark(Signed<Mark>),
}

/// What travels on the receipt topics: a sealed batch, with the certificate that lets any member of the mesh judge
/// whether its sender may publish.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct GossipedBatch {
    /// The sender's enrolment.
    pub certificate: Signed<SeederCert>,
    /// The batch.
    pub batch: Signed<SealedBatch>,
}

/// Largest gossip message, bytes.
pub const MAX_GOSSIP: usize = 64 * 1024;

wire! {
    News => MAX_GOSSIP,
    GossipedBatch => MAX_GOSSIP,
}

/// Topic of [`News`].
pub fn news_topic(network: &crate::ids::NetworkId) -> String {
    format!("/willcall/{network}/news/1")
}

/// Topic of [`GossipedBatch`]es of one seeder.
pub fn receipts_topic(network: &crate::ids::NetworkId, seeder: &PeerId, shards: u16) -> String {
    receipts_topic_of_shard(network, shard_of(network, seeder, shards))
}

fn shard_of(network: &crate::ids::NetworkId, seeder: &PeerId, shards: u16) -> u16 {
    let digest = Digest::of("willcall 2026-11 gossip shard", &[network.as_bytes(), seeder.as_bytes()]);
    let [a, b, ..] = *digest.as_bytes();
    u16::from_le_bytes([a, b]) % shards.max(1)
}

/// Most shards whose receipts one seeder passes on: as many as a small network has, so that there every seeder is a way
/// to the manager for every other. In a larger one, with more shards, each seeder carries its part only.
pub const SHARDS_CARRIED: u16 = 4;

/// The shards that a seeder carries: its own, and those that follow. Neighbouring shards share most of their carriers, and
/// each shard has its part of all seeders, whichever they are.
pub fn shards_carried(network: &crate::ids::NetworkId, seeder: &PeerId, shards: u16) -> Vec<u16> {
    let shards = shards.max(1);
    let own = shard_of(network, seeder, shards);
    (0..shards).cycle().skip(usize::from(own)).take(usize::from(SHARDS_CARRIED.min(shards))).collect()
}

/// Topic of one shard.
pub fn receipts_topic_of_shard(network: &crate::ids::NetworkId, shard: u16) -> String {
    format!("/willcall/{network}/receipts/1/{shard}")
}

/// Key of provider records in the DHT: keyed by a digest, so that the DHT does not show which content is sold.
pub fn provider_key(network: &crate::ids::NetworkId, manifest: &Digest) -> Digest {
    Digest::of("willcall 2026-11 provider key", &[network.as_bytes(), manifest.as_bytes()])
}

/// A set of chunks in an answer is bounded by its own decoder; this states the assumption that a full page of anything
/// stays within the message limits above.
const _: () = assert!(ChunkSet::MAX_RANGES * 10 < 12 * 1024);

impl JoinLine {
    /// The manager addresses to call, first the first.
    pub fn first_manager(&self) -> Option<&PeerAddrs> {
        self.managers.first()
    }
}
