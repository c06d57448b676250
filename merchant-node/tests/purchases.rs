//! What buyers get to see: every answer of the HTTP API, over real HTTP, against a manager over real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]

mod market;

use futures::future::join_all;
use market::{Fault, LIMIT, Market, Reply, body, client, eventually};
use protocol::ids::ProductId;
use protocol::ticket::{Admission, TicketEnvelope};
use protocol::trust::RevocationState;
use protocol::{Keypair, RefusalCode};
use reqwest::Method;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purchase_gives_a_ticket_that_seeders_accept() {
    let market = Market::new().await;
    let shop = market.open().await;
    let code = shop.voucher(2_000).await;

    let bought = shop.post("key-1", &body(&market.manager, "prepaid", &code)).await;
    assert_eq!(bought.status, 201, "{:?}", bought.json());
    let json = bought.json();
    assert_eq!(json["state"], "released");
    assert_eq!(json["client"], client().peer_id().to_string());
    assert_eq!(json["product"], market.manager.product().to_string());
    assert_eq!(json["amount"], json!({ "minor": 999, "currency": "USD" }));
    let envelope: TicketEnvelope = json["ticket"].as_str().unwrap().parse().unwrap();
    let data = envelope.ticket.data.peek().unwrap();
    assert_eq!(json["transaction"], data.transaction.to_string());
    assert_eq!(data.merchant, shop.running.peer_id());
    let admission = Admission {
        peer: client().peer_id(),
        seeder: Keypair::from_seed(&[50; 32]).peer_id(),
        trust: &market.manager.trust(),
        revoked: &RevocationState::default(),
        informed: None,
        continuation_ms: 0,
        now: envelope.ticket.lease.peek().unwrap().start,
    };
    envelope.ticket.check(&admission).unwrap();
    let lease = envelope.ticket.lease.peek().unwrap();
    envelope.grant.as_ref().unwrap().open(&client(), &data, &lease).unwrap();

    let shown = shop.get(&format!("/v1/purchases/{}", bought.id())).await;
    assert_eq!((shown.status, &shown.json()["ticket"]), (200, &json["ticket"]));
    shop.at_stage(&market.dir, &bought.id(), "done").await;
    assert_eq!(shop.balance(&market.dir).await, (1_001, 0, 999));
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_be_read_without_buying() {
    let market = Market::new().await;
    let shop = market.open().await;
    let products = eventually("catalogue", || async {
        let json = shop.get("/v1/products").await.json();
        (json["products"].as_array().is_some_and(|p| p.len() == 1)).then_some(json)
    })
    .await;
    assert_eq!(products["products"][0]["title"], "An album");
    assert_eq!(products["products"][0]["price"]["minor"], 999);
    assert_eq!(products["products"][0]["policy"], "at-release");
    assert_eq!(shop.get("/v1/products?after=x").await.error(), (400, "malformed".to_owned()));
    let last = format!("/v1/products?after={}", market.manager.product());
    assert_eq!(shop.get(&last).await.json()["products"], json!([]));

    let api = shop.get("/openapi.json").await.json();
    for path in ["/v1/products", "/v1/purchases", "/v1/purchases/{id}", "/health"] {
        assert!(api["paths"][path].is_object(), "{path} is missing");
    }
    assert!(api["components"]["schemas"]["PurchaseRequest"]["properties"]["payment"].is_object());
    assert_eq!(shop.get("/health").await.json(), json!({ "ok": true, "reasons": [] }));
    let status = shop.control(&market.dir, json!({ "cmd": "status" })).await.unwrap();
    assert_eq!((&status["role"], &status["enrolled"]), (&json!("merchant"), &json!(true)));
    assert_eq!(shop.get("/elsewhere").await.error(), (404, "not-found".to_owned()));
    assert_eq!(shop.get("/v1/purchases").await.error(), (405, "method-not-allowed".to_owned()));
    for id in ["x", "00000000000000000000000000000000", &market.manager.product().to_string()] {
        assert_eq!(shop.get(&format!("/v1/purchases/{id}")).await.error(), (404, "unknown-purchase".to_owned()));
    }
    // More than one page of the manager's, and a product that came after the catalogue was fetched.
    for n in 0..230u8 {
        market.manager.add_product(ProductId::new(5_000, [n; 10]));
    }
    let new = shop.voucher(1_000).await;
    let mut wanted = body(&market.manager, "prepaid", &new);
    wanted["product"] = json!(ProductId::new(5_000, [200; 10]).to_string());
    assert_eq!(shop.post("new", &wanted).await.status, 201);
    assert_eq!(shop.get("/v1/products").await.json()["products"].as_array().unwrap().len(), 231);
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_fault_of_a_request_has_its_own_name() {
    let market = Market::new().await;
    let shop = market.open().await;
    let code = shop.voucher(500).await;
    let good = body(&market.manager, "prepaid", &code);
    let with = |path: &[&str], value: Value| {
        let mut changed = good.clone();
        let mut place = &mut changed;
        for name in path {
            place = &mut place[*name];
        }
        *place = value;
        changed
    };
    let order_two = {
        let mut key = [0xff; 32];
        (key[0], key[31]) = (0xec, 0x7f);
        protocol::PeerId::from_bytes(key).to_string()
    };
    let other = Keypair::from_seed(&[1; 32]).peer_id().to_string();
    let unknown_voucher = "0000-0000-0000-0000-0000-0000-000";
    let unknown_product = ProductId::new(1, [0; 10]).to_string();
    let cases: Vec<(Value, u16, &str, &str)> = vec![
        (with(&["client"], json!("QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC")), 400, "invalid-client", "Ed25519"),
        (with(&["client"], json!(other[..other.len() - 1])), 400, "invalid-client", "peer ID"),
        (with(&["client"], json!("")), 400, "invalid-client", "peer ID"),
        (with(&["client"], json!(order_two)), 400, "invalid-client", "usable"),
        (with(&["product"], json!("album")), 400, "invalid-product", "product id"),
        (with(&["product"], json!(unknown_product)), 404, "unknown-product", "/v1/products"),
        (with(&["payment", "provider"], json!("gold")), 400, "unknown-payment-provider", "prepaid"),
        (with(&["payment", "token"], json!("nonsense!")), 402, "payment-declined", "voucher code"),
        (with(&["payment", "token"], json!(unknown_voucher)), 402, "payment-declined", "no such voucher"),
        (good.clone(), 402, "payment-declined", "short by 4.99 USD"),
        (with(&["coupon"], json!(1)), 400, "malformed", "coupon"),
        (with(&["payment", "tip"], json!(1)), 400, "malformed", "tip"),
        (json!({ "product": 1 }), 400, "malformed", "expected a string"),
        (json!([]), 400, "malformed", "purchase"),
    ];
    for (n, (body, status, code, says)) in cases.into_iter().enumerate() {
        let reply = shop.post(&format!("case-{n}"), &body).await;
        assert_eq!(reply.error(), (status, code.to_owned()), "{body}");
        assert!(reply.message().contains(says), "{}", reply.message());
    }

    let post = || shop.request(Method::POST, "/v1/purchases");
    let send = async |request: reqwest::RequestBuilder| Reply::of(request.send().await.unwrap()).await.error();
    assert_eq!(send(post().json(&good)).await, (400, "missing-idempotency-key".to_owned()));
    for key in ["", &"k".repeat(65), "caf\u{e9}"] {
        let key = reqwest::header::HeaderValue::from_bytes(key.as_bytes()).unwrap();
        let reply = send(post().json(&good).header("idempotency-key", key)).await;
        assert_eq!(reply, (400, "bad-idempotency-key".to_owned()));
    }
    let keyed = || post().header("idempotency-key", "k");
    let kind = "content-type";
    assert_eq!(send(keyed().body(good.to_string())).await, (415, "unsupported-media-type".to_owned()));
    let text = keyed().header(kind, "text/plain").body(good.to_string());
    assert_eq!(send(text).await, (415, "unsupported-media-type".to_owned()));
    let cut = keyed().header(kind, "application/json; charset=utf-8").body("{\"product\":");
    assert_eq!(send(cut).await, (400, "malformed".to_owned()));
    for extra in [0usize, 1] {
        let edge = keyed().header(kind, "application/json").body(" ".repeat(64 * 1024 + extra));
        let expected = if extra == 0 { (400, "malformed") } else { (413, "too-large") };
        assert_eq!(send(edge).await, (expected.0, expected.1.to_owned()));
    }
    assert_eq!(market.manager.reserve_calls(), 0);
    assert_eq!(shop.balance(&market.dir).await, (500, 0, 0));
    let orders = shop.control(&market.dir, json!({ "cmd": "orders" })).await.unwrap();
    assert_eq!(orders["orders"], json!([]), "faulty requests leave nothing behind");
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_buys_once() {
    let market = Market::new().await;
    let shop = market.open().await;
    // Exactly one purchase's worth: a second hold would be declined.
    let code = shop.voucher(999).await;
    let request = body(&market.manager, "prepaid", &code);
    let replies = join_all((0..20).map(|_| shop.post("same", &request))).await;
    for reply in &replies {
        assert_eq!(reply.status, 201, "{:?}", reply.json());
        assert_eq!(reply.bytes, replies[0].bytes);
    }
    assert_eq!((market.manager.reservations(), market.manager.reserve_calls()), (1, 1));
    let mut other = request.clone();
    other["client"] = json!(Keypair::from_seed(&[5; 32]).peer_id().to_string());
    assert_eq!(shop.post("same", &other).await.error(), (422, "idempotency-conflict".to_owned()));
    shop.at_stage(&market.dir, &replies[0].id(), "done").await;
    assert_eq!(shop.balance(&market.dir).await, (0, 0, 999));

    let spent = shop.post("another", &request).await;
    assert_eq!(spent.error(), (402, "payment-declined".to_owned()));
    assert!(spent.message().contains("spent: short by 9.99 USD"), "{}", spent.message());
    shop.stop().await;

    let shop = market.open().await;
    assert_eq!(shop.post("same", &request).await.bytes, replies[0].bytes, "also after a restart");
    assert_eq!(market.manager.reserve_calls(), 1);
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_purchases_at_once_are_told_to_come_back() {
    let mut market = Market::new().await;
    market.config.purchases_at_once = 1;
    let shop = market.open().await;
    market.manager.fault(Fault::HoldReserve);
    let request = body(&market.manager, "cash", "a");
    let (first, second) = tokio::join!(shop.post("a", &request), async {
        eventually("first at the manager", || async { (market.manager.reserve_calls() == 1).then_some(()) }).await;
        let request = shop.request(Method::POST, "/v1/purchases").header("idempotency-key", "b").json(&request);
        let response = request.send().await.unwrap();
        assert!(response.headers().contains_key("retry-after"));
        let second = Reply::of(response).await;
        market.manager.fault(Fault::None);
        second
    });
    assert_eq!(first.status, 201);
    assert_eq!(second.error(), (429, "overloaded".to_owned()));
    assert_eq!(shop.post("b", &request).await.status, 201, "a refused request leaves its key free");
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_for_what_is_not_on_sale_holds_no_place_of_those_who_buy() {
    let mut market = Market::new().await;
    market.config.purchases_at_once = 1;
    let shop = market.open().await;
    let good = body(&market.manager, "cash", "a");
    assert_eq!(shop.post("first", &good).await.status, 201);
    let mut unknown = good.clone();
    unknown["product"] = json!(ProductId::new(1, [0; 10]).to_string());
    market.manager.fault(Fault::HoldProducts);
    let (looked, bought) = tokio::join!(shop.post("unknown", &unknown), async {
        eventually("the catalogue is asked for", || async { (market.manager.held() > 0).then_some(()) }).await;
        let bought = shop.post("good", &good).await;
        market.manager.fault(Fault::None);
        bought
    });
    assert_eq!(bought.status, 201, "{}", String::from_utf8_lossy(&bought.bytes));
    assert_eq!(looked.error(), (404, "unknown-product".to_owned()));
    // Nor does one of them, who gives up, end what others wait for: what is new is sold at once.
    let new = ProductId::new(2, [1; 10]);
    market.manager.add_product(new);
    unknown["product"] = json!(new.to_string());
    assert_eq!(shop.post("new", &unknown).await.status, 201);
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_manager_away_orders_are_taken_and_go_on_later() {
    let market = Market::new().await;
    let shop = market.open().await;
    eventually("catalogue", || async {
        (shop.get("/v1/products").await.json()["products"][0]["title"] == "An album").then_some(())
    })
    .await;
    let code = shop.voucher(1_000).await;
    market.manager.down().await;
    let request = body(&market.manager, "prepaid", &code);
    let pending = shop.post("k", &request).await;
    assert_eq!((pending.status, &pending.json()["state"]), (202, &json!("pending")), "{}", pending.json());
    assert!(pending.json().get("ticket").is_none());
    let health = shop.get("/health").await;
    assert_eq!(health.status, 200);
    assert!(health.json()["reasons"][0].as_str().unwrap().contains("manager"), "{}", health.json());
    market.manager.up().await;
    let path = format!("/v1/purchases/{}", pending.id());
    let released = eventually("released", || async {
        let json = shop.get(&path).await.json();
        (json["state"] == "released").then_some(json)
    })
    .await;
    assert!(released["ticket"].as_str().unwrap().starts_with("willcall:"));
    assert_eq!(shop.post("k", &request).await, pending, "the first answer, to the byte");
    assert_eq!(market.manager.reservations(), 1);
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_sold_before_enrolment() {
    let market = Market::new().await;
    market.manager.refuse_enrolment(Some(RefusalCode::BadInvitation));
    let shop = market::Shop::of(market.start().await);
    let request = body(&market.manager, "cash", "a");
    for reply in [shop.get("/v1/products").await, shop.post("k", &request).await] {
        assert_eq!(reply.error(), (503, "not-enrolled".to_owned()));
    }
    eventually("the reason", || async {
        let health = shop.get("/health").await;
        assert_eq!(health.status, 503);
        health.json()["reasons"][0].as_str().unwrap().contains("bad-invitation").then_some(())
    })
    .await;
    market.manager.down().await;
    eventually("the manager missed", || async {
        let status = shop.control(&market.dir, json!({ "cmd": "status" })).await.unwrap();
        (status["manager"]["reachable"] == false && status["enrolled"] == false).then_some(())
    })
    .await;
    market.manager.refuse_enrolment(None);
    market.manager.up().await;
    eventually("enrolled", || async { shop.running.not_ready().is_none().then_some(()) }).await;
    assert_eq!(shop.post("k", &request).await.status, 201, "the key of a refused request is free");
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_of_the_manager_reach_the_buyer_by_name_and_free_the_money() {
    let market = Market::new().await;
    let shop = market.open().await;
    let code = shop.voucher(999).await;
    let request = body(&market.manager, "prepaid", &code);
    let cases = [
        (Fault::RefuseReserve(RefusalCode::PriceBelowFloor), 409, "price-below-floor", "cancelled"),
        (Fault::RefuseReserve(RefusalCode::UnknownProduct), 404, "unknown-product", "cancelled"),
        (Fault::RefuseReserve(RefusalCode::LimitReached), 502, "limit-reached", "cancelled"),
        (Fault::RefuseRelease(RefusalCode::NotEnrolled), 502, "not-enrolled", "cancelled"),
        (Fault::RefuseRelease(RefusalCode::ReservationExpired), 410, "reservation-expired", "expired"),
        (Fault::RefuseRelease(RefusalCode::LimitReached), 502, "limit-reached", "cancelled"),
    ];
    for (n, (fault, status, code, stage)) in cases.into_iter().enumerate() {
        market.manager.fault(fault);
        let key = format!("case-{n}");
        let refused = shop.post(&key, &request).await;
        assert_eq!(refused.error(), (status, code.to_owned()), "{fault:?}");
        let order = shop.only_order_at(&market.dir, stage).await;
        let shown = shop.get(&format!("/v1/purchases/{order}")).await.json();
        assert_eq!((&shown["state"], &shown["error"]["code"]), (&json!(stage), &json!(code)));
        assert_eq!(shown["payment"], "returned");
        assert_eq!(shop.balance(&market.dir).await, (999, 0, 0));
        market.manager.fault(Fault::None);
        assert_eq!(shop.post(&key, &request).await, refused, "the first answer stays");
    }
    let declined = shop.post("cash", &body(&market.manager, "cash", "refused")).await;
    assert_eq!(declined.error(), (402, "payment-declined".to_owned()));
    shop.only_order_at(&market.dir, "declined").await;
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_do_not_hold_sell_nothing() {
    let market = Market::new().await;
    let shop = market.open().await;
    let code = shop.voucher(999).await;
    let request = body(&market.manager, "prepaid", &code);
    let cases = [
        (Fault::OtherClient, "bad-manager-signature", false),
        (Fault::OtherMerchant, "bad-manager-signature", false),
        (Fault::OtherProduct, "bad-manager-signature", false),
        (Fault::OtherPrice, "bad-manager-signature", false),
        (Fault::OtherNetwork, "wrong-network", false),
        (Fault::ForeignKey, "unknown-key", false),
        (Fault::OtherEndorsement, "bad-manager-signature", true),
        (Fault::NoEndorsement, "bad-endorsement", true),
        (Fault::ForeignLease, "unknown-key", true),
        (Fault::LeaseOtherClient, "bad-manager-signature", true),
        (Fault::NoGrant, "bad-manager-signature", true),
    ];
    for (n, (fault, code, revoked)) in cases.into_iter().enumerate() {
        market.manager.fault(fault);
        let refunds = market.manager.refund_calls();
        let reply = shop.post(&format!("case-{n}"), &request).await;
        assert_eq!(reply.error(), (502, code.to_owned()), "{fault:?}");
        shop.only_order_at(&market.dir, "cancelled").await;
        assert_eq!(shop.balance(&market.dir).await, (999, 0, 0), "{fault:?}");
        // A sale that the manager released is revoked there before the money goes back.
        assert_eq!(market.manager.refund_calls() - refunds, usize::from(revoked), "{fault:?}");
    }
    assert_eq!(market.manager.endorsements().len(), 5, "nothing is endorsed that was not what was ordered");
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refunds_revoke_first_and_pay_back_once() {
    let market = Market::new().await;
    let shop = market.open().await;
    let code = shop.voucher(999).await;
    let bought = shop.post("k", &body(&market.manager, "prepaid", &code)).await;
    shop.at_stage(&market.dir, &bought.id(), "done").await;
    let refund = json!({ "cmd": "refund", "order": bought.id() });

    market.manager.fault(Fault::RefuseRefund(RefusalCode::WrongState));
    let refused = shop.control(&market.dir, refund.clone()).await.unwrap_err().to_string();
    assert!(refused.contains("wrong-state"), "{refused}");
    assert_eq!(shop.stage(&market.dir, &bought.id()).await, "done");
    assert_eq!(shop.balance(&market.dir).await, (0, 0, 999));

    market.manager.fault(Fault::None);
    for _ in 0..2 {
        let done = shop.control(&market.dir, refund.clone()).await.unwrap();
        assert_eq!(done["stage"], "refunded");
        assert_eq!(shop.balance(&market.dir).await, (999, 0, 0));
    }
    let shown = shop.get(&format!("/v1/purchases/{}", bought.id())).await.json();
    assert_eq!((&shown["state"], shown.get("ticket")), (&json!("refunded"), None));
    let unknown = json!({ "cmd": "refund", "order": "00000000000000000000000000000000" });
    assert!(shop.control(&market.dir, unknown).await.unwrap_err().to_string().contains("unknown-order"));
    let malformed = shop.control(&market.dir, json!({ "cmd": "refund" })).await.unwrap_err().to_string();
    assert!(malformed.contains("order"), "{malformed}");

    let issue = json!({ "cmd": "vouchers-issue", "amount": "12.50", "currency": "USD", "count": 3 });
    let issued = shop.control(&market.dir, issue).await.unwrap();
    assert_eq!(issued["amount"]["minor"], 1250);
    assert_eq!(issued["codes"].as_array().unwrap().len(), 3);
    shop.running.stop(LIMIT).await.unwrap();
    market.manager.down().await;
}
