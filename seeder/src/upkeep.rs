//! What has to be done now and then: contents that were taken down go, and what was kept long enough is removed.

use std::sync::Arc;
use std::time::Duration;

use protocol::Digest;
use protocol::api::{SeederReport, provider_key};
use store::StoreError;

use crate::accounts;
use crate::clock::now_ms;
use crate::context::Seeder;
use crate::outbox;
use crate::tables::PLACEMENTS;

/// The contents that are here in whole and may be served.
pub(crate) fn complete(seeder: &Seeder) -> Vec<Digest> {
    let revoked = seeder.network.revoked();
    let contents = seeder.contents.list().into_iter().filter(|content| {
        let id = &content.manifest().content;
        content.is_complete() && !revoked.has_content(id) && !seeder.denied.contains(id)
    });
    contents.map(|content| content.digest()).collect()
}

/// Contents that are not whole and that no order is in hand for: chunks of them were found damaged, or they cannot be used
/// at all. Blocks.
pub(crate) fn damaged(seeder: &Seeder) -> Result<Vec<Digest>, StoreError> {
    if seeder.drain.is_leaving() {
        return Ok(Vec::new());
    }
    let revoked = seeder.network.revoked();
    let contents = seeder.contents.list().into_iter().filter(|content| {
        let id = &content.manifest().content;
        !content.is_complete() && !revoked.has_content(id) && !seeder.denied.contains(id)
    });
    let unusable = seeder.contents.damaged().into_iter().map(|(digest, _)| digest);
    let mut hurt: Vec<Digest> = contents.map(|content| content.digest()).chain(unusable).collect();
    // Not always the same ones: what nobody orders any more must not hide what is ordered again.
    let first = rand::random_range(0..hurt.len().max(1));
    hurt.rotate_left(first);
    seeder.db.read(|txn| {
        let mut found = Vec::new();
        for digest in hurt {
            let goes = seeder.letting_go.has(&digest);
            if found.len() < SeederReport::MAX_DAMAGED && !goes && !PLACEMENTS.contains(txn, &digest)? {
                found.push(digest);
            }
        }
        Ok(found)
    })
}

/// Removes contents as soon as they are taken down, or denied by this seeder's operator.
pub(crate) async fn purge(seeder: Arc<Seeder>) -> Result<(), std::convert::Infallible> {
    let token = seeder.supervisor.token();
    let mut changes = seeder.network.changes();
    loop {
        let shared = Arc::clone(&seeder);
        match tokio::task::spawn_blocking(move || purge_now(&shared)).await {
            Ok(removed) => {
                for digest in removed {
                    seeder.node.stop_providing(*provider_key(&seeder.network.id, &digest).as_bytes()).await;
                    seeder.wake.sync.notify_one();
                }
            }
            Err(error) => tracing::error!(%error, "contents taken down could not be removed"),
        }
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            // The sender of changes lives as long as the seeder.
            _ = changes.changed() => {}
        }
    }
}

fn purge_now(seeder: &Seeder) -> Vec<Digest> {
    let revoked = seeder.network.revoked();
    let mut removed = Vec::new();
    for content in seeder.contents.list() {
        let id = content.manifest().content;
        let why = match () {
            () if revoked.has_content(&id) => "taken down",
            () if seeder.denied.contains(&id) => "denied by this seeder's operator",
            () => continue,
        };
        let digest = content.digest();
        seeder.served.forget(&digest);
        match seeder.contents.remove(&digest) {
            Ok(_) => tracing::warn!(content = %digest, why, "content is removed"),
            Err(error) => {
                tracing::error!(content = %digest, why, %error, "content cannot be removed");
                seeder.notes.storage.set(format!("content {digest} was {why} and cannot be removed: {error}"));
            }
        }
        removed.push(digest);
    }
    removed
}

/// Removes accounts and receipts that were kept long enough.
pub(crate) async fn prune(seeder: Arc<Seeder>) -> Result<(), StoreError> {
    let token = seeder.supervisor.token();
    let every = Duration::from_millis(seeder.config.prune_ms);
    loop {
        let now = now_ms();
        while accounts::prune(&seeder.db, now).await? && !token.is_cancelled() {}
        let before = now.saturating_sub(seeder.config.receipt_keep_ms);
        while outbox::prune(&seeder.db, before).await? && !token.is_cancelled() {}
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = tokio::time::sleep(every) => {}
        }
    }
}
