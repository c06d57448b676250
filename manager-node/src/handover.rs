//! Seeders that want to let go of content: because they leave, or because their disk is full. The last copies must not
//! go, and two seeders that ask at the same moment must not both be told that the other one has it. So it is decided here,
//! in one transaction, and what cannot go yet is copied elsewhere first.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use protocol::api::{Kept, KeptBecause};
use protocol::{Digest, PeerId};
use store::{StoreError, Txn};

use crate::audit_fetch;
use crate::context::Context;
use crate::registry::{is_heard, stopped};
use crate::tables::{
    HELD, HOLDERS, LEAVING, LeavingRecord, MANIFESTS, PENDING, PRODUCT_OF_MANIFEST, PRODUCTS, SEEDERS,
};

/// A seeder that wants to let go of something says so again at each of its reports; one that stopped saying so for this
/// long changed its mind, or is gone. Milliseconds.
const STILL_MEANT_MS: u64 = 10 * 60 * 1000;
/// Holders of one content that are counted: far more than the copies that are kept.
const HOLDERS_COUNTED: usize = 1024;

/// Those of `contents` that `peer` may let go of now; they do not count as held by it any more. With `hand_over` copies of
/// the others are ordered elsewhere, and it may ask again; with each goes what it waits for.
pub(crate) async fn release(
    ctx: &Context,
    peer: PeerId,
    contents: Vec<Digest>,
    hand_over: bool,
    now: u64,
) -> Result<(Vec<Digest>, Vec<Kept>), StoreError> {
    let origin = ctx.registry.origin();
    let (copies, away_ms) = (usize::try_from(ctx.config.copies).unwrap_or(usize::MAX), ctx.config.seeder_away_ms);
    let revoked: HashSet<PeerId> = ctx.revocations.with(|revoked| {
        let seeders = ctx.registry.seeders(None, usize::MAX).unwrap_or_default();
        seeders.into_iter().map(|(peer, _)| peer).filter(|peer| revoked.has_peer(peer)).collect()
    });
    let asked = contents.len();
    let (released, kept) = ctx
        .db
        .write(move |txn| {
            let leaving = leaving(txn, now)?;
            let (failed, stopped) = (audit_fetch::failed(txn)?, stopped(txn)?);
            let full: HashSet<PeerId> = leaving.iter().map(|(peer, _)| *peer).collect();
            // Everybody else who is there, and the room of those who are given copies.
            let (mut here, mut room) = (HashSet::new(), HashMap::new());
            SEEDERS.scan::<StoreError>(txn, .., |other, record| {
                let is_here = is_heard(record.last_report, now, away_ms) && !stopped.contains(&other);
                if other != peer && !revoked.contains(&other) && is_here {
                    here.insert(other);
                    if Some(other) != origin && !full.contains(&other) && !failed.contains(&other) {
                        room.insert(other, record.free);
                    }
                }
                Ok(ControlFlow::Continue(()))
            })?;
            let (mut released, mut kept) = (Vec::new(), Vec::new());
            for digest in &contents {
                // Twice in one question, or nothing that anybody was ever sold.
                if !HELD.contains(txn, &(peer, *digest))? || !MANIFESTS.contains(txn, digest)? {
                    released.push(*digest);
                    continue;
                }
                let holders = HOLDERS.prefix(txn, digest, HOLDERS_COUNTED)?;
                let others = holders
                    .iter()
                    .map(|((_, other), _)| *other)
                    .filter(|other| here.contains(other) && !leaving.contains(&(*other, *digest)));
                let (of_origin, of_seeders): (Vec<_>, Vec<_>) = others.partition(|other| Some(*other) == origin);
                // A small network cannot make more copies than it has seeders; one whole copy there must be.
                let able = here.iter().filter(|other| Some(**other) != origin).count();
                let wanted = if is_withdrawn(txn, digest)? { 0 } else { copies.min(able) };
                if of_seeders.len() >= wanted && of_seeders.len() + of_origin.len() >= 1 {
                    HELD.delete(txn, &(peer, *digest))?;
                    HOLDERS.delete(txn, &(*digest, peer))?;
                    LEAVING.delete(txn, &(peer, *digest))?;
                    released.push(*digest);
                    continue;
                }
                if hand_over {
                    LEAVING.put(txn, &(peer, *digest), &LeavingRecord { asked_at: now })?;
                }
                let length = MANIFESTS.get(txn, digest)?.and_then(|signed| signed.peek().ok()).map_or(0, |m| m.length);
                let (mut under_way, mut has_room) = (false, false);
                for (other, free) in &room {
                    let ordered = PENDING.contains(txn, &(*other, *digest))?;
                    let has = HOLDERS.contains(txn, &(*digest, *other))?;
                    under_way |= ordered;
                    has_room |= !has && *free >= length;
                }
                let because = match able {
                    0 => KeptBecause::NobodyElse,
                    _ if under_way || has_room => KeptBecause::UnderWay,
                    _ => KeptBecause::NoRoom,
                };
                let copies = of_seeders.len() + of_origin.len().min(usize::from(wanted == 0));
                let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
                // One whole copy there must be, whoever has it.
                kept.push(Kept { manifest: *digest, copies: count(copies), wanted: count(wanted.max(1)), because });
            }
            Ok::<_, StoreError>((released, kept))
        })
        .await?;
    if hand_over && released.len() < asked {
        ctx.placements.wake();
    }
    tracing::info!(%peer, asked, released = released.len(), "a seeder lets go of content");
    Ok((released, kept))
}

fn is_withdrawn(txn: &impl Txn, manifest: &Digest) -> Result<bool, StoreError> {
    let Some(product) = PRODUCT_OF_MANIFEST.get(txn, manifest)? else { return Ok(true) };
    // Or has another manifest by now.
    Ok(PRODUCTS.get(txn, &product.id)?.is_none_or(|record| record.withdrawn || record.manifest != *manifest))
}

/// Copies that their seeders want to let go of, as far as they still mean it.
pub(crate) fn leaving(txn: &impl Txn, now: u64) -> Result<HashSet<(PeerId, Digest)>, StoreError> {
    let mut found = HashSet::new();
    LEAVING.scan::<StoreError>(txn, .., |key, record| {
        if now.saturating_sub(record.asked_at) <= STILL_MEANT_MS {
            found.insert(key);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// Whether the seeder wants to let go of this copy: it is no good source then.
pub(crate) fn is_leaving(txn: &impl Txn, peer: PeerId, manifest: &Digest, now: u64) -> Result<bool, StoreError> {
    let record = LEAVING.get(txn, &(peer, *manifest))?;
    Ok(record.is_some_and(|record| now.saturating_sub(record.asked_at) <= STILL_MEANT_MS))
}
