//! Which transports and protocols a node is made of, and with which settings: the library's defaults are for
//! experiments, and each that is changed here has its reason beside it.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::time::Duration;

use libp2p::core::transport::dummy::DummyTransport;
use libp2p::core::upgrade::Version;
use libp2p::kad::store::{MemoryStore, MemoryStoreConfig};
use libp2p::multiaddr::Protocol as Part;
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    Multiaddr, StreamProtocol, Swarm, SwarmBuilder, connection_limits, dns, gossipsub, identify, identity, kad, mdns,
    noise, ping, relay, tcp,
};
use protocol::Address;

use crate::address::is_loopback;
use crate::config::{DhtMode, NodeConfig};
use crate::counted::Traffic;
use crate::dht;
use crate::door::Door;
use crate::gossip;
use crate::metrics::NodeMetrics;
use crate::muxer::Yamux;
use crate::reach::{DialBacks, Forwarding, Members, Probing, Punching, relay_config};
use crate::streams;
use crate::tls::Tls;

/// Protocol name of the DHT: not the public network's, so that the two never mix.
const KAD: StreamProtocol = StreamProtocol::new("/willcall/kad/1");
/// Version that identify announces.
const IDENTIFY: &str = "/willcall/1";
/// A provider who is gone is found for no longer than this; each announces itself anew well before.
const PROVIDER_TTL: Duration = Duration::from_secs(2 * 3600);
/// Peers that a client asks at once in one query of the DHT: as many as a key is announced to, or nearly.
const CLIENT_PARALLELISM: NonZeroUsize = match NonZeroUsize::new(16) {
    Some(peers) => peers,
    None => NonZeroUsize::MIN,
};
/// A DHT question takes a second or two; one that found nobody to answer ends here.
const KAD_QUERY_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection whose peer does not answer a ping for so long is closed; a busy but living link answers within seconds.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Connections with one peer that gave way to newer ones and are being closed, at most: a node that starts makes two at once.
const GIVING_WAY: u32 = 2;

/// Bytes on their way on one QUIC stream, at most: 10 MiB/s at 50 ms, more than the homes have that only QUIC reaches. This
/// process holds them until the peer has them; over TCP the system does.
pub const QUIC_STREAM_BYTES: u32 = 512 * 1024;

pub(crate) type Gossip =
    gossipsub::Behaviour<gossipsub::IdentityTransform, gossipsub::MaxCountSubscriptionFilter<gossip::ShortTopics>>;
pub(crate) type Kad = kad::Behaviour<MemoryStore>;

#[derive(NetworkBehaviour)]
pub(crate) struct NodeBehaviour {
    // First, so that a connection over a limit costs nothing else, and is refused by the limit that says most.
    door: Door,
    limits: connection_limits::Behaviour,
    pub(crate) streams: streams::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    pub(crate) gossip: Toggle<Gossip>,
    pub(crate) kad: Toggle<Kad>,
    // What makes the node reachable, and others by it.
    relay_client: relay::client::Behaviour,
    relay: Toggle<relay::Behaviour>,
    pub(crate) dcutr: Toggle<Punching>,
    pub(crate) autonat: Toggle<Probing>,
    dial_backs: Toggle<DialBacks>,
    pub(crate) upnp: Toggle<Forwarding>,
    mdns: Toggle<mdns::tokio::Behaviour>,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `SSLKEYLOGFILE` is set.
    #[error(
        "SSLKEYLOGFILE is set: every TLS session key would be written to {file}; unset it, or allow it in the \
         configuration if that is meant"
    )]
    KeyLog {
        /// Its value.
        file: String,
    },
    /// A configured address is not one.
    #[error("{address} is not a usable address: {reason}")]
    BadAddress {
        /// The address.
        address: Address,
        /// Why.
        reason: String,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}; {}", listen_advice(source))]
    Listen {
        /// The address.
        address: Address,
        /// What the system said.
        source: std::io::Error,
    },
    /// A part of the network stack could not be set up.
    #[error("cannot set up {part}: {reason}")]
    Setup {
        /// The part.
        part: &'static str,
        /// Why.
        reason: String,
    },
}

fn listen_advice(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => "stop the process that uses it, or choose another port (0 takes any free one)",
        std::io::ErrorKind::PermissionDenied => "choose a port above 1023",
        std::io::ErrorKind::AddrNotAvailable => "choose an address of this machine, or 0.0.0.0 for all of them",
        _ => "choose another address",
    }
}

/// TLS writes its session keys to the file that this variable names; a node does not do that by accident.
pub(crate) fn refuse_key_log(allowed: bool) -> Result<(), StartError> {
    match std::env::var_os("SSLKEYLOGFILE") {
        Some(file) if !allowed => Err(StartError::KeyLog { file: file.to_string_lossy().into_owned() }),
        _ => Ok(()),
    }
}

pub(crate) fn build(
    config: &NodeConfig,
    metrics: &NodeMetrics,
    members: &Members,
) -> Result<Swarm<NodeBehaviour>, StartError> {
    let setup = |part, reason: String| StartError::Setup { part, reason };
    let seed = config.keypair.seed();
    let secret = identity::ed25519::SecretKey::try_from_bytes(seed.to_vec())
        .map_err(|error| setup("the node's key", error.to_string()))?;
    let keypair = identity::Keypair::from(identity::ed25519::Keypair::from(secret));
    let gossip = if config.gossip { Some(gossip::behaviour(config)?) } else { None };

    let builder = SwarmBuilder::with_existing_identity(keypair)
        .with_tokio()
        .with_tcp(
            tcp::Config::new().nodelay(true),
            // TLS first: it is the faster of the two here; Noise stays for peers without it.
            (Tls::new, noise::Config::new),
            || Yamux::new(metrics.traffic.clone()),
        )
        .map_err(|error| setup("TCP", format!("{error:?}")))?
        .with_quic_config(|mut quic| {
            // A peer that vanished (a kill, a power cut) is noticed soon: those who wait for it go elsewhere. Not sooner: a
            // machine with two hundred deliveries on two slow cores answers late.
            quic.max_idle_timeout = 10_000;
            quic.keep_alive_interval = Duration::from_secs(3);
            quic.handshake_timeout = config.connection_timeout;
            // The library takes as much from a sender as the receiver would let through, and keeps it until it is there: with
            // its 10 MB for a stream, two hundred deliveries held more than a gigabyte.
            quic.max_stream_data = QUIC_STREAM_BYTES;
            quic.max_connection_data = 2 * QUIC_STREAM_BYTES;
            quic
        });
    // The builder's phases are types that cannot be named: the tail is the same for both kinds.
    macro_rules! finish {
        ($builder:expr) => {
            $builder
                // Not counted: its bytes pass through the connection to the relay, which is.
                .with_relay_client((Tls::new, noise::Config::new), || Yamux::new(Traffic::default()))
                .map_err(|error| setup("relayed connections", format!("{error:?}")))?
                .with_behaviour(|keypair, relay| behaviour(config, metrics, members, keypair, gossip, relay))
                .map_err(|error| setup("the behaviour", error.to_string()))?
                .with_swarm_config(|swarm| {
                    swarm
                        .with_idle_connection_timeout(config.idle_timeout)
                        // Saves a round trip on every stream.
                        .with_substream_upgrade_protocol_override(Version::V1Lazy)
                        .with_max_negotiating_inbound_streams(config.limits.negotiating_streams)
                })
                .with_connection_timeout(config.connection_timeout)
                .build()
        };
    }
    // Bare containers have no resolv.conf: such a node goes on with numeric addresses.
    match dns::tokio::Transport::system(DummyTransport::<()>::new()) {
        Ok(_) => Ok(finish!(builder.with_dns().map_err(|error| setup("DNS", error.to_string()))?)),
        Err(error) => {
            tracing::warn!(%error, "no DNS configuration found: /dns addresses will not be reachable");
            Ok(finish!(builder))
        }
    }
}

fn behaviour(
    config: &NodeConfig,
    metrics: &NodeMetrics,
    members: &Members,
    keypair: &identity::Keypair,
    gossip: Option<Gossip>,
    relay_client: relay::client::Behaviour,
) -> NodeBehaviour {
    let limits = &config.limits;
    let peer = keypair.public().to_peer_id();
    let identify = identify::Config::new(IDENTIFY.to_owned(), keypair.public())
        .with_agent_version(config.agent.clone())
        .with_push_listen_addr_updates(true)
        // A node that serves nobody has no reason to tell everybody the addresses of its local network.
        .with_hide_listen_addrs(config.listen.is_empty())
        .with_cache_size(1024);
    let reach = &config.reach;
    // Neither a router nor a local network has to do with a node that only this machine can reach.
    let alone = !config.listen.is_empty() && config.listen.iter().all(is_loopback);
    NodeBehaviour {
        door: Door::new(limits.pending_connections, limits.connections, metrics.clone()),
        limits: connection_limits::Behaviour::new(
            connection_limits::ConnectionLimits::default()
                .with_max_pending_incoming(Some(limits.pending_connections))
                .with_max_pending_outgoing(Some(limits.pending_connections))
                .with_max_established(Some(limits.connections))
                .with_max_established_per_peer(Some(limits.connections_per_peer.saturating_add(GIVING_WAY))),
        ),
        streams: streams::Behaviour::new(metrics.clone(), limits.connections_per_peer),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::new(ping::Config::new().with_timeout(PING_TIMEOUT)),
        gossip: Toggle::from(gossip),
        kad: Toggle::from((config.dht != DhtMode::Off).then(|| kad_behaviour(config, peer))),
        relay_client,
        relay: reach.relay.enabled.then(|| relay::Behaviour::new(peer, relay_config(&reach.relay, members))).into(),
        dcutr: reach.punch.then(|| Punching::new(peer)).into(),
        autonat: (reach.probe || reach.reserve).then(Probing::new).into(),
        dial_backs: reach.dial_back.then(DialBacks::new).into(),
        upnp: (reach.upnp && !alone).then(Forwarding::new).into(),
        mdns: (reach.lan && !alone).then(|| mdns_behaviour(peer)).flatten().into(),
    }
}

/// A machine without multicast goes on without.
fn mdns_behaviour(peer: libp2p::PeerId) -> Option<mdns::tokio::Behaviour> {
    match mdns::tokio::Behaviour::new(mdns::Config::default(), peer) {
        Ok(behaviour) => Some(behaviour),
        Err(error) => {
            tracing::warn!(%error, "peers of the local network will not be found");
            None
        }
    }
}

fn kad_behaviour(config: &NodeConfig, peer: libp2p::PeerId) -> Kad {
    let mut kad = kad::Config::new(KAD);
    // Only peers that a role vouches for go into the routing table, and only their records into the store.
    kad.set_kbucket_inserts(kad::BucketInserts::Manual)
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_provider_record_ttl(Some(PROVIDER_TTL))
        // The role announces again itself: it knows what is urgent, and notices when it does not keep up.
        .set_provider_publication_interval(None)
        .set_query_timeout(KAD_QUERY_TIMEOUT)
        .set_max_packet_size(dht::LONGEST)
        // Values are not used; these would only wake the node for nothing.
        .set_replication_interval(None)
        .set_publication_interval(None)
        .set_caching(kad::Caching::Disabled);
    // Whoever asks once does not wait for peers that are gone, ten seconds each, before those that are there.
    if config.dht == DhtMode::Client {
        kad.set_parallelism(CLIENT_PARALLELISM);
    }
    let store = MemoryStoreConfig {
        max_records: 0,
        max_value_bytes: 0,
        max_providers_per_key: config.limits.dht_providers_per_key,
        max_provided_keys: config.limits.dht_keys,
    };
    let mut behaviour = Kad::with_config(peer, MemoryStore::with_config(peer, store), kad);
    behaviour.set_mode(Some(match config.dht {
        DhtMode::Server => kad::Mode::Server,
        DhtMode::Client | DhtMode::Off => kad::Mode::Client,
    }));
    behaviour
}

/// The library shares a TCP port with other listeners of the same user, so that two nodes on one port would each get
/// half of the connections. Trying the port without sharing makes that the error it is.
pub(crate) fn refuse_used_port(address: &Multiaddr) -> std::io::Result<()> {
    let mut ip: Option<IpAddr> = None;
    for part in address {
        match part {
            Part::Ip4(v4) => ip = Some(v4.into()),
            Part::Ip6(v6) => ip = Some(v6.into()),
            Part::Tcp(port) if port != 0 => {
                if let Some(ip) = ip {
                    drop(TcpListener::bind(SocketAddr::new(ip, port))?);
                }
            }
            _ => {}
        }
    }
    Ok(())
}
