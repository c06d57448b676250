//! Statements where a record of one seeder cannot be read any more.

use std::sync::Arc;

use protocol::PeerId;
use protocol::trust::KeyPurpose;
use serde_json::json;

use super::{BOOKS, OLD_STATEMENTS, get, make, step};
use crate::context::now_ms;
use crate::sales::tests::shop::{Outbox, Shop, Terms};

const DAY: u64 = 86_400_000;

/// Both seeders earn something.
async fn sold(shop: &Shop, order: &str) {
    let (id, _) = shop.buy(order).await;
    Outbox::of(shop, 0).send(shop, vec![shop.receipt(id, 0, 0..4)]).await;
    Outbox::of(shop, 1).send(shop, vec![shop.receipt(id, 1, 4..10)]).await;
}

#[tokio::test]
async fn a_damaged_statement_of_one_seeder_stops_neither_its_newer_ones_nor_those_of_others() {
    let shop = Shop::open(Terms::default()).await;
    let mut seeders = [0, 1].map(|n| shop.seeders.get(n).unwrap().peer_id());
    seeders.sort();
    // The first that is looked at.
    let [damaged, sound] = seeders;
    for order in ["o", "p"] {
        sold(&shop, order).await;
        for seeder in seeders {
            make(&shop.ctx, seeder, now_ms()).unwrap();
        }
    }
    let later = now_ms() + 91 * DAY;
    step(&shop.ctx, later).unwrap();
    let place = |seeder: PeerId| shop.ctx.db.read(|txn| OLD_STATEMENTS.get(txn, &(seeder, 1))).unwrap();
    assert!(place(sound).is_some(), "it moved out");
    shop.ctx.archive.spoil(place(damaged).unwrap());

    // The settlement key is given up: all that it signed is void.
    let stolen = json!({"cmd": "keys-prepare", "purpose": "settlement", "stolen": true, "margin_ms": 0});
    let prepared = shop.running.control(stolen).await.unwrap();
    let request: Vec<u8> = serde_json::from_value(prepared.get("request").unwrap().clone()).unwrap();
    let signed = crate::rotate::sign_key_set(&request, &shop.ctx.dir.join("root.key"), None).unwrap();
    let mut trust = protocol::trust::Trust::clone(&shop.ctx.trust());
    trust.update(protocol::codec::decode(&signed).unwrap()).unwrap();
    shop.ctx.keys.replace(crate::keys::ManagerKeys::fitting(&shop.ctx.dir, &trust).unwrap());
    *shop.ctx.trust.write().unwrap() = Arc::new(trust);
    super::renew_all(&shop.ctx, later).unwrap();
    sold(&shop, "q").await;
    step(&shop.ctx, later + 2 * DAY).unwrap();

    let active = shop.ctx.trust().active_key(KeyPurpose::Settlement).unwrap();
    let stored = |seeder, number| shop.ctx.db.read(|txn| get(&shop.ctx.archive, txn, seeder, number));
    assert_eq!(stored(sound, 1).unwrap().unwrap().signer(), active);
    assert!(stored(damaged, 1).is_err());
    for seeder in seeders {
        assert_eq!(shop.ctx.db.read(|txn| BOOKS.get(txn, &seeder)).unwrap().unwrap().number, 3);
        let [second, third] = [2, 3].map(|number| stored(seeder, number).unwrap().unwrap());
        assert_eq!((second.signer(), third.signer()), (active, active));
        assert_eq!(third.peek().unwrap().previous, Some(second.digest()));
    }
    // Each names the one before as that is signed now.
    assert_eq!(
        stored(sound, 2).unwrap().unwrap().peek().unwrap().previous,
        Some(stored(sound, 1).unwrap().unwrap().digest())
    );
    sold(&shop, "r").await;
    let answer = shop.control(json!({"cmd": "statements-make"})).await.unwrap();
    assert_eq!(answer.get("made").unwrap().as_array().unwrap().len(), 2, "{answer}");
    assert_eq!(answer.get("failed"), Some(&json!([])));
    shop.close().await;
}
