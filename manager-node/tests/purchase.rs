//! One purchase over real connections, from the merchant's reservation to the settled delivery, with the manager
//! stopped and started again between the steps: whatever it answered, it still knows.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use willcall_manager_node as manager_node; // its name in the workspace

use std::path::Path;
use std::time::Duration;

use manager_node::{Config, InitOptions, PublishProgress, PublishRequest, Running};
use node::{Node, NodeConfig, NodeHandle, Protocol, Supervisor};
use protocol::api::{
    self, MailboxRequest, MailboxResponse, MeshRequest, MeshResponse, Reserve, SalesRequest, SalesResponse,
    TransactionState,
};
use protocol::codec::Wire;
use protocol::receipt::{Ack, Completion, DeliveryId, OutboxPlace, Receipt, ReceiptBatch, SealedBatch};
use protocol::ticket::{Endorsement, payment_commitment};
use protocol::trust::{InvitedRole, KeyPurpose, Trust};
use protocol::{ChunkSet, Digest, Keypair, Nonce, PeerAddrs, Signed};
use serde_json::json;
use tokio::sync::watch;

const LIMIT: Duration = Duration::from_secs(30);
const SALES: Protocol = Protocol::new(api::SALES_PROTOCOL);
const MAILBOX: Protocol = Protocol::new(api::MAILBOX_PROTOCOL);
const MESH: Protocol = Protocol::new(api::MESH_PROTOCOL);

/// A node of one role, as far as the manager sees it.
struct Peer {
    key: Keypair,
    handle: NodeHandle,
    supervisor: Supervisor,
}

impl Peer {
    async fn start(seed: u8) -> Peer {
        let (key, supervisor) = (Keypair::from_seed(&[seed; 32]), Supervisor::new());
        let config = NodeConfig {
            listen: vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()],
            ..NodeConfig::new(Keypair::from_seed(&[seed; 32]))
        };
        let handle = Node::start(config, &supervisor).await.unwrap();
        Peer { key, handle, supervisor }
    }

    /// Asks until there is an answer: right after a restart of the manager an old connection may still be dying.
    async fn ask<Req: Wire, Resp: Wire>(&self, manager: &PeerAddrs, protocol: Protocol, request: Req) -> Resp {
        let asked = async {
            loop {
                match self.handle.call(manager, protocol, &request, LIMIT).await {
                    Ok(answer) => return answer,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        tokio::time::timeout(LIMIT, asked).await.unwrap()
    }

    async fn sales(&self, running: &Running, request: SalesRequest) -> SalesResponse {
        self.ask(&running.join_line().managers[0], SALES, request).await
    }

    async fn mailbox(&self, running: &Running, request: MailboxRequest) -> MailboxResponse {
        self.ask(&running.join_line().managers[0], MAILBOX, request).await
    }

    async fn mesh(&self, running: &Running, request: MeshRequest) -> MeshResponse {
        self.ask(&running.join_line().managers[0], MESH, request).await
    }
}

async fn restart(running: Running, dir: &Path) -> Running {
    running.stop(LIMIT).await.unwrap();
    Box::pin(manager_node::start(dir, Config::load(dir).unwrap())).await.unwrap()
}

async fn token(running: &Running, role: InvitedRole) -> Nonce {
    running.invite(role, 1).await.unwrap().invitation.unwrap().token
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_4_to_12_over_connections_and_restarts() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("manager");
    let listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
    let config = Config { origin_wait_ms: 1, ..Config::default() };
    manager_node::init(&dir, InitOptions { listen, config, ..InitOptions::default() }).unwrap();
    let running = manager_node::start(&dir, Config::load(&dir).unwrap()).await.unwrap();
    let (merchant, client, seeder) = (Peer::start(1).await, Peer::start(2).await, Peer::start(3).await);

    let goods = temp.path().join("song.flac");
    std::fs::write(&goods, vec![7u8; 300_000]).unwrap();
    let mut request = PublishRequest::new(&goods, "A song", "9.99");
    request.chunk_size = Some(65_536);
    request.shares = vec!["Band=70".to_owned()];
    let published = running.publish(request, watch::channel(PublishProgress::default()).0).await.unwrap();

    // Everybody joins.
    let enrol =
        SalesRequest::Enrol { token: token(&running, InvitedRole::Merchant).await, name: "Shop".into(), held: None };
    assert!(matches!(merchant.sales(&running, enrol).await, SalesResponse::Enrolled(_)));
    let enrol = MeshRequest::Enrol {
        token: token(&running, InvitedRole::Seeder).await,
        name: "Seeder".into(),
        capacity: 1 << 30,
        held: None,
    };
    assert!(matches!(seeder.mesh(&running, enrol).await, MeshResponse::Enrolled(_)));
    let MeshResponse::KeySet(keys) = seeder.mesh(&running, MeshRequest::KeySet).await else { panic!() };
    let trust = Trust::new(running.join_line().root, keys, 600_000).unwrap();

    let SalesResponse::Products(products) = merchant.sales(&running, SalesRequest::Products { after: None }).await
    else {
        panic!()
    };
    assert_eq!(products.iter().map(|product| product.id).collect::<Vec<_>>(), [published.product]);

    // Step 4 to 6, and again after a restart: the same answer.
    let (salt, price) = (Nonce::from_bytes([1; 16]), products[0].price);
    let reserve = SalesRequest::Reserve(Reserve {
        order: "order-1".into(),
        body: Digest::of("test body", &[b"1"]),
        product: published.product,
        client: client.key.peer_id(),
        price,
        salt,
        payment: payment_commitment(&salt, "auth-1", &price),
    });
    let reserved = merchant.sales(&running, reserve.clone()).await;
    let SalesResponse::Reserved { data, .. } = reserved.clone() else { panic!("{reserved:?}") };
    let running = restart(running, &dir).await;
    assert_eq!(merchant.sales(&running, reserve).await, reserved);
    let opened = trust.open(&data, KeyPurpose::Ticket, |d| d.formed_at, data.peek().unwrap().formed_at).unwrap();
    let transaction = opened.transaction;

    // Step 7, by a stranger and by the merchant.
    let endorsement = Endorsement {
        transaction_data: data.digest(),
        payment: payment_commitment(&salt, "auth-1", &price),
        authorised_at: opened.formed_at,
    };
    let release = SalesRequest::Release { transaction, endorsement: Signed::sign(&endorsement, &merchant.key) };
    let stranger = client.sales(&running, release.clone()).await;
    assert!(matches!(stranger, SalesResponse::Refused(r) if r.code.as_str() == "not-your-reservation"));
    let released = merchant.sales(&running, release.clone()).await;
    let SalesResponse::Released { ticket: sold, .. } = released.clone() else { panic!("{released:?}") };
    let running = restart(running, &dir).await;
    let SalesResponse::Released { ticket: again, .. } = merchant.sales(&running, release).await else { panic!() };
    assert_eq!((again.ticket, again.grant), (sold.ticket.clone(), sold.grant.clone()));

    // Step 8: the ticket waits for its client and for nobody else.
    let ask = MailboxRequest::Ticket { transaction, instead_of: None };
    let MailboxResponse::Ticket(ticket) = client.mailbox(&running, ask.clone()).await else { panic!() };
    assert_eq!(ticket.ticket, sold.ticket);
    let other = seeder.mailbox(&running, ask).await;
    assert!(matches!(other, MailboxResponse::Refused(r) if r.code.as_str() == "not-entitled"));

    // Step 9 to 11 happen between client and seeder. Step 12: receipts and completion.
    let MeshResponse::Manifest(manifest) =
        seeder.mesh(&running, MeshRequest::Manifest { digest: opened.manifest }).await
    else {
        panic!()
    };
    let delivery = DeliveryId { transaction, delivery: 1 };
    let ack = Ack {
        network: trust.network(),
        delivery,
        manifest: opened.manifest,
        seeder: seeder.key.peer_id(),
        chunks: ChunkSet::from_range(0..manifest.peek().unwrap().chunks()),
        at: 1,
    };
    let receipt = Receipt { ack: Signed::sign(&ack, &client.key), completion: None, first_at: 1, last_at: 2 };
    let place = OutboxPlace {
        network: trust.network(),
        incarnation: Nonce::from_bytes([5; 16]),
        number: 1,
        previous: Digest::from_bytes([0; 32]),
    };
    let sealed_to = trust.active_key(KeyPurpose::ReceiptSealing).unwrap();
    let batch = ReceiptBatch { receipts: vec![receipt] };
    let batch = SealedBatch::seal(&batch, &place, &seeder.key, sealed_to, 3, &mut rand::rng()).unwrap();
    let MeshResponse::Mark(mark) = seeder.mesh(&running, MeshRequest::Receipts(batch.clone())).await else { panic!() };
    let mark = trust.open(&mark, KeyPurpose::Settlement, |m| m.at, mark.peek().unwrap().at).unwrap();
    assert_eq!((mark.number, mark.running), (1, batch.peek().unwrap().running()));
    let running = restart(running, &dir).await;
    let MeshResponse::Mark(again) = seeder.mesh(&running, MeshRequest::Receipts(batch)).await else { panic!() };
    assert_eq!(again.peek().unwrap().number, 1);

    let completion = Completion { network: trust.network(), delivery, manifest: opened.manifest, at: 4 };
    let complete = MailboxRequest::Complete { completion: Signed::sign(&completion, &client.key) };
    assert!(matches!(client.mailbox(&running, complete).await, MailboxResponse::Completed { grant: Some(_) }));
    let states = merchant.sales(&running, SalesRequest::Status { transactions: vec![transaction] }).await;
    assert_eq!(states, SalesResponse::States(vec![Some(TransactionState::Settled)]));

    // It all adds up, and nothing was counted twice.
    let ledger = running.control(json!({"cmd": "ledger"})).await.unwrap();
    assert_eq!(ledger["trial_balance"][0]["balanced"], true);
    assert_eq!(ledger["postings"].as_array().unwrap().len(), 2);
    let receipts = running.control(json!({"cmd": "receipts"})).await.unwrap();
    assert_eq!(receipts["receipts"].as_array().unwrap().len(), 1);

    for peer in [merchant, client, seeder] {
        peer.supervisor.shutdown(LIMIT).await.unwrap();
    }
    running.stop(LIMIT).await.unwrap();
}
