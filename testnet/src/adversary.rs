//! Peers that do what they must not, over real connections: each hostile presentation of a ticket goes to a real
//! seeder, and what comes back is told exactly, so that a demo or a test can show the named refusal.

mod crook;
mod liar;
mod slander;
mod taker;

pub use crook::{Crook, CrookError, false_receipt};
pub use liar::Liar;
pub use slander::complain;
pub use taker::take_and_never_acknowledge;

use std::time::Duration;

use node::{Node, NodeConfig, NodeHandle, Supervisor, read_message, write_message};
use protocol::deliver::{ClientMessage, Credential, SeederMessage};
use protocol::ticket::{Lease, Ticket, TicketEnvelope};
use protocol::{ChunkSet, Keypair, PeerAddrs, Refusal, Signed, codec};

/// How long one presentation may take from dialling to the answer.
const LIMIT: Duration = Duration::from_secs(20);

/// What is wrong with the ticket that is presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tampering {
    /// Nothing: it is shown as it is (by whoever presents it).
    None,
    /// The merchant's endorsement is left out.
    NoEndorsement,
    /// The lease is changed in its favour, and the manager's signature left as it was.
    ForgedLease,
}

/// What a seeder did with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It refused, by name, before any content.
    Refused(Refusal),
    /// It delivered: so many bytes of content came.
    Served {
        /// Bytes of the first chunk.
        bytes: u64,
    },
    /// It took the ticket and will send nothing: what it sent before and nobody acknowledged fills the window. Whoever shows
    /// a ticket twice without ever acknowledging comes to this.
    ShutOut {
        /// Chunks that it sends without an acknowledgement.
        window: u32,
    },
}

/// Why nothing could be told.
#[derive(Debug, thiserror::Error)]
pub enum PresentError {
    /// The seeder could not be reached.
    #[error(transparent)]
    Open(#[from] node::OpenError),
    /// The node of the presenting peer did not start.
    #[error(transparent)]
    Start(#[from] node::StartError),
    /// A call failed.
    #[error(transparent)]
    Call(#[from] node::CallError),
    /// The stream broke without an answer.
    #[error(transparent)]
    Frame(#[from] node::FrameError),
    /// The stream ended, or went on, without an answer.
    #[error("the seeder {0}")]
    NoAnswer(&'static str),
    /// The ticket cannot be changed in this way.
    #[error("the ticket cannot be tampered with: {0}")]
    Tamper(#[from] codec::CodecError),
}

/// Presents `envelope`'s ticket to `seeder` under the key `presenter`, and asks for the first chunk.
///
/// # Errors
/// [`PresentError`] when the seeder neither refused nor served.
pub async fn present(
    presenter: &Keypair,
    envelope: &TicketEnvelope,
    tampering: Tampering,
    seeder: &PeerAddrs,
) -> Result<Outcome, PresentError> {
    let ticket = tamper(&envelope.ticket, tampering)?;
    as_peer(presenter, async |node| exchange(&node, ticket, seeder).await).await
}

/// Runs `deed` with a node of its own under this key, for as long as one may take.
async fn as_peer<T>(
    key: &Keypair,
    deed: impl AsyncFnOnce(NodeHandle) -> Result<T, PresentError>,
) -> Result<T, PresentError> {
    let supervisor = Supervisor::new();
    let config = NodeConfig { gossip: false, ..NodeConfig::new(key.clone()) };
    let node = Node::start(config, &supervisor).await?;
    let outcome = tokio::time::timeout(LIMIT, deed(node)).await;
    // Nothing of value runs here; what does not end in time is aborted.
    let _ = supervisor.shutdown(Duration::from_secs(5)).await;
    outcome.unwrap_or(Err(PresentError::NoAnswer("did not answer in time")))
}

/// Opens a delivery stream and shows the ticket; the refusal where one comes instead of the greeting.
async fn show(
    node: &NodeHandle,
    ticket: Ticket,
    seeder: &PeerAddrs,
) -> Result<Result<node::Stream, Refusal>, PresentError> {
    let mut stream = node.open(seeder, node::Protocol::new(protocol::deliver::PROTOCOL), LIMIT).await?;
    let closed = PresentError::NoAnswer("closed the stream without an answer");
    match read_message::<SeederMessage, _>(&mut stream).await?.ok_or(closed)? {
        SeederMessage::Greeting { .. } => {}
        SeederMessage::Refusal(refusal) => return Ok(Err(refusal)),
        _ => return Err(PresentError::NoAnswer("said something before its greeting")),
    }
    let credential = Credential::Ticket(Box::new(ticket));
    write_message(&mut stream, &ClientMessage::Hello { credential, last_ack: None }).await?;
    Ok(Ok(stream))
}

async fn exchange(node: &NodeHandle, ticket: Ticket, seeder: &PeerAddrs) -> Result<Outcome, PresentError> {
    let mut stream = match show(node, ticket, seeder).await? {
        Ok(stream) => stream,
        Err(refusal) => return Ok(Outcome::Refused(refusal)),
    };
    // Asking at once shows that no byte comes before the checks are through.
    let want = ClientMessage::Want { chunks: ChunkSet::from_range(0..1) };
    let asked = write_message(&mut stream, &want).await;
    loop {
        match read_message::<SeederMessage, _>(&mut stream).await? {
            Some(SeederMessage::Refusal(refusal)) => return Ok(Outcome::Refused(refusal)),
            // It would wait for an acknowledgement, and this peer has nothing to acknowledge.
            Some(SeederMessage::Welcome { window, outstanding, .. }) if outstanding >= window => {
                return Ok(Outcome::ShutOut { window });
            }
            Some(SeederMessage::Chunk { length, .. }) => return Ok(Outcome::Served { bytes: u64::from(length) }),
            Some(_) => {}
            None => {
                asked?;
                return Err(PresentError::NoAnswer("closed the stream without an answer"));
            }
        }
    }
}

/// Changes a ticket as told.
///
/// # Errors
/// The ticket's lease cannot be read.
pub fn tamper(ticket: &Ticket, tampering: Tampering) -> Result<Ticket, codec::CodecError> {
    let mut ticket = ticket.clone();
    match tampering {
        Tampering::None => {}
        Tampering::NoEndorsement => ticket.endorsement = None,
        Tampering::ForgedLease => {
            let mut lease = ticket.lease.peek()?;
            lease.allowance = lease.allowance.saturating_mul(1000);
            lease.ceiling = lease.ceiling.saturating_mul(1000);
            ticket.lease = ticket.lease.with_body_forged(&lease);
        }
    }
    Ok(ticket)
}

/// The same ticket with its lease changed and signed again by `signer`: with the network's own ticket key it is what a
/// manager would sign whose clock, say, is off.
///
/// # Errors
/// The ticket's lease cannot be read.
pub fn signed_anew(
    envelope: &TicketEnvelope,
    signer: &Keypair,
    change: impl FnOnce(&mut Lease),
) -> Result<TicketEnvelope, codec::CodecError> {
    let mut envelope = envelope.clone();
    let mut lease = envelope.ticket.lease.peek()?;
    change(&mut lease);
    envelope.ticket.lease = Signed::sign(&lease, signer);
    Ok(envelope)
}
