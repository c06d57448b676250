//! Changes the network's keys while the manager runs. It prepares a key set, the root key signs it wherever it is kept,
//! and the signed set is checked, stored, announced to the mesh, and from then on signed with. Nothing is stopped, and
//! the manager never sees the root key.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::{Arc, PoisonError};

use node::ControlError;
use protocol::api::{News, TransactionState};
use protocol::manifest::Manifest;
use protocol::trust::{KeyEntry, KeyPurpose, KeySet, KeyState, Trust};
use protocol::{ContentId, Digest, PeerId, Signed, codec};
use serde::Deserialize;
use serde_json::{Value, json};
use store::StoreError;

use crate::catalogue;
use crate::context::{Context, now_ms};
use crate::keys::{self, ManagerKeys, purpose_name};
use crate::rotate::{Change, OldKey, next_set};
use crate::tables::{MANIFESTS, PRODUCTS};
use crate::transactions::{SALES, Sale};
use crate::{news, statements};

/// Products and purchases that are listed in one answer; all are counted.
const LISTED: usize = 200;
/// Keys that are given up go on signing for so long at most, until the set that says so is signed and brought back.
const MAX_MARGIN_MS: u64 = 30 * 24 * 60 * 60 * 1000;

fn failed(error: impl std::fmt::Display) -> ControlError {
    ControlError::new("keys-not-changed", error.to_string())
}

/// The keys as they stand.
pub(crate) fn list(ctx: &Context) -> Value {
    let trust = ctx.trust();
    let lines: Vec<Value> = trust
        .key_set()
        .keys
        .iter()
        .map(|entry| {
            let (state, last, dead) = match entry.state {
                KeyState::Active => ("active", None, None),
                KeyState::Retiring { not_issued_after, dead_after } => {
                    ("retiring", Some(not_issued_after), Some(dead_after))
                }
                KeyState::Revoked => ("revoked", None, None),
            };
            json!({
                "purpose": purpose_name(entry.purpose), "key": entry.key, "state": state, "not_issued_after": last,
                "dead_after": dead, "private_half_here": ctx.keys.opener(&entry.key).is_some(),
            })
        })
        .collect();
    json!({
        "version": trust.key_set().version, "root": trust.signed_key_set().signer(), "first_root": trust.root(),
        "next_root": trust.key_set().next_root, "keys": lines,
    })
}

/// What is to be changed: a purpose whose key is replaced, or a key that is void.
#[derive(Deserialize)]
pub(crate) struct PrepareArgs {
    purpose: Option<String>,
    /// The replaced key was stolen: everything that it signed is void.
    #[serde(default)]
    stolen: bool,
    /// Else what it signed stays good for so long.
    good_for_ms: Option<u64>,
    revoke: Option<PeerId>,
    /// The root key that is to follow.
    next_root: Option<PeerId>,
    /// The root key's word that it goes to another, as bytes; `next_root` is then the one to follow that one.
    handover: Option<Vec<u8>>,
    /// Until the signed set is brought back, at most.
    margin_ms: u64,
}

/// How long what a key signed stays good after it was replaced, where nothing else is said: tickets are renewed every
/// few days, certificates every year, and what the catalogue signed is delivered for as long as it was sold.
pub(crate) const fn good_for(purpose: KeyPurpose) -> u64 {
    const DAY: u64 = 24 * 60 * 60 * 1000;
    match purpose {
        KeyPurpose::Ticket => 30 * DAY,
        KeyPurpose::Enrolment | KeyPurpose::Revocation | KeyPurpose::Settlement => 400 * DAY,
        KeyPurpose::ReceiptSealing => 90 * DAY,
        KeyPurpose::Catalogue => 36_500 * DAY,
    }
}

/// The next key set, to be signed with the root key.
pub(crate) async fn prepare(ctx: &Arc<Context>, args: PrepareArgs) -> Result<Value, ControlError> {
    let change = match (&args.purpose, args.revoke, args.handover, args.next_root) {
        (None, None, Some(bytes), then) => Change::Root { handover: codec::decode(&bytes).map_err(failed)?, then },
        (None, None, None, Some(root)) => Change::NameRoot { root },
        (Some(name), None, None, None) => {
            let purpose = KeyPurpose::ALL.into_iter().find(|purpose| purpose_name(*purpose) == name);
            let purpose = purpose.ok_or_else(|| failed(format!("there is no key for '{name}'")))?;
            let good_for_ms = args.good_for_ms.unwrap_or(good_for(purpose));
            let old = if args.stolen { OldKey::Revoke } else { OldKey::Retire { good_for_ms } };
            Change::Rotate { purpose, old }
        }
        (None, Some(key), None, None) => Change::Revoke { key },
        _ => return Err(failed("one thing is changed at a time: a purpose's key, a key to revoke, or the root key")),
    };
    let stolen = match change {
        Change::Rotate { purpose, old: OldKey::Revoke } => Some(purpose),
        _ => None,
    };
    let (work, margin) = (Arc::clone(ctx), args.margin_ms.min(MAX_MARGIN_MS));
    let made = tokio::task::spawn_blocking(move || {
        let (set, report) = next_set(&work.dir, &work.trust(), change, now_ms(), margin).map_err(failed)?;
        let revoked = |key: &PeerId| set.keys.iter().any(|e| e.key == *key && e.state == KeyState::Revoked);
        let was = work.trust();
        let newly = |key: &PeerId| {
            revoked(key) && was.key_set().keys.iter().any(|e| e.key == *key && e.state != KeyState::Revoked)
        };
        let affected = void_goods(&work, |signed, _| newly(&signed.signer())).map_err(failed)?;
        // Whoever took the one from this folder has those that were replaced before, too.
        let mut also = Vec::new();
        if let Some(purpose) = stolen {
            let retiring = |e: &&KeyEntry| e.purpose == purpose && matches!(e.state, KeyState::Retiring { .. });
            also.extend(set.keys.iter().filter(retiring).map(|entry| entry.key));
        }
        Ok::<_, ControlError>((set, report, affected, also))
    });
    let (set, report, affected, also) = made.await.map_err(failed)??;
    Ok(json!({
        "request": codec::encode(&set), "in_force": codec::encode(ctx.trust().signed_key_set()),
        "version": report.version, "key": report.key, "replaced": report.replaced, "lost": report.lost,
        "own": report.own, "still_good": also,
        "void": affected,
    }))
}

/// What is void now because of the key that signed it.
pub(crate) async fn void(ctx: &Arc<Context>) -> Result<Value, ControlError> {
    let (work, trust, now) = (Arc::clone(ctx), ctx.trust(), now_ms());
    let looking = tokio::task::spawn_blocking(move || {
        void_goods(&work, |signed, published_at| catalogue::void(&trust, signed, published_at, now).is_some())
    });
    looking.await.map_err(failed)?.map_err(failed)
}

/// Products whose manifest `is_void`, as far as they are on sale, and purchases of such content that were paid for and are
/// not delivered: their buyers cannot fetch it, also not when the product is published again.
fn void_goods(ctx: &Context, is_void: impl Fn(&Signed<Manifest>, u64) -> bool) -> Result<Value, StoreError> {
    let mut manifests = HashSet::new();
    ctx.db.read(|txn| {
        MANIFESTS.scan::<StoreError>(txn, .., |digest, signed| {
            // One that cannot be read is looked for elsewhere.
            if signed.peek().is_ok_and(|manifest| is_void(&signed, manifest.published_at)) {
                manifests.insert(digest);
            }
            Ok(ControlFlow::Continue(()))
        })
    })?;
    let (mut products, mut product_count) = (Vec::new(), 0u64);
    if !manifests.is_empty() {
        ctx.db.read(|txn| {
            PRODUCTS.scan::<StoreError>(txn, .., |id, record| {
                let off = record.withdrawn || ctx.revocations.with(|revoked| revoked.has_content(&record.content));
                if !off && manifests.contains(&record.manifest) {
                    product_count += 1;
                    if products.len() < LISTED {
                        products.push(json!({"product": id, "title": record.title}));
                    }
                }
                Ok(ControlFlow::Continue(()))
            })
        })?;
    }
    let (purchases, purchase_count) = undelivered(ctx, &manifests, |_| true)?;
    Ok(json!({
        "products": products, "product_count": product_count, "purchases": purchases, "purchase_count": purchase_count,
    }))
}

/// Purchases of these manifests that are not delivered, as far as they are `meant`: some of them, and how many there are.
fn undelivered(
    ctx: &Context,
    manifests: &HashSet<Digest>,
    meant: impl Fn(&Sale) -> bool,
) -> Result<(Vec<Value>, u64), StoreError> {
    let (mut purchases, mut count) = (Vec::new(), 0u64);
    if manifests.is_empty() {
        return Ok((purchases, count));
    }
    ctx.db.read(|txn| {
        SALES.scan::<StoreError>(txn, .., |id, sale| {
            let waiting = matches!(sale.state, TransactionState::Released | TransactionState::Delivering);
            if waiting && manifests.contains(&sale.manifest) && meant(&sale) {
                count += 1;
                if purchases.len() < LISTED {
                    purchases.push(json!({
                        "transaction": id, "order": sale.request.order, "merchant": sale.merchant, "title": sale.title,
                    }));
                }
            }
            Ok(ControlFlow::Continue(()))
        })
    })?;
    Ok((purchases, count))
}

/// After a takedown: purchases of the content that were paid for and not delivered. Their buyers get nothing any more, and
/// in the books they end as if they had. Those whose payment is held are given back by themselves.
pub(crate) async fn taken_down(ctx: &Arc<Context>, content: ContentId) -> Result<Value, ControlError> {
    let work = Arc::clone(ctx);
    let looking = tokio::task::spawn_blocking(move || {
        let mut manifests = HashSet::new();
        work.db.read(|txn| {
            MANIFESTS.scan::<StoreError>(txn, .., |digest, signed| {
                if signed.peek().is_ok_and(|manifest| manifest.content == content) {
                    manifests.insert(digest);
                }
                Ok(ControlFlow::Continue(()))
            })
        })?;
        undelivered(&work, &manifests, |sale| !sale.awaits_completion())
    });
    let (purchases, count) = looking.await.map_err(failed)?.map_err(failed)?;
    Ok(json!({"purchases": purchases, "purchase_count": count}))
}

/// A signed key set.
#[derive(Deserialize)]
pub(crate) struct InstallArgs {
    signed: Vec<u8>,
}

/// Puts a signed key set in force.
pub(crate) async fn install(ctx: &Arc<Context>, args: InstallArgs) -> Result<Value, ControlError> {
    let signed: Signed<KeySet> = codec::decode(&args.signed).map_err(failed)?;
    let work = Arc::clone(ctx);
    let done = tokio::task::spawn_blocking(move || put_in_force(&work, signed)).await;
    let version = done.map_err(failed)??;
    after_change(ctx).await.map_err(failed)?;
    tracing::warn!(version, "a new key set is in force");
    Ok(json!({"version": version, "void": void(ctx).await?}))
}

/// What is to be said again, and made known, under a new key set.
pub(crate) async fn after_change(ctx: &Arc<Context>) -> Result<(), StoreError> {
    // What a stolen key signed is void, and a newcomer could not follow the chain.
    ctx.revocations.renew(&ctx.trust(), now_ms()).await?;
    let work = Arc::clone(ctx);
    match tokio::task::spawn_blocking(move || statements::renew_all(&work, now_ms())).await {
        Ok(Ok(())) => {}
        // The keys are in force all the same, and each seeder's are looked at whenever it asks.
        Ok(Err(error)) => tracing::error!(%error, "statements could not be signed again"),
        Err(error) => tracing::error!(%error, "statements could not be signed again"),
    }
    let trust = ctx.trust();
    news::publish(&ctx.node, &trust.network(), &News::KeySet(trust.signed_key_set().clone())).await;
    // Whoever misses the set learns of its number.
    news::beat(ctx).await?;
    Ok(())
}

/// Gives its version.
fn put_in_force(ctx: &Context, signed: Signed<KeySet>) -> Result<u64, ControlError> {
    // Held to the end: two sets at once would make a fork.
    let _turn = ctx.keys.turn();
    let in_force = ctx.trust();
    let mut trust = protocol::trust::Trust::clone(&in_force);
    let before = trust.key_set().version;
    trust.update(signed.clone()).map_err(failed)?;
    let set = trust.key_set();
    if set.version == before {
        // The same once more, after an answer that was lost.
        let same = signed == *in_force.signed_key_set();
        return same.then_some(before).ok_or_else(|| {
            failed(format!(
                "it is older than version {before}, which is in force; nothing was changed: prepare a new one"
            ))
        });
    }
    if set.version != before + 1 {
        return Err(failed(format!("it has version {}, {} is next; prepare a new one", set.version, before + 1)));
    }
    if !set.managers.contains(&ctx.peer) {
        return Err(failed("it does not name this manager"));
    }
    let now = now_ms();
    let late = set.keys.iter().any(|entry| {
        let was = in_force.key_set().keys.iter().find(|old| old.key == entry.key).map(|old| old.state);
        was == Some(KeyState::Active)
            && matches!(entry.state, KeyState::Retiring { not_issued_after, .. } if not_issued_after < now)
    });
    if late {
        return Err(failed(
            "the old key has signed since the time that it gives up at; prepare a new one, with more time",
        ));
    }
    let keys = ManagerKeys::fitting(&ctx.dir, &trust).map_err(failed)?;
    let stored = keys::store_own_key_set(&ctx.dir, &signed);
    stored.map_err(|(path, e)| failed(format!("cannot write {}: {e}", path.display())))?;
    keys::remember(&ctx.db, &trust).map_err(failed)?;
    let version = trust.key_set().version;
    follow(ctx, trust, keys);
    Ok(version)
}

/// From now on this is signed with, and that is trusted. The caller has the turn.
pub(crate) fn follow(ctx: &Context, trust: Trust, keys: ManagerKeys) {
    ctx.revocations.set_signer(keys.signer(KeyPurpose::Revocation));
    ctx.keys.replace(keys);
    *ctx.trust.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(trust);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use protocol::manifest::KeyPolicy;
    use protocol::replication::ReplicationOrder;
    use protocol::ticket::{Admission, TicketEnvelope};
    use protocol::trust::RevocationState;
    use protocol::{Currency, RefusalCode, TransactionId};

    use super::*;
    use crate::placement;
    use crate::rotate::sign_key_set;
    use crate::sales::tests::shop::{Outbox, Shop, Terms, random_key};
    use crate::tables::{ORDERS, OrderRecord, OrderRef, PENDING};

    async fn change(shop: &Shop, request: Value) -> Result<Value, ControlError> {
        let prepared = shop.running.control(request).await?;
        let request: Vec<u8> = serde_json::from_value(prepared["request"].clone()).unwrap();
        let signed = sign_key_set(&request, &shop.ctx.dir.join("root.key"), None).unwrap();
        shop.running.control(json!({"cmd": "keys-install", "signed": signed})).await?;
        Ok(prepared)
    }

    fn admitted(shop: &Shop, ticket: &protocol::ticket::Ticket) -> Result<(), RefusalCode> {
        let (trust, revoked) = (shop.ctx.trust(), RevocationState::default());
        let admission = Admission {
            peer: shop.client.peer_id(),
            seeder: shop.seeders[0].peer_id(),
            trust: &trust,
            revoked: &revoked,
            informed: None,
            continuation_ms: 0,
            now: now_ms(),
        };
        ticket.check(&admission).map(drop).map_err(|refusal| refusal.code)
    }

    #[tokio::test]
    async fn keys_change_while_sales_go_on_and_old_tickets_stay_good_until_the_key_is_revoked() {
        let shop = Shop::open(Terms::default()).await;
        let (id, before) = shop.buy("o").await;
        let (waiting, _) = shop.buy("w").await;
        let mut outbox = Outbox::of(&shop, 0);
        let first = shop.ctx.trust().signed_key_set().clone();
        let rotate = |purpose: &str| json!({"cmd": "keys-prepare", "purpose": purpose, "margin_ms": 60_000});
        let ticket_key = change(&shop, rotate("ticket")).await.unwrap();
        change(&shop, rotate("receipt-sealing")).await.unwrap();
        change(&shop, rotate("revocation")).await.unwrap();
        assert_eq!(shop.ctx.trust().key_set().version, 4);
        // One that is in force may be installed again, after an answer that was lost; an older one changes nothing, and is told so.
        let install = async |set: &Signed<KeySet>| {
            shop.running.control(json!({"cmd": "keys-install", "signed": codec::encode(set)})).await
        };
        install(shop.ctx.trust().signed_key_set()).await.unwrap();
        let older = install(&first).await.unwrap_err().message;
        assert!(older.contains("older than version 4"), "{older}");
        let (_, after) = shop.buy("p").await;
        assert_eq!(json!(after.ticket.lease.signer()), ticket_key["key"]);
        assert_eq!(admitted(&shop, &before.ticket), Ok(()));
        assert_eq!(admitted(&shop, &after.ticket), Ok(()));
        // A batch that was sealed to the key of before is opened.
        outbox.send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
        // An epoch by the new revocation key is one that the network's keys signed.
        shop.running
            .control(json!({"cmd": "revoke", "kind": "merchant", "id": shop.merchant.peer_id()}))
            .await
            .unwrap();
        let epoch = shop.ctx.revocations.newest().unwrap().unwrap();
        let trust = shop.ctx.trust();
        trust.open(&epoch, KeyPurpose::Revocation, |e| e.at, now_ms()).unwrap();

        let revoke = json!({"cmd": "keys-prepare", "revoke": before.ticket.lease.signer(), "margin_ms": 0});
        change(&shop, revoke).await.unwrap();
        assert_eq!(admitted(&shop, &before.ticket), Err(RefusalCode::KeyRetired));
        assert_eq!(admitted(&shop, &after.ticket), Ok(()));
        // The mailbox has a good one for it.
        let again = shop.ticket(waiting).await.unwrap();
        assert_eq!(admitted(&shop, &again.ticket), Ok(()));
        // What is on disk is what is in force: a restart finds the same.
        let (_, loaded) = ManagerKeys::load(&shop.ctx.dir, 0).unwrap();
        assert_eq!(loaded.signed_key_set(), shop.ctx.trust().signed_key_set());
        let listed = shop.running.control(json!({"cmd": "keys-list"})).await.unwrap();
        let revoked = listed["keys"].as_array().unwrap().iter().filter(|key| key["state"] == "revoked").count();
        assert_eq!((&listed["version"], revoked), (&json!(5), 1));
        shop.close().await;
    }

    #[tokio::test]
    async fn what_a_stolen_ticket_key_signed_is_signed_anew_and_lasts_no_longer_where_money_is_held() {
        let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
        let (id, before) = shop.buy("o").await;
        let (now, peer, ctx) = (now_ms(), shop.seeders[0].peer_id(), &shop.ctx);
        let order = ReplicationOrder {
            network: ctx.network(),
            order: TransactionId::new(now, [7; 10]),
            manifest: shop.manifest,
            seeder: peer,
            issued_at: now,
            until: now + ctx.config.order_ms,
            allowance: 1,
            rate: 1,
            currency: Currency::USD,
            ceiling: 1,
        };
        let (key, signed) = ((peer, shop.manifest), ctx.keys.sign(KeyPurpose::Ticket, &order));
        let stored = ctx.db.write_blocking(move |txn| {
            PENDING.put(txn, &key, &OrderRef { order: order.order })?;
            ORDERS.put(txn, &order.order, &OrderRecord { signed: signed.clone() })
        });
        stored.unwrap();
        let stolen = json!({"cmd": "keys-prepare", "purpose": "ticket", "stolen": true, "margin_ms": 0});
        change(&shop, stolen).await.unwrap();
        assert_eq!(admitted(&shop, &before.ticket), Err(RefusalCode::KeyRetired));

        let after = shop.ticket(id).await.unwrap();
        assert_eq!(admitted(&shop, &after.ticket), Ok(()));
        let terms = |envelope: &TicketEnvelope| {
            let lease = envelope.ticket.lease.peek().unwrap();
            (lease.end, lease.delivery, lease.generation, lease.ceiling, lease.rate)
        };
        assert_eq!(terms(&after), terms(&before));
        // Asked once more, it is the same one.
        assert_eq!(shop.ticket(id).await.unwrap().ticket.lease, after.ticket.lease);
        let placements = placement::for_seeder(ctx, peer, now_ms()).await.unwrap();
        let again = ctx.trust().open(&placements[0].order, KeyPurpose::Ticket, |order| order.issued_at, now_ms());
        assert_eq!(again.unwrap().order, order.order);
        shop.close().await;
    }

    #[tokio::test]
    async fn a_key_set_that_is_not_the_next_one_or_not_the_roots_is_refused() {
        let shop = Shop::open(Terms::default()).await;
        let rotate = json!({"cmd": "keys-prepare", "purpose": "ticket", "margin_ms": 60_000});
        let prepared = shop.running.control(rotate.clone()).await.unwrap();
        let request: Vec<u8> = serde_json::from_value(prepared["request"].clone()).unwrap();
        let set: KeySet = codec::decode(&request).unwrap();
        let install = async |signed: Signed<KeySet>| {
            let asked = json!({"cmd": "keys-install", "signed": codec::encode(&signed)});
            shop.running.control(asked).await.map_err(|error| error.message)
        };
        assert!(install(Signed::sign(&set, &random_key())).await.is_err());
        let root = node::load_key(&shop.ctx.dir.join("root.key"), None).unwrap();
        let ahead = KeySet { version: set.version + 1, ..set.clone() };
        assert!(install(Signed::sign(&ahead, &root)).await.unwrap_err().contains("is next"));
        // Too late: the old key has signed since.
        let late =
            shop.running.control(json!({"cmd": "keys-prepare", "purpose": "ticket", "margin_ms": 0})).await.unwrap();
        let request: Vec<u8> = serde_json::from_value(late["request"].clone()).unwrap();
        let mut late: KeySet = codec::decode(&request).unwrap();
        for entry in &mut late.keys {
            if let KeyState::Retiring { not_issued_after, .. } = &mut entry.state {
                *not_issued_after -= 1000;
            }
        }
        assert!(install(Signed::sign(&late, &root)).await.unwrap_err().contains("more time"));
        assert_eq!(shop.ctx.trust().key_set().version, 1);
        let foreign = shop.ctx.dir.join("key");
        assert!(sign_key_set(&request, &foreign, None).unwrap_err().to_string().contains("another network"));
        assert_eq!(install(Signed::sign(&set, &root)).await.unwrap()["version"], 2);
        // Again is no error.
        assert_eq!(install(Signed::sign(&set, &root)).await.unwrap()["version"], 2);
        shop.close().await;
    }

    #[tokio::test]
    async fn what_was_reserved_before_the_catalogue_key_was_revoked_is_not_released_after_it() {
        use protocol::api::{SalesRequest, SalesResponse};
        let shop = Shop::open(Terms::default()).await;
        let data = shop.reserve("before").await;
        let offered = async || match shop.sales(SalesRequest::Products { after: None }).await.unwrap() {
            SalesResponse::Products(products) => products.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(offered().await, 1);
        let stolen = json!({"cmd": "keys-prepare", "purpose": "catalogue", "stolen": true, "margin_ms": 0});
        let prepared = change(&shop, stolen).await.unwrap();
        assert_eq!((&prepared["void"]["product_count"], &prepared["void"]["purchase_count"]), (&json!(1), &json!(0)));
        let (transaction, endorsement) = (data.peek().unwrap().transaction, shop.endorse(&data, "before"));
        let released = shop.sales(SalesRequest::Release { transaction, endorsement }).await.unwrap_err();
        assert_eq!(released.code, RefusalCode::KeyRetired, "{released}");
        let reserved = shop.sales(SalesRequest::Reserve(shop.order("after"))).await.unwrap_err();
        assert_eq!(reserved.code, RefusalCode::KeyRetired, "{reserved}");
        assert_eq!(offered().await, 0);
        // This origin has nothing of it: only its files could bring it back.
        let again = shop.running.control(json!({"cmd": "republish", "id": shop.product})).await.unwrap_err();
        assert_eq!(again.code, "content-not-held", "{again:?}");
        shop.close().await;
    }

    #[tokio::test]
    async fn a_chain_of_statements_whose_first_key_was_revoked_is_signed_again_to_its_end() {
        use protocol::evidence::{StatementFile, check_statements};
        use protocol::statement::{ReceiptFate, ReceiptLine};
        let shop = Shop::open(Terms::default()).await;
        let (ctx, seeder) = (&shop.ctx, shop.seeders[0].peer_id());
        let state = async |from: u64, through: u64| {
            for n in from..=through {
                let receipt = protocol::Digest::of("test", &[&n.to_le_bytes()]);
                let (fate, at) = (ReceiptFate::Unknown, n);
                let line = ReceiptLine { receipt, delivery: None, at, chunks: 0, new_chunks: 0, fate };
                ctx.db.write(move |txn| statements::receipts(txn, &seeder, vec![line.clone()])).await.unwrap();
                assert_eq!(statements::make(ctx, seeder, now_ms()).unwrap(), n);
            }
        };
        let chain = |count: u64| -> Vec<_> {
            (0..count).map(|n| statements::after(ctx, seeder, n).unwrap().unwrap()).collect()
        };
        // More than are signed again at once, under two keys of which only the first was stolen.
        state(1, 11).await;
        let first = ctx.trust().active_key(KeyPurpose::Settlement).unwrap();
        change(&shop, json!({"cmd": "keys-prepare", "purpose": "settlement", "margin_ms": 60_000})).await.unwrap();
        state(12, 20).await;
        let before = chain(20);
        change(&shop, json!({"cmd": "keys-prepare", "revoke": first, "margin_ms": 0})).await.unwrap();
        state(21, 21).await;
        let after = chain(21);
        let said = |signed: &Signed<protocol::statement::Statement>| {
            let statement = signed.peek().unwrap();
            (statement.number, statement.until, statement.receipts, statement.covered)
        };
        assert!(before.iter().zip(&after).all(|(old, new)| old != new && said(old) == said(new)));
        let key_sets = vec![ctx.trust().signed_key_set().clone()];
        let (lines, good) = check_statements(&StatementFile { key_sets, statements: after }, &ctx.trust().root());
        assert_eq!(good.len(), 21, "{lines:?}");
        shop.close().await;
    }
}
