//! The twelve steps of a sale, one function each over one network, by what each leaves behind where anybody could look.

use client_node::FetchOutcome;
use manager_node::Published;
use protocol::ticket::TicketEnvelope;
use protocol::{PeerId, TransactionId};
use serde_json::{Value, json};
use testnet::adversary::{Outcome, Tampering, present};
use testnet::{Client, Goods, Network, Plan, Terms};

use crate::{KIB, assert_counted, assert_same, by_ticket, show_logs};

/// One sale, done once; the tests look at what it left.
struct Sale {
    network: Network,
    goods: Goods,
    product: Published,
    buyer: Client,
    receiver: Client,
    order: Value,
    id: TransactionId,
    ticket: TicketEnvelope,
    outcome: FetchOutcome,
    settled: Value,
}

async fn make() -> Sale {
    show_logs();
    let network = Network::start(Plan::new(2)).await.unwrap();
    let (goods, product) = network.publish_noise("An album", 700 * KIB, &Terms::default()).await.unwrap();
    // A gift: the buyer designates another client.
    let (buyer, receiver) = (network.client("buyer").await.unwrap(), network.client("receiver").await.unwrap());
    let voucher = network.voucher(10_000).await.unwrap();
    let merchant = &network.merchants[0];
    let purchase = buyer.buy(merchant, product.product, &voucher, Some(receiver.peer())).await.unwrap();
    let order = merchant.control(json!({"cmd": "order", "order": purchase.order})).await.unwrap();
    let (id, ticket) = (purchase.transaction.unwrap(), purchase.ticket.unwrap());
    let outcome = receiver.fetch_all(by_ticket(&ticket)).await.unwrap();
    let settled = network.until_state(id, "settled").await.unwrap();
    Sale { network, goods, product, buyer, receiver, order, id, ticket, outcome, settled }
}

/// One test, because a runtime that ends takes its nodes with it; a step that fails is named in the backtrace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_twelve_steps() {
    let sale = make().await;
    step_01_purchase_request(&sale).await;
    step_02_designation_of_the_client(&sale);
    step_03_payment_data(&sale).await;
    step_04_reservation_request(&sale);
    step_05_transaction_data_binds_product_and_client(&sale);
    step_06_transaction_data_alone_opens_nothing(&sale).await;
    step_07_delivery_request_makes_the_lease(&sale);
    step_08_ticket_reaches_the_client(&sale).await;
    step_09_ticket_is_presented_by_its_client_only(&sale).await;
    step_10_product_comes_out_of_the_ticket(&sale);
    step_11_product_arrives(&sale);
    step_12_completion_is_signalled_and_counted(&sale).await;
    sale.network.stop().await.unwrap();
}

async fn step_01_purchase_request(sale: &Sale) {
    let offers = client_node::products(&sale.network.merchants[0].url().unwrap()).await.unwrap();
    assert!(offers.iter().any(|offer| offer.id == sale.product.product && offer.price == sale.product.price));
    assert_eq!(sale.order["product"], sale.product.product.to_string());
}

fn step_02_designation_of_the_client(sale: &Sale) {
    assert_ne!(sale.buyer.peer(), sale.receiver.peer());
    assert_eq!(sale.order["client"], sale.receiver.peer().to_string());
    assert_eq!(sale.settled["client"], sale.receiver.peer().to_string());
}

async fn step_03_payment_data(sale: &Sale) {
    let merchant = &sale.network.merchants[0];
    let vouchers = merchant.control(json!({"cmd": "vouchers-list"})).await.unwrap();
    let spent: u64 = vouchers["vouchers"].as_array().unwrap().iter().filter_map(|v| v["spent"].as_u64()).sum();
    assert!(spent >= 999, "{vouchers}");
    assert_eq!(sale.order["provider"], "prepaid");
}

fn step_04_reservation_request(sale: &Sale) {
    // The manager knows the sale by the merchant's name of the order.
    assert_eq!(sale.settled["order"], sale.order["order"]);
    assert_eq!(sale.settled["merchant"], sale.network.merchants[0].running().unwrap().peer_id().to_string());
}

fn step_05_transaction_data_binds_product_and_client(sale: &Sale) {
    let data = sale.ticket.ticket.data.peek().unwrap();
    assert_eq!((data.transaction, data.product), (sale.id, sale.product.product));
    assert_eq!((data.client, data.manifest), (sale.receiver.peer(), sale.product.manifest));
}

async fn step_06_transaction_data_alone_opens_nothing(sale: &Sale) {
    let at = sale.network.seeders[0].at().unwrap();
    let refused = present(sale.receiver.home().keypair(), &sale.ticket, Tampering::NoEndorsement, &at).await.unwrap();
    assert!(matches!(&refused, Outcome::Refused(no) if no.code.as_str() == "bad-endorsement"), "{refused:?}");
}

fn step_07_delivery_request_makes_the_lease(sale: &Sale) {
    let (endorsement, lease) = (sale.ticket.ticket.endorsement.clone().unwrap(), &sale.ticket.ticket.lease);
    assert_eq!(endorsement.peek().unwrap().transaction_data, sale.ticket.ticket.data.digest());
    let lease = lease.peek().unwrap();
    assert_eq!((lease.endorsement, lease.client), (endorsement.digest(), sale.receiver.peer()));
    let origin = sale.network.manager.origin().unwrap();
    let mut listed: Vec<PeerId> = sale.network.seeders.iter().map(|seeder| seeder.peer()).collect();
    listed.push(origin);
    assert!(lease.sources.iter().all(|source| listed.contains(source)) && lease.sources.contains(&origin));
}

async fn step_08_ticket_reaches_the_client(sale: &Sale) {
    // The buyer has it in the answer; the client finds it in the mailbox.
    let inbox = client_node::inbox(sale.receiver.home(), None, &client_node::LinkOptions::default()).await.unwrap();
    assert!(inbox.items.iter().any(|item| item.transaction == sale.id), "{inbox:?}");
    let status = client_node::status(sale.buyer.home()).await.unwrap();
    assert!(status.iter().all(|line| line.transaction != sale.id), "a gift is in the giver's library");
}

async fn step_09_ticket_is_presented_by_its_client_only(sale: &Sale) {
    let at = sale.network.seeders[1].at().unwrap();
    let refused = present(sale.buyer.home().keypair(), &sale.ticket, Tampering::None, &at).await.unwrap();
    assert!(matches!(&refused, Outcome::Refused(no) if no.code.as_str() == "wrong-client"), "{refused:?}");
}

fn step_10_product_comes_out_of_the_ticket(sale: &Sale) {
    // Nothing in the request names a product: what came is what the ticket's manifest says.
    let content = sale.network.seeders[0].running().unwrap().contents().get(&sale.product.manifest).unwrap();
    assert_eq!(content.manifest().root, sale.product.root);
    assert_eq!(content.manifest().length, sale.product.content_bytes);
}

fn step_11_product_arrives(sale: &Sale) {
    assert_same(&sale.goods, &sale.outcome.path);
    assert_eq!(sale.outcome.bytes, sale.product.content_bytes);
}

async fn step_12_completion_is_signalled_and_counted(sale: &Sale) {
    assert_eq!(sale.settled["deliveries"][0]["completed"], true);
    assert_counted(&sale.network, sale.id, &sale.outcome, sale.product.chunks, &[]).await;
    let receipts = sale.network.receipts().await.unwrap();
    let counted = receipts.iter().filter(|r| r["transaction"] == sale.id.to_string() && r["status"] == "counted");
    assert!(counted.count() >= 1, "{receipts:?}");
}
