//! Who provides a content, when nobody in the ticket's list answers. The table is a hint that strangers could fill
//! with lies, so only peers that a role vouches for take part in it, and every list in it has an end.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use libp2p::core::Endpoint;
use libp2p::kad::store::RecordStore;
use libp2p::kad::{self, GetProvidersOk, InboundRequest, QueryId, QueryResult, RecordKey};
use libp2p::swarm::{ConnectionId, NetworkBehaviour};
use libp2p::{Multiaddr, PeerId as NetPeerId};
use protocol::PeerAddrs;
use tokio::sync::{mpsc, oneshot, watch};

use crate::address::{address_from_libp2p, address_to_libp2p, peer_from_libp2p, peer_to_libp2p};
use crate::announced::Announced;
use crate::config::Limits;
use crate::handle::NodeHandle;
use crate::host::Command;
use crate::reach::Members;
use crate::swarm::Kad;

/// Why the DHT did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DhtError {
    /// This node takes no part in the DHT.
    #[error("the DHT is switched off in this node")]
    Off,
    /// The node knows no other peer in the DHT, or none of them answers.
    #[error("no other peer in the DHT is known or answers")]
    NoPeers,
    /// The node's own table is full.
    #[error("the DHT table of this node is full")]
    Full,
    /// Too many questions are under way; try again later.
    #[error("{limit} DHT questions are under way; try again later")]
    Busy {
        /// The bound, [`Limits::dht_queries`].
        limit: usize,
    },
    /// Nobody answered in time.
    #[error("nobody in the DHT answered in time")]
    Timeout,
    /// This node is stopping.
    #[error("this node is stopping")]
    Stopped,
}

/// Between two answers of peers that are there.
const MOMENT: Duration = Duration::from_millis(200);

/// Answers that are waited for, a moment at most, where the first ones name as many as are wanted: a single peer that names
/// many that do not exist must not be the only one that is heard.
const ANSWERS: usize = 4;

/// Records of others that give way to one of this node's own at most: a key is free when the last of its providers went.
const MOST_FOR_OWN: usize = 1024;

/// Most addresses that the table and a record keep of one peer …
const ADDRESSES: usize = 8;

/// … and most bytes of them, as they are sent. An answer names 20 peers of the table and 20 providers at most, and all of it
/// is lost on whoever asked when it is longer than [`LONGEST`].
const ADDRESS_BYTES: usize = 640;

/// Longest message of the DHT, bytes: 40 peers of [`ADDRESS_BYTES`], their names and what is around them, and this node's own
/// addresses where it has the content itself.
pub(crate) const LONGEST: usize = 32 * 1024;

type Done = oneshot::Sender<Result<(), DhtError>>;

/// A provider, and the number of the answer that named it first.
type Found = (usize, PeerAddrs);

#[derive(Debug)]
pub(crate) enum DhtCommand {
    Provide { key: [u8; 32], reply: Done },
    StopProviding { key: [u8; 32] },
    Find { key: [u8; 32], most: usize, found: mpsc::Sender<Found>, reply: oneshot::Sender<Result<(), DhtError>> },
    Add { peer: PeerAddrs, reply: Done },
    Recall { peer: PeerAddrs, reply: Done },
    Remove { peer: protocol::PeerId },
    Bootstrap { reply: Done },
}

impl NodeHandle {
    /// Announces this node as a provider of `key`, under the addresses of the moment. Returns when the announcement is
    /// out. Others forget it after two hours, so it has to be repeated before.
    ///
    /// # Errors
    /// [`DhtError`]; this node itself answers with it also after [`DhtError::NoPeers`] and [`DhtError::Timeout`].
    pub async fn provide(&self, key: [u8; 32]) -> Result<(), DhtError> {
        self.ask_dht(|reply| DhtCommand::Provide { key, reply }).await
    }

    /// Stops announcing `key`; what others remember expires within two hours.
    pub async fn stop_providing(&self, key: [u8; 32]) {
        // A node that has stopped announces nothing.
        let _ = self.commands().send(Command::Dht(DhtCommand::StopProviding { key })).await;
    }

    /// Peers that announced themselves as providers of `key`, this node excluded: as many as were found within
    /// `timeout`, at most `limit`. Some may have no address; some may be gone.
    ///
    /// # Errors
    /// [`DhtError`] when the question could not be asked. Finding nobody is no error.
    pub async fn find_providers(
        &self,
        key: [u8; 32],
        limit: usize,
        timeout: Duration,
    ) -> Result<Vec<PeerAddrs>, DhtError> {
        self.find(key, limit, timeout, timeout).await
    }

    /// The same for whoever can begin with the first ones: ends, too, when none came for a moment after another. A question
    /// to peers that are gone takes as long as it takes to give up connecting to them.
    ///
    /// # Errors
    /// As of [`NodeHandle::find_providers`].
    pub async fn find_first_providers(
        &self,
        key: [u8; 32],
        limit: usize,
        timeout: Duration,
    ) -> Result<Vec<PeerAddrs>, DhtError> {
        self.find(key, limit, timeout, MOMENT).await
    }

    async fn find(
        &self,
        key: [u8; 32],
        limit: usize,
        timeout: Duration,
        between: Duration,
    ) -> Result<Vec<PeerAddrs>, DhtError> {
        let most = limit.max(1);
        let (found, mut results) = mpsc::channel(most.saturating_mul(ANSWERS));
        self.ask_dht(|reply| DhtCommand::Find { key, most, found, reply }).await?;
        let mut answers: BTreeMap<usize, Vec<PeerAddrs>> = BTreeMap::new();
        let collect = async {
            let mut count = 0;
            while count < limit || answers.len() < ANSWERS {
                let wait = match count {
                    0 => timeout,
                    _ if count < limit => between,
                    _ => between.min(MOMENT),
                };
                let Ok(Some((answer, provider))) = tokio::time::timeout(wait, results.recv()).await else { return };
                answers.entry(answer).or_default().push(provider);
                count += 1;
            }
        };
        // Time running out is an ordinary end: what was found until then counts.
        let _ = tokio::time::timeout(timeout, collect).await;
        Ok(in_turn(answers.into_values().collect(), limit))
    }

    /// Lets a peer take part in the DHT: asks it, answers with it, keeps its records. Roles call this for peers whose
    /// enrolment they have checked.
    ///
    /// # Errors
    /// [`DhtError::Full`] at the bound on peers.
    pub async fn add_dht_peer(&self, peer: PeerAddrs) -> Result<(), DhtError> {
        self.ask_dht(|reply| DhtCommand::Add { peer, reply }).await
    }

    /// The same for a peer that was met in the past: what the table knows of it stays, and where it was then comes beside that.
    ///
    /// # Errors
    /// As of [`NodeHandle::add_dht_peer`].
    pub async fn recall_dht_peer(&self, peer: PeerAddrs) -> Result<(), DhtError> {
        self.ask_dht(|reply| DhtCommand::Recall { peer, reply }).await
    }

    /// Vouches for a peer of whom no address is known, or where this node takes no part in the DHT: it may hold a slot
    /// here, where this node is a relay. Past the bound on peers, nothing happens.
    pub async fn add_member(&self, peer: protocol::PeerId) {
        // Without a DHT, membership is all there is to it; a node that has stopped keeps no table.
        let _ = self.ask_dht(|reply| DhtCommand::Add { peer: peer.into(), reply }).await;
    }

    /// Takes a peer out of the DHT.
    pub async fn remove_dht_peer(&self, peer: protocol::PeerId) {
        // A node that has stopped keeps no table.
        let _ = self.commands().send(Command::Dht(DhtCommand::Remove { peer })).await;
    }

    /// Looks this node up in the DHT, which fills its routing table with the peers near it that it vouches for.
    ///
    /// # Errors
    /// [`DhtError::NoPeers`] when there is nobody to ask.
    pub async fn bootstrap(&self) -> Result<(), DhtError> {
        self.ask_dht(|reply| DhtCommand::Bootstrap { reply }).await
    }

    /// Connected peers that take part in the DHT and are not in this node's table: nobody vouched for them yet, or no
    /// address of theirs is known. A role that has looked at one calls [`NodeHandle::add_dht_peer`]. Closes when the node
    /// stops.
    pub fn dht_newcomers(&self) -> watch::Receiver<BTreeSet<protocol::PeerId>> {
        self.newcomers().clone()
    }

    async fn ask_dht(&self, command: impl FnOnce(Done) -> DhtCommand) -> Result<(), DhtError> {
        self.ask(|reply| Command::Dht(command(reply))).await.map_err(|_| DhtError::Stopped)?
    }
}

/// The DHT part of the network task.
pub(crate) struct DhtState {
    // Peers that a role vouches for.
    members: Members,
    announced: Announced,
    newcomers: watch::Sender<BTreeSet<protocol::PeerId>>,
    /// In the order in which they came.
    came: VecDeque<protocol::PeerId>,
    finds: HashMap<QueryId, Find>,
    waits: HashMap<QueryId, Done>,
    max_newcomers: usize,
    max_members: usize,
    max_queries: usize,
}

struct Find {
    found: mpsc::Sender<Found>,
    seen: HashSet<NetPeerId>,
    /// Of one answer.
    most: usize,
    answers: usize,
}

impl DhtState {
    pub(crate) fn new(limits: &Limits, members: Members) -> Self {
        Self {
            members,
            announced: Announced::default(),
            newcomers: watch::Sender::default(),
            came: VecDeque::new(),
            finds: HashMap::new(),
            waits: HashMap::new(),
            max_newcomers: limits.dht_newcomers,
            max_members: limits.dht_peers,
            max_queries: limits.dht_queries,
        }
    }

    pub(crate) fn newcomers(&self) -> watch::Receiver<BTreeSet<protocol::PeerId>> {
        self.newcomers.subscribe()
    }

    /// The last connection with a peer is closed: when it comes back, it is met anew.
    pub(crate) fn on_gone(&mut self, peer: &NetPeerId) {
        if let Some(peer) = peer_from_libp2p(peer) {
            self.newcomers.send_if_modified(|newcomers| newcomers.remove(&peer));
            self.came.retain(|known| *known != peer);
        }
    }

    fn met(&mut self, peer: &NetPeerId) {
        let Some(peer) = peer_from_libp2p(peer) else { return };
        let (most, came) = (self.max_newcomers, &mut self.came);
        self.newcomers.send_if_modified(|newcomers| {
            if most == 0 || !newcomers.insert(peer) {
                return false;
            }
            came.push_back(peer);
            // Whoever has been here for longest was looked at most often.
            while newcomers.len() > most
                && let Some(first) = came.pop_front()
            {
                newcomers.remove(&first);
            }
            true
        });
    }

    pub(crate) fn on_command(&mut self, kad: Option<&mut Kad>, command: DhtCommand) {
        let Some(kad) = kad else {
            match command {
                DhtCommand::Add { peer, reply } | DhtCommand::Recall { peer, reply } => {
                    let _ = reply.send(self.vouch(&peer.peer).and(Err(DhtError::Off)));
                }
                DhtCommand::Provide { reply, .. }
                | DhtCommand::Find { reply, .. }
                | DhtCommand::Bootstrap { reply } => drop(reply.send(Err(DhtError::Off))),
                DhtCommand::Remove { peer } => {
                    if let Some(peer) = peer_to_libp2p(&peer) {
                        self.members.remove(&peer);
                    }
                }
                DhtCommand::StopProviding { .. } => {}
            }
            return;
        };
        match command {
            DhtCommand::Provide { key, reply } => {
                let alone = kad.kbuckets().all(|bucket| bucket.is_empty());
                let query = self.room().and_then(|()| self.start_providing(kad, &key));
                // Nobody hears it, which ends the query as if all had gone well.
                self.wait_for(if alone { query.and(Err(DhtError::NoPeers)) } else { query }, reply);
            }
            DhtCommand::Bootstrap { reply } => {
                let query = self.room().and_then(|()| kad.bootstrap().map_err(|_| DhtError::NoPeers));
                self.wait_for(query, reply);
            }
            DhtCommand::StopProviding { key } => kad.stop_providing(&record_key(&key)),
            DhtCommand::Find { key, most, found, reply } => {
                let room = self.room();
                if room.is_ok() {
                    let query = kad.get_providers(record_key(&key));
                    self.finds.insert(query, Find { found, seen: HashSet::new(), most, answers: 0 });
                }
                let _ = reply.send(room);
            }
            DhtCommand::Add { peer, reply } => drop(reply.send(self.add(kad, &peer))),
            DhtCommand::Recall { peer, reply } => drop(reply.send(self.recall(kad, peer))),
            DhtCommand::Remove { peer } => {
                if let Some(peer) = peer_to_libp2p(&peer) {
                    self.members.remove(&peer);
                    self.announced.drop_of(kad.store_mut(), &peer);
                    kad.remove_peer(&peer);
                }
            }
        }
    }

    pub(crate) fn add(&mut self, kad: &mut Kad, peer: &PeerAddrs) -> Result<(), DhtError> {
        let Some(id) = self.vouch(&peer.peer)? else { return Ok(()) };
        let told = peer.addrs.iter().filter_map(|address| address_to_libp2p(address, &id)?.with_p2p(id).ok());
        let told = within_bounds(told);
        if told.is_empty() {
            return Ok(());
        }
        // The newest word replaces what was known: who moves each night would come to have hundreds.
        let known = table_addresses(kad, &id);
        if known.is_empty() {
            // Whoever waits for a place in the table is not shown.
            kad.remove_peer(&id);
        }
        for address in &told {
            kad.add_address(&id, address.clone());
        }
        for old in known.iter().filter(|old| !told.contains(old)) {
            kad.remove_address(&id, old);
        }
        self.on_gone(&id);
        Ok(())
    }

    /// What is remembered is older than what is known, and comes after it: the peer may have moved. It is told where something is
    /// known, too: of several addresses that fail the library keeps one, whichever.
    fn recall(&mut self, kad: &mut Kad, peer: PeerAddrs) -> Result<(), DhtError> {
        let known = peer_to_libp2p(&peer.peer).map(|id| table_addresses(kad, &id)).unwrap_or_default();
        let known = known.iter().filter_map(address_from_libp2p);
        self.add(kad, &PeerAddrs::new(peer.peer, known.chain(peer.addrs).collect()))
    }

    fn vouch(&mut self, peer: &protocol::PeerId) -> Result<Option<NetPeerId>, DhtError> {
        // Bytes that are no key cannot have connected to us either.
        let Some(id) = peer_to_libp2p(peer) else { return Ok(None) };
        if self.members.len() >= self.max_members && !self.members.contains(&id) {
            return Err(DhtError::Full);
        }
        self.members.insert(id);
        Ok(Some(id))
    }

    pub(crate) fn on_event(&mut self, kad: &mut Kad, event: kad::Event) {
        match event {
            kad::Event::InboundRequest { request: InboundRequest::AddProvider { record: Some(mut record) } }
                if self.members.contains(&record.provider) && record.key.as_ref().len() == 32 =>
            {
                record.addresses = within_bounds(record.addresses);
                self.announced.add(kad.store_mut(), record, Instant::now());
            }
            kad::Event::OutboundQueryProgressed { id, result, stats, step } => {
                let outcome = match result {
                    QueryResult::GetProviders(Ok(GetProvidersOk::FoundProviders { key, providers })) => {
                        self.on_found(kad, id, &key, providers);
                        Ok(())
                    }
                    // The library calls it done when there was nobody to tell.
                    QueryResult::StartProviding(Ok(_)) if stats.num_successes() == 0 => Err(DhtError::NoPeers),
                    QueryResult::StartProviding(Err(_)) | QueryResult::Bootstrap(Err(_)) => Err(DhtError::Timeout),
                    _ => Ok(()),
                };
                if step.last {
                    self.finds.remove(&id);
                    if let Some(reply) = self.waits.remove(&id) {
                        let _ = reply.send(outcome);
                    }
                }
            }
            kad::Event::RoutablePeer { peer, address } | kad::Event::PendingRoutablePeer { peer, address }
                if self.members.contains(&peer) =>
            {
                kad.add_address(&peer, address);
            }
            // The library adds whatever a peer was reached under.
            kad::Event::RoutingUpdated { peer, .. } => {
                let known = table_addresses(kad, &peer);
                // What came last is true longest.
                let kept = within_bounds(known.iter().rev().cloned());
                for old in known.iter().filter(|old| !kept.contains(old)) {
                    kad.remove_address(&peer, old);
                }
            }
            kad::Event::RoutablePeer { peer, .. }
            | kad::Event::PendingRoutablePeer { peer, .. }
            | kad::Event::UnroutablePeer { peer } => self.met(&peer),
            _ => {}
        }
    }

    fn on_found(&mut self, kad: &mut Kad, id: QueryId, key: &RecordKey, providers: HashSet<NetPeerId>) {
        let Some(find) = self.finds.get_mut(&id) else { return };
        let mut done = find.found.is_closed();
        let (answer, mut left) = (find.answers, find.most);
        find.answers += 1;
        for peer in providers {
            let Some(ours) = peer_from_libp2p(&peer) else { continue };
            if left == 0 || find.seen.len() >= find.found.max_capacity() || !find.seen.insert(peer) {
                continue;
            }
            left -= 1;
            let provider = PeerAddrs::new(ours, addresses_of(kad, key, &peer));
            done |= find.found.try_send((answer, provider)).is_err();
        }
        if (done || find.seen.len() >= find.found.max_capacity())
            && let Some(mut query) = kad.query_mut(&id)
        {
            query.finish();
        }
    }

    /// What others announced gives way to what this node has.
    fn start_providing(&mut self, kad: &mut Kad, key: &[u8; 32]) -> Result<QueryId, DhtError> {
        self.announced.drop_ended(kad.store_mut(), Instant::now());
        for _ in 0..MOST_FOR_OWN {
            match kad.start_providing(record_key(key)) {
                Ok(query) => return Ok(query),
                Err(_) if self.announced.evict(kad.store_mut()) => {}
                Err(_) => break,
            }
        }
        Err(DhtError::Full)
    }

    fn room(&self) -> Result<(), DhtError> {
        if self.finds.len() + self.waits.len() >= self.max_queries {
            return Err(DhtError::Busy { limit: self.max_queries });
        }
        Ok(())
    }

    fn wait_for(&mut self, query: Result<QueryId, DhtError>, reply: Done) {
        match query {
            Ok(query) => drop(self.waits.insert(query, reply)),
            Err(error) => drop(reply.send(Err(error))),
        }
    }
}

/// Of what each answer named, one after the other, until there are as many as are wanted.
fn in_turn(answers: Vec<Vec<PeerAddrs>>, limit: usize) -> Vec<PeerAddrs> {
    let mut answers: Vec<_> = answers.into_iter().map(Vec::into_iter).collect();
    let mut providers = Vec::new();
    while providers.len() < limit {
        let before = providers.len();
        providers.extend(answers.iter_mut().filter_map(Iterator::next).take(limit - before));
        if providers.len() == before {
            break;
        }
    }
    providers
}

/// As many of these as one peer may have.
fn within_bounds(addresses: impl IntoIterator<Item = Multiaddr>) -> Vec<Multiaddr> {
    let mut left = ADDRESS_BYTES;
    let fitting = addresses.into_iter().filter(|address| {
        let rest = left.checked_sub(address.len());
        left = rest.unwrap_or(left);
        rest.is_some()
    });
    fitting.take(ADDRESSES).collect()
}

/// What the table has of a peer, in the order in which it came.
fn table_addresses(kad: &mut Kad, peer: &NetPeerId) -> Vec<Multiaddr> {
    let Some(bucket) = kad.kbucket(*peer) else { return Vec::new() };
    let entry = bucket.iter().find(|entry| entry.node.key.preimage() == peer);
    entry.map(|entry| entry.node.value.iter().cloned().collect()).unwrap_or_default()
}

/// What this node's store and the query under way know about a provider's addresses. The library keeps the latter to
/// itself, but gives it to anyone who is about to dial the peer, which is what the caller is about to do.
fn addresses_of(kad: &mut Kad, key: &RecordKey, peer: &NetPeerId) -> Vec<protocol::Address> {
    let stored = kad.store_mut().providers(key).into_iter().filter(|record| record.provider == *peer);
    let mut addresses: Vec<Multiaddr> = stored.flat_map(|record| record.addresses).collect();
    let dial = ConnectionId::new_unchecked(usize::MAX);
    if let Ok(known) = kad.handle_pending_outbound_connection(dial, Some(*peer), &[], Endpoint::Dialer) {
        addresses.extend(known);
    }
    // In this order: what the provider said itself comes before what others heard of it.
    let mut seen = HashSet::new();
    let ours = addresses.iter().filter_map(address_from_libp2p);
    ours.filter(|address| seen.insert(address.clone())).collect()
}

fn record_key(key: &[u8; 32]) -> RecordKey {
    RecordKey::new(key)
}

#[cfg(test)]
mod tests;
