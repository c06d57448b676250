//! Buying from shops that answer well, badly, late or not at all.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use protocol::ProductId;
use protocol::manifest::KeyPolicy;
use serde_json::{Value, json};

use super::world::{Files, Sale, World, keypair, noise};
use crate::home::Home;
use crate::shop::{BuyRequest, ShopError, buy, handed_over, is_unencrypted, products};

type Answers = Arc<dyn Fn(u32, Option<Value>) -> Response + Send + Sync>;

#[derive(Clone)]
struct FakeShop {
    answers: Answers,
    asked: Arc<AtomicU32>,
    keys: Arc<Mutex<Vec<String>>>,
}

struct Running {
    url: String,
    shop: FakeShop,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeShop {
    fn answer(&self, headers: &HeaderMap, body: Option<Value>) -> Response {
        let key = headers.get("idempotency-key").map(|key| key.to_str().unwrap().to_owned());
        self.keys.lock().unwrap().extend(key);
        (self.answers)(self.asked.fetch_add(1, Ordering::SeqCst), body)
    }
}

/// A shop whose n-th answer is `answers(n, body)`.
async fn shop(answers: impl Fn(u32, Option<Value>) -> Response + Send + Sync + 'static) -> Running {
    let shop = FakeShop { answers: Arc::new(answers), asked: Arc::default(), keys: Arc::default() };
    let posted = |State(shop): State<FakeShop>, headers: HeaderMap, axum::Json(body): axum::Json<Value>| {
        std::future::ready(shop.answer(&headers, Some(body)))
    };
    let got = |State(shop): State<FakeShop>, headers: HeaderMap| std::future::ready(shop.answer(&headers, None));
    let router = Router::new()
        .route("/v1/purchases", post(posted))
        .route("/v1/purchases/{id}", get(got))
        .route("/v1/products", get(got))
        .with_state(shop.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    Running { url, shop, task }
}

fn answer(status: u16, body: &Value) -> Response {
    (StatusCode::from_u16(status).unwrap(), axum::Json(body.clone())).into_response()
}

fn refusal(status: u16, code: &str) -> Response {
    answer(status, &json!({ "error": { "code": code, "message": "not \u{1b}[31mtoday" } }))
}

struct Buyer {
    home: Home,
    sale: Sale,
    line: String,
    _dir: tempfile::TempDir,
}

fn buyer() -> Buyer {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::open(dir.path(), None).unwrap();
    let world = World::new();
    let product = world.publish(&Files::single("x", noise(3, 1)), KeyPolicy::AtRelease);
    let sale = Sale::new(vec![], vec![]);
    let line = world.ticket(&product, home.peer_id(), &sale).to_string();
    Buyer { home, sale, line, _dir: dir }
}

impl Buyer {
    fn request(&self, shop: &Running) -> BuyRequest {
        BuyRequest {
            merchant_url: shop.url.clone(),
            product: self.sale.product,
            provider: "prepaid".to_owned(),
            token: "SECRET-CODE".to_owned(),
            client: None,
            idempotency_key: None,
            place: None,
            wait: Duration::from_secs(20),
        }
    }

    fn sold(&self) -> Value {
        json!({
            "id": "0123abcd", "transaction": self.sale.transaction, "state": "released", "client": self.home.peer_id(),
            "product": self.sale.product, "amount": { "minor": 999, "currency": "USD" }, "payment": "captured",
            "ticket": self.line,
        })
    }
}

#[tokio::test]
async fn a_sale_puts_the_ticket_into_the_library() {
    let buyer = buyer();
    let sold = buyer.sold();
    let expected = json!({
        "product": buyer.sale.product, "client": buyer.home.peer_id(),
        "payment": { "provider": "prepaid", "token": "SECRET-CODE" },
    });
    let shop = shop(move |_, body| {
        assert_eq!(body, Some(expected.clone()));
        answer(201, &sold)
    })
    .await;
    let purchase = buy(&buyer.home, buyer.request(&shop)).await.unwrap();
    assert_eq!(purchase.transaction, Some(buyer.sale.transaction));
    assert_eq!(purchase.amount.unwrap().to_string(), "9.99 USD");
    assert!(purchase.in_library);
    assert!(buyer.home.library().get(&buyer.sale.transaction).unwrap().is_some());
    // The same again is the same purchase until the buyer has it, and a new one from then on.
    let purchase = buy(&buyer.home, buyer.request(&shop)).await.unwrap();
    handed_over(&buyer.home, &purchase).await.unwrap();
    buy(&buyer.home, buyer.request(&shop)).await.unwrap();
    let keys = shop.shop.keys.lock().unwrap().clone();
    assert_eq!(keys.len(), 3);
    assert_eq!(keys[0], keys[1]);
    assert_ne!(keys[1], keys[2]);
}

#[tokio::test]
async fn what_is_bought_under_a_given_key_leaves_an_attempt_under_another_alone() {
    let buyer = buyer();
    let (pending, sold) = (json!({ "id": "0123abcd", "state": "pending" }), buyer.sold());
    let shop = shop(move |n, _| answer(201, if n == 1 { &sold } else { &pending })).await;
    let request = |key: Option<&str>| BuyRequest {
        idempotency_key: key.map(str::to_owned),
        place: None,
        wait: Duration::ZERO,
        ..buyer.request(&shop)
    };
    for key in [None, Some("mine"), None] {
        let purchase = buy(&buyer.home, request(key)).await.unwrap();
        handed_over(&buyer.home, &purchase).await.unwrap();
    }
    let keys = shop.shop.keys.lock().unwrap().clone();
    assert_eq!((keys.len(), keys[1].as_str()), (3, "mine"));
    assert_eq!(keys[0], keys[2], "pending still");
}

/// Two of the same command at once: the one that comes to it when the other is done buys nothing.
#[tokio::test]
async fn where_the_ticket_was_written_meanwhile_nothing_is_bought() {
    let buyer = buyer();
    let sold = buyer.sold();
    let shop = shop(move |_, _| answer(201, &sold)).await;
    let place = buyer.home.dir().join("x.ticket");
    let request = || BuyRequest { place: Some(place.clone()), ..buyer.request(&shop) };
    let first = buy(&buyer.home, request()).await.unwrap();
    std::fs::write(&place, "the ticket").unwrap();
    // It is the same purchase until the buyer has it.
    buy(&buyer.home, request()).await.unwrap();
    handed_over(&buyer.home, &first).await.unwrap();
    let error = buy(&buyer.home, request()).await.unwrap_err();
    assert!(matches!(error, ShopError::PlaceTaken { .. }), "{error}");
    std::fs::remove_file(&place).unwrap();
    buy(&buyer.home, request()).await.unwrap();
    let keys = shop.shop.keys.lock().unwrap().clone();
    assert!(keys.len() == 3 && keys[0] == keys[1] && keys[1] != keys[2], "{keys:?}");
}

#[tokio::test]
async fn a_gift_is_not_put_into_the_buyers_library() {
    let buyer = buyer();
    let world = World::new();
    let product = world.publish(&Files::single("x", noise(3, 1)), KeyPolicy::AtRelease);
    let friend = keypair(77).peer_id();
    let mut sold = buyer.sold();
    sold["ticket"] = json!(world.ticket(&product, friend, &buyer.sale).to_string());
    let shop = shop(move |_, _| answer(201, &sold)).await;
    let purchase = buy(&buyer.home, BuyRequest { client: Some(friend), ..buyer.request(&shop) }).await.unwrap();
    assert!(!purchase.in_library && purchase.ticket.is_some());
    assert!(buyer.home.library().list().unwrap().is_empty());
    // Nothing else remembers a gift: where the buyer was not told, the same command is for the same one.
    buy(&buyer.home, BuyRequest { client: Some(friend), ..buyer.request(&shop) }).await.unwrap();
    let keys = shop.shop.keys.lock().unwrap().clone();
    assert_eq!(keys[0], keys[1]);
    // The same ticket for ourselves was not what we bought.
    let error = buy(&buyer.home, buyer.request(&shop)).await.unwrap_err();
    assert!(matches!(&error, ShopError::OtherTicket { .. }), "{error}");
}

#[tokio::test]
async fn refusals_show_code_and_message_and_are_safe_for_a_terminal() {
    let buyer = buyer();
    for (status, code) in
        [(402, "payment-declined"), (404, "unknown-product"), (422, "idempotency-conflict"), (502, "x")]
    {
        let shop = shop(move |_, _| refusal(status, code)).await;
        let error = buy(&buyer.home, buyer.request(&shop)).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(code) && text.contains("today") && !text.contains('\u{1b}'), "{text}");
        assert!(matches!(error, ShopError::Refused { status: s, .. } if s == status));
        // Refused for good: trying again is a new purchase.
        let _ = buy(&buyer.home, buyer.request(&shop)).await;
        let keys = shop.shop.keys.lock().unwrap().clone();
        assert_ne!(keys[0], keys[1], "{status}");
    }
}

#[tokio::test]
async fn what_is_not_answered_for_good_is_asked_again_under_the_same_key() {
    let buyer = buyer();
    for bad in 0..5 {
        let sold = buyer.sold();
        let shop = shop(move |n, _| match (n, bad) {
            (0, 0) => refusal(503, "not-ready"),
            (0, 1) => (StatusCode::INTERNAL_SERVER_ERROR, "<html>oops</html>").into_response(),
            (0, 2) => (StatusCode::CREATED, "not json").into_response(),
            (0, 3) => (StatusCode::CREATED, vec![b' '; 1024 * 1024]).into_response(),
            (0, _) => (StatusCode::FOUND, [("location", "http://127.0.0.1:1/")]).into_response(),
            _ => answer(201, &sold),
        })
        .await;
        let error = buy(&buyer.home, buyer.request(&shop)).await.unwrap_err();
        match bad {
            0 => assert!(matches!(error, ShopError::Refused { status: 503, .. }), "{error}"),
            3 => assert!(matches!(error, ShopError::TooLarge { .. }), "{error}"),
            _ => assert!(matches!(error, ShopError::Garbage { .. }), "{error}"),
        }
        buy(&buyer.home, buyer.request(&shop)).await.unwrap();
        let keys = shop.shop.keys.lock().unwrap().clone();
        assert_eq!(keys[0], keys[1], "case {bad}");
    }
}

#[tokio::test]
async fn what_stands_before_a_shop_that_is_away_is_not_taken_for_the_shop() {
    let buyer = buyer();
    let pending = json!({ "id": "0123abcd", "state": "pending" });
    let page = |status: u16| (StatusCode::from_u16(status).unwrap(), "<html>nginx</html>").into_response();
    // In place of the answer, and of a question after the order.
    let sold = buyer.sold();
    let shop_ = shop(move |n, _| match n {
        0 => page(502),
        1 => page(503),
        2 => answer(202, &pending),
        3..=6 => page(504),
        _ => answer(200, &sold),
    })
    .await;
    assert!(buy(&buyer.home, buyer.request(&shop_)).await.unwrap().in_library);
    let keys = shop_.shop.keys.lock().unwrap().clone();
    assert!(keys.len() == 3 && keys.iter().all(|key| *key == keys[0]), "{keys:?}");

    let shop_ = shop(move |_, _| page(503)).await;
    let error = buy(&buyer.home, buyer.request(&shop_)).await.unwrap_err();
    assert!(matches!(&error, ShopError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("HTTP 503") && error.to_string().contains("will not pay twice"), "{error}");
}

#[test]
fn a_line_that_anybody_can_read_is_known() {
    for (url, open) in [
        ("http://shop.example/", true),
        ("http://10.0.0.1:4680", true),
        ("http://127.0.0.1:4680", false),
        ("http://[::1]:4680/", false),
        ("https://shop.example/", false),
        ("nonsense", false),
    ] {
        assert_eq!(is_unencrypted(url), open, "{url}");
    }
}

#[tokio::test]
async fn a_pending_order_is_followed_to_its_end() {
    let buyer = buyer();
    let pending = json!({ "id": "0123abcd", "state": "pending", "waiting": "the manager is away" });
    let (sold, first) = (buyer.sold(), pending.clone());
    let shop_ = shop(move |n, _| match n {
        0 => answer(202, &first),
        1 => refusal(503, "not-ready"),
        _ => answer(200, &sold),
    })
    .await;
    assert!(buy(&buyer.home, buyer.request(&shop_)).await.unwrap().in_library);

    let first = pending.clone();
    let declined = json!({
        "id": "0123abcd", "state": "expired", "error": { "code": "reservation-expired", "message": "too late" }
    });
    let shop_ = shop(move |n, _| if n == 0 { answer(202, &first) } else { answer(200, &declined) }).await;
    let error = buy(&buyer.home, buyer.request(&shop_)).await.unwrap_err().to_string();
    assert!(error.contains("expired") && error.contains("too late"), "{error}");

    // Whoever does not wait gets the order, and the next call goes on with it.
    let shop_ = shop(move |_, _| answer(202, &pending)).await;
    let request = || BuyRequest { wait: Duration::ZERO, ..buyer.request(&shop_) };
    let purchase = buy(&buyer.home, request()).await.unwrap();
    assert_eq!((purchase.state.as_str(), purchase.ticket.is_none()), ("pending", true));
    buy(&buyer.home, request()).await.unwrap();
    let keys = shop_.shop.keys.lock().unwrap().clone();
    assert_eq!(keys[0], keys[1]);
}

#[tokio::test]
async fn hostile_orders_and_addresses_are_refused() {
    let buyer = buyer();
    for id in ["../../admin", "", "a/b", "a?b", &"x".repeat(200)] {
        let mut sold = buyer.sold();
        sold["id"] = json!(id);
        let shop = shop(move |_, _| answer(201, &sold)).await;
        let error = buy(&buyer.home, buyer.request(&shop)).await.unwrap_err();
        assert!(matches!(error, ShopError::Garbage { .. }), "{id}: {error}");
    }
    let mut sold = buyer.sold();
    sold["ticket"] = json!(&buyer.line[..buyer.line.len() - 5]);
    let shop = shop(move |_, _| answer(201, &sold)).await;
    let error = buy(&buyer.home, buyer.request(&shop)).await.unwrap_err();
    assert!(matches!(error, ShopError::OtherTicket { .. }), "{error}");
    for url in ["", "shop", "ftp://shop", "http://shop/?q", "http://"] {
        let request = BuyRequest { merchant_url: url.to_owned(), ..buyer.request(&shop) };
        assert!(matches!(buy(&buyer.home, request).await, Err(ShopError::Url { .. })), "{url}");
    }
    let request = BuyRequest { idempotency_key: Some("\n".into()), ..buyer.request(&shop) };
    assert!(matches!(buy(&buyer.home, request).await, Err(ShopError::Key)));
}

#[tokio::test]
async fn a_shop_that_is_not_there_says_so() {
    let buyer = buyer();
    let shop = shop(|_, _| refusal(500, "x")).await;
    let mut request = buyer.request(&shop);
    request.merchant_url = "http://127.0.0.1:1/".to_owned();
    let error = buy(&buyer.home, request).await.unwrap_err().to_string();
    assert!(error.contains("cannot be reached") && error.contains("will not pay twice"), "{error}");
    let error = products("http://127.0.0.1:1/").await.unwrap_err().to_string();
    assert!(error.contains("cannot be reached") && !error.contains("pay"), "nothing is bought: {error}");
}

#[tokio::test]
async fn products_are_read_page_by_page() {
    let product = |n: u8| {
        json!({
            "id": ProductId::from_bytes([n; 16]), "title": "A\u{7}lbum", "price": { "minor": 5, "currency": "EUR" },
            "policy": "on-completion", "plain_bytes": 10, "content_bytes": 90, "files": 1, "manifest": "00",
        })
    };
    let pages = [
        json!({ "products": [product(1), product(2)], "next": ProductId::from_bytes([2; 16]), "fetched_at": 1 }),
        json!({ "products": [product(3)], "fetched_at": 1 }),
    ];
    let shop = shop(move |n, _| answer(200, &pages[n as usize])).await;
    let offers = products(&shop.url).await.unwrap();
    assert_eq!(offers.len(), 3);
    assert_eq!(offers[0].policy, Some(KeyPolicy::OnCompletion));
    assert_eq!(offers[0].title, "A\u{fffd}lbum");
}
