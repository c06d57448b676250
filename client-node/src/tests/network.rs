//! A manager and seeders on real sockets, just enough of them for a client: they answer truly, unless told otherwise.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use node::{AcceptLimits, CallLimits, Node, NodeConfig, NodeHandle, Protocol, Stream, Supervisor};
use node::{read_message, serve_calls, write_message};
use protocol::api::{
    MAILBOX_PROTOCOL, MESH_PROTOCOL, MailItem, MailboxRequest, MailboxResponse, MeshRequest, MeshResponse,
    TransactionState,
};
use protocol::deliver::{self, ClientMessage, Credential, Grant, SeederMessage};
use protocol::entitlement::Move;
use protocol::manifest::KeyPolicy;
use protocol::receipt::{Completion, DeliveryId};
use protocol::serving::{ServeAccount, ServeAction, ServeMachine, ServeTerms};
use protocol::ticket::{Admission, TicketEnvelope};
use protocol::trust::{RevocationEpoch, RevocationState, Trust};
use protocol::{Address, ChunkSet, PeerAddrs, PeerId, Refusal, RefusalCode, Signed, TransactionId};
use tokio::io::AsyncWriteExt;

use super::world::{Product, Sale, World, keypair};
use crate::home::now_ms;

const DELIVER: Protocol = Protocol::new(deliver::PROTOCOL);

/// A whole network for one product and one client.
pub(super) struct Net {
    pub(super) world: Arc<World>,
    pub(super) product: Arc<Product>,
    pub(super) manager: Arc<Manager>,
    pub(super) seeders: Vec<Arc<Seeder>>,
    pub(super) sale: Sale,
    supervisor: Supervisor,
}

pub(super) struct Manager {
    world: Arc<World>,
    product: Arc<Product>,
    /// Does not answer calls while this is set.
    pub(super) away: AtomicBool,
    /// What the mailbox gives out.
    pub(super) tickets: Mutex<Vec<TicketEnvelope>>,
    pub(super) completions: Mutex<Vec<Signed<Completion>>>,
    /// Which seeders were complained of, and for which chunk.
    pub(super) complaints: Mutex<Vec<(PeerId, u32)>>,
    /// Completions that are refused before the first is taken, to be repeated soon.
    pub(super) busy: AtomicU32,
    /// How far its clock is ahead, milliseconds; wraps around where it is behind.
    pub(super) ahead: AtomicU64,
    pub(super) peer: Mutex<Option<PeerId>>,
    /// What it revoked.
    pub(super) epochs: Mutex<Vec<Signed<RevocationEpoch>>>,
    /// What the mailbox says instead of giving a ticket.
    pub(super) refuses: Mutex<Option<Refusal>>,
    /// What moved, and the generation that began.
    pub(super) moves: Mutex<Vec<(TransactionId, u32)>>,
    /// Goes away with so many moves, before it answers the last one; 0 for never.
    pub(super) leaves_after: AtomicUsize,
}

impl Net {
    pub(super) async fn start(world: World, product: Product, vices: &[Vice]) -> Net {
        let supervisor = Supervisor::new();
        let (world, product) = (Arc::new(world), Arc::new(product));
        let manager = Arc::new(Manager {
            world: Arc::clone(&world),
            product: Arc::clone(&product),
            away: AtomicBool::new(false),
            tickets: Mutex::default(),
            completions: Mutex::default(),
            complaints: Mutex::default(),
            busy: AtomicU32::new(0),
            ahead: AtomicU64::new(0),
            peer: Mutex::default(),
            epochs: Mutex::default(),
            refuses: Mutex::default(),
            moves: Mutex::default(),
            leaves_after: AtomicUsize::new(0),
        });
        let manager_at = manager.start(&supervisor).await;
        let mut seeders = Vec::new();
        let mut sources = Vec::new();
        for (n, vice) in (1u8..).zip(vices) {
            let seeder = Arc::new(Seeder {
                n,
                world: Arc::clone(&world),
                product: Arc::clone(&product),
                vice: Mutex::new(vice.clone()),
                accounts: Mutex::default(),
                sent: AtomicU32::new(0),
                ahead: AtomicU64::new(0),
                continuation: AtomicU64::new(0),
            });
            sources.push(seeder.start(&supervisor).await);
            seeders.push(seeder);
        }
        let sale = Sale::new(sources, vec![manager_at]);
        Net { world, product, manager, seeders, sale, supervisor }
    }

    pub(super) fn ticket(&self, client: PeerId) -> TicketEnvelope {
        self.world.ticket(&self.product, client, &self.sale)
    }

    pub(super) fn sent(&self) -> u32 {
        self.seeders.iter().map(|seeder| seeder.sent.load(Ordering::SeqCst)).sum()
    }

    pub(super) async fn stop(self) {
        self.supervisor.shutdown(Duration::from_secs(10)).await.unwrap();
    }
}

async fn listen(n: u8, supervisor: &Supervisor) -> NodeHandle {
    let config = NodeConfig {
        listen: vec![Address::new("/ip4/127.0.0.1/tcp/0").unwrap()],
        gossip: false,
        ..NodeConfig::new(keypair(n))
    };
    Node::start(config, supervisor).await.unwrap()
}

impl Manager {
    async fn start(self: &Arc<Self>, supervisor: &Supervisor) -> PeerAddrs {
        let node = listen(90, supervisor).await;
        *self.peer.lock().unwrap() = Some(node.peer_id());
        let mesh = Arc::clone(self);
        let limits = CallLimits::default();
        serve_calls(supervisor, &node, Protocol::new(MESH_PROTOCOL), limits, move |_, request: MeshRequest| {
            let mesh = Arc::clone(&mesh);
            async move {
                mesh.be_there().await;
                mesh.mesh(request)
            }
        })
        .await
        .unwrap();
        let mailbox = Arc::clone(self);
        serve_calls(
            supervisor,
            &node,
            Protocol::new(MAILBOX_PROTOCOL),
            limits,
            move |peer, request: MailboxRequest| {
                let mailbox = Arc::clone(&mailbox);
                async move {
                    mailbox.be_there().await;
                    let answer = mailbox.mailbox(peer, request);
                    mailbox.be_there().await;
                    answer
                }
            },
        )
        .await
        .unwrap();
        node.peer_addrs().await.unwrap()
    }

    async fn be_there(&self) {
        if self.away.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }

    fn mesh(&self, request: MeshRequest) -> MeshResponse {
        match request {
            MeshRequest::KeySet => MeshResponse::KeySet(self.world.key_set(1, &[self.peer.lock().unwrap().unwrap()])),
            MeshRequest::Epochs { after } => {
                let epochs = self.epochs.lock().unwrap();
                let new = epochs.iter().filter(|epoch| epoch.peek().unwrap().number > after);
                MeshResponse::Epochs(new.take(MeshResponse::EPOCHS_PAGE).cloned().collect())
            }
            MeshRequest::Heartbeat => MeshResponse::Heartbeat(self.world.heartbeat(self.ahead.load(Ordering::SeqCst))),
            _ => MeshResponse::Refused(Refusal::new(RefusalCode::NotEnrolled, "not for clients")),
        }
    }

    fn mailbox(&self, peer: PeerId, request: MailboxRequest) -> MailboxResponse {
        let mut tickets = self.tickets.lock().unwrap();
        let mine = |envelope: &&TicketEnvelope| envelope.ticket.lease.peek().unwrap().client == peer;
        let id = |envelope: &TicketEnvelope| envelope.ticket.data.peek().unwrap().transaction;
        let not_entitled = || MailboxResponse::Refused(Refusal::new(RefusalCode::NotEntitled, "no such ticket"));
        match request {
            MailboxRequest::List { before } => {
                let mut items: Vec<MailItem> = tickets
                    .iter()
                    .filter(mine)
                    .map(|envelope| MailItem {
                        transaction: id(envelope),
                        title: envelope.title.clone(),
                        state: TransactionState::Released,
                        released_at: 1,
                        plain_bytes: 3,
                        generation: envelope.ticket.lease.peek().unwrap().generation,
                    })
                    .filter(|item| before.is_none_or(|before| item.transaction < before))
                    .collect();
                items.sort_by_key(|item| std::cmp::Reverse(item.transaction));
                items.truncate(MailboxResponse::PAGE);
                MailboxResponse::List(items)
            }
            MailboxRequest::Ticket { transaction, .. } => {
                if let Some(refusal) = &*self.refuses.lock().unwrap() {
                    return MailboxResponse::Refused(refusal.clone());
                }
                let found = tickets.iter().filter(mine).find(|envelope| id(envelope) == transaction);
                found.map_or_else(not_entitled, |envelope| MailboxResponse::Ticket(Box::new(envelope.clone())))
            }
            MailboxRequest::Complete { completion } => {
                let Ok(said) = completion.verify(&peer) else { return not_entitled() };
                if let Some(refusal) = &*self.refuses.lock().unwrap() {
                    return MailboxResponse::Refused(refusal.clone());
                }
                if self.busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
                    return MailboxResponse::Refused(Refusal::new(RefusalCode::Overloaded, "busy").retry_after(10));
                }
                let Some(envelope) = tickets.iter().find(|e| id(e) == said.delivery.transaction) else {
                    return not_entitled();
                };
                let grant = (self.product.manifest.policy == KeyPolicy::OnCompletion)
                    .then(|| self.world.grant(&self.product, envelope));
                drop(self.completions.lock().map(|mut all| all.push(completion)));
                MailboxResponse::Completed { grant }
            }
            MailboxRequest::Complain { seeder, chunk, .. } => {
                self.complaints.lock().unwrap().push((seeder, chunk));
                MailboxResponse::Noted
            }
            MailboxRequest::Move { word } => {
                let said = Move::check(&word, &peer, &self.world.network).unwrap();
                let (step, mut moves) = ((said.transaction, said.generation), self.moves.lock().unwrap());
                let here = tickets.iter().position(|envelope| id(envelope) == said.transaction && mine(&envelope));
                match here {
                    _ if moves.contains(&step) => {}
                    Some(here) => {
                        tickets.remove(here);
                        moves.push(step);
                        let left = moves.len() == self.leaves_after.load(Ordering::SeqCst);
                        self.away.fetch_or(left, Ordering::SeqCst);
                    }
                    None => return not_entitled(),
                }
                MailboxResponse::Moved { generation: said.generation }
            }
        }
    }
}

/// What is wrong with a seeder.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Vice {
    None,
    Corrupts,
    /// Sends so many chunks in all and is then overloaded.
    Stops(u32),
    /// Sends everything, and never hears the last word.
    Mute,
    /// Knows that the first generation of leases is void.
    Voids,
    /// Does not hold it any more.
    Lacks,
}

pub(super) struct Seeder {
    n: u8,
    world: Arc<World>,
    product: Arc<Product>,
    pub(super) vice: Mutex<Vice>,
    pub(super) accounts: Mutex<BTreeMap<DeliveryId, ServeAccount>>,
    pub(super) sent: AtomicU32,
    /// How far its clock is ahead, milliseconds.
    pub(super) ahead: AtomicU64,
    /// For how long it goes on with a lease that is over, milliseconds.
    pub(super) continuation: AtomicU64,
}

impl Seeder {
    pub(super) fn peer(&self) -> PeerId {
        keypair(self.n).peer_id()
    }

    async fn start(self: &Arc<Self>, supervisor: &Supervisor) -> PeerAddrs {
        let node = listen(self.n, supervisor).await;
        let mut streams = node.accept(DELIVER, AcceptLimits { queue: 16, per_peer: 4 }).await.unwrap();
        let (seeder, tasks) = (Arc::clone(self), supervisor.clone());
        supervisor.spawn("seeder", async move {
            while let Some(stream) = streams.next().await {
                let (seeder, token) = (Arc::clone(&seeder), tasks.token());
                tasks.spawn("delivery", async move {
                    tokio::select! {
                        () = seeder.serve(stream) => {}
                        () = token.cancelled() => {}
                    }
                });
            }
        });
        node.peer_addrs().await.unwrap()
    }

    async fn serve(&self, mut stream: Stream) {
        let certificate = self.world.certificate(self.peer());
        let now = now_ms() + self.ahead.load(Ordering::SeqCst);
        let greeting = SeederMessage::Greeting { certificate, now, load: (0, 10) };
        if write_message(&mut stream, &greeting).await.is_err() {
            return;
        }
        let Ok(Some(hello)) = read_message::<ClientMessage, _>(&mut stream).await else { return };
        let ClientMessage::Hello { credential: Credential::Ticket(ticket), last_ack } = hello else { return };
        let trust = Trust::new(self.world.root.peer_id(), self.world.key_set(1, &[]), 0).unwrap();
        let revoked = RevocationState::default();
        let admission = Admission {
            peer: stream.peer(),
            seeder: self.peer(),
            trust: &trust,
            revoked: &revoked,
            informed: None,
            continuation_ms: self.continuation.load(Ordering::SeqCst),
            now,
        };
        let vice = self.vice.lock().unwrap().clone();
        let void = vice == Vice::Voids;
        let served = match ticket.check(&admission) {
            Ok(_) if vice == Vice::Lacks => Err(Refusal::new(RefusalCode::ContentNotHeld, "not held")),
            Ok(admitted) if void && admitted.lease.generation == 0 => {
                Err(Refusal::new(RefusalCode::Revoked, "it moved on"))
            }
            Ok(admitted) => {
                let delivery = DeliveryId { transaction: admitted.data.transaction, delivery: admitted.lease.delivery };
                let grant = Grant {
                    delivery,
                    generation: admitted.lease.generation,
                    manifest: admitted.data.manifest,
                    client: admitted.lease.client,
                    allowance: admitted.lease.allowance,
                    listed: admitted.listed,
                    rate: admitted.lease.rate,
                    until: admitted.lease.end,
                };
                self.drive(grant, last_ack, &mut stream).await
            }
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = served {
            let _ = write_message(&mut stream, &SeederMessage::Refusal(refusal)).await;
        }
        let _ = stream.shutdown().await;
    }

    async fn drive(
        &self,
        grant: Grant,
        last_ack: Option<Signed<protocol::receipt::Ack>>,
        stream: &mut Stream,
    ) -> Result<(), Refusal> {
        let manifest = &self.product.manifest;
        let delivery = grant.delivery;
        let terms = ServeTerms {
            network: self.world.network,
            seeder: self.peer(),
            grant,
            chunks: manifest.chunks(),
            chunk_size: manifest.chunk_size,
            segments: manifest.segment_count(),
            idle_ms: 60_000,
            window_wait_ms: 60_000,
        };
        let account = self.accounts.lock().unwrap().get(&delivery).cloned().unwrap_or_default();
        let held = ChunkSet::from_range(0..manifest.chunks());
        let mut machine = ServeMachine::new(terms, held, account, last_ack, now_ms())?;
        loop {
            let vice = self.vice.lock().unwrap().clone();
            let said = match machine.next_action(now_ms()) {
                Some(ServeAction::SendManifest) => {
                    write_message(stream, &SeederMessage::Manifest(self.product.signed.clone())).await
                }
                Some(ServeAction::SendSegment(index)) => {
                    let segment = self.product.segments[index as usize].clone();
                    write_message(stream, &SeederMessage::Segment { index, segment }).await
                }
                Some(ServeAction::SendChunk(index)) => {
                    if matches!(vice, Vice::Stops(most) if self.sent.load(Ordering::SeqCst) >= most) {
                        return Err(Refusal::new(RefusalCode::Overloaded, "enough for today").retry_after(60_000));
                    }
                    self.sent.fetch_add(1, Ordering::SeqCst);
                    let mut bytes = self.product.chunk(index).to_vec();
                    bytes[0] ^= u8::from(vice == Vice::Corrupts);
                    let length = bytes.len() as u32;
                    match write_message(stream, &SeederMessage::Chunk { index, length }).await {
                        Ok(()) => stream.write_all(&bytes).await.map_err(Into::into),
                        Err(error) => Err(error),
                    }
                }
                Some(ServeAction::Say(message)) => write_message(stream, &message).await,
                Some(ServeAction::Persist(account)) => {
                    self.accounts.lock().unwrap().insert(delivery, account);
                    machine.persisted();
                    Ok(())
                }
                Some(ServeAction::Refuse(refusal)) => return Err(refusal),
                Some(ServeAction::End) => return Ok(()),
                None => {
                    let _ = stream.flush().await;
                    match read_message::<ClientMessage, _>(stream).await {
                        Ok(Some(ClientMessage::Finish { .. })) if vice == Vice::Mute => std::future::pending().await,
                        Ok(Some(message)) => {
                            machine.message(message, now_ms())?;
                            Ok(())
                        }
                        _ => return Ok(()),
                    }
                }
            };
            if said.is_err() {
                return Ok(());
            }
        }
    }
}
