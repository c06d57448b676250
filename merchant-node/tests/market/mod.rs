//! A manager that can be made to misbehave, and a shop beside it, over real sockets: what a merchant does about bad
//! answers cannot be seen with a manager that gives good ones only.

#![allow(dead_code, unused_imports, reason = "each test binary uses a part of it")]

mod manager;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use merchant_node::{
    AuthorisationId, Config, InitOptions, PaymentError, PaymentFuture, PaymentProvider, Running, init, start_with,
};
use protocol::{Amount, Currency, Keypair};
use serde_json::{Value, json};
use tempfile::TempDir;
use willcall_merchant_node as merchant_node;

pub(crate) use manager::{Fault, Manager};

/// Nothing here takes longer, unless it hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) fn usd(minor: u64) -> Amount {
    Amount { minor, currency: Currency::USD }
}

/// A merchant's folder, its manager, and what it is started with.
pub(crate) struct Market {
    pub(crate) manager: Manager,
    pub(crate) dir: TempDir,
    pub(crate) config: Config,
    pub(crate) cash: Arc<Cash>,
}

impl Market {
    pub(crate) async fn new() -> Self {
        let manager = Manager::start().await;
        let dir = tempfile::tempdir().unwrap();
        let mut options = InitOptions::new(manager.join_line(), "test shop");
        options.http = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        init(dir.path(), options).unwrap();
        let mut config = Config::load(dir.path()).unwrap();
        config.retry_min_ms = 20;
        config.retry_max_ms = 200;
        config.orders_ms = 50;
        config.status_ms = 50;
        config.refresh_ms = 1_000;
        config.call_ms = 5_000;
        config.answer_ms = 10_000;
        Market { manager, dir, config, cash: Arc::default() }
    }

    /// Starts the shop without waiting for its enrolment.
    pub(crate) async fn start(&self) -> Running {
        start_with(self.dir.path(), self.config.clone(), vec![self.cash.clone()]).await.unwrap()
    }

    /// Starts the shop and waits until it sells.
    pub(crate) async fn open(&self) -> Shop {
        let shop = Shop::of(self.start().await);
        eventually("enrolled", || async { shop.running.not_ready().is_none().then_some(()) }).await;
        shop
    }
}

/// A running shop and a customer.
pub(crate) struct Shop {
    pub(crate) running: Running,
    http: reqwest::Client,
    base: String,
}

/// An HTTP answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) bytes: Vec<u8>,
}

impl Reply {
    pub(crate) async fn of(response: reqwest::Response) -> Self {
        Reply { status: response.status().as_u16(), bytes: response.bytes().await.unwrap().to_vec() }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes)
            .unwrap_or_else(|e| panic!("{e}: {:?}", String::from_utf8_lossy(&self.bytes)))
    }

    /// Status and error code.
    pub(crate) fn error(&self) -> (u16, String) {
        let json = self.json();
        assert!(json["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{json}");
        (self.status, json["error"]["code"].as_str().unwrap_or_default().to_owned())
    }

    pub(crate) fn message(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap_or_default().to_owned()
    }

    pub(crate) fn id(&self) -> String {
        self.json()["id"].as_str().unwrap().to_owned()
    }
}

impl Shop {
    pub(crate) fn of(running: Running) -> Self {
        let base = format!("http://{}", running.http_address());
        Shop { running, http: reqwest::Client::new(), base }
    }

    pub(crate) fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base)).timeout(LIMIT)
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        Reply::of(self.request(reqwest::Method::GET, path).send().await.unwrap()).await
    }

    pub(crate) async fn post(&self, key: &str, body: &Value) -> Reply {
        let request = self.request(reqwest::Method::POST, "/v1/purchases").header("idempotency-key", key).json(body);
        Reply::of(request.send().await.unwrap()).await
    }

    pub(crate) async fn voucher(&self, minor: u64) -> String {
        self.running.issue_vouchers(usd(minor), 1).await.unwrap().remove(0).to_string()
    }

    /// What is left on the only voucher: available, held, spent.
    pub(crate) async fn balance(&self, dir: &TempDir) -> (u64, u64, u64) {
        let list = self.control(dir, json!({ "cmd": "vouchers-list" })).await.unwrap();
        let voucher = &list["vouchers"][0];
        let number = |name: &str| voucher[name].as_u64().unwrap();
        (number("available"), number("held"), number("spent"))
    }

    pub(crate) async fn control(&self, dir: &TempDir, request: Value) -> Result<Value, node::ControlCallError> {
        node::control_call(dir.path(), &request, |_| {}).await
    }

    pub(crate) async fn stage(&self, dir: &TempDir, order: &str) -> String {
        let found = self.control(dir, json!({ "cmd": "order", "order": order })).await.unwrap();
        found["stage"].as_str().unwrap().to_owned()
    }

    /// Waits until the order is at the stage.
    pub(crate) async fn at_stage(&self, dir: &TempDir, order: &str, stage: &str) {
        eventually(stage, || async {
            self.running.nudge();
            (self.stage(dir, order).await == stage).then_some(())
        })
        .await;
    }

    /// Waits for the only order to be at the stage, and gives its id.
    pub(crate) async fn only_order_at(&self, dir: &TempDir, stage: &str) -> String {
        eventually(stage, || async {
            let list = self.control(dir, json!({ "cmd": "orders" })).await.unwrap();
            let order = &list["orders"][0];
            (order["stage"] == stage).then(|| order["order"].as_str().unwrap().to_owned())
        })
        .await
    }

    pub(crate) async fn stop(self) {
        self.running.stop(LIMIT).await.unwrap();
    }
}

/// A purchase of the fake manager's product.
pub(crate) fn body(manager: &Manager, provider: &str, token: &str) -> Value {
    json!({
        "product": manager.product().to_string(),
        "client": client().peer_id().to_string(),
        "payment": { "provider": provider, "token": token },
    })
}

pub(crate) fn client() -> Keypair {
    Keypair::from_seed(&[77; 32])
}

/// Waits until `look` finds what it looks for.
pub(crate) async fn eventually<T, F, Fut>(what: &str, look: F) -> T
where
    F: Fn() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let polling = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        loop {
            ticks.tick().await;
            if let Some(found) = look().await {
                return found;
            }
        }
    };
    tokio::time::timeout(LIMIT, polling).await.unwrap_or_else(|_| panic!("never came: {what}"))
}

/// A payment provider on another machine: its books survive the merchant's restarts, and it can be out of order.
#[derive(Default)]
pub(crate) struct Cash {
    pub(crate) books: Mutex<HashMap<AuthorisationId, &'static str>>,
    pub(crate) broken: Mutex<HashSet<&'static str>>,
}

impl Cash {
    pub(crate) fn fail(&self, operation: &'static str) {
        self.broken.lock().unwrap().insert(operation);
    }

    pub(crate) fn repair(&self) {
        self.broken.lock().unwrap().clear();
    }

    /// States of all payments.
    pub(crate) fn states(&self) -> Vec<&'static str> {
        self.books.lock().unwrap().values().copied().collect()
    }

    fn step(
        &self,
        operation: &'static str,
        id: AuthorisationId,
        from: &[Option<&'static str>],
        to: &'static str,
    ) -> PaymentFuture<'_, ()> {
        let broken = self.broken.lock().unwrap().contains(operation);
        let mut books = self.books.lock().unwrap();
        let now = books.get(&id).copied();
        let result = if broken {
            Err(PaymentError::Unavailable("out of order".to_owned()))
        } else if now == Some(to) {
            Ok(())
        } else if operation == "void" && now == Some("captured") {
            Err(PaymentError::Captured)
        } else if from.contains(&now) {
            books.insert(id, to);
            Ok(())
        } else {
            Err(PaymentError::WrongState(format!("{operation} of {now:?}")))
        };
        futures::future::ready(result).boxed()
    }
}

impl PaymentProvider for Cash {
    fn name(&self) -> &'static str {
        "cash"
    }

    fn reference(&self, token: &str) -> Result<String, PaymentError> {
        Ok(token.to_owned())
    }

    fn check<'a>(&'a self, _: &'a str, _: Amount) -> PaymentFuture<'a, ()> {
        futures::future::ready(Ok(())).boxed()
    }

    fn authorise<'a>(&'a self, id: AuthorisationId, reference: &'a str, _: Amount, _: u64) -> PaymentFuture<'a, ()> {
        if reference == "refused" {
            return futures::future::ready(Err(PaymentError::Declined("refused".to_owned()))).boxed();
        }
        self.step("authorise", id, &[None], "held")
    }

    fn capture(&self, id: AuthorisationId, _: u64) -> PaymentFuture<'_, ()> {
        self.step("capture", id, &[Some("held")], "captured")
    }

    fn void(&self, id: AuthorisationId, _: u64) -> PaymentFuture<'_, ()> {
        self.step("void", id, &[None, Some("held")], "voided")
    }

    fn refund(&self, id: AuthorisationId, _: u64) -> PaymentFuture<'_, ()> {
        self.step("refund", id, &[Some("captured")], "refunded")
    }
}
