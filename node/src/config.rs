//! What a node is told at its start, as plain data: flags and files are the program's business, and every number that
//! bounds something stands here beside the reason for it.

use std::time::Duration;

use protocol::{Address, Keypair, PeerAddrs};

use crate::metrics::Metrics;
use crate::reach::ReachConfig;

/// Part that a node takes in the distributed hash table that says who provides which content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DhtMode {
    /// Neither asks nor answers.
    Off,
    /// Asks only: right for clients, which come and go.
    Client,
    /// Asks, and answers others: right for nodes that are reachable for hours.
    Server,
}

/// Everything that [`crate::Node::start`] needs.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The node's identity.
    pub keypair: Keypair,
    /// Addresses to listen on, e.g. `/ip4/0.0.0.0/tcp/4001`; port 0 lets the system choose. Empty: no listening.
    pub listen: Vec<Address>,
    /// Addresses under which others reach this node, announced beside the ones it listens on.
    pub external: Vec<Address>,
    /// Peers to join the DHT through.
    pub bootstrap: Vec<PeerAddrs>,
    /// Part taken in the DHT.
    pub dht: DhtMode,
    /// Whether the node takes part in gossip.
    pub gossip: bool,
    /// What is done to be reached, and for others to be; nothing by default.
    pub reach: ReachConfig,
    /// Bounds.
    pub limits: Limits,
    /// Name and version that peers see, e.g. `willcall-seeder/0.1.0`.
    pub agent: String,
    /// The whole time of one connection attempt, from dialling to the encrypted connection.
    pub connection_timeout: Duration,
    /// A connection without streams is closed after this time.
    pub idle_timeout: Duration,
    /// Interval of the gossip mesh's housekeeping: how fast a mesh forms and repairs itself.
    pub gossip_heartbeat: Duration,
    /// How long a gossip message is remembered, so that it is neither judged nor forwarded twice.
    pub gossip_memory: Duration,
    /// Start although `SSLKEYLOGFILE` is set, which makes TLS write its session keys to that file.
    pub allow_key_log: bool,
    /// Where the node counts; a fresh registry if the role gives none.
    pub metrics: Metrics,
}

/// Bounds of a node; what happens at each is said beside it.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Established connections in all; further ones are closed. A connection with buffers is about 100 KiB, so 1,024
    /// of them fit a small machine. Others may take seven eighths of them; to one more the newest connection of the address
    /// that has most gives way (of IPv6 its first 48 bits), and an address that has as many as any gets no more.
    pub connections: u32,
    /// Connections being set up in each direction; further ones are dropped without a word, which their peers only notice as
    /// a loss. As many as may be connected: each of the clients that come in one instant tries TCP and QUIC. A handshake
    /// under way is some 50 KiB. One address (of IPv6 its first 48 bits) gets a quarter of them for each of the two ways, and
    /// no more than half of what is free, so that one that says nothing does not keep others out; all over QUIC, whose
    /// senders have proved nothing yet, get half of them.
    pub pending_connections: u32,
    /// Connections with one peer. To a further one the oldest gives way: one without streams, then one over QUIC before
    /// others, since those outlive a program that was killed, but none on which goods flow: if they do on all, the further
    /// one is refused. Two more may be there until they are closed. Two (TCP and QUIC, or both ends dialling at once) are
    /// normal, sixteen are those of eight programs with one key: as many deliveries as a seeder gives one client.
    pub connections_per_peer: u32,
    /// Streams of one peer's connection that may be negotiating a protocol at once; further ones are reset.
    pub negotiating_streams: usize,
    /// Streams being opened in all; further ones fail with [`crate::OpenError::Busy`].
    pub pending_opens: usize,
    /// Commands waiting for the network task; callers wait at this bound. They are tiny and answered in microseconds.
    pub commands: usize,
    /// Gossip messages handed to the application and not yet judged; further ones are ignored. At 64 KiB each this is
    /// at most 64 MiB.
    pub gossip_unjudged: usize,
    /// Topics that this node and each of its peers may subscribe to, of 128 bytes at most; further ones are refused.
    pub gossip_topics: usize,
    /// Contents in the DHT store of this node, its own included; further records are refused. About 300 bytes each.
    pub dht_keys: usize,
    /// Providers kept for one content; further ones are ignored.
    pub dht_providers_per_key: usize,
    /// Peers that may be in the DHT with us; further ones are refused. 32 bytes each.
    pub dht_peers: usize,
    /// Connected peers of the DHT that are not in this node's table, for a role to look at; beyond it, the first are passed
    /// over until they connect again. 64 bytes each.
    pub dht_newcomers: usize,
    /// DHT questions under way at once; further ones fail with [`crate::DhtError::Busy`].
    pub dht_queries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            pending_connections: 1024,
            connections_per_peer: 16,
            negotiating_streams: 512,
            pending_opens: 1024,
            commands: 256,
            gossip_unjudged: 1024,
            gossip_topics: 512,
            dht_keys: 65_536,
            dht_providers_per_key: 64,
            dht_peers: 131_072,
            dht_newcomers: 512,
            dht_queries: 256,
        }
    }
}

impl NodeConfig {
    /// A node that listens nowhere, with gossip and no DHT.
    pub fn new(keypair: Keypair) -> Self {
        Self {
            keypair,
            listen: Vec::new(),
            external: Vec::new(),
            bootstrap: Vec::new(),
            dht: DhtMode::Off,
            gossip: true,
            reach: ReachConfig::default(),
            limits: Limits::default(),
            agent: concat!("willcall/", env!("CARGO_PKG_VERSION")).to_owned(),
            connection_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            gossip_heartbeat: Duration::from_secs(1),
            gossip_memory: Duration::from_secs(5 * 60),
            allow_key_log: false,
            metrics: Metrics::new(),
        }
    }
}
