//! A manager that came back from a backup may have forgotten key sets that everybody else holds. Whoever notices shows it
//! the newest one, which the root key signed. It follows that one: where a backup has its keys, or they were put back
//! beside it, nothing else is to be done; where one is lost, the manager says so, sells nothing, and numbers its next key
//! set above it, so that the network sees no fork.

use std::sync::Arc;

use protocol::signed::Signed;
use protocol::trust::{KeyPurpose, KeySet, Update};
use protocol::{Refusal, RefusalCode, codec};

use crate::context::Context;
use crate::init::write_file;
use crate::key_change::{after_change, follow};
use crate::keys::{self, newer_key_set_path};
use crate::sales::blocking;
use crate::transactions::{SaleError, internal};

/// Looks at a key set that somebody holds, and follows it where it is newer.
pub(crate) async fn shown(ctx: &Arc<Context>, signed: Signed<KeySet>) -> Result<(), Refusal> {
    // Most often it is known: no signature is verified for that.
    let version = signed.peek()?.version;
    let is_older = |ctx: &Context| {
        let trust = ctx.trust();
        version < trust.key_set().version || signed == *trust.signed_key_set()
    };
    if is_older(ctx) {
        return Ok(());
    }
    if blocking(ctx, move |ctx| take(ctx, signed)).await? {
        after_change(ctx).await.map_err(|error| internal(&error))?;
    }
    Ok(())
}

fn take(ctx: &Context, signed: Signed<KeySet>) -> Result<bool, SaleError> {
    // Held to the end, as when a new one is put in force.
    let _turn = ctx.keys.turn();
    let mut trust = protocol::trust::Trust::clone(&ctx.trust());
    if trust.update_from_others(signed.clone())? == Update::NotNewer {
        return Ok(false);
    }
    let version = trust.key_set().version;
    if !trust.key_set().managers.contains(&ctx.peer) {
        tracing::error!(version, "the network has a newer key set, which does not name this manager");
        return Err(Refusal::new(RefusalCode::WrongState, "it does not name this manager").into());
    }
    let keys = ctx.keys.followed_by(&ctx.dir, &trust).map_err(|error| internal(&error))?;
    let path = newer_key_set_path(&ctx.dir);
    write_file(&path, &codec::encode(&signed)).map_err(|error| internal(&error))?;
    keys::remember(&ctx.db, &trust)?;
    let missing = keys.missing();
    follow(ctx, trust, keys);
    match keys::lacking(version, &missing) {
        Some(trouble) => tracing::error!("{trouble}"),
        None => tracing::warn!(version, "took a newer key set that others hold: this manager has its keys"),
    }
    Ok(true)
}

impl Context {
    /// Why this manager sells nothing: keys of the network that it lost with its folder.
    pub(crate) fn keys_trouble(&self) -> Option<String> {
        keys::lacking(self.trust().key_set().version, &self.keys.missing())
    }

    /// # Errors
    /// `key-retired` while a key of the network is not here: what is sold under it nobody would deliver, or be paid for.
    pub(crate) fn may_sell(&self) -> Result<(), Refusal> {
        self.keys_trouble().map_or(Ok(()), |why| Err(Refusal::new(RefusalCode::KeyRetired, why)))
    }

    /// # Errors
    /// `key-retired` while the key of this purpose is not here: what was signed with the one before, nobody takes.
    pub(crate) fn may_sign(&self, purpose: KeyPurpose) -> Result<(), Refusal> {
        match self.keys.missing().contains(&purpose) {
            true => self.may_sell(),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use protocol::api::{MeshRequest, MeshResponse, SalesRequest};
    use protocol::trust::{KeyEntry, KeyState};
    use serde_json::json;

    use super::*;
    use crate::keys::ManagerKeys;
    use crate::rotate::sign_key_set;
    use crate::sales::tests::shop::{Outbox, Shop, Terms, random_key};

    async fn show(shop: &Shop, set: &Signed<KeySet>) -> Result<(), Refusal> {
        // Whoever it is: the key set proves itself.
        let shown = shop.running.mesh(random_key().peer_id(), MeshRequest::NewerKeySet(Box::new(set.clone()))).await;
        shown.map(|answer| assert_eq!(answer, MeshResponse::Noted))
    }

    async fn rotate(shop: &Shop, purpose: &str) -> serde_json::Value {
        rotate_by(shop, json!({"cmd": "keys-prepare", "purpose": purpose, "margin_ms": 60_000})).await
    }

    async fn rotate_by(shop: &Shop, asked: serde_json::Value) -> serde_json::Value {
        let prepared = shop.running.control(asked).await.unwrap();
        let request: Vec<u8> = serde_json::from_value(prepared["request"].clone()).unwrap();
        let signed = sign_key_set(&request, &shop.ctx.dir.join("root.key"), None).unwrap();
        shop.running.control(json!({"cmd": "keys-install", "signed": signed})).await.unwrap();
        prepared
    }

    /// The set after `before` with another key for each purpose, of which this manager has no private half.
    fn followed(before: &KeySet, purposes: &[KeyPurpose], issued_at: u64) -> KeySet {
        let mut set = KeySet { version: before.version + 1, issued_at, ..before.clone() };
        for purpose in purposes {
            for entry in set.keys.iter_mut().filter(|e| e.purpose == *purpose) {
                entry.state = KeyState::Retiring { not_issued_after: issued_at, dead_after: u64::MAX };
            }
            let key = random_key().peer_id();
            set.keys.push(KeyEntry { purpose: *purpose, key, state: KeyState::Active });
        }
        set
    }

    /// The folder came back from before a change of keys, signed under that number, and then its disk was stolen.
    #[tokio::test]
    async fn what_was_signed_with_a_stolen_key_that_the_network_never_saw_is_void_too() {
        let shop = Shop::open(Terms::default()).await;
        let root = node::load_key(&shop.ctx.dir.join("root.key"), None).unwrap();
        let first = shop.ctx.trust().key_set().clone();
        let theirs = Signed::sign(&followed(&first, &[KeyPurpose::Ticket], first.issued_at + 1), &root);
        for purpose in ["ticket", "settlement"] {
            rotate(&shop, purpose).await;
        }
        let own = shop.ctx.trust().key_set().clone();
        let theirs_later = KeySet { version: own.version, ..theirs.peek().unwrap() };
        show(&shop, &Signed::sign(&theirs_later, &root)).await.unwrap();
        let asked = json!({"cmd": "keys-prepare", "purpose": "ticket", "stolen": true, "margin_ms": 60_000});
        let prepared = rotate_by(&shop, asked).await;
        let set = shop.ctx.trust().key_set().clone();
        let own_key = |purpose| {
            own.keys
                .iter()
                .find(|e| e.purpose == purpose && e.state == KeyState::Active)
                .map(|entry| entry.key)
                .unwrap()
        };
        let state = |key| set.keys.iter().find(|entry| entry.key == key).map(|entry| entry.state).unwrap();
        let (ticket, settlement) = (own_key(KeyPurpose::Ticket), own_key(KeyPurpose::Settlement));
        assert_eq!(state(ticket), KeyState::Revoked);
        assert!(matches!(state(settlement), KeyState::Retiring { .. }), "nobody said that this one was stolen");
        assert_eq!(prepared["own"].as_array().unwrap().len(), 2, "{prepared}");
        shop.close().await;
    }

    /// The key was stolen and replaced, and then the folder came back from before.
    #[tokio::test]
    async fn statements_wait_for_a_key_that_is_good_where_the_one_from_before_is_void() {
        let shop = Shop::open(Terms::default()).await;
        let root = node::load_key(&shop.ctx.dir.join("root.key"), None).unwrap();
        let (id, _) = shop.buy("o").await;
        let mut outbox = Outbox::of(&shop, 0);
        outbox.send(&shop, vec![shop.receipt(id, 0, 0..5)]).await;
        let make = async || shop.running.control(json!({"cmd": "statements-make"})).await.unwrap();
        make().await;
        let count = async || {
            let listed = json!({"cmd": "statements", "seeder": shop.seeders[0].peer_id()});
            shop.running.control(listed).await.unwrap()["statements"].as_array().unwrap().len()
        };
        assert_eq!(count().await, 1);
        let before = shop.ctx.trust().key_set().clone();
        let mut theirs = followed(&before, &[KeyPurpose::Settlement], before.issued_at + 1);
        for entry in theirs.keys.iter_mut().filter(|entry| entry.purpose == KeyPurpose::Settlement) {
            if !matches!(entry.state, KeyState::Active) {
                entry.state = KeyState::Revoked;
            }
        }
        show(&shop, &Signed::sign(&theirs, &root)).await.unwrap();
        let batch = outbox.batch(vec![shop.receipt(id, 0, 0..10)]);
        crate::receipts::accept_batch(&shop.ctx, shop.seeders[0].peer_id(), batch).await.unwrap();
        make().await;
        assert_eq!(count().await, 1, "signed by a void key");
        assert!(crate::evidence::pack(&shop.ctx, id, crate::context::now_ms()).unwrap().record.is_none());

        rotate(&shop, "settlement").await;
        make().await;
        assert_eq!(count().await, 2);
        let trust = shop.ctx.trust();
        for number in 1..=2 {
            let seeder = shop.seeders[0].peer_id();
            let signed = shop.ctx.db.read(|txn| crate::statements::get(&shop.ctx.archive, txn, seeder, number));
            let signer = signed.unwrap().unwrap().signer();
            assert_eq!(Some(signer), trust.active_key(KeyPurpose::Settlement), "{number}");
        }
        shop.close().await;
    }

    #[tokio::test]
    async fn a_manager_that_forgot_its_keys_says_so_sells_nothing_and_is_no_fork_afterwards() {
        let shop = Shop::open(Terms::default()).await;
        let root = node::load_key(&shop.ctx.dir.join("root.key"), None).unwrap();
        let (_, sold) = shop.buy("before").await;
        let first = shop.ctx.trust().key_set().clone();
        let lost = [KeyPurpose::Ticket, KeyPurpose::ReceiptSealing];
        let theirs = Signed::sign(&followed(&first, &lost, first.issued_at + 1), &root);
        // Before anybody said so it has used their number again.
        rotate(&shop, "ticket").await;
        let again = shop.ctx.trust().signed_key_set().clone();
        let (id, _) = shop.buy("under keys that nobody knows").await;

        let forged = Signed::sign(&theirs.peek().unwrap(), &random_key());
        assert!(show(&shop, &forged).await.is_err());
        show(&shop, &Signed::sign(&first, &root)).await.unwrap();
        assert_eq!(shop.ctx.trust().signed_key_set(), &again);
        let status = async || shop.running.control(json!({"cmd": "status"})).await.unwrap();
        assert_eq!((&status().await["trouble"], &status().await["keys_missing"]), (&json!(null), &json!([])));
        show(&shop, &theirs).await.unwrap();
        show(&shop, &again).await.unwrap();
        assert_eq!(shop.ctx.trust().signed_key_set(), &theirs);
        let told = status().await;
        assert_eq!(told["keys_missing"], json!(["ticket", "receipt-sealing"]), "{told}");
        assert!(told["trouble"].as_str().unwrap().contains("keys rotate ticket"), "{told}");
        let refused = shop.sales(SalesRequest::Reserve(shop.order("after"))).await.unwrap_err();
        assert_eq!(refused.code, RefusalCode::KeyRetired, "{refused}");
        let refused = shop.ticket(id).await.unwrap_err();
        assert_eq!(
            refused.code,
            RefusalCode::KeyRetired,
            "its lease is void, and there is no key for another: {refused}"
        );
        // So it is after a restart.
        let (keys, trust) = ManagerKeys::load(&shop.ctx.dir, 0).unwrap();
        assert_eq!((trust.signed_key_set(), keys.missing()), (&theirs, lost.to_vec()));

        // One act replaces all that is lost, with a number of its own.
        let prepared = rotate(&shop, "ticket").await;
        assert_eq!((&prepared["version"], &prepared["lost"]), (&json!(3), &json!(["receipt-sealing"])));
        let mut others = protocol::trust::Trust::new(root.peer_id(), theirs.clone(), 0).unwrap();
        assert_eq!(others.update(shop.ctx.trust().signed_key_set().clone()), Ok(Update::Taken));
        let told = status().await;
        assert_eq!((&told["keys_missing"], &told["trouble"]), (&json!([]), &json!(null)), "{told}");
        let (keys, trust) = ManagerKeys::load(&shop.ctx.dir, 0).unwrap();
        assert_eq!((trust.key_set().version, keys.missing().len()), (3, 0));
        let (_, after) = shop.buy("after").await;
        assert_eq!(Some(after.ticket.lease.signer()), trust.active_key(KeyPurpose::Ticket));
        let renewed = shop.ticket(id).await.unwrap();
        // What the manager signed under the number that it used again is named by the set that all have now.
        assert_eq!(shop.admitted(&shop.client, &renewed), Ok(()), "sold under keys that were in no set");
        let own = renewed.ticket.lease.signer();
        assert!(trust.key_set().keys.iter().any(|e| e.key == own && matches!(e.state, KeyState::Retiring { .. })));
        assert_eq!(prepared["own"].as_array().unwrap().len(), 1, "{prepared}");
        assert_ne!(sold.ticket.lease.signer(), after.ticket.lease.signer());
        // One whose keys are here is followed as it is.
        let next = KeySet { version: 7, ..trust.key_set().clone() };
        show(&shop, &Signed::sign(&next, &root)).await.unwrap();
        assert_eq!(status().await["key_set_version"], 7);
        shop.buy("at last").await;
        shop.close().await;
    }
}
