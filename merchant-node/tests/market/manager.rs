//! The manager's side of the sales protocol, in memory, with faults to order.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use node::{CallLimits, Node, NodeConfig, NodeHandle, Protocol, Supervisor, serve_calls};
use protocol::api::{
    MESH_PROTOCOL, MeshRequest, MeshResponse, ProductInfo, Reserve, SALES_PROTOCOL, SalesRequest, SalesResponse,
    TakenBack, TransactionState,
};
use protocol::certificate::MerchantCert;
use protocol::cipher::ContentSecret;
use protocol::manifest::KeyPolicy;
use protocol::ticket::{
    Endorsement, KeyGrant, Lease, Payer, Ticket, TicketEnvelope, TransactionData, remuneration_commitment,
};
use protocol::trust::{Heartbeat, Invitation, InvitedRole, JoinLine, KeyEntry, KeyPurpose, KeySet, KeyState, Trust};
use protocol::{
    Address, Currency, Digest, Keypair, NetworkId, Nonce, PeerAddrs, PeerId, ProductId, Refusal, RefusalCode, Signed,
    TransactionId,
};
use tokio::sync::watch;

use super::{LIMIT, usd};

/// What the manager does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Refuses reservations.
    RefuseReserve(RefusalCode),
    /// Refuses releases.
    RefuseRelease(RefusalCode),
    /// Refuses refunds.
    RefuseRefund(RefusalCode),
    /// Does not answer releases before the fault is changed; releases all the same.
    HoldRelease,
    /// Does not answer reservations before the fault is changed.
    HoldReserve,
    /// Does not give out the catalogue before the fault is changed.
    HoldProducts,
    /// Transaction data for another client.
    OtherClient,
    /// … for another merchant.
    OtherMerchant,
    /// … for another product.
    OtherProduct,
    /// … at another price.
    OtherPrice,
    /// … signed by a key that is not in the key set.
    ForeignKey,
    /// … of another network.
    OtherNetwork,
    /// A ticket whose lease names another endorsement.
    OtherEndorsement,
    /// A ticket without the endorsement.
    NoEndorsement,
    /// A ticket whose lease is signed by a foreign key.
    ForeignLease,
    /// A ticket for another client.
    LeaseOtherClient,
    /// A ticket without its key.
    NoGrant,
}

struct Sale {
    request: Reserve,
    data: Signed<TransactionData>,
    endorsements: Vec<Signed<Endorsement>>,
    released: Option<TicketEnvelope>,
    state: TransactionState,
    generation: u32,
}

struct Books {
    sales: HashMap<String, Sale>,
    policy: KeyPolicy,
    products: Vec<ProductInfo>,
    enrol: Option<RefusalCode>,
    /// Merchants are strangers to it until they show their certificate.
    strangers: bool,
    restore: u64,
    taken_back: Vec<TakenBack>,
    asked_after: u64,
    /// What it says of payments of sales that it takes back.
    captured: bool,
    /// Told to be taken.
    told: Vec<TransactionId>,
    revoked: bool,
}

struct Inner {
    root: Keypair,
    ticket: Keypair,
    enrolment: Keypair,
    key_set: Signed<KeySet>,
    product: ProductId,
    token: Nonce,
    books: Mutex<Books>,
    fault: watch::Sender<Fault>,
    reserve_calls: AtomicUsize,
    refund_calls: AtomicUsize,
    /// Questions about the catalogue that were held.
    held: AtomicUsize,
}

/// A fake manager. It can be stopped and started again on the same port.
pub(crate) struct Manager {
    inner: Arc<Inner>,
    keypair: Keypair,
    address: Address,
    running: Mutex<Option<(Supervisor, NodeHandle)>>,
}

fn now() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

fn key(n: u8) -> Keypair {
    Keypair::from_seed(&[n; 32])
}

impl Manager {
    pub(crate) async fn start() -> Self {
        let (root, ticket, enrolment) = (key(1), key(2), key(3));
        let entry = |purpose, key: &Keypair| KeyEntry { purpose, key: key.peer_id(), state: KeyState::Active };
        let keypair = key(4);
        let keys = KeySet {
            network: NetworkId::of_root(&root.peer_id()),
            version: 1,
            issued_at: now(),
            keys: vec![
                entry(KeyPurpose::Ticket, &ticket),
                entry(KeyPurpose::Enrolment, &enrolment),
                entry(KeyPurpose::Revocation, &key(5)),
            ],
            managers: vec![keypair.peer_id()],
            gossip_shards: 1,
            next_root: None,
            handovers: Vec::new(),
        };
        let key_set = Signed::sign(&keys, &root);
        let product = ProductId::new(now(), [5; 10]);
        let info = ProductInfo {
            id: product,
            title: "An album".to_owned(),
            price: usd(999),
            manifest: Digest::from_bytes([6; 32]),
            policy: KeyPolicy::AtRelease,
            plain_bytes: 1000,
            content_bytes: 1100,
            files: 3,
        };
        let policy = KeyPolicy::AtRelease;
        let books = Books {
            sales: HashMap::new(),
            policy,
            products: vec![info],
            enrol: None,
            strangers: false,
            restore: 0,
            taken_back: vec![],
            asked_after: 0,
            captured: true,
            told: vec![],
            revoked: false,
        };
        let inner = Arc::new(Inner {
            root,
            ticket,
            enrolment,
            key_set,
            product,
            token: Nonce::from_bytes([9; 16]),
            books: Mutex::new(books),
            fault: watch::Sender::new(Fault::None),
            reserve_calls: AtomicUsize::new(0),
            refund_calls: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
        });
        let any = Address::new("/ip4/127.0.0.1/tcp/0").unwrap();
        let mut manager = Manager { inner, keypair, address: any, running: Mutex::new(None) };
        manager.up().await;
        let node = manager.running.lock().unwrap().as_ref().unwrap().1.clone();
        manager.address = node.listen_addresses().await.unwrap().remove(0);
        manager
    }

    /// Comes (back) up.
    pub(crate) async fn up(&self) {
        let supervisor = Supervisor::new();
        let mut config = NodeConfig::new(self.keypair.clone());
        config.listen = vec![self.address.clone()];
        config.gossip = false;
        let node = Node::start(config, &supervisor).await.unwrap();
        let inner = Arc::clone(&self.inner);
        let limits = CallLimits { per_peer: 32, ..CallLimits::default() };
        let sales = Protocol::new(SALES_PROTOCOL);
        serve_calls(&supervisor, &node, sales, limits, move |peer, request| {
            let inner = Arc::clone(&inner);
            async move { inner.sales(peer, request).await }
        })
        .await
        .unwrap();
        let (key_set, beating) = (self.inner.key_set.clone(), Arc::clone(&self.inner));
        let mesh = Protocol::new(MESH_PROTOCOL);
        serve_calls(&supervisor, &node, mesh, CallLimits::default(), move |_, request| {
            let answer = match request {
                MeshRequest::KeySet => MeshResponse::KeySet(key_set.clone()),
                MeshRequest::Heartbeat => MeshResponse::Heartbeat(beating.heartbeat()),
                _ => MeshResponse::Refused(Refusal::new(RefusalCode::Internal, "not in this test")),
            };
            async move { answer }
        })
        .await
        .unwrap();
        *self.running.lock().unwrap() = Some((supervisor, node));
    }

    /// Goes away.
    pub(crate) async fn down(&self) {
        let running = self.running.lock().unwrap().take();
        if let Some((supervisor, node)) = running {
            drop(node);
            supervisor.shutdown(LIMIT).await.unwrap();
        }
    }

    pub(crate) fn join_line(&self) -> JoinLine {
        JoinLine {
            root: self.inner.root.peer_id(),
            managers: vec![PeerAddrs::new(self.keypair.peer_id(), vec![self.address.clone()])],
            invitation: Some(Invitation { role: InvitedRole::Merchant, token: self.inner.token }),
        }
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::new(self.inner.root.peer_id(), self.inner.key_set.clone(), 600_000).unwrap()
    }

    pub(crate) fn product(&self) -> ProductId {
        self.inner.product
    }

    pub(crate) fn fault(&self, fault: Fault) {
        self.inner.fault.send_replace(fault);
    }

    pub(crate) fn policy(&self, policy: KeyPolicy) {
        let mut books = self.inner.books.lock().unwrap();
        books.policy = policy;
        books.products[0].policy = policy;
    }

    pub(crate) fn refuse_enrolment(&self, code: Option<RefusalCode>) {
        self.inner.books.lock().unwrap().enrol = code;
    }

    /// Comes back from a backup from before the shop was enrolled.
    pub(crate) fn forget_the_shop(&self) {
        self.inner.books.lock().unwrap().strangers = true;
    }

    pub(crate) fn knows_the_shop(&self) -> bool {
        !self.inner.books.lock().unwrap().strangers
    }

    pub(crate) fn add_product(&self, id: ProductId) {
        let mut books = self.inner.books.lock().unwrap();
        let product = ProductInfo { id, ..books.products[0].clone() };
        books.products.push(product);
        books.products.sort_by_key(|p| p.id);
    }

    /// Knows no sale any more; says that it was restored, or does not.
    pub(crate) fn forget(&self, says_so: bool) {
        let mut books = self.inner.books.lock().unwrap();
        books.sales.clear();
        books.restore = if says_so { now() / 1000 } else { 0 };
    }

    /// Its operator takes the sale of an order back.
    pub(crate) fn take_back(&self, order: &str, state: TransactionState) {
        let mut books = self.inner.books.lock().unwrap();
        let number = books.taken_back.len() as u64 + 1;
        let sale = books.sales.get_mut(order).unwrap();
        sale.state = state;
        let transaction = sale.data.peek().unwrap().transaction;
        let captured = books.captured;
        books.taken_back.push(TakenBack { number, transaction, order: order.to_owned(), state, captured });
        books.taken_back.sort_by_key(|row| row.number);
    }

    /// Its list of sales taken back has a row of another shop's order, with this number.
    pub(crate) fn list_a_strangers(&self, number: u64) {
        let (transaction, state) = (TransactionId::from_bytes([9; 16]), TransactionState::Refunded);
        let row = TakenBack { number, transaction, order: "a-stranger's".to_owned(), state, captured: false };
        self.inner.books.lock().unwrap().taken_back.push(row);
    }

    /// The last number after which it was asked for that list.
    pub(crate) fn asked_after(&self) -> u64 {
        self.inner.books.lock().unwrap().asked_after
    }

    /// The lease of an order is over, as where more was acknowledged than it allows: the key is for the next one.
    pub(crate) fn end_lease(&self, order: &str) {
        let mut books = self.inner.books.lock().unwrap();
        let sale = books.sales.get_mut(order).unwrap();
        sale.generation += 1;
        sale.released.as_mut().unwrap().grant = None;
    }

    /// Whether it knows, of what it takes back from now on, that it was paid for.
    pub(crate) fn knows_captured(&self, captured: bool) {
        self.inner.books.lock().unwrap().captured = captured;
    }

    /// The payments that it was told of, after a restore.
    pub(crate) fn told(&self) -> Vec<TransactionId> {
        self.inner.books.lock().unwrap().told.clone()
    }

    /// Comes back from a backup of before it took anything back.
    pub(crate) fn restored(&self) {
        let mut books = self.inner.books.lock().unwrap();
        (books.taken_back, books.restore) = (Vec::new(), now() / 1000);
    }

    /// From now on this merchant's certificate is revoked, or not any more.
    pub(crate) fn revoke_merchant(&self, revoked: bool) {
        self.inner.books.lock().unwrap().revoked = revoked;
    }

    /// Sets the state of every sale.
    pub(crate) fn set_state(&self, state: TransactionState) {
        self.inner.books.lock().unwrap().sales.values_mut().for_each(|sale| sale.state = state);
    }

    pub(crate) fn states(&self) -> Vec<TransactionState> {
        self.inner.books.lock().unwrap().sales.values().map(|sale| sale.state).collect()
    }

    /// Number of sales reserved.
    pub(crate) fn reservations(&self) -> usize {
        self.inner.books.lock().unwrap().sales.len()
    }

    pub(crate) fn reserve_calls(&self) -> usize {
        self.inner.reserve_calls.load(Ordering::SeqCst)
    }

    pub(crate) fn held(&self) -> usize {
        self.inner.held.load(Ordering::SeqCst)
    }

    pub(crate) fn refund_calls(&self) -> usize {
        self.inner.refund_calls.load(Ordering::SeqCst)
    }

    /// Every endorsement that came, over all sales.
    pub(crate) fn endorsements(&self) -> Vec<Signed<Endorsement>> {
        self.inner.books.lock().unwrap().sales.values().flat_map(|sale| sale.endorsements.clone()).collect()
    }
}

impl Inner {
    fn heartbeat(&self) -> Signed<Heartbeat> {
        let heartbeat = Heartbeat {
            network: NetworkId::of_root(&self.root.peer_id()),
            at: now(),
            epoch: 0,
            key_set_version: 1,
            key_set: self.key_set.digest(),
            restore: self.books.lock().unwrap().restore,
            audit: None,
        };
        Signed::sign(&heartbeat, &key(5))
    }

    async fn sales(&self, peer: PeerId, request: SalesRequest) -> SalesResponse {
        let fault = *self.fault.borrow();
        match request {
            SalesRequest::Reserve(_) => {
                self.reserve_calls.fetch_add(1, Ordering::SeqCst);
                if fault == Fault::HoldReserve {
                    self.changed(fault).await;
                }
            }
            SalesRequest::Products { .. } if fault == Fault::HoldProducts => {
                self.held.fetch_add(1, Ordering::SeqCst);
                self.changed(fault).await;
            }
            SalesRequest::Release { .. } if fault == Fault::HoldRelease => {
                let answer = self.answer(peer, request, fault);
                self.changed(fault).await;
                return answer.unwrap_or_else(SalesResponse::Refused);
            }
            SalesRequest::Refund { .. } => {
                self.refund_calls.fetch_add(1, Ordering::SeqCst);
            }
            _ => {}
        }
        self.answer(peer, request, fault).unwrap_or_else(SalesResponse::Refused)
    }

    async fn changed(&self, from: Fault) {
        let _ = self.fault.subscribe().wait_for(|fault| *fault != from).await;
    }

    fn answer(&self, peer: PeerId, request: SalesRequest, fault: Fault) -> Result<SalesResponse, Refusal> {
        let no = |code: RefusalCode| Err(Refusal::new(code, "as the test wants it"));
        let mut books = self.books.lock().unwrap();
        match request {
            SalesRequest::Enrol { token, name, held } => {
                if let Some(code) = books.enrol {
                    return no(code);
                }
                if token != self.token && held.is_none() {
                    return no(RefusalCode::BadInvitation);
                }
                books.strangers &= held.is_none();
                let network = NetworkId::of_root(&self.root.peer_id());
                let cert =
                    MerchantCert { network, merchant: peer, name, from: now() - 1, until: now() + 1_000_000_000 };
                Ok(SalesResponse::Enrolled(Signed::sign(&cert, &self.enrolment)))
            }
            SalesRequest::Products { .. } if books.strangers => no(RefusalCode::NotEnrolled),
            SalesRequest::Products { .. } if books.revoked => no(RefusalCode::Revoked),
            SalesRequest::Products { after } => {
                let rest = books.products.iter().filter(|p| after.is_none_or(|after| p.id > after));
                Ok(SalesResponse::Products(rest.take(SalesResponse::PRODUCTS_PAGE).cloned().collect()))
            }
            SalesRequest::Reserve(request) => {
                if let Fault::RefuseReserve(code) = fault {
                    return no(code);
                }
                if let Some(sale) = books.sales.get(&request.order) {
                    if sale.request != request {
                        return no(RefusalCode::IdempotencyConflict);
                    }
                    return Ok(SalesResponse::Reserved { data: sale.data.clone(), expires_at: now() + 900_000 });
                }
                let data = self.form(peer, &request, fault);
                let sale = Sale {
                    request: request.clone(),
                    data: data.clone(),
                    endorsements: Vec::new(),
                    released: None,
                    state: TransactionState::Reserved,
                    generation: 0,
                };
                books.sales.insert(request.order, sale);
                Ok(SalesResponse::Reserved { data, expires_at: now() + 900_000 })
            }
            SalesRequest::Release { transaction, endorsement } => {
                if let Fault::RefuseRelease(code) = fault {
                    return no(code);
                }
                let policy = books.policy;
                let Some(sale) = find(&mut books, transaction) else { return no(RefusalCode::NotYourReservation) };
                let word = endorsement.verify(&peer).unwrap();
                assert_eq!(word.transaction_data, sale.data.digest());
                assert_eq!(word.payment, sale.request.payment);
                if matches!(sale.state, TransactionState::Revoked | TransactionState::Refunded) {
                    return no(RefusalCode::Revoked);
                }
                sale.endorsements.push(endorsement.clone());
                if sale.endorsements[0] != endorsement {
                    return no(RefusalCode::AlreadyReleased);
                }
                if sale.released.is_none() {
                    sale.released = Some(self.release(sale, &endorsement, policy, fault));
                    sale.state = TransactionState::Released;
                }
                Ok(SalesResponse::Released { ticket: Box::new(sale.released.clone().unwrap()), policy })
            }
            SalesRequest::Cancel { transaction } => match find(&mut books, transaction) {
                None => no(RefusalCode::NotYourReservation),
                Some(sale) => {
                    sale.state = TransactionState::Cancelled;
                    Ok(SalesResponse::State(sale.state))
                }
            },
            SalesRequest::Refund { transaction } => {
                if let Fault::RefuseRefund(code) = fault {
                    return no(code);
                }
                let Some(sale) = find(&mut books, transaction) else { return no(RefusalCode::NotYourReservation) };
                sale.state = TransactionState::Refunded;
                Ok(SalesResponse::State(sale.state))
            }
            SalesRequest::Status { transactions } => {
                let state = |id| find(&mut books, id).map(|sale| sale.state);
                Ok(SalesResponse::States(transactions.into_iter().map(state).collect()))
            }
            SalesRequest::Captured { transactions } => {
                books.told.extend(&transactions);
                let state = |id| find(&mut books, id).map(|sale| sale.state);
                Ok(SalesResponse::States(transactions.into_iter().map(state).collect()))
            }
            SalesRequest::TakenBack { after } => {
                books.asked_after = after;
                let sales = books.taken_back.iter().filter(|sale| sale.number > after).cloned().collect();
                Ok(SalesResponse::TakenBack { restore: books.restore, sales })
            }
            SalesRequest::Holder { transaction } => match find(&mut books, transaction) {
                None => no(RefusalCode::NotYourReservation),
                Some(sale) => {
                    let client = sale.data.peek().unwrap().client;
                    Ok(SalesResponse::Holder { client, generation: sale.generation })
                }
            },
            SalesRequest::Evidence { .. } | SalesRequest::Recover { .. } => no(RefusalCode::NotYourReservation),
        }
    }

    fn form(&self, merchant: PeerId, request: &Reserve, fault: Fault) -> Signed<TransactionData> {
        let other = key(200).peer_id();
        let mut price = request.price;
        if fault == Fault::OtherPrice {
            price.minor += 1;
        }
        let root = if fault == Fault::OtherNetwork { other } else { self.root.peer_id() };
        let data = TransactionData {
            network: NetworkId::of_root(&root),
            transaction: TransactionId::new(now(), rand::random()),
            product: if fault == Fault::OtherProduct { ProductId::from_bytes([1; 16]) } else { request.product },
            manifest: Digest::from_bytes([6; 32]),
            client: if fault == Fault::OtherClient { other } else { request.client },
            merchant: if fault == Fault::OtherMerchant { other } else { merchant },
            remuneration: remuneration_commitment(&request.salt, &price),
            formed_at: now(),
        };
        Signed::sign(&data, if fault == Fault::ForeignKey { &self.enrolment } else { &self.ticket })
    }

    fn release(
        &self,
        sale: &Sale,
        endorsement: &Signed<Endorsement>,
        policy: KeyPolicy,
        fault: Fault,
    ) -> TicketEnvelope {
        let data = sale.data.peek().unwrap();
        let foreign = fault == Fault::OtherEndorsement;
        let lease = Lease {
            transaction_data: sale.data.digest(),
            endorsement: if foreign { Digest::from_bytes([0; 32]) } else { endorsement.digest() },
            client: if fault == Fault::LeaseOtherClient { key(200).peer_id() } else { data.client },
            generation: 0,
            delivery: 1,
            issued_at: now(),
            start: now(),
            end: now() + 1_000_000,
            allowance: 1 << 30,
            sources: Vec::new(),
            rate: 1,
            currency: Currency::USD,
            ceiling: 1,
            payer: Payer::Merchant,
            staleness: 0,
        };
        let secret = ContentSecret::from_bytes([8; 32]);
        let with_key = policy == KeyPolicy::AtRelease && fault != Fault::NoGrant;
        let grant = with_key.then(|| KeyGrant::seal(&secret, &data, &lease, &mut rand::rng()).unwrap());
        let signer = if fault == Fault::ForeignLease { key(201) } else { self.ticket.clone() };
        let root = self.root.peer_id();
        TicketEnvelope {
            ticket: Ticket {
                data: sale.data.clone(),
                endorsement: (fault != Fault::NoEndorsement).then(|| endorsement.clone()),
                lease: Signed::sign(&lease, &signer),
            },
            grant,
            join: JoinLine { root, managers: vec![PeerAddrs::from(key(4).peer_id())], invitation: None },
            sources: Vec::new(),
            title: "An album".to_owned(),
        }
    }
}

fn find(books: &mut Books, transaction: TransactionId) -> Option<&mut Sale> {
    books.sales.values_mut().find(|sale| sale.data.peek().unwrap().transaction == transaction)
}
