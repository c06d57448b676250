//! The manager's part of the mesh service, played by a test: it signs what it is told to and remembers what it heard.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use node::{CallLimits, Node, NodeConfig, NodeHandle, Protocol, Supervisor, serve_calls};
use protocol::api::{
    Kept, KeptBecause, MESH_PROTOCOL, MeshRequest, MeshResponse, SEEDER_PROTOCOL, SeederReport, SeederRequest,
    SeederResponse,
};
use protocol::certificate::SeederCert;
use protocol::manifest::Manifest;
use protocol::receipt::{Mark, Receipt, SealedBatch};
use protocol::replication::Placement;
use protocol::trust::{AuditHead, Heartbeat, KeyEntry, KeyPurpose, KeySet, KeyState, RevocationEpoch, Revocations};
use protocol::{Address, Digest, Keypair, NetworkId, Nonce, PeerAddrs, PeerId, Refusal, RefusalCode, Signed};
use tokio::sync::watch;

use crate::world::{DAY, LIMIT, now};

/// What the manager remembers.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) reports: HashMap<PeerId, SeederReport>,
    /// How many reports came from each.
    pub(crate) counts: HashMap<PeerId, u32>,
    /// Who said that it stops, after how many reports.
    pub(crate) stopped: HashMap<PeerId, u32>,
    /// Receipts in the order in which they came, repeated ones included.
    pub(crate) receipts: Vec<Receipt>,
    /// What seeders wanted to let go of, and whether copies were to be made elsewhere first.
    pub(crate) releases: Vec<(Vec<Digest>, bool)>,
    /// Such questions that came, answered or not.
    pub(crate) asked_to_release: u32,
    /// Questions for a heartbeat.
    pub(crate) asked_for_heartbeats: u32,
    /// How far each outbox is taken: of each seeder's newest one.
    outboxes: HashMap<PeerId, (Nonce, u64, Digest)>,
    /// Batches sealed to a key that the manager lost.
    pub(crate) not_opened: u32,
    /// The newest mark.
    marked: Option<Signed<Mark>>,
}

/// What the manager says.
#[derive(Default)]
pub(crate) struct Says {
    pub(crate) manifests: HashMap<Digest, Signed<Manifest>>,
    pub(crate) placements: HashMap<PeerId, Vec<Placement>>,
    pub(crate) epochs: Vec<Signed<RevocationEpoch>>,
    pub(crate) restore: u64,
    pub(crate) audit: Option<AuditHead>,
    /// How far its clock is ahead of the seeders'.
    pub(crate) clock_ahead_ms: u64,
    last_beat: u64,
    /// Gives out no epochs, although its heartbeats name them.
    pub(crate) keeps_epochs: bool,
    /// Contents that seeders may let go of.
    pub(crate) lets_go: HashSet<Digest>,
    /// Answers everything with a refusal.
    pub(crate) refuses: bool,
    /// Keys that took the place of the first one that receipts are sealed to: each makes a key set.
    sealing: Vec<Keypair>,
    /// Those of them whose private half is lost.
    lost: HashSet<PeerId>,
    /// Is the answer to the next batch.
    pub(crate) late_mark: Option<Signed<Mark>>,
}

/// The network's keys and the manager's memory; outlives the manager's process, so to speak.
pub(crate) struct Office {
    pub(crate) root: Keypair,
    pub(crate) network: NetworkId,
    keys: HashMap<KeyPurpose, Keypair>,
    node_key: Keypair,
    pub(crate) heard: Mutex<Heard>,
    pub(crate) says: Mutex<Says>,
    /// Who holds it keeps seeders waiting that want to let go of something.
    pub(crate) thinking: tokio::sync::RwLock<()>,
    news: watch::Sender<u64>,
}

impl Office {
    pub(crate) fn new() -> Arc<Self> {
        let root = Keypair::from_seed(&[200; 32]);
        let keys = (201u8..).zip(KeyPurpose::ALL).map(|(seed, p)| (p, Keypair::from_seed(&[seed; 32]))).collect();
        Arc::new(Office {
            network: NetworkId::of_root(&root.peer_id()),
            root,
            keys,
            node_key: Keypair::from_seed(&[220; 32]),
            heard: Mutex::default(),
            says: Mutex::default(),
            thinking: tokio::sync::RwLock::default(),
            news: watch::Sender::new(0),
        })
    }

    pub(crate) fn key(&self, purpose: KeyPurpose) -> &Keypair {
        &self.keys[&purpose]
    }

    pub(crate) fn peer(&self) -> PeerId {
        self.node_key.peer_id()
    }

    pub(crate) fn key_set(&self) -> Signed<KeySet> {
        self.key_set_with(&self.says.lock().unwrap().sealing)
    }

    fn key_set_with(&self, sealing: &[Keypair]) -> Signed<KeySet> {
        let keys = KeyPurpose::ALL.iter().map(|purpose| (*purpose, self.key(*purpose)));
        let sealing_keys = sealing.iter().map(|key| (KeyPurpose::ReceiptSealing, key));
        let newest = sealing.last().map(Keypair::peer_id);
        let keys = keys
            .chain(sealing_keys)
            .map(|(purpose, key)| {
                let retired =
                    purpose == KeyPurpose::ReceiptSealing && newest.is_some_and(|newest| newest != key.peer_id());
                let state = KeyState::Retiring { not_issued_after: 1, dead_after: u64::MAX };
                let state = if retired { state } else { KeyState::Active };
                KeyEntry { purpose, key: key.peer_id(), state }
            })
            .collect();
        let set = KeySet {
            network: self.network,
            version: 1 + sealing.len() as u64,
            issued_at: 1,
            keys,
            managers: vec![self.peer()],
            gossip_shards: 2,
            next_root: None,
            handovers: Vec::new(),
        };
        Signed::sign(&set, &self.root)
    }

    pub(crate) fn heartbeat(&self) -> Signed<Heartbeat> {
        let mut says = self.says.lock().unwrap();
        let at = now() + says.clock_ahead_ms;
        // No two of one millisecond.
        says.last_beat = if at == says.last_beat { at + 1 } else { at };
        let heartbeat = Heartbeat {
            network: self.network,
            at: says.last_beat,
            epoch: says.epochs.len() as u64,
            key_set_version: 1 + says.sealing.len() as u64,
            key_set: self.key_set_with(&says.sealing).digest(),
            restore: says.restore,
            audit: says.audit,
        };
        Signed::sign(&heartbeat, self.key(KeyPurpose::Revocation))
    }

    pub(crate) fn revoke(&self, added: Revocations) {
        let mut says = self.says.lock().unwrap();
        let epoch = RevocationEpoch {
            network: self.network,
            number: says.epochs.len() as u64 + 1,
            previous: says.epochs.last().map(Signed::digest),
            at: now(),
            added,
        };
        says.epochs.push(Signed::sign(&epoch, self.key(KeyPurpose::Revocation)));
    }

    pub(crate) fn certificate(&self, seeder: PeerId) -> Signed<SeederCert> {
        let from = now() - DAY;
        let cert = SeederCert {
            network: self.network,
            seeder,
            name: "test".into(),
            capacity: 1 << 30,
            from,
            until: from + 365 * DAY,
        };
        Signed::sign(&cert, self.key(KeyPurpose::Enrolment))
    }

    /// Waits until what was heard satisfies `wanted`.
    pub(crate) async fn until<T>(&self, what: &str, mut wanted: impl FnMut(&Heard) -> Option<T>) -> T {
        let mut news = self.news.subscribe();
        let wait = async {
            loop {
                if let Some(found) = wanted(&self.heard.lock().unwrap()) {
                    return found;
                }
                news.changed().await.unwrap();
            }
        };
        tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("never heard: {what}"))
    }

    fn answer(&self, peer: PeerId, request: MeshRequest) -> MeshResponse {
        if self.says.lock().unwrap().refuses {
            return MeshResponse::Refused(Refusal::new(RefusalCode::Internal, "the test says no"));
        }
        let response = match request {
            MeshRequest::KeySet => MeshResponse::KeySet(self.key_set()),
            MeshRequest::Heartbeat => {
                self.heard.lock().unwrap().asked_for_heartbeats += 1;
                MeshResponse::Heartbeat(self.heartbeat())
            }
            MeshRequest::Epochs { after } => {
                let says = self.says.lock().unwrap();
                let given = if says.keeps_epochs { 0 } else { MeshResponse::EPOCHS_PAGE };
                MeshResponse::Epochs(says.epochs.iter().skip(after as usize).take(given).cloned().collect())
            }
            MeshRequest::Enrol { .. } => MeshResponse::Enrolled(self.certificate(peer)),
            MeshRequest::Report(report) => {
                let placements = self.says.lock().unwrap().placements.get(&peer).cloned().unwrap_or_default();
                let mut heard = self.heard.lock().unwrap();
                heard.reports.insert(peer, report);
                *heard.counts.entry(peer).or_default() += 1;
                MeshResponse::Placements(placements)
            }
            MeshRequest::Receipts(batch) => match self.take(peer, &batch) {
                Ok(mark) => MeshResponse::Mark(mark),
                Err(refusal) => MeshResponse::Refused(refusal),
            },
            MeshRequest::Manifest { digest } => match self.says.lock().unwrap().manifests.get(&digest) {
                Some(manifest) => MeshResponse::Manifest(manifest.clone()),
                None => MeshResponse::Refused(Refusal::new(RefusalCode::ContentNotHeld, "no such manifest")),
            },
            MeshRequest::Release { contents, hand_over } => {
                let says = self.says.lock().unwrap();
                let (released, rest): (Vec<_>, Vec<_>) =
                    contents.iter().copied().partition(|digest| says.lets_go.contains(digest));
                let because = KeptBecause::NoRoom;
                let kept = rest.into_iter().map(|manifest| Kept { manifest, copies: 1, wanted: 3, because }).collect();
                self.heard.lock().unwrap().releases.push((contents, hand_over));
                MeshResponse::Released { contents: released, kept }
            }
            MeshRequest::Stopping => {
                let mut heard = self.heard.lock().unwrap();
                let reports = heard.counts.get(&peer).copied().unwrap_or_default();
                heard.stopped.insert(peer, reports);
                MeshResponse::Noted
            }
            // What no test asks for.
            _ => {
                MeshResponse::Refused(Refusal::new(RefusalCode::Malformed, "this manager does not know that question"))
            }
        };
        self.news.send_modify(|n| *n += 1);
        response
    }

    fn take(&self, peer: PeerId, signed: &Signed<SealedBatch>) -> Result<Signed<Mark>, Refusal> {
        let batch = signed.verify(&peer).map_err(|e| e.refusal(RefusalCode::BadReceipt))?;
        let mut says = self.says.lock().unwrap();
        if let Some(mark) = says.late_mark.take() {
            return Ok(mark);
        }
        let mut heard = self.heard.lock().unwrap();
        let first = self.key(KeyPurpose::ReceiptSealing);
        let keys = says.sealing.iter().chain([first]).filter(|key| !says.lost.contains(&key.peer_id()));
        let Some(key) = keys.into_iter().find(|key| key.peer_id() == batch.sealed_to) else {
            heard.not_opened += 1;
            return Err(Refusal::new(RefusalCode::UnknownKey, "sealed to a key that this manager does not have"));
        };
        let opened = batch.open(key)?;
        let restore = says.restore;
        let known = heard.outboxes.get(&peer).filter(|(incarnation, ..)| *incarnation == batch.incarnation);
        let (number, running) =
            known.map_or((0, Digest::from_bytes([0; 32])), |(_, number, running)| (*number, *running));
        if batch.number > number + 1 {
            let detail = format!("batch {} came, {} is next", batch.number, number + 1);
            return Err(Refusal::new(RefusalCode::WrongState, detail));
        }
        if batch.number == number + 1 {
            assert_eq!(batch.previous, running, "the running hash chains");
            heard.outboxes.insert(peer, (batch.incarnation, batch.number, batch.running()));
            heard.receipts.extend(opened.receipts);
        }
        let (_, number, running) = heard.outboxes[&peer];
        let mark = Mark {
            network: self.network,
            seeder: peer,
            incarnation: batch.incarnation,
            number,
            running,
            restore,
            at: now(),
        };
        let signed = Signed::sign(&mark, self.key(KeyPurpose::Settlement));
        heard.marked = Some(signed.clone());
        Ok(signed)
    }

    /// Another key takes the place of the one that receipts are sealed to.
    pub(crate) fn rotate_sealing(&self) {
        let sealing = &mut self.says.lock().unwrap().sealing;
        sealing.push(Keypair::from_seed(&[230 + sealing.len() as u8; 32]));
    }

    /// The private half of the newest of these is gone.
    pub(crate) fn lose_sealing(&self) {
        let mut says = self.says.lock().unwrap();
        let newest = says.sealing.last().unwrap().peer_id();
        says.lost.insert(newest);
    }

    /// The newest mark arrives once more, in the place of an answer.
    pub(crate) fn repeat_mark(&self) {
        let mark = self.heard.lock().unwrap().marked.clone();
        self.says.lock().unwrap().late_mark = mark;
    }

    /// As if the manager came back from a backup of its first day.
    pub(crate) fn lose_everything(&self) {
        self.says.lock().unwrap().restore += 1;
        let mut heard = self.heard.lock().unwrap();
        heard.outboxes.clear();
        heard.receipts.clear();
    }
}

/// A manager's process.
pub(crate) struct Manager {
    pub(crate) handle: NodeHandle,
    supervisor: Supervisor,
    pub(crate) at: PeerAddrs,
}

impl Manager {
    /// Starts at `listen`, or where the system says.
    pub(crate) async fn start(office: &Arc<Office>, listen: Option<Address>, gossip: bool) -> Self {
        let mut config = NodeConfig::new(office.node_key.clone());
        config.listen = vec![listen.unwrap_or_else(|| Address::new("/ip4/127.0.0.1/tcp/0").unwrap())];
        config.gossip = gossip;
        config.dht = node::DhtMode::Server;
        config.gossip_heartbeat = Duration::from_millis(100);
        let supervisor = Supervisor::new();
        let handle = Node::start(config, &supervisor).await.unwrap();
        let at = handle.peer_addrs().await.unwrap();
        let shared = Arc::clone(office);
        let answer = move |peer, request: MeshRequest| {
            let office = Arc::clone(&shared);
            async move {
                if matches!(request, MeshRequest::Release { .. }) {
                    office.heard.lock().unwrap().asked_to_release += 1;
                    office.news.send_modify(|n| *n += 1);
                    drop(office.thinking.read().await);
                }
                office.answer(peer, request)
            }
        };
        let limits = CallLimits::default();
        serve_calls(&supervisor, &handle, Protocol::new(MESH_PROTOCOL), limits, answer).await.unwrap();
        Manager { handle, supervisor, at }
    }

    pub(crate) async fn nudge(&self, seeder: &PeerAddrs) {
        let protocol = Protocol::new(SEEDER_PROTOCOL);
        let answer: SeederResponse = self.handle.call(seeder, protocol, &SeederRequest::Nudge, LIMIT).await.unwrap();
        assert_eq!(answer, SeederResponse::Noted);
    }

    pub(crate) async fn stop(&self) {
        self.supervisor.shutdown(LIMIT).await.unwrap();
    }
}
