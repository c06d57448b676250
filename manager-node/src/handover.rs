//! Seeders that want to let go of content: because they leave, or because their disk is full. The last copies must not
//! go, and two seeders that ask at the same moment must not both be told that the other one has it. So it is decided here,
//! in one transaction, and what cannot go yet is copied elsewhere first.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use protocol::api::{Kept, KeptBecause, SeederReport};
use protocol::{Digest, PeerId};
use store::{StoreError, Txn, WriteTransaction};

use crate::context::Context;
use crate::placement;
use crate::standing::Standing;
use crate::tables::{
    GIVEN_UP, GivenUpRecord, HELD, HOLDERS, LEAVING, LeavingRecord, MANIFESTS, PENDING, PRODUCT_OF_MANIFEST, PRODUCTS,
};

/// A seeder that wants to let go of something says so again at each of its reports. One that was not heard to say so for this
/// long is gone. Milliseconds.
const STILL_MEANT_MS: u64 = 10 * 60 * 1000;
/// What a seeder removed because there were copies enough is not given back to it as its share for this long, milliseconds.
/// Where a copy is missing it may have it again at once.
const GIVEN_UP_MS: u64 = 7 * 24 * 60 * 60 * 1000;
/// After a restore, what nobody knows any more is kept by who stays for as long as leases from before it are in use: four
/// weeks, and a week of its own. Milliseconds.
const UNKNOWN_KEPT_MS: u64 = 35 * 24 * 60 * 60 * 1000;
/// Holders of one content that are counted: far more than the copies that are kept.
const HOLDERS_COUNTED: usize = 1024;

/// Those of `contents` that `peer` may let go of now; they do not count as held by it any more. With `hand_over` copies of
/// the others are ordered elsewhere, and it may ask again; with each goes what it waits for.
pub(crate) async fn release(
    ctx: &Arc<Context>,
    peer: PeerId,
    contents: Vec<Digest>,
    hand_over: bool,
    now: u64,
) -> Result<(Vec<Digest>, Vec<Kept>), StoreError> {
    let origin = ctx.registry.origin();
    let (asked, looking) = (contents.len(), Arc::clone(ctx));
    let (released, kept) = ctx
        .db
        .write(move |txn| {
            // Everybody else who is there, and the room of those who are given copies.
            let mut room = HashMap::new();
            let mut standing = Standing::load(&looking, txn, now, |other, record| {
                room.insert(other, record.free);
            })?;
            standing.here.remove(&peer);
            standing.awaited.remove(&peer);
            let full = standing.letting_go();
            room.retain(|other, _| *other != peer && !full.contains(other));
            forget_given_up(txn, &peer, now)?;
            // Sold after the backup from which this manager came back, maybe: buyers may still have good leases for it.
            let keeps_unknown = looking.restored_at.is_some_and(|at| now < at.saturating_add(UNKNOWN_KEPT_MS))
                && !looking.registry.leaves(&peer);
            // Counting those that leave as well, several that do so at once would wait for each other for ever.
            let able = standing.able();
            let (mut released, mut kept) = (Vec::new(), Vec::new());
            for digest in &contents {
                // Not in the books, or not yet since the last report, is no leave to let go of it.
                if !MANIFESTS.contains(txn, digest)? {
                    if keeps_unknown {
                        kept.push(Kept { manifest: *digest, copies: 0, wanted: 1, because: KeptBecause::NobodyElse });
                    } else {
                        released.push(*digest);
                    }
                    continue;
                }
                let holders = HOLDERS.prefix(txn, digest, HOLDERS_COUNTED)?;
                let mut serving: Vec<PeerId> = holders.into_iter().map(|((_, other), _)| other).collect();
                let of_origin = usize::from(standing.origin && serving.iter().any(|other| Some(*other) == origin));
                let of_seeders = serving.iter().filter(|other| standing.stands(other, digest)).count();
                serving.retain(|other| standing.serves(other, digest));
                // A small network cannot make more copies than it has seeders that stay; one whole copy there must be.
                let copies = placement::copies_of(&looking, digest, &serving, now);
                let wanted = if is_withdrawn(txn, digest)? { 0 } else { copies.min(able) };
                if may_go(of_seeders, of_origin, wanted) {
                    HELD.delete(txn, &(peer, *digest))?;
                    HOLDERS.delete(txn, &(*digest, peer))?;
                    LEAVING.delete(txn, &(peer, *digest))?;
                    // Who leaves may come back with all that it has.
                    if !hand_over {
                        GIVEN_UP.put(txn, &(peer, *digest), &GivenUpRecord { at: now })?;
                    }
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
                let copies = of_seeders + of_origin.min(usize::from(wanted == 0));
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

/// Whether one more copy may go beside so many that serve, where so many are wanted.
pub(crate) fn may_go(of_seeders: usize, of_origin: usize, wanted: usize) -> bool {
    of_seeders >= wanted && of_seeders + of_origin >= 1
}

/// Takes down what the first part of a report says of copies that are to go, and forgets what it does not say any more: a
/// seeder that stays after all is a source again at once, whether it was called off, started again or given more room.
pub(crate) fn as_reported(
    txn: &WriteTransaction<'_>,
    peer: PeerId,
    report: &SeederReport,
    now: u64,
) -> Result<(), StoreError> {
    for (key, record) in LEAVING.prefix(txn, &peer, usize::MAX)? {
        if !report.leaving && !report.moving.contains(&key.1) {
            LEAVING.delete(txn, &key)?;
        } else if now.saturating_sub(record.asked_at) > STILL_MEANT_MS / 4 {
            // Not at each report: there may be many of them.
            LEAVING.put(txn, &key, &LeavingRecord { asked_at: now })?;
        }
    }
    for digest in &report.moving {
        if HELD.contains(txn, &(peer, *digest))? {
            LEAVING.insert_new(txn, &(peer, *digest), &LeavingRecord { asked_at: now })?;
        }
    }
    Ok(())
}

/// Copies that their seeders gave up not long ago.
pub(crate) fn given_up(txn: &impl Txn, now: u64) -> Result<HashSet<(PeerId, Digest)>, StoreError> {
    let mut found = HashSet::new();
    GIVEN_UP.scan::<StoreError>(txn, .., |key, record| {
        if now.saturating_sub(record.at) <= GIVEN_UP_MS {
            found.insert(key);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// What a seeder gave up longer ago.
fn forget_given_up(txn: &WriteTransaction<'_>, peer: &PeerId, now: u64) -> Result<(), StoreError> {
    for (key, record) in GIVEN_UP.prefix(txn, peer, usize::MAX)? {
        if now.saturating_sub(record.at) > GIVEN_UP_MS {
            GIVEN_UP.delete(txn, &key)?;
        }
    }
    Ok(())
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
        if still_meant(record.asked_at, now) {
            found.insert(key);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// Whether the seeder wants to let go of this copy: it is no good source then.
pub(crate) fn is_leaving(txn: &impl Txn, peer: PeerId, manifest: &Digest, now: u64) -> Result<bool, StoreError> {
    let record = LEAVING.get(txn, &(peer, *manifest))?;
    Ok(record.is_some_and(|record| still_meant(record.asked_at, now)))
}

/// Whether what a seeder last said then is still meant.
pub(crate) fn still_meant(said_at: u64, now: u64) -> bool {
    now.saturating_sub(said_at) <= STILL_MEANT_MS
}
