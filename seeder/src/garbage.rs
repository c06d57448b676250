//! What goes when the disk fills up: content that nobody is being served, that no live lease is for, and that the manager
//! says has enough other copies. Nothing else ever goes, and where that is not enough the operator is told so.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::Digest;
use protocol::api::{Kept, MeshRequest, MeshResponse, SeederReport, provider_key};
use store::StoreError;
use tokio::time::Instant;

use crate::clock::now_ms;
use crate::context::Seeder;
use crate::manager::AskError;
use crate::room::{Excess, Usage};
use crate::tables::{ACCOUNTS, PLACEMENTS};

/// Contents that the manager is asked about at once.
const ASKED_AT_ONCE: usize = SeederReport::MAX_MOVING;

/// What is to be copied elsewhere for want of room, as each report says.
#[derive(Debug, Default)]
pub(crate) struct Moving(Mutex<Vec<Digest>>);

impl Moving {
    pub(crate) fn get(&self) -> Vec<Digest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// True where it was something else before.
    fn set(&self, contents: Vec<Digest>) -> bool {
        let mut moving = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = *moving != contents;
        *moving = contents;
        changed
    }
}

/// What the manager let go of and still lies here: it is held no more, whatever a report says that is made meanwhile.
/// Others may let go of theirs by what a report says.
#[derive(Debug, Default)]
pub(crate) struct LettingGo(Mutex<HashSet<Digest>>);

impl LettingGo {
    pub(crate) fn has(&self, content: &Digest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(content)
    }

    fn set(&self, contents: HashSet<Digest>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = contents;
    }
}

/// Orders for which nothing could go: the manager is not asked about the same contents again and again.
struct Fruitless {
    ordered: u64,
    asked: HashSet<Digest>,
    pause: Duration,
    until: Instant,
}

impl Fruitless {
    /// Between a question for an order that let nothing go and the next one about the same: at first, and at most. What is
    /// missing for it changes elsewhere, in its time.
    const FIRST: Duration = Duration::from_secs(1);
    const MOST: Duration = Duration::from_secs(600);

    fn is_the_same(&self, ordered: u64, candidates: &[Candidate]) -> bool {
        self.ordered == ordered && candidates.iter().all(|candidate| self.asked.contains(&candidate.digest))
    }

    fn after(before: Option<Fruitless>, ordered: u64, asked: HashSet<Digest>) -> Fruitless {
        let pause = before.map_or(Self::FIRST, |before| before.pause.saturating_mul(2).min(Self::MOST));
        Fruitless { ordered, asked, pause, until: Instant::now() + pause }
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
    let mut fruitless = None;
    loop {
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = seeder.wake.collect.notified() => {}
            () = tokio::time::sleep(every) => {}
        }
        match Box::pin(round(&seeder, &mut fruitless)).await? {
            None => {
                seeder.notes.quota.clear();
                // What was to be copied elsewhere may stay: the manager hears it at once.
                if seeder.moving.set(Vec::new()) {
                    seeder.wake.sync.notify_one();
                }
            }
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
async fn round(seeder: &Arc<Seeder>, fruitless: &mut Option<Fruitless>) -> Result<Option<String>, StoreError> {
    let (looking, ordered) = (Arc::clone(seeder), seeder.wake.take_room());
    let looked = tokio::task::spawn_blocking(move || look(&looking, ordered)).await;
    let Looked { mut left, overfull, candidates } = match looked {
        Ok(looked) => looked?,
        Err(error) => return Ok(Some(format!("the content could not be looked through: {error}"))),
    };
    if left.is_none() {
        return Ok(None);
    }
    let same = fruitless.take_if(|before| before.is_the_same(ordered, &candidates));
    if !overfull
        && let Some(before) = &same
        && Instant::now() < before.until
    {
        *fruitless = same;
        return Ok(None);
    }
    let before = left;
    let asked = candidates.iter().map(|candidate| candidate.digest).collect();
    let trouble = make_room(seeder, &mut left, overfull, candidates).await;
    *fruitless = None;
    if ordered > 0 && left != before {
        seeder.wake.replicate.notify_one();
    } else if ordered > 0 {
        *fruitless = Some(Fruitless::after(same, ordered, asked));
    }
    // An order that finds no room says so itself.
    Ok(trouble.filter(|_| overfull))
}

/// Removes what may go until nothing is left to go; what it gives is why something is.
async fn make_room(
    seeder: &Arc<Seeder>,
    left: &mut Excess,
    overfull: bool,
    candidates: Vec<Candidate>,
) -> Option<String> {
    // First pieces of copies that are not being made any more. But where the other copies have their damage, too, a piece
    // may be the last of something: it is asked for like a whole one.
    let (whole, mut all): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|candidate| candidate.whole);
    all.extend(whole);
    // First what has copies enough. Only where that does not do, the manager is asked for more copies elsewhere.
    let (mut kept, mut let_go, mut trouble) = (Vec::new(), false, None);
    for batch in all.chunks(ASKED_AT_ONCE) {
        if left.is_none() {
            break;
        }
        let asked = batch.iter().map(|candidate| candidate.digest).collect();
        let may_go = |released: &HashSet<Digest>| seeder.letting_go.set(released.clone());
        let released = match ask(seeder, asked, false, may_go).await {
            Ok((released, _)) => released,
            Err(error) => {
                trouble = Some(format!("above the quota, and {error}"));
                break;
            }
        };
        let_go |= !released.is_empty();
        for candidate in batch {
            if !released.contains(&candidate.digest) {
                kept.push(candidate);
            } else if !left.is_none() {
                *left = remove(seeder, candidate, *left).await;
            }
        }
        seeder.letting_go.set(HashSet::new());
    }
    // What was released and stays after all is held again by the next report. Where nothing was, there is nothing to say, and
    // the answer would bring the order again for which room is made here.
    if let_go {
        seeder.wake.sync.notify_one();
    }
    // For an order only that goes which has copies enough.
    if left.is_none() || !overfull || trouble.is_some() {
        return trouble;
    }
    let mut moving = Vec::new();
    let mut planned = *left;
    for candidate in kept.into_iter().filter(|candidate| candidate.whole).take(ASKED_AT_ONCE) {
        if planned.is_none() {
            break;
        }
        planned = planned.less(candidate.bytes);
        moving.push(candidate.digest);
    }
    // Before it is asked: a report that is made meanwhile would take it back.
    if seeder.moving.set(moving.clone()) {
        seeder.wake.sync.notify_one();
    }
    if !moving.is_empty()
        && let Err(error) = ask(seeder, moving, true, |_| ()).await
    {
        return Some(format!("above the quota, and {error}"));
    }
    let (bytes, contents) = (left.bytes, left.contents);
    Some(format!(
        "{bytes} bytes and {contents} contents above the low-water mark are in use or have no other copies yet; the manager \
         is asked to have copies made elsewhere: raise capacity or max-inodes, or wait"
    ))
}

/// What has to go, and what may.
#[derive(Default)]
struct Looked {
    left: Excess,
    /// The high-water mark is passed.
    overfull: bool,
    /// The longest unserved first.
    candidates: Vec<Candidate>,
}

/// Looks what has to go: above the high-water mark, and for an order that needs so many bytes. Blocks.
fn look(seeder: &Seeder, ordered: u64) -> Result<Looked, StoreError> {
    let (config, usage) = (&seeder.config, Usage::of(seeder));
    let left = usage.must_go(config, ordered);
    if left.is_none() {
        return Ok(Looked::default());
    }
    let Asked { wanted, served } = asked(seeder, now_ms())?;
    let mut found: Vec<(u64, Candidate)> = seeder
        .contents
        .unused()
        .iter()
        .filter(|content| !wanted.contains(&content.digest()))
        .map(|content| {
            let (digest, bytes, whole) = (content.digest(), content.manifest().length, content.is_complete());
            let earlier = served.get(&digest).copied().unwrap_or(0);
            (seeder.served.last(&digest).max(earlier), Candidate { digest, bytes, whole })
        })
        .collect();
    found.sort_by_key(|(served, _)| *served);
    let candidates = found.into_iter().map(|(_, candidate)| candidate).collect();
    Ok(Looked { left, overfull: !usage.overfull(config).is_none(), candidates })
}

/// What is known of who asks for contents.
#[derive(Default)]
struct Asked {
    /// Those that are being made, or that somebody has a live lease for who was here before.
    wanted: HashSet<Digest>,
    /// When each was last served by its accounts, unix milliseconds: also before the start.
    served: HashMap<Digest, u64>,
}

fn asked(seeder: &Seeder, now: u64) -> Result<Asked, StoreError> {
    let mut asked = Asked::default();
    seeder.db.read(|txn| {
        PLACEMENTS.scan::<StoreError>(txn, .., |manifest, _| {
            asked.wanted.insert(manifest);
            Ok(ControlFlow::Continue(()))
        })?;
        ACCOUNTS.scan::<StoreError>(txn, .., |_, record| {
            // An account is kept for so long after its lease, and a delivery may go on for a while after it, too.
            let until = record.keep_until.saturating_sub(seeder.config.account_keep_ms);
            if record.account.completion.is_none() && until.saturating_add(seeder.config.continuation_ms) >= now {
                asked.wanted.insert(record.manifest);
            }
            let at = record.account.last_at.max(record.account.first_at);
            // A time that is still to come was noted by a clock that was ahead.
            if at <= now {
                let newest = asked.served.entry(record.manifest).or_default();
                *newest = at.max(*newest);
            }
            Ok(ControlFlow::Continue(()))
        })
    })?;
    Ok(asked)
}

/// Asks the manager which of these may go, and what the rest waits for; with `hand_over` it has copies of the rest made
/// elsewhere. What may go is shown to `may_go` before anything else is said to the manager of what is held here.
pub(crate) async fn ask(
    seeder: &Seeder,
    contents: Vec<Digest>,
    hand_over: bool,
    may_go: impl FnOnce(&HashSet<Digest>),
) -> Result<(HashSet<Digest>, Vec<Kept>), AskError> {
    let _alone = seeder.telling.lock().await;
    match seeder.manager.ask(&MeshRequest::Release { contents, hand_over }).await? {
        MeshResponse::Released { contents, kept } => {
            let released = contents.into_iter().collect();
            may_go(&released);
            Ok((released, kept))
        }
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
