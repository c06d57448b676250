//! A client that says what it is told to, whether that makes sense or not.

use std::time::Duration;

use node::{Node, NodeConfig, NodeHandle, Protocol, Stream, Supervisor, read_message, write_message};
use protocol::deliver::{ClientMessage, Credential, PROTOCOL, SeederMessage};
use protocol::receipt::{Ack, DeliveryId};
use protocol::ticket::Ticket;
use protocol::{ChunkSet, Digest, Keypair, NetworkId, PeerAddrs, PeerId, Refusal, Signed};
use tokio::io::AsyncReadExt;

use crate::world::{LIMIT, now};

pub(crate) struct Client {
    pub(crate) key: Keypair,
    pub(crate) node: NodeHandle,
    _supervisor: Supervisor,
}

impl Client {
    pub(crate) async fn new(seed: u8) -> Self {
        let key = Keypair::from_seed(&[seed; 32]);
        let supervisor = Supervisor::new();
        let config = NodeConfig { gossip: false, ..NodeConfig::new(key.clone()) };
        let node = Node::start(config, &supervisor).await.unwrap();
        Client { key, node, _supervisor: supervisor }
    }

    pub(crate) fn peer(&self) -> PeerId {
        self.key.peer_id()
    }

    pub(crate) async fn open(&self, seeder: &PeerAddrs) -> Talk {
        Talk { stream: self.node.open(seeder, Protocol::new(PROTOCOL), LIMIT).await.unwrap() }
    }

    /// Opens, hears the greeting, shows the ticket.
    pub(crate) async fn show(&self, seeder: &PeerAddrs, ticket: &Ticket) -> Talk {
        let mut talk = self.open(seeder).await;
        let greeting = talk.hear().await.unwrap();
        assert!(matches!(greeting, SeederMessage::Greeting { .. }), "{greeting:?}");
        talk.hello(ticket).await;
        talk
    }

    /// As [`Client::show`], up to the welcome.
    pub(crate) async fn begin(&self, seeder: &PeerAddrs, ticket: &Ticket) -> (Talk, Welcome) {
        let mut talk = self.show(seeder, ticket).await;
        match talk.hear().await.unwrap() {
            SeederMessage::Welcome { held, ack, window, outstanding, .. } => {
                (talk, Welcome { held, ack, window, outstanding })
            }
            other => panic!("no welcome but {other:?}"),
        }
    }

    pub(crate) fn ack(&self, network: NetworkId, ticket: &Ticket, seeder: PeerId, chunks: ChunkSet) -> Signed<Ack> {
        let (data, lease) = (ticket.data.peek().unwrap(), ticket.lease.peek().unwrap());
        let ack = Ack {
            network,
            delivery: DeliveryId { transaction: data.transaction, delivery: lease.delivery },
            manifest: data.manifest,
            seeder,
            chunks,
            at: now(),
        };
        Signed::sign(&ack, &self.key)
    }
}

#[derive(Debug)]
pub(crate) struct Welcome {
    pub(crate) held: ChunkSet,
    pub(crate) ack: Option<Signed<Ack>>,
    pub(crate) window: u32,
    pub(crate) outstanding: u32,
}

/// One stream.
pub(crate) struct Talk {
    pub(crate) stream: Stream,
}

impl Talk {
    pub(crate) async fn hello(&mut self, ticket: &Ticket) {
        let credential = Credential::Ticket(Box::new(ticket.clone()));
        self.say(ClientMessage::Hello { credential, last_ack: None }).await;
    }

    pub(crate) async fn say(&mut self, message: ClientMessage) {
        // The seeder may have ended the stream already: what it said shows at the next hearing.
        let _ = write_message(&mut self.stream, &message).await;
    }

    pub(crate) async fn want(&mut self, chunks: std::ops::Range<u32>) {
        self.say(ClientMessage::Want { chunks: ChunkSet::from_range(chunks) }).await;
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) async fn hear(&mut self) -> Option<SeederMessage> {
        let read = tokio::time::timeout(LIMIT, read_message(&mut self.stream)).await.expect("nothing was said");
        read.ok().flatten()
    }

    /// The next chunk, messages before it passed over.
    pub(crate) async fn chunk(&mut self) -> Result<(u32, Vec<u8>), SeederMessage> {
        loop {
            match self.hear().await {
                Some(SeederMessage::Chunk { index, length }) => {
                    let mut bytes = vec![0; length as usize];
                    self.stream.read_exact(&mut bytes).await.unwrap();
                    return Ok((index, bytes));
                }
                Some(SeederMessage::Window { .. } | SeederMessage::Cancelled { .. }) => {}
                Some(other) => return Err(other),
                None => panic!("the stream ended instead"),
            }
        }
    }

    /// The refusal with which the stream ends. Nothing but it and the greeting may come before.
    pub(crate) async fn refusal(&mut self) -> Refusal {
        loop {
            match self.hear().await {
                Some(SeederMessage::Refusal(refusal)) => {
                    let mut rest = Vec::new();
                    let _ = tokio::time::timeout(LIMIT, self.stream.read_to_end(&mut rest)).await.unwrap();
                    assert!(rest.is_empty(), "{} bytes after the refusal", rest.len());
                    return refusal;
                }
                Some(SeederMessage::Greeting { .. } | SeederMessage::Window { .. }) => {}
                other => panic!("no refusal but {other:?}"),
            }
        }
    }

    /// Chunks that come within a moment in which nothing else could.
    pub(crate) async fn drain(&mut self, quiet: Duration) -> Vec<u32> {
        let mut got = Vec::new();
        while let Ok(Ok(next)) = tokio::time::timeout(quiet, self.chunk()).await {
            got.push(next.0);
        }
        got
    }
}

pub(crate) fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_bytes(*blake3::hash(bytes).as_bytes())
}
