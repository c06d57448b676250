//! The fair exchange, row by row: whoever goes silent, at whichever step, in the end the buyer has paid exactly if the
//! client has the goods. (Dying between the steps, at each of them, is what the crash matrix of the binary does.)

use client_node::{FetchPhase, Target};
use protocol::TransactionId;
use protocol::manifest::KeyPolicy;
use serde_json::{Value, json};
use testnet::{Client, Goods, Network, Plan, Terms, until};

use crate::{KIB, assert_same, show_logs};

const PRICE: u64 = 999;
/// Of each purchase's own voucher.
const VOUCHER: u64 = 10_000;

/// Who says nothing more, from when on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silent {
    /// The client never comes for its goods.
    ClientFromTheStart,
    /// It stops half way.
    ClientHalfWay,
    /// It has all of it, has said so, and does not ask for the key.
    ClientAfterItsWord,
    /// The manager is away when everything is there, and comes back.
    ManagerBeforeTheKey,
    /// … and comes back when the lease is long over.
    ManagerPastTheLease,
    /// The merchant is gone with the ticket handed out, and comes back after everything.
    MerchantAfterTheTicket,
    /// Seeder and origin die with the last chunk sent, before any receipt.
    SeedersAfterTheGoods,
}

/// What must come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// Goods and money changed hands.
    Exchanged,
    /// Neither did.
    Nothing,
    /// One or the other, by who is first: the receipts with the client's word, or the clock.
    Either,
}

const TABLE: [(Silent, Ends); 7] = [
    (Silent::ClientFromTheStart, Ends::Nothing),
    (Silent::ClientHalfWay, Ends::Nothing),
    (Silent::ClientAfterItsWord, Ends::Exchanged),
    (Silent::ManagerBeforeTheKey, Ends::Exchanged),
    (Silent::ManagerPastTheLease, Ends::Either),
    (Silent::MerchantAfterTheTicket, Ends::Exchanged),
    (Silent::SeedersAfterTheGoods, Ends::Exchanged),
];

/// Rows that end with a lease: theirs is brief.
fn is_brief(silent: Silent) -> bool {
    matches!(silent, Silent::ClientFromTheStart | Silent::ClientHalfWay | Silent::ManagerPastTheLease)
}

/// Cents on all vouchers that are held, and that are spent.
async fn money(network: &Network) -> (u64, u64) {
    let answer = network.merchants[0].control(json!({"cmd": "vouchers-list"})).await.unwrap();
    let lines = answer["vouchers"].as_array().unwrap();
    let sum = |name: &str| lines.iter().filter_map(|v| v[name].as_u64()).sum();
    let all: u64 = sum("available");
    let (held, spent) = (sum("held"), sum("spent"));
    assert_eq!(all + held + spent, VOUCHER * lines.len() as u64, "{answer}");
    (held, spent)
}

/// Everything up to the silence, and the return of whoever returns.
async fn play(network: &mut Network, client: &Client, id: TransactionId, silent: Silent) {
    let slow = || Client::slow_options(400 * KIB);
    let mut fetch = match silent {
        Silent::ClientFromTheStart => return,
        _ => client.fetch(Target::Transaction(id), slow()),
    };
    fetch.chunks(2).await.unwrap();
    match silent {
        Silent::ClientFromTheStart => {}
        Silent::ClientHalfWay => drop(fetch.stop().await),
        Silent::ClientAfterItsWord | Silent::ManagerBeforeTheKey | Silent::ManagerPastTheLease => {
            let lease_end = network.transaction(id).await.unwrap()["release"]["lease_end"].as_u64().unwrap();
            network.manager.crash().await;
            let waits = |p: &client_node::FetchProgress| p.phase == FetchPhase::AwaitingKey && p.waiting.is_some();
            fetch.until("waiting for the key", waits).await.unwrap();
            if silent == Silent::ManagerPastTheLease {
                until("the lease's end", || async { (now_ms() > lease_end + 500).then_some(()) }).await.unwrap();
            }
            if silent == Silent::ClientAfterItsWord {
                drop(fetch.stop().await);
                network.manager.start().await.unwrap();
            } else {
                network.manager.start().await.unwrap();
                // With the key or a refusal.
                drop(fetch.done().await);
            }
        }
        Silent::MerchantAfterTheTicket => {
            network.merchants[0].crash().await;
            fetch.done().await.unwrap();
            // The books do not wait for the shop: it owes the sale from now on.
            let shown = network.transaction(id).await.unwrap();
            assert_eq!(shown["release"]["captured"], true, "{shown}");
            network.merchants[0].start().await.unwrap();
        }
        Silent::SeedersAfterTheGoods => {
            fetch
                .until("all of it", |p| !matches!(p.phase, FetchPhase::Preparing | FetchPhase::Fetching))
                .await
                .unwrap();
            network.seeders[0].crash().await;
            network.manager.crash_origin().await.unwrap();
            fetch.done().await.unwrap();
            network.seeders[0].start().await.unwrap();
        }
    }
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_millis()).unwrap()
}

/// The client tries once more whatever it can; has it the goods?
async fn has_goods(client: &Client, id: TransactionId, goods: &Goods) -> bool {
    match client.fetch(Target::Transaction(id), Client::options()).done().await {
        Ok(outcome) => {
            assert_same(goods, &outcome.path);
            true
        }
        Err(error) => {
            assert!(["revoked", "expired"].contains(&error.cause()), "{error}");
            false
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_goes_silent_the_buyer_has_paid_exactly_if_the_client_has_the_goods() {
    show_logs();
    let mut network = Network::start(Plan::new(1).manager(|config| config.close_grace_ms = 300)).await.unwrap();
    let terms = |lease_ms| Terms { policy: KeyPolicy::OnCompletion, lease_ms, ..Terms::default() };
    let (goods, lasting) = network.publish_noise("goods", 400 * KIB, &terms(None)).await.unwrap();
    let (brief_goods, brief) = network.publish_noise("brief", 400 * KIB, &terms(Some(2500))).await.unwrap();
    let mut spent_before = 0;
    for (number, (silent, ends)) in TABLE.into_iter().enumerate() {
        let client = network.client(&format!("client-{number}")).await.unwrap();
        let (product, goods) = if is_brief(silent) { (&brief, &brief_goods) } else { (&lasting, &goods) };
        let purchase = network.buy(&client, product.product).await.unwrap();
        let (id, ticket) = (purchase.transaction.unwrap(), purchase.ticket.clone().unwrap());
        assert!(ticket.grant.is_none(), "no key before the completion");
        assert_eq!(money(&network).await, (PRICE, spent_before), "{silent:?}: held and not taken");
        play(&mut network, &client, id, silent).await;

        // Nothing is left in the air, at the manager or at the shop.
        let over = || async {
            let shown: Value = network.transaction(id).await.ok()?;
            let state = shown["state"].as_str()?.to_owned();
            let held = money(&network).await.0;
            (held == 0 && ["delivered", "settled", "refunded"].contains(&state.as_str())).then_some(shown)
        };
        let shown = until(&format!("{silent:?}: the end"), over).await.unwrap();
        let paid = money(&network).await.1 - spent_before;
        let has = has_goods(&client, id, goods).await;
        assert_eq!(has, paid == PRICE, "{silent:?}: goods {has}, paid {paid}: {shown}");
        assert_eq!(shown["release"]["captured"], has, "{silent:?}: {shown}");
        match ends {
            Ends::Exchanged => assert!(has, "{silent:?}"),
            Ends::Nothing => assert!(!has && paid == 0, "{silent:?}"),
            Ends::Either => assert!(paid == 0 || paid == PRICE, "{silent:?}"),
        }
        println!("{silent:?}: {}", if has { "goods and money" } else { "neither goods nor money" });
        spent_before += paid;
    }
    network.books().await.unwrap();
    network.stop().await.unwrap();
}
