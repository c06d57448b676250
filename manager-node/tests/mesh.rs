//! A manager over real connections: a seeder joins, is given content, reports it, and is thrown out again; and all of it
//! is still so after a restart.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use willcall_manager_node as manager_node; // its name in the workspace

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use manager_node::{Config, InitOptions, OriginState, PublishProgress, PublishRequest, Running};
use node::{CallLimits, Node, NodeConfig, NodeHandle, Protocol, Supervisor};
use protocol::api::{
    self, Kept, KeptBecause, MESH_PROTOCOL, MeshRequest, MeshResponse, News, SEEDER_PROTOCOL, SeederReport,
    SeederRequest, SeederResponse,
};
use protocol::certificate::SeederCert;
use protocol::receipt::{OutboxPlace, ReceiptBatch, SealedBatch};
use protocol::replication::ReplicationOrder;
use protocol::ticket::Admission;
use protocol::trust::{InvitedRole, JoinLine, KeyPurpose, RevocationState, Trust};
use protocol::{Digest, Keypair, Nonce, PeerAddrs, PeerId, Refusal, RefusalCode, Signed};
use serde_json::json;
use tokio::sync::watch;

const LIMIT: Duration = Duration::from_secs(30);
const MESH: Protocol = Protocol::new(MESH_PROTOCOL);

fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_millis()).unwrap()
}

fn init(dir: &Path) -> Config {
    let config = Config { placement_ms: 200, origin_wait_ms: 10_000, ..Config::default() };
    let listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
    manager_node::init(dir, InitOptions { listen, gossip_shards: 2, config, ..InitOptions::default() }).unwrap();
    Config::load(dir).unwrap()
}

async fn start(dir: &Path) -> Running {
    manager_node::start(dir, Config::load(dir).unwrap()).await.unwrap()
}

/// A seeder as far as the manager sees it.
struct Peer {
    handle: NodeHandle,
    supervisor: Supervisor,
    nudged: watch::Receiver<u32>,
    manager: PeerAddrs,
}

impl Peer {
    async fn start(seed: u8, join: &JoinLine) -> Peer {
        let supervisor = Supervisor::new();
        let config = NodeConfig {
            listen: vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()],
            gossip_heartbeat: Duration::from_millis(100),
            ..NodeConfig::new(Keypair::from_seed(&[seed; 32]))
        };
        let handle = Node::start(config, &supervisor).await.unwrap();
        let (sender, nudged) = watch::channel(0);
        let sender = Arc::new(sender);
        let protocol = Protocol::new(SEEDER_PROTOCOL);
        node::serve_calls(&supervisor, &handle, protocol, CallLimits::default(), move |_, request| {
            std::future::ready(match request {
                SeederRequest::Nudge => {
                    sender.send_modify(|n| *n += 1);
                    SeederResponse::Noted
                }
                SeederRequest::Epochs { .. } => SeederResponse::Epochs(Vec::new()),
            })
        })
        .await
        .unwrap();
        Peer { handle, supervisor, nudged, manager: join.managers[0].clone() }
    }

    async fn ask(&self, request: MeshRequest) -> MeshResponse {
        self.handle.call(&self.manager, MESH, &request, LIMIT).await.unwrap()
    }

    async fn refused(&self, request: MeshRequest) -> Refusal {
        match self.ask(request).await {
            MeshResponse::Refused(refusal) => refusal,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    async fn report(&self, held: &[Digest], free: u64) -> Vec<protocol::replication::Placement> {
        let addrs = self.handle.listen_addresses().await.unwrap();
        let report = SeederReport { addrs, held: held.to_vec(), first: true, free, ..SeederReport::default() };
        match self.ask(MeshRequest::Report(report)).await {
            MeshResponse::Placements(placements) => placements,
            other => panic!("expected placements, got {other:?}"),
        }
    }

    /// Reports, after each nudge again, until something is to be fetched.
    async fn placements(&mut self, held: &[Digest]) -> Vec<protocol::replication::Placement> {
        tokio::time::timeout(LIMIT, async {
            loop {
                self.nudged.borrow_and_update();
                let placements = self.report(held, 1 << 30).await;
                if !placements.is_empty() {
                    return placements;
                }
                self.nudged.changed().await.unwrap();
            }
        })
        .await
        .expect("no placement came")
    }

    async fn enrol(&self, token: Nonce) -> MeshResponse {
        self.ask(MeshRequest::Enrol { token, name: "box".into(), capacity: 1 << 30, held: None }).await
    }

    async fn trust(&self, root: PeerId) -> Trust {
        match self.ask(MeshRequest::KeySet).await {
            MeshResponse::KeySet(signed) => Trust::new(root, signed, 60_000).unwrap(),
            other => panic!("expected a key set, got {other:?}"),
        }
    }

    async fn stop(self) {
        self.supervisor.shutdown(LIMIT).await.unwrap();
    }
}

fn token(line: &JoinLine) -> Nonce {
    line.invitation.as_ref().unwrap().token
}

async fn publish(manager: &Running, path: &Path) -> manager_node::Published {
    let (progress, _) = watch::channel(PublishProgress::default());
    manager.publish(PublishRequest::new(path, "An album", "9.99"), progress).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seeder_joins_is_given_content_and_is_thrown_out() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, album) = (temp.path().join("manager"), temp.path().join("album"));
    init(&dir);
    std::fs::create_dir(&album).unwrap();
    std::fs::write(album.join("track"), vec![7; 200_000]).unwrap();
    let manager = start(&dir).await;
    let public = manager.join_line();
    assert_eq!(public.invitation, None);
    assert_eq!(public.to_string().parse::<JoinLine>().unwrap(), public);
    let published = publish(&manager, &album).await;
    assert_eq!((published.files, published.plain_bytes, published.origin), (1, 200_000, OriginState::None));

    let mut seeder = Peer::start(1, &public).await;
    let trust = seeder.trust(public.root).await;
    assert_eq!(trust.key_set().gossip_shards, 2);
    match seeder.ask(MeshRequest::Heartbeat).await {
        MeshResponse::Heartbeat(signed) => {
            let heartbeat = trust.open(&signed, KeyPurpose::Revocation, |h| h.at, now()).unwrap();
            assert_eq!((heartbeat.epoch, heartbeat.restore), (0, 0));
            assert_eq!(heartbeat.key_set, trust.signed_key_set().digest());
        }
        other => panic!("{other:?}"),
    }

    // Not enrolled: nothing but what is public.
    let stranger = SeederReport { first: true, ..SeederReport::default() };
    assert_eq!(seeder.refused(MeshRequest::Report(stranger)).await.code, RefusalCode::NotEnrolled);
    let wanted = MeshRequest::Manifest { digest: published.manifest };
    assert_eq!(seeder.refused(wanted.clone()).await.code, RefusalCode::NotEnrolled);
    let guess = MeshRequest::Enrol { token: Nonce::from_bytes([1; 16]), name: "x".into(), capacity: 1, held: None };
    assert_eq!(seeder.refused(guess).await.code, RefusalCode::BadInvitation);
    let for_merchants = token(&manager.invite(InvitedRole::Merchant, 1).await.unwrap());
    let wrong_role = MeshRequest::Enrol { token: for_merchants, name: "x".into(), capacity: 1, held: None };
    assert_eq!(seeder.refused(wrong_role).await.code, RefusalCode::BadInvitation);

    let invitation = token(&manager.invite(InvitedRole::Seeder, 1).await.unwrap());
    let first = seeder.enrol(invitation).await;
    let MeshResponse::Enrolled(cert) = &first else { panic!("{first:?}") };
    let me = seeder.handle.peer_id();
    let checked = SeederCert::check(cert, &me, &trust, &RevocationState::default(), now()).unwrap();
    assert_eq!((checked.name.as_str(), checked.capacity), ("box", 1 << 30));
    assert_eq!(seeder.enrol(invitation).await, first, "the same peer gets the same answer");
    let late = Peer::start(2, &public).await;
    let used = MeshRequest::Enrol { token: invitation, name: "x".into(), capacity: 1, held: None };
    assert_eq!(late.refused(used).await.code, RefusalCode::BadInvitation);
    // A certificate gets in whom the manager's key signed it for, and nobody else.
    let own = SeederCert { seeder: late.handle.peer_id(), ..checked.clone() };
    for held in [cert.clone(), Signed::sign(&own, &Keypair::from_seed(&[2; 32]))] {
        let token = Nonce::from_bytes([1; 16]);
        let shown = MeshRequest::Enrol { token, name: "x".into(), capacity: 1, held: Some(held) };
        assert_eq!(late.refused(shown).await.code, RefusalCode::BadInvitation);
    }

    // Placement: ordered after the first report, announced by a nudge, asked for by the next report.
    let placements = seeder.placements(&[]).await;
    assert_eq!(placements.len(), 1);
    let admission = Admission {
        peer: me,
        seeder: late.handle.peer_id(),
        trust: &trust,
        revoked: &RevocationState::default(),
        informed: Some(now()),
        continuation_ms: 0,
        now: now(),
    };
    let order = ReplicationOrder::check(&placements[0].order, &admission).unwrap();
    assert_eq!(order.manifest, published.manifest);
    assert!(order.allowance > published.content_bytes);
    assert_eq!(seeder.report(&[], 1 << 30).await, placements, "the same order until it is fulfilled");
    match seeder.ask(wanted.clone()).await {
        MeshResponse::Manifest(signed) => {
            assert_eq!(signed.digest(), published.manifest);
            let manifest = trust.open(&signed, KeyPurpose::Catalogue, |m| m.published_at, now()).unwrap();
            manifest.check(trust.network()).unwrap();
            assert_eq!(manifest.root, published.root);
        }
        other => panic!("{other:?}"),
    }
    let unknown = Digest::from_bytes([9; 32]);
    let none = MeshRequest::Manifest { digest: unknown };
    assert_eq!(seeder.refused(none).await.code, RefusalCode::ContentNotHeld);

    // Held: nothing more to do, and an invented content is not noted.
    assert!(seeder.report(&[published.manifest, unknown], 1 << 30).await.is_empty());
    let list = manager.control(json!({ "cmd": "product", "id": published.product })).await.unwrap();
    assert_eq!(list["holders"], json!([me]));
    let seeders = manager.control(json!({ "cmd": "seeders" })).await.unwrap();
    assert_eq!((&seeders["seeders"][0]["held"], &seeders["seeders"][0]["here"]), (&json!(1), &json!(true)));

    // A restart on the same port forgets nothing.
    manager.stop(LIMIT).await.unwrap();
    let manager = start(&dir).await;
    assert_eq!(manager.join_line(), public);
    assert!(seeder.report(&[published.manifest], 1 << 30).await.is_empty());
    assert_eq!(seeder.enrol(invitation).await, first);

    // Thrown out: an epoch says so, and reports are refused by name.
    let revoked = json!({ "cmd": "revoke", "kind": "seeder", "id": me });
    assert_eq!(manager.control(revoked.clone()).await.unwrap()["epoch"], json!(1));
    assert_eq!(manager.control(revoked).await.unwrap()["epoch"], json!(1), "once is enough");
    let epochs = match seeder.ask(MeshRequest::Epochs { after: 0 }).await {
        MeshResponse::Epochs(epochs) => epochs,
        other => panic!("{other:?}"),
    };
    let mut state = RevocationState::default();
    for signed in &epochs {
        let epoch = trust.open(signed, KeyPurpose::Revocation, |e| e.at, now()).unwrap();
        state.apply(signed.digest(), &epoch).unwrap();
    }
    assert!(state.has_peer(&me));
    let report = SeederReport { first: true, ..SeederReport::default() };
    assert_eq!(seeder.refused(MeshRequest::Report(report)).await.code, RefusalCode::Revoked);
    let again = MeshRequest::Enrol { token: invitation, name: "x".into(), capacity: 1, held: None };
    assert_eq!(seeder.refused(again).await.code, RefusalCode::Revoked);
    let list = manager.control(json!({ "cmd": "product", "id": published.product })).await.unwrap();
    assert_eq!(list["holders"], json!([]));

    manager.stop(LIMIT).await.unwrap();
    seeder.stop().await;
    late.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_waits_for_the_origin_and_a_takedown_reaches_it() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, file) = (temp.path().join("manager"), temp.path().join("file"));
    init(&dir);
    std::fs::write(&file, b"some bytes").unwrap();
    let manager = Arc::new(start(&dir).await);
    let line = manager.origin_invitation().await.unwrap();
    let mut origin = Peer::start(3, &line).await;
    let trust = origin.trust(line.root).await;
    assert!(matches!(origin.enrol(token(&line)).await, MeshResponse::Enrolled(_)));
    manager.set_origin(origin.handle.peer_id()).await.unwrap();
    assert!(origin.report(&[], 1 << 30).await.is_empty());

    let (publishing, path) = (Arc::clone(&manager), file.clone());
    let publication = tokio::spawn(async move { publish(&publishing, &path).await });
    let placements = origin.placements(&[]).await;
    let manifest = placements[0].order.peek().unwrap().manifest;
    assert!(placements[0].sources.is_empty());
    assert!(manager.origin_content().get(&manifest).unwrap().is_complete());
    origin.report(&[manifest], 1 << 30).await;
    let published = publication.await.unwrap();
    assert_eq!((published.origin, published.manifest), (OriginState::Held, manifest));

    // The next seeder is sent to the origin.
    let mut second = Peer::start(4, &line).await;
    let invitation = token(&manager.invite(InvitedRole::Seeder, 1).await.unwrap());
    assert!(matches!(second.enrol(invitation).await, MeshResponse::Enrolled(_)));
    let placements = second.placements(&[]).await;
    assert_eq!(placements[0].sources.iter().map(|s| s.peer).collect::<Vec<_>>(), [origin.handle.peer_id()]);
    assert_eq!(placements[0].sources[0].addrs, origin.handle.listen_addresses().await.unwrap());

    // News: heartbeats come by gossip, and so does the takedown.
    let mut news = origin.handle.subscribe(&api::news_topic(&trust.network()), 64).await.unwrap();
    let heard = tokio::time::timeout(LIMIT, async {
        loop {
            manager.control(json!({ "cmd": "heartbeat" })).await.unwrap();
            // The mesh may still be forming: then the next heartbeat is heard.
            let Ok(message) = tokio::time::timeout(Duration::from_millis(300), news.next()).await else { continue };
            if let News::Heartbeat(signed) = protocol::codec::decode(&message.unwrap().data).unwrap() {
                return trust.open(&signed, KeyPurpose::Revocation, |h| h.at, now()).unwrap();
            }
        }
    });
    assert_eq!(heard.await.unwrap().epoch, 0);
    let takedown = json!({ "cmd": "revoke", "kind": "content", "id": published.product });
    assert_eq!(manager.control(takedown).await.unwrap()["epoch"], json!(1));
    let epoch = tokio::time::timeout(LIMIT, async {
        loop {
            if let News::Epoch(signed) = protocol::codec::decode(&news.next().await.unwrap().data).unwrap() {
                return trust.open(&signed, KeyPurpose::Revocation, |e| e.at, now()).unwrap();
            }
        }
    });
    assert_eq!(epoch.await.unwrap().added.contents, [published.content]);
    assert!(second.report(&[], 1 << 30).await.is_empty(), "nothing is placed that was taken down");
    let list = manager.control(json!({ "cmd": "products" })).await.unwrap();
    assert_eq!(list["products"][0]["withdrawn"], json!(true));
    let origin_gone = json!({ "cmd": "revoke", "kind": "seeder", "id": origin.handle.peer_id() });
    assert_eq!(manager.control(origin_gone).await.unwrap_err().code, "is-origin");

    Arc::into_inner(manager).unwrap().stop(LIMIT).await.unwrap();
    origin.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_socket_publishes_with_progress_and_names_what_is_wrong() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, album) = (temp.path().join("manager"), temp.path().join("album"));
    init(&dir);
    std::fs::create_dir(&album).unwrap();
    std::fs::write(album.join("a"), vec![1; 3_000_000]).unwrap();
    let manager = start(&dir).await;

    let request = json!({
        "cmd": "publish", "path": album, "title": "An album", "price": "9.99", "shares": ["Band=70", "Label=12.5"],
        "policy": "on-completion", "chunk_size": 65_536, "lease_ms": 60_000, "rate": 2000, "staleness_ms": 5,
    });
    let mut progress = Vec::new();
    let published = node::control_call(&dir, &request, |value| progress.push(value)).await.unwrap();
    assert_eq!(published["origin"], "none");
    assert_eq!(published["files"], 1);
    assert!(!progress.is_empty());
    let status = node::control_call(&dir, &json!({ "cmd": "status" }), |_| {}).await.unwrap();
    assert_eq!((&status["products"], &status["role"]), (&json!(1), &json!("manager")));
    let products = node::control_call(&dir, &json!({ "cmd": "products" }), |_| {}).await.unwrap();
    let line = &products["products"][0];
    assert_eq!(line["policy"], "on-completion");
    assert_eq!(line["shares"][1], json!({ "name": "Label", "millionths": 125_000 }));
    let digest: Digest = line["manifest"].as_str().unwrap().parse().unwrap();
    let content = manager.origin_content().get(&digest).unwrap();
    assert!(content.is_complete());
    let bytes = std::fs::read(content.folder().join("content")).unwrap();
    assert_eq!(blake3::hash(&bytes).to_hex().as_str(), published["root"].as_str().unwrap());

    let bad = [
        (json!({ "path": album.join("nothing") }), "nothing"),
        (json!({ "price": "9,99" }), "no amount"),
        (json!({ "shares": ["Band=100"] }), "lower the shares"),
        (json!({ "chunk_size": 1000 }), "chunk size"),
        (json!({ "title": "" }), "title"),
        (json!({ "colour": "red" }), "colour"),
        (json!({ "path": dir }), "own directory"),
        (json!({ "currency": "JPY", "price": "9" }), "give the rate"),
    ];
    for (change, expected) in bad {
        let mut request = json!({ "cmd": "publish", "path": album, "title": "t", "price": "9.99" });
        for (key, value) in change.as_object().unwrap() {
            request[key] = value.clone();
        }
        let error = manager.control(request).await.unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
    let entries = std::fs::read_dir(dir.join("origin/content")).unwrap().count();
    assert_eq!(entries, 1, "failed publications leave nothing");
    for (request, code) in [
        (json!({ "cmd": "nonsense" }), "unknown-command"),
        (json!([]), "bad-request"),
        (json!({ "cmd": "invite", "role": "king" }), "bad-request"),
        (json!({ "cmd": "invite", "role": "seeder", "uses": 0 }), "bad-request"),
        (json!({ "cmd": "revoke", "kind": "content", "id": "x" }), "not-found"),
        (json!({ "cmd": "revoke", "kind": "seeder", "id": "x" }), "bad-request"),
    ] {
        assert_eq!(manager.control(request.clone()).await.unwrap_err().code, code, "{request}");
    }
    let error = manager_node::start(&dir, Config::load(&dir).unwrap()).await.err().unwrap().to_string();
    assert!(error.contains("in use"), "{error}");
    manager.stop(LIMIT).await.unwrap();
}

fn released(contents: &[Digest]) -> MeshResponse {
    MeshResponse::Released { contents: contents.to_vec(), kept: Vec::new() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_are_let_go_only_while_there_are_others_and_are_made_elsewhere_first() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, album) = (temp.path().join("manager"), temp.path().join("album"));
    init(&dir);
    std::fs::create_dir(&album).unwrap();
    std::fs::write(album.join("track"), vec![7; 200_000]).unwrap();
    let manager = start(&dir).await;
    let public = manager.join_line();
    let content = publish(&manager, &album).await.manifest;
    let invitation = token(&manager.invite(InvitedRole::Seeder, 2).await.unwrap());
    let (mut one, two) = (Peer::start(1, &public).await, Peer::start(2, &public).await);
    for peer in [&one, &two] {
        let enrolled = peer.enrol(invitation).await;
        assert!(matches!(enrolled, MeshResponse::Enrolled(_)), "{enrolled:?}");
        // Without room for more, so that no copy is ordered before one is asked for.
        peer.report(&[content], 1000).await;
    }
    let release = |hand_over| MeshRequest::Release { contents: vec![content], hand_over };
    let holders = async || {
        let seeders = manager.control(json!({ "cmd": "seeders" })).await.unwrap();
        seeders["seeders"].as_array().unwrap().iter().filter(|seeder| seeder["held"] == 1).count()
    };
    // Both ask at once: one may, and the other has the last copy then.
    let (a, b) = tokio::join!(one.ask(release(false)), two.ask(release(false)));
    let may = [a, b].map(|answer| answer == released(&[content]));
    assert!(may[0] != may[1], "{may:?}");
    assert_eq!(holders().await, 1);
    if may[1] {
        one.report(&[], 1000).await;
        two.report(&[content], 1000).await;
        assert_eq!(one.ask(release(false)).await, released(&[content]));
    }

    // The other leaves: its copy is made elsewhere first, and it is given nothing new itself.
    // While nobody has room for it, it says so.
    let kept = async |because| {
        let MeshResponse::Released { contents, kept } = two.ask(release(true)).await else { panic!("no answer") };
        let waits = Kept { manifest: content, copies: 0, wanted: 1, because };
        assert_eq!((contents, kept), (vec![], vec![waits]));
    };
    one.report(&[], 1000).await;
    kept(KeptBecause::NoRoom).await;
    one.report(&[], 1 << 30).await;
    kept(KeptBecause::UnderWay).await;
    let placements = one.placements(&[]).await;
    assert_eq!(placements.len(), 1, "{placements:?}");
    // Not before it is there.
    kept(KeptBecause::UnderWay).await;
    assert_eq!(holders().await, 1);
    one.report(&[content], 1 << 30).await;
    assert_eq!(two.ask(release(true)).await, released(&[content]));
    assert_eq!(holders().await, 1);

    let unknown = MeshRequest::Release { contents: vec![Digest::from_bytes([9; 32])], hand_over: true };
    assert_eq!(one.ask(unknown).await, released(&[Digest::from_bytes([9; 32])]));
    let stranger = Peer::start(3, &public).await;
    assert_eq!(stranger.refused(release(true)).await.code, RefusalCode::NotEnrolled);

    // Reach: a stranger's connection to each address.
    let delivery = Protocol::new(protocol::deliver::PROTOCOL);
    let _accepting = one.handle.accept(delivery, node::AcceptLimits { queue: 4, per_peer: 4 }).await.unwrap();
    let dead: protocol::Address = "/ip4/127.0.0.1/tcp/9".parse().unwrap();
    let mut addrs = one.handle.listen_addresses().await.unwrap();
    addrs.push(dead.clone());
    let report = SeederReport { addrs: addrs.clone(), held: vec![content], first: true, ..SeederReport::default() };
    one.ask(MeshRequest::Report(report)).await;
    let MeshResponse::Reach(tried) = one.ask(MeshRequest::DialBack).await else { panic!("no answer") };
    assert_eq!(tried.iter().map(|(address, _)| address.clone()).collect::<Vec<_>>(), addrs);
    assert!(tried.iter().all(|(address, why)| why.is_some() == (*address == dead)), "{tried:?}");
    assert_eq!(stranger.refused(MeshRequest::DialBack).await.code, RefusalCode::NotEnrolled);
    for peer in [one, two, stranger] {
        peer.stop().await;
    }
    manager.stop(LIMIT).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_that_only_the_manager_can_judge_do_not_put_their_bearer_out_of_the_mesh() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("manager");
    init(&dir);
    let manager = start(&dir).await;
    let public = manager.join_line();
    let invitation = token(&manager.invite(InvitedRole::Seeder, 2).await.unwrap());
    let (crook, bearer) = (Peer::start(1, &public).await, Peer::start(2, &public).await);
    let mut certificates = Vec::new();
    for peer in [&crook, &bearer] {
        let MeshResponse::Enrolled(cert) = peer.enrol(invitation).await else { panic!("not enrolled") };
        certificates.push(cert);
    }
    let trust = bearer.trust(public.root).await;
    // Batches of both reach the manager through the same neighbour.
    let (network, shards) = (trust.network(), trust.key_set().gossip_shards);
    let topic = |seed: u8| api::receipts_topic(&network, &Keypair::from_seed(&[seed; 32]).peer_id(), shards);
    let batch = |seed: u8, incarnation: u8, previous: u8| {
        let place = OutboxPlace {
            network,
            incarnation: Nonce::from_bytes([incarnation; 16]),
            number: 1,
            previous: Digest::from_bytes([previous; 32]),
        };
        let to = trust.active_key(KeyPurpose::ReceiptSealing).unwrap();
        let empty = ReceiptBatch { receipts: Vec::new() };
        let signer = Keypair::from_seed(&[seed; 32]);
        let batch = SealedBatch::seal(&empty, &place, &signer, to, now(), &mut rand::rng()).unwrap();
        let certificate = certificates[usize::from(seed) - 1].clone();
        protocol::codec::encode(&api::GossipedBatch { certificate, batch })
    };
    let mut news = bearer.handle.subscribe(&api::news_topic(&network), 64).await.unwrap();
    let mut listening = Vec::new();
    for shard in 0..shards {
        let topic = api::receipts_topic_of_shard(&network, shard);
        listening.push(bearer.handle.subscribe(&topic, 64).await.unwrap());
    }
    let publish = async |topic: String, data: Vec<u8>| {
        tokio::time::timeout(LIMIT, async {
            while bearer.handle.publish(&topic, data.clone()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .expect("no mesh");
    };
    let mut marked = async |seeder: PeerId, incarnation: u8| {
        tokio::time::timeout(LIMIT, async {
            loop {
                let message = news.next().await.unwrap();
                if let News::Mark(mark) = protocol::codec::decode(&message.data).unwrap() {
                    let mark = mark.peek().unwrap();
                    if (mark.seeder, mark.incarnation) == (seeder, Nonce::from_bytes([incarnation; 16])) {
                        return;
                    }
                }
            }
        })
        .await
        .expect("the batch did not count");
    };
    for incarnation in 1..=10 {
        publish(topic(1), batch(1, incarnation, 7)).await;
    }
    // Judged in order: when this one counts, the others were judged.
    publish(topic(1), batch(1, 11, 0)).await;
    marked(crook.handle.peer_id(), 11).await;
    publish(topic(2), batch(2, 1, 0)).await;
    marked(bearer.handle.peer_id(), 1).await;
    for peer in [crook, bearer] {
        peer.stop().await;
    }
    manager.stop(LIMIT).await.unwrap();
}
