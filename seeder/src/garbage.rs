//! What goes when the disk fills up: content that nobody is being served, that no live lease is for, and that the manager
//! says has enough other copies. Nothing else ever goes, and where that is not enough the operator is told so.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use protocol::Digest;
use protocol::api::{Kept, MeshRequest, MeshResponse, provider_key};
use store::StoreError;

use crate::clock::now_ms;
use crate::config::Config;
use crate::context::Seeder;
use crate::manager::AskError;
use crate::tables::{ACCOUNTS, PLACEMENTS};

/// Files and folders of one content: its folder and the five files in it.
pub(crate) const INODES_PER_CONTENT: u64 = 6;
/// Contents that the manager is asked about at once.
const ASKED_AT_ONCE: usize = 32;

/// How full it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Free on the disk, above what is to stay free; `None` where the system does not say.
    pub(crate) disk_bytes: Option<i128>,
    pub(crate) disk_inodes: Option<i128>,
}

/// What has to go to be below a mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Excess {
    pub(crate) bytes: u64,
    pub(crate) contents: u64,
}

impl Excess {
    fn is_none(self) -> bool {
        self == Excess::default()
    }

    fn less(self, bytes: u64) -> Excess {
        Excess { bytes: self.bytes.saturating_sub(bytes), contents: self.contents.saturating_sub(1) }
    }
}

impl Usage {
    pub(crate) fn of(seeder: &Seeder) -> Usage {
        let root = seeder.contents.root();
        let above = |free: Result<u64, _>, kept: u64| {
            let free: Result<u64, delivery::FileError> = free;
            free.ok().map(|free| i128::from(free) - i128::from(kept))
        };
        Usage {
            bytes: seeder.contents.total_bytes(),
            inodes: (seeder.contents.list().len() + seeder.contents.damaged().len()) as u64 * INODES_PER_CONTENT,
            disk_bytes: above(delivery::free_space(root), seeder.config.min_free),
            disk_inodes: above(delivery::free_inodes(root), seeder.config.min_free_inodes),
        }
    }

    /// What is above `percent` of the quota, or of the disk's own limits.
    fn excess(&self, config: &Config, percent: u32) -> Excess {
        let above = |used: u64, quota: u64| {
            let mark = u128::from(quota) * u128::from(percent) / 100;
            u64::try_from(u128::from(used).saturating_sub(mark)).unwrap_or(u64::MAX)
        };
        let short = |left: Option<i128>| u64::try_from(left.map_or(0, |left| (-left).max(0))).unwrap_or(u64::MAX);
        let of_quota = if config.max_inodes == 0 { 0 } else { above(self.inodes, config.max_inodes) };
        Excess {
            bytes: above(self.bytes, config.capacity).max(short(self.disk_bytes)),
            contents: of_quota.max(short(self.disk_inodes)).div_ceil(INODES_PER_CONTENT),
        }
    }

    /// Contents that may still be placed here for their number of files.
    pub(crate) fn has_inodes(&self, config: &Config) -> bool {
        let quota = config.max_inodes == 0 || self.inodes + INODES_PER_CONTENT <= config.max_inodes;
        let disk = self.disk_inodes.is_none_or(|left| left >= i128::from(INODES_PER_CONTENT));
        quota && disk
    }
}

/// Something that might go.
struct Candidate {
    digest: Digest,
    bytes: u64,
    whole: bool,
}

/// How long a look at a content takes at most, and how many of them in a row are waited for.
const LOOK_TIME: Duration = Duration::from_millis(20);
const LOOKS: u32 = 50;

/// Looks now and then whether something has to go, until the node stops.
pub(crate) async fn collect(seeder: Arc<Seeder>) -> Result<(), StoreError> {
    let token = seeder.supervisor.token();
    let every = Duration::from_millis(seeder.config.gc_ms);
    loop {
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = seeder.wake.collect.notified() => {}
            () = tokio::time::sleep(every) => {}
        }
        match Box::pin(round(&seeder)).await? {
            None => seeder.notes.quota.clear(),
            Some(trouble) => {
                if seeder.notes.quota.get().as_deref() != Some(&trouble) {
                    tracing::warn!("{trouble}");
                }
                seeder.notes.quota.set(trouble);
            }
        }
    }
}

/// One look. What it gives is for the operator.
async fn round(seeder: &Arc<Seeder>) -> Result<Option<String>, StoreError> {
    let looking = Arc::clone(seeder);
    let looked = tokio::task::spawn_blocking(move || look(&looking)).await;
    let (mut left, candidates) = match looked {
        Ok(looked) => looked?,
        Err(error) => return Ok(Some(format!("the content could not be looked through: {error}"))),
    };
    if left.is_none() {
        return Ok(None);
    }
    // A piece of a copy that is not being made any more is of use to nobody.
    let (whole, parts): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|candidate| candidate.whole);
    for candidate in parts {
        if left.is_none() {
            return Ok(None);
        }
        left = remove(seeder, &candidate, left).await;
    }
    // First what has copies enough. Only where that does not do, the manager is asked for more copies elsewhere.
    let mut kept = Vec::new();
    for batch in whole.chunks(ASKED_AT_ONCE) {
        if left.is_none() {
            return Ok(None);
        }
        let released = match ask(seeder, batch.iter().map(|candidate| candidate.digest).collect(), false).await {
            Ok((released, _)) => released,
            Err(error) => return Ok(Some(format!("above the quota, and {error}"))),
        };
        for candidate in batch {
            if !released.contains(&candidate.digest) {
                kept.push(candidate);
            } else if !left.is_none() {
                left = remove(seeder, candidate, left).await;
            }
        }
    }
    // What was released and stays after all is held again by the next report.
    seeder.wake.sync.notify_one();
    if left.is_none() {
        return Ok(None);
    }
    let mut moving = Vec::new();
    let mut planned = left;
    for candidate in kept.into_iter().take(ASKED_AT_ONCE) {
        if planned.is_none() {
            break;
        }
        planned = planned.less(candidate.bytes);
        moving.push(candidate.digest);
    }
    if !moving.is_empty()
        && let Err(error) = ask(seeder, moving, true).await
    {
        return Ok(Some(format!("above the quota, and {error}")));
    }
    let (bytes, contents) = (left.bytes, left.contents);
    Ok(Some(format!(
        "{bytes} bytes and {contents} contents above the low-water mark are in use or have no other copies yet; the manager \
         is asked to have copies made elsewhere: raise capacity or max-inodes, or wait"
    )))
}

/// What has to go, if the high-water mark is passed, and what may; the longest unserved first. Blocks.
fn look(seeder: &Seeder) -> Result<(Excess, Vec<Candidate>), StoreError> {
    let (config, usage) = (&seeder.config, Usage::of(seeder));
    if usage.excess(config, config.high_water_percent).is_none() {
        return Ok((Excess::default(), Vec::new()));
    }
    let wanted = wanted(seeder, now_ms())?;
    let mut found: Vec<(u64, Candidate)> = seeder
        .contents
        .unused()
        .iter()
        .filter(|content| !wanted.contains(&content.digest()))
        .map(|content| {
            let (digest, bytes, whole) = (content.digest(), content.manifest().length, content.is_complete());
            (seeder.served.last(&digest), Candidate { digest, bytes, whole })
        })
        .collect();
    found.sort_by_key(|(served, _)| *served);
    Ok((usage.excess(config, config.low_water_percent), found.into_iter().map(|(_, candidate)| candidate).collect()))
}

/// Contents that are being made, or that somebody has a live lease for who was here before.
fn wanted(seeder: &Seeder, now: u64) -> Result<HashSet<Digest>, StoreError> {
    let mut wanted = HashSet::new();
    seeder.db.read(|txn| {
        PLACEMENTS.scan::<StoreError>(txn, .., |manifest, _| {
            wanted.insert(manifest);
            Ok(ControlFlow::Continue(()))
        })?;
        ACCOUNTS.scan::<StoreError>(txn, .., |_, record| {
            // An account is kept for so long after its lease, and a delivery may go on for a while after it, too.
            let until = record.keep_until.saturating_sub(seeder.config.account_keep_ms);
            if record.account.completion.is_none() && until.saturating_add(seeder.config.continuation_ms) >= now {
                wanted.insert(record.manifest);
            }
            Ok(ControlFlow::Continue(()))
        })
    })?;
    Ok(wanted)
}

/// Asks the manager which of these may go, and what the rest waits for; with `hand_over` it has copies of the rest made
/// elsewhere.
pub(crate) async fn ask(
    seeder: &Seeder,
    contents: Vec<Digest>,
    hand_over: bool,
) -> Result<(HashSet<Digest>, Vec<Kept>), AskError> {
    match seeder.manager.ask(&MeshRequest::Release { contents, hand_over }).await? {
        MeshResponse::Released { contents, kept } => Ok((contents.into_iter().collect(), kept)),
        _ => Err(AskError::Unexpected("a question what may go")),
    }
}

/// Removes a content unless somebody began to use it meanwhile; gives what is still left to go. Who only looks at it (a
/// status, a report) is done in a moment and waited for.
async fn remove(seeder: &Arc<Seeder>, candidate: &Candidate, left: Excess) -> Excess {
    let digest = candidate.digest;
    let mut looks = 0;
    loop {
        let removing = Arc::clone(seeder);
        match tokio::task::spawn_blocking(move || removing.contents.remove_unused(&digest)).await {
            Ok(Ok(true)) => break,
            Ok(Ok(false)) if looks < LOOKS => {
                looks += 1;
                tokio::time::sleep(LOOK_TIME).await;
            }
            Ok(Ok(false)) => return left,
            Ok(Err(error)) => {
                tracing::error!(content = %digest, %error, "content cannot be removed");
                return left;
            }
            Err(error) => {
                tracing::error!(content = %digest, %error, "content cannot be removed");
                return left;
            }
        }
    }
    seeder.served.forget(&digest);
    seeder.counts.collected.inc_by(candidate.bytes);
    seeder.node.stop_providing(*provider_key(&seeder.network.id, &digest).as_bytes()).await;
    tracing::info!(content = %digest, bytes = candidate.bytes, "content removed for want of room");
    left.less(candidate.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_of_the_quota_and_of_the_disk() {
        let config = Config { capacity: 1000, max_inodes: 60, ..Config::default() };
        let usage = Usage { bytes: 960, inodes: 30, disk_bytes: Some(5), disk_inodes: None };
        assert_eq!(usage.excess(&config, 95), Excess { bytes: 10, contents: 0 });
        assert_eq!(usage.excess(&config, 80), Excess { bytes: 160, contents: 0 });
        assert!(usage.has_inodes(&config));
        let many = Usage { bytes: 10, inodes: 60, disk_bytes: Some(-7), disk_inodes: Some(-13) };
        assert_eq!(many.excess(&config, 95), Excess { bytes: 7, contents: 3 });
        assert!(!many.has_inodes(&config));
        let endless = Config { max_inodes: 0, ..config };
        assert_eq!(Usage { inodes: 1 << 40, ..Usage::default() }.excess(&endless, 95), Excess::default());
    }
}
