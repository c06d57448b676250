//! Seeders that want to let go of content: because they leave, or because their disk is full. The last copies must not
//! go, and two seeders that ask at the same moment must not both be told that the other one has it. So it is decided here,
//! in one transaction, and what cannot go yet is copied elsewhere first.

use std::collections::HashSet;
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
    ROOM_LEFT, RoomLeftRecord,
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
            let mut room = Vec::new();
            let mut standing = Standing::load(&looking, txn, now, |other, record| {
                room.push((record.free, other));
            })?;
            standing.here.remove(&peer);
            standing.awaited.remove(&peer);
            let full = standing.letting_go();
            room.retain(|(_, other)| *other != peer && !full.contains(other));
            let mut known = None;
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
                // Or will not have it.
                let mut has = standing.unwanted.get(digest).cloned().unwrap_or_default();
                has.extend(holders.iter().map(|((_, other), _)| *other));
                let able = able.saturating_sub(standing.unable(digest));
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
                        ROOM_LEFT.delete(txn, &peer)?;
                    }
                    released.push(*digest);
                    continue;
                }
                if hand_over {
                    LEAVING.put(txn, &(peer, *digest), &LeavingRecord { asked_at: now })?;
                }
                let length = MANIFESTS.get(txn, digest)?.and_then(|signed| signed.peek().ok()).map_or(0, |m| m.length);
                let room = match &known {
                    Some(room) => room,
                    None => known.insert(Room::of(txn, std::mem::take(&mut room))?),
                };
                let because = match able {
                    0 => KeptBecause::NobodyElse,
                    _ if room.has_or_takes(digest, length, &has) => KeptBecause::UnderWay,
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
    if released.is_empty() {
        tracing::debug!(%peer, asked, "a seeder may let go of nothing");
    } else {
        tracing::info!(%peer, asked, released = released.len(), "a seeder lets go of content");
    }
    Ok((released, kept))
}

/// Where copies may still be made, for the questions of one seeder: it may ask about many contents, in a network of many
/// seeders, and all else that is written waits for the answer. So the tables are looked into once and not for each pair.
struct Room {
    /// Who is given copies, the one with the most room first.
    by_free: Vec<(u64, PeerId)>,
    /// Contents that were ordered at one of them.
    ordered: HashSet<Digest>,
}

impl Room {
    fn of(txn: &impl Txn, mut by_free: Vec<(u64, PeerId)>) -> Result<Room, StoreError> {
        let peers: HashSet<PeerId> = by_free.iter().map(|(_, peer)| *peer).collect();
        by_free.sort_unstable_by(|a, b| b.cmp(a));
        let mut ordered = HashSet::new();
        PENDING.scan::<StoreError>(txn, .., |(peer, manifest), _| {
            if peers.contains(&peer) {
                ordered.insert(manifest);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Room { by_free, ordered })
    }

    /// Whether a copy of so many bytes is on its way, or may be made by somebody who does not have one: looks at no more
    /// seeders than have one, and one more.
    fn has_or_takes(&self, manifest: &Digest, length: u64, has: &HashSet<PeerId>) -> bool {
        let fits = || self.by_free.iter().take_while(|(free, _)| *free >= length);
        self.ordered.contains(manifest) || fits().any(|(_, peer)| !has.contains(peer))
    }
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

/// Whether a seeder has more room than it had left after it gave something up.
pub(crate) fn has_more_room(left: u64, spare: u64) -> bool {
    spare > left
}

/// What a seeder gave up for want of room is forgotten when it says that it has more room than then: it was given more
/// capacity, or other content went. Then is its first report after that.
pub(crate) fn room_reported(txn: &WriteTransaction<'_>, peer: PeerId, spare: u64) -> Result<(), StoreError> {
    let left = ROOM_LEFT.get(txn, &peer)?;
    if left.is_none() && GIVEN_UP.prefix(txn, &peer, 1)?.is_empty() {
        return Ok(());
    }
    // Of room that was made for an order nothing is left.
    let mut spare = spare;
    for ((_, manifest), _) in PENDING.prefix(txn, &peer, usize::MAX)? {
        let Some(product) = PRODUCT_OF_MANIFEST.get(txn, &manifest)? else { continue };
        spare = spare.saturating_sub(PRODUCTS.get(txn, &product.id)?.map_or(0, |record| record.content_bytes));
    }
    match left {
        None => ROOM_LEFT.put(txn, &peer, &RoomLeftRecord { spare }),
        Some(left) if has_more_room(left.spare, spare) => forget_all_given_up(txn, &peer),
        Some(_) => Ok(()),
    }
}

/// All that a seeder gave up.
pub(crate) fn forget_all_given_up(txn: &WriteTransaction<'_>, peer: &PeerId) -> Result<(), StoreError> {
    for (key, _) in GIVEN_UP.prefix(txn, peer, usize::MAX)? {
        GIVEN_UP.delete(txn, &key)?;
    }
    ROOM_LEFT.delete(txn, peer)?;
    Ok(())
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

/// Whether what a seeder last said then is still meant.
pub(crate) fn still_meant(said_at: u64, now: u64) -> bool {
    now.saturating_sub(said_at) <= STILL_MEANT_MS
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use protocol::TransactionId;
    use store::Db;

    use super::*;
    use crate::tables::OrderRef;

    #[tokio::test]
    async fn what_is_on_its_way_or_has_a_place_is_known_without_a_look_for_each_content() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("m.redb"), store::Options::new(1)).unwrap();
        let peer = |n: u8| PeerId::from_bytes([n; 32]);
        let content = |n: u8| Digest::from_bytes([n; 32]);
        let order = OrderRef { order: TransactionId::new(1, [0; 10]) };
        db.write(move |txn| {
            PENDING.put(txn, &(peer(3), content(1)), &order)?;
            // At one that is given nothing.
            PENDING.put(txn, &(peer(9), content(2)), &order)
        })
        .await
        .unwrap();
        let room = db.read(|txn| Room::of(txn, vec![(5, peer(1)), (50, peer(2)), (20, peer(3))])).unwrap();
        let asked = |n: u8, length: u64, has: &[u8]| {
            room.has_or_takes(&content(n), length, &has.iter().map(|n| peer(*n)).collect())
        };
        assert!(asked(1, 100, &[]), "it is on its way");
        assert_eq!([50, 51].map(|length| asked(2, length, &[])), [true, false]);
        assert_eq!(
            [20, 21].map(|length| asked(2, length, &[2])),
            [true, false],
            "who has the most room has it already"
        );
        assert_eq!([5, 6].map(|length| asked(2, length, &[2, 3])), [true, false]);
        assert!(!asked(2, 0, &[1, 2, 3]));
    }
}
