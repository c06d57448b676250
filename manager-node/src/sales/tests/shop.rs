//! A manager on loopback with a product, a merchant, a client and seeders, as keys whose requests are put to the
//! services directly: tests of rules need the real database and keys, and no sockets.

use std::sync::Arc;
use std::time::Duration;

use protocol::api::{MailboxRequest, MailboxResponse, Reserve, SalesRequest, SalesResponse, TransactionState};
use protocol::cipher::ContentSecret;
use protocol::manifest::{KeyPolicy, Manifest};
use protocol::receipt::{Ack, Completion, DeliveryId, Mark, OutboxPlace, Receipt, ReceiptBatch, SealedBatch};
use protocol::ticket::{Admission, Endorsement, TicketEnvelope, TransactionData, payment_commitment};
use protocol::trust::{InvitedRole, KeyPurpose, RevocationState};
use protocol::{
    Address, Amount, ChunkSet, ContentId, Currency, Digest, Keypair, Nonce, PeerId, ProductId, Refusal, RefusalCode,
    Signed, TransactionId,
};
use rand::RngExt;
use serde_json::{Value, json};

use crate::context::{Context, now_ms};
use crate::tables::ProductRecord;
use crate::transactions::{self, Delivery, Sale};
use crate::{Config, InitOptions, Running};

pub(crate) const CHUNK: u32 = 64 * 1024;
pub(crate) const CHUNKS: u32 = 10;
pub(crate) const PRICE: Amount = Amount { minor: 999, currency: Currency::USD };

/// The manager and everybody around it.
pub(crate) struct Shop {
    pub(crate) running: Running,
    pub(crate) ctx: Arc<Context>,
    pub(crate) merchant: Keypair,
    pub(crate) client: Keypair,
    pub(crate) seeders: Vec<Keypair>,
    pub(crate) product: ProductId,
    pub(crate) secret: ContentSecret,
    pub(crate) manifest: Digest,
    // Deleted last.
    _dir: tempfile::TempDir,
}

/// How a test's manager and product differ from the usual.
pub(crate) struct Terms {
    pub(crate) policy: KeyPolicy,
    pub(crate) lease_ms: u64,
    pub(crate) rate: u64,
    pub(crate) chunks: u32,
    pub(crate) config: Config,
}

impl Default for Terms {
    fn default() -> Self {
        // The chore is stepped by the tests.
        let config = Config { sales_ms: 3_600_000, fee_millionths: 20_000, ..Config::default() };
        Terms { policy: KeyPolicy::AtRelease, lease_ms: 7 * 86_400_000, rate: 10_000_000, chunks: CHUNKS, config }
    }
}

pub(crate) fn random_key() -> Keypair {
    Keypair::from_seed(&rand::rng().random())
}

impl Shop {
    pub(crate) async fn open(terms: Terms) -> Shop {
        Box::pin(Shop::set_up(terms)).await
    }

    async fn set_up(terms: Terms) -> Shop {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manager");
        let listen = vec![Address::new("/ip4/127.0.0.1/tcp/0").unwrap()];
        let config = Config { listen: listen.clone(), ..terms.config };
        crate::init(&path, InitOptions { listen, config: config.clone(), ..InitOptions::default() }).unwrap();
        let running = crate::start(&path, Config::load(&path).unwrap()).await.unwrap();
        let ctx = Arc::clone(running.context());
        let mut shop = Shop {
            running,
            ctx,
            merchant: random_key(),
            client: random_key(),
            seeders: Vec::new(),
            product: ProductId::new(now_ms(), rand::rng().random()),
            secret: ContentSecret::generate(&mut rand::rng()),
            manifest: Digest::from_bytes([0; 32]),
            _dir: dir,
        };
        shop.manifest = shop.publish(shop.product, terms.policy, terms.lease_ms, terms.rate, terms.chunks);
        shop.enrol_merchant(&shop.merchant).await;
        for _ in 0..3 {
            let seeder = random_key();
            shop.enrol_seeder(&seeder).await;
            shop.seeders.push(seeder);
        }
        shop
    }

    pub(crate) async fn close(self) {
        self.stop().await;
    }

    /// Stops the manager and leaves its folder, which is `manager` in the one given back.
    pub(crate) async fn stop(self) -> tempfile::TempDir {
        let Shop { running, ctx, _dir, .. } = self;
        drop(ctx);
        running.stop(Duration::from_secs(10)).await.unwrap();
        _dir
    }

    /// The manager's tasks are aborted where they stand, and it is started again over its folder.
    pub(crate) async fn crash(self) -> Shop {
        Box::pin(self.come_back(false)).await
    }

    /// As if its folder was put back from a backup of now.
    pub(crate) async fn restored(self) -> Shop {
        Box::pin(self.come_back(true)).await
    }

    async fn come_back(self, restored: bool) -> Shop {
        let Shop { running, ctx, merchant, client, seeders, product, secret, manifest, _dir } = self;
        drop(ctx);
        // What does not end at once is aborted, which is meant.
        let _ = running.stop(Duration::ZERO).await;
        let path = _dir.path().join("manager");
        // Aborted tasks let go of folder and port a moment later.
        let again = async {
            while restored && crate::mark_restored(&path, 0).is_err() {
                tokio::task::yield_now().await;
            }
            loop {
                match crate::start(&path, Config::load(&path).unwrap()).await {
                    Ok(running) => return running,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        let running = tokio::time::timeout(Duration::from_secs(30), Box::pin(again)).await.unwrap();
        let ctx = Arc::clone(running.context());
        // Its seeders are keys without a node: nobody could tell.
        ctx.recalled.store(true, std::sync::atomic::Ordering::Release);
        Shop { running, ctx, merchant, client, seeders, product, secret, manifest, _dir }
    }

    pub(crate) fn publish(&self, id: ProductId, policy: KeyPolicy, lease_ms: u64, rate: u64, chunks: u32) -> Digest {
        let content = ContentId::from_bytes(rand::rng().random());
        let length = u64::from(chunks) * u64::from(CHUNK);
        let manifest = Manifest {
            network: self.ctx.network(),
            content,
            root: Digest::from_bytes([1; 32]),
            length,
            chunk_size: CHUNK,
            segments: vec![Digest::from_bytes([2; 32])],
            key_commitment: self.secret.commitment(),
            policy,
            published_at: 1,
        };
        let signed = self.ctx.keys.sign(KeyPurpose::Catalogue, &manifest);
        let record = ProductRecord {
            title: "An album".into(),
            price: PRICE,
            manifest: signed.digest(),
            content,
            policy,
            plain_bytes: length - 1000,
            content_bytes: length,
            files: 1,
            secret: *self.secret.as_bytes(),
            shares: vec![("Band".into(), 700_000)],
            lease_ms,
            rate,
            staleness_ms: 0,
            published_at: 1,
            withdrawn: false,
        };
        let digest = signed.digest();
        self.ctx.catalogue.add_blocking(id, record, signed).unwrap();
        digest
    }

    pub(crate) async fn token(&self, role: InvitedRole) -> Nonce {
        self.running.invite(role, 1).await.unwrap().invitation.unwrap().token
    }

    pub(crate) async fn enrol_merchant(&self, key: &Keypair) {
        let token = self.token(InvitedRole::Merchant).await;
        let request = SalesRequest::Enrol { token, name: "Shop".into(), held: None };
        assert!(matches!(self.sales_as(key, request).await, Ok(SalesResponse::Enrolled(_))));
    }

    pub(crate) async fn enrol_seeder(&self, key: &Keypair) {
        let token = self.token(InvitedRole::Seeder).await;
        crate::enrol::seeder(&self.ctx, key.peer_id(), token, "Seeder".into(), 1 << 40, None).await.unwrap();
    }

    /// Everything that was taken back until now is in an epoch.
    pub(crate) async fn announced(&self) {
        transactions::announcing::all(&self.ctx).await.unwrap();
    }

    pub(crate) async fn sales_as(&self, key: &Keypair, request: SalesRequest) -> Result<SalesResponse, Refusal> {
        let answer = Box::pin(super::super::answer(&self.ctx, key.peer_id(), request)).await;
        self.announced().await;
        answer
    }

    pub(crate) async fn sales(&self, request: SalesRequest) -> Result<SalesResponse, Refusal> {
        self.sales_as(&self.merchant, request).await
    }

    pub(crate) async fn mailbox_as(&self, key: &Keypair, request: MailboxRequest) -> Result<MailboxResponse, Refusal> {
        let answer = super::super::mailbox::answer(&self.ctx, key.peer_id(), request).await;
        self.announced().await;
        answer
    }

    pub(crate) fn order(&self, order: &str) -> Reserve {
        Reserve {
            order: order.into(),
            body: Digest::of("test body", &[order.as_bytes()]),
            product: self.product,
            client: self.client.peer_id(),
            price: PRICE,
            salt: Nonce::from_bytes([1; 16]),
            payment: payment_commitment(&Nonce::from_bytes([2; 16]), order, &PRICE),
        }
    }

    pub(crate) async fn reserve(&self, order: &str) -> Signed<TransactionData> {
        match self.sales(SalesRequest::Reserve(self.order(order))).await.unwrap() {
            SalesResponse::Reserved { data, .. } => data,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn endorse(&self, data: &Signed<TransactionData>, order: &str) -> Signed<Endorsement> {
        let payment = self.order(order).payment;
        let endorsement = Endorsement { transaction_data: data.digest(), payment, authorised_at: now_ms() };
        Signed::sign(&endorsement, &self.merchant)
    }

    /// Steps 4 to 8.
    pub(crate) async fn buy(&self, order: &str) -> (TransactionId, TicketEnvelope) {
        let data = self.reserve(order).await;
        let transaction = data.peek().unwrap().transaction;
        let endorsement = self.endorse(&data, order);
        match self.sales(SalesRequest::Release { transaction, endorsement }).await.unwrap() {
            SalesResponse::Released { ticket, .. } => (transaction, *ticket),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn ticket(&self, transaction: TransactionId) -> Result<TicketEnvelope, Refusal> {
        match self.mailbox_as(&self.client, MailboxRequest::Ticket { transaction, instead_of: None }).await? {
            MailboxResponse::Ticket(ticket) => Ok(*ticket),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn completion(&self, delivery: DeliveryId) -> Signed<Completion> {
        let completion = Completion { network: self.ctx.network(), delivery, manifest: self.manifest, at: now_ms() };
        Signed::sign(&completion, &self.client)
    }

    pub(crate) async fn complete(&self, transaction: TransactionId) -> Result<MailboxResponse, Refusal> {
        let completion = self.completion(DeliveryId { transaction, delivery: 1 });
        self.mailbox_as(&self.client, MailboxRequest::Complete { completion }).await
    }

    pub(crate) fn ack(&self, by: &Keypair, delivery: DeliveryId, seeder: PeerId, chunks: ChunkSet) -> Signed<Ack> {
        let network = self.ctx.network();
        Signed::sign(&Ack { network, delivery, manifest: self.manifest, seeder, chunks, at: now_ms() }, by)
    }

    /// A receipt of the first delivery, as an honest client and seeder `n` make it.
    pub(crate) fn receipt(&self, transaction: TransactionId, n: usize, chunks: std::ops::Range<u32>) -> Receipt {
        let delivery = DeliveryId { transaction, delivery: 1 };
        let chunks = ChunkSet::from_range(chunks);
        let ack = self.ack(&self.client, delivery, self.seeders[n].peer_id(), chunks);
        Receipt { ack, completion: None, first_at: 1, last_at: 2 }
    }

    pub(crate) fn sale(&self, id: TransactionId) -> Sale {
        self.ctx.db.read(|txn| transactions::SALES.get(txn, &id)).unwrap().unwrap()
    }

    pub(crate) fn state(&self, id: TransactionId) -> TransactionState {
        self.sale(id).state
    }

    pub(crate) fn delivery(&self, transaction: TransactionId, delivery: u32) -> Option<Delivery> {
        self.ctx.db.read(|txn| transactions::get_delivery(txn, DeliveryId { transaction, delivery })).unwrap()
    }

    pub(crate) async fn control(&self, mut request: Value) -> Result<Value, String> {
        let cmd = request["cmd"].take().as_str().unwrap().to_owned();
        let answer = transactions::control(&self.ctx, &cmd, &request).await.unwrap();
        self.announced().await;
        answer.map_err(|error| error.code)
    }

    /// Balance of an account, minor units, after the trial balance was checked.
    pub(crate) async fn balance(&self, account: &str) -> i64 {
        let ledger = self.control(json!({"cmd": "ledger", "limit": 1000})).await.unwrap();
        for currency in ledger["trial_balance"].as_array().unwrap() {
            assert_eq!(currency["balanced"], true, "{ledger}");
        }
        let accounts = ledger["accounts"].as_array().unwrap();
        let found = accounts.iter().find(|line| line["account"].as_str().unwrap() == account);
        found.map_or(0, |line| line["minor"].as_i64().unwrap())
    }

    /// What all seeders are owed together, minor units.
    pub(crate) async fn balance_of_seeders(&self) -> i64 {
        let mut owed = 0;
        for seeder in &self.seeders {
            owed -= self.balance(&format!("seeder:{}", seeder.peer_id())).await;
        }
        owed
    }

    /// What a seeder that heard every epoch says to this peer's ticket.
    pub(crate) fn admitted(&self, peer: &Keypair, ticket: &TicketEnvelope) -> Result<(), RefusalCode> {
        let (trust, revoked) = (self.ctx.trust(), self.ctx.revocations.with(RevocationState::clone));
        let admission = Admission {
            peer: peer.peer_id(),
            seeder: self.seeders[0].peer_id(),
            trust: &trust,
            revoked: &revoked,
            informed: Some(now_ms()),
            continuation_ms: 0,
            now: now_ms(),
        };
        ticket.ticket.check(&admission).map(drop).map_err(|refusal| refusal.code)
    }

    pub(crate) fn is_revoked(&self, id: TransactionId) -> bool {
        self.ctx.revocations.with(|revoked| revoked.has_transaction(&id))
    }
}

/// One seeder's outbox.
pub(crate) struct Outbox {
    pub(crate) key: Keypair,
    pub(crate) place: OutboxPlace,
    pub(crate) sealed_to: PeerId,
}

impl Outbox {
    pub(crate) fn of(shop: &Shop, n: usize) -> Outbox {
        Outbox {
            key: shop.seeders[n].clone(),
            place: OutboxPlace {
                network: shop.ctx.network(),
                incarnation: Nonce::from_bytes(rand::rng().random()),
                number: 1,
                previous: Digest::from_bytes([0; 32]),
            },
            sealed_to: shop.ctx.trust().active_key(KeyPurpose::ReceiptSealing).unwrap(),
        }
    }

    /// Seals the next batch and goes on.
    pub(crate) fn batch(&mut self, receipts: Vec<Receipt>) -> Signed<SealedBatch> {
        let batch = ReceiptBatch { receipts };
        let sealed =
            SealedBatch::seal(&batch, &self.place, &self.key, self.sealed_to, now_ms(), &mut rand::rng()).unwrap();
        self.place.previous = sealed.peek().unwrap().running();
        self.place.number += 1;
        sealed
    }

    /// Sends one batch and checks that it is marked.
    pub(crate) async fn send(&mut self, shop: &Shop, receipts: Vec<Receipt>) -> Mark {
        let batch = self.batch(receipts);
        let mark = crate::receipts::accept_batch(&shop.ctx, self.key.peer_id(), batch).await.unwrap();
        shop.announced().await;
        let mark = shop.ctx.trust().open(&mark, KeyPurpose::Settlement, |m| m.at, now_ms()).unwrap();
        assert_eq!((mark.number, mark.running), (self.place.number - 1, self.place.previous));
        mark
    }
}
