//! The messages of a delivery stream, `/willcall/deliver/1`: one frame (u32 big endian length, then the codec's bytes)
//! each. A `Chunk` frame is followed by the chunk's bytes as they lie on the seeder's disk.

use bincode::{Decode, Encode};

use crate::certificate::SeederCert;
use crate::ids::PeerId;
use crate::manifest::{Manifest, Segment};
use crate::ranges::ChunkSet;
use crate::receipt::{Ack, Completion, DeliveryId};
use crate::refusal::Refusal;
use crate::replication::ReplicationOrder;
use crate::signed::Signed;
use crate::ticket::Ticket;
use crate::wire;

/// The stream protocol's name.
pub const PROTOCOL: &str = "/willcall/deliver/1";

/// By what right content is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Credential {
    /// A client's purchase.
    Ticket(Box<Ticket>),
    /// A seeder's order to hold a copy.
    Order(Box<Signed<ReplicationOrder>>),
}

/// From the client (or a replicating seeder) to the seeder.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum ClientMessage {
    /// First message: the right, and the newest acknowledgement that this client gave to this seeder, so that a seeder
    /// that lost its own copy in a crash grants the window again.
    Hello {
        /// The right.
        credential: Credential,
        /// The newest acknowledgement for this delivery and seeder, where the client remembers one.
        last_ack: Option<Signed<Ack>>,
    },
    /// Asks for the manifest (`None`) or a segment of chaining values.
    Meta {
        /// Which segment.
        segment: Option<u32>,
    },
    /// Asks for chunks; adds to what was asked for before.
    Want {
        /// The chunks.
        chunks: ChunkSet,
    },
    /// Takes back what was asked for and not yet sent.
    Cancel {
        /// The chunks.
        chunks: ChunkSet,
    },
    /// Acknowledges chunks.
    Ack(Signed<Ack>),
    /// Last message: the final acknowledgement, and the completion where the whole content is there.
    Finish {
        /// The final acknowledgement, when anything was received from this seeder.
        ack: Option<Signed<Ack>>,
        /// The completion.
        completion: Option<Signed<Completion>>,
    },
}

/// From the seeder.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum SeederMessage {
    /// First message, before anything is asked for.
    Greeting {
        /// Shown before the seeder sees a ticket.
        certificate: Signed<SeederCert>,
        /// The seeder's clock, unix milliseconds.
        now: u64,
        /// Deliveries under way, and how many there may be.
        load: (u32, u32),
    },
    /// The ticket is good.
    Welcome {
        /// Which delivery it is for, as read from the verified ticket.
        delivery: DeliveryId,
        /// Chunks that this seeder holds.
        held: ChunkSet,
        /// The newest acknowledgement that this seeder has of this delivery: the next one must be a superset of it.
        ack: Option<Signed<Ack>>,
        /// Chunks that it sends without an acknowledgement …
        window: u32,
        /// … and how many of them are out already. What of these never arrived stays lost to the window.
        outstanding: u32,
    },
    /// An acknowledgement is durable: the window as it is now.
    Window {
        /// Chunks that it sends without an acknowledgement …
        window: u32,
        /// … and how many of them are out already.
        outstanding: u32,
    },
    /// Not now, or not at all. The stream ends after it.
    Refusal(Refusal),
    /// The signed manifest.
    Manifest(Signed<Manifest>),
    /// A segment of chaining values.
    Segment {
        /// Which one.
        index: u32,
        /// The values.
        segment: Segment,
    },
    /// To [`ClientMessage::Cancel`]: these will not be sent. The others are on their way already.
    Cancelled {
        /// The chunks.
        chunks: ChunkSet,
    },
    /// A chunk; its bytes follow the frame.
    Chunk {
        /// Which one.
        index: u32,
        /// How many bytes follow.
        length: u32,
    },
    /// The final acknowledgement is durable with the seeder.
    Finished,
}

wire! {
    ClientMessage => 12 * 1024,
    SeederMessage => 48 * 1024,
}

impl Credential {
    /// Short description for logs.
    pub fn kind(&self) -> &'static str {
        match self {
            Credential::Ticket(_) => "ticket",
            Credential::Order(_) => "replication order",
        }
    }
}

/// What a verified credential allows: the one form in which serving, acknowledging and counting see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What it is counted under.
    pub delivery: DeliveryId,
    /// Generation of the lease, 0 for a replication.
    pub generation: u32,
    /// Digest of the signed manifest.
    pub manifest: crate::ids::Digest,
    /// Who receives, and whose key signs acknowledgements.
    pub client: PeerId,
    /// Most bytes that this seeder sends for it.
    pub allowance: u64,
    /// This seeder was chosen for it, and may use the large window.
    pub listed: bool,
    /// Millionths of the minor unit per MiB.
    pub rate: u64,
    /// When it ends, unix milliseconds.
    pub until: u64,
}
